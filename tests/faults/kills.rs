//! SIGKILL between two steps of an epoch, on either side, and on both in a failover: the oracle of I1
//! and the clients that count tell whether an epoch's outputs, memory and disk were ever taken apart.

use std::time::Duration;

use testkit::client::{Origin, ledger};
use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site};
use testkit::{require_fail_points, require_kvm, require_lab};

use crate::common::{PATIENCE, alone, at, eventually, patient};
use crate::scene::{ANSWERS, Scene, rounds};

/// Kills a side's process the moment it reaches `point` for the n-th time, under all clients; the
/// other side goes on.
fn dies_at(site: &mut Site, side: Side, point: Point, n: u64) {
    let scene = Scene::new(site, format!("{}-at-{point}", side.name()));
    let clients = scene.with_clients(&[]);
    scene.order(side, Order::new(point, Action::Kill).after(n));
    scene
        .site
        .wait_for_fault(side, &scene.vm, point, PATIENCE)
        .unwrap();
    eventually("it dies", || scene.processes(side) == 0);
    clients.go_on(ANSWERS);
    scene.one_is_left(Some(side.other()));
    clients.are_content();
    scene.end();
}

#[test]
fn a_primary_killed_at_any_step_of_an_epoch_is_not_missed() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    rounds(21, |chance| {
        for point in [
            Point::Parked,
            Point::Harvested,
            Point::Captured,
            Point::Resumed,
            Point::Shipped,
            Point::AckRead,
            Point::Committed,
            Point::Released,
        ] {
            dies_at(&mut site, Side::A, point, chance.within(0..300));
        }
    });
}

#[test]
fn a_shadow_killed_at_any_step_of_an_epoch_is_not_missed() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    rounds(22, |chance| {
        for point in [
            Point::Staging,
            Point::Staged,
            Point::Acking,
            Point::Acked,
            Point::Applying,
        ] {
            dies_at(&mut site, Side::B, point, chance.within(0..300));
        }
    });
}

/// A dies, and B at this moment of its promotion; then only `heir` may start the VM, and it has every
/// record that was ever acknowledged to a client (I4; rules 18, 23).
fn both_die(site: &mut Site, point: Point, heir: Side) {
    let mut scene = Scene::new(site, format!("both-at-{point}"));
    scene.start_on(Side::A, &[]);
    let origin = Origin::In(scene.site.lab.client.net().clone());
    let mut spec = ledger::LedgerSpec::new(at(probe_guest::port::LEDGER), "n");
    // An answer that died with its guest is not waited for much longer.
    spec.patience = Duration::from_secs(5);
    let ledger = ledger::start(&origin, spec).unwrap();
    ledger.wait_for_answers(100, PATIENCE).unwrap();
    scene.order(Side::B, Order::new(point, Action::Kill));
    scene.site.host(Side::A).kill_all().unwrap();
    eventually("b dies too", || scene.processes(Side::B) == 0);
    scene.power_cycle(Side::A);
    scene.site.order(Side::B, &[]).unwrap();
    let start = |side| {
        scene
            .site
            .axvm(side)
            .args(["start", &scene.vm])
            .output()
            .unwrap()
    };
    let refused = start(heir.other());
    assert_eq!(refused.status.code(), Some(12), "{refused:?}");
    let started = start(heir);
    assert!(started.status.success(), "{started:?}");
    scene.forget_addresses();
    let answered = ledger.answers();
    ledger.wait_for_answers(answered + 20, PATIENCE).unwrap();
    let report = ledger.stop().unwrap();
    let verdict = report.verdict;
    let wrong = (verdict.lost, verdict.duplicated, verdict.reordered);
    assert_eq!(wrong, (0, 0, 0), "{verdict:?} {:?}", report.breaks);
    assert!(verdict.connections_broken > 0, "the guest was started anew");
    scene.end();
}

#[test]
fn when_both_die_only_the_side_the_record_names_starts_and_no_acknowledged_record_is_lost() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    both_die(&mut site, Point::Asking, Side::A);
    both_die(&mut site, Point::Granted, Side::B);
}
