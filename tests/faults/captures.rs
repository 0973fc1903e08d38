//! Captures that fail, copies that differ, interrupts that come too late: whole RAM compared with
//! every epoch (rules 3, 4, 12; I2, I6).

use std::time::Duration;

use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site};
use testkit::{require_fail_points, require_kvm, require_lab};

use crate::common::talk::control;
use crate::common::{GUEST, PATIENCE, alone, eventually, patient};
use crate::scene::{ANSWERS, Scene, rounds};

/// Epochs whose digests are compared before a failover.
const EPOCHS: u64 = 1000;

/// Everything that changes memory: vCPUs that write all over, and a workload whose disk reads arrive
/// while they do.
fn load(site: &Site) {
    for order in ["WORK 7 100000000", "DIRTY 400 8000 64"] {
        assert_eq!(control(site, GUEST, order).unwrap(), "OK");
    }
}

/// `EPOCHS` epochs under load, each with a digest of the whole RAM that the shadow compares after
/// applying it; meanwhile each step of a capture fails several times (I6).
fn every_epoch_is_exact(dirty: &str, cpus: &str, seed: u64) {
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    rounds(seed, |chance| {
        let name = format!("vm-{}", chance.within(0..1 << 32));
        let mut scene = Scene::new(&mut site, name);
        let options = ["--dirty", dirty, "--cpus", cpus, "--verify-every", "1"];
        let clients = scene.with_clients(&[&options[..], &["--memory", "24M"]].concat());
        load(scene.site);
        let steps = [Point::Saving, Point::Saved, Point::Harvested, Point::Copied];
        for point in steps.into_iter().cycle().take(12) {
            let before = scene.epoch(Side::B);
            scene.order(
                Side::A,
                Order::new(point, Action::Fail).after(chance.within(0..20)),
            );
            eventually("epochs go on", || scene.epoch(Side::B) > before + 25);
        }
        let log = scene.site.vm_log(Side::A, &scene.vm);
        let failed = log.matches("a capture failed and was undone").count();
        assert!(failed >= 12, "only {failed} captures failed");
        let mut epoch = scene.epoch(Side::B);
        while epoch < EPOCHS {
            let before = epoch;
            eventually("epochs go on", || {
                epoch = scene.epoch(Side::B);
                epoch > before + 50
            });
            assert_eq!(scene.report(Side::A, "state"), "protected");
        }
        let log = scene.site.vm_log(Side::B, &scene.vm);
        assert!(!log.contains("DIVERGED"), "{log}");
        assert!(
            control(scene.site, GUEST, "WORKSTATUS")
                .unwrap()
                .starts_with("running"),
            "no work was left"
        );
        scene.site.host(Side::A).kill_all().unwrap();
        clients.go_on(ANSWERS);
        clients.are_content();
        scene.power_cycle(Side::A);
        scene.end();
    });
}

#[test]
fn a_thousand_epochs_of_the_ring_are_exact_though_captures_fail() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    every_epoch_is_exact("ring", "4", 31);
}

#[test]
fn a_thousand_epochs_of_the_bitmap_are_exact_though_captures_fail() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    every_epoch_is_exact("bitmap", "2", 32);
}

/// One bit of the copy flips: the digest finds it, the shadow is given up, and it never promotes (I2, I4).
#[test]
fn a_flipped_bit_in_the_copy_is_found_and_that_copy_never_runs() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    let scene = Scene::new(&mut site, "vm");
    let clients = scene.with_clients(&["--verify-every", "5"]);
    scene.order(Side::B, Order::new(Point::Written, Action::Fail).after(33));
    eventually("the difference is found", || {
        let lost = scene.site.told(Side::A, &scene.vm, "peer-lost").unwrap();
        lost.iter()
            .any(|l| l["how"].as_str().unwrap_or("").contains("memory differs"))
    });
    let log = scene.site.vm_log(Side::B, &scene.vm);
    assert!(log.contains("MEMORY DIVERGED"), "{log}");
    clients.go_on(ANSWERS);
    scene.one_is_left(Some(Side::A));
    assert_eq!(scene.report(Side::A, "state"), "degraded");
    clients.are_content();
}

/// Rule 12: interrupts that devices raised come after the capture, or never; the guest that goes on
/// elsewhere has been told by them all the same.
#[test]
fn interrupts_too_late_for_the_capture_do_not_hang_the_guest_after_a_failover() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    for cpus in ["1", "4"] {
        let mut scene = Scene::new(&mut site, format!("vm-{cpus}"));
        let clients = scene.with_clients(&["--cpus", cpus]);
        scene.order(Side::A, Order::new(Point::Interrupt, Action::Fail).always());
        scene
            .site
            .wait_for_fault(Side::A, &scene.vm, Point::Interrupt, PATIENCE)
            .unwrap();
        // Long enough for every request to wait for an interrupt, and for many epochs.
        std::thread::sleep(Duration::from_millis(500));
        scene.site.host(Side::A).kill_all().unwrap();
        clients.go_on(ANSWERS);
        scene.one_is_left(Some(Side::B));
        clients.are_content();
        scene.power_cycle(Side::A);
        scene.end();
    }
}
