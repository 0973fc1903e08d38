//! Dirty tracking misses nothing: after each epoch a shadow that got only the reported pages
//! equals guest memory, all of it. By ring and by bitmap.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::payload::{COUNTERS, Mode, TICKS};
use common::{BITMAP, Collected, RING, Random, booted, config, eventually, ram, word};
use vmm::{DirtyTracking, Machine};

/// Copies the reported pages, which must be unique and ascending.
fn ship(machine: &Machine, pages: &[u64], shadow: &mut [u8]) {
    assert!(
        pages.is_sorted_by(|a, b| a < b),
        "pages are not unique and ascending"
    );
    for page in pages {
        let at = *page as usize * 4096;
        machine
            .read_pages(*page, &mut shadow[at..at + 4096])
            .unwrap();
    }
}

#[track_caller]
fn assert_equal(machine: &Machine, shadow: &[u8], epoch: usize) {
    let now = ram(machine);
    let missed: Vec<usize> = (0..now.len() / 4096)
        .filter(|p| now[p * 4096..][..4096] != shadow[p * 4096..][..4096])
        .collect();
    assert!(
        missed.is_empty(),
        "epoch {epoch}: pages missed: {missed:x?}"
    );
}

/// 320 epochs of vCPUs writing all over; on some, a harvest while they run comes before.
fn exactness(how: DirtyTracking, mode: Mode, vcpus: u8) -> Machine {
    let caps = common::kvm().unwrap();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(mode, vcpus, 0, how), &outputs);
    let full = Arc::new(AtomicUsize::new(0));
    let triggered = Arc::clone(&full);
    machine.on_ring_full(Arc::new(move || {
        triggered.fetch_add(1, Ordering::Relaxed);
    }));
    machine.track_dirty(true).unwrap();
    let mut shadow = ram(&machine);
    machine.start().unwrap();
    let mut random = Random(99);
    let mut dirty = Vec::new();
    let mut total = 0;
    for epoch in 0..320 {
        random.nap(if epoch % 40 == 0 { 20_000 } else { 2000 });
        let estimate = machine.dirty_estimate().unwrap();
        if random.below(4) == 0 {
            machine.harvest(&mut dirty).unwrap();
            ship(&machine, &dirty, &mut shadow);
        }
        machine.pause().unwrap();
        machine.harvest(&mut dirty).unwrap();
        ship(&machine, &dirty, &mut shadow);
        assert_equal(&machine, &shadow, epoch);
        total += dirty.len();
        assert!(estimate <= shadow.len() / 4096 * usize::from(vcpus));
        machine.harvest(&mut dirty).unwrap();
        assert_eq!(
            dirty,
            [] as [u64; 0],
            "pages are dirty again though nobody ran"
        );
        machine.resume().unwrap();
    }
    assert!(
        total > 320,
        "only {total} dirty pages in all: nothing was tested"
    );
    // full rings hold nobody up once nothing is tracked
    machine.track_dirty(false).unwrap();
    for vcpu in 0..u64::from(vcpus) {
        let (count, ticks) = (
            word(&machine, COUNTERS + 64 * vcpu),
            word(&machine, TICKS + 64 * vcpu),
        );
        eventually("every vCPU goes on", || {
            word(&machine, COUNTERS + 64 * vcpu) > count
        });
        eventually("its timer too", || {
            word(&machine, TICKS + 64 * vcpu) > ticks
        });
    }
    if how == RING && matches!(mode, Mode::Dirty) {
        assert!(
            full.load(Ordering::Relaxed) > 0,
            "the smallest ring was never full"
        );
        assert_eq!(
            machine.handle().stats().ring_full_exits as usize,
            full.load(Ordering::Relaxed)
        );
    }
    machine
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
        let mut shadow = ram(&machine);
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
                ship(&machine, done, &mut shadow);
                machine.give_back(lost);
                if random.below(2) == 0 {
                    let lost = lost.to_vec();
                    machine.harvest(&mut dirty).unwrap();
                    assert_eq!(dirty, lost, "given back in the same pause");
                    ship(&machine, &dirty, &mut shadow);
                    assert_equal(&machine, &shadow, epoch);
                }
            } else {
                ship(&machine, &dirty, &mut shadow);
                assert_equal(&machine, &shadow, epoch);
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
        let mut shadow = ram(&machine);
        machine.start().unwrap();
        for epoch in 0..10 {
            eventually("a reset", || machine.power().is_some());
            machine.reset().unwrap();
            machine.harvest(&mut dirty).unwrap();
            ship(&machine, &dirty, &mut shadow);
            assert_equal(&machine, &shadow, epoch);
            machine.resume().unwrap();
        }
        machine.pause().unwrap();
        machine.track_dirty(false).unwrap();
        machine.track_dirty(true).unwrap();
        machine.harvest(&mut dirty).unwrap();
        assert_eq!(dirty, [] as [u64; 0]);
    }
}
