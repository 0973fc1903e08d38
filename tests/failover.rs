//! The whole product as its users have it: two hosts with axd, a witness, clients on the network, and
//! hosts that die.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Clients, QUIET, alone, eventually, protected};
use testkit::site::{Side, SiteSpec};
use testkit::{require_kvm, require_lab};

fn host_dies(spec: SiteSpec, more: &[&str]) {
    let site = protected(spec, more);
    let clients = Clients::start(&site);
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(200);
    eventually("b says that it runs the guest", || {
        site.primary(Side::B, "vm")
            .is_ok_and(|side| side == Some(Side::B))
    });
    clients.are_content();
}

#[test]
fn a_host_dies_and_nobody_outside_can_tell() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    host_dies(SiteSpec::default(), &["--verify-every", "50"]);
}

#[test]
fn a_host_dies_with_two_vcpus_a_dirty_ring_and_a_plain_link() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let spec = SiteSpec {
        mtls: false,
        ..SiteSpec::default()
    };
    host_dies(spec, &["--cpus", "2", "--dirty", "ring"]);
}

/// I3: nothing is shown by a side that nobody has granted to run, and it runs once it is granted.
#[test]
fn without_the_witness_nobody_takes_over_and_with_it_again_the_guest_goes_on() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    site.witness().unwrap().kill().unwrap();
    site.host(Side::A).kill_all().unwrap();
    std::thread::sleep(QUIET);
    let silent = clients.answers();
    std::thread::sleep(QUIET);
    assert_eq!(clients.answers(), silent, "an output without a grant");
    let mut check = site.axvm(Side::B);
    let listed = check.args(["list", "--check"]).output().unwrap();
    assert_eq!(listed.status.code(), Some(4), "{listed:?}");
    let text = String::from_utf8_lossy(&listed.stdout).to_lowercase();
    assert!(text.contains("held"), "{listed:?}");
    site.start_witness().unwrap();
    clients.go_on(200);
    clients.are_content();
}

/// The daemons are not on the guest's path.
#[test]
fn with_both_daemons_dead_a_killed_primary_fails_over_all_the_same() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    for side in [Side::A, Side::B] {
        site.axd(side).unwrap().kill().unwrap();
    }
    clients.go_on(200);
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(200);
    site.start_axd(Side::B).unwrap();
    eventually("the new axd finds the guest", || {
        site.primary(Side::B, "vm")
            .is_ok_and(|side| side == Some(Side::B))
    });
    clients.are_content();
}
