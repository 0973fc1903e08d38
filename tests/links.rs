//! Two cables between the hosts: losing either costs neither failover nor protection (rule 10).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::talk::{SIDES, text, until_state, vm_processes};
use common::{Clients, alone, eventually, protected};
use serde_json::Value;
use testkit::net::{Cable, Shape, Toward};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

/// A path counts as lost after a third of this.
const TIMES: &str = "detect_ms = 600\nstall_ms = 5000\n";
/// An acknowledgement permits nothing once it is as old as this (rule 24): longer than the cable's way there
/// and back may take, or nothing would ever be released.
const SLOW_LINK: &str = "permission_ms = 120\n";
/// Answers that every client must get for the guest to count as going on.
const ANSWERS: u64 = 50;

fn site(links: u8, user_links: u8, more: &str) -> Site {
    let spec = SiteSpec {
        extra: format!("{TIMES}{more}"),
        ..SiteSpec::default()
    };
    protected(spec.with_links(links, user_links), &[])
}

/// What a side's process says of itself.
fn status(site: &Site, side: Side) -> Value {
    let mut shown = site.show(side, "vm").unwrap();
    let all = shown["processes"].as_array_mut().unwrap();
    let here = all.iter_mut().find(|p| p["host"] == side.name()).unwrap();
    here["status"].take()
}

/// The states of the paths as a side has them, by number.
fn paths(site: &Site, side: Side) -> Vec<(String, bool)> {
    let status = status(site, side);
    let mut paths = status["paths"].as_array().unwrap().clone();
    paths.sort_by_key(|path| text(&path["address"]));
    let serves = |p: &Value| p["carries"] == true || p["ready"] == true;
    paths
        .iter()
        .map(|p| (text(&p["state"]), serves(p)))
        .collect()
}

/// Both sides have both paths up, and the stream could go over either.
fn until_redundant(site: &Site) {
    eventually("both paths serve", || {
        SIDES.iter().all(|side| {
            let paths = paths(site, *side);
            paths.len() == 2 && paths.iter().all(|(state, serves)| state == "up" && *serves)
        })
    });
}

/// What must not change: who runs the guest, who is its shadow, under which generation.
fn who(site: &Site) -> Vec<String> {
    let of = |side| {
        let lost = site.told(side, "vm", "peer-lost").unwrap();
        assert!(lost.is_empty(), "{}: {lost:?}", side.name());
        let status = status(site, side);
        assert_eq!(status["phase"]["is"], "protected", "{status}");
        let facts = ["role", "incarnation", "generation"];
        facts.map(|fact| status[fact].to_string()).join(" ")
    };
    SIDES.map(of).to_vec()
}

type Cut = fn(&Cable);

const CUTS: [(&str, Cut); 4] = [
    ("unplugged", |cable| cable.unplug().unwrap()),
    ("silent both ways", |cable| cable.silence_both().unwrap()),
    ("silent toward the shadow", |cable| {
        cable.silence(Toward::Second).unwrap();
    }),
    ("silent toward the primary", |cable| {
        cable.silence(Toward::First).unwrap();
    }),
];

#[test]
fn either_of_two_cables_is_pulled_in_each_way_and_nobody_notices() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = site(2, 0, "");
    let clients = Clients::start(&site);
    until_redundant(&site);
    let began = who(&site);
    for (how, cut) in CUTS {
        for number in 0..2 {
            println!("cable {number}: {how}");
            let cable = &site.lab.links[number];
            cut(cable);
            eventually("both sides know which path is lost", || {
                SIDES
                    .iter()
                    .all(|side| paths(&site, *side)[number].0 == "lost")
            });
            clients.go_on(ANSWERS);
            assert_eq!(who(&site), began, "{how}");
            cable.mend().unwrap();
            until_redundant(&site);
            assert_eq!(who(&site), began, "{how}");
        }
    }
    for side in SIDES {
        assert!(site.told(side, "vm", "peer-lost").unwrap().is_empty());
        let told = |what| site.told(side, "vm", what).unwrap().len();
        assert!(told("path-lost") >= 8 && told("path-back") >= 8);
    }
    // The hosts themselves know of it, too, whether a VM runs or not.
    site.lab.links[1].silence_both().unwrap();
    eventually("the hosts name the cable", || {
        let hosts = site.run_axvm(Side::A, &["host", "list"]).unwrap();
        hosts.contains("LOST PATH: a has no answer at 10.99.1.2")
            && hosts.contains("LOST PATH: b has no answer at 10.99.1.1")
            && !hosts.contains("10.99.0.")
            && !hosts.contains("10.77.0.")
    });
    clients.go_on(ANSWERS);
    // A planned failover speaks and copies over what is left.
    site.run_axvm(Side::A, &["failover", "vm"]).unwrap();
    clients.go_on(ANSWERS);
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
    // A death is a death: its notice comes by the cable that is left.
    site.run_axvm(Side::B, &["kill", "vm"]).unwrap();
    clients.go_on(ANSWERS);
    let how = site.told(Side::A, "vm", "peer-lost").unwrap();
    assert!(
        how.iter().all(|lost| lost["how"] == "death-notice"),
        "{how:?}"
    );
    assert_eq!(how.len(), 1);
    until_state(&site, Side::A, "vm", "protected");
    // With the second cable gone as well it is as with one: exactly one side goes on.
    site.lab.links[0].silence_both().unwrap();
    clients.go_on(ANSWERS);
    eventually("one of the two processes ends", || {
        SIDES
            .map(|side| vm_processes(&site, side).len())
            .iter()
            .sum::<usize>()
            == 1
    });
    clients.are_content();
}

#[test]
fn a_cable_that_delays_and_reorders_frames_breaks_nothing() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = site(0, 1, SLOW_LINK);
    let clients = Clients::start(&site);
    let began = who(&site);
    let ms = Duration::from_millis;
    for (delay, jitter) in [
        (ms(10), ms(0)),
        (ms(0), ms(4)),
        (ms(5), ms(15)),
        (ms(0), ms(0)),
    ] {
        for toward in [Toward::First, Toward::Second] {
            site.lab.user_links[0].set(toward, Shape::late(delay, jitter));
        }
        clients.go_on(ANSWERS / 2);
        std::thread::sleep(ms(500));
        assert_eq!(who(&site), began, "{delay:?} {jitter:?}");
    }
    clients.are_content();
}
