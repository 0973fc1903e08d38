//! The epoch protocol end to end on a simulated pair: I1, I2, I5, I6, faults, reconnections.

#![allow(clippy::unwrap_used)]

mod sim;

use std::sync::atomic::Ordering;
use std::time::Duration;

use ax_wire::offload::{HEADER, Packet};
use ax_wire::stream::Refusal;
use ax_wire::{EpochId, Generation};
use sim::cable::{Fault, Meter};
use sim::{Pair, Rng, Step, connect, quick, saved_counter, shadow_config, until};
use statepoint::link::LinkError;
use statepoint::primary::{Ended, PrimaryError};
use statepoint::shadow::ShadowError;

fn committed(pair: &Pair) -> u64 {
    pair.primary_handle.progress().acked.0
}

#[test]
fn thousands_of_epochs_with_a_digest_each_then_a_failover() {
    let mut pair = Pair::new(1);
    pair.sim.lock().keep_history = false;
    let workload = pair.workload();
    let (handle, sim) = (pair.primary_handle.clone(), pair.sim.clone());
    let (ended, error) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("2000 epochs", || {
                over() || handle.progress().acked.0 >= 2000
            });
            sim.lock().keep_history = true;
            let from = handle.progress().captured.0 + 3;
            until("some more", || over() || handle.progress().acked.0 >= from);
            handle.stop();
        },
    );
    assert_eq!(ended.unwrap(), Ended::Stopped);
    assert!(
        matches!(error, ShadowError::Link(LinkError::Closed)),
        "{error}"
    );
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    pair.check_failover();
    let (copied, total) = *pair.enter.copied.lock();
    assert_eq!(copied, total, "of the initial copy");
    let whole = 256 * ax_wire::PAGE_SIZE + sim::DISK;
    assert!(total >= whole as u64, "memory and disk: {total}");
    let disk = (sim::DISK as u64, sim::DISK as u64 / 4096);
    assert_eq!(pair.primary_handle.disk_sync(), disk, "compared and moved");
    let stats = pair.primary_handle.stats();
    assert!(
        stats.pause_ns.count >= 2000 && stats.bytes > 1 << 20,
        "{stats:?}"
    );
    assert_eq!(
        pair.seen.generation.load(Ordering::SeqCst),
        2,
        "the grant was told"
    );
    assert_eq!(pair.shadow_handle.generation(), Generation(2));
}

#[test]
fn i1_i2_killed_at_any_byte_the_shadow_goes_on_from_a_whole_epoch() {
    let mut rng = Rng(2);
    let mut promoted = 0;
    for seed in 0..40 {
        let mut pair = Pair::new(seed);
        let workload = pair.workload();
        // The initial copy is about 100 kB, an epoch about 40 kB.
        let at = rng.below(2_500_000);
        let meter = Meter::default();
        let (ended, _) = connect(&mut pair, Fault::Cut(at), Fault::None, &meter, |over| {
            until("the cut", over);
        });
        assert!(matches!(ended, Err(PrimaryError::Link(_))), "{ended:?}");
        pair.stop.store(true, Ordering::SeqCst);
        workload.join().unwrap();
        pair.check_failover();
        promoted += u32::from(pair.shadow_handle.committed().is_some());
    }
    assert!(
        promoted > 5,
        "only {promoted} of 40 runs got as far as an epoch"
    );
}

#[test]
fn every_fault_is_found_and_the_next_connection_goes_on() {
    let mut rng = Rng(3);
    for seed in 0..12 {
        let mut pair = Pair::new(seed);
        let workload = pair.workload();
        let (mut connections, mut faults) = (0, 0);
        while committed(&pair) < 120 {
            connections += 1;
            // After a while without a connection the whole memory is dirty: 1 MB.
            let at = rng.below(1_500_000);
            let n = 1 + rng.below(5000);
            let backward_at = rng.below(2000);
            let forward = match rng.below(6) {
                0 => Fault::Cut(at),
                1 => Fault::Flip(at),
                2 => Fault::Lose(at, n),
                3 => Fault::Double(at, n),
                4 => Fault::Swap(at, n),
                _ => Fault::None,
            };
            let backward = match (forward, rng.below(3)) {
                (Fault::None, 0) => Fault::Flip(backward_at),
                (Fault::None, 1) => Fault::Cut(backward_at),
                (Fault::None, _) => Fault::Lose(backward_at, 1 + n % 200),
                _ => Fault::None,
            };
            let meter = Meter::default();
            let (handle, sent) = (pair.primary_handle.clone(), meter.forward.clone());
            let answered = meter.backward.clone();
            let (ended, error) = connect(&mut pair, forward, backward, &meter, |over| {
                let limit = || {
                    sent.load(Ordering::SeqCst) > 4_000_000
                        || answered.load(Ordering::SeqCst) > 4000
                };
                // Missing bytes leave both sides waiting: the heartbeats' stall ends that.
                let mut last = (0, std::time::Instant::now());
                let mut stalled = || {
                    let now = sent.load(Ordering::SeqCst) + answered.load(Ordering::SeqCst);
                    if now != last.0 {
                        last = (now, std::time::Instant::now());
                    }
                    last.1.elapsed() > Duration::from_millis(300)
                };
                until("the fault", || over() || limit() || stalled());
                handle.disconnect();
            });
            let ended = ended.unwrap_err();
            if pair.entering_failed(&ended) {
                continue;
            }
            let fair = matches!(
                ended,
                PrimaryError::Link(_) | PrimaryError::Refused(Refusal::Broken | Refusal::Session)
            );
            assert!(fair, "{forward:?} {backward:?}: {ended}");
            let fair = matches!(error, ShadowError::Link(_) | ShadowError::Epoch { .. });
            assert!(fair, "{forward:?} {backward:?}: {error}");
            faults += u32::from(!matches!(error, ShadowError::Link(LinkError::Closed)));
            assert!(
                connections < 300,
                "no progress: {forward:?} {backward:?} {ended} / {error} {:?} {:?}",
                pair.primary_handle.progress(),
                pair.shadow_handle.progress()
            );
        }
        pair.stop.store(true, Ordering::SeqCst);
        workload.join().unwrap();
        assert!(!pair.shadow_handle.is_spoiled());
        assert!(
            connections > 2,
            "{connections} connections, {faults} refused streams"
        );
        pair.check_failover();
    }
}

/// Drop exactly the acknowledgement of some epoch. Once A is killed then: B goes on from that epoch with
/// its outputs. Once A lives and reconnects: they leave there, once.
#[test]
fn a_lost_acknowledgement_loses_nothing_whoever_wins() {
    for seed in 0..10 {
        let mut pair = Pair::new(seed);
        let workload = pair.workload();
        let meter = Meter::default();
        let cut = Fault::CutAck(2 + seed);
        let _ = connect(&mut pair, Fault::None, cut, &meter, |over| {
            until("the cut", over);
        });
        let shadow = pair.shadow_handle.committed().map(|c| c.epoch.0);
        let shadow = shadow.expect("epochs were acknowledged before the cut");
        assert!(
            shadow > committed(&pair),
            "the shadow has what the primary does not know"
        );
        assert!(pair.barrier.released().0 <= committed(&pair), "I1");
        if seed % 2 == 0 {
            pair.stop.store(true, Ordering::SeqCst);
            workload.join().unwrap();
            pair.check_failover();
            continue;
        }
        let handle = pair.primary_handle.clone();
        let _ = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
            until("progress", || {
                over() || handle.progress().acked.0 > shadow + 10
            });
            handle.stop();
        });
        pair.stop.store(true, Ordering::SeqCst);
        workload.join().unwrap();
        pair.check_failover();
        assert!(pair.barrier.released().0 >= shadow);
    }
}

#[test]
fn i6_a_failed_capture_loses_no_page_whichever_step_fails() {
    for (seed, step) in [Step::Pause, Step::Save, Step::Harvest, Step::Read]
        .into_iter()
        .enumerate()
    {
        let mut config = quick();
        config.verify_every = 3;
        let mut pair = Pair::with(seed as u64, config, shadow_config(), 1_000_000_000);
        let workload = pair.workload();
        let (handle, sim, enter) = (
            pair.primary_handle.clone(),
            pair.sim.clone(),
            pair.enter.clone(),
        );
        let meter = Meter::default();
        let (ended, _) = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
            let mut rng = Rng(seed as u64);
            for round in 1..=40 {
                let from = handle.progress().acked.0;
                until("an epoch", || over() || handle.progress().acked.0 > from);
                sim.fail(step, rng.below(4) as u32);
                let failed = || enter.failed_captures.load(Ordering::SeqCst) >= round;
                until("the failure", || over() || failed());
            }
            // Every digest until here was right: pages of failed captures came with later ones.
            let from = handle.progress().captured.0;
            until("the last epochs", || {
                over() || handle.progress().applied.0 > from + 6
            });
            handle.stop();
        });
        assert_eq!(ended.unwrap(), Ended::Stopped, "{step:?}");
        assert!(pair.primary_handle.stats().failed_captures >= 40);
        pair.stop.store(true, Ordering::SeqCst);
        workload.join().unwrap();
        pair.check_failover();
    }
}

#[test]
fn a_capture_that_keeps_failing_is_reported_and_the_guest_runs() {
    let mut pair = Pair::new(5);
    let (handle, sim, barrier) = (
        pair.primary_handle.clone(),
        pair.sim.clone(),
        pair.barrier.clone(),
    );
    let stop = pair.stop.clone();
    let (ended, _) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("an epoch", || over() || handle.progress().acked.0 > 0);
            until("the engine to give up", || {
                sim.fail(Step::Save, 0);
                over()
            });
            stop.store(true, Ordering::SeqCst);
        },
    );
    assert!(matches!(ended, Err(PrimaryError::Capture(_))), "{ended:?}");
    assert!(!pair.primary.is_parked());
    assert!(pair.sim.step(&barrier), "the guest runs on");
}

#[test]
fn a_slow_link_slows_the_guest_and_bounds_what_is_in_flight() {
    let mut config = quick();
    config.policy.budget = 100 * ax_wire::PAGE_SIZE;
    let mut pair = Pair::with(6, config, shadow_config(), 1_000_000_000);
    pair.sim.lock().touch = 30;
    let workload = pair.workload();
    let handle = pair.primary_handle.clone();
    let slow = Fault::Slow(Duration::from_millis(15));
    let (ended, _) = connect(&mut pair, Fault::None, slow, &Meter::default(), |over| {
        until("epochs", || {
            let progress = handle.progress();
            let flying = progress.captured.0 - progress.acked.0;
            assert!(flying <= 2, "{flying} epochs in flight");
            over() || progress.acked.0 >= 25
        });
        handle.stop();
    });
    assert_eq!(ended.unwrap(), Ended::Stopped);
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    // Parked between epochs, the guest cannot have dirtied much more than the budget in any.
    let pages = pair.primary_handle.stats().pages;
    assert!(pages.count >= 25);
    pair.check_failover();
}

#[test]
fn an_epoch_larger_than_slot_and_stage_is_still_right_also_when_cut() {
    let mut rng = Rng(8);
    for seed in 0..8 {
        let mut config = quick();
        config.slot_bytes = 8 * ax_wire::PAGE_SIZE;
        config.copy_rest = 4;
        config.copy_rounds = 2;
        let mut shadow = shadow_config();
        shadow.stage_bytes = 10 * ax_wire::PAGE_SIZE;
        let mut pair = Pair::with(seed, config, shadow, 1_000_000_000);
        pair.sim.lock().touch = 20;
        let workload = pair.workload();
        while committed(&pair) < 60 {
            let cut = Fault::Cut(100_000 + rng.below(2_000_000));
            let handle = pair.primary_handle.clone();
            let (ended, _) = connect(&mut pair, cut, Fault::None, &Meter::default(), |over| {
                until("the cut", || over() || handle.progress().acked.0 >= 60);
                handle.disconnect();
            });
            pair.entering_failed(&ended.unwrap_err());
        }
        pair.stop.store(true, Ordering::SeqCst);
        workload.join().unwrap();
        assert!(pair.primary_handle.stats().spilled > 10);
        pair.check_failover();
    }
}

#[test]
fn an_expired_permission_is_asked_for_again_and_released_once() {
    let mut pair = Pair::with(9, quick(), shadow_config(), 10_000_000);
    let workload = pair.workload();
    let handle = pair.primary_handle.clone();
    // Now and then an acknowledgement, or an answer, is older than W when it arrives.
    let slow = Fault::Hiccup(5, Duration::from_millis(40));
    let (ended, _) = connect(&mut pair, Fault::None, slow, &Meter::default(), |over| {
        until("an expiry and progress after it", || {
            over() || (handle.stats().expired > 3 && handle.progress().acked.0 > 60)
        });
        handle.stop();
    });
    assert_eq!(ended.unwrap(), Ended::Stopped);
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    pair.check_failover();
}

#[test]
fn after_freezing_no_acknowledgement_leaves_on_any_connection() {
    let mut pair = Pair::new(10);
    let workload = pair.workload();
    let (handle, shadow) = (pair.primary_handle.clone(), pair.shadow_handle.clone());
    let meter = Meter::default();
    let backward = meter.backward.clone();
    let mut frozen = 0;
    let _ = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        until("epochs", || over() || handle.progress().acked.0 > 20);
        shadow.freeze_acks();
        frozen = backward.load(Ordering::SeqCst);
        until("the stream to end", over);
    });
    let refusal_and_applied = 2 * 100;
    assert!(backward.load(Ordering::SeqCst) <= frozen + refusal_and_applied);
    let acked = committed(&pair);
    let _ = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        until("the refusal", over);
    });
    assert_eq!(committed(&pair), acked, "nothing is acknowledged any more");
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    pair.check_failover();
}

#[test]
fn a_planned_failover_ends_with_a_final_epoch_and_a_paused_guest() {
    let mut pair = Pair::new(11);
    let workload = pair.workload();
    let handle = pair.primary_handle.clone();
    let (ended, _) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs", || over() || handle.progress().acked.0 > 20);
            handle.request_final_epoch();
            until("the final epoch", over);
        },
    );
    let Ok(Ended::Final { epoch }) = ended else {
        panic!("{ended:?}");
    };
    assert!(pair.primary.is_parked());
    assert!(!pair.sim.step(&pair.barrier), "the guest is paused");
    let last = pair.shadow_handle.committed().unwrap();
    assert_eq!(last.epoch, epoch);
    assert_eq!(saved_counter(&last), pair.sim.lock().counter());
    pair.check_failover();
    // The other side could not start: the guest goes on here.
    pair.primary.unpark().unwrap();
    let counter = pair.sim.lock().counter();
    until("the guest to go on", || pair.sim.lock().counter() > counter);
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
}

/// Rule 25: B runs from the final epoch with A as its shadow, no second copy.
#[test]
fn after_a_planned_failover_the_roles_are_swapped_without_a_copy() {
    let mut pair = Pair::new(21);
    let workload = pair.workload();
    let handle = pair.primary_handle.clone();
    let meter = Meter::default();
    let (ended, _) = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        until("epochs", || over() || handle.progress().acked.0 > 20);
        handle.request_final_epoch();
        until("the final epoch", over);
    });
    let Ok(Ended::Final { epoch }) = ended else {
        panic!("{ended:?}");
    };
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    let from = pair.primary.last_committed().unwrap();
    assert_eq!(from.epoch, epoch);
    assert_eq!(
        Some(&from.state),
        pair.shadow_handle.committed().map(|c| c.state).as_ref()
    );

    let mut swapped = Pair::swapped(&pair, from);
    let workload = swapped.workload();
    let (handle, meter) = (swapped.primary_handle.clone(), Meter::default());
    let (ended, _) = connect(&mut swapped, Fault::None, Fault::None, &meter, |over| {
        until("more epochs", || {
            over() || handle.progress().acked.0 > epoch.0 + 20
        });
        handle.stop();
    });
    assert_eq!(ended.unwrap(), Ended::Stopped);
    swapped.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    let committed = swapped.shadow_handle.committed().unwrap();
    assert!(committed.epoch > epoch, "I5");
    swapped.check_copy(&committed);
    let first = swapped.net.0.lock()[0].0;
    let before = pair.net.0.lock().last().map_or(0, |l| l.0);
    assert!(first <= before + 1, "{before} left before, {first} after");
}

#[test]
fn a_diverged_memory_is_found_and_never_promoted() {
    let mut pair = Pair::new(12);
    let workload = pair.workload();
    let (handle, copy) = (pair.primary_handle.clone(), pair.copy.clone());
    let (ended, error) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs", || over() || handle.progress().acked.0 > 5);
            until("the divergence to be found", || {
                copy.memory.lock()[100 * ax_wire::PAGE_SIZE + 4090] ^= 1;
                over()
            });
        },
    );
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    assert!(matches!(error, ShadowError::Diverged { .. }), "{error}");
    assert!(
        matches!(ended, Err(PrimaryError::Refused(Refusal::Diverged))),
        "{ended:?}"
    );
    assert_eq!(pair.shadow_handle.committed(), None);
}

#[test]
fn i2_an_epoch_that_could_not_be_applied_is_never_promoted() {
    let mut pair = Pair::new(13);
    let workload = pair.workload();
    let (handle, copy) = (pair.primary_handle.clone(), pair.copy.clone());
    let (_, error) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs", || over() || handle.progress().acked.0 > 5);
            copy.fail.store(3, Ordering::SeqCst);
            until("the failure", over);
        },
    );
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    assert!(matches!(error, ShadowError::Apply { .. }), "{error}");
    assert!(pair.shadow_handle.is_spoiled());
    assert_eq!(pair.shadow_handle.committed(), None);
}

#[test]
fn received_frames_reach_the_shadow_and_only_the_unseen_are_given() {
    let mut pair = Pair::new(14);
    let workload = pair.workload();
    let (handle, sim) = (pair.primary_handle.clone(), pair.sim.clone());
    let _ = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs", || over() || handle.progress().acked.0 > 5);
            for seq in 1..=20u64 {
                // Every other one leaves something to be done.
                let mut bytes = [seq as u8; 100];
                bytes[..HEADER].fill(seq as u8 % 2);
                handle.received(0, seq, Packet::new(&bytes).unwrap());
            }
            sim.lock().rx_given[0] = 15;
            let from = handle.progress().captured.0;
            until("the count to travel", || {
                over() || handle.progress().acked.0 > from + 1
            });
            handle.stop();
        },
    );
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    let mut given = vec![];
    pair.shadow_handle
        .drain_received(|nic, packet| given.push((nic, packet.header()[0], packet.frame()[0])));
    let expected: Vec<_> = (16..=20).map(|seq| (0, seq % 2, seq)).collect();
    assert_eq!(given, expected);
    assert_eq!(pair.shadow_handle.committed().unwrap().rx_given[0], 15);
}

#[test]
fn a_shadow_that_lost_its_copy_is_told_apart() {
    let mut pair = Pair::new(15);
    let workload = pair.workload();
    let handle = pair.primary_handle.clone();
    let _ = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs", || over() || handle.progress().acked.0 > 5);
            handle.disconnect();
        },
    );
    let mut other = Pair::new(16);
    std::mem::swap(&mut pair.shadow, &mut other.shadow);
    let (ended, _) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("the refusal", over);
        },
    );
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    assert!(
        matches!(ended, Err(PrimaryError::OutOfStep { shadow: None, .. })),
        "{ended:?}"
    );
    assert_ne!(committed(&pair), EpochId(0).0);
}
