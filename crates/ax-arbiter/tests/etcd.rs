//! Against a real etcd: one of two racers wins, a killed one forgets nothing, a wiped one grants nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ax_arbiter::rules::{Registered, Registration};
use ax_arbiter::{AskError, Etcd};
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Flush, Member, Record, Request, State, Why,
};
use ax_wire::{Generation, Incarnation, PairId, Side};
use testkit::require_program;

const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(1),
};
const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(2),
};

fn pair(n: u8) -> PairId {
    PairId([n; 16])
}

/// A real etcd of its own, killed with the test.
struct Server {
    dir: PathBuf,
    ports: [u16; 2],
    child: Child,
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

impl Server {
    fn run(dir: &Path, ports: [u16; 2]) -> Child {
        let [client, peer] = ports.map(|port| format!("http://127.0.0.1:{port}"));
        Command::new("etcd")
            .args(["--name", "t", "--log-level", "error", "--logger", "zap"])
            .arg("--data-dir")
            .arg(dir)
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("t={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn new(dir: &Path) -> Server {
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = free.each_ref().map(|l| l.local_addr().unwrap().port());
        drop(free);
        let dir = dir.join("etcd");
        let server = Server {
            child: Server::run(&dir, ports),
            dir,
            ports,
        };
        server.wait();
        server
    }

    fn at(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.ports[0]).into()
    }

    fn wait(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(self.at()).is_err() {
            assert!(Instant::now() < until, "etcd does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start(&mut self) {
        self.child = Server::run(&self.dir, self.ports);
        self.wait();
    }

    fn client(&self) -> Etcd {
        Etcd::new(vec![self.at()], None)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn registration(pair: PairId, side: Side, record: Record) -> Registration {
    Registration {
        pair,
        side,
        machine: None,
        record,
    }
}

/// Both sides register; returns their clients.
fn registered(server: &Server, pair: PairId) -> (Etcd, Etcd) {
    let first = Record::defined(Copies::Both, Arbiter::Operator);
    let (mut a, mut b) = (server.client(), server.client());
    let of = |side| registration(pair, side, first);
    assert_eq!(
        a.register(&of(Side::A), false, soon()).unwrap(),
        Registered::Waiting
    );
    let known = b.register(&of(Side::B), false, soon()).unwrap();
    assert!(matches!(known, Registered::Known(_)), "{known:?}");
    assert_eq!(a.register(&of(Side::A), false, soon()).unwrap(), known);
    (a, b)
}

fn request(pair: PairId, caller: Member, from: u64, change: Change) -> Request {
    Request {
        pair,
        caller,
        machine: None,
        from: Generation(from),
        change,
    }
}

fn granted(decision: Decision) -> Record {
    decision.granted().unwrap()
}

#[test]
fn a_record_is_changed_once_and_the_same_caller_is_told_again() {
    require_program!("etcd", "etcd-server");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(dir.path());
    let mut stranger = server.client();
    let start = request(pair(1), A, 0, Change::Start);
    let unknown = stranger.ask(&start, soon()).unwrap().granted().unwrap_err();
    assert_eq!(unknown.why, Why::UnknownPair);
    let (mut a, mut b) = registered(&server, pair(1));
    let alone = granted(a.ask(&start, soon()).unwrap());
    assert_eq!(a.ask(&start, soon()).unwrap(), Decision::Already(alone));
    let late = request(pair(1), B, 0, Change::Start);
    assert!(b.ask(&late, soon()).unwrap().granted().is_err());
    assert_eq!(b.look(pair(1), soon()).unwrap(), Some(alone));
}

#[test]
fn of_two_racers_exactly_one_wins() {
    require_program!("etcd", "etcd-server");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(dir.path());
    let pair = pair(2);
    let (mut a, mut b) = registered(&server, pair);
    let mut holder = A;
    let mut at = 1;
    granted(a.ask(&request(pair, A, 0, Change::Start), soon()).unwrap());
    for round in 0..100 {
        // Into FT, then both leave it at once.
        let shadow = if holder == A { B } else { A };
        let enter = Change::EnterFt {
            shadow: shadow.incarnation,
            flush: Flush::Local,
        };
        granted(a.ask(&request(pair, holder, at, enter), soon()).unwrap());
        let solo = |caller| request(pair, caller, at + 1, Change::TakeSolo);
        let (of_a, of_b) = std::thread::scope(|s| {
            let one = s.spawn(|| a.ask(&solo(A), soon()).unwrap());
            let two = s.spawn(|| b.ask(&solo(B), soon()).unwrap());
            (one.join().unwrap(), two.join().unwrap())
        });
        let won = [of_a, of_b].map(|decision| matches!(decision, Decision::Granted(_)));
        assert!(
            won == [true, false] || won == [false, true],
            "round {round}: {won:?}"
        );
        holder = if won[0] { A } else { B };
        at += 2;
    }
}

#[test]
fn an_etcd_killed_while_it_is_asked_forgets_nothing_and_answers_when_it_is_back() {
    require_program!("etcd", "etcd-server");
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::new(dir.path());
    let pair = pair(3);
    let (mut a, mut b) = registered(&server, pair);
    granted(a.ask(&request(pair, A, 0, Change::Start), soon()).unwrap());
    let enter = Change::EnterFt {
        shadow: B.incarnation,
        flush: Flush::Local,
    };
    granted(a.ask(&request(pair, A, 1, enter), soon()).unwrap());
    server.kill();
    let takeover = request(pair, B, 2, Change::TakeSolo);
    let away = b.ask(&takeover, Instant::now() + Duration::from_millis(700));
    assert!(
        matches!(away, Err(AskError::Unreachable { .. })),
        "{away:?}"
    );
    server.start();
    let alone = granted(
        b.ask(&takeover, Instant::now() + Duration::from_secs(20))
            .unwrap(),
    );
    assert_eq!(alone.state, State::Alone { holder: B });
    server.kill();
    server.start();
    let again = b.ask(&takeover, Instant::now() + Duration::from_secs(20));
    assert_eq!(again.unwrap(), Decision::Already(alone));
    let refused = a
        .ask(&request(pair, A, 2, Change::TakeSolo), soon())
        .unwrap();
    assert_eq!(refused.granted().unwrap_err().why, Why::Stale);
}

/// One side runs alone; the cluster's data are lost; the other side, which knows less, gets nothing.
#[test]
fn a_wiped_etcd_grants_nothing_until_both_sides_register_with_equal_generation() {
    require_program!("etcd", "etcd-server");
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::new(dir.path());
    let pair = pair(4);
    let (mut a, mut b) = registered(&server, pair);
    let old = a.look(pair, soon()).unwrap().unwrap();
    let alone = granted(a.ask(&request(pair, A, 0, Change::Start), soon()).unwrap());
    server.kill();
    std::fs::remove_dir_all(&server.dir).unwrap();
    server.start();
    let start = request(pair, B, 0, Change::Start);
    for client in [&mut a, &mut b] {
        let other = client.ask(&start, Instant::now() + Duration::from_secs(20));
        assert!(
            matches!(other, Err(AskError::OtherWitness { .. })),
            "{other:?}"
        );
    }
    let of = |side, record| registration(pair, side, record);
    let mut stranger = server.client();
    let unknown = stranger.ask(&start, soon()).unwrap().granted();
    assert_eq!(unknown.unwrap_err().why, Why::UnknownPair);
    let said = b.register(&of(Side::B, old), false, soon()).unwrap();
    assert_eq!(said, Registered::Waiting);
    let said = a.register(&of(Side::A, alone), false, soon()).unwrap();
    assert!(matches!(said, Registered::Disagrees { .. }), "{said:?}");
    let said = b.register(&of(Side::B, old), false, soon()).unwrap();
    assert!(matches!(said, Registered::Disagrees { .. }), "{said:?}");
    // It has learned from its peer.
    let said = b.register(&of(Side::B, alone), false, soon()).unwrap();
    assert!(
        matches!(said, Registered::Known(known) if known.agrees_with(&alone)),
        "{said:?}"
    );
    let said = a.register(&of(Side::A, alone), false, soon()).unwrap();
    assert!(matches!(said, Registered::Known(_)), "{said:?}");
}
