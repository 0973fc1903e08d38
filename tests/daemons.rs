//! axd comes and goes, killed or in order, on both hosts, and no client of a guest can tell.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::talk::{SIDES, assert_stopped, axvm, until_state, vm_processes};
use common::{Clients, alone, eventually, patient, protected};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// SIGTERM, as systemd sends it; the end is waited for.
fn ends_in_order(site: &mut Site, side: Side) {
    let axd = site.axd(side).unwrap();
    let pid = Pid::from_raw(i32::try_from(axd.pid()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    eventually("axd ends", || axd.exit_status().unwrap().is_some());
    let status = axd.exit_status().unwrap().unwrap();
    assert!(status.success(), "axd on {}: {status}", side.name());
}

#[test]
fn daemons_killed_and_ended_under_load_are_not_missed_by_any_client() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    let processes = SIDES.map(|side| vm_processes(&site, side));
    assert!(processes.iter().all(|p| p.len() == 1), "{processes:?}");
    for in_order in [false, true] {
        for side in SIDES {
            match in_order {
                true => ends_in_order(&mut site, side),
                false => site.axd(side).unwrap().kill().unwrap(),
            }
            let (code, _, why) = axvm(&site, side, &["list"]);
            assert_eq!(code, 6, "{why}");
        }
        clients.go_on(200);
        for side in SIDES {
            site.start_axd(side).unwrap();
        }
        for side in SIDES {
            until_state(&site, side, "vm", "protected");
            let found = vm_processes(&site, side);
            assert_eq!(found, processes[side as usize], "the VM's process");
        }
        clients.go_on(200);
    }
    // One at a time, again and again, faster than anyone would.
    for side in [Side::A, Side::B, Side::A] {
        site.axd(side).unwrap().kill().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        site.start_axd(side).unwrap();
    }
    clients.go_on(200);
    // The new ones command the old processes.
    site.run_axvm(Side::B, &["failover", "vm"]).unwrap();
    clients.go_on(200);
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::B));
    clients.are_content();
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    assert_stopped(&site, "vm", "vm.img");
}
