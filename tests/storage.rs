//! Rule 19: a host's disk that fails, is full or does not answer costs neither an answer nor a record.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{SIDES, append, assert_stopped, axvm, image, read, text, until_state};
use common::{
    Clients, GUEST, PATIENCE, alone, eventually, patient, protected, protected_with_disk,
};
use testkit::fault::{Action, Order, Point};
use testkit::net::addr;
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_fail_points, require_kvm, require_lab};

/// The guest runs on `side` and the other host is its shadow, as both hosts see it.
fn until_protected_on(site: &Site, side: Side) {
    for ask in SIDES {
        eventually("the guest is protected there", || {
            let shown = site.show(ask, "vm").unwrap();
            shown["state"] == "protected" && shown["primary"] == side.name()
        });
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

/// Rule 2: slowed, not stalled.
#[test]
fn a_shadow_whose_disk_is_slow_slows_what_the_guest_writes_and_nothing_else() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    let late = Action::Hold(std::time::Duration::from_millis(100));
    let slow = [Point::ImageWrite, Point::ImageSync].map(|point| Order::new(point, late).always());
    site.order(Side::B, &slow).unwrap();
    let records = |more: u64| {
        let so_far = clients.answers();
        let enough = so_far[2] + more;
        clients.ledger.wait_for_answers(enough, PATIENCE).unwrap();
        let now = clients.answers();
        [now[1] - so_far[1], now[2] - so_far[2]]
    };
    // By then the shadow is as far behind as it may be.
    records(15);
    let [counted, recorded] = records(5);
    assert!(
        counted > 10 * recorded,
        "{counted} answers from memory beside {recorded} that waited for a disk"
    );
    site.order(Side::B, &[]).unwrap();
    clients.go_on(200);
    until_protected_on(&site, Side::A);
    clients.are_content();
}

/// Whoever leaves may not have asked for anything yet: the guest waits where it is, and what waits for the disk
/// is not answered for.
#[test]
fn with_the_arbiter_away_a_guest_waits_on_its_failing_disk_and_leaves_when_it_is_back() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    let kept = append(&site, "kept");
    site.witness().unwrap().kill().unwrap();
    fails(&site, Side::A, Point::ImageSync);
    until_state(&site, Side::A, "vm", "held");
    eventually("a says why the guest stays", || {
        let why = note(&site, Side::A);
        why.contains("vm.img") && why.contains("waits there for the arbiter")
    });
    let before = clients.answers();
    clients
        .udp
        .wait_for_answers(before[0] + 200, PATIENCE)
        .unwrap();
    assert_eq!(
        clients.ledger.answers(),
        before[2],
        "an answer without a disk"
    );
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::A));
    // With nothing in its store: both hosts register first, and the record is the same.
    site.wipe_witness().unwrap();
    site.start_witness().unwrap();
    clients.go_on(200);
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    assert_eq!(read(&site, &kept), "kept");
    site.order(Side::A, &[]).unwrap();
    until_protected_on(&site, Side::B);
    clients.are_content();
}

/// An image that is gone is as one that fails while another copy is there, and is copied back. With the guest
/// stopped nobody boots from an empty one in its place (I4).
#[test]
fn a_guest_leaves_an_image_that_is_gone_or_replaced_and_never_boots_an_empty_one() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    let kept = append(&site, "kept");
    let at = SIDES.map(|side| image(&site, side, "vm.img"));
    std::fs::remove_file(&at[0]).unwrap();
    until_protected_on(&site, Side::B);
    clients.go_on(50);
    let why = told(&site, Side::A);
    assert!(why.contains("vm.img") && why.contains("gone"), "{why}");
    let other = at[1].with_extension("other");
    std::fs::write(&other, vec![0x5a; 64 << 20]).unwrap();
    std::fs::rename(&other, &at[1]).unwrap();
    until_protected_on(&site, Side::A);
    clients.go_on(50);
    clients.are_content();
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    assert_stopped(&site, "vm", "vm.img");

    std::fs::remove_file(&at[0]).unwrap();
    let (code, _, why) = axvm(&site, Side::A, &["start", "vm"]);
    assert_eq!(code, 9, "{why}");
    let path = at[0].display().to_string();
    for named in ["axvm: a: ", &path, "is gone", "other host"] {
        assert!(why.contains(named), "{why}");
    }
    assert!(!at[0].exists());
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &kept), "kept");
    until_protected_on(&site, Side::B);
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
