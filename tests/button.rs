//! `axvm stop` asks the guest by its power button first, and stops it all the same.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::talk::{SIDES, answers, append, assert_stopped, axvm, control, image, until_state};
use common::{GUEST, PATIENCE, alone, at, eventually, patient, protected};
use probe_guest::{ledger, port};
use testkit::client::{Origin, ledger as client};
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// What the guest records last when it follows its button.
const LAST: &str = "button";

fn button(site: &Site, does: &str) {
    assert_eq!(
        control(site, GUEST, &format!("BUTTON {does}")).unwrap(),
        "OK"
    );
}

/// The ledger as it is in a stopped guest's image on a host.
fn records(site: &Site, side: Side) -> Vec<String> {
    let image = std::fs::read(image(site, side, "vm.img")).unwrap();
    let (mut records, mut link) = (Vec::new(), ledger::GENESIS);
    for (number, sector) in (0..).zip(image.as_chunks::<{ ledger::RECORD }>().0) {
        let Some((payload, next)) = ledger::decode(number, Some(link), sector) else {
            break;
        };
        records.push(String::from_utf8(payload.to_vec()).unwrap());
        link = next;
    }
    records
}

/// How often the guest has followed its button.
fn followed(site: &Site, side: Side) -> usize {
    records(site, side).iter().filter(|r| *r == LAST).count()
}

fn start(site: &Site, side: Side) {
    site.run_axvm(side, &["start", "vm"]).unwrap();
    eventually("the guest answers", || answers(site, GUEST));
}

/// A stop under way.
fn stopping(site: &Site, side: Side, timeout: &str) -> Child {
    let mut axvm = site.axvm(side);
    axvm.args(["stop", "vm", "--timeout", timeout]);
    axvm.stdout(Stdio::piped()).stderr(Stdio::piped());
    axvm.spawn().unwrap()
}

/// How often a host has asked the guest.
fn asked(site: &Site, side: Side) -> usize {
    let events = site.run_axvm(side, &["events", "vm", "--this-host"]);
    events.unwrap().matches("asked the guest of vm").count()
}

/// Exit code and all that a stop said.
fn said(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap(), text)
}

/// One guest through every way to be stopped, from either host: not listening, paused, listening, deaf to what
/// it hears, resetting itself.
#[test]
fn a_guest_is_asked_and_stopped_all_the_same() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);

    // It does not listen, or can't: it is not waited for.
    let (code, text, _) = axvm(&site, Side::B, &["stop", "vm"]);
    assert_eq!(code, 0);
    assert!(
        text.contains("does not listen to its power button"),
        "{text}"
    );
    assert_stopped(&site, "vm", "vm.img");
    start(&site, Side::A);
    button(&site, "poweroff");
    site.run_axvm(Side::A, &["pause", "vm"]).unwrap();
    let (code, text, _) = axvm(&site, Side::A, &["stop", "vm"]);
    assert_eq!(code, 0);
    assert!(text.contains("is paused, so it was not asked"), "{text}");

    // It listens: it finishes what it does, records that it did, and switches itself off.
    start(&site, Side::B);
    until_state(&site, Side::B, "vm", "protected");
    button(&site, "poweroff");
    let origin = Origin::In(site.lab.client.net().clone());
    let spec = client::LedgerSpec::new(at(port::LEDGER), "asked");
    let client = client::start(&origin, spec).unwrap();
    client.wait_for_answers(20, PATIENCE).unwrap();
    let (code, text, progress) = axvm(&site, Side::A, &["stop", "vm"]);
    assert_eq!(code, 0, "{text}{progress}");
    assert!(text.contains("the guest switched itself off"), "{text}");
    assert!(progress.contains("asked the guest of vm"), "{progress}");
    assert_stopped(&site, "vm", "vm.img");
    let all = records(&site, Side::A);
    assert_eq!(all.last().map(String::as_str), Some(LAST), "{}", all.len());
    assert!(all.len() > 20);
    start(&site, Side::A);
    let verdict = client.stop().unwrap().verdict;
    let faults = [verdict.lost, verdict.duplicated, verdict.reordered];
    assert_eq!(faults, [0; 3], "{verdict:?}");

    // It hears and does not follow: time is over, and the exit code says so. Another stop meanwhile asks
    // once more and has an end of its own.
    button(&site, "ignore");
    let before = asked(&site, Side::A);
    let patient = stopping(&site, Side::B, "60");
    eventually("it is asked", || asked(&site, Side::A) > before);
    let began = Instant::now();
    let (code, _, why) = axvm(&site, Side::A, &["stop", "vm", "--timeout", "2"]);
    assert_eq!(code, 13, "{why}");
    assert!(
        why.contains("did not switch itself off within 2 s"),
        "{why}"
    );
    assert!(began.elapsed() >= Duration::from_secs(2));
    let (code, text) = said(patient);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("vm is stopped: stopped in order"), "{text}");
    assert_stopped(&site, "vm", "vm.img");

    // It resets itself instead.
    start(&site, Side::B);
    button(&site, "reboot");
    let (code, _, why) = axvm(&site, Side::B, &["stop", "vm", "--timeout", "3"]);
    assert_eq!(code, 13, "{why}");
    assert_stopped(&site, "vm", "vm.img");

    // Not asked at all.
    start(&site, Side::A);
    button(&site, "poweroff");
    append(&site, "kept");
    let (code, text, _) = axvm(&site, Side::A, &["stop", "vm", "--timeout", "0"]);
    assert_eq!((code, text.trim()), (0, "vm is stopped"));
    assert_eq!(records(&site, Side::B).last().unwrap(), "kept");
    assert_eq!(followed(&site, Side::B), 1, "once, when it was asked");
}

/// The primary dies while its guest is asked: it is asked again where it goes on, whichever host the operator
/// is on. The press may have been in the last epoch or not.
#[test]
fn a_guest_whose_host_dies_while_it_is_asked_is_asked_again() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    for (round, remote) in [false, true].into_iter().enumerate() {
        // In an epoch that is committed, since the answer has left.
        button(&site, "ignore");
        let home = site.primary(Side::A, "vm").unwrap().unwrap();
        let operator = if remote { home.other() } else { home };
        let before = asked(&site, home);
        let stop = stopping(&site, operator, "30");
        eventually("it is asked", || asked(&site, home) > before);
        button(&site, "poweroff");
        site.run_axvm(home, &["kill", "vm"]).unwrap();
        let (code, text) = said(stop);
        assert_eq!(code, 0, "{text}\n{}", site.logs());
        assert!(text.contains("the guest switched itself off"), "{text}");
        for side in SIDES {
            until_state(&site, side, "vm", "stopped");
        }
        // The side that was killed has an older copy: it starts where it ended.
        assert_eq!(followed(&site, home.other()), round + 1);
        start(&site, home.other());
        until_state(&site, operator, "vm", "protected");
    }
}
