//! Orders and ends of a protected VM, with the power plug of either host pulled at a random moment
//! on the way. Afterwards the VM runs on one host or is stopped (rule 26), answers whoever may ask, and
//! has every record it had acknowledged.
//!
//! The moments follow from a seed that is printed; `AX_SEED` repeats a run, `AX_ROUNDS` makes it longer.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use common::talk::{SIDES, Talk, answers, axvm, last_order, text};
use common::{GUEST, PATIENCE, alone, eventually, patient, protected};
use probe_guest::port;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// The plug is pulled at most this long after the order.
const WITHIN: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Axvm(&'static [&'static str]),
    /// The guest itself, told by its control service.
    Guest(&'static str),
}

/// What the round's records are kept by: number → payload, acknowledged ones only.
type Acknowledged = BTreeMap<String, String>;

/// Numbers that follow from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn new() -> Dice {
        let given = std::env::var("AX_SEED").ok().and_then(|s| s.parse().ok());
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seed = given.unwrap_or_else(|| now().unwrap().as_micros() as u64);
        eprintln!("AX_SEED={seed}");
        Dice(seed)
    }

    fn below(&mut self, limit: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Duration::from_micros((z ^ (z >> 31)) % limit.as_micros() as u64)
    }
}

/// Appends until told to stop or the connection ends.
fn append(site: &Site, run: &str, stop: &AtomicBool) -> Acknowledged {
    let mut acknowledged = Acknowledged::new();
    let mut ledger = Talk::open(site, GUEST, port::LEDGER, PATIENCE).unwrap();
    for serial in 0.. {
        let record = format!("{run}-{serial}");
        match ledger.ask(&format!("APPEND {record}")) {
            Ok(number) if !number.starts_with("ERR") => acknowledged.insert(number, record),
            _ => break,
        };
        // The first one comes from a guest that runs; later ones may have none any more.
        ledger.patience(Duration::from_secs(2));
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    assert!(!acknowledged.is_empty(), "nothing was appended");
    acknowledged
}

fn read_all(site: &Site, acknowledged: &Acknowledged, round: &str) {
    let mut ledger = Talk::open(site, GUEST, port::LEDGER, PATIENCE).unwrap();
    for (number, record) in acknowledged {
        let found = ledger.ask(&format!("READ {number}")).unwrap();
        assert_eq!(&found, record, "{round}: record {number} is lost");
    }
}

/// Sides whose process says that it runs the guest and shows its outputs.
fn running(site: &Site) -> Vec<String> {
    let shown = SIDES.map(|side| site.show(side, "vm"));
    let mut running: Vec<String> = shown
        .iter()
        .flatten()
        .flat_map(|vm| vm["processes"].as_array().cloned().unwrap_or_default())
        .filter(|p| {
            let phase = text(&p["status"]["phase"]["is"]);
            p["status"]["role"] == "primary"
                && ["alone", "syncing", "protected", "paused"].contains(&phase.as_str())
        })
        .map(|p| text(&p["host"]))
        .collect();
    running.sort();
    running.dedup();
    running
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Runs(Side),
    Stopped,
}

/// How the VM is once both hosts are on again and agree: protected again and answering, or stopped.
fn outcome(site: &Site, round: &str) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::new();
    loop {
        let run = running(site);
        assert!(
            run.len() < 2,
            "{round}: it runs twice: {run:?}\n{}",
            site.logs()
        );
        let shown = SIDES.map(|side| site.show(side, "vm").unwrap_or_default());
        let states = [text(&shown[0]["state"]), text(&shown[1]["state"])];
        let ended = |state: &String| ["stopped", "failed"].contains(&state.as_str());
        if states.iter().all(ended) {
            return Outcome::Stopped;
        }
        if states == ["protected", "protected"]
            && answers(site, GUEST)
            && let Some(side) = Side::named(&text(&shown[0]["primary"]))
        {
            return Outcome::Runs(side);
        }
        last.clear();
        last.push_str(&format!("{states:?}"));
        assert!(
            Instant::now() < deadline,
            "{round}: neither stopped nor answering, but {last}\n{}",
            site.logs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One round; the VM is protected before and after it.
fn round(site: &mut Site, act: Act, victim_runs_it: bool, delay: Duration, run: &str) {
    let home = site.primary(Side::A, "vm").unwrap().unwrap();
    let victim = if victim_runs_it { home } else { home.other() };
    let named = format!("{act:?}, then {victim:?} (home {home:?}) dies after {delay:?}");
    eprintln!("{named}");
    let stop = AtomicBool::new(false);
    let (acknowledged, told) = std::thread::scope(|scope| {
        let shared = &*site;
        let appending = scope.spawn(|| append(shared, run, &stop));
        std::thread::sleep(Duration::from_millis(300));
        let asked = match act {
            Act::Axvm(words) => {
                let mut command = shared.axvm(victim.other());
                command
                    .args(words)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                Some(command.spawn().unwrap())
            }
            Act::Guest(word) => {
                last_order(shared, GUEST, word);
                None
            }
        };
        std::thread::sleep(delay);
        shared.host(victim).kill_all().unwrap();
        let told = asked.map(|asked| asked.wait_with_output().unwrap());
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        (appending.join().unwrap(), told)
    });
    site.host(victim).power_on().unwrap();
    site.start_axd(victim).unwrap();
    if act == Act::Axvm(&["pause", "vm"]) {
        // Whether it is paused or not: from here on it is not.
        eventually("it goes on", || {
            axvm(site, Side::A, &["resume", "vm"]).0 == 0
        });
    }
    let outcome = outcome(site, &named);
    eprintln!("  {outcome:?}; {} records; {told:?}", acknowledged.len());
    if let (Act::Axvm(words), Some(told)) = (act, &told) {
        let said = String::from_utf8_lossy(&told.stdout);
        let done = told.status.success() && !said.contains("is not known");
        if words[0] == "stop" && done {
            assert_eq!(outcome, Outcome::Stopped, "{named}: stop had said {said}");
        }
        if words[0] != "stop" {
            assert_ne!(outcome, Outcome::Stopped, "{named}: nobody stopped it");
        }
    }
    if outcome == Outcome::Stopped {
        // Whoever holds the current copy may start it; who does not is refused.
        let refused: Vec<String> = [victim.other(), victim]
            .into_iter()
            .map_while(|side| match axvm(site, side, &["start", "vm"]) {
                (0, ..) => None,
                (code, _, why) => {
                    assert_eq!(code, 12, "{named}: {why}");
                    Some(why)
                }
            })
            .collect();
        assert!(refused.len() < 2, "{named}: it starts nowhere: {refused:?}");
    }
    read_all(site, &acknowledged, &named);
}

fn rounds(act: Act) {
    let _alone = alone();
    let mut dice = Dice::new();
    let rounds = std::env::var("AX_ROUNDS").ok().and_then(|n| n.parse().ok());
    let mut site = protected(patient(), &[]);
    for n in 0..rounds.unwrap_or(1) {
        for victim_runs_it in [true, false] {
            let run = format!("{n}-{victim_runs_it}");
            round(&mut site, act, victim_runs_it, dice.below(WITHIN), &run);
        }
    }
}

macro_rules! cut_short {
    ($($name:ident: $act:expr;)*) => {$(
        #[test]
        fn $name() {
            require_kvm!();
            require_lab!();
            rounds($act);
        }
    )*};
}

cut_short! {
    a_stop_cut_short: Act::Axvm(&["stop", "vm"]);
    a_stop_by_force_cut_short: Act::Axvm(&["stop", "vm", "--force"]);
    a_guests_poweroff_cut_short: Act::Guest("POWEROFF");
    a_guests_reboot_cut_short: Act::Guest("REBOOT");
    an_operators_reboot_cut_short: Act::Axvm(&["reboot", "vm"]);
    a_pause_cut_short: Act::Axvm(&["pause", "vm"]);
    a_planned_failover_cut_short: Act::Axvm(&["failover", "vm"]);
}

/// The poweroff has left one host, which dies before the arbiter has its record. The other host holds a
/// guest that will never run again, and must not keep it as if it ran.
#[test]
fn a_poweroff_is_carried_through_by_the_host_that_lives() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let acknowledged = append(&site, "kept", &AtomicBool::new(true));
    site.witness().unwrap().kill().unwrap();
    last_order(&site, GUEST, "POWEROFF");
    eventually("a waits for the arbiter's record", || {
        let state = site.show(Side::B, "vm").map(|vm| text(&vm["state"]));
        state.is_ok_and(|state| state == "held" || state == "ending")
    });
    site.host(Side::A).kill_all().unwrap();
    site.start_witness().unwrap();
    site.host(Side::A).power_on().unwrap();
    site.start_axd(Side::A).unwrap();
    assert_eq!(outcome(&site, "poweroff"), Outcome::Stopped);
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    read_all(&site, &acknowledged, "poweroff");
}
