//! Planned failover (rule 25): the guest moves, its old host becomes the shadow, and whoever dies on
//! the way, the guest goes on.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::talk::{SIDES, answers, append, axvm, read, until_state};
use common::{
    Clients, GUEST, PATIENCE, QUIET, alone, eventually, patient, protected, protected_with_disk,
};
use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_fail_points, require_kvm, require_lab};

fn runs_on(site: &Site, asked: Side, side: Side) -> bool {
    site.primary(asked, "vm").is_ok_and(|at| at == Some(side))
}

/// Nothing to complain of: protected, that is.
fn is_protected(site: &Site, asked: Side) -> bool {
    site.run_axvm(asked, &["list", "--check"]).is_ok()
}

fn fail_over(site: &Site, asked: Side) {
    if let Err(e) = site.run_axvm(asked, &["failover", "vm"]) {
        panic!("{e}\n{}", site.logs());
    }
}

fn there_and_back(spec: SiteSpec, more: &[&str]) {
    let site = protected(spec, more);
    let clients = Clients::start(&site);
    let mut at = Side::A;
    for round in 0..4 {
        // Either host may be asked.
        let asked = if round % 2 == 0 { at } else { at.other() };
        fail_over(&site, asked);
        at = at.other();
        assert!(runs_on(&site, asked, at), "round {round}");
        assert!(is_protected(&site, asked), "round {round}");
        clients.go_on(200);
    }
    // Protected is what it says: the host that runs it now dies.
    fail_over(&site, at);
    clients.go_on(200);
    site.host(at.other()).kill_all().unwrap();
    clients.go_on(200);
    eventually("the survivor says that it runs the guest", || {
        runs_on(&site, at, at)
    });
    clients.are_content();
}

#[test]
fn a_guest_moves_there_and_back_protected_and_its_host_dies() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    there_and_back(SiteSpec::default(), &["--verify-every", "25"]);
}

#[test]
fn a_guest_with_two_vcpus_and_a_dirty_ring_moves_there_and_back() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let more = ["--cpus", "2", "--dirty", "ring", "--verify-every", "25"];
    there_and_back(SiteSpec::default(), &more);
}

#[test]
fn without_the_witness_a_planned_failover_is_refused_and_nothing_stops() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    site.witness().unwrap().kill().unwrap();
    let mut failover = site.axvm(Side::A);
    let refused = failover.args(["failover", "vm"]).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("arbiter"), "{said}");
    clients.go_on(200);
    assert!(runs_on(&site, Side::A, Side::A));
    site.start_witness().unwrap();
    site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
    clients.go_on(200);
    clients.are_content();
}

/// Parked, drained, and the question for the hand-over on its way: then the other side dies.
#[test]
fn a_shadow_lost_during_a_planned_failover_leaves_the_guest_running() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    let hold = Order::new(Point::Asking, Action::Hold(PATIENCE));
    site.order(Side::A, &[hold]).unwrap();
    let mut failover = site.axvm(Side::A);
    let mut asked = failover.args(["failover", "vm"]).spawn().unwrap();
    site.wait_for_fault(Side::A, "vm", Point::Asking, PATIENCE)
        .unwrap();
    site.host(Side::B).kill_all().unwrap();
    std::thread::sleep(QUIET);
    site.order(Side::A, &[]).unwrap();
    clients.go_on(200);
    assert!(!asked.wait().unwrap().success(), "it did not fail over");
    assert!(runs_on(&site, Side::A, Side::A));
    clients.are_content();
}

/// The record names the other side as holder, and who was to tell it is dead.
#[test]
fn a_primary_that_dies_between_the_grant_and_telling_it_has_handed_over() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    for point in [Point::Asking, Point::Granted] {
        let site = protected(SiteSpec::default(), &[]);
        let clients = Clients::start(&site);
        let kill = Order::new(point, Action::Kill);
        site.order(Side::A, &[kill]).unwrap();
        let mut failover = site.axvm(Side::A);
        let asked = failover.args(["failover", "vm"]).output().unwrap();
        assert!(!asked.status.success(), "{asked:?}");
        clients.go_on(200);
        eventually("b says that it runs the guest", || {
            runs_on(&site, Side::B, Side::B)
        });
        clients.are_content();
    }
}

/// The guest goes on, and the survivor says that it has it.
fn lives_on(site: &Site, clients: Clients, survivor: Side) {
    clients.go_on(200);
    eventually("the survivor says that it runs the guest", || {
        runs_on(site, survivor, survivor)
    });
    clients.are_content();
}

/// A host dies at a moment of a planned failover: the other one has the guest, and one only.
fn dies_on_the_way(victim: Side, after: Duration) {
    let site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    let mut failover = site.axvm(Side::A);
    let mut asked = failover.args(["failover", "vm"]).spawn().unwrap();
    std::thread::sleep(after);
    site.host(victim).kill_all().unwrap();
    lives_on(&site, clients, victim.other());
    // Its word counts for nothing: the daemon it asked may be the one that died.
    let _ = asked.wait();
}

#[test]
fn a_host_that_dies_at_any_moment_of_a_planned_failover_loses_nothing() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let seed: u64 = std::env::var("AX_SEED").map_or(25, |s| s.parse().unwrap());
    let rounds: u64 = std::env::var("AX_ROUNDS").map_or(6, |s| s.parse().unwrap());
    let mut random = seed;
    for round in 0..rounds {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let victim = if round % 2 == 0 { Side::A } else { Side::B };
        // The command itself takes some milliseconds to arrive.
        let after = Duration::from_micros(5_000 + (random >> 33) % 80_000);
        eprintln!(
            "AX_SEED={seed} round {round}: host {} dies after {after:?}",
            victim.name()
        );
        dies_on_the_way(victim, after);
    }
}

/// Sends a signal to the VM's process on a host.
fn signal(site: &Site, side: Side, name: &str) {
    for (pid, command) in site.host(side).processes() {
        if command.contains("ax-vmm") {
            let mut kill = std::process::Command::new("kill");
            let sent = kill.args([format!("-{name}"), pid.to_string()]).status();
            assert!(sent.unwrap().success());
        }
    }
}

/// The other side stands still while it is asked to make its disks durable: it is given up, and the
/// guest goes on where it was.
#[test]
fn a_shadow_that_stands_still_during_a_planned_failover_is_given_up() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    let mut failover = site.axvm(Side::A);
    signal(&site, Side::B, "STOP");
    let asked = failover.args(["failover", "vm"]).output().unwrap();
    assert!(!asked.status.success(), "{asked:?}");
    clients.go_on(200);
    signal(&site, Side::B, "CONT");
    std::thread::sleep(QUIET);
    clients.go_on(200);
    assert!(runs_on(&site, Side::A, Side::A));
    clients.are_content();
}

/// A step of the turn at which one side's process dies, and where the guest is then.
fn dies_at(point: Point, victim: Side) {
    eprintln!("{}'s process dies at {point}", victim.name());
    let site = protected(SiteSpec::default(), &["--verify-every", "25"]);
    let clients = Clients::start(&site);
    let kill = Order::new(point, Action::Kill);
    site.order(victim, &[kill]).unwrap();
    // Refused or not: what was asked for is not what there is now.
    let _ = site.run_axvm(Side::A, &["failover", "vm"]);
    lives_on(&site, clients, victim.other());
}

#[test]
fn whoever_dies_at_any_step_of_the_turn_the_other_one_has_the_guest() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    // Told to run; runs, and nobody knows it; knows where its shadow is.
    dies_at(Point::TakingOver, Side::B);
    dies_at(Point::Running, Side::B);
    dies_at(Point::Dialling, Side::B);
    // Knows that the other side runs, and holds the only copy but that one.
    dies_at(Point::Following, Side::A);
}

/// A guest parked for good belongs to nobody here: an order for it would wait for ever, or have it run
/// twice.
#[test]
fn no_other_order_gets_between_a_planned_failover_and_its_end() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    let hold = Order::new(Point::Asking, Action::Hold(Duration::from_secs(3)));
    site.order(Side::A, &[hold]).unwrap();
    let mut failover = site.axvm(Side::A);
    let mut asked = failover.args(["failover", "vm"]).spawn().unwrap();
    site.wait_for_fault(Side::A, "vm", Point::Asking, PATIENCE)
        .unwrap();
    for order in ["pause", "resume", "reboot"] {
        let mut axvm = site.axvm(Side::A);
        let refused = axvm.args([order, "vm"]).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{order}: {refused:?}");
        assert!(said.contains("stopped or moved"), "{order}: {said}");
    }
    assert!(asked.wait().unwrap().success());
    clients.go_on(200);
    assert!(runs_on(&site, Side::A, Side::B));
    assert!(is_protected(&site, Side::A));
    clients.are_content();
}

/// Paused after the arbiter was looked for and before anything stopped: it would run on the other host.
#[test]
fn a_guest_paused_on_the_way_into_a_planned_failover_stays_paused() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(SiteSpec::default(), &[]);
    let hold = Order::new(Point::Found, Action::Hold(Duration::from_secs(2)));
    site.order(Side::A, &[hold]).unwrap();
    let mut failover = site.axvm(Side::A);
    let mut asked = failover.args(["failover", "vm"]).spawn().unwrap();
    site.wait_for_fault(Side::A, "vm", Point::Found, PATIENCE)
        .unwrap();
    site.run_axvm(Side::A, &["pause", "vm"]).unwrap();
    assert!(!asked.wait().unwrap().success());
    assert!(runs_on(&site, Side::A, Side::A));
    site.run_axvm(Side::A, &["resume", "vm"]).unwrap();
    let clients = Clients::start(&site);
    site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
    clients.go_on(200);
    clients.are_content();
}

/// Rule 26, I4: a flush that fails here, where the guest was, leaves the other disk as the only one.
#[test]
fn a_guest_moved_from_a_disk_that_is_not_durable_runs_without_a_shadow_on_it() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = protected(SiteSpec::default().without_reprotection(), &[]);
    let clients = Clients::start(&site);
    let fail = Order::new(Point::Draining, Action::Fail);
    site.order(Side::A, &[fail]).unwrap();
    let mut failover = site.axvm(Side::A);
    let asked = failover.args(["failover", "vm"]).output().unwrap();
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(!asked.status.success(), "{asked:?}");
    assert!(said.contains("could not be made durable"), "{said}");
    clients.go_on(200);
    eventually("b runs the guest, alone", || {
        runs_on(&site, Side::B, Side::B) && !is_protected(&site, Side::B)
    });
    clients.are_content();
}

/// I4: both die while the record calls the old side's disk as good as the new one's (FLUSHes are durable on
/// both), which it is not.
#[test]
fn a_disk_that_is_not_durable_is_not_started_from_though_both_die_while_the_record_names_it() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let disk = "vm.img,size=64M,secondary=sync";
    let site = protected_with_disk(disk, patient(), &[]);
    let record = append(&site, "kept");
    let undone = Order::new(Point::Draining, Action::Fail);
    let dies = |point| Order::new(point, Action::Kill);
    site.order(Side::A, &[undone, dies(Point::Following)])
        .unwrap();
    site.order(Side::B, &[dies(Point::Asking)]).unwrap();
    assert!(site.run_axvm(Side::A, &["failover", "vm"]).is_err());
    for side in SIDES {
        until_state(&site, side, "vm", "failed");
    }
    for side in SIDES {
        site.order(side, &[]).unwrap();
    }
    let (code, _, said) = axvm(&site, Side::A, &["start", "vm"]);
    assert_ne!(code, 0, "it started from a disk that is not durable");
    assert!(said.contains("vm.img"), "{said}");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    eventually("b runs the guest", || answers(&site, GUEST));
    assert_eq!(read(&site, &record), "kept");
    assert!(is_protected(&site, Side::B));
}
