//! How fast a guest gets its protection: the initial copy of its memory and of its disk by the whole
//! product, against what the same link carries by TCP alone, between the same two network namespaces and
//! in the same run. Over mutual TLS and over a plain link.
//!
//! The raw figure is iperf3's where it is installed, and this program's own sender and receiver elsewhere;
//! which is said. *memory*: a guest that has written to all the memory it can. *disk*: a guest of 128 MiB with a
//! disk full of noise, none of which the other host has. A copy begins with the primary's event `syncing`
//! and ends with `entering`.
//!
//! `AX_BENCH_MEMORY` (1G), `AX_BENCH_DISK` (1024): MiB of the disk. `AX_BENCH_ONLY`: only the cases whose name
//! contains it (`memory-mtls`, `disk-plain` …).

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, Result, number, rounded, setting, share};
use serde_json::{Value, json};
use testkit::net::addr;
use testkit::site::{Side, Site, SiteSpec};

const VM: &str = "resync";
const PAGE: u64 = 4096;
/// What is to be reached of the raw throughput.
const TARGET: f64 = 0.6;
/// How long the raw throughput is measured.
const RAW: Duration = Duration::from_secs(3);
const RAW_PORT: u16 = 5201;
/// Bytes of one write, as iperf3 does by default.
const PIECE: usize = 128 << 10;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    common::main("resync", bench)
}

fn bench() -> Result<()> {
    let memory = std::env::var("AX_BENCH_MEMORY").unwrap_or("1G".into());
    let disk = setting("AX_BENCH_DISK", 1024)?.max(1) << 20;
    let by = match testkit::skip::is_installed("iperf3") {
        true => "iperf3",
        false => "own sender",
    };
    println!("MB/s; raw TCP by {by}; 1 vCPU; target: {TARGET} of it");
    println!("copy    link    MB copied  seconds     rate      raw  share");
    let mut results = Vec::new();
    for (link, mtls) in [("mtls", true), ("plain", false)] {
        for what in ["memory", "disk"] {
            if !common::is_asked_for(&format!("{what}-{link}")) {
                continue;
            }
            let spec = SiteSpec {
                mtls,
                ..SiteSpec::default()
            };
            let (raw, copied, seconds) = common::on_site(spec, |site| {
                let raw = raw(site, by)?;
                let (copied, seconds) = match what {
                    "memory" => copy_memory(site, &memory)?,
                    _ => copy_disk(site, disk)?,
                };
                Ok((raw, copied as f64 / 1e6, seconds))
            })?;
            let rate = copied / seconds;
            println!(
                "{what:6}  {link:5} {copied:11.0} {seconds:8.2} {rate:8.0} {raw:8.0} {:6.2}",
                rate / raw
            );
            results.push(json!({
                "copy": what, "link": link, "copied_mb": copied.round(), "rate_mb_s": rounded(rate),
                "raw_tcp_mb_s": rounded(raw), "share": share(rate / raw), "target_share": TARGET,
            }));
        }
    }
    println!(
        "{}",
        json!({"bench": "resync", "raw_by": by, "results": results})
    );
    Ok(())
}

/// Bytes copied and the seconds that took, of a guest's memory.
fn copy_memory(site: &Site, memory: &str) -> Result<(u64, f64)> {
    let guest = Guest::start(site, VM, "none", &["--memory", memory])?;
    let pages = guest.all_pages()?;
    guest.command(&format!("DIRTY {pages} 1000000 4096"))?;
    let deadline = Instant::now() + PATIENCE;
    while guest.counted("writes")? < pages {
        if Instant::now() > deadline {
            return Err("the guest does not get its memory written".into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.command("DIRTY 0")?;
    Ok((pages * PAGE, protect(site)?))
}

/// The same of its disk.
fn copy_disk(site: &Site, bytes: u64) -> Result<(u64, f64)> {
    let disk = format!("resync.img,size={}M", bytes >> 20);
    let guest = Guest::start(site, VM, "none", &["--memory", "128M", "--disk", &disk])?;
    let image = site.data_dir(Side::A).join("images/resync.img");
    let file = std::fs::File::options().write(true).open(image)?;
    let mut noise: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut block = vec![0; 1 << 20];
    for at in (0..bytes).step_by(block.len()) {
        for word in block.chunks_exact_mut(8) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            word.copy_from_slice(&noise.to_le_bytes());
        }
        file.write_all_at(&block, at)?;
    }
    file.sync_all()?;
    let seconds = protect(site)?;
    let moved = number(&guest.status()?["disk_sync"]["moved"])? as u64;
    if moved < bytes {
        return Err(format!("only {moved} of {bytes} bytes of the disk were copied").into());
    }
    Ok((moved, seconds))
}

/// Protects the guest; how long the copy took, seconds.
fn protect(site: &Site) -> Result<f64> {
    site.run_axvm(Side::A, &["set-mode", VM, "ft"])?;
    let text = site.run_axvm(Side::A, &["-o", "json", "events", VM, "--this-host"])?;
    let events: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let at = |phase: &str| {
        let of_phase = |e: &&Value| {
            let event = &e["what"]["event"];
            event["what"] == "phase" && event["role"] == "primary" && event["phase"]["is"] == phase
        };
        let found = events.iter().find(of_phase);
        number(&found.ok_or(format!("host a tells of no {phase}"))?["at_ms"])
    };
    Ok((at("entering")? - at("syncing")?) / 1e3)
}

/// What TCP carries from host a to host b over the dedicated link, MB/s.
fn raw(site: &Site, by: &str) -> Result<f64> {
    match by {
        "iperf3" => iperf(site),
        _ => send_and_receive(site),
    }
}

fn iperf(site: &Site) -> Result<f64> {
    let mut server = site.lab.b.command("iperf3");
    server.args(["-s", "-1"]).stdin(Stdio::null());
    let mut server = server.stdout(Stdio::null()).spawn()?;
    std::thread::sleep(Duration::from_millis(500));
    let seconds = RAW.as_secs().to_string();
    let mut client = site.lab.a.command("iperf3");
    client.args(["-J", "-t", &seconds, "-c", &addr::link_b(0).to_string()]);
    let output = client.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let _ = server.kill();
        let said = String::from_utf8_lossy(&output.stdout);
        return Err(format!("iperf3: {}: {said}", output.status).into());
    }
    server.wait()?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    Ok(number(&report["end"]["sum_received"]["bits_per_second"])? / 8e6)
}

fn send_and_receive(site: &Site) -> Result<f64> {
    let at = SocketAddr::from((addr::link_b(0), RAW_PORT));
    let listener = site.lab.b.run(|| TcpListener::bind(at))??;
    let mut sender = site.lab.a.run(|| TcpStream::connect(at))??;
    let (mut receiver, _) = listener.accept()?;
    let sending = std::thread::spawn(move || {
        let (piece, began) = (vec![0x5a; PIECE], Instant::now());
        while began.elapsed() < RAW {
            sender.write_all(&piece)?;
        }
        std::io::Result::Ok(())
    });
    let (mut received, mut buffer, began) = (0, vec![0; PIECE], Instant::now());
    loop {
        match receiver.read(&mut buffer)? {
            0 => break,
            n => received += n,
        }
    }
    let took = began.elapsed();
    sending.join().map_err(|_| "the sender panicked")??;
    Ok(received as f64 / 1e6 / took.as_secs_f64())
}
