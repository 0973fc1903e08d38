//! What protection adds to the time of an answer: the same client and the same guest in modes `none`
//! and `ft`, in turn, and the difference of the percentiles. UDP echo of 64 bytes every millisecond, to a
//! guest that does nothing else and to one that writes to 1,000 and to 10,000 pages a second meanwhile;
//! and RESP GET in a closed loop over one TCP connection.
//!
//! Each run has a guest of its own and no other guest is there: one that idles in mode `ft` would take
//! time from the one that is measured, and make the unprotected one look slower than it is. The order
//! is turned round from one round to the next, so that a drift of the machine cancels out.
//!
//! `AX_BENCH_SECONDS` (10): length of a run. `AX_BENCH_ROUNDS` (2): runs of each kind.
//! `AX_BENCH_ONLY`: only the cases whose name contains it (`udp-echo-idle`, `udp-echo-1k`, `udp-echo-10k`,
//! `resp-get`); with 4 s a run one of them takes less than 30 s.
//! `AX_BENCH_CPUS` (2), `AX_BENCH_MEMORY` (512M): the guest.

mod common;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, MODES, Result, Shape, rounded, setting};
use serde_json::{Value, json};
use testkit::client::{Origin, Percentiles, get, port, udp};
use testkit::net::GUEST;
use testkit::site::{Site, SiteSpec};

/// Left out at the start of each run: address resolution, connections, cold caches.
const WARM_UP: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

enum Client {
    /// While the guest writes to so many pages a second, each time another one.
    UdpEcho {
        pages: u64,
    },
    RespGet,
}

struct Case {
    name: &'static str,
    client: Client,
}

#[rustfmt::skip]
const CASES: [Case; 4] = [
    Case { name: "udp-echo-idle", client: Client::UdpEcho { pages: 0 } },
    Case { name: "udp-echo-1k", client: Client::UdpEcho { pages: 1_000 } },
    Case { name: "udp-echo-10k", client: Client::UdpEcho { pages: 10_000 } },
    Case { name: "resp-get", client: Client::RespGet },
];

fn main() -> ExitCode {
    common::main("latency", bench)
}

/// Answer times in nanoseconds of a case, by mode.
type Times = [Vec<u64>; 2];

fn bench() -> Result<()> {
    let run = Duration::from_secs(setting("AX_BENCH_SECONDS", 10)?);
    let rounds = setting("AX_BENCH_ROUNDS", 2)?;
    let shape = Shape::from_env();
    let cases: Vec<&Case> = CASES
        .iter()
        .filter(|c| common::is_asked_for(c.name))
        .collect();
    let mut times: Vec<Times> = cases.iter().map(|_| Times::default()).collect();
    println!("answer times, microseconds; mutual TLS, {shape}, runs of {run:?}");
    println!("round  case           mode  answers      p50      p99    p99.9  pages  pause");
    common::on_site(SiteSpec::default(), |site| {
        for round in 0..rounds {
            for mode in common::order(round) {
                let name = format!("{}-{round}", MODES[mode]);
                let guest = Guest::start(site, &name, MODES[mode], &shape.args())?;
                for (case, times) in cases.iter().zip(&mut times) {
                    let seen = measure(site, &guest, case, run)?;
                    let epoch = match mode {
                        1 => guest.status()?,
                        _ => Value::Null,
                    };
                    tell(
                        round + 1,
                        case,
                        mode,
                        &Percentiles::of(seen.clone()),
                        &epoch,
                    );
                    times[mode].extend(seen);
                }
            }
        }
        Ok(())
    })?;
    summary(&shape, &cases, times);
    Ok(())
}

fn measure(site: &Site, guest: &Guest, case: &Case, run: Duration) -> Result<Vec<u64>> {
    let origin = Origin::In(site.lab.client.net().clone());
    let at = |port| SocketAddr::from((GUEST, port));
    let samples = match case.client {
        Client::UdpEcho { pages } => {
            guest.command(&format!("DIRTY {pages} {pages} 64"))?;
            let oracle = udp::start(&origin, udp::UdpSpec::new(at(port::ECHO)))?;
            oracle.wait_for_answers(1, PATIENCE)?;
            std::thread::sleep(WARM_UP + run);
            let report = oracle.stop()?;
            guest.command("DIRTY 0")?;
            if report.answered * 100 < report.sent * 99 {
                let (answered, sent) = (report.answered, report.sent);
                return Err(format!("only {answered} of {sent} datagrams were answered").into());
            }
            report.samples
        }
        Client::RespGet => {
            let oracle = get::start(&origin, get::GetSpec::new(at(port::RESP), "bench"))?;
            oracle.wait_for_answers(1, PATIENCE)?;
            std::thread::sleep(WARM_UP + run);
            oracle.stop()?.samples
        }
    };
    let from = samples.started() + WARM_UP;
    Ok(samples.latencies_between(from, Instant::now()))
}

/// One run; `epoch` is what the primary says of its last five seconds, nothing without protection.
fn tell(round: u64, case: &Case, mode: usize, p: &Percentiles, epoch: &Value) {
    let median = |figure: &str| {
        epoch[figure][0]
            .as_u64()
            .map_or("-".into(), |n| n.to_string())
    };
    println!(
        "{round:5}  {:13}  {:4}  {:7} {:8.0} {:8.0} {:8.0} {:>6} {:>6}",
        case.name,
        MODES[mode],
        p.count,
        p.p50,
        p.p99,
        p.p999,
        median("pages"),
        median("pause_us"),
    );
}

fn summary(shape: &Shape, cases: &[&Case], times: Vec<Times>) {
    println!();
    println!("added by protection: difference of the percentiles of all runs, microseconds");
    println!("case               p50      p99");
    let mut results = Vec::new();
    for (case, [none, ft]) in cases.iter().zip(times) {
        let (none, ft) = (Percentiles::of(none), Percentiles::of(ft));
        let added = [rounded(ft.p50 - none.p50), rounded(ft.p99 - none.p99)];
        println!("{:13} {:8.0} {:8.0}", case.name, added[0], added[1]);
        let told = |p: &Percentiles| json!({"p50": rounded(p.p50), "p99": rounded(p.p99), "answers": p.count});
        results.push(json!({
            "case": case.name, "none_us": told(&none), "ft_us": told(&ft),
            "added_latency_us": {"p50": added[0], "p99": added[1]},
        }));
    }
    println!(
        "{}",
        json!({"bench": "latency", "guest": shape.json(), "results": results})
    );
}
