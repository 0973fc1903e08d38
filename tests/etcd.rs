//! The whole product with an etcd (Debian's etcd-server) in the witness's place.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Clients, QUIET, alone, eventually, protected};
use testkit::site::{Side, SiteSpec};
use testkit::{require_kvm, require_lab, require_program};

fn spec() -> SiteSpec {
    SiteSpec {
        witness: false,
        etcd: true,
        ..SiteSpec::default()
    }
}

#[test]
fn with_etcd_a_host_dies_and_nobody_outside_can_tell() {
    require_kvm!();
    require_lab!();
    require_program!("etcd", "etcd-server");
    let _alone = alone();
    let site = protected(spec(), &[]);
    let clients = Clients::start(&site);
    site.host(Side::A).kill_all().unwrap();
    clients.go_on(200);
    eventually("b says that it runs the guest", || {
        site.primary(Side::B, "vm")
            .is_ok_and(|side| side == Some(Side::B))
    });
    clients.are_content();
}

/// I3: nothing is shown by a side that nobody has granted to run, and it runs once it is granted.
#[test]
fn without_etcd_nobody_takes_over_and_with_it_again_the_guest_goes_on() {
    require_kvm!();
    require_lab!();
    require_program!("etcd", "etcd-server");
    let _alone = alone();
    let mut site = protected(spec(), &[]);
    let clients = Clients::start(&site);
    site.witness().unwrap().kill().unwrap();
    site.host(Side::A).kill_all().unwrap();
    std::thread::sleep(QUIET);
    let silent = clients.answers();
    std::thread::sleep(QUIET);
    assert_eq!(clients.answers(), silent, "an output without a grant");
    let listed = site.axvm(Side::B).args(["list", "--check"]).output();
    let listed = listed.unwrap();
    assert_eq!(listed.status.code(), Some(4), "{listed:?}");
    let text = String::from_utf8_lossy(&listed.stdout).to_lowercase();
    assert!(text.contains("held") && text.contains("etcd"), "{listed:?}");
    site.start_witness().unwrap();
    clients.go_on(200);
    clients.are_content();
}
