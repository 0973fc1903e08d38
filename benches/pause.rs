//! How long an epoch's pause is, from the first kick to the last vCPU running again, by the number of
//! pages that are dirty: at 256 MiB and 4 GiB of RAM, with KVM's dirty bitmap and its dirty ring.
//!
//! Twice: *idle*, with no client, when an epoch ends every 50 ms and the guest writes exactly as many
//! pages in it as it is told to; and *asked*, with a UDP echo every millisecond, when an epoch ends
//! as soon as output waits. The guest's CPU is always busy: it must be kicked out of guest code. Figures
//! are those of `axvm show`.
//!
//! `AX_BENCH_SECONDS` (7): how long each number of pages is looked at; at least 7, because `axvm show`
//! tells of the last five seconds. `AX_BENCH_ONLY`: only the series whose name contains it, such as `idle`,
//! `ring` or `asked-bitmap-4g`.

mod common;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, Result, number, rounded, setting};
use serde_json::{Value, json};
use testkit::client::{Origin, Percentiles, port, udp};
use testkit::net::GUEST;
use testkit::site::{Site, SiteSpec};

const PAGES: [u64; 7] = [0, 5, 15, 50, 100, 200, 1000];
/// Most epochs a second: without output, and with a client that asks every millisecond.
const EPOCHS: [u64; 2] = [25, 1500];

fn main() -> ExitCode {
    common::main("pause", bench)
}

fn bench() -> Result<()> {
    let time = Duration::from_secs(setting("AX_BENCH_SECONDS", 7)?.max(7));
    let only = std::env::var("AX_BENCH_ONLY").unwrap_or_default();
    common::on_site(SiteSpec::default(), |site| {
        println!("pause per epoch, microseconds; mutual TLS, 1 vCPU, busy");
        println!(
            "clients  RAM   source  written  pages p50     p50     p99   park save harvest copy close resume   echo p50   p99"
        );
        let mut results = Vec::new();
        for (asked, clients) in ["idle", "asked"].into_iter().enumerate() {
            for source in ["bitmap", "ring"] {
                for memory in ["256M", "4G"] {
                    let name = format!("{clients}-{source}-{}", memory.to_lowercase());
                    if name.contains(&only) {
                        let series = Series {
                            name,
                            asked: asked == 1,
                            source,
                            memory,
                        };
                        measure(site, time, &series, &mut results)?;
                    }
                }
            }
        }
        println!("{}", json!({"bench": "pause", "results": results}));
        Ok(())
    })
}

struct Series {
    name: String,
    asked: bool,
    source: &'static str,
    memory: &'static str,
}

fn measure(site: &Site, time: Duration, of: &Series, results: &mut Vec<Value>) -> Result<()> {
    let (source, memory) = (of.source, of.memory);
    let clients = if of.asked { "asked" } else { "idle" };
    let guest = Guest::start(
        site,
        &of.name,
        "ft",
        &["--memory", memory, "--dirty", source],
    )?;
    guest.command("SPIN on")?;
    let origin = Origin::In(site.lab.client.net().clone());
    for written in PAGES {
        // Every write goes to another page than the last ones did, twice as often as needed.
        let rate = written * EPOCHS[usize::from(of.asked)] * 2;
        guest.command(&format!("DIRTY {written} {rate} 64"))?;
        let client = match of.asked {
            true => {
                let echo = udp::UdpSpec::new(SocketAddr::from((GUEST, port::ECHO)));
                Some(udp::start(&origin, echo)?)
            }
            false => None,
        };
        std::thread::sleep(time);
        let status = guest.status()?;
        let answered = match client {
            None => None,
            Some(client) => {
                let samples = client.stop()?.samples;
                let from = samples.started() + time / 4;
                Some(Percentiles::of(
                    samples.latencies_between(from, Instant::now()),
                ))
            }
        };
        let pages = number(&status["pages"][0])?;
        let pause = [
            number(&status["pause_us"][0])?,
            number(&status["pause_us"][1])?,
        ];
        let echo_us = answered.map_or([0.0; 2], |p| [rounded(p.p50), rounded(p.p99)]);
        let parts = &status["pause_parts_us"];
        println!(
            "{clients:7}  {memory:4}  {source:6}  {written:7} {pages:10.0} {:7.0} {:7.0}   {:4} {:4} {:7} {:4} {:5} {:6}   {:8.0} {:5.0}",
            pause[0],
            pause[1],
            parts["park"],
            parts["save"],
            parts["harvest"],
            parts["copy"],
            parts["close"],
            parts["resume"],
            echo_us[0],
            echo_us[1],
        );
        results.push(json!({
            "clients": clients, "memory": memory, "source": source, "written": written,
            "pages_p50": pages, "pause_us": {"p50": pause[0], "p99": pause[1]}, "parts_us": parts,
            "echo_us": {"p50": echo_us[0], "p99": echo_us[1]},
        }));
    }
    Ok(())
}
