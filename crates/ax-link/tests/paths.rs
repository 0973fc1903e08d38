//! Two paths between two sentinels: losing either is no silence and no death (rules 9 and 10).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ax_link::heartbeat::{
    Line, LinkEvent, LinkEventKind as Kind, PathLoss, PathState, Sentinel, Timing,
};
use ax_link::{Acceptor, Connector};
use common::watch::*;
use common::*;

/// Long enough for a busy machine; paths are compared at a third of it.
const TIMING: Timing = Timing {
    interval: Duration::from_millis(10),
    detect: Duration::from_millis(1500),
    stall: SOON,
};

/// One path through this process. Held, its bytes stay inside; cut, its connections are reset.
#[derive(Clone)]
struct Cable {
    at: SocketAddr,
    /// Toward the listener, and back.
    held: [Arc<AtomicBool>; 2],
    refuses: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Cable {
    fn to(target: SocketAddr) -> Cable {
        let listener = TcpListener::bind(local()).unwrap();
        let cable = Cable {
            at: listener.local_addr().unwrap(),
            held: Default::default(),
            refuses: Arc::default(),
            open: Arc::default(),
        };
        let here = cable.clone();
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                if !here.refuses.load(Ordering::SeqCst) {
                    here.carry(near, TcpStream::connect(target).unwrap());
                }
            }
        });
        cable
    }

    fn carry(&self, near: TcpStream, far: TcpStream) {
        let both = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        self.open.lock().unwrap().extend(both);
        let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
        for ((mut from, mut to), held) in [(near, far), back].into_iter().zip(self.held.clone()) {
            std::thread::spawn(move || {
                let mut buf = [0; 4096];
                loop {
                    let read = from.read(&mut buf);
                    while held.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    match read {
                        Ok(0) => drop(to.shutdown(Shutdown::Write)),
                        Ok(n) if to.write_all(&buf[..n]).is_ok() => continue,
                        // A reset goes through a network as a reset.
                        _ => [&from, &to].into_iter().for_each(disconnect),
                    }
                    return;
                }
            });
        }
    }

    fn hold(&self, way: usize, on: bool) {
        self.held[way].store(on, Ordering::SeqCst);
    }

    /// Resets every connection there is; takes new ones only when it is mended.
    fn cut(&self) {
        self.refuses.store(true, Ordering::SeqCst);
        for sock in self.open.lock().unwrap().drain(..) {
            disconnect(&sock);
        }
    }

    fn mend(&self) {
        self.refuses.store(false, Ordering::SeqCst);
        (0..2).for_each(|way| self.hold(way, false));
    }
}

/// Resets a connection, though other descriptors of it are open: by connecting it to nowhere.
fn disconnect(sock: &TcpStream) {
    use std::os::fd::AsRawFd;
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as u16,
        sa_data: [0; 14],
    };
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: a valid socket and a valid address of that length. One that has ended refuses.
    let _ = unsafe { libc::connect(sock.as_raw_fd(), &raw const nowhere, len) };
}

/// Two sentinels with two paths between them; the first dials.
struct Two {
    cables: [Cable; 2],
    a: Option<Sentinel>,
    b: Arc<Sentinel>,
    events: [Receiver<LinkEvent>; 2],
}

impl Two {
    fn new() -> Two {
        let (anna, bert) = paired();
        let at: Vec<SocketAddr> = ["127.0.0.1:0", "127.0.0.2:0"]
            .map(|at| at.parse().unwrap())
            .to_vec();
        let acceptor = Acceptor::bind(&at, bert).unwrap();
        let [first, second] = acceptor.local_addrs() else {
            panic!("two addresses")
        };
        let cables = [Cable::to(*first), Cable::to(*second)];
        let (b, b_events) = start(2, TIMING, Line::Await);
        let b = Arc::new(b);
        let its = b.clone();
        std::thread::spawn(move || {
            while let Some(incoming) = acceptor.accept() {
                // An ended sentinel takes none.
                let taken = incoming.accept().and_then(|stream| its.attach(stream));
                if taken.is_err() {
                    return;
                }
            }
        });
        let paths = cables.iter().map(|cable| cable.at.into()).collect();
        let dial = Connector::new(anna, paths, None).timeout(SOON);
        let (a, a_events) = start(1, TIMING, Line::Dial(dial));
        let two = Two {
            cables,
            a: Some(a),
            b,
            events: [a_events, b_events],
        };
        two.until([PathState::Up; 2]);
        two
    }

    fn a(&self) -> &Sentinel {
        self.a.as_ref().unwrap()
    }

    /// Waits until both sides have their paths, by address of the listener, in these states.
    fn until(&self, wanted: [PathState; 2]) {
        let begun = Instant::now();
        loop {
            let of = |sentinel: &Sentinel| {
                let mut now = sentinel.paths().now();
                // The cables are all at 127.0.0.1, the listener's addresses differ: by number, by address.
                now.sort_by_key(|path| path.address);
                now.iter().map(|path| path.state).collect::<Vec<_>>()
            };
            let now = [of(self.a()), of(&self.b)];
            if now.iter().all(|states| *states == wanted) {
                return;
            }
            assert!(
                begun.elapsed() < SOON,
                "{now:?}, not {wanted:?}: {:?}",
                self.told()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What both have told so far. Neither may have been silent or dead.
    fn told(&self) -> Vec<Kind> {
        let all: Vec<Kind> = self
            .events
            .iter()
            .flat_map(Receiver::try_iter)
            .map(|e| e.kind)
            .collect();
        for kind in &all {
            let fatal = matches!(
                kind,
                Kind::Silence { .. } | Kind::DeathNotice | Kind::Goodbye
            );
            assert!(!fatal, "{all:?}");
        }
        all
    }
}

const LOST_FIRST: [PathState; 2] = [PathState::Lost, PathState::Up];
const LOST_SECOND: [PathState; 2] = [PathState::Up, PathState::Lost];

#[test]
fn a_path_that_carries_nothing_either_way_is_lost_on_both_sides_and_comes_back() {
    let two = Two::new();
    for (path, lost) in [(0, LOST_FIRST), (1, LOST_SECOND)] {
        two.told();
        two.cables[path].hold(0, true);
        two.cables[path].hold(1, true);
        two.until(lost);
        std::thread::sleep(TIMING.detect * 2);
        let told = two.told();
        assert!(
            told.iter().any(|k| matches!(
                k,
                Kind::PathLost {
                    how: PathLoss::Silent,
                    ..
                }
            )),
            "{told:?}"
        );
        two.cables[path].mend();
        two.until([PathState::Up; 2]);
        assert!(
            two.told()
                .iter()
                .any(|k| matches!(k, Kind::PathBack { .. }))
        );
    }
}

#[test]
fn a_path_that_carries_one_way_only_is_lost_on_both_sides() {
    let two = Two::new();
    for way in 0..2 {
        two.told();
        two.cables[0].hold(way, true);
        two.until(LOST_FIRST);
        // The connection that is made meanwhile hangs: nothing of it may be taken for a death.
        std::thread::sleep(TIMING.detect * 2);
        two.cables[0].mend();
        two.until([PathState::Up; 2]);
        two.told();
    }
}

#[test]
fn a_reset_on_one_path_while_the_other_lives_is_a_lost_path_and_no_death() {
    let two = Two::new();
    for path in [1, 0] {
        two.told();
        two.cables[path].cut();
        two.until([LOST_FIRST, LOST_SECOND][path]);
        std::thread::sleep(Duration::from_millis(300));
        two.cables[path].mend();
        two.until([PathState::Up; 2]);
        let told = two.told();
        assert!(
            told.iter().any(|k| matches!(
                k,
                Kind::PathLost {
                    how: PathLoss::Broken,
                    ..
                }
            )),
            "{told:?}"
        );
    }
}

#[test]
fn with_both_paths_silent_the_peer_is_silent() {
    let two = Two::new();
    two.cables
        .iter()
        .for_each(|cable| (0..2).for_each(|way| cable.hold(way, true)));
    for events in &two.events {
        let mut kinds = events.iter().map(|e| e.kind);
        assert!(kinds.any(|k| matches!(k, Kind::Silence { .. })));
    }
}

#[test]
fn an_end_without_goodbye_is_a_death_though_a_path_is_lost() {
    let mut two = Two::new();
    two.cables[0].hold(0, true);
    two.cables[0].hold(1, true);
    two.until(LOST_FIRST);
    two.told();
    two.a = None;
    let mut kinds = two.events[1].iter().map(|e| e.kind);
    assert!(kinds.any(|k| k == Kind::DeathNotice));
}

#[test]
fn a_goodbye_on_two_paths_is_no_death() {
    for lost in [false, true] {
        let mut two = Two::new();
        if lost {
            two.cables[1].hold(0, true);
            two.until(LOST_SECOND);
        }
        two.told();
        two.a.take().unwrap().goodbye();
        let last = two.events[1].iter().map(|e| e.kind).last();
        assert_eq!(last, Some(Kind::Goodbye));
    }
}
