//! The sentinel over real sockets (rules 9 and 10).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ax_link::heartbeat::{
    Line, LinkEvent, LinkEventKind as Kind, Sentinel, SharedProgress, Timing, boottime_ns,
};
use ax_link::{Acceptor, Connector, Security, Stream};
use ax_wire::heartbeat::{BEAT, Beat, Progress};
use ax_wire::{EpochId, Generation};
use common::watch::*;
use common::*;

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
            deaf: false,
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
        deaf: false,
    };
    let stream = peer.recovers_from(stream, &other.encode());
    let reflected = Beat::Alive {
        session: session(1),
        seq: 9,
        progress: Progress::default(),
        deaf: false,
    };
    let mut stream = peer.recovers_from(stream, &reflected.encode());

    stream.write_all(&Peer::alive(10)).unwrap();
    stream
        .write_all(&Beat::Goodbye(session(2)).encode())
        .unwrap();
    assert_eq!(next(&peer.events), Kind::Goodbye);
}

#[test]
fn a_long_backlog_is_taken_in_whole() {
    let (anna, bert) = paired();
    let acceptor = Acceptor::bind(&[local()], bert).unwrap();
    let (_a, events) = start(1, NEVER, Line::Dial(connector(&anna, &acceptor)));
    let mut stream = take(&acceptor).accept().unwrap();
    let mut backlog: Vec<u8> = (1..=2000).flat_map(Peer::alive).collect();
    backlog.extend(Beat::Goodbye(session(2)).encode());
    stream.write_all(&backlog).unwrap();
    // The connection stays open: only what was sent can tell.
    assert_eq!(next(&events), Kind::Up { again: false });
    assert_eq!(next(&events), Kind::Goodbye);
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
