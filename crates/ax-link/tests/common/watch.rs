//! Sentinels and their events.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ax_link::heartbeat::{
    Line, LinkEvent, LinkEventKind as Kind, Sentinel, SharedProgress, Timing,
};

use super::{SOON, session};

/// So long that nothing but the end of a connection can be noticed.
pub const NEVER: Timing = Timing {
    interval: Duration::from_millis(10),
    detect: Duration::from_secs(3600),
    stall: Duration::from_secs(3600),
};

pub fn start(incarnation: u64, timing: Timing, line: Line) -> (Sentinel, Receiver<LinkEvent>) {
    start_with(incarnation, timing, line, Arc::default())
}

pub fn start_with(
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
pub fn next(events: &Receiver<LinkEvent>) -> Kind {
    loop {
        let event = events.recv_timeout(SOON).expect("an event").kind;
        if !matches!(event, Kind::Missed { .. } | Kind::Heard { .. }) {
            return event;
        }
    }
}

/// What is still to come from a sentinel that has ended.
pub fn rest(events: &Receiver<LinkEvent>) -> Vec<Kind> {
    events
        .iter()
        .map(|e| e.kind)
        .filter(|k| !matches!(k, Kind::Missed { .. } | Kind::Heard { .. }))
        .collect()
}

pub fn wait_for_peer(sentinel: &Sentinel) {
    let begun = Instant::now();
    while sentinel.peer().is_none() {
        assert!(begun.elapsed() < SOON, "no heartbeat arrives");
        std::thread::sleep(Duration::from_millis(1));
    }
}
