//! Two hosts without a third party: they agree while they see each other, and an operator decides when
//! they don't.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::process::Output;

use common::{Clients, QUIET, alone, eventually, patient, protected};
use testkit::net::Cable;
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

const WORD: &str = "--i-know-the-peer-is-dead";

fn site() -> Site {
    let spec = SiteSpec {
        witness: false,
        ..patient()
    };
    protected(spec.without_reprotection(), &[])
}

/// One that declares a silent peer lost after half a second: for cut cables.
fn quick() -> Site {
    let spec = SiteSpec {
        witness: false,
        extra: "detect_ms = 500\nstall_ms = 5000\n".into(),
        ..SiteSpec::default()
    };
    protected(spec.without_reprotection(), &[])
}

fn output(site: &Site, side: Side, args: &[&str]) -> Output {
    site.axvm(side).args(args).output().unwrap()
}

fn word(site: &Site, side: Side) {
    site.run_axvm(side, &["resume", "vm", WORD]).unwrap();
}

fn processes(site: &Site, side: Side) -> usize {
    let all = site.host(side).processes();
    all.values().filter(|line| line.contains("ax-vmm")).count()
}

fn events(site: &Site, side: Side) -> String {
    site.run_axvm(side, &["events", "vm"]).unwrap()
}

fn state(site: &Site, side: Side) -> String {
    site.show(side, "vm").map_or(String::new(), |vm| {
        format!("{}: {}", vm["state"], vm["note"])
    })
}

/// Nobody is shown anything, and the operator is told what to do.
fn is_held(site: &Site, clients: &Clients, told: Side) {
    let command = format!("axvm resume vm {WORD}");
    eventually("the operator is told", || {
        let state = state(site, told);
        state.contains("held") && state.contains(&command)
    });
    let silent = clients.answers();
    std::thread::sleep(QUIET);
    assert_eq!(
        clients.answers(),
        silent,
        "an output without anybody's word"
    );
    let listed = output(site, told, &["list", "--check"]);
    assert_eq!(listed.status.code(), Some(4), "{listed:?}");
    assert!(events(site, told).contains(&command));
}

/// Cuts the link, and one host off from everything else too: the hosts don't see each other at all.
fn apart(site: &Site, cut_off: Side) {
    uplink(site, cut_off).silence_both().unwrap();
    site.lab.links[0].silence_both().unwrap();
}

fn together(site: &Site, cut_off: Side) {
    uplink(site, cut_off).mend().unwrap();
    site.lab.links[0].mend().unwrap();
}

fn uplink(site: &Site, side: Side) -> &Cable {
    match side {
        Side::A => &site.lab.uplinks.a,
        Side::B => &site.lab.uplinks.b,
    }
}

fn power_cycle(site: &mut Site, side: Side) {
    site.host(side).power_on().unwrap();
    site.start_axd(side).unwrap();
}

fn only_on(site: &Site, side: Side) {
    eventually("the other side's process ends", || {
        processes(site, side.other()) == 0
    });
    assert_eq!(processes(site, side), 1);
    assert_eq!(site.primary(side, "vm").unwrap(), Some(side));
}

#[test]
fn a_host_dies_and_the_guest_goes_on_by_the_operators_word() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = site();
    let shown = site.run_axvm(Side::B, &["show", "vm"]).unwrap();
    assert!(shown.contains("arbiter    manual"), "{shown}");
    let told = site.run_axvm(Side::A, &["events"]).unwrap();
    assert!(told.contains(WORD), "said when axd starts: {told}");
    let early = output(&site, Side::B, &["resume", "vm", WORD]);
    assert_eq!(
        early.status.code(),
        Some(7),
        "nobody waits for it: {early:?}"
    );
    let clients = Clients::start(&site);
    site.host(Side::A).kill_all().unwrap();
    is_held(&site, &clients, Side::B);
    word(&site, Side::B);
    clients.go_on(200);
    clients.are_content();
}

/// The surviving host sees that the process is gone, and agrees: nobody is needed.
#[test]
fn a_process_dies_on_either_host_and_the_other_host_agrees_to_go_on() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    for victim in [Side::A, Side::B] {
        let site = site();
        let clients = Clients::start(&site);
        let kill = ["kill", "vm", "--host", victim.name()];
        site.run_axvm(Side::A, &kill).unwrap();
        clients.go_on(200);
        only_on(&site, victim.other());
        clients.are_content();
    }
}

/// The hosts see each other on the business network: the shadow is given up by agreement.
#[test]
fn a_cut_link_between_hosts_that_see_each_other_needs_no_operator() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = quick();
    let clients = Clients::start(&site);
    site.lab.links[0].silence_both().unwrap();
    clients.go_on(200);
    only_on(&site, Side::A);
    clients.are_content();
}

#[test]
fn a_cut_that_heals_without_a_word_leaves_exactly_one_side_which_goes_on_by_itself() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = quick();
    let clients = Clients::start(&site);
    apart(&site, Side::B);
    is_held(&site, &clients, Side::A);
    eventually("the shadow waits too", || {
        state(&site, Side::B).contains(WORD)
    });
    together(&site, Side::B);
    clients.go_on(200);
    only_on(&site, Side::A);
    clients.are_content();
}

#[test]
fn a_cut_and_a_word_on_one_side_and_the_other_side_ends_when_they_meet_again() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    // The other way round is what happens when a host dies (above), and in the model.
    let told = Side::A;
    let site = quick();
    let clients = Clients::start(&site);
    apart(&site, told.other());
    is_held(&site, &clients, told);
    word(&site, told);
    clients.go_on(200);
    assert_eq!(processes(&site, told.other()), 1, "it is held, no more");
    together(&site, told.other());
    only_on(&site, told);
    clients.go_on(200);
    let ended = events(&site, told.other());
    assert!(ended.contains("the other side runs the VM"), "{ended}");
    clients.are_content();
}

#[test]
fn two_words_are_said_loudly_and_neither_guest_is_touched() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = quick();
    apart(&site, Side::B);
    for side in [Side::A, Side::B] {
        eventually("it waits", || state(&site, side).contains(WORD));
        word(&site, side);
        eventually("it runs", || state(&site, side).contains("degraded"));
    }
    together(&site, Side::B);
    for side in [Side::A, Side::B] {
        eventually("the operator hears of it", || {
            state(&site, side).contains("ALARM") && events(&site, side).contains("ALARM")
        });
        assert_eq!(processes(&site, side), 1);
    }
}

#[test]
fn a_guest_moves_there_and_back_stops_and_starts_where_the_hosts_agree() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let clients = Clients::start(&site);
    for side in [Side::B, Side::A] {
        site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
        clients.go_on(100);
        assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(side));
    }
    clients.are_content();
    site.run_axvm(Side::B, &["stop", "vm"]).unwrap();
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    assert_eq!(site.primary(Side::A, "vm").unwrap(), Some(Side::B));
    // Alone, a guest may be stopped in order all the same.
    site.host(Side::A).kill_all().unwrap();
    eventually("it waits", || state(&site, Side::B).contains(WORD));
    word(&site, Side::B);
    eventually("it runs", || state(&site, Side::B).contains("degraded"));
    site.run_axvm(Side::B, &["stop", "vm"]).unwrap();
    assert_eq!(processes(&site, Side::B), 0);
    power_cycle(&mut site, Side::A);
    let stale = output(&site, Side::A, &["start", "vm"]);
    assert_eq!(stale.status.code(), Some(12), "I4: {stale:?}");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
}

/// The processes agree directly; the daemons are not on the guest's path.
#[test]
fn with_the_other_hosts_daemon_dead_a_guest_moves_there_all_the_same() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let clients = Clients::start(&site);
    site.axd(Side::B).unwrap().kill().unwrap();
    site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
    clients.go_on(100);
    // The new holder is alone when this host's process dies, and this host's daemon agrees.
    site.run_axvm(Side::A, &["kill", "vm", "--host", "a"])
        .unwrap();
    clients.go_on(200);
    assert_eq!(processes(&site, Side::A), 0);
    clients.are_content();
}

/// Rule 23: the side that the record names starts when the other host is there to agree, and by an
/// operator's word without it; the other side only by the word, the loss named.
#[test]
fn after_both_hosts_died_the_guest_starts_where_its_record_says_or_by_the_operators_word() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let both_die = |site: &mut Site| {
        for side in [Side::A, Side::B] {
            site.host(side).kill_all().unwrap();
        }
    };
    both_die(&mut site);
    power_cycle(&mut site, Side::B);
    let held = output(&site, Side::B, &["start", "vm", "--alone-ok"]);
    let text = String::from_utf8_lossy(&held.stdout).into_owned();
    assert!(held.status.success(), "{held:?}");
    assert!(text.contains("is held") && text.contains(WORD), "{text}");
    assert!(text.contains("loses what side A has done"), "{text}");
    power_cycle(&mut site, Side::A);
    eventually("with its peer back b knows better", || {
        processes(&site, Side::B) == 0
    });
    let refused = output(&site, Side::B, &["start", "vm"]);
    assert_eq!(refused.status.code(), Some(12), "I4: {refused:?}");
    site.run_axvm(Side::A, &["start", "vm"]).unwrap();
    both_die(&mut site);
    power_cycle(&mut site, Side::B);
    output(&site, Side::B, &["start", "vm", "--alone-ok"]);
    word(&site, Side::B);
    eventually("it runs", || state(&site, Side::B).contains("degraded"));
    Clients::start(&site).are_content();
    // The other host learns of it when it is back.
    power_cycle(&mut site, Side::A);
    eventually("a knows", || {
        let record = site.data_dir(Side::A).join("vms/vm/state/record.json");
        let mine = site.data_dir(Side::B).join("vms/vm/state/record.json");
        std::fs::read(record).unwrap() == std::fs::read(mine).unwrap()
    });
}
