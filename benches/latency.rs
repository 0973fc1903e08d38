//! What protection adds to the time of an answer: the same client and the same guest in modes `none`
//! and `ft`, in turn, and the difference of the percentiles. UDP echo of 64 bytes every millisecond, and
//! RESP GET in a closed loop over one TCP connection.
//!
//! Each run has a guest of its own and no other guest is there: one that idles in mode `ft` would take
//! time from the one that is measured, and make the unprotected one look slower than it is. The order
//! is turned round from one round to the next, so that a drift of the machine cancels out.
//!
//! `AX_BENCH_SECONDS` (30): length of a run. `AX_BENCH_ROUNDS` (2): runs of each kind.

mod common;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, Result, rounded, setting};
use serde_json::json;
use testkit::client::{Origin, Percentiles, get, port, udp};
use testkit::net::GUEST;
use testkit::site::{Site, SiteSpec};

/// Left out at the start of each run: address resolution, connections, cold caches.
const WARM_UP: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);
const MODES: [&str; 2] = ["none", "ft"];
const CLIENTS: [&str; 2] = ["udp-echo", "resp-get"];

fn main() -> ExitCode {
    common::main("latency", bench)
}

/// Answer times in nanoseconds, by client and mode.
type Times = [[Vec<u64>; 2]; 2];

fn bench() -> Result<()> {
    let run = Duration::from_secs(setting("AX_BENCH_SECONDS", 30)?);
    let rounds = setting("AX_BENCH_ROUNDS", 2)?;
    let times = common::on_site(SiteSpec::default(), |site| interleave(site, run, rounds))?;
    summary(times);
    Ok(())
}

fn interleave(site: &Site, run: Duration, rounds: u64) -> Result<Times> {
    let mut times = Times::default();
    println!("answer times, microseconds; mutual TLS, 256 MiB, 1 vCPU, runs of {run:?}");
    println!("round  client    mode  answers      p50      p99    p99.9");
    for round in 0..rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for mode in order {
            let name = format!("{}-{round}", MODES[mode]);
            let _guest = Guest::start(site, &name, MODES[mode], &["--memory", "256M"])?;
            for (client, times) in times.iter_mut().enumerate() {
                let seen = measure(site, client, run)?;
                tell(round + 1, client, mode, &Percentiles::of(seen.clone()));
                times[mode].extend(seen);
            }
        }
    }
    Ok(times)
}

fn measure(site: &Site, client: usize, run: Duration) -> Result<Vec<u64>> {
    let origin = Origin::In(site.lab.client.net().clone());
    let at = |port| SocketAddr::from((GUEST, port));
    let samples = if client == 0 {
        let oracle = udp::start(&origin, udp::UdpSpec::new(at(port::ECHO)))?;
        oracle.wait_for_answers(1, PATIENCE)?;
        std::thread::sleep(WARM_UP + run);
        let report = oracle.stop()?;
        if report.answered * 100 < report.sent * 99 {
            let (answered, sent) = (report.answered, report.sent);
            return Err(format!("only {answered} of {sent} datagrams were answered").into());
        }
        report.samples
    } else {
        let oracle = get::start(&origin, get::GetSpec::new(at(port::RESP), "bench"))?;
        oracle.wait_for_answers(1, PATIENCE)?;
        std::thread::sleep(WARM_UP + run);
        oracle.stop()?.samples
    };
    let from = samples.started() + WARM_UP;
    Ok(samples.latencies_between(from, Instant::now()))
}

fn tell(round: u64, client: usize, mode: usize, p: &Percentiles) {
    println!(
        "{round:5}  {:8}  {:4}  {:7} {:8.0} {:8.0} {:8.0}",
        CLIENTS[client], MODES[mode], p.count, p.p50, p.p99, p.p999
    );
}

fn summary(times: Times) {
    println!();
    println!("added by protection: difference of the percentiles of all runs, microseconds");
    println!("client         p50      p99");
    let mut results = Vec::new();
    for (client, [none, ft]) in CLIENTS.into_iter().zip(times) {
        let (none, ft) = (Percentiles::of(none), Percentiles::of(ft));
        let added = [rounded(ft.p50 - none.p50), rounded(ft.p99 - none.p99)];
        println!("{client:8} {:9.0} {:8.0}", added[0], added[1]);
        results.push(json!({
            "client": client,
            "none_us": {"p50": rounded(none.p50), "p99": rounded(none.p99), "answers": none.count},
            "ft_us": {"p50": rounded(ft.p50), "p99": rounded(ft.p99), "answers": ft.count},
            "added_latency_us": {"p50": added[0], "p99": added[1]},
        }));
    }
    println!("{}", json!({"bench": "latency", "results": results}));
}
