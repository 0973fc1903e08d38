//! The hosts of a pair, and taking one out of service.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::talk::{SIDES, axvm, state, text, until_state};
use common::{Clients, alone, eventually, patient, protected};
use serde_json::Value;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

fn hosts(site: &Site, ask: Side) -> Value {
    let said = site.run_axvm(ask, &["-o", "json", "host", "list"]).unwrap();
    serde_json::from_str(&said).unwrap()
}

#[test]
fn a_host_is_emptied_powered_off_and_given_its_vms_back() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let other = [
        "start", "other", "--mode", "ft", "--probe", "--memory", "64M",
    ];
    site.run_axvm(Side::B, &other).unwrap();
    let clients = Clients::start(&site);
    for ask in SIDES {
        let known = hosts(&site, ask);
        assert_eq!(known["hosts"][0]["runs"], serde_json::json!(["vm"]));
        assert_eq!(known["hosts"][0]["shadows"], serde_json::json!(["other"]));
        assert_eq!(known["hosts"][1]["runs"], serde_json::json!(["other"]));
        assert!(text(&known["arbiter"]).contains("witness"), "{known}");
    }
    // Asked for from the other host: it is done where it is to be done.
    let said = site
        .run_axvm(Side::B, &["host", "maintenance", "on", "a"])
        .unwrap();
    assert!(said.contains("safe to power off"), "{said}");
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    assert!(common::talk::vm_processes(&site, Side::A).is_empty());
    clients.go_on(100);
    // It takes nothing meanwhile, and says so; the other host says why its VMs lack a shadow.
    let (code, _, why) = axvm(&site, Side::A, &other);
    assert_eq!(code, 7, "{why}");
    assert!(why.contains("in maintenance"), "{why}");
    for vm in ["vm", "other"] {
        eventually("it is told why there is no shadow", || {
            let shown = site.show(Side::B, vm).unwrap();
            shown["state"] == "degraded" && text(&shown["note"]).contains("in maintenance")
        });
    }
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(100);
    let known = hosts(&site, Side::B);
    assert_eq!(known["hosts"][0]["reachable"], false, "{known}");
    site.host(Side::A).power_on().unwrap();
    site.start_axd(Side::A).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(
        state(&site, Side::A, "vm"),
        "degraded",
        "a reboot ends nothing"
    );
    assert_eq!(hosts(&site, Side::B)["hosts"][0]["maintenance"], true);
    let said = site
        .run_axvm(Side::A, &["host", "maintenance", "off"])
        .unwrap();
    assert!(said.contains("vm will return"), "{said}");
    eventually("it is back where it was", || {
        site.primary(Side::A, "vm").unwrap() == Some(Side::A)
            && state(&site, Side::B, "vm") == "protected"
    });
    until_state(&site, Side::A, "other", "protected");
    assert_eq!(site.primary(Side::A, "other").unwrap(), Some(Side::B));
    clients.go_on(100);
    clients.are_content();
}

#[test]
fn what_cannot_be_moved_is_named_and_the_host_is_not_called_safe() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let local = [
        "start", "local", "--mode", "none", "--probe", "--memory", "64M",
    ];
    site.run_axvm(Side::A, &local).unwrap();
    let (code, said, why) = axvm(&site, Side::A, &["host", "maintenance", "on"]);
    assert_eq!(code, 7, "{said}{why}");
    assert!(why.contains("local (mode none"), "{why}");
    assert!(why.contains("not safe to power off"), "{why}");
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    assert_eq!(state(&site, Side::A, "local"), "unprotected");
    site.run_axvm(Side::A, &["stop", "local"]).unwrap();
    let said = site
        .run_axvm(Side::A, &["host", "maintenance", "on"])
        .unwrap();
    assert!(said.contains("safe to power off"), "{said}");
    let (code, _, why) = axvm(&site, Side::A, &["host", "maintenance", "on", "c"]);
    assert_eq!(code, 2, "{why}");
    let shown = site.run_axvm(Side::A, &["host", "show"]).unwrap();
    assert!(shown.contains("maintenance"), "{shown}");
    assert_eq!(axvm(&site, Side::A, &["host", "show", "c"]).0, 2);
    site.run_axvm(Side::B, &["host", "maintenance", "off", "a"])
        .unwrap();
    until_state(&site, Side::A, "vm", "protected");
}

/// The host dies, comes back and protects the guest again: then the guest goes back by itself, and nobody notices.
#[test]
fn a_guest_returns_to_its_preferred_host_by_itself() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let (code, _, why) = axvm(&site, Side::A, &["prefer", "vm", "c"]);
    assert_eq!(code, 2, "{why}");
    let prefer = ["prefer", "vm", "a", "--return", "auto"];
    site.run_axvm(Side::B, &prefer).unwrap();
    let shown = site.run_axvm(Side::A, &["show", "vm"]).unwrap();
    assert!(shown.contains("a, returns by itself"), "{shown}");
    let clients = Clients::start(&site);
    // What an operator moves stays there.
    site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(100);
    site.host(Side::A).power_on().unwrap();
    site.start_axd(Side::A).unwrap();
    eventually("it is back where it is to run", || {
        site.primary(Side::B, "vm").unwrap() == Some(Side::A)
            && state(&site, Side::B, "vm") == "protected"
    });
    // By the host it left, which learns of it a moment after the guest runs.
    eventually("its return is told", || {
        let told = site.run_axvm(Side::A, &["events", "vm"]).unwrap();
        told.contains("has returned to its preferred host a")
    });
    clients.go_on(100);
    clients.are_content();
}
