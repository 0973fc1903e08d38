//! Rule 15 with `disk.secondary = sync`: a FLUSH completes when both hosts' disks have it.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Clients, PATIENCE, QUIET, alone, protected_with_disk};
use testkit::site::{Side, Site, SiteSpec};
use testkit::thread_stop::StoppedThread;
use testkit::{require_kvm, require_lab};

fn kept_in_sync() -> Site {
    let spec = SiteSpec {
        // A disk that takes its time is no reason here to give the shadow up.
        extra: "stall_ms = 20000".into(),
        ..SiteSpec::default()
    };
    let spec = spec.without_reprotection();
    protected_with_disk("vm.img,size=64M,secondary=sync", spec, &[])
}

/// Stops the shadow's disk, and nothing else of it: epochs go on to be committed.
fn stop_the_shadows_disk(site: &Site, clients: &Clients) -> StoppedThread {
    let stopped = StoppedThread::before_fsync(&site.data_dir(Side::B), "disk-replica").unwrap();
    // What was durable already is answered.
    std::thread::sleep(QUIET);
    let before = clients.answers();
    let more = |n: usize| before[n] + 200;
    clients.udp.wait_for_answers(more(0), PATIENCE).unwrap();
    clients.incr.wait_for_answers(more(1), PATIENCE).unwrap();
    std::thread::sleep(QUIET);
    let after = clients.answers();
    assert_eq!(
        after[2], before[2],
        "the guest answered for a record that the shadow's disk does not have"
    );
    stopped
}

#[test]
fn no_record_is_answered_for_before_the_shadows_disk_has_it_and_none_is_lost() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = kept_in_sync();
    let clients = Clients::start(&site);
    let stopped = stop_the_shadows_disk(&site, &clients);
    drop(stopped);
    clients.go_on(200);
    // The host dies with a FLUSH under way: it is issued again on the other (rule 13).
    let stopped = stop_the_shadows_disk(&site, &clients);
    site.host(Side::A).kill_all().unwrap();
    drop(stopped);
    clients.go_on(200);
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    clients.are_content();
}

#[test]
fn a_flush_that_waits_for_a_shadow_completes_when_the_guest_may_run_alone() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = kept_in_sync();
    let clients = Clients::start(&site);
    let stopped = stop_the_shadows_disk(&site, &clients);
    site.host(Side::B).kill_all().unwrap();
    clients.go_on(200);
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::A));
    clients.are_content();
    drop(stopped);
}
