//! The life of a protected VM in order: paused, reset, stopped, switched off, started elsewhere.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::talk::{
    SIDES, Talk, answers, append, assert_stopped, axvm, image, last_order, read, state, text,
    until_state, vm_processes,
};
use common::{Clients, GUEST, PATIENCE, QUIET, alone, eventually, patient, protected};
use probe_guest::port;
use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site};
use testkit::{require_fail_points, require_kvm, require_lab};

/// Bytes of the guest's disk.
const DISK: u64 = 64 << 20;

/// Counts in guest memory: 1 means that the guest has booted anew since the last time.
fn turns(site: &Site) -> String {
    let mut resp = Talk::open(site, GUEST, port::RESP, PATIENCE).unwrap();
    resp.ask("*2\r\n$4\r\nINCR\r\n$5\r\nturns\r").unwrap()
}

#[test]
fn a_paused_guest_is_silent_protected_and_goes_on_where_it_was() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    site.run_axvm(Side::B, &["pause", "vm"]).unwrap();
    for side in SIDES {
        until_state(&site, side, "vm", "paused");
    }
    // What it had sent before may still be on its way.
    std::thread::sleep(Duration::from_millis(200));
    let silent = clients.answers();
    std::thread::sleep(QUIET);
    assert_eq!(clients.answers(), silent, "a paused guest answered");
    let (code, told, _) = axvm(&site, Side::A, &["list", "--check"]);
    assert_eq!(code, 0, "paused on purpose is no alarm: {told}");
    assert_eq!(site.show(Side::A, "vm").unwrap()["shadow"], "b");
    site.run_axvm(Side::A, &["resume", "vm"]).unwrap();
    clients.go_on(200);
    until_state(&site, Side::B, "vm", "protected");
    clients.are_content();
}

/// By the button and by itself: memory is new, the disk is as it was, protection goes on.
#[test]
fn a_guest_is_reset_by_its_operator_or_by_itself_and_stays_protected() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &["--cpus", "2"]);
    let record = append(&site, "kept");
    let before = site.show(Side::A, "vm").unwrap()["processes"].clone();
    let pids = |processes: &serde_json::Value| {
        let of = |p: &serde_json::Value| (text(&p["host"]), p["pid"].clone());
        let mut all: Vec<_> = processes.as_array().unwrap().iter().map(of).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    for by_operator in [true, false, true] {
        assert_eq!(turns(&site), ":1");
        assert_eq!(turns(&site), ":2");
        if by_operator {
            site.run_axvm(Side::B, &["reboot", "vm"]).unwrap();
        } else {
            last_order(&site, GUEST, "REBOOT");
        }
        // A connection of the old run may still be taken: it ends without an answer.
        eventually("the guest has booted anew", || {
            Talk::open(&site, GUEST, port::RESP, Duration::from_secs(1))
                .and_then(|mut resp| resp.ask("*2\r\n$6\r\nEXISTS\r\n$5\r\nturns\r"))
                .is_ok_and(|there| there == ":0")
        });
        assert_eq!(read(&site, &record), "kept");
        assert_eq!(state(&site, Side::A, "vm"), "protected");
    }
    let after = site.show(Side::B, "vm").unwrap()["processes"].clone();
    assert_eq!(pids(&after), pids(&before), "a reset is no new process");
    // And what the shadow has of the new run is whole.
    site.host(Side::A).kill_all().unwrap();
    eventually("b runs the guest", || answers(&site, GUEST));
    assert_eq!(turns(&site), ":1");
    assert_eq!(read(&site, &record), "kept");
}

/// Rule 26, I4: the stop names the disk that is durable, and the other one is not started from.
#[test]
fn a_vm_stopped_where_the_disk_is_not_durable_starts_from_the_other_one_only() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let record = append(&site, "kept");
    let fail = Order::new(Point::Draining, Action::Fail);
    site.order(Side::A, &[fail]).unwrap();
    let (code, _, said) = axvm(&site, Side::A, &["stop", "vm"]);
    assert_ne!(code, 0);
    assert!(said.contains("could not be made durable"), "{said}");
    site.order(Side::A, &[]).unwrap();
    for side in SIDES {
        until_state(&site, side, "vm", "stopped");
    }
    let (code, _, said) = axvm(&site, Side::A, &["start", "vm"]);
    assert_ne!(code, 0, "it started from a disk that is not current");
    assert!(said.contains("vm.img"), "{said}");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    eventually("b runs the guest", || answers(&site, GUEST));
    assert_eq!(read(&site, &record), "kept");
    until_state(&site, Side::B, "vm", "protected");
}

/// Rule 26: a clean stop is a record, both disks are equal, and either host may start it.
#[test]
fn a_stopped_vm_has_equal_disks_and_starts_on_either_host() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let mut kept: Vec<(String, String)> = Vec::new();
    // Its host at the time, and how it ends there.
    let lives = [
        (Side::A, "stop"),
        (Side::B, "poweroff"),
        (Side::A, "stop while paused"),
        (Side::B, "crash"),
    ];
    for (home, end) in lives {
        assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(home));
        for (number, record) in &kept {
            assert_eq!(&read(&site, number), record, "after the life before {end}");
        }
        let clients = Clients::start(&site);
        clients.are_content();
        let record = end.replace(' ', "-");
        kept.push((append(&site, &record), record));
        match end {
            "poweroff" | "crash" => last_order(&site, GUEST, &end.to_uppercase()),
            "stop while paused" => {
                site.run_axvm(home, &["pause", "vm"]).unwrap();
                site.run_axvm(home, &["stop", "vm"]).unwrap();
            }
            // From the host that does not run it.
            _ => {
                site.run_axvm(home.other(), &["stop", "vm"]).unwrap();
                for side in SIDES {
                    let left = vm_processes(&site, side);
                    assert!(left.is_empty(), "stop had said done: {left:?}");
                }
            }
        }
        assert_stopped(&site, "vm", "vm.img");
        for side in SIDES {
            let (code, told, _) = axvm(&site, side, &["list", "--check"]);
            assert_eq!(code, 0, "{end}: stopped on purpose is no alarm: {told}");
            let (code, _, why) = axvm(&site, side, &["stop", "vm"]);
            assert_eq!(code, 7, "{why}");
            assert!(why.contains("does not run"), "{why}");
        }
        let changed = end == "crash";
        if changed {
            // Somebody mends the copy that the guest will not run on.
            let path = image(&site, home, "vm.img");
            let file = std::fs::File::options().write(true).open(path);
            file.unwrap().write_all_at(&[7; 512], DISK - 512).unwrap();
        }
        let started = site.run_axvm(home.other(), &["start", "vm"]).unwrap();
        assert!(started.contains("protected by"), "{started}");
        assert_resynced_by_the_maps(&site, changed, end);
    }
    let events = site.run_axvm(Side::A, &["events", "vm"]).unwrap();
    for told in [
        "operator: stopped",
        "switched itself off",
        "the guest crashed",
    ] {
        assert!(events.contains(told), "{told} is not in {events}");
    }
}

/// Both sides had the disk: what was compared is what their maps named, and next to nothing moved.
/// The map of a disk that was changed behind it names nothing: then everything was compared.
fn assert_resynced_by_the_maps(site: &Site, changed: bool, end: &str) {
    let vm = site.show(Side::A, "vm").unwrap();
    let processes = vm["processes"].as_array().unwrap();
    let primary = processes.iter().find(|p| p["status"]["role"] == "primary");
    let sync = &primary.unwrap()["status"]["disk_sync"];
    let (compared, moved) = (sync["compared"].as_u64(), sync["moved"].as_u64());
    let (compared, moved) = (compared.unwrap(), moved.unwrap());
    match changed {
        true => assert_eq!(compared, DISK, "after {end}"),
        false => assert!(compared < DISK / 2, "after {end}: {sync}"),
    }
    assert!(
        moved > 0 && moved <= compared / 100 + 4096,
        "after {end}: {sync}"
    );
}

/// Without a record of an orderly end only the last primary may start it (rule 23).
#[test]
fn a_vm_ended_by_force_starts_where_it_ran() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    clients.are_content();
    let record = append(&site, "forced");
    site.run_axvm(Side::B, &["stop", "vm", "--force"]).unwrap();
    for side in SIDES {
        until_state(&site, side, "vm", "stopped");
        assert!(vm_processes(&site, side).is_empty());
    }
    assert!(!answers(&site, GUEST));
    let (code, _, why) = axvm(&site, Side::B, &["start", "vm"]);
    assert_eq!(code, 12, "{why}");
    for side in SIDES {
        assert!(
            vm_processes(&site, side).is_empty(),
            "left by a refused start"
        );
    }
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &record), "forced");
    until_state(&site, Side::B, "vm", "protected");
}
