//! Mode `ha`: restarted, with every record that was acknowledged, and never run twice (rule 28).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::talk::{
    SIDES, Talk, answers, append, assert_stopped, axvm, read, state, text, until_state,
    vm_processes,
};
use common::{Clients, GUEST, PATIENCE, QUIET, alone, eventually, patient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use probe_guest::port;
use testkit::fault::{Action, Order, Point};
use testkit::net::addr;
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_fail_points, require_kvm, require_lab};

/// A site on whose host a the VM `vm` runs in this mode.
fn running(spec: SiteSpec, mode: &str) -> Site {
    let site = Site::new(spec).unwrap();
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let mut args = vec!["start", "vm", "--mode", mode, "--probe"];
    args.extend(["--memory", "128M", "--disk", "vm.img,size=64M"]);
    args.extend(["--net", "tap=axtap0", "--cmdline", &cmdline]);
    let started = site.run_axvm(Side::A, &args);
    started.unwrap_or_else(|e| panic!("{e}\n{}", site.logs()));
    site
}

fn until_answering(site: &Site) -> Duration {
    let since = Instant::now();
    while !answers(site, GUEST) {
        assert!(since.elapsed() < PATIENCE, "{}", site.logs());
    }
    since.elapsed()
}

fn runs_on(site: &Site, ask: Side) -> Option<Side> {
    site.primary(ask, "vm").ok().flatten()
}

#[test]
fn a_guest_whose_host_dies_is_started_on_the_other_with_every_acknowledged_record() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = running(patient(), "ha");
    for side in SIDES {
        assert_eq!(state(&site, side, "vm"), "protected");
    }
    let mut kept = vec![];
    for (round, victim) in SIDES.into_iter().enumerate() {
        for n in 0..20 {
            let record = format!("{round}-{n}");
            kept.push((append(&site, &record), record));
        }
        site.host(victim).kill_all().unwrap();
        println!("answers again after {:?}", until_answering(&site));
        assert_eq!(runs_on(&site, victim.other()), Some(victim.other()));
        for (number, record) in &kept {
            assert_eq!(&read(&site, number), record);
        }
        site.host(victim).power_on().unwrap();
        site.start_axd(victim).unwrap();
        for side in SIDES {
            until_state(&site, side, "vm", "protected");
        }
    }
    site.run_axvm(Side::A, &["stop", "vm"]).unwrap();
    assert_stopped(&site, "vm", "vm.img");
    site.run_axvm(Side::B, &["start", "vm"]).unwrap();
    for (number, record) in &kept {
        assert_eq!(&read(&site, number), record);
    }
}

/// Rule 19: a FLUSH that failed here was not answered, and the other host has every one that was.
#[test]
fn a_guest_whose_disk_fails_is_started_on_the_other_host_with_every_acknowledged_record() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let site = running(patient(), "ha");
    let number = |n: u32| (append(&site, &format!("record-{n}")), format!("record-{n}"));
    let kept: Vec<(String, String)> = (0..20).map(number).collect();
    let all_kept = || {
        for (number, record) in &kept {
            assert_eq!(&read(&site, number), record);
        }
    };
    let points = [Point::ImageRead, Point::ImageWrite, Point::ImageSync];
    let orders = points.map(|point| Order::new(point, Action::Fail).always());
    site.order(Side::A, &orders).unwrap();
    let mut late = Talk::open(&site, GUEST, port::LEDGER, PATIENCE).unwrap();
    late.patience(Duration::from_secs(1));
    // Its process hears of the order a moment later.
    while late.ask("APPEND late").is_ok() {}
    let since = Instant::now();
    while runs_on(&site, Side::B) != Some(Side::B) {
        assert!(since.elapsed() < PATIENCE, "{}", site.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
    until_answering(&site);
    all_kept();
    let told = site.told(Side::A, "vm", "disk-fails").unwrap();
    let why = told.last().map(|told| text(&told["why"])).unwrap();
    assert!(
        why.contains("vm.img") && why.contains("Input/output"),
        "{why}"
    );
    site.order(Side::A, &[]).unwrap();
    for side in SIDES {
        until_state(&site, side, "vm", "protected");
    }
    // What came back is a copy to go on from.
    site.host(Side::B).kill_all().unwrap();
    until_answering(&site);
    assert_eq!(runs_on(&site, Side::A), Some(Side::A));
    all_kept();
}

/// Outputs do not wait for anybody: it costs what it costs in mode none.
#[test]
fn a_process_that_dies_is_started_where_it_was_until_that_is_too_often() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = running(patient(), "ha");
    let kept = append(&site, "kept");
    for _ in 0..2 {
        site.run_axvm(Side::A, &["kill", "vm", "--host", "a"])
            .unwrap();
        until_answering(&site);
        assert_eq!(runs_on(&site, Side::A), Some(Side::A));
        assert_eq!(read(&site, &kept), "kept");
        until_state(&site, Side::A, "vm", "protected");
    }
    // The third time it is the other host's turn, and this one takes no part any more.
    site.run_axvm(Side::A, &["kill", "vm", "--host", "a"])
        .unwrap();
    until_answering(&site);
    assert_eq!(runs_on(&site, Side::B), Some(Side::B));
    assert_eq!(read(&site, &kept), "kept");
    eventually("b says why it has nobody to fall back to", || {
        let shown = site.show(Side::B, "vm").unwrap();
        text(&shown["note"]).contains("ended too often")
    });
    for _ in 0..2 {
        site.run_axvm(Side::B, &["kill", "vm"]).unwrap();
        until_answering(&site);
    }
    site.run_axvm(Side::B, &["kill", "vm"]).unwrap();
    until_state(&site, Side::B, "vm", "failed");
    std::thread::sleep(Duration::from_secs(2));
    let shown = site.show(Side::B, "vm").unwrap();
    assert_eq!(text(&shown["state"]), "failed");
    assert!(text(&shown["note"]).contains("3 times"), "{shown}");
    assert_eq!(shown["healthy"], false);
    // An operator's start is a new beginning.
    site.run_axvm(Side::B, &["start", "vm", "--alone-ok"])
        .unwrap();
    assert_eq!(read(&site, &kept), "kept");
}

/// I3: a host that stands still is taken over from, and shows nothing when it goes on.
#[test]
fn a_host_that_stands_still_shows_nothing_once_the_other_has_started_the_guest() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = running(patient().without_reprotection(), "ha");
    append(&site, "kept");
    let [(old, _)] = &vm_processes(&site, Side::A)[..] else {
        panic!("one process on a");
    };
    let old = Pid::from_raw(*old as i32);
    kill(old, Signal::SIGSTOP).unwrap();
    until_answering(&site);
    assert_eq!(runs_on(&site, Side::B), Some(Side::B));
    let clients = Clients::start(&site);
    // axd there is asked to end it, and does; if it could not, it would end by itself.
    let _ = kill(old, Signal::SIGCONT);
    clients.go_on(100);
    eventually("the old one is gone", || {
        vm_processes(&site, Side::A).is_empty()
    });
    clients.go_on(100);
    clients.are_content();
}

#[test]
fn cut_off_from_each_other_one_goes_on_and_without_an_arbiter_none_does() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let spec = SiteSpec::default().without_reprotection();
    let mut site = running(spec, "ha");
    // The witness alone is not missed.
    site.witness().unwrap().kill().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let kept = append(&site, "kept");
    let clients = Clients::start(&site);
    site.lab.links[0].silence_both().unwrap();
    std::thread::sleep(QUIET);
    let before = clients.answers();
    std::thread::sleep(QUIET);
    assert_eq!(clients.answers(), before, "an output without a lease");
    drop(clients);
    assert_eq!(state(&site, Side::A, "vm"), "held");
    site.start_witness().unwrap();
    // Whichever the arbiter hears first: the guest goes on there, or is started anew here.
    until_answering(&site);
    assert_eq!(read(&site, &kept), "kept");
    eventually("one process is left", || {
        let left = SIDES.map(|side| vm_processes(&site, side).len());
        left.iter().sum::<usize>() == 1
    });
    assert_eq!(read(&site, &kept), "kept");
}

#[test]
fn every_change_between_the_three_modes_is_made_while_it_runs() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = running(patient(), "none");
    let clients = Clients::start(&site);
    let shown = |mode| match mode {
        "none" => "unprotected",
        _ => "protected",
    };
    for mode in ["ha", "none", "ft", "ha", "ft", "none"] {
        site.run_axvm(Side::A, &["set-mode", "vm", mode]).unwrap();
        for side in SIDES {
            assert_eq!(state(&site, side, "vm"), shown(mode), "{mode}");
        }
        clients.go_on(50);
    }
    site.run_axvm(Side::A, &["set-mode", "vm", "ha"]).unwrap();
    let (code, _, why) = axvm(&site, Side::A, &["failover", "vm"]);
    assert_eq!(code, 7, "{why}");
    assert!(why.contains("mode ha"), "{why}");
    clients.go_on(50);
    clients.are_content();
}

/// The restart cannot fail for lack of memory: what it needs there is nobody else's.
#[test]
fn the_other_host_keeps_room_for_the_restart() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"));
    let kib: u64 = line
        .and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        .unwrap();
    let most = format!("{}M", kib / 1024 * 6 / 10);
    let site = Site::new(patient()).unwrap();
    let start = |side, name, mode, memory: &str| {
        let args = ["start", name, "--mode", mode, "--probe", "--memory", memory];
        axvm(&site, side, &args)
    };
    let (code, _, why) = start(Side::A, "large", "ha", &most);
    assert_eq!(code, 0, "{why}");
    let (code, _, why) = start(Side::B, "another", "none", &most);
    assert_eq!(code, 11, "{why}");
    assert!(why.contains("memory"), "{why}");
    site.run_axvm(Side::A, &["stop", "large"]).unwrap();
    let (code, _, why) = start(Side::B, "another", "none", &most);
    assert_eq!(code, 0, "{why}");
}
