//! Rule 19: a host's disk that fails, is full or does not answer costs neither an answer nor a record.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{SIDES, append, read, text, until_state};
use common::{Clients, GUEST, alone, eventually, patient, protected, protected_with_disk};
use testkit::fault::{Action, Order, Point};
use testkit::net::addr;
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_fail_points, require_kvm, require_lab};

/// The guest runs on `side` and the other host is its shadow, as both hosts see it.
fn until_protected_on(site: &Site, side: Side) {
    for ask in SIDES {
        until_state(site, ask, "vm", "protected");
        assert_eq!(site.primary(ask, "vm").unwrap(), Some(side));
    }
}

/// From now on a side's disk fails like this, each time.
fn fails(site: &Site, side: Side, point: Point) {
    let order = Order::new(point, Action::Fail).always();
    site.order(side, &[order]).unwrap();
}

fn note(site: &Site, side: Side) -> String {
    text(&site.show(side, "vm").unwrap()["note"])
}

/// What a side has told of its disks last.
fn told(site: &Site, side: Side) -> String {
    let told = site.told(side, "vm", "disk-fails").unwrap();
    told.last().map(|t| text(&t["why"])).unwrap_or_default()
}

#[test]
fn a_guest_leaves_a_disk_that_fails_and_is_protected_again_once_it_works() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    // What was written before may be lost here: the other side has it.
    fails(&site, Side::A, Point::ImageSync);
    clients.go_on(200);
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    let why = told(&site, Side::A);
    assert!(
        why.contains("vm.img") && why.contains("Input/output"),
        "{why}"
    );
    eventually("b says why it has no shadow", || {
        note(&site, Side::B).contains("Input/output error")
    });
    site.order(Side::A, &[]).unwrap();
    until_protected_on(&site, Side::B);

    // The shadow's disk is full: it is no shadow any more, and the guest does not wait for it.
    fails(&site, Side::A, Point::ImageFull);
    clients.go_on(200);
    until_state(&site, Side::B, "vm", "degraded");
    eventually("b says why it has no shadow", || {
        note(&site, Side::B).contains("No space left")
    });
    site.order(Side::A, &[]).unwrap();
    until_protected_on(&site, Side::B);

    // What came back is a copy to go on from.
    site.host(Side::B).kill_all().unwrap();
    clients.go_on(200);
    clients.are_content();
}

/// Rules 9, 15: whoever waits for the shadow's disk waits for a bounded time.
#[test]
fn a_flush_does_not_wait_for_a_shadow_whose_disk_does_not_answer() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let spec = SiteSpec {
        extra: "detect_ms = 2000\nstall_ms = 1500\n".into(),
        ..SiteSpec::default()
    };
    let site = protected_with_disk("vm.img,size=64M,secondary=sync", spec, &[]);
    let clients = Clients::start(&site);
    let hangs = Action::Hold(std::time::Duration::from_secs(600));
    let order = Order::new(Point::ImageSync, hangs).always();
    site.order(Side::B, &[order]).unwrap();
    eventually("the shadow is given up", || {
        told(&site, Side::B).contains("no answer for 1.5s")
    });
    clients.go_on(200);
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::A));
    site.order(Side::B, &[]).unwrap();
    until_protected_on(&site, Side::A);
    clients.are_content();
}

#[test]
fn without_another_copy_a_guest_waits_for_room_and_goes_on() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = Site::new(patient()).unwrap();
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let args = [
        "start", "vm", "--mode", "none", "--probe", "--memory", "64M",
    ];
    let rest = [
        "--disk",
        "vm.img,size=64M,on_error=report",
        "--net",
        "tap=axtap0",
    ];
    let all = [&args[..], &rest, &["--cmdline", &cmdline]].concat();
    site.run_axvm(Side::A, &all).unwrap();
    append(&site, "first");
    fails(&site, Side::A, Point::ImageFull);
    let number = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| append(&site, "kept"));
        until_state(&site, Side::A, "vm", "held");
        let why = note(&site, Side::A);
        assert!(
            why.contains("vm.img") && why.contains("No space left"),
            "{why}"
        );
        assert!(!waiting.is_finished(), "the guest was told");
        site.order(Side::A, &[]).unwrap();
        waiting.join().unwrap()
    });
    assert_eq!(read(&site, &number), "kept");
    until_state(&site, Side::A, "vm", "unprotected");
    let works = site.told(Side::A, "vm", "disk-works").unwrap();
    assert_eq!(works.len(), 1, "{works:?}");
}
