//! A host is shut down in order: for its guests that is a planned failover, not a failure.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{axvm, state, until_state, vm_processes};
use common::{Clients, alone, patient, protected};
use serde_json::Value;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// A host as `axvm host list` on `ask` has it.
fn host(site: &Site, ask: Side, side: Side) -> Value {
    let said = site.run_axvm(ask, &["-o", "json", "host", "list"]).unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    said["hosts"][side as usize].clone()
}

/// How often a process of the VM on a host has noticed that the other side was lost.
fn losses(site: &Site, side: Side) -> usize {
    let events = ["events", "vm", "--this-host"];
    let told = site.run_axvm(side, &events).unwrap();
    told.matches("lost the other side").count()
}

#[test]
fn a_host_that_is_shut_down_moves_its_guests_and_takes_part_again_after_its_boot() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    for (name, autostart) in [("local", "on"), ("by-hand", "off")] {
        let start = [
            "start", name, "--mode", "none", "--probe", "--memory", "64M",
        ];
        site.run_axvm(Side::A, &start).unwrap();
        let autostart = ["autostart", name, autostart];
        site.run_axvm(Side::A, &autostart).unwrap();
    }
    let clients = Clients::start(&site);
    let (code, said, progress) = axvm(&site, Side::A, &["host", "drain", "--timeout", "60"]);
    assert_eq!(code, 0, "{said}{progress}");
    assert!(said.contains("may be shut down"), "{said}");
    assert!(said.ends_with("by hand: by-hand\n"), "{said}");
    assert!(progress.contains("moving vm away"), "{progress}");
    assert!(progress.contains("stopping local"), "{progress}");
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    assert!(vm_processes(&site, Side::A).is_empty());
    clients.go_on(100);
    // A restart of axd is no boot.
    site.start_axd(Side::A).unwrap();
    assert_eq!(host(&site, Side::B, Side::A)["shutting_down"], true);
    let (code, _, why) = axvm(&site, Side::A, &["start", "local"]);
    assert_eq!(code, 7, "{why}");
    assert!(why.contains("is being shut down"), "{why}");
    let before = losses(&site, Side::B);
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(100);
    assert_eq!(
        losses(&site, Side::B),
        before,
        "nothing was left to be lost"
    );
    site.host(Side::A).power_on().unwrap();
    site.start_axd(Side::A).unwrap();
    until_state(&site, Side::A, "local", "unprotected");
    until_state(&site, Side::B, "vm", "protected");
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::B));
    assert_eq!(state(&site, Side::A, "by-hand"), "stopped");
    let known = host(&site, Side::A, Side::A);
    assert_eq!(known["maintenance"], false, "{known}");
    clients.go_on(100);
    clients.are_content();
}

/// Both hosts at once, as when the power is about to fail: nothing can be moved, so it is stopped in order;
/// after both have booted what is autostart comes up, once.
#[test]
fn when_both_hosts_are_shut_down_the_guest_stops_in_order_and_comes_up_once() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    site.run_axvm(Side::B, &["autostart", "vm", "on"]).unwrap();
    let record = common::talk::append(&site, "kept");
    let listens = common::talk::control(&site, common::GUEST, "BUTTON poweroff");
    assert_eq!(listens.unwrap(), "OK");
    site.run_axvm(Side::B, &["host", "drain"]).unwrap();
    let (code, said, progress) = axvm(&site, Side::A, &["host", "drain", "--timeout", "20"]);
    assert_eq!(code, 0, "{said}{progress}");
    assert!(progress.contains("asked the guest of vm"), "{progress}");
    for side in [Side::A, Side::B] {
        site.host(side).kill_all().unwrap();
    }
    for side in [Side::B, Side::A] {
        site.host(side).power_on().unwrap();
        site.start_axd(side).unwrap();
    }
    until_state(&site, Side::B, "vm", "protected");
    let primary = site.primary(Side::B, "vm").unwrap();
    assert_eq!(primary, Some(Side::A), "where it ran last");
    let processes = [Side::A, Side::B].map(|side| vm_processes(&site, side).len());
    assert_eq!(processes, [1, 1]);
    assert_eq!(common::talk::read(&site, &record), "kept");
}

/// What can't be moved is named, with an exit code, and does not hold up the shutdown for the whole time.
#[test]
fn a_drain_that_cannot_be_done_says_what_is_still_there() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    site.witness().unwrap().kill().unwrap();
    let (code, said, why) = axvm(&site, Side::A, &["host", "drain", "--timeout", "60"]);
    assert_eq!(code, 7, "{said}{why}");
    assert!(
        why.contains("host a is not empty: still there: vm"),
        "{why}"
    );
    assert!(why.contains("arbiter"), "{why}");
    // Protected as it is, it is not stopped for that.
    clients.go_on(100);
    assert_eq!(state(&site, Side::B, "vm"), "protected");
    clients.are_content();
}
