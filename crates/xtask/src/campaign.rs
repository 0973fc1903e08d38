//! `cargo xtask campaign`: one protected guest, clients, and one fault after the other.
//!
//! Each run draws a fault and a moment from the seed, strikes, mends what it broke, and waits until the
//! guest is protected again by itself. Clients of all kinds are at work all the while; what they saw is
//! judged at the end of the run. A fault that takes both copies (both hosts without power) may cost the
//! guest's memory, never a record it has acknowledged: it is started anew, and the ledger read back.
//!
//! Images, data folders and the witness's store lie on disks that lose what was not flushed when a host's
//! power is cut. The hosts' taps are watched: two of them never send for the guest at once.

mod cables;
mod fault;
mod silent;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use testkit::Chance;
use testkit::client::{Oracle, Origin, Samples, incr, ledger, nonce, port, udp};
use testkit::fuse::Disk;
use testkit::net::{GUEST, Late, Senders, addr, isolate, late};
use testkit::site::{Side, Site, SiteSpec};

use crate::Error;
use crate::apart;
use fault::{Cost, Fault};

/// How long clients work before a fault strikes, at least.
const BEFORE: Duration = Duration::from_millis(400);
/// Within so long after that it strikes.
const WITHIN_MS: u64 = 600;
/// Answers every client must get once the fault is over.
const ANSWERS: u64 = 30;
/// By then a host that is silenced says nothing any more; what goes out just before may be answered.
const SILENCED: Duration = Duration::from_millis(50);
/// How long the guest may take to answer again, and to be protected again.
const PATIENCE: Duration = Duration::from_secs(90);
/// The VM's name.
const VM: &str = "vm";
/// Its tap on both hosts.
const TAP: &str = "axtap0";

#[derive(Debug, Args)]
pub struct Options {
    /// How many faults.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Repeats a campaign: the same faults at the same moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only faults whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Print one line of JSON at the end; the story goes to standard error.
    #[arg(long)]
    json: bool,
    /// Build profile of the product.
    #[arg(long, default_value = "release")]
    profile: String,
    /// Keep configurations, images and logs, and say where.
    #[arg(long)]
    keep: bool,
}

/// Milliseconds, by nearest rank.
#[derive(Debug, Default, Serialize)]
struct Blackout {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Blackout {
    fn of(mut all: Vec<f64>) -> Blackout {
        all.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = all.len().saturating_sub(1);
            let place = (last as f64 * share).ceil() as usize;
            all.get(place).copied().unwrap_or(0.0)
        };
        Blackout {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// How long a silent host was felt, from its last answer to the first of the guest afterwards.
#[derive(Debug, Serialize)]
struct SilentHosts {
    runs: usize,
    /// UDP echo, a request every 2 ms.
    udp_ms: Blackout,
    /// INCR, over one TCP connection: what the silent host alone has heard is sent again by the client's kernel.
    tcp_ms: Blackout,
}

impl SilentHosts {
    fn of(silences: Vec<(f64, f64)>) -> Option<SilentHosts> {
        let runs = silences.len();
        let (udp, tcp) = silences.into_iter().unzip();
        (runs > 0).then(|| SilentHosts {
            runs,
            udp_ms: Blackout::of(udp),
            tcp_ms: Blackout::of(tcp),
        })
    }
}

#[derive(Debug, Default, Serialize)]
struct Summary {
    runs: u32,
    violations: u64,
    not_reprotected: u64,
    blackout_ms: Blackout,
    #[serde(skip_serializing_if = "Option::is_none")]
    silent_hosts: Option<SilentHosts>,
}

/// Runs the campaign.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    if apart::inside() {
        return campaign(options);
    }
    if let Err(no) = testkit::kvm::usable() {
        return Err(Error::NotHere(format!(
            "the campaign runs a virtual machine, and there is no usable KVM here: {no}.\n\
             How to get it: {}.",
            no.remedy
        )));
    }
    isolate::tun_opens()
        .map_err(|why| Error::NotHere(format!("the campaign's guests need taps: {why}.")))?;
    isolate::possible()?;
    testkit::product::use_profile(&options.profile)?;
    let product = testkit::product::Product::get()?;
    let dir = product.axd.parent().unwrap_or(std::path::Path::new("."));
    apart::run(dir, options.keep)
}

fn campaign(options: &Options) -> Result<ExitCode, Error> {
    let mut chance = Chance::new(options.seed);
    let disks = match Disk::usable() {
        Ok(()) => true,
        Err(why) => {
            eprintln!(
                "WITHOUT DISKS THAT LOSE WHAT WAS NOT FLUSHED, and without their faults: no FUSE here: {why}"
            );
            false
        }
    };
    let faults: Vec<Fault> = Fault::ALL
        .into_iter()
        .filter(|f| {
            let only = options.only.as_ref();
            only.is_none_or(|only| f.name().contains(only))
        })
        .filter(|f| disks || !f.needs_disks())
        .collect();
    if faults.is_empty() {
        let names: Vec<_> = Fault::ALL.iter().map(|f| f.name()).collect();
        return Err(Error::Failed(format!(
            "no fault is called like that; there are {}",
            names.join(", ")
        )));
    }
    let mut site = begin(disks, options.runs)?;
    let mut summary = Summary {
        runs: options.runs,
        ..Summary::default()
    };
    let (mut blackouts, mut silences) = (Vec::new(), Vec::new());
    for n in 1..=options.runs {
        let pick = chance.below(faults.len() as u64) as usize;
        let fault = faults.get(pick).copied().unwrap_or(Fault::KillPrimary);
        let began = Instant::now();
        let outcome = one(&mut site, fault, n, &mut chance)?;
        let mut gap = outcome
            .blackout_ms
            .map_or(String::new(), |ms| format!(", silent {ms:.0} ms"));
        if let Some((udp, tcp)) = outcome.silence_ms {
            gap += &format!(", at the fault {udp:.0} ms (UDP) {tcp:.0} ms (TCP)");
        }
        eprintln!(
            "{n:4} {:<28} {:6.1} s{gap}{}",
            fault.name(),
            began.elapsed().as_secs_f64(),
            if outcome.violations.is_empty() && outcome.protected {
                ""
            } else {
                "  FAILED"
            }
        );
        for violation in &outcome.violations {
            eprintln!("     VIOLATION: {violation}");
        }
        summary.violations += outcome.violations.len() as u64;
        blackouts.extend(outcome.blackout_ms);
        silences.extend(outcome.silence_ms);
        if !outcome.protected {
            summary.not_reprotected += 1;
            eprintln!("     NOT PROTECTED AGAIN: {}", outcome.state);
        }
        if !outcome.violations.is_empty() || !outcome.protected {
            eprintln!("{}", site.logs());
            // What is wrong now would spoil every later run.
            drop(site);
            site = begin(disks, options.runs)?;
        }
    }
    if let Some(why) = unequal(&site)? {
        eprintln!("     VIOLATION: {why}");
        summary.violations += 1;
    }
    if options.keep {
        eprintln!("kept in {}", site.keep_dir().display());
    }
    summary.blackout_ms = Blackout::of(blackouts);
    summary.silent_hosts = SilentHosts::of(silences);
    let line = serde_json::to_string(&summary).map_err(|e| Error::Failed(e.to_string()))?;
    match options.json {
        true => println!("{line}"),
        false => eprintln!("{line}"),
    }
    Ok(match summary.violations + summary.not_reprotected {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// A site with the VM protected on it, its disk large enough for what so many runs append to the ledger: some
/// hundred records of 1 KiB each.
fn begin(disks: bool, runs: u32) -> Result<Site, Error> {
    let spec = SiteSpec {
        disks,
        ..SiteSpec::default()
    };
    let site = Site::new(spec.with_links(1, 1))?;
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let net = format!("tap={TAP}");
    let disk = format!("vm.img,size={}M", 64 * runs.div_ceil(100).max(1));
    let mut args = vec!["start", VM, "--mode", "ft", "--probe", "--memory", "96M"];
    args.extend(["--disk", &disk, "--net", &net]);
    args.extend(["--cmdline", &cmdline, "--verify-every", "200"]);
    site.run_axvm(Side::A, &args)?;
    site.run_axvm(Side::A, &["autostart", VM, "on"])?;
    Ok(site)
}

/// What came of one run.
#[derive(Debug, Default)]
struct Outcome {
    violations: Vec<String>,
    protected: bool,
    state: String,
    /// The longest silence of the UDP echo, where the fault is one that is to be hidden.
    blackout_ms: Option<f64>,
    /// The silences of UDP echo and INCR that a host's silence began.
    silence_ms: Option<(f64, f64)>,
}

struct Clients {
    udp: Oracle<udp::UdpReport>,
    incr: Oracle<incr::IncrReport>,
    ledger: Oracle<ledger::LedgerReport>,
    nonce: Oracle<nonce::NonceReport>,
}

impl Clients {
    fn start(site: &Site, n: u32) -> Result<Clients, Error> {
        let origin = Origin::In(site.lab.client.net().clone());
        let at = |port| SocketAddr::from((GUEST, port));
        let echo = udp::UdpSpec {
            interval: Duration::from_millis(2),
            ..udp::UdpSpec::new(at(port::ECHO))
        };
        let run = format!("r{n}-{:x}", std::process::id());
        let ledger = ledger::LedgerSpec {
            pace: Duration::from_millis(5),
            ..ledger::LedgerSpec::new(at(port::LEDGER), run.as_str())
        };
        let clients = Clients {
            udp: udp::start(&origin, echo)?,
            incr: incr::start(&origin, incr::IncrSpec::new(at(port::RESP), run.as_str()))?,
            ledger: ledger::start(&origin, ledger)?,
            nonce: nonce::start(&origin, nonce::NonceSpec::new(at(port::NONCE)))?,
        };
        clients.go_on()?;
        Ok(clients)
    }

    fn go_on(&self) -> Result<(), testkit::Error> {
        self.udp
            .wait_for_answers(self.udp.answers() + ANSWERS, PATIENCE)?;
        self.incr
            .wait_for_answers(self.incr.answers() + ANSWERS, PATIENCE)?;
        self.nonce
            .wait_for_answers(self.nonce.answers() + ANSWERS, PATIENCE)?;
        self.ledger
            .wait_for_answers(self.ledger.answers() + ANSWERS / 10, PATIENCE)
    }

    /// Judges what they saw.
    fn judge(self, fault: Fault, struck: Instant, outcome: &mut Outcome) -> Result<(), Error> {
        let cost = fault.cost();
        let ledger = self.ledger.stop()?;
        let incr = self.incr.stop()?;
        let nonce = self.nonce.stop()?;
        let udp = self.udp.stop()?;
        if cost == Cost::Hidden {
            outcome.blackout_ms = Some(udp.samples.longest_gap(None).ms());
        }
        if fault.is_silence_of_a_host() {
            let within = struck..struck + SILENCED;
            let felt = |samples: &Samples| samples.longest_gap_during(within.clone()).ms();
            outcome.silence_ms = Some((felt(&udp.samples), felt(&incr.samples)));
        }
        let verdict = &ledger.verdict;
        if verdict.lost + verdict.reordered > 0 {
            outcome.violations.push(format!("ledger: {verdict:?}"));
        }
        if cost != Cost::Memory {
            if verdict.duplicated + verdict.connections_broken > 0 {
                let breaks = &ledger.breaks;
                outcome
                    .violations
                    .push(format!("ledger: {verdict:?} {breaks:?}"));
            }
            if !incr.verdict.is_clean() {
                let (verdict, breaks) = (&incr.verdict, &incr.breaks);
                outcome
                    .violations
                    .push(format!("counter: {verdict:?} {breaks:?}"));
            }
            // I1; across a boot the guest's counter begins anew, which is no contradiction.
            if !nonce.violations.is_empty() {
                outcome
                    .violations
                    .push(format!("I1: {:?}", nonce.violations));
            }
        }
        if nonce.malformed + udp.corrupt > 0 {
            outcome.violations.push("corrupt answers".to_owned());
        }
        Ok(())
    }
}

fn one(site: &mut Site, fault: Fault, n: u32, chance: &mut Chance) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let senders = Senders::start(&site.lab, TAP)?;
    let clients = Clients::start(site, n)?;
    let wait = BEFORE + Duration::from_millis(chance.below(WITHIN_MS));
    std::thread::sleep(wait);
    let home = fault::home(site)?;
    let struck = Instant::now();
    fault.strike(home, site, chance)?;
    if fault.cost() == Cost::Memory {
        start_anew(site)?;
    }
    let answered = clients.go_on();
    outcome.protected = until_protected(site, &mut outcome);
    match answered {
        Ok(()) => {
            if let Err(e) = clients.go_on() {
                let name = fault.name();
                let why = format!("{name}: the guest does not go on: {e}\n{}", site.logs());
                return Err(Error::Failed(why));
            }
            clients.judge(fault, struck, &mut outcome)?;
        }
        Err(e) => {
            outcome
                .violations
                .push(format!("the guest does not answer: {e}"));
            outcome.protected = false;
        }
    }
    let sent = senders.stop()?;
    if sent.is_empty() {
        let blind = "the watch of the hosts' taps has seen no frame at all";
        outcome.violations.push(blind.to_owned());
    }
    for late in late(&sent) {
        judge_late(&late, &mut outcome);
    }
    Ok(outcome)
}

/// Rule 24 leaves a process that was stopped between the check of a frame and its write: one frame.
fn judge_late(late: &Late, outcome: &mut Outcome) {
    let host = if late.first { "a" } else { "b" };
    let Late { frames, by, .. } = late;
    let told = format!(
        "host {host} sent {frames} frames for the guest when the other one already did, the last {:.1} ms \
         after its first",
        by.as_secs_f64() * 1e3
    );
    match frames {
        0 | 1 => eprintln!("     rule 24 admits it: {told}"),
        _ => outcome.violations.push(told),
    }
}

/// Waits until both hosts say that the VM is protected, and looks that it never runs twice.
fn until_protected(site: &Site, outcome: &mut Outcome) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let shown = [Side::A, Side::B].map(|side| site.show(side, VM).unwrap_or_default());
        let state = |of: &serde_json::Value| of["state"].as_str().unwrap_or("").to_owned();
        outcome.state = format!(
            "{}, {}: {}",
            state(&shown[0]),
            state(&shown[1]),
            shown[0]["note"]
        );
        if shown.iter().all(|vm| vm["state"] == "protected") {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// After a fault that cost the guest its memory: it comes up by itself where axd was started anew, and
/// by an operator's hand where it was not.
fn start_anew(site: &Site) -> Result<(), Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut said = String::new();
    let mut patience = Instant::now() + Duration::from_secs(15);
    loop {
        for side in [Side::A, Side::B] {
            let shown = site.show(side, VM).unwrap_or_default();
            let state = shown["state"].as_str().unwrap_or("");
            if ["protected", "degraded", "syncing"].contains(&state) {
                return Ok(());
            }
            if ["stopped", "failed"].contains(&state) && Instant::now() > patience {
                match site.run_axvm(side, &["start", VM, "--alone-ok"]) {
                    Ok(_) => return Ok(()),
                    Err(e) => said = e.to_string(),
                }
                patience = Instant::now() + Duration::from_secs(2);
            }
        }
        if Instant::now() > deadline {
            return Err(Error::Failed(format!("the VM starts nowhere: {said}")));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Stops the VM in order and compares its images; says how they differ.
fn unequal(site: &Site) -> Result<Option<String>, Error> {
    site.run_axvm(Side::A, &["stop", VM])?;
    let read = |side| {
        let path = site.data_dir(side).join("images/vm.img");
        std::fs::read(&path).map_err(|e| Error::Failed(format!("{}: {e}", path.display())))
    };
    let (a, b) = (read(Side::A)?, read(Side::B)?);
    let at = a.iter().zip(&b).position(|(a, b)| a != b);
    Ok(match at {
        None if a.len() == b.len() => None,
        _ => Some(format!(
            "the stopped VM's images differ from byte {at:?} on"
        )),
    })
}
