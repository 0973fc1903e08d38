//! What a change of mode costs the clients of a guest of 1 GiB that dirties memory: none → ft → none, under
//! closed loops of INCR, GET and UDP echo. The longest answer of each client is what it noticed.
//!
//! `AX_BENCH_ROUNDS` (3): changes there and back.

mod common;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, Result, rounded, setting};
use serde_json::json;
use testkit::client::{Origin, Percentiles, Samples, get, incr, port, udp};
use testkit::net::GUEST;
use testkit::site::{Side, Site, SiteSpec};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    common::main("modes", bench)
}

fn bench() -> Result<()> {
    let rounds = setting("AX_BENCH_ROUNDS", 3)?;
    common::on_site(SiteSpec::default(), |site| change(site, rounds))
}

fn change(site: &Site, rounds: u64) -> Result<()> {
    let _guest = Guest::start(site, "vm", "none", &["--memory", "1G"])?;
    let origin = Origin::In(site.lab.client.net().clone());
    let at = |port| SocketAddr::from((GUEST, port));
    let udp = udp::start(&origin, udp::UdpSpec::new(at(port::ECHO)))?;
    let incr = incr::start(&origin, incr::IncrSpec::new(at(port::RESP), "n"))?;
    let get = get::start(&origin, get::GetSpec::new(at(port::RESP), "bench"))?;
    udp.wait_for_answers(1000, PATIENCE)?;
    let mut took = Vec::new();
    for round in 1..=rounds {
        for mode in ["ft", "none"] {
            let began = Instant::now();
            site.run_axvm(Side::A, &["set-mode", "vm", mode])?;
            let ms = rounded(began.elapsed().as_secs_f64() * 1000.0);
            println!("round {round}: to {mode} in {ms} ms");
            took.push(json!({"to": mode, "ms": ms}));
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let (udp, incr, get) = (udp.stop()?, incr.stop()?, get.stop()?);
    if !incr.verdict.is_clean() {
        return Err(format!("a request failed: {:?} {:?}", incr.verdict, incr.breaks).into());
    }
    println!("client       p50 us    p99 us   longest ms");
    let mut results = Vec::new();
    for (client, samples) in [
        ("udp-echo", &udp.samples),
        ("resp-incr", &incr.samples),
        ("resp-get", &get.samples),
    ] {
        let p = of(samples);
        let longest = rounded(p.max / 1000.0);
        println!("{client:10} {:8.0} {:9.0} {longest:12}", p.p50, p.p99);
        results.push(json!({
            "client": client, "p50_us": rounded(p.p50), "p99_us": rounded(p.p99), "longest_ms": longest,
        }));
    }
    println!(
        "{}",
        json!({"bench": "modes", "changes": took, "results": results})
    );
    Ok(())
}

fn of(samples: &Samples) -> Percentiles {
    Percentiles::of(samples.latencies_between(samples.started(), Instant::now()))
}
