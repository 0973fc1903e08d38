//! The self-check of a host, by the real programs: on this host's KVM, and where there is none.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use testkit::product::Product;
use testkit::{require_kvm, require_lab};

/// `axd selfcheck` and `ax-vmm --selfcheck`, as they are told to print JSON.
fn commands() -> [Command; 2] {
    let product = Product::get().unwrap();
    let mut axd = Command::new(&product.axd);
    axd.args(["selfcheck", "-o", "json"]);
    let mut ax_vmm = Command::new(&product.ax_vmm);
    ax_vmm.args(["--selfcheck", "-o", "json"]);
    [axd, ax_vmm]
}

/// The same command where /dev/kvm has been changed by a shell's `change`, for it alone.
fn where_kvm_is(command: &Command, change: &str) -> Command {
    let mut shell = Command::new("unshare");
    shell.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
    shell.arg(format!("set -e; {change}; exec \"$0\" \"$@\""));
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// Exit status, the checks by name in order, and what standard error said.
fn told(mut command: Command) -> (i32, Vec<(String, serde_json::Value)>, String) {
    let output = command.env_remove("AX_VMM").output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let checks = lines.lines().map(|line| {
        let check: serde_json::Value = serde_json::from_str(line).unwrap();
        (check["check"].as_str().unwrap().to_owned(), check)
    });
    (
        output.status.code().unwrap(),
        checks.collect(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn this_host_passes_and_says_what_was_tried() {
    require_kvm!();
    for command in commands() {
        let (code, checks, said) = told(command);
        assert_eq!(code, 0, "{checks:?} {said}");
        let names: Vec<&str> = checks.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["kvm", "save and restore", "dirty bitmap", "dirty ring"]
        );
        assert!(checks.iter().all(|(_, check)| check["ok"] == true));
        let of = |name: &str| {
            let found = checks.iter().find(|(n, _)| n == name).unwrap();
            found.1["detail"].as_str().unwrap().to_owned()
        };
        assert!(of("save and restore").contains("moved 10 times"));
        assert!(of("dirty bitmap").contains("60 epochs"));
    }
}

#[test]
fn people_are_told_line_by_line() {
    require_kvm!();
    let output = Command::new(&Product::get().unwrap().axd)
        .arg("selfcheck")
        .env_remove("AX_VMM")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(text.lines().all(|line| line.starts_with("ok   ")), "{text}");
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn without_a_usable_kvm_it_is_exit_3_with_the_cause_and_the_cure() {
    require_kvm!();
    require_lab!();
    let cases: [(&str, &[&str]); 2] = [
        (
            "mount --bind /dev/kvm /dev/kvm; mount -o remount,bind,nodev /dev/kvm",
            &["/dev/kvm", "Permission denied", "group kvm"],
        ),
        // Opens, but is no KVM: what is missing is named.
        ("mount --bind /dev/null /dev/kvm", &["lacks API version 12"]),
    ];
    for (change, words) in cases {
        for command in commands() {
            let is_axd = Path::new(command.get_program()).ends_with("axd");
            let (code, checks, said) = told(where_kvm_is(&command, change));
            assert_eq!(code, 3, "{change}: {checks:?} {said}");
            assert_eq!(checks.len(), 1, "{change}: nothing is tried without KVM");
            let (name, check) = &checks[0];
            assert_eq!((name.as_str(), &check["ok"]), ("kvm", &false.into()));
            assert_eq!(check["code"], 3);
            for word in words {
                let detail = check["detail"].as_str().unwrap();
                assert!(detail.contains(word), "{change}: {detail}");
                assert!(!is_axd || said.contains(word), "{change}: {said}");
            }
        }
    }
}
