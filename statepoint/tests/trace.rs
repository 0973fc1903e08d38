//! The trace of a simulated pair: what it says is what happened.

#![allow(clippy::unwrap_used)]

mod sim;

use std::sync::atomic::Ordering;

use sim::cable::{Fault, Meter};
use sim::{Pair, Step, connect, until};
use statepoint::policy::Reason;
use statepoint::primary::{Ended, PrimaryHandle};
use statepoint::trace::{Moment, Record, SLOTS, Size};

fn records(handle: &PrimaryHandle) -> Vec<Record> {
    handle.trace().since(1, SLOTS).0
}

/// The moments that come one after the other.
fn assert_in_order(record: &Record) {
    let aside = [Moment::Held, Moment::Running];
    let line = Moment::ALL.into_iter().filter(|m| !aside.contains(m));
    let reached: Vec<(Moment, u64)> = line.filter_map(|m| Some((m, record.at(m)?))).collect();
    assert!(reached.is_sorted_by_key(|(_, ns)| *ns), "{reached:?}");
    for (earlier, later) in [
        (Moment::Held, Moment::Closed),
        (Moment::Closed, Moment::Running),
    ] {
        if let (Some(a), Some(b)) = (record.at(earlier), record.at(later)) {
            assert!(a <= b, "{earlier:?} {later:?} {record:?}");
        }
    }
}

#[test]
fn each_epoch_has_its_moments_and_sizes_and_they_add_up() {
    let mut pair = Pair::new(31);
    let (workload, handle) = (pair.workload(), pair.primary_handle.clone());
    let meter = Meter::default();
    let (ended, _) = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        let far = || over() || handle.progress().acked.0 >= 500;
        until("500 epochs", far);
        handle.stop();
    });
    assert_eq!(ended.unwrap(), Ended::Stopped);
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();

    let (records, counters) = (records(&handle), handle.counters());
    let progress = handle.progress();
    assert_eq!(records.len() as u64, progress.captured.0);
    for (record, epoch) in records.iter().zip(1..) {
        assert_eq!((record.number, record.epoch.0), (epoch, epoch));
        assert_in_order(record);
        let has = |moment| record.at(moment).is_some();
        assert!(Moment::ALL[1..9].iter().all(|m| has(*m)), "{record:?}");
        assert_eq!(has(Moment::Acked), epoch <= progress.acked.0, "{record:?}");
        let released = epoch <= pair.barrier.released().0;
        assert_eq!(has(Moment::Released), released, "{record:?}");
        // The last one's end of the pause is not known.
        assert_eq!(has(Moment::Running), epoch < progress.captured.0);
        let outputs = record.size(Size::Outputs);
        assert_eq!(has(Moment::Held), outputs > 0, "{record:?}");
        assert_eq!(outputs > 0, record.size(Size::OutputBytes) > 0);
        assert!(record.size(Size::State) > 0);
    }
    let sum = |size| records.iter().map(|r| r.size(size)).sum::<u64>();
    assert!(sum(Size::Pages) > 0 && sum(Size::Disk) > 0);
    assert_eq!(sum(Size::Shipped), handle.stats().bytes);
    // Some had left before outputs were held.
    let released = records.iter().filter(|r| r.at(Moment::Released).is_some());
    let released: u64 = released.map(|r| r.size(Size::Outputs)).sum();
    assert!((1..=pair.net.0.lock().len() as u64).contains(&released));

    let count = |name: &str| {
        let all = counters.histograms();
        let (_, histogram) = all.iter().find(|(n, _)| *n == name).unwrap();
        histogram.summary().count
    };
    let captured = progress.captured.0;
    assert_eq!(count("pages"), captured);
    assert_eq!(
        (count("pause_ns"), count("length_ns")),
        (captured - 1, captured - 1)
    );
    assert_eq!(
        (count("ack_ns"), count("commit_ns")),
        (progress.acked.0, progress.acked.0)
    );
    assert_eq!(count("release_ns"), pair.barrier.released().0);
    let held = records
        .iter()
        .filter(|r| r.between(Moment::Held, Moment::Released).is_some());
    assert_eq!(count("held_ns"), held.count() as u64);
    for reason in Reason::ALL {
        let of = records.iter().filter(|r| r.reason == reason).count() as u64;
        assert_eq!(counters.captured_for(reason), of, "{reason:?}");
    }
    let of = |reason| counters.captured_for(reason);
    assert!(of(Reason::Output) > 100 && of(Reason::Final) == 0);
}

#[test]
fn an_epoch_says_why_it_ended() {
    let mut pair = Pair::new(32);
    let handle = pair.primary_handle.clone();
    let meter = Meter::default();
    let (ended, _) = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        let since = |from: u64, reason| {
            let of = handle.trace().since(from, SLOTS).0;
            of.iter().any(|r| r.reason == reason)
        };
        until("idle epochs", || over() || handle.progress().acked.0 >= 3);
        assert!(records(&handle).iter().all(|r| r.reason == Reason::Idle));
        // Asked again: an epoch that is being captured already may take the first along.
        let ask = |act: &dyn Fn(), reason| {
            let from = handle.trace().next();
            until("asked", || {
                act();
                over() || since(from, reason)
            });
        };
        ask(&|| handle.trigger(), Reason::Asked);
        ask(&|| handle.ring_full(), Reason::RingFull);
        handle.request_final_epoch();
        until("the end", over);
    });
    let last = records(&handle).pop().unwrap();
    assert_eq!(ended.unwrap(), Ended::Final { epoch: last.epoch });
    assert_eq!(
        (last.reason, last.at(Moment::Resumed)),
        (Reason::Final, None)
    );
    assert!(last.at(Moment::Released).is_some());
}

#[test]
fn a_capture_that_failed_says_so_and_how_far_it_came() {
    let mut pair = Pair::new(33);
    let (workload, handle) = (pair.workload(), pair.primary_handle.clone());
    let (sim, enter) = (pair.sim.clone(), pair.enter.clone());
    let steps = [
        (Step::Pause, [false, false, false]),
        (Step::Save, [true, false, false]),
        (Step::Harvest, [true, true, false]),
        (Step::Read, [true, true, true]),
    ];
    let meter = Meter::default();
    let _ = connect(&mut pair, Fault::None, Fault::None, &meter, |over| {
        until("epochs", || over() || handle.progress().acked.0 >= 5);
        for (n, (step, _)) in (1..).zip(steps) {
            sim.fail(step, 0);
            let failed = || enter.failed_captures.load(Ordering::SeqCst) >= n;
            until("a failed capture", || over() || failed());
            let from = handle.progress().acked.0;
            until("the next", || {
                over() || handle.progress().acked.0 > from + 2
            });
        }
        handle.stop();
    });
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    let records = records(&handle);
    let failed: Vec<&Record> = records.iter().filter(|r| r.failed).collect();
    assert_eq!(failed.len(), steps.len());
    for (record, (step, came)) in failed.iter().zip(steps) {
        assert_in_order(record);
        let reached =
            [Moment::Quiet, Moment::Saved, Moment::Harvested].map(|m| record.at(m).is_some());
        assert_eq!(reached, came, "{step:?}");
        let never = [
            Moment::Copied,
            Moment::Resumed,
            Moment::Acked,
            Moment::Released,
        ];
        assert!(never.iter().all(|m| record.at(*m).is_none()), "{record:?}");
        let again = records
            .iter()
            .filter(|r| r.epoch == record.epoch && !r.failed);
        assert_eq!(again.count(), 1, "its number is that of the next");
    }
    // What follows a failed capture is not taken for its end.
    let released = records.iter().filter(|r| r.at(Moment::Released).is_some());
    assert_eq!(released.count() as u64, pair.barrier.released().0);
}
