use std::path::PathBuf;

use ax_wire::{Generation, Incarnation, PairId};

use super::*;
use crate::process::{Event, Phase, Role, Status};

fn vm(mode: Mode) -> Vm {
    Vm {
        name: "web".into(),
        pair: PairId([7; 16]),
        mode,
        memory: 256 << 20,
        cpus: 1,
        boot: Boot::Probe {
            cmdline: String::new(),
        },
        disks: vec![],
        nics: vec![],
        autostart: false,
        dirty: DirtySource::Auto,
        verify_every: None,
        preferred: None,
    }
}

fn process(host: &str, role: Role, phase: Phase, generation: u64) -> ProcessReport {
    ProcessReport {
        host: host.into(),
        name: "web".into(),
        pair: PairId([7; 16]).to_string(),
        pid: 42,
        why_unprotected: None,
        status: Some(Status {
            name: "web".into(),
            pid: 42,
            wire: 1,
            incarnation: Incarnation(9),
            role,
            phase,
            warning: None,
            disk_fails: None,
            disk_holds: false,
            arbiter: String::new(),
            sync_left_s: None,
            mode: Mode::Ft,
            generation: Generation(generation),
            listen: vec![],
            epoch: 1,
            epochs_per_second: 0.0,
            pause_us: [0; 2],
            pause_parts_us: Default::default(),
            disk_sync: Default::default(),
            commit_us: [0; 2],
            ship_us: [0; 2],
            pages: [0; 2],
            link_bytes_per_second: 0,
            oldest_held_us: 0,
            paths: Vec::new(),
        }),
    }
}

/// Rule 19: held while a request waits, and said whatever the state.
#[test]
fn a_guest_whose_disk_fails_says_so_and_is_held_only_if_it_waits() {
    for (phase, holds, state) in [
        (Phase::Unprotected, true, State::Held),
        (Phase::Alone, true, State::Held),
        (Phase::Alone, false, State::Degraded),
        // It leaves at once, or the arbiter is away.
        (Phase::Protected, true, State::Held),
        (Phase::Protected, false, State::Protected),
    ] {
        let mut process = process("a", Role::Primary, phase, 2);
        if let Some(status) = &mut process.status {
            status.disk_fails = Some("/d/vm.img: No space left".into());
            status.disk_holds = holds;
        }
        let report = VmReport::sum_up(vm(Mode::Ft), vec![process], None);
        assert_eq!(report.state, state);
        assert!(report.note.contains("/d/vm.img: No space left"));
    }
}

#[test]
fn a_protected_pair_is_healthy_and_names_both_hosts() {
    let report = VmReport::sum_up(
        vm(Mode::Ft),
        vec![
            process("a", Role::Primary, Phase::Protected, 2),
            process("b", Role::Shadow, Phase::Protected, 2),
        ],
        None,
    );
    assert_eq!(report.state, State::Protected);
    assert!(report.healthy);
    assert_eq!(report.primary.as_deref(), Some("a"));
    assert_eq!(report.shadow.as_deref(), Some("b"));
}

#[test]
fn of_two_primaries_the_newer_generation_counts() {
    let report = VmReport::sum_up(
        vm(Mode::Ft),
        vec![
            process("a", Role::Primary, Phase::Protected, 2),
            process("b", Role::Primary, Phase::Alone, 3),
        ],
        None,
    );
    assert_eq!(report.state, State::Degraded);
    assert_eq!(report.primary.as_deref(), Some("b"));
    assert!(!report.healthy);
}

#[test]
fn what_cannot_be_known_is_not_called_stopped() {
    let report = VmReport::sum_up(vm(Mode::Ft), vec![], Some("b"));
    assert_eq!(report.state, State::Unknown);
    assert!(!report.healthy && report.note.contains('b'));
    assert_eq!(
        VmReport::sum_up(vm(Mode::Ft), vec![], None).state,
        State::Stopped
    );

    let mut silent = process("a", Role::Primary, Phase::Alone, 1);
    silent.status = None;
    let report = VmReport::sum_up(vm(Mode::Ft), vec![silent], None);
    assert_eq!(report.state, State::Unknown);
}

#[test]
fn a_held_vm_says_whom_it_waits_for() {
    let held = Phase::Held {
        waits_for: "witness w".into(),
    };
    let report = VmReport::sum_up(
        vm(Mode::Ft),
        vec![process("b", Role::Shadow, held, 1)],
        Some("a"),
    );
    assert_eq!(report.state, State::Held);
    assert!(report.note.contains("witness w"));
    assert!(!report.healthy);
}

#[test]
fn an_autostart_vm_that_is_stopped_is_not_healthy() {
    let mut vm = vm(Mode::None);
    assert!(VmReport::sum_up(vm.clone(), vec![], None).healthy);
    vm.autostart = true;
    assert!(!VmReport::sum_up(vm, vec![], None).healthy);
}

#[test]
fn requests_and_replies_travel_as_one_line() {
    let requests = [
        Request::List,
        Request::Start {
            name: "web".into(),
            define: Some(Box::new(NewVm {
                name: "web".into(),
                mode: Mode::Ft,
                memory: Bytes(256 << 20),
                cpus: 2,
                boot: Boot::Probe {
                    cmdline: "ip=10.0.0.1/24".into(),
                },
                disks: vec![NewDisk {
                    path: PathBuf::from("/d"),
                    size: Some(Bytes(1 << 30)),
                    read_only: false,
                    secondary: Secondary::Sync,
                    on_error: OnError::Report,
                }],
                nics: vec![NewNic {
                    tap: "tap0".into(),
                    mac: Some(Mac([0x52, 0x54, 0, 1, 2, 3])),
                    offload: Some(true),
                }],
                autostart: false,
                dirty: DirtySource::Ring,
                verify_every: Some(8),
                preferred: None,
            })),
            wait: true,
            alone_ok: false,
            accept_loss: false,
        },
    ];
    for request in requests {
        let line = serde_json::to_string(&request).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        let forward = PeerRequest::Forward { request };
        let line = serde_json::to_string(&forward).unwrap();
        assert_eq!(serde_json::from_str::<PeerRequest>(&line).unwrap(), forward);
    }
    assert!(serde_json::from_str::<Request>(r#"{"do":"stop","name":"x"}"#).is_err());
    assert!(serde_json::from_str::<Request>(r#"{"do":"show","name":"x","y":1}"#).is_err());
}

#[test]
fn the_newer_definition_wins_and_a_tie_has_one_winner() {
    let d = |change, by: &str| Definition {
        name: "web".into(),
        change,
        by: by.into(),
        vm: None,
    };
    assert!(d(2, "a").newer_than(&d(1, "b")));
    assert!(d(2, "b").newer_than(&d(2, "a")));
    assert!(!d(2, "a").newer_than(&d(2, "b")));
    assert!(!d(2, "a").newer_than(&d(2, "a")));
}

/// In an upgrade: a process or host of the build after this one tells of things that this one has no word
/// for, and must not be taken for one that does not answer.
#[test]
fn what_a_later_build_says_is_passed_over() {
    let read = |text: &str| serde_json::from_str::<HostEvent>(text).unwrap().what;
    let host = r#"{"at_ms":1,"host":"a","vm":"web","what":{"kind":"dreamt","of":["sheep"]}}"#;
    assert_eq!(read(host), HostWhat::Other);
    let event = r#"{"seq":7,"at_ms":1,"what":{"what":"dreamt","of":["sheep"]}}"#;
    let event: Event = serde_json::from_str(event).unwrap();
    assert_eq!((event.seq, event.what), (7, What::Other));

    let known = process("a", Role::Primary, Phase::Protected, 3);
    let mut later = serde_json::to_value(&known).unwrap();
    later["status"]["phase"] = serde_json::json!({"is": "dreaming", "of": "sheep"});
    later["status"]["dreams"] = 4.into();
    // What a build of wire version 1 does not say of itself.
    later["status"].as_object_mut().unwrap().remove("wire");
    let read: ProcessReport = serde_json::from_value(later).unwrap();
    let status = read.status.unwrap();
    assert_eq!((status.phase, status.wire), (Phase::Other, 1));
}
