//! Protection that was lost comes back by itself, whatever was lost and when.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::talk::{SIDES, answers, append, assert_stopped, axvm, read, state, text, until_state};
use common::{Clients, GUEST, PATIENCE, alone, eventually, patient, protected};
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// The guest runs on `side` and the other host is its shadow, as both hosts see it.
fn until_protected_on(site: &Site, side: Side) {
    for ask in SIDES {
        until_state(site, ask, "vm", "protected");
        assert_eq!(site.primary(ask, "vm").unwrap(), Some(side));
    }
}

/// Waits until the guest on `side` is being copied; false if it was protected before that was seen.
fn until_syncing(site: &Site, side: Side) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match state(site, side, "vm").as_str() {
            "syncing" => return true,
            "protected" => return false,
            other => assert!(Instant::now() < deadline, "{other}\n{}", site.logs()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_that_lost_a_side_is_protected_again_before_it_loses_the_next() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &["--verify-every", "50"]);
    let clients = Clients::start(&site);
    let mut home = Side::A;
    for round in 0..3 {
        // By turns the side that runs it and the one that does not.
        let victim = if round % 2 == 0 { home } else { home.other() };
        let heir = victim.other();
        let lost = || site.told(heir, "vm", "peer-lost").unwrap_or_default().len();
        let before = lost();
        site.run_axvm(Side::A, &["kill", "vm", "--host", victim.name()])
            .unwrap();
        if victim == home {
            home = home.other();
        }
        clients.go_on(100);
        eventually("the loss is known", || lost() > before);
        until_protected_on(&site, home);
    }
    clients.go_on(100);
    clients.are_content();
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    assert_stopped(&site, "vm", "vm.img");
}

#[test]
fn a_host_that_comes_back_is_made_the_shadow_and_takes_over_when_the_other_dies() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    for victim in SIDES {
        site.host(victim).kill_all().unwrap();
        clients.go_on(100);
        until_state(&site, victim.other(), "vm", "degraded");
        // It says why it is without a shadow.
        eventually("the reason is told", || {
            let shown = site.show(victim.other(), "vm").unwrap();
            text(&shown["note"]).contains(&format!("host {} does not answer", victim.name()))
        });
        site.host(victim).power_on().unwrap();
        site.start_axd(victim).unwrap();
        until_protected_on(&site, victim.other());
    }
    clients.go_on(100);
    clients.are_content();
}

#[test]
fn a_link_that_was_cut_is_used_again_once_it_is_mended() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    site.lab.links[0].unplug().unwrap();
    clients.go_on(100);
    let home = site.primary(Side::A, "vm").unwrap().unwrap();
    until_state(&site, home, "vm", "degraded");
    // Tried in vain meanwhile, and harmlessly.
    std::thread::sleep(Duration::from_secs(3));
    clients.go_on(100);
    assert_eq!(state(&site, home, "vm"), "degraded");
    site.lab.links[0].mend().unwrap();
    until_protected_on(&site, home);
    site.host(home).kill_all().unwrap();
    clients.go_on(100);
    clients.are_content();
}

#[test]
fn with_the_option_off_nothing_happens_by_itself() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut spec = patient();
    spec.extra.push_str("reprotect = false\n");
    let site = protected(spec, &[]);
    site.run_axvm(Side::A, &["kill", "vm"]).unwrap();
    until_state(&site, Side::B, "vm", "degraded");
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(state(&site, Side::B, "vm"), "degraded");
}

/// Rule 16, I4: whoever is lost during a resync, the source is not; and without the source nothing is
/// started from what it had not finished.
#[test]
fn a_loss_during_a_resync_never_loses_the_source() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &["--memory", "512M"]);
    // Memory that takes its time to be copied.
    common::talk::control(&site, GUEST, "DIRTY 100000 2000000 8").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    common::talk::control(&site, GUEST, "DIRTY 0 0 8").unwrap();
    let kept = append(&site, "kept");
    site.run_axvm(Side::A, &["kill", "vm"]).unwrap();
    let mut struck = 0;
    for wait in [0, 100] {
        if until_syncing(&site, Side::B) {
            std::thread::sleep(Duration::from_millis(wait));
            let killed = axvm(&site, Side::B, &["kill", "vm", "--host", "a"]);
            struck += usize::from(killed.0 == 0);
        }
        assert!(answers(&site, GUEST));
    }
    assert!(struck > 0, "no resync was struck");
    until_protected_on(&site, Side::B);
    assert_eq!(read(&site, &kept), "kept");

    // The source dies with its host in the middle: its copy is the only one.
    site.run_axvm(Side::B, &["kill", "vm", "--host", "a"])
        .unwrap();
    while !until_syncing(&site, Side::B) {
        let _ = axvm(&site, Side::B, &["kill", "vm", "--host", "a"]);
    }
    site.host(Side::B).kill_all().unwrap();
    eventually("a has given its unfinished copy up", || {
        let shown = site.show(Side::A, "vm").unwrap();
        shown["processes"].as_array().is_some_and(Vec::is_empty)
    });
    let (code, _, why) = axvm(&site, Side::A, &["start", "vm", "--alone-ok"]);
    assert_ne!(code, 0, "a stale copy was started");
    assert!(
        why.contains("side B") || why.contains("inconsistent"),
        "{why}"
    );
    site.host(Side::B).power_on().unwrap();
    site.start_axd(Side::B).unwrap();
    until_state(&site, Side::B, "vm", "failed");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &kept), "kept");
}
