//! `cargo xtask demo`: the story of a dead host, told as it happens.
//!
//! Per failover, on a fresh site: the same guest first without protection (what answers cost
//! then), then as a fault-tolerant pair with the client's oracles at work, then SIGKILL to every
//! process of the host it runs on, then everything read back.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use testkit::client::{Oracle, Origin, Samples, incr, ledger, port, udp};
use testkit::net::{GUEST, addr, isolate};
use testkit::site::{Side, Site, SiteSpec};

use crate::Error;
use crate::apart;
use crate::summary::{Failover, Summary};

/// The guest's network card, the same in every run: the client has it in its ARP cache.
const MAC: &str = "02:61:78:00:00:10";
/// How long the unprotected guest is measured.
const BASELINE: Duration = Duration::from_secs(3);
/// Left out at the start of each measurement: connections and address resolution.
const WARM_UP: Duration = Duration::from_millis(500);
/// How long the pair works before the host dies.
const BEFORE: Duration = Duration::from_secs(4);
/// From the last question to the hosts until one dies.
const SETTLE: Duration = Duration::from_millis(300);
/// How long the client goes on after the first answer from the other host.
const AFTER: Duration = Duration::from_secs(2);
/// How long an answer may be missing before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct Options {
    /// Print one line of JSON at the end; the story goes to standard error.
    #[arg(long)]
    json: bool,
    /// How many failovers, each with a fresh pair.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    failovers: u32,
    /// Guest RAM, as axvm takes it.
    #[arg(long, default_value = "256M")]
    memory: String,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// Protection of the guest.
    #[arg(long, default_value = "ft", value_parser = ["ft"])]
    mode: String,
    /// The link without encryption, to compare.
    #[arg(long)]
    plain: bool,
    /// Build profile of the product.
    #[arg(long, default_value = "release")]
    profile: String,
    /// Keep configurations, images and logs, and say where.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    if apart::inside() {
        return failovers(options);
    }
    // Whatever may be missing is told before anything is built.
    if let Err(no) = testkit::kvm::usable() {
        return Err(Error::NotHere(format!(
            "the demo runs a virtual machine, and there is no usable KVM here: {no}.\n\
             How to get it: {}.",
            no.remedy
        )));
    }
    isolate::tun_opens()
        .map_err(|why| Error::NotHere(format!("the demo's guests need taps: {why}.")))?;
    isolate::possible()?;
    let tell = Story {
        began: None,
        aside: options.json,
    };
    tell.line("AX: a guest that outlives its host");
    tell.line(format!(
        "building axd, axvm and ax-vmm (profile {}); the first time this takes minutes",
        options.profile
    ));
    testkit::product::use_profile(&options.profile)?;
    let product = testkit::product::Product::get()?;
    let dir = product.axd.parent().unwrap_or(Path::new("."));
    apart::run(dir, options.keep)
}

/// In the child that may make test hosts.
fn failovers(options: &Options) -> Result<ExitCode, Error> {
    let tell = Story {
        began: Some(Instant::now()),
        aside: options.json,
    };
    let mut failovers = Vec::new();
    for n in 1..=options.failovers {
        if options.failovers > 1 {
            tell.line(format!("--- failover {n} of {} ---", options.failovers));
        }
        failovers.push(one(options, &tell)?);
    }
    let summary = Summary::of(&failovers);
    tell_summary(&summary, &failovers, &tell);
    if options.json {
        let line = serde_json::to_string(&summary).map_err(|e| Error::Failed(e.to_string()))?;
        println!("{line}");
    }
    Ok(if summary.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One failover on a site of its own.
fn one(options: &Options, tell: &Story) -> Result<Failover, Error> {
    let spec = SiteSpec {
        mtls: !options.plain,
        ..SiteSpec::default()
    };
    let mut site = Site::new(spec)?;
    tell.line(
        "hosts a and b, a witness and a client are up, each with a network and clocks of its own",
    );
    tell.line(format!(
        "a and b share a dedicated link, {}, and a witness",
        if options.plain {
            "plain as asked"
        } else {
            "mutual TLS 1.3 by keys from axd pair"
        }
    ));
    let played = play(options, tell, &site);
    if played.is_err() {
        eprintln!("{}", site.logs());
    }
    if options.keep {
        tell.line(format!("kept in {}", site.keep_dir().display()));
    }
    played
}

fn play(options: &Options, tell: &Story, site: &Site) -> Result<Failover, Error> {
    start(options, site, "baseline", "none")?;
    let client = Client::start(site, "baseline")?;
    std::thread::sleep(BASELINE);
    let baseline = client.stop()?;
    site.run_axvm(Side::A, &["stop", "--force", "baseline"])?;
    let unprotected = baseline.latencies_until(Instant::now());
    tell.line(format!(
        "the guest without protection answers a UDP echo in {}",
        microseconds(&unprotected)
    ));

    start(options, site, "demo", "ft")?;
    let shown = site.show(Side::A, "demo")?;
    let primary = shown["primary"]
        .as_str()
        .and_then(Side::named)
        .ok_or_else(|| Error::Failed(format!("no host says that it runs the guest: {shown}")))?;
    let (victim, heir) = (site.host(primary), primary.other());
    tell.line(format!(
        "the guest ({}, {} vCPU) runs on {} in mode {}, protected by {}",
        options.memory,
        options.cpus,
        victim.name(),
        options.mode,
        heir.name()
    ));
    let client = Client::start(site, "demo")?;
    tell.line("a client appends to its ledger, counts over one TCP connection, and sends a UDP echo every 1 ms");
    std::thread::sleep(BEFORE);
    let shown = site.show(heir, "demo")?;
    if shown["state"] != "protected" {
        return Err(Error::Failed(format!(
            "the guest lost its protection before any host died. A host too busy to send a heartbeat \
             for 100 ms counts as dead: try again while this machine is quieter. axvm says: {shown}"
        )));
    }
    let before = epoch(&shown);
    tell.line(format!("{before} epochs so far"));

    let processes = victim.processes().len();
    // Asking and counting took the processor from everybody: the host dies in the midst of its work.
    std::thread::sleep(SETTLE);
    let (udp_before, incr_before) = (client.udp.answers(), client.incr.answers());
    let killed = victim.kill_all()?;
    tell.line(format!(
        "SIGKILL to all {processes} processes of host {}",
        victim.name()
    ));
    let answered = client
        .udp
        .wait_for_answers(udp_before + 100, PATIENCE)
        .and_then(|()| client.incr.wait_for_answers(incr_before + 10, PATIENCE));
    if let Err(e) = answered {
        let after = site.show(heir, "demo")?;
        return Err(Error::Failed(format!(
            "host {} did not answer in its place: {e}. axvm says: {after}",
            heir.name()
        )));
    }
    tell.line(format!("host {} answers in its place", heir.name()));
    std::thread::sleep(AFTER);
    let after = site.show(heir, "demo")?;
    if after["primary"].as_str() != Some(heir.name()) {
        return Err(Error::Failed(format!(
            "{} does not say that it runs the guest: {after}",
            heir.name()
        )));
    }
    let seen = client.stop()?;
    let failover = Failover {
        verdict: seen.incr.verdict + seen.ledger.verdict,
        epochs: before.max(epoch(&after)),
        protected: seen.latencies_until(killed.at),
        unprotected,
        gap_udp_ms: seen.udp.samples.longest_gap(None).ms(),
        gap_incr_ms: seen.incr.samples.longest_gap(None).ms(),
    };
    tell.line(format!(
        "with protection the UDP echo took {}",
        microseconds(&failover.protected)
    ));
    tell.line(format!(
        "longest silence: UDP echo {:.1} ms, INCR {:.1} ms",
        failover.gap_udp_ms, failover.gap_incr_ms
    ));
    for broken in seen.ledger.breaks.iter().chain(&seen.incr.breaks) {
        tell.line(format!("a connection broke: {broken}"));
    }
    tell.line(format!(
        "all {} records of the ledger read back",
        seen.ledger.records
    ));
    Ok(failover)
}

/// Starts the probe guest on host a and waits until it is as protected as its mode says.
fn start(options: &Options, site: &Site, vm: &str, mode: &str) -> Result<(), Error> {
    let cpus = options.cpus.to_string();
    let disk = format!("{}.img,size=64M", vm);
    let net = format!("tap=axtap0,mac={MAC}");
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    site.run_axvm(
        Side::A,
        &[
            "start",
            vm,
            "--mode",
            mode,
            "--probe",
            "--memory",
            &options.memory,
            "--cpus",
            &cpus,
            "--disk",
            &disk,
            "--net",
            &net,
            "--cmdline",
            &cmdline,
        ],
    )?;
    Ok(())
}

/// The last committed epoch by what `axvm show` says.
fn epoch(shown: &serde_json::Value) -> u64 {
    let processes = shown["processes"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    processes
        .iter()
        .filter_map(|p| p["status"]["epoch"].as_u64())
        .max()
        .unwrap_or(0)
}

/// The client's oracles at work.
struct Client {
    since: Instant,
    udp: Oracle<udp::UdpReport>,
    incr: Oracle<incr::IncrReport>,
    ledger: Oracle<ledger::LedgerReport>,
}

/// What they saw.
struct Seen {
    since: Instant,
    udp: udp::UdpReport,
    incr: incr::IncrReport,
    ledger: ledger::LedgerReport,
}

impl Client {
    fn start(site: &Site, run: &str) -> Result<Client, Error> {
        let origin = Origin::In(site.lab.client.net().clone());
        let at = |port| SocketAddr::from((GUEST, port));
        let udp = udp::start(&origin, udp::UdpSpec::new(at(port::ECHO)))?;
        udp.wait_for_answers(1, PATIENCE)?;
        // A closed loop without rest: the next request leaves as soon as the last is answered.
        let incr = incr::start(&origin, incr::IncrSpec::new(at(port::RESP), run))?;
        let pace = Duration::from_millis(5);
        let ledger = ledger::LedgerSpec {
            pace,
            ..ledger::LedgerSpec::new(at(port::LEDGER), run)
        };
        let ledger = ledger::start(&origin, ledger)?;
        incr.wait_for_answers(1, PATIENCE)?;
        ledger.wait_for_answers(1, PATIENCE)?;
        Ok(Client {
            since: Instant::now(),
            udp,
            incr,
            ledger,
        })
    }

    fn stop(self) -> Result<Seen, Error> {
        // The other two go on meanwhile, so that their silence at the end is the guest's.
        let ledger = self.ledger.stop()?;
        let incr = self.incr.stop()?;
        Ok(Seen {
            since: self.since,
            udp: self.udp.stop()?,
            incr,
            ledger,
        })
    }
}

impl Seen {
    /// UDP echo times of the requests sent after the warm-up and before `until`.
    fn latencies_until(&self, until: Instant) -> Vec<u64> {
        let samples: &Samples = &self.udp.samples;
        samples.latencies_between(self.since + WARM_UP, until)
    }
}

fn microseconds(nanoseconds: &[u64]) -> String {
    let p = testkit::client::Percentiles::of(nanoseconds.to_vec());
    format!("{:.0} µs (median; 99th percentile {:.0} µs)", p.p50, p.p99)
}

fn tell_summary(summary: &Summary, failovers: &[Failover], tell: &Story) {
    let n = failovers.len();
    tell.line("--- summary ---");
    tell.line(format!(
        "{n} host{} died; {} requests: {} lost, {} duplicated, {} reordered, {} connections broken",
        if n == 1 { "" } else { "s" },
        summary.requests,
        summary.lost,
        summary.duplicated,
        summary.reordered,
        summary.connections_broken
    ));
    let clean = failovers.iter().filter(|f| f.verdict.is_clean()).count();
    let longest = failovers
        .iter()
        .map(Failover::blackout_ms)
        .fold(0.0, f64::max);
    tell.line(format!(
        "blackout {:.1} ms{}",
        summary.blackout_ms,
        if n == 1 {
            String::new()
        } else {
            format!(" (median; longest {longest:.1} ms); {clean} of {n} failovers without a trace")
        }
    ));
    tell.line(format!(
        "protection added {:.0} µs to the median UDP echo, {:.0} µs to its 99th percentile; {} epochs",
        summary.added_latency_us.p50, summary.added_latency_us.p99, summary.epochs
    ));
    tell.line(if summary.is_clean() {
        "nobody outside could tell, except for the pause"
    } else {
        "FAILED: somebody outside could tell"
    });
}

/// Tells what happens.
struct Story {
    /// Each line says how long ago that was, if it is known.
    began: Option<Instant>,
    /// On standard error, because standard output is for a script.
    aside: bool,
}

impl Story {
    fn line(&self, text: impl AsRef<str>) {
        let text = text.as_ref();
        let line = match self.began {
            Some(began) => format!("[{:7.3} s] {text}", began.elapsed().as_secs_f64()),
            None => text.into(),
        };
        if self.aside {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }
}
