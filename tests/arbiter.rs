//! The arbiter is lost, wiped or replaced while a guest runs (rule 27).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{SIDES, text, until_state};
use common::{Clients, QUIET, alone, eventually, patient, protected};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

/// The second witness of these sites has no keys.
fn plain() -> SiteSpec {
    SiteSpec {
        mtls: false,
        ..patient()
    }
}

fn arbiter(site: &Site) -> String {
    let shown = site
        .show(Side::A, "vm")
        .or_else(|_| site.show(Side::B, "vm"));
    text(&shown.unwrap()["arbiter"])
}

/// The configuration names the second witness from now on.
fn reconfigure(site: &mut Site, as_standby: bool) {
    site.name_second_witness(as_standby).unwrap();
    for side in SIDES {
        site.axd(side).unwrap().kill().unwrap();
        site.start_axd(side).unwrap();
    }
}

/// The guest's host dies; the shadow takes over by the arbiter it has now.
fn host_dies(site: &Site, clients: Clients) {
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(100);
    until_state(site, Side::B, "vm", "degraded");
    clients.are_content();
}

#[test]
fn a_witness_is_replaced_while_a_pair_runs_and_a_host_dies() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(plain(), &[]);
    let clients = Clients::start(&site);
    site.start_second_witness().unwrap();
    reconfigure(&mut site, false);
    eventually("both sides have changed to the second witness", || {
        let told = |side| site.told(side, "vm", "note").unwrap_or_default();
        SIDES.iter().all(|side| {
            let told = format!("{:?}", told(*side));
            told.contains("witness witness2 decides from now on")
        })
    });
    assert_eq!(arbiter(&site), "witness witness2");
    // Nothing is asked of the first one any more.
    site.witness().unwrap().kill().unwrap();
    host_dies(&site, clients);
}

#[test]
fn a_witness_that_is_dead_for_good_is_replaced_by_the_one_that_stands_by() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(plain(), &[]);
    let clients = Clients::start(&site);
    site.start_second_witness().unwrap();
    reconfigure(&mut site, true);
    eventually("the second witness stands by", || {
        arbiter(&site) == "witness witness; witness witness2 stands by"
    });
    site.witness().unwrap().kill().unwrap();
    eventually("the second witness decides", || {
        arbiter(&site) == "witness witness2; witness witness stands by"
    });
    clients.go_on(100);
    host_dies(&site, clients);
}

#[test]
fn a_witness_whose_store_is_wiped_grants_nothing_until_both_hosts_register() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(plain(), &[]);
    let clients = Clients::start(&site);
    site.host(Side::B).kill_all().unwrap();
    clients.go_on(100);
    until_state(&site, Side::A, "vm", "degraded");
    site.witness().unwrap().kill().unwrap();
    std::fs::remove_dir_all(site.witness_store()).unwrap();
    site.start_witness().unwrap();
    // Nobody else can be asked, and the guest does not care.
    std::thread::sleep(QUIET);
    clients.go_on(100);
    let told = |site: &Site| format!("{:?}", site.told(Side::A, "vm", "note").unwrap_or_default());
    eventually("a says whom it waits for", || {
        told(&site).contains("waits for the other host to register")
    });
    site.host(Side::B).power_on().unwrap();
    site.start_axd(Side::B).unwrap();
    for ask in SIDES {
        until_state(&site, ask, "vm", "protected");
    }
    // Wiped once more, with both there: nothing has changed since but the arbiter's name.
    site.witness().unwrap().kill().unwrap();
    std::fs::remove_dir_all(site.witness_store()).unwrap();
    site.start_witness().unwrap();
    eventually("both have registered and the guest can be moved", || {
        site.run_axvm(Side::A, &["failover", "vm"]).is_ok()
    });
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    clients.go_on(100);
    site.host(Side::B).kill_all().unwrap();
    clients.go_on(100);
    until_state(&site, Side::A, "vm", "degraded");
    clients.are_content();
}
