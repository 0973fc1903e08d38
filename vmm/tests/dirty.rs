//! Dirty tracking misses nothing: after each epoch a copy that got only the reported pages
//! equals guest memory, all of it. By ring and by bitmap.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use common::payload::{ARENA, Mode};
use common::{BITMAP, Collected, RING, Random, booted, config, eventually};
use vmm::selfcheck::rig::Mirror;
use vmm::selfcheck::{Fault, dirty};
use vmm::{DirtyTracking, Machine};

#[track_caller]
fn assert_equal(machine: &Machine, mirror: &Mirror, epoch: usize) {
    let missed = mirror.differing(machine).unwrap();
    assert!(
        missed.is_empty(),
        "epoch {epoch}: pages missed: {missed:x?}"
    );
}

/// 320 epochs of vCPUs writing all over.
fn exactness(how: DirtyTracking, mode: Mode, vcpus: u8) {
    let caps = common::kvm().unwrap();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(mode, vcpus, 0, how), &outputs);
    let most = common::ram(&machine).len() / 4096 * usize::from(vcpus);
    let found = dirty::exactness(&mut machine, vcpus, 320, |machine, dirty| {
        assert!(machine.dirty_estimate()? <= most);
        machine.harvest(dirty)
    })
    .unwrap();
    if how == RING && matches!(mode, Mode::Dirty) {
        assert!(found.ring_full > 0, "the smallest ring was never full");
        assert_eq!(
            machine.handle().stats().ring_full_exits as usize,
            found.ring_full
        );
    }
}

#[test]
fn a_page_that_is_not_reported_is_found_out() {
    let caps = require_kvm!();
    for how in [BITMAP, RING] {
        let outputs: Arc<Collected> = Arc::default();
        let mut machine = booted(&caps, &config(Mode::Dirty, 2, 0, how), &outputs);
        let hidden = ARENA / 4096 + 7;
        let fault = dirty::exactness(&mut machine, 2, 320, |machine, dirty| {
            machine.harvest(dirty)?;
            dirty.retain(|page| *page != hidden);
            Ok(())
        });
        match fault {
            Err(Fault::Missed { pages, .. }) => assert_eq!(pages, [hidden]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn bitmap_is_exact() {
    let _ = require_kvm!();
    exactness(BITMAP, Mode::Dirty, 4);
}

#[test]
fn bitmap_with_hot_pages_is_exact_when_the_same_few_pages_are_written() {
    let _ = require_kvm!();
    exactness(BITMAP, Mode::Count, 2);
    exactness(BITMAP, Mode::Halt, 2);
}

#[test]
fn bitmap_without_hot_pages_is_exact() {
    let _ = require_kvm!();
    exactness(DirtyTracking::Bitmap { hot_pages: 0 }, Mode::Halt, 1);
}

#[test]
fn the_smallest_ring_is_exact_also_when_full_and_wrapping() {
    let _ = require_kvm!();
    exactness(RING, Mode::Dirty, 4);
}

#[test]
fn a_large_ring_is_exact() {
    let _ = require_kvm!();
    exactness(DirtyTracking::Ring { entries: 65536 }, Mode::Dirty, 2);
}

/// I6: what a failed capture gives back is in the next harvest, whatever the guest did meanwhile.
#[test]
fn i6_pages_given_back_are_harvested_again() {
    let caps = require_kvm!();
    for (how, mode) in [
        (BITMAP, Mode::Dirty),
        (BITMAP, Mode::Halt),
        (RING, Mode::Dirty),
        (RING, Mode::Halt),
    ] {
        let outputs: Arc<Collected> = Arc::default();
        let mut machine = booted(&caps, &config(mode, 2, 0, how), &outputs);
        machine.track_dirty(true).unwrap();
        let mut mirror = Mirror::of(&machine).unwrap();
        machine.start().unwrap();
        let mut random = Random(3);
        let mut dirty = Vec::new();
        for epoch in 0..120 {
            random.nap(1500);
            machine.pause().unwrap();
            machine.harvest(&mut dirty).unwrap();
            if random.below(2) == 0 {
                // the capture fails after some of the pages
                let (done, lost) = dirty.split_at(random.below(dirty.len() as u64 + 1) as usize);
                mirror.take(&machine, done).unwrap();
                machine.give_back(lost);
                if random.below(2) == 0 {
                    let lost = lost.to_vec();
                    machine.harvest(&mut dirty).unwrap();
                    if how == RING {
                        assert_eq!(dirty, lost, "given back in the same pause");
                    }
                    // A hot page that always changes is reported without a look.
                    let missing = lost.iter().find(|p| dirty.binary_search(p).is_err());
                    assert_eq!(missing, None, "given back in the same pause");
                    mirror.take(&machine, &dirty).unwrap();
                    assert_equal(&machine, &mirror, epoch);
                }
            } else {
                mirror.take(&machine, &dirty).unwrap();
                assert_equal(&machine, &mirror, epoch);
            }
            machine.resume().unwrap();
        }
    }
}

#[test]
fn tracking_begins_clean_each_time_and_survives_a_reset() {
    let caps = require_kvm!();
    for how in [BITMAP, RING] {
        let outputs: Arc<Collected> = Arc::default();
        let mut machine = booted(&caps, &config(Mode::Reset, 2, 0, how), &outputs);
        let mut dirty = Vec::new();
        assert!(
            machine.harvest(&mut dirty).is_err(),
            "nothing is tracked yet"
        );
        machine.track_dirty(true).unwrap();
        machine.harvest(&mut dirty).unwrap();
        assert_eq!(dirty, [] as [u64; 0]);
        let mut mirror = Mirror::of(&machine).unwrap();
        machine.start().unwrap();
        for epoch in 0..10 {
            eventually("a reset", || machine.power().is_some());
            machine.reset().unwrap();
            machine.harvest(&mut dirty).unwrap();
            mirror.take(&machine, &dirty).unwrap();
            assert_equal(&machine, &mirror, epoch);
            machine.resume().unwrap();
        }
        machine.pause().unwrap();
        machine.track_dirty(false).unwrap();
        machine.track_dirty(true).unwrap();
        machine.harvest(&mut dirty).unwrap();
        assert_eq!(dirty, [] as [u64; 0]);
    }
}
