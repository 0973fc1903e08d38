//! How long clients hear nothing when the host of their guest dies, or the guest's process alone: the
//! longest silence around a SIGKILL, the worse of a UDP echo every millisecond and a closed loop of INCR
//! over TCP; and what it consists of. Each failover has a pair of its own.
//!
//! The parts, each a median, milliseconds: *notice*, from the SIGKILL until the other side knows; then, as
//! that side tells it (`axvm events -o json`, `promoted`), *apply* what was acknowledged and make the disks
//! durable, *restore* the machine, wait out the *permission* of the one that died (rule 24), the arbiter's
//! *grant*, the *disks'* new generation, *start*, *release*; and *answer*, from there to the client's first
//! answer. Notice and answer go by the wall clock of events, which counts in milliseconds: their sum is
//! exact, where it is cut is not.
//!
//! `AX_BENCH_FAILOVERS` (10): how many of each kind. `AX_BENCH_ONLY`: only the kinds whose name contains it
//! (`host-256m`, `process-256m`, `host-4g`, `process-4g`). `AX_BENCH_CPUS` (2): virtual CPUs.

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Guest, Result, median, number, rounded, setting};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testkit::client::{Origin, Percentiles, Samples, incr, port, udp};
use testkit::net::GUEST;
use testkit::site::{Side, Site, SiteSpec};

const VM: &str = "blackout";
/// How long the clients are answered before the SIGKILL, and after the first answer that follows it.
const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(30);
/// Parts the new primary tells of, in their order.
const TOLD: [&str; 7] = [
    "apply",
    "restore",
    "permission",
    "grant",
    "disks",
    "start",
    "release",
];

#[derive(Clone, Copy)]
enum Victim {
    /// Every process of the host.
    Host,
    /// The guest's process.
    Process,
}

struct Kind {
    name: &'static str,
    victim: Victim,
    memory: &'static str,
}

#[rustfmt::skip]
const KINDS: [Kind; 4] = [
    Kind { name: "host-256m", victim: Victim::Host, memory: "256M" },
    Kind { name: "process-256m", victim: Victim::Process, memory: "256M" },
    Kind { name: "host-4g", victim: Victim::Host, memory: "4G" },
    Kind { name: "process-4g", victim: Victim::Process, memory: "4G" },
];

/// One failover, milliseconds.
struct Failover {
    udp: f64,
    incr: f64,
    /// By name.
    parts: BTreeMap<&'static str, f64>,
}

impl Failover {
    fn blackout(&self) -> f64 {
        self.udp.max(self.incr)
    }
}

fn main() -> ExitCode {
    common::main("blackout", bench)
}

fn bench() -> Result<()> {
    let failovers = setting("AX_BENCH_FAILOVERS", 10)?.max(1);
    let cpus = std::env::var("AX_BENCH_CPUS").unwrap_or("2".into());
    println!("milliseconds; mutual TLS, {cpus} vCPU; {failovers} failovers of each kind");
    let mut results = Vec::new();
    for kind in KINDS.iter().filter(|k| common::is_asked_for(k.name)) {
        let mut seen = Vec::new();
        for n in 1..=failovers {
            let one = common::on_site(SiteSpec::default(), |site| fail(site, kind, &cpus))?;
            let (all, udp, incr) = (one.blackout(), one.udp, one.incr);
            let parts: Vec<_> = one
                .parts
                .iter()
                .map(|(k, v)| format!("{k} {v:.1}"))
                .collect();
            println!(
                "{:13}{n:3}  {all:6.1} (udp {udp:.1}, incr {incr:.1})  {}",
                kind.name,
                parts.join(", ")
            );
            seen.push(one);
        }
        results.push(sum_up(kind, &seen));
    }
    println!(
        "{}",
        json!({"bench": "blackout", "cpus": cpus, "failovers": failovers, "results": results})
    );
    Ok(())
}

fn fail(site: &Site, kind: &Kind, cpus: &str) -> Result<Failover> {
    let shape = [
        "--memory",
        kind.memory,
        "--cpus",
        cpus,
        "--disk",
        "blackout.img,size=64M",
    ];
    let _guest = Guest::start(site, VM, "ft", &shape)?;
    let origin = Origin::In(site.lab.client.net().clone());
    let at = |port| SocketAddr::from((GUEST, port));
    let echo = udp::start(&origin, udp::UdpSpec::new(at(port::ECHO)))?;
    let incr = incr::start(&origin, incr::IncrSpec::new(at(port::RESP), "n"))?;
    echo.wait_for_answers(1, PATIENCE)?;
    incr.wait_for_answers(1, PATIENCE)?;
    let shown = site.show(Side::B, VM)?;
    if shown["state"] != "protected" {
        return Err(format!("the guest is not protected: {shown}").into());
    }
    std::thread::sleep(BEFORE);
    let (echoes, incrs) = (echo.answers(), incr.answers());
    let (killed, wall) = (Instant::now(), SystemTime::now());
    match kind.victim {
        Victim::Host => drop(site.host(Side::A).kill_all()?),
        Victim::Process => kill(process(site)?, Signal::SIGKILL)?,
    }
    // More than could have been on their way.
    echo.wait_for_answers(echoes + 100, PATIENCE)?;
    incr.wait_for_answers(incrs + 10, PATIENCE)?;
    std::thread::sleep(AFTER);
    let (echo, incr) = (echo.stop()?, incr.stop()?);
    if !incr.verdict.is_clean() {
        return Err(format!("a request failed: {:?} {:?}", incr.verdict, incr.breaks).into());
    }
    let around = killed..killed + Duration::from_millis(20);
    let silence = |samples: &Samples| samples.longest_gap_during(around.clone());
    let (udp, incr) = (silence(&echo.samples), silence(&incr.samples));
    let answered = wall + (udp.began + udp.length).saturating_duration_since(killed);
    Ok(Failover {
        udp: udp.ms(),
        incr: incr.ms(),
        parts: parts(site, millis(wall), millis(answered))?,
    })
}

/// The process that runs the guest on host a.
fn process(site: &Site) -> Result<Pid> {
    let all = site.host(Side::A).processes();
    let found = all.iter().find(|(_, line)| {
        let program = line.split(' ').next().unwrap_or_default();
        program.ends_with("/ax-vmm")
    });
    let (pid, _) = found.ok_or("no ax-vmm runs on host a")?;
    Ok(Pid::from_raw(i32::try_from(*pid)?))
}

fn millis(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
        * 1e3
}

/// What the silence of the echo consists of, by what host b tells.
fn parts(site: &Site, killed: f64, answered: f64) -> Result<BTreeMap<&'static str, f64>> {
    let text = site.run_axvm(Side::B, &["-o", "json", "events", VM, "--this-host"])?;
    let events: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let told = |kind: &str| {
        let mut events = events.iter().filter(|e| e["what"]["event"]["what"] == kind);
        events.next().ok_or(format!("host b tells of no {kind}"))
    };
    // An event's time is cut to the millisecond it is in.
    let at = |event: &Value| number(&event["at_ms"]).map(|ms| ms + 0.5);
    let (lost, promoted) = (told("peer-lost")?, told("promoted")?);
    let took = &promoted["what"]["event"]["parts_us"];
    let mut parts = BTreeMap::new();
    for name in TOLD {
        // A build from before they were told.
        parts.insert(name, took[name].as_f64().unwrap_or(0.0) / 1e3);
    }
    parts.insert("notice", at(lost)? - killed);
    parts.insert("answer", answered - at(promoted)?);
    Ok(parts)
}

fn sum_up(kind: &Kind, seen: &[Failover]) -> Value {
    let of = |figure: fn(&Failover) -> f64| {
        let nanoseconds = seen.iter().map(|f| (figure(f) * 1e6) as u64).collect();
        let p = Percentiles::of(nanoseconds);
        let ms = |us: f64| rounded(us / 1e3);
        json!({"p50": ms(p.p50), "p99": ms(p.p99), "max": ms(p.max)})
    };
    let names = ["notice"].into_iter().chain(TOLD).chain(["answer"]);
    let parts: Vec<(&str, f64)> = names
        .map(|name| {
            let all: Vec<f64> = seen
                .iter()
                .filter_map(|f| f.parts.get(name).copied())
                .collect();
            (name, rounded(median(&all)))
        })
        .collect();
    let (all, udp, incr) = (of(Failover::blackout), of(|f| f.udp), of(|f| f.incr));
    let text: Vec<String> = parts.iter().map(|(k, v)| format!("{k} {v}")).collect();
    println!(
        "{}: blackout p50 {}, p99 {}, longest {}; {}",
        kind.name,
        all["p50"],
        all["p99"],
        all["max"],
        text.join(", ")
    );
    let parts: serde_json::Map<String, Value> = parts
        .into_iter()
        .map(|(k, v)| (k.into(), json!(v)))
        .collect();
    json!({
        "kind": kind.name, "blackout_ms": all, "udp_ms": udp, "incr_ms": incr, "parts_ms": parts,
    })
}
