//! What the two processes of a protected VM take beyond the guest's RAM: private memory and shared
//! memory of every mapping but the RAM's own memfd, from `/proc/PID/smaps`.
//!
//! Once with an idle guest, once with one that writes to all of its memory without end; then the largest
//! of many looks is told. Page tables are the kernel's and shown apart.
//!
//! `AX_BENCH_SECONDS` (30): how long the guest writes.

mod common;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, Result, rounded, setting};
use serde_json::json;
use testkit::net::Host;
use testkit::site::{Side, Site, SiteSpec};

const IDLE: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// More than any guest can do: as fast as it can.
const WRITES: u64 = 1_000_000;

fn main() -> ExitCode {
    common::main("memory", bench)
}

/// What one process takes, KiB.
#[derive(Debug, Default, Clone, Copy)]
struct Taken {
    /// Private memory.
    private: u64,
    /// Shared memory other than the guest's RAM.
    shmem: u64,
    /// The guest's RAM, as far as it is there.
    ram: u64,
    /// The kernel's page tables for it.
    tables: u64,
}

impl Taken {
    fn beyond(&self) -> u64 {
        self.private + self.shmem
    }

    fn larger(self, other: Taken) -> Taken {
        if other.beyond() > self.beyond() {
            other
        } else {
            self
        }
    }
}

fn bench() -> Result<()> {
    let writing = Duration::from_secs(setting("AX_BENCH_SECONDS", 30)?);
    common::on_site(SiteSpec::default(), |site| measure(site, writing))
}

fn measure(site: &Site, writing: Duration) -> Result<()> {
    println!("memory of ax-vmm beyond guest RAM, MiB; mutual TLS, 1 vCPU");
    println!("RAM   guest            side     private  shmem  beyond  RAM there  page tables");
    let mut results = Vec::new();
    for memory in ["256M", "4G"] {
        let name = format!("memory-{}", memory.to_lowercase());
        let guest = Guest::start(site, &name, "ft", &["--memory", memory])?;
        let idle = largest(site, IDLE)?;
        let pages = guest.all_pages()?;
        guest.command(&format!("DIRTY {pages} {WRITES} 8"))?;
        let busy = largest(site, writing)?;
        let status = guest.status()?;
        if status["phase"]["is"] != "protected" {
            return Err(format!("the guest lost its protection: {status}").into());
        }
        for (what, taken) in [("idle", idle), ("writes to all of it", busy)] {
            for (side, t) in ["primary", "shadow"].into_iter().zip(taken) {
                let mib = |kib: u64| rounded(kib as f64 / 1024.0);
                println!(
                    "{memory:4}  {what:19}  {side:7} {:8.1} {:6.1} {:7.1} {:10.1} {:12.1}",
                    mib(t.private),
                    mib(t.shmem),
                    mib(t.beyond()),
                    mib(t.ram),
                    mib(t.tables),
                );
                results.push(json!({
                    "memory": memory, "guest": what, "side": side, "pages": pages,
                    "beyond_ram_mib": mib(t.beyond()), "private_mib": mib(t.private),
                    "shmem_mib": mib(t.shmem), "ram_mib": mib(t.ram),
                    "page_tables_mib": mib(t.tables),
                }));
            }
        }
    }
    println!("{}", json!({"bench": "memory", "results": results}));
    Ok(())
}

/// The most each side took during so long a time.
fn largest(site: &Site, time: Duration) -> Result<[Taken; 2]> {
    let until = Instant::now() + time;
    let mut most = [Taken::default(); 2];
    while Instant::now() < until {
        for (most, side) in most.iter_mut().zip([Side::A, Side::B]) {
            *most = most.larger(taken(vmm_of(site.host(side))?)?);
        }
        std::thread::sleep(LOOK);
    }
    Ok(most)
}

fn vmm_of(host: &Host) -> Result<u32> {
    let processes = host.processes();
    let mut found = processes
        .iter()
        .filter(|(_, words)| words.contains("ax-vmm"));
    match (found.next(), found.next()) {
        (Some((pid, _)), None) => Ok(*pid),
        _ => Err(format!("not one ax-vmm on host {}: {processes:?}", host.name()).into()),
    }
}

fn taken(pid: u32) -> Result<Taken> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    let kib = |line: &str| -> u64 {
        let number = line.split_whitespace().nth(1);
        number.and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let mut taken = Taken::default();
    let mut path = String::new();
    for line in read("smaps")?.lines() {
        match line.split_once(':') {
            Some((key, _)) if !key.contains(char::is_whitespace) => {
                let (ram, shared) = (path.contains("ax-guest-ram"), is_shmem(&path));
                match key {
                    "Rss" if ram => taken.ram += kib(line),
                    "Rss" if shared => taken.shmem += kib(line),
                    "Private_Clean" | "Private_Dirty" if !ram && !shared => {
                        taken.private += kib(line);
                    }
                    _ => {}
                }
            }
            _ => {
                path = line
                    .split_whitespace()
                    .skip(5)
                    .collect::<Vec<_>>()
                    .join(" ")
            }
        }
    }
    let status = read("status")?;
    let tables = status.lines().find(|line| line.starts_with("VmPTE:"));
    taken.tables = tables.map_or(0, kib);
    Ok(taken)
}

fn is_shmem(path: &str) -> bool {
    ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV"]
        .iter()
        .any(|start| path.starts_with(start))
}
