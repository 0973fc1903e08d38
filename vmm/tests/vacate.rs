//! A planned failover, seen from two machines: the guest goes back and forth between them, and each
//! takes it again in place (rule 25).
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::payload::{COUNTERS, Mode};
use common::{BITMAP, Collected, RING, Random, booted, config, eventually, machine, state, word};
use vmm::{DirtyTracking, HostCaps, Machine};

/// Copies to `to`, which follows, what `from`, paused, has: all of RAM at first, later what changed.
fn follow(from: &Machine, to: &mut Machine, pages: impl IntoIterator<Item = u64>) {
    let mut page = [0; 4096];
    for at in pages {
        from.read_pages(at, &mut page).unwrap();
        to.write_pages(at, &page).unwrap();
    }
}

fn all_pages(machine: &Machine) -> Vec<u64> {
    let pages = |r: &vmm::RamRegion| r.start..r.start + r.pages;
    machine.ram().iter().flat_map(pages).collect()
}

fn back_and_forth(caps: &HostCaps, dirty: DirtyTracking) {
    let config = config(Mode::Work, 2, u64::MAX, dirty);
    let outputs: Arc<Collected> = Arc::default();
    let mut random = Random(31);
    let mut runs = booted(caps, &config, &outputs);
    let mut follows = machine(caps, &config, &outputs);
    runs.track_dirty(true).unwrap();
    runs.start().unwrap();
    let mut first = true;
    for round in 0..40 {
        let (before, mut changed) = (word(&runs, COUNTERS), BTreeSet::new());
        let mut harvest = |runs: &mut Machine| {
            let mut pages = Vec::new();
            runs.harvest(&mut pages).unwrap();
            changed.extend(pages);
        };
        eventually("the guest goes on", || {
            // A vCPU whose ring is full waits for this.
            harvest(&mut runs);
            word(&runs, COUNTERS) > before
        });
        random.nap(3000);
        runs.pause().unwrap();
        let saved = state(&runs);
        harvest(&mut runs);
        if std::mem::take(&mut first) {
            changed.extend(all_pages(&runs));
        }
        follow(&runs, &mut follows, changed);
        let (mine, theirs) = (common::ram(&runs), common::ram(&follows));
        assert!(mine == theirs, "round {round}: memory differs");
        // What the other writes from its restore on is what this one will be told.
        follows.track_dirty(true).unwrap();
        follows.restore(&saved, Duration::from_millis(1)).unwrap();
        follows.promote_fixups().unwrap();
        runs.vacate().unwrap();
        assert!(common::ram(&runs) == mine, "round {round}: vacating wrote");
        follows.start().unwrap();
        std::mem::swap(&mut runs, &mut follows);
    }
}

#[test]
fn a_guest_goes_back_and_forth_between_two_machines_by_what_changed() {
    let caps = require_kvm!();
    back_and_forth(&caps, BITMAP);
    back_and_forth(&caps, RING);
}

#[test]
fn a_machine_that_runs_is_not_vacated() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(Mode::Work, 1, u64::MAX, BITMAP), &outputs);
    machine.start().unwrap();
    assert!(machine.vacate().is_err());
    machine.pause().unwrap();
    machine.vacate().unwrap();
    assert!(machine.start().is_err(), "it has no guest any more");
}
