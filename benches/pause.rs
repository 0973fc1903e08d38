//! How long an epoch's pause is, from the first kick to the last vCPU running again, by the number of
//! pages that are dirty: at 256 MiB and 4 GiB of RAM, with KVM's dirty bitmap and its dirty ring.
//!
//! The guest's CPU is always busy (it must be kicked out of guest code), and no client is there: an
//! epoch ends every 40 ms, so that the guest can write exactly as many pages in it as it is told to.
//! Figures are those of `axvm show`.
//!
//! `AX_BENCH_SECONDS` (7): how long each number of pages is looked at; at least 7, because `axvm show`
//! tells of the last five seconds.

mod common;

use std::process::ExitCode;
use std::time::Duration;

use common::{Guest, Result, number, setting};
use serde_json::json;
use testkit::site::{Site, SiteSpec};

const PAGES: [u64; 7] = [0, 5, 15, 50, 100, 200, 1000];
/// Epochs a second without output.
const EPOCHS: u64 = 25;

fn main() -> ExitCode {
    common::main("pause", bench)
}

fn bench() -> Result<()> {
    let time = Duration::from_secs(setting("AX_BENCH_SECONDS", 7)?.max(7));
    common::on_site(SiteSpec::default(), |site| measure(site, time))
}

fn measure(site: &Site, time: Duration) -> Result<()> {
    println!("pause per epoch, microseconds; mutual TLS, 1 vCPU, busy");
    println!("RAM   source  written  pages p50     p50     p99");
    let mut results = Vec::new();
    for source in ["bitmap", "ring"] {
        for memory in ["256M", "4G"] {
            let name = format!("pause-{source}-{}", memory.to_lowercase());
            let more = ["--memory", memory, "--dirty", source];
            let guest = Guest::start(site, &name, "ft", &more)?;
            guest.command("SPIN on")?;
            for written in PAGES {
                // Every write goes to another page than the last ones did, twice as often as needed.
                let rate = written * EPOCHS * 2;
                guest.command(&format!("DIRTY {written} {rate} 64"))?;
                std::thread::sleep(time);
                let status = guest.status()?;
                let pages = number(&status["pages"][0])?;
                let pause = [
                    number(&status["pause_us"][0])?,
                    number(&status["pause_us"][1])?,
                ];
                println!(
                    "{memory:4}  {source:6}  {written:7} {pages:10.0} {:7.0} {:7.0}",
                    pause[0], pause[1]
                );
                results.push(json!({
                    "memory": memory, "source": source, "written": written, "pages_p50": pages,
                    "pause_us": {"p50": pause[0], "p99": pause[1]},
                }));
            }
        }
    }
    println!("{}", json!({"bench": "pause", "results": results}));
    Ok(())
}
