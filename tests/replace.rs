//! A host is gone for good, and another machine takes its place (`axd pair --replace`): nothing is lost, and
//! nothing is started from a copy that is not current (I4).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::talk::{append, axvm, read, text, until_state, vm_processes};
use common::{Clients, alone, eventually, patient, protected};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

const DEAD: &str = "--i-know-the-peer-is-dead";

/// Host a dies, and the machine `name` with empty disks stands in its place.
fn burns(site: &mut Site, name: &'static str) {
    site.host(Side::A).kill_all().unwrap();
    site.host(Side::A).power_on().unwrap();
    site.put_another(Side::A, name, "new").unwrap();
}

fn until_protected_by_the_new_one(site: &Site) {
    until_state(site, Side::B, "vm", "protected");
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    // Everything went over: the new machine had no copy, and no map that could be believed.
    let shown = site.show(Side::B, "vm").unwrap();
    let processes = shown["processes"].as_array().unwrap();
    let compared = processes
        .iter()
        .filter_map(|p| p["status"]["disk_sync"]["compared"].as_u64());
    assert_eq!(compared.max(), Some(64 << 20), "{shown}");
}

/// The guest never stops for it, and the new machine is as good as the old one: under another name, so that sides
/// would be exchanged if they followed from names.
#[test]
fn a_guest_outlives_a_host_that_burnt_and_then_the_one_that_was_left() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient(), &[]);
    let clients = Clients::start(&site);
    let alive = site.replace(Side::A, "a", &[DEAD]).unwrap_err().to_string();
    assert!(alive.contains("is not gone"), "{alive}");
    burns(&mut site, "c");
    clients.go_on(100);
    until_state(&site, Side::B, "vm", "degraded");
    let said = site.replace(Side::A, "a", &[]).unwrap();
    assert!(said.contains("c has taken the place of a"), "{said}");
    // Cut short and done again, it comes to the same.
    site.replace(Side::A, "a", &[]).unwrap();

    // The old machine is repaired and knows nothing of that. The witness was not told either.
    site.put_back(Side::A, "a", "a");
    site.start_axd(Side::A).unwrap();
    let (code, _, why) = axvm(&site, Side::A, &["start", "vm", "--alone-ok"]);
    assert_eq!(code, 12, "{why}");
    assert!(why.contains("this host was replaced"), "{why}");
    assert!(vm_processes(&site, Side::A).is_empty());
    let (_, _, hosts) = axvm(&site, Side::A, &["failover", "vm"]);
    assert!(
        hosts.contains("does not trust this host's certificate"),
        "{hosts}"
    );
    site.host(Side::A).kill_all().unwrap();
    site.host(Side::A).power_on().unwrap();

    site.put_another(Side::A, "c", "new").unwrap();
    site.pair_with_witness(Side::A, None).unwrap();
    site.start_axd(Side::A).unwrap();
    site.start_axd(Side::B).unwrap();
    until_protected_by_the_new_one(&site);
    site.host(Side::B).kill_all().unwrap();
    clients.go_on(100);
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::A));
    clients.are_content();
}

/// The current copy burnt with its host. What is left is not started as if nothing were lost, on neither machine.
#[test]
fn a_vm_whose_only_current_copy_burnt_is_held_until_an_operator_accepts_that() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = protected(patient().without_reprotection(), &[]);
    let kept = append(&site, "before");
    // From here on it is on both disks, whenever b dies.
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    site.host(Side::B).kill_all().unwrap();
    until_state(&site, Side::A, "vm", "degraded");
    append(&site, "after");
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    site.host(Side::B).power_on().unwrap();
    burns(&mut site, "a");
    let unsaid = site.replace(Side::A, "a", &[]).unwrap_err().to_string();
    assert!(
        unsaid.contains("vm: stopped there, and only that copy"),
        "{unsaid}"
    );
    assert!(unsaid.contains(DEAD), "{unsaid}");
    let said = site.replace(Side::A, "a", &[DEAD]).unwrap();
    assert!(said.contains("axvm start vm --accept-loss"), "{said}");
    site.pair_with_witness(Side::A, Some("a")).unwrap();
    site.start_axd(Side::B).unwrap();
    site.start_axd(Side::A).unwrap();
    until_state(&site, Side::B, "vm", "held");
    let note = text(&site.show(Side::B, "vm").unwrap()["note"]);
    assert!(note.contains("--accept-loss"), "{note}");
    eventually("the new machine knows the VM", || {
        site.show(Side::A, "vm").is_ok()
    });
    for side in [Side::A, Side::B] {
        let (code, _, why) = axvm(&site, side, &["start", "vm"]);
        assert_eq!(code, 12, "I4: {why}");
    }
    site.run_axvm(Side::B, &["start", "vm", "--accept-loss"])
        .unwrap();
    until_state(&site, Side::B, "vm", "protected");
    let read = read(&site, &kept);
    assert!(read.contains("before"), "{kept}: {read}");
}

/// Two hosts and their operator: the word that lets the guest go on is given with the replacement, and the old
/// machine gets no answer, nor a word of its own.
#[test]
fn without_a_witness_the_operator_says_that_the_host_is_dead_and_replaced() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let spec = SiteSpec {
        witness: false,
        ..patient()
    };
    let mut site = protected(spec, &[]);
    let clients = Clients::start(&site);
    burns(&mut site, "a");
    until_state(&site, Side::B, "vm", "held");
    let unsaid = site.replace(Side::A, "a", &[]).unwrap_err().to_string();
    assert!(
        unsaid.contains("vm is held") && unsaid.contains(DEAD),
        "{unsaid}"
    );
    site.replace(Side::A, "a", &[DEAD]).unwrap();
    clients.go_on(100);

    site.put_back(Side::A, "a", "a");
    site.start_axd(Side::A).unwrap();
    let held = site
        .run_axvm(Side::A, &["start", "vm", "--alone-ok"])
        .unwrap();
    assert!(
        held.contains("held") && held.contains("does not trust this host"),
        "{held}"
    );
    let (code, _, why) = axvm(&site, Side::A, &["resume", "vm", DEAD]);
    assert_eq!(code, 7, "host b is not dead: {why}");
    site.host(Side::A).kill_all().unwrap();
    site.host(Side::A).power_on().unwrap();

    site.put_another(Side::A, "a", "new").unwrap();
    site.start_axd(Side::A).unwrap();
    until_protected_by_the_new_one(&site);
    site.host(Side::B).kill_all().unwrap();
    until_state(&site, Side::A, "vm", "held");
    site.run_axvm(Side::A, &["resume", "vm", DEAD]).unwrap();
    clients.go_on(100);
    clients.are_content();
}
