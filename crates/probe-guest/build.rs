//! Builds the guest's image from the nested package `guest/`: bare metal, but with the host's own
//! target and standard `core`, so that no further toolchain is needed.

use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let dir = PathBuf::from(env("CARGO_MANIFEST_DIR"));
    let guest = dir.join("guest");
    let out = PathBuf::from(env("OUT_DIR")).join("guest-target");
    for path in [
        "guest/src",
        "guest/Cargo.toml",
        "guest/Cargo.lock",
        "guest/linker.ld",
        "src",
    ] {
        watch(&dir.join(path));
    }
    println!("cargo:rerun-if-changed=build.rs");

    let script = guest.join("linker.ld");
    let mut flags = vec![
        "-Crelocation-model=static".to_owned(),
        "-Cforce-frame-pointers=no".into(),
    ];
    for arg in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
    ] {
        flags.push(format!("-Clink-arg={arg}"));
    }
    flags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));

    let mut cargo = Command::new(env("CARGO"));
    cargo
        .current_dir(&guest)
        .args(["build", "--release", "--locked", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&out);
    // What the outer build was asked for (flags, wrappers, coverage) is not meant for the guest.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let kept = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_CAINFO"];
        let outer = text.starts_with("CARGO")
            && !kept.contains(&&*text)
            && !text.starts_with("CARGO_REGISTRIES_")
            && !text.starts_with("CARGO_SOURCE_");
        let rustc = text.starts_with("RUSTC") || text == "RUSTFLAGS" || text == "RUSTDOCFLAGS";
        if outer || rustc {
            cargo.env_remove(&name);
        }
    }
    if let Some(rustc) = std::env::var_os("RUSTC") {
        cargo.env("RUSTC", rustc);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!(
            "building the guest in {} failed: {status}",
            guest.display()
        )),
        Err(e) => fail(&format!(
            "cannot run cargo for the guest in {}: {e}",
            guest.display()
        )),
    }
    let elf = out.join(TARGET).join("release/probe-guest-image");
    println!("cargo:rustc-env=PROBE_GUEST_ELF={}", elf.display());
}

fn watch(path: &Path) {
    // Cargo looks at a directory's whole content.
    println!("cargo:rerun-if-changed={}", path.display());
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| fail(&format!("{name} is not set: run by cargo")))
}

fn fail(why: &str) -> ! {
    eprintln!("probe-guest: {why}");
    std::process::exit(1)
}
