//! Changing how a running VM is protected (rule 22).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::talk::{
    SIDES, answers, append, assert_stopped, axvm, control, read, state, until_state, uptime,
};
use common::{Clients, GUEST, alone, eventually, patient, protected};
use testkit::net::addr;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// A site on whose host a the VM `vm` runs in mode none, never protected before.
fn unprotected(spec: testkit::site::SiteSpec) -> Site {
    let site = Site::new(spec).unwrap();
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let mut args = vec!["start", "vm", "--mode", "none", "--probe"];
    args.extend(["--memory", "128M", "--disk", "vm.img,size=64M"]);
    args.extend(["--net", "tap=axtap0", "--cmdline", &cmdline]);
    site.run_axvm(Side::A, &args).unwrap();
    site
}

fn set(site: &Site, ask: Side, mode: &str) {
    site.run_axvm(ask, &["set-mode", "vm", mode]).unwrap();
}

fn mode(site: &Site, ask: Side) -> String {
    common::talk::text(&site.show(ask, "vm").unwrap()["vm"]["mode"])
}

#[test]
fn a_guest_is_protected_and_left_alone_again_without_noticing() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = unprotected(patient());
    let clients = Clients::start(&site);
    let born = uptime(&site, GUEST);
    for round in 0..2 {
        // From either host: the order goes to where the guest runs.
        let ask = SIDES[round % 2];
        set(&site, ask, "ft");
        for side in SIDES {
            assert_eq!(state(&site, side, "vm"), "protected");
            assert_eq!(mode(&site, side), "ft");
        }
        clients.go_on(100);
        set(&site, ask, "none");
        for side in SIDES {
            assert_eq!(state(&site, side, "vm"), "unprotected");
            eventually("both know", || mode(&site, side) == "none");
        }
        clients.go_on(100);
        eventually("the shadow is gone", || {
            common::talk::vm_processes(&site, Side::B).is_empty()
        });
        // Dismissed, not lost: nobody was taken for dead.
        assert_eq!(site.told(Side::B, "vm", "peer-lost").unwrap().len(), 0);
    }
    set(&site, Side::A, "ft");
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(100);
    assert!(uptime(&site, GUEST) > born, "it was not started anew");
    clients.are_content();
}

#[test]
fn a_change_that_cannot_be_made_leaves_the_guest_as_it_was() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = unprotected(patient());
    let clients = Clients::start(&site);
    let refused = |site: &Site, mode: &str, code: i32, word: &str| {
        let (found, _, why) = axvm(site, Side::A, &["set-mode", "vm", mode]);
        assert_eq!(found, code, "{why}");
        assert!(why.contains(word), "{why}");
    };
    // Nobody to register the pair with.
    site.witness().unwrap().kill().unwrap();
    refused(&site, "ft", 7, "arbiter");
    assert_eq!(state(&site, Side::A, "vm"), "unprotected");
    assert_eq!(mode(&site, Side::A), "none");
    clients.go_on(100);
    eventually("no shadow is left", || {
        common::talk::vm_processes(&site, Side::B).is_empty()
    });
    site.start_witness().unwrap();
    // Nobody to be the shadow.
    site.axd(Side::B).unwrap().kill().unwrap();
    refused(&site, "ft", 8, "host b");
    assert_eq!(state(&site, Side::A, "vm"), "unprotected");
    assert_eq!(mode(&site, Side::A), "none");
    clients.go_on(100);
    site.start_axd(Side::B).unwrap();
    set(&site, Side::A, "ft");
    // Nobody to grant that it runs alone: it stays protected, and is not frozen meanwhile.
    site.witness().unwrap().kill().unwrap();
    refused(&site, "none", 7, "arbiter");
    clients.go_on(100);
    assert_eq!(state(&site, Side::A, "vm"), "protected");
    assert_eq!(mode(&site, Side::A), "ft");
    site.start_witness().unwrap();
    set(&site, Side::A, "none");
    clients.go_on(100);
    clients.are_content();
}

/// I4: what one side did in mode none the other does not have.
#[test]
fn a_vm_that_left_its_protection_starts_only_where_it_ran() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    set(&site, Side::A, "none");
    let kept = append(&site, "kept");
    site.host(Side::A).kill_all().unwrap();
    let (code, _, why) = axvm(&site, Side::B, &["start", "vm"]);
    assert_eq!(code, 12, "{why}");
    assert!(why.contains("side A"), "{why}");
    site.host(Side::A).power_on().unwrap();
    site.start_axd(Side::A).unwrap();
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &kept), "kept");
    let (code, _, why) = axvm(&site, Side::B, &["start", "vm"]);
    assert_eq!(code, 7, "it runs on a: {why}");

    // The arbiter is not needed to stop it, and the other side is not current after that either.
    site.witness().unwrap().kill().unwrap();
    assert!(answers(&site, GUEST));
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    until_state(&site, Side::A, "vm", "stopped");
    site.start_witness().unwrap();
    assert_eq!(axvm(&site, Side::B, &["start", "vm"]).0, 12);
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &kept), "kept");
    set(&site, Side::A, "ft");
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    assert_stopped(&site, "vm", "vm.img");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    assert_eq!(read(&site, &kept), "kept");
}

/// Of a VM that does not run the next start is changed; and an axd that ends in the middle of a change
/// is succeeded by one that knows what was wanted.
#[test]
fn a_mode_is_kept_for_the_next_start_and_for_the_next_axd() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    set(&site, Side::B, "none");
    eventually("a has heard of it", || mode(&site, Side::A) == "none");
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    assert_eq!(state(&site, Side::A, "vm"), "unprotected");
    for (wanted, shown) in [("ft", "protected"), ("none", "unprotected")] {
        for delay in [0, 30, 120] {
            let mut command = site.axvm(Side::A);
            let mut asked = command.args(["set-mode", "vm", wanted]).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(delay));
            site.axd(Side::A).unwrap().kill().unwrap();
            asked.wait().unwrap();
            site.start_axd(Side::A).unwrap();
            assert_eq!(control(&site, GUEST, "PING").unwrap(), "PONG");
            // What the definition says by now is what it comes to.
            let defined = mode(&site, Side::A);
            let comes = if defined == wanted { shown } else { "" };
            if comes.is_empty() {
                set(&site, Side::A, wanted);
            }
            until_state(&site, Side::A, "vm", shown);
            if delay < 120 {
                set(&site, Side::A, if wanted == "ft" { "none" } else { "ft" });
            }
        }
    }
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
}
