//! The detector on a fake clock: milliseconds in, names of events out.

use ax_wire::EpochId;
use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;

struct Rig {
    detector: Detector,
    now: u64,
    seen: Vec<LinkEventKind>,
    mine: Progress,
}

fn progress(epoch: u64, pending: bool) -> Progress {
    Progress {
        captured: EpochId(epoch),
        pending,
        ..Progress::default()
    }
}

impl Rig {
    fn new() -> Rig {
        let start = 1_000_000 * MS;
        let detector = Detector::new(&Timing::default(), start);
        Rig {
            detector,
            now: start,
            seen: Vec::new(),
            mine: Progress::default(),
        }
    }

    fn connected() -> Rig {
        let mut rig = Rig::new();
        rig.input(Input::Connected);
        rig
    }

    fn input(&mut self, input: Input) {
        self.seen
            .extend(self.detector.input(self.now, input).map(|e| e.kind));
    }

    fn tick(&mut self) {
        while let Some(event) = self.detector.tick(self.now, self.mine) {
            assert_eq!(event.at_ns, self.now);
            self.seen.push(event.kind);
        }
    }

    /// Lets time pass with a tick every 5 ms, and a heartbeat with every other if `peer` is one.
    fn run(&mut self, ms: u64, peer: Option<Progress>) {
        for i in 0..ms / 5 {
            self.now += 5 * MS;
            if let (Some(p), 1) = (peer, i % 2) {
                self.input(Input::Alive(p));
            }
            self.tick();
        }
    }

    /// This host does not run for `ms`.
    fn stop(&mut self, ms: u64) {
        self.now += ms * MS;
    }

    fn names(&mut self) -> Vec<&'static str> {
        self.seen
            .drain(..)
            .map(|kind| match kind {
                LinkEventKind::Up { again: false } => "up",
                LinkEventKind::Up { again: true } => "up again",
                LinkEventKind::Missed { .. } => "missed",
                LinkEventKind::Heard { .. } => "heard",
                LinkEventKind::Silence { .. } => "silence",
                LinkEventKind::Stall { .. } => "stall",
                LinkEventKind::Broken { .. } => "broken",
                LinkEventKind::DeathNotice => "death",
                LinkEventKind::Goodbye => "goodbye",
                LinkEventKind::Failed { .. } => "failed",
                LinkEventKind::PathLost { .. } | LinkEventKind::PathBack { .. } => "path",
            })
            .collect()
    }
}

#[test]
fn a_healthy_peer_is_no_news() {
    let mut rig = Rig::connected();
    rig.run(10_000, Some(progress(1, false)));
    assert_eq!(rig.names(), ["up"]);
}

#[test]
fn before_the_first_connection_nothing_is_overdue() {
    let mut rig = Rig::new();
    rig.run(10_000, None);
    assert_eq!(rig.names(), [""; 0]);
    rig.input(Input::Connected);
    rig.run(90, None);
    assert_eq!(rig.names(), ["up", "missed"]);
}

#[test]
fn silence_is_declared_at_the_detection_time_and_once() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, false)));
    rig.run(95, None);
    assert_eq!(rig.names(), ["up", "missed"]);
    rig.run(5, None);
    assert_eq!(
        rig.seen,
        [LinkEventKind::Silence {
            silent_ns: 100 * MS
        }]
    );
    rig.run(10_000, None);
    assert_eq!(rig.names(), ["silence"]);
    rig.run(20, Some(progress(1, false)));
    assert_eq!(rig.names(), ["heard"]);
    rig.run(200, None);
    assert_eq!(rig.names(), ["missed", "silence"]);
}

#[test]
fn an_end_without_goodbye_is_a_death_and_the_last_word() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, true)));
    rig.input(Input::Ended);
    assert_eq!(rig.names(), ["up", "death"]);
    rig.input(Input::Connected);
    rig.run(10_000, None);
    assert_eq!(rig.names(), [""; 0]);
}

#[test]
fn after_goodbye_neither_end_nor_silence_is_news() {
    let mut rig = Rig::connected();
    rig.input(Input::Goodbye);
    rig.input(Input::Ended);
    rig.run(10_000, None);
    assert_eq!(rig.names(), ["up", "goodbye"]);
}

#[test]
fn a_broken_connection_made_anew_in_time_is_no_silence() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, false)));
    rig.input(Input::Broken("CRC".into()));
    rig.run(50, None);
    rig.input(Input::Connected);
    rig.run(500, Some(progress(2, false)));
    assert_eq!(rig.names(), ["up", "broken", "missed", "up again", "heard"]);
}

#[test]
fn a_broken_connection_not_made_anew_is_silence_from_the_last_word_heard() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, false)));
    rig.run(60, None);
    rig.input(Input::Broken("TLS".into()));
    rig.run(35, None);
    assert_eq!(rig.names(), ["up", "missed", "broken"]);
    rig.run(5, None);
    assert_eq!(rig.names(), ["silence"]);
}

#[test]
fn a_connection_alone_is_no_sign_of_life() {
    let mut rig = Rig::connected();
    for _ in 0..4 {
        rig.run(25, None);
        rig.input(Input::Connected);
    }
    let names = rig.names();
    assert_eq!(
        names.iter().filter(|n| **n == "silence").count(),
        1,
        "{names:?}"
    );
}

#[test]
fn heartbeats_found_after_an_own_stop_are_heard_first() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, false)));
    rig.stop(10_000);
    rig.input(Input::Alive(progress(1, false)));
    rig.tick();
    rig.run(500, Some(progress(1, false)));
    assert_eq!(rig.names(), ["up"]);
}

#[test]
fn an_own_stop_puts_silence_off_by_half_the_detection_time() {
    let mut rig = Rig::connected();
    rig.run(50, Some(progress(1, false)));
    rig.stop(10_000);
    rig.tick();
    rig.run(45, None);
    assert_eq!(rig.names(), ["up", "missed"]);
    rig.run(5, None);
    assert_eq!(rig.names(), ["silence"]);
}

#[test]
fn a_host_that_keeps_stumbling_still_notices_in_the_end() {
    let mut rig = Rig::connected();
    for _ in 0..=MAX_EXCUSES {
        rig.stop(80);
        rig.tick();
    }
    assert!(rig.names().contains(&"silence"));
}

#[test]
fn a_peer_that_lives_but_does_nothing_stalls() {
    let mut rig = Rig::connected();
    rig.run(100, Some(progress(1, true)));
    rig.run(900, Some(progress(1, true)));
    assert_eq!(rig.names(), ["up"]);
    rig.run(100, Some(progress(1, true)));
    assert!(
        matches!(&rig.seen[..], [LinkEventKind::Stall { idle_ns, theirs, .. }]
            if *idle_ns >= 1000 * MS && theirs.pending)
    );
    rig.run(5_000, Some(progress(1, true)));
    assert_eq!(rig.names(), ["stall"], "once");
    rig.run(10, Some(progress(2, true)));
    rig.run(1_100, Some(progress(2, true)));
    assert_eq!(rig.names(), ["stall"], "again after something went forward");
}

#[test]
fn work_pending_here_counts_as_much() {
    let mut rig = Rig::connected();
    rig.mine = progress(7, true);
    rig.run(1_100, Some(progress(1, false)));
    assert_eq!(rig.names(), ["up", "stall"]);
}

#[test]
fn without_pending_work_no_progress_is_no_stall() {
    let mut rig = Rig::connected();
    rig.run(5_000, Some(progress(1, false)));
    // The stall time counts from when work began to wait.
    rig.run(900, Some(progress(1, true)));
    assert_eq!(rig.names(), ["up"]);
}

#[test]
fn a_busy_pair_does_not_stall() {
    let mut rig = Rig::connected();
    for epoch in 0..100 {
        rig.run(100, Some(progress(epoch, true)));
    }
    assert_eq!(rig.names(), ["up"]);
}

#[test]
fn an_own_stop_is_not_the_peers_stall() {
    let mut rig = Rig::connected();
    rig.run(100, Some(progress(1, true)));
    rig.stop(5_000);
    rig.input(Input::Alive(progress(1, true)));
    rig.tick();
    rig.run(500, Some(progress(1, true)));
    assert_eq!(rig.names(), ["up"]);
}

proptest! {
    /// Whatever happens, a peer that is never heard again is reported within a bounded time.
    #[test]
    fn a_peer_gone_is_always_noticed(
        history in prop::collection::vec((0u64..300, 0u8..4), 0..50),
        steps in prop::collection::vec(50u64..400, 40),
    ) {
        let mut rig = Rig::connected();
        for (ms, what) in history {
            rig.stop(ms);
            rig.input(match what {
                0 => Input::Connected,
                1 => Input::Broken(String::new()),
                _ => Input::Alive(progress(ms, what == 3)),
            });
            rig.tick();
        }
        rig.input(Input::Alive(progress(0, false)));
        rig.tick();
        rig.seen.clear();
        let gone_at = rig.now;
        for ms in steps {
            rig.stop(ms);
            rig.tick();
            if rig.seen.iter().any(|k| matches!(k, LinkEventKind::Silence { .. })) {
                break;
            }
            // An excuse is worth half a detection time, and there are few.
            let bound = 100 + u64::from(MAX_EXCUSES) * (400 + 50);
            prop_assert!(rig.now - gone_at < bound * MS);
        }
        prop_assert!(rig.names().contains(&"silence"));
    }
}
