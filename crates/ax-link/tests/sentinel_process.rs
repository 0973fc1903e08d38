//! The sentinel of a process that is killed, stopped, or leaves (rule 10).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use ax_link::heartbeat::{Line, LinkEvent, LinkEventKind as Kind, Sentinel, Timing, boottime_ns};
use ax_link::{Acceptor, Connector, Identity, Security, TrustStore};
use common::watch::*;
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process with a sentinel that dials, so much memory, and an ordinary connection.
struct Guest {
    process: Child,
    ordinary: TcpStream,
    _sentinel: Sentinel,
    /// Kept open: the child's test harness has more to print.
    _out: BufReader<std::process::ChildStdout>,
    events: Receiver<LinkEvent>,
    /// The liveness connection's port at the guest's end.
    port: u16,
    _dirs: [tempfile::TempDir; 2],
}

const CHILD: &str = "AX_LINK_TEST_CHILD";

impl Guest {
    fn new(mebibytes: usize, timing: Timing) -> Guest {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [here, there] = [0, 1].map(|i| {
            let name = ["here", "there"][i].parse().unwrap();
            Identity::load_or_create(dirs[i].path(), &name).unwrap()
        });
        let trust = dirs
            .each_ref()
            .map(|dir| TrustStore::open(dir.path()).unwrap());
        trust[0].add(there.name(), there.certificate()).unwrap();
        trust[1].add(here.name(), here.certificate()).unwrap();
        let acceptor = Acceptor::bind(&[local()], Security::Mtls(here, trust[0].clone())).unwrap();
        let listener = TcpListener::bind(local()).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "the_process_that_other_tests_kill",
            ])
            .env(
                CHILD,
                format!(
                    "{} {} {} {mebibytes}",
                    dirs[1].path().display(),
                    acceptor.local_addrs()[0],
                    listener.local_addr().unwrap(),
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sentinel, events) = start(1, timing, Line::Await);
        let ordinary = listener.accept().unwrap().0;
        let stream = take(&acceptor).accept().unwrap();
        assert_eq!(stream.peer_name().unwrap().as_str(), "there");
        let port = stream.peer_addr().port();
        sentinel.attach(stream).unwrap();
        assert_eq!(next(&events), Kind::Up { again: false });
        wait_for_peer(&sentinel);
        let mut out = BufReader::new(process.stdout.take().unwrap());
        assert!(
            out.by_ref().lines().any(|l| l.unwrap().contains("ready")),
            "the child got ready"
        );
        Guest {
            process,
            ordinary,
            _sentinel: sentinel,
            _out: out,
            events,
            port,
            _dirs: dirs,
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "not a test: the process that other tests start and kill"]
fn the_process_that_other_tests_kill() {
    let Ok(given) = std::env::var(CHILD) else {
        return;
    };
    let given: Vec<&str> = given.split(' ').collect();
    let dir = PathBuf::from(given[0]);
    let security = Security::Mtls(
        Identity::load(&dir).unwrap(),
        TrustStore::open(&dir).unwrap(),
    );
    let _ordinary = TcpStream::connect(given[2]).unwrap();
    let mebibytes: usize = given[3].parse().unwrap();
    // Guest RAM is shared memory too.
    let memory = nix::sys::memfd::memfd_create("ram", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let mut memory = std::fs::File::from(memory);
    let page = vec![1; 1 << 20];
    for _ in 0..mebibytes {
        memory.write_all(&page).unwrap();
    }
    let line = Line::Dial(Connector::new(
        security,
        vec![given[1].parse::<SocketAddr>().unwrap().into()],
        None,
    ));
    let (sentinel, _events) = start(2, Timing::default(), line);
    wait_for_peer(&sentinel);
    println!("ready");
    let mut order = String::new();
    std::io::stdin().read_line(&mut order).unwrap();
    if order == "goodbye\n" {
        sentinel.goodbye();
    }
}

#[test]
fn sigkill_is_a_death_notice_whatever_the_memory() {
    for mebibytes in [1, 1024] {
        let mut guest = Guest::new(mebibytes, NEVER);
        let mut ordinary = guest.ordinary.try_clone().unwrap();
        let ordinary = std::thread::spawn(move || {
            assert!(matches!(ordinary.read(&mut [0; 1]), Ok(0) | Err(_)));
            boottime_ns()
        });
        let killed = boottime_ns();
        guest.signal(Signal::SIGKILL);
        let event = loop {
            let event = guest.events.recv_timeout(SOON).unwrap();
            if !matches!(event.kind, Kind::Missed { .. } | Kind::Heard { .. }) {
                break event;
            }
        };
        assert_eq!(event.kind, Kind::DeathNotice);
        let ms = |at: u64| at.saturating_sub(killed) as f64 / 1e6;
        println!(
            "{mebibytes} MiB: death notice {:.2} ms after SIGKILL, ordinary connection's end {:.2} ms",
            ms(event.at_ns),
            ms(ordinary.join().unwrap())
        );
        guest.process.wait().unwrap();
    }
}

/// Inodes of the two ends of the TCP connection on 127.0.0.1 that was dialled from this port: the
/// dialling, the accepted.
fn inodes(port: u16) -> [String; 2] {
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let end = format!("0100007F:{port:04X}");
    // Fields 1 and 2 are the local and the remote end, 3 the state (1: connected), 9 the inode.
    [1, 2].map(|field| {
        connections
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>())
            .find(|f| f.get(field) == Some(&end.as_str()) && f.get(3) == Some(&"01"))
            .map(|f| format!("socket:[{}]", f[9]))
            .expect("a connection from that port")
    })
}

/// What a thread's file table holds, without standard input, output and error.
fn table(task: &Path) -> Vec<String> {
    std::fs::read_dir(task.join("fd"))
        .into_iter()
        .flatten()
        .filter_map(|fd| Some(fd.ok()?.path()))
        .filter(|fd| !["0", "1", "2"].contains(&fd.file_name().unwrap().to_str().unwrap()))
        .filter_map(|fd| std::fs::read_link(fd).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_sentinel_alone_holds_the_liveness_socket_and_holds_nothing_else() {
    let guest = Guest::new(1, NEVER);
    let [live, accepted] = inodes(guest.port);
    let [ordinary, _] = inodes(guest.ordinary.peer_addr().unwrap().port());
    let tasks = format!("/proc/{}/task", guest.process.id());
    let mut sentinels = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap();
        let table = table(&task);
        if name == "ax-sentinel\n" {
            sentinels += 1;
            let mut kinds: Vec<_> = table
                .iter()
                .map(|link| {
                    if *link == live {
                        "live"
                    } else {
                        link.split([':', '[']).next().unwrap()
                    }
                })
                .collect();
            kinds.sort_unstable();
            // The eventfd that wakes it, the socket on which it is handed connections.
            assert_eq!(kinds, ["anon_inode", "live", "socket"], "{table:?}");
            assert!(!table.contains(&ordinary));
        } else {
            assert!(table.contains(&ordinary), "{name}: {table:?}");
            assert!(
                !table.contains(&live),
                "{name} keeps a duplicate of the liveness socket"
            );
        }
    }
    assert_eq!(sentinels, 1);
    // The same on this side, where the connection was accepted and handed over.
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        // Threads of other tests come and go.
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if name != "ax-sentinel\n" {
            assert!(!table(&task).contains(&accepted), "{name}");
        }
    }
    drop(guest);
}

#[test]
fn a_stopped_peer_is_silent_and_heard_again_when_it_goes_on() {
    let timing = Timing {
        detect: Duration::from_millis(500),
        ..Timing::default()
    };
    let guest = Guest::new(1, timing);
    guest.signal(Signal::SIGSTOP);
    match next(&guest.events) {
        Kind::Silence { silent_ns } => assert!(silent_ns >= 500_000_000),
        other => panic!("{other:?}"),
    }
    guest.signal(Signal::SIGCONT);
    let until = |wanted: fn(&Kind) -> bool| {
        while !wanted(
            &guest
                .events
                .recv_timeout(SOON)
                .expect("the event wanted")
                .kind,
        ) {}
    };
    until(|k| matches!(k, Kind::Heard { .. }));
    guest.signal(Signal::SIGKILL);
    until(|k| *k == Kind::DeathNotice);
}

#[test]
fn a_process_that_says_goodbye_is_not_dead() {
    let mut guest = Guest::new(1, NEVER);
    guest
        .process
        .stdin
        .take()
        .unwrap()
        .write_all(b"goodbye\n")
        .unwrap();
    assert_eq!(next(&guest.events), Kind::Goodbye);
    assert!(guest.process.wait().unwrap().success());
    assert_eq!(rest(&guest.events), []);
}
