//! Two axds and their VMs from outside: starts, orders, failures, restarts of axd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ax_api::host::{Code, HostWhat, Reply, Request, State};
use ax_api::process::{Role, What};
use ax_api::vm::Mode;
use common::{LONG, Pair, start, start_known, vm, with_disk};

fn named(name: &str) -> String {
    name.to_owned()
}

fn stop(name: &str, force: bool) -> Request {
    Request::Stop {
        name: name.into(),
        force,
        timeout_s: 60,
    }
}

fn kill(name: &str, host: Option<&str>) -> Request {
    Request::Kill {
        name: name.into(),
        host: host.map(str::to_owned),
    }
}

#[test]
fn an_ft_vm_starts_protected_and_both_hosts_say_so() {
    let pair = Pair::running();
    let wanted = with_disk(vm("web", Mode::Ft, ""), "web.img", Some(1 << 20));
    let replies = pair.a.ask_all(&start(wanted));
    assert!(
        replies
            .iter()
            .any(|r| matches!(r, Reply::Progress { total: Some(_), .. })),
        "no progress was told: {replies:?}"
    );
    for host in [&pair.a, &pair.b] {
        let report = host.show("web");
        assert_eq!(report.state, State::Protected, "{report:?}");
        assert_eq!(report.primary.as_deref(), Some("a"));
        assert_eq!(report.shadow.as_deref(), Some("b"));
        assert!(report.healthy);
        let image = host.dir.join("images/web.img");
        assert_eq!(std::fs::metadata(image).unwrap().len(), 1 << 20);
        assert_eq!(host.vmm_pids().len(), 1);
    }
    // Orders reach the primary from either host.
    for host in [&pair.b, &pair.a] {
        host.done(&Request::Pause { name: named("web") });
        assert_eq!(host.show("web").state, State::Paused);
        let (name, peer_is_dead) = (named("web"), false);
        host.done(&Request::Resume { name, peer_is_dead });
        assert_eq!(host.show("web").state, State::Protected);
    }
    // It runs: not again, not on the other host, and its definition is fixed.
    for host in [&pair.a, &pair.b] {
        assert_eq!(host.fails(&start_known("web")).0, Code::State);
        assert_eq!(
            host.fails(&Request::Undefine { name: named("web") }).0,
            Code::State
        );
    }
    // Stopped from the host that does not run it.
    pair.b.done(&stop("web", false));
    for host in [&pair.a, &pair.b] {
        host.until("web", State::Stopped);
        host.assert_clean("web");
    }
    // And started again, there.
    pair.b.done(&start_known("web"));
    assert_eq!(pair.a.show("web").primary.as_deref(), Some("b"));
    pair.b.done(&stop("web", true));
    pair.b.done(&Request::Undefine { name: named("web") });
    for host in [&pair.a, &pair.b] {
        host.assert_clean("web");
        assert!(host.list().is_empty());
        assert!(host.dir.join("images/web.img").exists(), "images stay");
    }
}

#[test]
fn a_killed_primary_is_taken_over_and_the_vm_runs_alone() {
    let pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    pair.b.done(&kill("web", None));
    let report = pair.b.until("web", State::Degraded);
    assert_eq!(report.primary.as_deref(), Some("b"));
    assert!(!report.healthy, "alone is not healthy");
    pair.a.until("web", State::Degraded);
    // Rule 24: b had a's axd confirm that the old process is gone, and told the new primary.
    let deadline = Instant::now() + LONG;
    while !pair.b.events().iter().any(|e| {
        matches!(&e.what, HostWhat::Process { event: What::Note { text }, .. } if text.starts_with("peer gone"))
    }) {
        assert!(Instant::now() < deadline, "{:?}", pair.b.events());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(pair.a.vmm_pids().is_empty());
    pair.a.done(&stop("web", false));
    pair.b.assert_clean("web");
}

#[test]
fn a_killed_shadow_leaves_the_primary_alone() {
    let pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    assert_eq!(pair.a.fails(&kill("web", Some("c"))).0, Code::Usage);
    pair.a.done(&kill("web", Some("b")));
    let report = pair.a.until("web", State::Degraded);
    assert_eq!(report.primary.as_deref(), Some("a"));
    assert!(pair.b.vmm_pids().is_empty());
    // With both gone it is missed, on either host, until it is stopped on purpose or started anew.
    pair.a.done(&kill("web", None));
    for host in [&pair.a, &pair.b] {
        let report = host.until("web", State::Failed);
        assert!(
            !report.healthy && report.note.contains("without being stopped"),
            "{report:?}"
        );
    }
    pair.b.done(&start_known("web"));
    pair.a.done(&stop("web", false));
    for host in [&pair.a, &pair.b] {
        assert!(
            host.until("web", State::Stopped).healthy,
            "on {}",
            host.name
        );
    }
}

#[test]
fn a_planned_failover_swaps_the_roles() {
    let pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    pair.b.done(&Request::Failover { name: named("web") });
    let report = pair.a.until("web", State::Protected);
    assert_eq!(report.primary.as_deref(), Some("b"));
    assert_eq!(report.shadow.as_deref(), Some("a"));
}

#[test]
fn axds_die_and_come_back_without_disturbing_a_guest() {
    let mut pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    let before = (pair.a.vmm_pids(), pair.b.vmm_pids());
    pair.a.kill();
    // The other host still knows what it knows.
    assert_eq!(pair.b.show("web").shadow.as_deref(), Some("b"));
    pair.b.kill();
    pair.a.start();
    pair.b.start();
    assert_eq!((pair.a.vmm_pids(), pair.b.vmm_pids()), before);
    let report = pair.a.until("web", State::Protected);
    assert_eq!(report.processes.len(), 2);
    // It is watched again: its end is noticed, its events go on without a repetition.
    pair.a.done(&kill("web", None));
    pair.b.until("web", State::Degraded);
    for host in [&pair.a, &pair.b] {
        let mut seen: Vec<_> = host
            .events()
            .into_iter()
            .filter_map(|e| match e.what {
                HostWhat::Process {
                    incarnation, seq, ..
                } => Some((incarnation, seq)),
                _ => None,
            })
            .collect();
        let all = seen.len();
        seen.dedup();
        assert_eq!(seen.len(), all);
    }
}

#[test]
fn both_axds_dead_the_guest_fails_over_all_the_same() {
    let mut pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    pair.a.kill();
    pair.b.kill();
    let primary = nix::unistd::Pid::from_raw(pair.a.vmm_pids()[0]);
    nix::sys::signal::kill(primary, nix::sys::signal::Signal::SIGKILL).unwrap();
    pair.b.start();
    let report = pair.b.until("web", State::Degraded);
    assert_eq!(report.primary.as_deref(), Some("b"));
    pair.a.start();
    pair.a.until("web", State::Degraded);
}

/// Whatever fails in a start, the error names side and cause, and nothing is left on either host.
#[test]
fn a_failed_start_leaves_nothing_behind() {
    let pair = Pair::running();
    let cases: &[(&str, Code, &[&str])] = &[
        ("fail-boot=3", Code::NotHere, &["a:", "as told"]),
        ("fail-boot=6", Code::Memory, &["a:", "as told"]),
        ("fail-boot=5", Code::Network, &["a:", "as told"]),
        ("fail-boot=8", Code::Arbiter, &["a:", "as told"]),
        ("fail-shadow=4", Code::Image, &["b:", "as told"]),
        ("fail-shadow=7", Code::Network, &["b:", "as told"]),
        ("fail-boot=1 fail-shadow=4", Code::Failed, &["a:"]),
        ("never-protect", Code::Peer, &["a:", "without its shadow"]),
        ("hold", Code::Arbiter, &["a:", "witness w"]),
    ];
    for (quirks, code, words) in cases {
        let wanted = with_disk(vm("web", Mode::Ft, quirks), "web.img", Some(1 << 20));
        let (found, why) = pair.a.fails(&start(wanted));
        assert_eq!(found, *code, "{quirks}: {why}");
        for word in *words {
            assert!(why.contains(word), "{quirks}: {why:?} lacks {word:?}");
        }
        for host in [&pair.a, &pair.b] {
            host.assert_clean("web");
            assert!(
                !host.dir.join("images/web.img").exists(),
                "{quirks}: an image is left"
            );
        }
        assert!(pair.a.list().is_empty(), "{quirks}: a definition is left");
    }
}

/// The primary refuses a shadow until it is granted to run; that grant may come right after.
#[test]
fn a_primary_that_was_asked_too_early_is_asked_again() {
    let pair = Pair::running();
    pair.a.ask_all(&start(vm("web", Mode::Ft, "late-grant")));
    assert_eq!(pair.a.show("web").state, State::Protected);
}

#[test]
fn a_failed_start_of_a_known_vm_keeps_its_definition_and_images() {
    let pair = Pair::running();
    let wanted = with_disk(
        vm("web", Mode::Ft, "fail-shadow=4"),
        "web.img",
        Some(1 << 20),
    );
    match pair.a.ask(&Request::Define {
        vm: Box::new(wanted),
    }) {
        Reply::Vm { vm } => assert_eq!(vm.state, State::Stopped),
        other => panic!("{other:?}"),
    }
    std::fs::create_dir_all(pair.b.dir.join("images")).unwrap();
    let precious = pair.b.dir.join("images/web.img");
    std::fs::write(&precious, vec![7; 1 << 20]).unwrap();
    assert_eq!(pair.a.fails(&start_known("web")).0, Code::Image);
    assert_eq!(std::fs::read(&precious).unwrap(), vec![7; 1 << 20]);
    assert_eq!(pair.b.show("web").vm.disks.len(), 1);
    for host in [&pair.a, &pair.b] {
        host.assert_clean("web");
    }
}

#[test]
fn the_peers_image_of_another_size_is_refused_by_name() {
    let pair = Pair::running();
    std::fs::create_dir_all(pair.b.dir.join("images")).unwrap();
    std::fs::write(pair.b.dir.join("images/web.img"), [0; 512]).unwrap();
    let wanted = with_disk(vm("web", Mode::Ft, ""), "web.img", Some(1 << 20));
    let (code, why) = pair.a.fails(&start(wanted));
    assert_eq!(code, Code::Image);
    assert!(
        why.contains("b:") && why.contains("web.img") && why.contains("512 bytes"),
        "{why}"
    );
    pair.a.assert_clean("web");
    assert_eq!(
        std::fs::metadata(pair.b.dir.join("images/web.img"))
            .unwrap()
            .len(),
        512
    );
}

#[test]
fn without_its_peer_an_ft_vm_starts_only_when_told_to_run_alone() {
    let mut pair = Pair::new();
    pair.a.start();
    let (code, why) = pair.a.fails(&start(vm("web", Mode::Ft, "")));
    assert_eq!(code, Code::Peer);
    assert!(
        why.contains("host b") && why.contains("--alone-ok"),
        "{why}"
    );
    pair.a.assert_clean("web");
    assert!(pair.a.list().is_empty());
    let request = Request::Start {
        name: named("web"),
        define: Some(Box::new(vm("web", Mode::Ft, ""))),
        wait: true,
        alone_ok: true,
        accept_loss: false,
    };
    pair.a.done(&request);
    assert_eq!(pair.a.show("web").state, State::Degraded);
    // The definition reaches the other host when it comes.
    pair.b.start();
    let deadline = Instant::now() + LONG;
    while pair.b.list().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(pair.b.show("web").primary.as_deref(), Some("a"));
}

#[test]
fn a_local_vm_needs_no_peer() {
    let mut pair = Pair::new();
    pair.a.start();
    pair.a.done(&start(vm("web", Mode::None, "")));
    assert_eq!(pair.a.show("web").state, State::Unprotected);
    pair.a.done(&stop("web", false));
    pair.a.assert_clean("web");
    for mode in [Mode::Ft, Mode::Ha] {
        assert_eq!(pair.a.fails(&start(vm("other", mode, ""))).0, Code::Peer);
    }
    assert_eq!(pair.a.fails(&start_known("nobody")).0, Code::NoSuchVm);
    assert_eq!(pair.a.fails(&stop("nobody", false)).0, Code::NoSuchVm);
    // It does not run here; whether it does on b nobody can say.
    assert_eq!(pair.a.fails(&stop("web", false)).0, Code::Peer);
    assert_eq!(pair.a.show("web").state, State::Unknown);
    pair.b.start();
    // b need not have heard of it for that.
    assert_eq!(pair.a.fails(&stop("web", false)).0, Code::State);
    assert_eq!(pair.a.show("web").state, State::Stopped);
}

#[test]
fn the_console_is_raw_from_either_host_and_keeps_its_offset() {
    let pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    let mut expected = 0;
    for host in [&pair.a, &pair.b] {
        let mut stream = UnixStream::connect(host.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let request = Request::Console {
            name: named("web"),
            from: Some(expected),
        };
        let line = serde_json::to_string(&request).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut from = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        match serde_json::from_str(&line).unwrap() {
            Reply::Console { offset } => assert_eq!(offset, expected),
            other => panic!("{other:?}"),
        }
        let sent: Vec<u8> = (0..=255).cycle().take(5000).collect();
        stream.write_all(&sent).unwrap();
        let mut got = vec![0; sent.len()];
        from.read_exact(&mut got).unwrap();
        assert_eq!(got, sent, "on {}", host.name);
        expected += sent.len() as u64;
    }
}

#[test]
fn autostart_starts_what_runs_nowhere_but_not_what_was_stopped() {
    let mut pair = Pair::running();
    pair.a.done(&start(vm("auto", Mode::None, "")));
    pair.a.done(&start(vm("plain", Mode::None, "")));
    for name in ["auto", "plain"] {
        let (name, on) = (named(name), name == "auto");
        pair.a.done(&Request::Autostart { name, on });
    }
    // A crash of both: only the marked one comes back.
    for pid in pair.a.vmm_pids() {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    pair.a.until("auto", State::Failed);
    pair.a.until("plain", State::Failed);
    assert!(
        !pair.a.show("auto").healthy,
        "an autostart VM that is down is not healthy"
    );
    pair.a.kill();
    pair.a.start();
    pair.a.until("auto", State::Unprotected);
    assert_eq!(pair.a.show("plain").state, State::Failed);
    // Stopped on purpose, it stays so.
    pair.a.done(&stop("auto", false));
    pair.a.kill();
    pair.a.start();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(pair.a.show("auto").state, State::Stopped);
}

/// Asks for a start and goes away before the answer.
fn start_and_leave(pair: &Pair, quirks: &str) {
    let mut stream = UnixStream::connect(pair.a.socket()).unwrap();
    let line = serde_json::to_string(&start(vm("web", Mode::Ft, quirks))).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[test]
fn a_start_cut_short_by_axds_death_is_ended_by_the_next_if_no_guest_runs() {
    let mut pair = Pair::running();
    start_and_leave(&pair, "hold");
    pair.a.until_known("web");
    pair.a.until("web", State::Held);
    pair.a.kill();
    pair.a.start();
    pair.a.assert_clean("web");
    assert!(pair.a.notes().iter().any(|n| n.contains("cut short")));
    // The other side of it, likewise.
    pair.b.kill();
    pair.b.start();
    pair.b.assert_clean("web");
}

#[test]
fn a_start_that_axd_did_not_see_through_goes_on_without_it() {
    let mut pair = Pair::running();
    start_and_leave(&pair, "slow-sync");
    pair.a.until_known("web");
    pair.a.until("web", State::Syncing);
    let before = (pair.a.vmm_pids(), pair.b.vmm_pids());
    pair.a.kill();
    pair.a.start();
    pair.a.until("web", State::Protected);
    assert_eq!((pair.a.vmm_pids(), pair.b.vmm_pids()), before);
}

#[test]
fn a_user_who_goes_away_does_not_end_what_was_asked_for() {
    let pair = Pair::running();
    start_and_leave(&pair, "");
    pair.a.until_known("web");
    pair.a.until("web", State::Protected);
}

#[test]
fn a_vm_too_large_for_its_host_is_refused_before_anything_runs() {
    let pair = Pair::running();
    let mut wanted = vm("big", Mode::Ft, "");
    wanted.memory = ax_api::units::Bytes(1 << 40);
    let (code, why) = pair.a.fails(&start(wanted));
    assert_eq!(code, Code::Memory, "{why}");
    assert!(why.contains("1048576 MiB wanted"), "{why}");
    for host in [&pair.a, &pair.b] {
        host.assert_clean("big");
        assert!(host.list().is_empty());
    }
}

#[test]
fn events_are_followed_on_both_hosts() {
    let pair = Pair::running();
    let mut stream = UnixStream::connect(pair.a.socket()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let request = Request::Events {
        vm: Some(named("web")),
        follow: true,
        both_hosts: true,
    };
    let line = serde_json::to_string(&request).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    pair.a.done(&start(vm("other", Mode::None, "")));
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    let mut seen = std::collections::BTreeSet::new();
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line.unwrap()).unwrap() {
            Reply::Event { event } => {
                assert_eq!(event.vm.as_deref(), Some("web"));
                seen.insert(event.host);
            }
            other => panic!("{other:?}"),
        }
        if seen.len() == 2 {
            return;
        }
    }
    panic!("it ended after {seen:?}");
}

#[test]
fn an_orderly_end_of_axd_leaves_its_guests() {
    let mut pair = Pair::running();
    pair.a.done(&start(vm("web", Mode::None, "")));
    let before = pair.a.vmm_pids();
    let mut axd = pair.a.axd.take().unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(axd.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(axd.wait().unwrap().success());
    assert!(!pair.a.socket().exists());
    assert_eq!(pair.a.vmm_pids(), before);
    pair.a.start();
    assert_eq!(pair.a.show("web").state, State::Unprotected);
}

#[test]
fn a_plain_pair_works_without_keys() {
    let mut pair = Pair::with("security = \"plain\"");
    pair.a.start();
    pair.b.start();
    pair.a.done(&start(vm("web", Mode::Ft, "")));
    let report = pair.b.show("web");
    assert_eq!(report.state, State::Protected);
    let shadow = report.processes.iter().find(|p| p.host == "b").unwrap();
    assert_eq!(shadow.status.as_ref().unwrap().role, Role::Shadow);
    assert!(!pair.a.dir.join("identity").exists());
    drop(pair);
}

#[test]
fn garbage_on_the_control_socket_is_answered_and_survived() {
    let mut pair = Pair::new();
    pair.a.start();
    for garbage in [
        &b"\n"[..],
        b"{}\n",
        b"\xff\xfe\n",
        b"{\"do\":\"no-such\"}\n",
    ] {
        let mut stream = UnixStream::connect(pair.a.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(garbage).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        match serde_json::from_str(&line).unwrap() {
            Reply::Failed { code, .. } => assert_eq!(code, Code::Usage),
            other => panic!("{other:?}"),
        }
    }
    let mut stream = UnixStream::connect(pair.a.socket()).unwrap();
    let long = vec![b'x'; 2 << 20];
    // It stops listening before the end of it.
    let _ = stream.write_all(&long);
    drop(stream);
    assert!(pair.a.list().is_empty());
}
