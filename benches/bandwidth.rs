//! Capture and ship bandwidth: a guest that overwrites whole pages as fast as it can, so that every
//! epoch is as large as its budget allows, over mutual TLS and over a plain link.
//!
//! `AX_BENCH_SECONDS` (15): how long the guest writes.

mod common;

use std::process::ExitCode;
use std::time::Duration;

use common::{Guest, Result, number, rounded, setting};
use serde_json::json;
use testkit::site::{Site, SiteSpec};

/// Pages the guest writes to, round and round: 175 MiB of its 256.
const PAGES: u64 = 45_000;
const PAGE: f64 = 4096.0;

fn main() -> ExitCode {
    common::main("bandwidth", bench)
}

fn bench() -> Result<()> {
    let time = Duration::from_secs(setting("AX_BENCH_SECONDS", 15)?.max(7));
    println!("256 MiB, 1 vCPU; MB/s");
    println!("link   pages/epoch  capture     ship  sustained");
    let mut results = Vec::new();
    for (link, mtls) in [("mtls", true), ("plain", false)] {
        let spec = SiteSpec {
            mtls,
            ..SiteSpec::default()
        };
        let [pages, capture, ship, sustained] = common::on_site(spec, |site| measure(site, time))?;
        println!("{link:5}  {pages:11.0} {capture:8.0} {ship:8.0} {sustained:10.0}");
        results.push(json!({
            "link": link, "pages_p50": pages, "capture_mb_s": rounded(capture),
            "ship_mb_s": rounded(ship), "sustained_mb_s": rounded(sustained),
        }));
    }
    println!("{}", json!({"bench": "bandwidth", "results": results}));
    Ok(())
}

/// Pages an epoch; megabytes a second captured, shipped, and shipped on average.
fn measure(site: &Site, time: Duration) -> Result<[f64; 4]> {
    let guest = Guest::start(site, "bandwidth", "ft", &["--memory", "256M"])?;
    guest.command(&format!("DIRTY {PAGES} 1000000 4096"))?;
    std::thread::sleep(time);
    let status = guest.status()?;
    let pages = number(&status["pages"][0])?;
    // Bytes per microsecond are megabytes per second.
    let capture = pages * PAGE / number(&status["pause_us"][0])?;
    let ship = pages * PAGE / number(&status["ship_us"][0])?;
    let sustained = number(&status["link_bytes_per_second"])? / 1e6;
    Ok([pages, capture, ship, sustained])
}
