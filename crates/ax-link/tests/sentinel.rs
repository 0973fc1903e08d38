//! The sentinel over real sockets and real processes (rules 9 and 10).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ax_link::heartbeat::{
    Line, LinkEvent, LinkEventKind as Kind, Sentinel, SharedProgress, Timing, boottime_ns,
};
use ax_link::{Acceptor, Connector, Identity, Security, Stream, TrustStore};
use ax_wire::heartbeat::{BEAT, Beat, Progress};
use ax_wire::{EpochId, Generation};
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// So long that nothing but the end of a connection can be noticed.
const NEVER: Timing = Timing {
    interval: Duration::from_millis(10),
    detect: Duration::from_secs(3600),
    stall: Duration::from_secs(3600),
};

fn start(incarnation: u64, timing: Timing, line: Line) -> (Sentinel, Receiver<LinkEvent>) {
    start_with(incarnation, timing, line, Arc::default())
}

fn start_with(
    incarnation: u64,
    timing: Timing,
    line: Line,
    progress: Arc<SharedProgress>,
) -> (Sentinel, Receiver<LinkEvent>) {
    let (sender, events): (Sender<_>, _) = channel();
    let tell = move |event| drop(sender.send(event));
    (
        Sentinel::start(session(incarnation), timing, line, progress, tell).unwrap(),
        events,
    )
}

/// The first event that is not about a late heartbeat, which a busy machine makes at will.
fn next(events: &Receiver<LinkEvent>) -> Kind {
    loop {
        let event = events.recv_timeout(SOON).expect("an event").kind;
        if !matches!(event, Kind::Missed { .. } | Kind::Heard { .. }) {
            return event;
        }
    }
}

/// What is still to come from a sentinel that has ended.
fn rest(events: &Receiver<LinkEvent>) -> Vec<Kind> {
    events
        .iter()
        .map(|e| e.kind)
        .filter(|k| !matches!(k, Kind::Missed { .. } | Kind::Heard { .. }))
        .collect()
}

fn wait_for_peer(sentinel: &Sentinel) {
    let begun = Instant::now();
    while sentinel.peer().is_none() {
        assert!(begun.elapsed() < SOON, "no heartbeat arrives");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two sentinels in this process, connected; the first dials.
struct Two {
    a: Sentinel,
    a_events: Receiver<LinkEvent>,
    b: Sentinel,
    b_events: Receiver<LinkEvent>,
}

fn two(timing: Timing, progress: [Arc<SharedProgress>; 2]) -> Two {
    let (anna, bert) = paired();
    let acceptor = Acceptor::bind(&[local()], bert).unwrap();
    let [of_a, of_b] = progress;
    let (b, b_events) = start_with(2, timing, Line::Await, of_b);
    let line = Line::Dial(connector(&anna, &acceptor));
    let (a, a_events) = start_with(1, timing, line, of_a);
    b.attach(take(&acceptor).accept().unwrap()).unwrap();
    assert_eq!(next(&a_events), Kind::Up { again: false });
    assert_eq!(next(&b_events), Kind::Up { again: false });
    wait_for_peer(&a);
    wait_for_peer(&b);
    Two {
        a,
        a_events,
        b,
        b_events,
    }
}

#[test]
fn progress_crosses_with_the_generation_of_the_moment() {
    let mine = Arc::new(SharedProgress::new(Generation(4)));
    let two = two(NEVER, [mine.clone(), Arc::default()]);
    mine.set_captured(EpochId(12));
    mine.set_acked(EpochId(11));
    mine.set_oldest_held(Some(boottime_ns()));
    mine.set_pending(true);
    mine.set_generation(Generation(5));
    let begun = Instant::now();
    loop {
        let peer = two.b.peer().unwrap();
        if peer.session.generation == Generation(5) && peer.progress.pending {
            assert_eq!(peer.session.incarnation, session(1).incarnation);
            assert_eq!(peer.progress.captured, EpochId(12));
            assert_eq!(peer.progress.acked, EpochId(11));
            assert!(peer.progress.oldest_held_ns > 0);
            return;
        }
        assert!(begun.elapsed() < SOON, "{peer:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_goodbye_is_no_death() {
    let two = two(NEVER, Default::default());
    two.a.goodbye();
    assert_eq!(next(&two.b_events), Kind::Goodbye);
    assert_eq!(rest(&two.b_events), []);
    assert_eq!(rest(&two.a_events), [], "who leaves is told nothing");
}

#[test]
fn goodbyes_from_both_sides_at_once_are_no_death() {
    for _ in 0..10 {
        let two = two(NEVER, Default::default());
        let (a, b) = (two.a, two.b);
        std::thread::scope(|scope| {
            scope.spawn(|| a.goodbye());
            scope.spawn(|| b.goodbye());
        });
        for events in [&two.a_events, &two.b_events] {
            let seen = rest(events);
            assert!(seen.is_empty() || seen == [Kind::Goodbye], "{seen:?}");
        }
    }
}

#[test]
fn an_end_without_goodbye_is_a_death_notice_and_the_last_event() {
    let two = two(NEVER, Default::default());
    drop(two.a);
    assert_eq!(next(&two.b_events), Kind::DeathNotice);
    assert_eq!(rest(&two.b_events), []);
    let (_, stream) = loose_channel();
    assert!(
        two.b.attach(stream).is_err(),
        "an ended sentinel takes no connection"
    );
}

/// An open channel that belongs to nobody.
fn loose_channel() -> (Stream, Stream) {
    let acceptor = Acceptor::bind(&[local()], Security::Plain).unwrap();
    channel_of(&acceptor)
}

fn channel_of(acceptor: &Acceptor) -> (Stream, Stream) {
    common::channel(
        &connector(&Security::Plain, acceptor),
        acceptor,
        heartbeat(1),
    )
}

#[test]
fn work_pending_without_progress_is_a_stall_on_both_sides() {
    let timing = Timing {
        stall: Duration::from_millis(100),
        detect: SOON,
        ..Timing::default()
    };
    let mine = Arc::new(SharedProgress::new(Generation(1)));
    let two = two(timing, [mine.clone(), Arc::default()]);
    mine.set_captured(EpochId(7));
    mine.set_pending(true);
    match next(&two.b_events) {
        Kind::Stall {
            idle_ns,
            theirs,
            mine,
        } => {
            assert!(idle_ns >= 100_000_000);
            assert!(theirs.pending && !mine.pending);
            assert_eq!(theirs.captured, EpochId(7));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(next(&two.a_events), Kind::Stall { .. }));
}

/// The test as the peer of a dialling sentinel, on a plain channel.
struct Peer {
    acceptor: Acceptor,
    sentinel: Sentinel,
    events: Receiver<LinkEvent>,
}

impl Peer {
    fn new() -> Peer {
        let acceptor = Acceptor::bind(&[local()], Security::Plain).unwrap();
        let line = Line::Dial(connector(&Security::Plain, &acceptor));
        let (sentinel, events) = start(1, NEVER, line);
        Peer {
            acceptor,
            sentinel,
            events,
        }
    }

    fn take(&self) -> Stream {
        let stream = take(&self.acceptor).accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn alive(seq: u64) -> [u8; BEAT] {
        Beat::Alive {
            session: session(2),
            seq,
            progress: Progress::default(),
        }
        .encode()
    }

    /// What `bytes` in place of a heartbeat lead to: a word that they could not be read, and a
    /// new connection; no death.
    fn recovers_from(&self, mut stream: Stream, bytes: &[u8]) -> Stream {
        stream.write_all(bytes).unwrap();
        assert!(matches!(next(&self.events), Kind::Broken { .. }));
        let mut told = Vec::new();
        // What it had sent before may have been cut by its end, the last word is whole.
        stream.read_to_end(&mut told).unwrap();
        let last: [u8; BEAT] = told[told.len() - BEAT..].try_into().unwrap();
        assert_eq!(
            Beat::parse(&last),
            Ok(Beat::Broken(ax_wire::Session {
                generation: Generation(0),
                ..session(1)
            }))
        );
        let again = self.take();
        assert_eq!(next(&self.events), Kind::Up { again: true });
        again
    }
}

#[test]
fn what_cannot_be_read_is_not_a_death_and_the_connection_is_made_anew() {
    let peer = Peer::new();
    let mut stream = peer.take();
    assert_eq!(next(&peer.events), Kind::Up { again: false });
    stream.write_all(&Peer::alive(1)).unwrap();
    wait_for_peer(&peer.sentinel);

    let stream = peer.recovers_from(stream, &[0xee; BEAT]);
    let mut damaged = Peer::alive(2);
    damaged[40] ^= 4;
    let stream = peer.recovers_from(stream, &damaged);
    // A recorded heartbeat, of this process and of one before it.
    let stream = peer.recovers_from(stream, &Peer::alive(1));
    let other = Beat::Alive {
        session: session(3),
        seq: 9,
        progress: Progress::default(),
    };
    let stream = peer.recovers_from(stream, &other.encode());
    let reflected = Beat::Alive {
        session: session(1),
        seq: 9,
        progress: Progress::default(),
    };
    let mut stream = peer.recovers_from(stream, &reflected.encode());

    stream.write_all(&Peer::alive(10)).unwrap();
    stream
        .write_all(&Beat::Goodbye(session(2)).encode())
        .unwrap();
    assert_eq!(next(&peer.events), Kind::Goodbye);
}

#[test]
fn a_heartbeat_cut_short_by_the_end_is_a_death() {
    let peer = Peer::new();
    let mut stream = peer.take();
    stream.write_all(&Peer::alive(1)[..50]).unwrap();
    drop(stream);
    assert_eq!(next(&peer.events), Kind::Up { again: false });
    assert_eq!(next(&peer.events), Kind::DeathNotice);
}

#[test]
fn the_peers_word_that_it_could_not_read_leads_to_a_new_connection() {
    let peer = Peer::new();
    let mut stream = peer.take();
    assert_eq!(next(&peer.events), Kind::Up { again: false });
    stream
        .write_all(&Beat::Broken(session(2)).encode())
        .unwrap();
    drop(stream);
    assert!(matches!(next(&peer.events), Kind::Broken { .. }));
    let _again = peer.take();
    assert_eq!(next(&peer.events), Kind::Up { again: true });
}

/// A cable that flips one bit on demand, in the direction of the listener.
fn cable(to: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<std::sync::atomic::AtomicBool>) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let listener = TcpListener::bind(local()).unwrap();
    let addr = listener.local_addr().unwrap();
    let flip = Arc::new(AtomicBool::new(false));
    let flip_here = flip.clone();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            let far = TcpStream::connect(to).unwrap();
            for (mut from, mut to, flips) in [
                (near.try_clone().unwrap(), far.try_clone().unwrap(), true),
                (far, near, false),
            ] {
                let flip = flip_here.clone();
                std::thread::spawn(move || {
                    let mut buf = [0; 4096];
                    while let Ok(n @ 1..) = from.read(&mut buf) {
                        if flips && flip.swap(false, Ordering::SeqCst) {
                            buf[n - 1] ^= 1;
                        }
                        if to.write_all(&buf[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
    (addr, flip)
}

#[test]
fn a_bit_flipped_on_the_way_is_a_tls_error_not_a_death() {
    let (anna, bert) = paired();
    let acceptor = Acceptor::bind(&[local()], bert).unwrap();
    let (addr, flip) = cable(acceptor.local_addrs()[0]);
    let dial = Connector::new(anna, vec![addr.into()], None).timeout(SOON);
    let (b, b_events) = start(2, NEVER, Line::Await);
    let (a, a_events) = start(1, NEVER, Line::Dial(dial));
    b.attach(take(&acceptor).accept().unwrap()).unwrap();
    assert_eq!(next(&a_events), Kind::Up { again: false });
    assert_eq!(next(&b_events), Kind::Up { again: false });
    for _ in 0..3 {
        wait_for_peer(&a);
        wait_for_peer(&b);
        flip.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(matches!(next(&b_events), Kind::Broken { .. }));
        assert!(matches!(next(&a_events), Kind::Broken { .. }));
        b.attach(take(&acceptor).accept().unwrap()).unwrap();
        assert_eq!(next(&a_events), Kind::Up { again: true });
        assert_eq!(next(&b_events), Kind::Up { again: true });
    }
}

#[test]
fn a_connection_that_cannot_be_made_anew_becomes_silence() {
    let timing = Timing {
        detect: Duration::from_millis(200),
        ..Timing::default()
    };
    let (anna, bert) = paired();
    let acceptor = Acceptor::bind(&[local()], bert).unwrap();
    let (a, events) = start(1, timing, Line::Dial(connector(&anna, &acceptor)));
    let mut stream = take(&acceptor).accept().unwrap();
    assert_eq!(next(&events), Kind::Up { again: false });
    drop(acceptor);
    stream.write_all(&Peer::alive(1)).unwrap();
    wait_for_peer(&a);
    stream
        .write_all(&Beat::Broken(session(2)).encode())
        .unwrap();
    // On a busy machine silence may come first.
    let mut seen = Vec::new();
    while !(seen.iter().any(|k| matches!(k, Kind::Broken { .. }))
        && seen.iter().any(|k| matches!(k, Kind::Silence { .. })))
    {
        seen.push(next(&events));
    }
    assert!(
        seen.iter().all(|k| !matches!(k, Kind::DeathNotice)),
        "{seen:?}"
    );
}

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
        vec![given[1].parse::<std::net::SocketAddr>().unwrap().into()],
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
