//! The hosts of a pair and their witness are upgraded one after the other: whoever talks to whom across
//! builds, no client of a guest can tell, and builds too far apart say so.
//!
//! The other builds are this source's programs told to speak another wire version, or real ones:
//! `AX_PREVIOUS_DIR=DIR` names the folder of a build of the wire version before (docs/testing.md).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{SIDES, axvm, state, text, until_state, vm_processes};
use common::{Clients, alone, eventually, patient, protected};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::builds::Build;
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_builds, require_kvm, require_lab};

fn of_builds(builds: [Build; 3]) -> SiteSpec {
    SiteSpec {
        builds,
        ..patient()
    }
}

/// An order that must be carried out.
fn order(site: &Site, asked: Side, args: &[&str]) {
    if let Err(e) = site.run_axvm(asked, args) {
        panic!("{e}\n{}", site.logs());
    }
}

/// Protected, as both hosts see it.
fn until_protected(site: &Site, vm: &str) {
    for side in SIDES {
        until_state(site, side, vm, "protected");
    }
}

fn fail_over(site: &Site, to: Side) {
    order(site, to, &["failover", "vm"]);
    assert_eq!(site.primary(to, "vm").unwrap(), Some(to));
    until_protected(site, "vm");
}

/// Ends axd in order, as a package's upgrade does, and starts it in another build. The VMs' processes run on.
fn replace_axd(site: &mut Site, side: Side, build: Build) {
    let axd = site.axd(side).unwrap();
    let pid = Pid::from_raw(i32::try_from(axd.pid()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    eventually("axd ends", || axd.exit_status().unwrap().is_some());
    site.install(side, build).unwrap();
    site.start_axd(side).unwrap();
}

/// As docs/cli.md says that a host is upgraded.
fn upgrade(site: &mut Site, side: Side, build: Build) {
    order(site, side, &["host", "maintenance", "on"]);
    assert!(vm_processes(site, side).is_empty(), "{}", site.logs());
    replace_axd(site, side, build);
    order(site, side, &["host", "maintenance", "off"]);
}

/// What the process of a VM on a host says which wire version it knows; one of the first says nothing.
fn wire_of_process(site: &Site, asked: Side, of: Side) -> Option<u64> {
    let shown = site.show(asked, "vm").unwrap();
    let processes = shown["processes"].as_array().unwrap();
    let its = processes.iter().find(|p| p["host"] == of.name())?;
    its["status"]["wire"].as_u64()
}

fn host_dies(site: &mut Site, victim: Side, clients: &Clients) {
    site.host(victim).kill_all().unwrap();
    clients.go_on(200);
    let survivor = victim.other();
    eventually("the survivor says that it runs the guest", || {
        site.primary(survivor, "vm")
            .is_ok_and(|at| at == Some(survivor))
    });
    site.host(victim).power_on().unwrap();
    site.start_axd(victim).unwrap();
    until_protected(site, "vm");
    clients.go_on(100);
}

#[test]
fn hosts_and_witness_are_upgraded_one_after_the_other_and_no_client_can_tell() {
    require_kvm!();
    require_lab!();
    require_builds!();
    let _alone = alone();
    let ours = Some(u64::from(Build::Ours.wire()));
    let mut site = protected(of_builds([Build::Previous; 3]), &["--verify-every", "25"]);
    assert_ne!(wire_of_process(&site, Side::A, Side::A), ours);
    let clients = Clients::start(&site);

    upgrade(&mut site, Side::B, Build::Ours);
    until_protected(&site, "vm");
    assert_eq!(wire_of_process(&site, Side::B, Side::B), ours);
    clients.go_on(200);
    // From the old build to the new one; the old one follows.
    fail_over(&site, Side::B);
    clients.go_on(200);

    upgrade(&mut site, Side::A, Build::Ours);
    until_protected(&site, "vm");
    assert_eq!(wire_of_process(&site, Side::A, Side::A), ours);
    clients.go_on(200);
    // Asked through the old witness, then through the new one.
    fail_over(&site, Side::A);
    clients.go_on(200);
    site.install_on_witness(Build::Ours).unwrap();
    site.start_witness().unwrap();
    fail_over(&site, Side::B);
    clients.go_on(200);
    clients.are_content();
    // The guest has kept the hardware that it had; a new one gets what both builds know.
    let nic = |vm| site.run_axvm(Side::A, &["show", vm]).unwrap();
    assert!(!nic("vm").contains(", offload"), "{}", nic("vm"));
    let new = ["define", "new", "--probe", "--net", "tap=axtap1"];
    order(&site, Side::A, &new);
    assert!(nic("new").contains(", offload"), "{}", nic("new"));
}

#[test]
fn an_upgrade_is_taken_back_and_hosts_die_meanwhile() {
    require_kvm!();
    require_lab!();
    require_builds!();
    let _alone = alone();
    let spec = of_builds([Build::Ours, Build::Previous, Build::Ours]);
    let mut site = protected(spec, &["--verify-every", "25"]);
    let other = [
        "start", "other", "--mode", "ha", "--probe", "--memory", "64M",
    ];
    order(&site, Side::A, &other);
    until_protected(&site, "other");
    let new = ["define", "x", "--probe", "--net", "tap=axtap1,offload=on"];
    let (_, _, why) = axvm(&site, Side::A, &new);
    assert!(why.contains("upgrade the older host"), "{why}");
    let clients = Clients::start(&site);
    // From the new build to the old one, which knows nothing of "show", and back.
    fail_over(&site, Side::B);
    clients.go_on(200);
    fail_over(&site, Side::A);
    clients.go_on(200);
    // Each build takes over from the other.
    host_dies(&mut site, Side::A, &clients);
    until_protected(&site, "other");
    host_dies(&mut site, Side::B, &clients);
    until_protected(&site, "other");
    // What the new build left on the disks is read by the old one.
    fail_over(&site, Side::B);
    upgrade(&mut site, Side::A, Build::Previous);
    site.install_on_witness(Build::Previous).unwrap();
    site.start_witness().unwrap();
    until_protected(&site, "vm");
    fail_over(&site, Side::A);
    clients.go_on(200);
    clients.are_content();
    order(&site, Side::A, &["stop", "vm"]);
    order(&site, Side::B, &["start", "vm"]);
    until_protected(&site, "vm");
}

#[test]
fn axd_of_another_build_commands_the_processes_that_run_on() {
    require_kvm!();
    require_lab!();
    require_builds!();
    let _alone = alone();
    let mut site = protected(of_builds([Build::Previous; 3]), &[]);
    let clients = Clients::start(&site);
    for after in [Build::Ours, Build::Previous] {
        let processes = SIDES.map(|side| vm_processes(&site, side));
        for side in SIDES {
            replace_axd(&mut site, side, after);
            // While the daemons are of two builds, and when they are not any more.
            until_protected(&site, "vm");
            fail_over(&site, side.other());
            clients.go_on(100);
        }
        order(&site, Side::B, &["pause", "vm"]);
        order(&site, Side::B, &["resume", "vm"]);
        let found = SIDES.map(|side| vm_processes(&site, side));
        assert_eq!(found, processes, "the VM's processes");
        // New processes come from the new build; the next axd finds those.
        for side in SIDES {
            order(&site, side, &["kill", "vm", "--host", side.name()]);
            clients.go_on(100);
            until_protected(&site, "vm");
        }
    }
    clients.are_content();
}

#[test]
fn builds_two_versions_apart_say_so_and_the_guest_runs_on_unprotected() {
    require_kvm!();
    require_lab!();
    require_builds!();
    let _alone = alone();
    let spec = of_builds([Build::Previous, Build::Previous, Build::Ours]);
    let mut site = protected(spec, &[]);
    let clients = Clients::start(&site);
    order(&site, Side::B, &["host", "maintenance", "on"]);
    replace_axd(&mut site, Side::B, Build::Next);
    let too_far = |said: &str| said.contains("upgrade the older host");
    let mut shown = String::new();
    eventually("a says why its guest has no shadow", || {
        shown = site.run_axvm(Side::A, &["show", "vm"]).unwrap();
        too_far(&shown)
    });
    let next = Build::Next.wire();
    let theirs = format!("wire versions {} to {next}", next - 1);
    assert!(shown.contains(&theirs), "{shown}");
    assert_eq!(state(&site, Side::A, "vm"), "degraded");
    let (_, _, why) = axvm(&site, Side::A, &["failover", "vm"]);
    assert!(!why.is_empty());
    let told = site.run_axvm(Side::B, &["-o", "json", "list"]).unwrap();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert!(too_far(&text(&told["peer"]["why"])), "{told}");
    clients.go_on(200);
    // A version in between, and they understand each other.
    replace_axd(&mut site, Side::B, Build::Ours);
    order(&site, Side::B, &["host", "maintenance", "off"]);
    until_protected(&site, "vm");
    clients.go_on(100);
    clients.are_content();
}
