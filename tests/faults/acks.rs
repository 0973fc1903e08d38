//! Lost acknowledgements on the real link (rules 5, 6, 21, 24): whoever wins, epoch N counts once.

use std::time::Duration;

use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_fail_points, require_kvm, require_lab};

use crate::common::{Clients, PATIENCE, alone};
use crate::scene::{ANSWERS, SETTLE, Scene, rounds};

/// Nobody is given up while a test looks at the silence.
const SLOW: &str = "stall_ms = 3000";

fn site() -> Site {
    let extra = SLOW.into();
    let spec = SiteSpec {
        extra,
        ..SiteSpec::default()
    };
    Site::new(spec.without_reprotection()).unwrap()
}

/// From the acknowledgement of some epoch N on the shadow's acknowledgements are lost; so no output of
/// N or later is seen, though the shadow has committed N.
fn silenced(scene: &Scene<'_>, passed: u64) -> Clients {
    let clients = scene.with_clients(&[]);
    let lost = Order::new(Point::Acking, Action::Fail).after(passed);
    scene.order(Side::B, lost.always());
    let seen = (Side::B, &scene.vm, Point::Acking);
    scene
        .site
        .wait_for_fault(seen.0, seen.1, seen.2, PATIENCE)
        .unwrap();
    std::thread::sleep(SETTLE);
    scene.is_silent(&clients, Duration::from_millis(400));
    clients
}

/// One lost acknowledgement is made good by the next one's: nothing fails over for it.
#[test]
fn the_ack_of_one_epoch_is_lost_and_the_next_one_commits_both() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = site();
    rounds(11, |chance| {
        let scene = Scene::new(&mut site, format!("vm-{}", chance.within(0..1 << 32)));
        let clients = scene.with_clients(&[]);
        for _ in 0..5 {
            let lost = Order::new(Point::Acking, Action::Fail);
            scene.order(Side::B, lost.after(chance.within(1..100)));
            clients.go_on(ANSWERS);
        }
        assert_eq!(scene.report(Side::A, "state"), "protected");
        assert_eq!(scene.report(Side::A, "primary"), "a");
        clients.are_content();
        scene.end();
    });
}

/// The ack of N is lost and A is killed: B goes on from N, with N's outputs.
#[test]
fn the_ack_of_an_epoch_is_lost_and_the_primary_dies() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = site();
    rounds(12, |chance| {
        let name = format!("vm-{}", chance.within(0..1 << 32));
        let mut scene = Scene::new(&mut site, name);
        let clients = silenced(&scene, chance.within(0..50));
        let staged = scene.epoch(Side::B);
        assert!(scene.epoch(Side::A) < staged, "A knows of the commit");
        scene.site.host(Side::A).kill_all().unwrap();
        clients.go_on(ANSWERS);
        scene.one_is_left(Some(Side::B));
        let told = scene.site.told(Side::B, &scene.vm, "promoted").unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0]["epoch"].as_u64(), Some(staged), "B left N behind");
        clients.are_content();
        scene.power_cycle(Side::A);
        scene.end();
    });
}

/// The ack of N is lost and B is killed: A goes on live, and N's outputs leave once.
#[test]
fn the_ack_of_an_epoch_is_lost_and_the_shadow_dies() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = site();
    rounds(13, |chance| {
        let name = format!("vm-{}", chance.within(0..1 << 32));
        let mut scene = Scene::new(&mut site, name);
        let clients = silenced(&scene, chance.within(0..50));
        scene.site.host(Side::B).kill_all().unwrap();
        clients.go_on(ANSWERS);
        scene.one_is_left(Some(Side::A));
        clients.are_content();
        scene.power_cycle(Side::B);
        scene.end();
    });
}

/// Acknowledgements are lost and nobody dies: after the stall time one side goes on, whichever it is.
#[test]
fn lost_acks_of_a_live_shadow_are_a_stall_and_exactly_one_side_goes_on() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = site();
    rounds(14, |chance| {
        let scene = Scene::new(&mut site, format!("vm-{}", chance.within(0..1 << 32)));
        let clients = silenced(&scene, chance.within(0..50));
        clients.go_on(ANSWERS);
        scene.one_is_left(None);
        clients.are_content();
        scene.end();
    });
}
