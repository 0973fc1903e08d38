//! What protection leaves of a key-value store's throughput: `redis-benchmark` (Debian's redis-tools) with
//! 50 connections, GET and SET, one request after the other and with 16 in flight a connection, on the
//! same kind of guest in modes `none` and `ft`, in turn. *Kept* is `ft` over `none`.
//!
//! As in the latency bench each run has a guest of its own, and the order is turned round from one
//! round to the next.
//!
//! `AX_BENCH_SECONDS` (8): about how long each case runs. `AX_BENCH_ROUNDS` (2): runs of each kind.
//! `AX_BENCH_ONLY`: only the cases whose name contains it (`get-single`, `set-p16` …).
//! `AX_BENCH_CPUS` (2), `AX_BENCH_MEMORY` (512M): the guest.

mod common;

use std::process::{ExitCode, Stdio};

use common::{Guest, MODES, Result, Shape, median, rounded, setting, share};
use serde_json::{Value, json};
use testkit::client::port;
use testkit::net::GUEST;
use testkit::site::{Site, SiteSpec};

const PROGRAM: &str = "redis-benchmark";
const CONNECTIONS: &str = "50";
/// Requests of the run that says how many make up the time asked for, and fills the caches.
const FIRST: u64 = 4_000;
/// Seconds after which a run that is to take `AX_BENCH_SECONDS` has failed.
const PATIENCE: &str = "120";

/// One thing that is measured.
struct Case {
    name: &'static str,
    /// As redis-benchmark calls it.
    command: &'static str,
    /// Requests in flight on each connection.
    pipeline: &'static str,
    /// What is to be kept, of 1.
    target: f64,
}

#[rustfmt::skip]
const CASES: [Case; 4] = [
    Case { name: "get-single", command: "get", pipeline: "1", target: 0.6 },
    Case { name: "set-single", command: "set", pipeline: "1", target: 0.6 },
    Case { name: "get-p16", command: "get", pipeline: "16", target: 0.8 },
    Case { name: "set-p16", command: "set", pipeline: "16", target: 0.8 },
];

/// What redis-benchmark tells of a run.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Requests a second.
    rate: f64,
    /// Median answer time, milliseconds.
    p50_ms: f64,
    /// 99th percentile.
    p99_ms: f64,
}

fn main() -> ExitCode {
    common::main("throughput", bench)
}

fn bench() -> Result<()> {
    if !testkit::skip::is_installed(PROGRAM) {
        return Err(format!("{PROGRAM} is not installed (Debian's redis-tools)").into());
    }
    let seconds = setting("AX_BENCH_SECONDS", 8)?;
    let rounds = setting("AX_BENCH_ROUNDS", 2)?;
    let shape = Shape::from_env();
    let cases: Vec<&Case> = CASES
        .iter()
        .filter(|c| common::is_asked_for(c.name))
        .collect();
    println!(
        "redis-benchmark, {CONNECTIONS} connections; mutual TLS, {shape}; about {seconds} s each"
    );
    println!("round  case        mode  requests/s   p50 ms   p99 ms");
    let mut runs: Vec<[Vec<Run>; 2]> = cases.iter().map(|_| Default::default()).collect();
    common::on_site(SiteSpec::default(), |site| {
        for round in 0..rounds {
            for mode in common::order(round) {
                let name = format!("{}-{round}", MODES[mode]);
                let _guest = Guest::start(site, &name, MODES[mode], &shape.args())?;
                for (case, runs) in cases.iter().zip(&mut runs) {
                    let run = measure(site, case, seconds)?;
                    let Run {
                        rate,
                        p50_ms,
                        p99_ms,
                    } = run;
                    let (case, mode_name) = (case.name, MODES[mode]);
                    println!(
                        "{:5}  {case:10}  {mode_name:4} {rate:11.0} {p50_ms:8.2} {p99_ms:8.2}",
                        round + 1
                    );
                    runs[mode].push(run);
                }
            }
        }
        Ok(())
    })?;
    summary(&shape, &cases, &runs);
    Ok(())
}

fn measure(site: &Site, case: &Case, seconds: u64) -> Result<Run> {
    let first = run(site, case, FIRST)?;
    run(
        site,
        case,
        ((first.rate * seconds as f64) as u64).max(FIRST),
    )
}

fn run(site: &Site, case: &Case, requests: u64) -> Result<Run> {
    let mut command = site.lab.client.command("timeout");
    command.args([PATIENCE, PROGRAM, "--csv", "-h", &GUEST.to_string()]);
    command.args(["-p", &port::RESP.to_string(), "-c", CONNECTIONS]);
    command.args(["-n", &requests.to_string(), "-t", case.command]);
    command.args(["-P", case.pipeline]).stdin(Stdio::null());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    match read(&said, case.command) {
        Some(run) if output.status.success() => Ok(run),
        _ => {
            let complaints = String::from_utf8_lossy(&output.stderr);
            Err(format!("{PROGRAM}: {}: {said}{complaints}", output.status).into())
        }
    }
}

/// The line of `command` in what `--csv` prints: `"GET","52083.33","0.5",…` below a line of titles.
fn read(csv: &str, command: &str) -> Option<Run> {
    let mut rows = csv.lines().map(fields);
    let titles = rows.find(|row| row.first().is_some_and(|title| title == "test"))?;
    let row = rows.find(|row| {
        row.first()
            .is_some_and(|test| test.eq_ignore_ascii_case(command))
    })?;
    let column = |title: &str| {
        let n = titles.iter().position(|t| t == title)?;
        row.get(n)?.parse().ok()
    };
    Some(Run {
        rate: column("rps")?,
        p50_ms: column("p50_latency_ms")?,
        p99_ms: column("p99_latency_ms")?,
    })
}

fn fields(line: &str) -> Vec<String> {
    let bare = |field: &str| field.trim_matches('"').to_string();
    line.split(',').map(bare).collect()
}

fn summary(shape: &Shape, cases: &[&Case], runs: &[[Vec<Run>; 2]]) {
    println!();
    println!("medians of the runs; kept: ft over none");
    println!("case        none req/s    ft req/s   kept  target");
    let mut results = Vec::new();
    for (case, [none, ft]) in cases.iter().zip(runs) {
        let of = |runs: &[Run], figure: fn(&Run) -> f64| {
            median(&runs.iter().map(figure).collect::<Vec<_>>())
        };
        let told = |runs: &[Run]| -> Value {
            json!({
                "per_second": rounded(of(runs, |r| r.rate)),
                "p50_ms": share(of(runs, |r| r.p50_ms)),
                "p99_ms": share(of(runs, |r| r.p99_ms)),
            })
        };
        let rates = [of(none, |r| r.rate), of(ft, |r| r.rate)];
        let kept = rates[1] / rates[0];
        let (name, target) = (case.name, case.target);
        println!(
            "{name:10} {:11.0} {:11.0} {kept:6.3} {target:7}",
            rates[0], rates[1]
        );
        results.push(json!({
            "case": name, "none": told(none), "ft": told(ft), "kept": share(kept), "target_kept": target,
        }));
    }
    println!(
        "{}",
        json!({"bench": "throughput", "guest": shape.json(), "results": results})
    );
}
