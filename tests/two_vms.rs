//! Several VMs on one pair of hosts: one protected in each direction, one unprotected beside them. A VM
//! is one process a side; what befalls it befalls no other.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::net::Ipv4Addr;

use common::talk::{SIDES, assert_stopped, state, until_state, vm_processes};
use common::{Clients, alone, patient};
use testkit::net::{LabSpec, addr};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

const ONE: (&str, Ipv4Addr) = ("one", Ipv4Addr::new(10, 77, 0, 10));
const TWO: (&str, Ipv4Addr) = ("two", Ipv4Addr::new(10, 77, 0, 11));
const LOCAL: (&str, Ipv4Addr) = ("local", Ipv4Addr::new(10, 77, 0, 12));

fn start(site: &Site, home: Side, vm: (&str, Ipv4Addr), tap: &str, mode: &str) {
    let (name, ip) = vm;
    let cmdline = format!("ip={ip}/{}", addr::LAN_PREFIX);
    let disk = format!("{name}.img,size=16M");
    let net = format!("tap={tap}");
    let args = ["start", name, "--mode", mode, "--probe", "--memory", "64M"];
    let devices = ["--disk", &disk, "--net", &net, "--cmdline", &cmdline];
    site.run_axvm(home, &[&args[..], &devices].concat())
        .unwrap();
}

/// The process of a VM on a host.
fn process_of(site: &Site, side: Side, name: &str) -> Option<u32> {
    let its = format!("/vms/{name}/");
    let mut all = vm_processes(site, side).into_iter();
    all.find(|(_, line)| line.contains(&its))
        .map(|(pid, _)| pid)
}

#[test]
fn what_befalls_one_vm_befalls_no_other() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let lab = LabSpec {
        taps: 3,
        ..LabSpec::default()
    };
    let site = Site::new(SiteSpec { lab, ..patient() }).unwrap();
    start(&site, Side::A, ONE, "axtap0", "ft");
    start(&site, Side::B, TWO, "axtap1", "ft");
    start(&site, Side::A, LOCAL, "axtap2", "none");
    for (vm, home, shown) in [
        ("one", Side::A, "protected"),
        ("two", Side::B, "protected"),
        ("local", Side::A, "unprotected"),
    ] {
        for side in SIDES {
            assert_eq!(state(&site, side, vm), shown, "{vm}");
            assert_eq!(site.primary(side, vm).unwrap(), Some(home), "{vm}");
        }
    }
    let [one, two, local] = [ONE, TWO, LOCAL].map(|(_, ip)| Clients::of(&site, ip));
    let others = || {
        [
            process_of(&site, Side::A, "two"),
            process_of(&site, Side::B, "two"),
            process_of(&site, Side::A, "local"),
        ]
    };
    let before = others();
    assert!(before.iter().all(Option::is_some), "{before:?}");

    // The primary of one on a is killed: one goes on on b, beside the primary of two.
    site.run_axvm(Side::B, &["kill", "one"]).unwrap();
    for clients in [&one, &two, &local] {
        clients.go_on(200);
    }
    until_state(&site, Side::B, "one", "protected");
    assert_eq!(site.primary(Side::A, "one").unwrap(), Some(Side::B));
    assert_eq!(others(), before, "the other VMs' processes");
    assert_eq!(state(&site, Side::A, "two"), "protected");
    assert_eq!(state(&site, Side::A, "local"), "unprotected");

    // The shadow of two on a is killed: two goes on where it is, and gets another shadow.
    site.run_axvm(Side::A, &["kill", "two", "--host", "a"])
        .unwrap();
    for clients in [&one, &two, &local] {
        clients.go_on(200);
    }
    until_state(&site, Side::A, "two", "protected");
    let now = others();
    assert!(now[0].is_some() && now[0] != before[0], "{now:?}");
    assert_eq!(now[1..], before[1..]);

    // The VM that nothing protects is gone when it is killed, and says so.
    local.are_content();
    site.run_axvm(Side::A, &["kill", "local"]).unwrap();
    until_state(&site, Side::A, "local", "failed");
    let listed = site
        .axvm(Side::A)
        .args(["list", "--check"])
        .output()
        .unwrap();
    assert_eq!(listed.status.code(), Some(4), "{listed:?}");
    for clients in [one, two] {
        clients.go_on(200);
        clients.are_content();
    }
    // Stopping one leaves two.
    site.run_axvm(Side::A, &["stop", "one"]).unwrap();
    until_state(&site, Side::A, "one", "stopped");
    assert_eq!(state(&site, Side::A, "two"), "protected");
    site.run_axvm(Side::B, &["stop", "two"]).unwrap();
    assert_stopped(&site, "two", "two.img");
}
