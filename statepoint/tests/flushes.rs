//! Rule 15 on a simulated pair: what the primary's FLUSHes wait for is the shadow's disk.

#![allow(clippy::unwrap_used)]

mod sim;

use std::sync::atomic::Ordering;

use ax_wire::EpochId;
use sim::cable::{Fault, Meter};
use sim::{Pair, connect, until};
use statepoint::primary::Ended;

#[test]
fn durable_is_told_when_the_shadows_disk_is_and_not_when_an_epoch_commits() {
    let mut pair = Pair::new(5);
    *pair.disk.1.lock() = Some(0);
    let workload = pair.workload();
    let (primary, shadow) = (pair.primary_handle.clone(), pair.shadow_handle.clone());
    let (enter, disk) = (pair.enter.clone(), pair.disk.clone());
    let told = || enter.durable.load(Ordering::SeqCst);
    let acked = || primary.progress().acked.0;
    let (ended, _) = connect(
        &mut pair,
        Fault::None,
        Fault::None,
        &Meter::default(),
        |over| {
            until("epochs commit while the disk lags", || {
                over() || acked() > 50
            });
            assert_eq!(told(), 0, "nothing is durable yet");
            let epoch = acked() - 10;
            *disk.1.lock() = Some(epoch);
            shadow.tell_durable(EpochId(epoch));
            until("the primary hears of it", || over() || told() == epoch);
            let later = acked() + 20;
            until("more epochs commit", || over() || acked() > later);
            assert_eq!(told(), epoch, "only that epoch is durable");
            assert_eq!(primary.progress().durable, EpochId(epoch));
            *disk.1.lock() = None;
            until("the rest is durable", || over() || told() > later);
            primary.stop();
        },
    );
    assert_eq!(ended.unwrap(), Ended::Stopped);
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    pair.check_failover();
}
