//! `axvm` from outside, against a scripted axd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use ax_api::host::{Code, PeerReport, Reply, Request, State, VmReport};
use ax_api::trace::{EpochRecord, Origin, TraceReport};
use ax_api::vm::{Boot, DirtySource, Mode, Vm};

/// An axd that answers each connection with the next lines of its script, and tells what was asked.
struct Scripted {
    dir: tempfile::TempDir,
    asked: Receiver<Request>,
}

impl Scripted {
    fn new(script: Vec<Vec<Reply>>) -> Scripted {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (tell, asked) = channel();
        std::thread::spawn(move || {
            for replies in script {
                let (mut stream, _) = listener.accept().unwrap();
                let request = read_request(&stream);
                tell.send(request).unwrap();
                for reply in &replies {
                    let line = serde_json::to_string(reply).unwrap();
                    // Whoever leaves early has seen enough.
                    let _ = writeln!(stream, "{line}");
                }
            }
        });
        Scripted { dir, asked }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn axvm(&self, args: &[&str]) -> (i32, String, String) {
        told(&axvm(args).env("AX_SOCKET", self.socket()).output().unwrap())
    }

    fn asked(&self) -> Request {
        self.asked.recv().unwrap()
    }
}

fn read_request(stream: &UnixStream) -> Request {
    let mut line = String::new();
    BufReader::new(stream.try_clone().unwrap())
        .read_line(&mut line)
        .unwrap();
    serde_json::from_str(&line).unwrap()
}

fn axvm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_axvm"));
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("AX_SOCKET")
        .env_remove("COLUMNS");
    command
}

fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

fn done(text: &str) -> Vec<Reply> {
    vec![Reply::Done { text: text.into() }]
}

fn report(name: &str, state: State, healthy: bool) -> VmReport {
    VmReport {
        arbiter: String::new(),
        vm: Vm {
            name: name.into(),
            pair: ax_wire::PairId([1; 16]),
            mode: Mode::Ft,
            memory: 256 << 20,
            cpus: 2,
            boot: Boot::Probe {
                cmdline: "ip=10.0.0.5/24".into(),
            },
            disks: vec![],
            nics: vec![],
            autostart: false,
            dirty: DirtySource::Auto,
            verify_every: None,
            preferred: None,
        },
        state,
        healthy,
        note: if healthy { "" } else { "runs without a shadow" }.into(),
        primary: Some("alpha".into()),
        shadow: healthy.then(|| "beta".into()),
        processes: vec![],
    }
}

fn list(vms: Vec<VmReport>) -> Vec<Reply> {
    let peer = PeerReport {
        host: "beta".into(),
        reachable: false,
        why: "host beta does not answer: no route".into(),
    };
    let peer = Some(peer);
    vec![Reply::Vms { vms, peer }]
}

/// The help is part of the interface. To accept a change: AX_UPDATE=1 cargo test -p axvm
#[test]
fn the_help_is_as_it_was() {
    for (name, args) in [
        ("help.txt", &["--help"][..]),
        ("start-help.txt", &["start", "--help"]),
        ("stop-help.txt", &["stop", "--help"]),
        ("stats-help.txt", &["stats", "--help"]),
        ("trace-help.txt", &["trace", "--help"]),
    ] {
        let (code, text, _) = told(&axvm(args).output().unwrap());
        assert_eq!(code, 0);
        let path = format!("{}/tests/{name}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("AX_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, expected, "{path} differs; see the test's comment");
    }
}

#[test]
fn every_failure_has_its_exit_code() {
    use Code::*;
    let codes = [
        (Failed, 1),
        (Usage, 2),
        (NotHere, 3),
        (Unprotected, 4),
        (NoSuchVm, 5),
        (NoAxd, 6),
        (State, 7),
        (Peer, 8),
        (Image, 9),
        (Network, 10),
        (Memory, 11),
        (Arbiter, 12),
        (Forced, 13),
    ];
    let fails = |code| {
        let why = "because".to_owned();
        vec![Reply::Failed { code, why }]
    };
    for (code, exit) in codes {
        let axd = Scripted::new(vec![fails(code), fails(code)]);
        let (found, out, err) = axd.axvm(&["stop", "web"]);
        assert_eq!(found, exit);
        assert!(out.is_empty() && err == "axvm: because\n", "{err:?}");
        let (found, out, err) = axd.axvm(&["-o", "json", "stop", "web"]);
        assert_eq!(found, exit);
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&json["ok"], &json["exit"]), (&false.into(), &exit.into()));
        assert_eq!(json["error"], "because");
        assert!(err.is_empty());
    }
}

#[test]
fn no_axd_and_bad_usage_say_what_to_do() {
    let (code, _, err) = told(
        &axvm(&["--socket", "/no/such.sock", "list"])
            .output()
            .unwrap(),
    );
    assert_eq!(code, 6);
    assert!(
        err.contains("/no/such.sock") && err.contains("running"),
        "{err}"
    );
    for args in [
        &["start"][..],
        &["start", "web", "--mode", "best"],
        &["start", "web", "--probe", "--kernel", "/k"],
        &["start", "web", "--memory", "256M"],
        &["start", "web", "--probe", "--memory", "lots"],
        &["start", "web", "--probe", "--disk", "x,size=?"],
        &["start", "web", "--probe", "--net", "eth0"],
        &["start", "web", "--config", "/no/vm.toml"],
        &["define", "web"],
        &["define"],
        &["autostart", "web", "maybe"],
        &["frobnicate"],
        &["top", "web"],
        &["trace", "web", "-n", "0"],
        &["trace", "web", "-n", "5", "--seconds", "2"],
        &["trace", "web", "--follow", "-o", "perfetto"],
        &["list", "-o", "perfetto"],
        &["stats", "web", "-o", "perfetto"],
        &[],
    ] {
        let mut command = axvm(args);
        let (code, _, err) = told(&command.args(["--socket", "/no"]).output().unwrap());
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(!err.is_empty());
    }
}

#[test]
fn an_axd_that_goes_away_or_talks_nonsense_is_a_clear_failure() {
    let axd = Scripted::new(vec![vec![]]);
    let (code, _, err) = axd.axvm(&["list"]);
    assert_eq!(code, 6);
    assert!(err.contains("went away"), "{err}");

    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let nonsense = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&stream);
        stream.write_all(b"hello?\n").unwrap();
    });
    let mut command = axvm(&["list"]);
    let (code, _, err) = told(
        &command
            .env("AX_SOCKET", dir.path().join("s"))
            .output()
            .unwrap(),
    );
    nonsense.join().unwrap();
    assert_eq!(code, 1);
    assert!(err.contains("same version"), "{err}");
}

#[test]
fn list_prints_a_table_or_json_and_checks() {
    let good = || list(vec![report("web", State::Protected, true)]);
    let bad = || {
        list(vec![
            report("web", State::Protected, true),
            report("db", State::Degraded, false),
        ])
    };
    let axd = Scripted::new(vec![good(), good(), bad(), bad(), bad()]);
    let (code, out, err) = axd.axvm(&["list"]);
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "NAME  MODE  STATE      PRIMARY  SHADOW  CPUS  MEMORY  NOTE\n\
         web   ft    protected  alpha    beta    2     256M\n"
    );
    assert!(err.contains("host beta does not answer"), "{err}");
    assert_eq!(axd.axvm(&["list", "--check"]).0, 0);
    assert_eq!(axd.axvm(&["list"]).0, 0);
    assert_eq!(axd.axvm(&["list", "--check"]).0, 4);
    let (code, out, _) = axd.axvm(&["list", "--check", "-o", "json"]);
    assert_eq!(code, 4);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["vms"][1]["vm"]["name"], "db");
    assert_eq!(json["vms"][1]["state"], "degraded");
    assert_eq!(json["peer"]["reachable"], false);
}

#[test]
fn a_trace_is_read_from_where_it_is_to_begin() {
    let report = |numbers: std::ops::Range<u64>, end| {
        let record = |number| EpochRecord {
            number,
            epoch: number + 100,
            ..EpochRecord::default()
        };
        let trace = TraceReport {
            of: Origin {
                host: "alpha".into(),
                incarnation: ax_wire::Incarnation(7),
                engine_ns: 5,
            },
            next: numbers.end,
            end,
            records: numbers.map(record).collect(),
        };
        vec![Reply::Trace {
            trace: Box::new(trace),
        }]
    };
    let script = vec![report(9..9, 9), report(6..7, 9), report(6..9, 9)];
    let axd = Scripted::new(script);
    let (code, out, err) = axd.axvm(&["trace", "web", "-n", "3", "-o", "json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let records = json["records"].as_array().unwrap();
    let epochs: Vec<_> = records
        .iter()
        .map(|r| r["epoch"].as_u64().unwrap())
        .collect();
    assert_eq!((epochs, &json["missed"]), (vec![106, 107, 108], &0.into()));
    let asked = || match axd.asked() {
        Request::Trace { name, since, most } if name == "web" => (since, most),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        [asked(), asked(), asked()],
        [(u64::MAX, 0), (6, 1), (6, 1000)]
    );
    let (_, _, err) = told(&axvm(&["top", "web"]).output().unwrap());
    assert!(err.contains("axvm stats web"), "{err}");
}

#[test]
fn top_draws_on_a_terminal_and_leaves_it_as_it_was() {
    use nix::pty::{Winsize, openpty};
    use nix::sys::termios::tcgetattr;
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    for leave in [&b"q"[..], b"\x03"] {
        let shown = || {
            let vm = Box::new(report("web", State::Protected, true));
            vec![Reply::Vm { vm }]
        };
        let without = || {
            vec![Reply::Failed {
                code: Code::State,
                why: "web has no epochs".into(),
            }]
        };
        let axd = Scripted::new((0..20).flat_map(|_| [shown(), without()]).collect());
        let pty = openpty(&size, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = axvm(&["top", "web"]);
        command.stdin(end()).stdout(end()).stderr(end());
        command.env("AX_SOCKET", axd.socket()).env("TERM", "xterm");
        let mut top = command.spawn().unwrap();
        let mut master = std::fs::File::from(pty.master);
        let mut keys = master.try_clone().unwrap();
        let (to, pieces) = channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(n @ 1..) = master.read(&mut piece) {
                let _ = to.send(piece[..n].to_vec());
            }
        });
        let mut screen = Vec::new();
        let mut until = |wanted: &str| {
            while !String::from_utf8_lossy(&screen).contains(wanted) {
                let piece = pieces.recv_timeout(Duration::from_secs(20));
                screen.extend(piece.unwrap_or_else(|e| {
                    let screen = String::from_utf8_lossy(&screen);
                    panic!("{e}: no {wanted:?} in {screen:?}")
                }));
            }
        };
        // Blanks are not drawn anew.
        until("epochs");
        let raw = tcgetattr(&pty.slave).unwrap();
        assert_ne!(raw, before, "keys come as they are typed");
        keys.write_all(leave).unwrap();
        until("\x1b[?1049l");
        assert!(top.wait().unwrap().success());
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    }
}

#[test]
fn start_says_what_the_options_say() {
    let axd = Scripted::new(vec![done("web runs"), done("web runs")]);
    let (code, out, _) = axd.axvm(&[
        "start",
        "web",
        "--mode",
        "ft",
        "--probe",
        "--cmdline",
        "ip=10.0.0.5/24",
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--disk",
        "web.img,size=1G",
        "--disk",
        "/d/two.img,ro",
        "--net",
        "tap=tap0",
        "--no-wait",
    ]);
    assert_eq!((code, out.as_str()), (0, "web runs\n"));
    let Request::Start {
        name,
        define: Some(vm),
        wait: false,
        alone_ok: false,
        accept_loss: false,
    } = axd.asked()
    else {
        panic!("another request");
    };
    assert_eq!((name.as_str(), vm.name.as_str()), ("web", "web"));
    assert_eq!((vm.memory.0, vm.cpus, vm.mode), (1 << 30, 2, Mode::Ft));
    assert_eq!(vm.disks[0].path, PathBuf::from("web.img"));
    assert!(vm.disks[1].read_only && vm.disks[1].size.is_none());
    assert_eq!(vm.nics[0].tap, "tap0");
    assert_eq!(axd.axvm(&["start", "web"]).0, 0);
    assert!(matches!(
        axd.asked(),
        Request::Start {
            define: None,
            wait: true,
            ..
        }
    ));
}

#[test]
fn progress_goes_to_standard_error_and_never_into_json() {
    let replies = || {
        let progress = |text: &str, bytes: Option<(u64, u64)>| Reply::Progress {
            text: text.into(),
            done: bytes.map(|b| b.0),
            total: bytes.map(|b| b.1),
        };
        let mut lines = vec![
            progress("starting", None),
            Reply::Alive,
            progress("copying", Some((1, 4))),
            progress("copying", Some((1001, 4000))),
        ];
        lines.extend(done("web runs"));
        lines
    };
    let axd = Scripted::new(vec![replies(), replies()]);
    let (_, out, err) = axd.axvm(&["start", "web"]);
    assert_eq!(
        (out.as_str(), err.as_str()),
        ("web runs\n", "starting\ncopying: 25 %\n")
    );
    let (_, out, err) = axd.axvm(&["start", "web", "-o", "json"]);
    assert_eq!(out, "{\"ok\":true,\"text\":\"web runs\"}\n");
    assert!(err.is_empty(), "{err}");
}

/// Across a failover every byte of the console is shown once, none is left out.
#[test]
fn the_console_goes_on_where_it_was_after_a_failover() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let axd = std::thread::spawn(move || {
        let guest = b"0123456789abcdef";
        let mut asked = vec![];
        // The host dies after 10 bytes; nobody runs the guest at first; then it goes on elsewhere.
        for ends_at in [Some(10), None, Some(16)] {
            let (mut stream, _) = listener.accept().unwrap();
            let Request::Console { from, .. } = read_request(&stream) else {
                panic!("another request");
            };
            asked.push(from);
            let at = from.unwrap_or(0);
            let reply = match ends_at {
                Some(_) => Reply::Console { offset: at },
                None => Reply::Failed {
                    code: Code::State,
                    why: "nobody runs it".into(),
                },
            };
            writeln!(stream, "{}", serde_json::to_string(&reply).unwrap()).unwrap();
            if let Some(end) = ends_at {
                let at = usize::try_from(at).unwrap();
                stream.write_all(&guest[at..end]).unwrap();
            }
            if ends_at == Some(16) {
                let mut typed = [0; 5];
                stream.read_exact(&mut typed).unwrap();
                assert_eq!(&typed, b"hello");
                // The user leaves.
                assert_eq!(stream.read(&mut typed).unwrap(), 0);
            }
        }
        asked
    });
    let mut child = axvm(&["console", "web"])
        .env("AX_SOCKET", dir.path().join("s"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = [0; 16];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut seen)
        .unwrap();
    assert_eq!(&seen, b"0123456789abcdef");
    child
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"hello\x1dnever")
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(axd.join().unwrap(), [None, Some(10), Some(10)]);
}

#[test]
fn manual_and_completions_are_there() {
    for args in [
        &["man"][..],
        &["completions", "bash"],
        &["completions", "zsh"],
    ] {
        let (code, out, _) = told(&axvm(args).output().unwrap());
        assert_eq!(code, 0);
        assert!(out.contains("failover"), "{args:?}");
    }
}
