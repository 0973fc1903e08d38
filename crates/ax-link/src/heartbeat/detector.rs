//! From what was heard when to what it means: pure, on a clock given by the caller.

use std::time::Duration;

use ax_wire::EpochId;
use ax_wire::heartbeat::Progress;

use super::PathLoss;

/// The times of the sentinel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A heartbeat is sent this often.
    pub interval: Duration,
    /// Nothing heard for this long is [`LinkEventKind::Silence`].
    pub detect: Duration,
    /// No progress for this long with work pending is [`LinkEventKind::Stall`].
    pub stall: Duration,
}

impl Default for Timing {
    /// Every 10 ms; 100 ms; 1 s.
    fn default() -> Self {
        Timing {
            interval: Duration::from_millis(10),
            detect: Duration::from_millis(100),
            stall: Duration::from_secs(1),
        }
    }
}

/// Something about the peer, with its time.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkEvent {
    /// When the sentinel noticed, CLOCK_BOOTTIME ns.
    pub at_ns: u64,
    /// What.
    pub kind: LinkEventKind,
}

/// What happened. [`DeathNotice`](LinkEventKind::DeathNotice), [`Goodbye`](LinkEventKind::Goodbye)
/// and [`Failed`](LinkEventKind::Failed) are a sentinel's last.
#[derive(Clone, Debug, PartialEq)]
pub enum LinkEventKind {
    /// Heartbeats can flow.
    Up {
        /// Not for the first time.
        again: bool,
    },
    /// Heartbeats are overdue, not yet for the detection time: time to begin applying what is
    /// staged (rule 18). Once per gap.
    Missed {
        /// Since the last one heard, ns.
        silent_ns: u64,
    },
    /// Heard again after [`LinkEventKind::Missed`] or [`LinkEventKind::Silence`].
    Heard {
        /// How long nothing was, ns.
        silent_ns: u64,
    },
    /// Nothing heard for the detection time. Once per gap.
    Silence {
        /// Since the last one heard, ns.
        silent_ns: u64,
    },
    /// Heartbeats come, but no epoch went forward for the stall time though a side waits for one
    /// (rule 9). Once, until something goes forward.
    Stall {
        /// Since something went forward, ns.
        idle_ns: u64,
        /// This side's state.
        mine: Progress,
        /// The peer's.
        theirs: Progress,
    },
    /// A connection ended by an error, not by a death; it is made anew (rule 10).
    Broken {
        /// What went wrong.
        reason: String,
    },
    /// A path that worked does not any more; the peer is heard on another.
    PathLost {
        /// Its number in [`PathViews::now`](super::PathViews::now).
        path: usize,
        /// How.
        how: PathLoss,
    },
    /// It works again.
    PathBack {
        /// Its number.
        path: usize,
    },
    /// The peer's end of the connection closed without a goodbye: its process has died.
    DeathNotice,
    /// The peer ended on purpose.
    Goodbye,
    /// This host cannot watch any more.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What the thread saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// A connection is open.
    Connected,
    /// A heartbeat arrived.
    Alive(Progress),
    /// The peer said goodbye.
    Goodbye,
    /// The connection ended without a word.
    Ended,
    /// The connection became unusable.
    Broken(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No connection yet: nothing is overdue.
    Waiting,
    /// A connection is or was open.
    Watching,
    /// Dead or parted: nothing more to say.
    Over,
}

/// What was last reported of the present gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Gap {
    None,
    Missed,
    Silent,
}

/// How often a gap in this host's own running may put off a silence, per gap heard from the peer.
const MAX_EXCUSES: u32 = 4;

/// The pure part of the sentinel. Times are CLOCK_BOOTTIME ns, never decreasing.
#[derive(Debug)]
pub(crate) struct Detector {
    missed_ns: u64,
    detect_ns: u64,
    stall_ns: u64,
    /// A pause of this host's own running from here on is worth an excuse.
    own_pause_ns: u64,
    phase: Phase,
    connected_before: bool,
    last_tick: u64,
    heard_at: u64,
    /// Silence counts from here: `heard_at`, or later when this host itself did not run.
    base: u64,
    excuses: u32,
    gap: Gap,
    mine: Progress,
    theirs: Option<Progress>,
    moved_at: u64,
    stalled: bool,
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

type Epochs = [EpochId; 4];

fn epochs(progress: &Progress) -> Epochs {
    [
        progress.captured,
        progress.staged,
        progress.applied,
        progress.acked,
    ]
}

impl Detector {
    pub(crate) fn new(timing: &Timing, now: u64) -> Detector {
        let (interval, detect) = (ns(timing.interval), ns(timing.detect));
        Detector {
            missed_ns: interval.saturating_mul(3).min(detect),
            detect_ns: detect,
            stall_ns: ns(timing.stall),
            own_pause_ns: (detect / 2).max(interval.saturating_mul(2)),
            phase: Phase::Waiting,
            connected_before: false,
            last_tick: now,
            heard_at: now,
            base: now,
            excuses: 0,
            gap: Gap::None,
            mine: Progress::default(),
            theirs: None,
            moved_at: now,
            stalled: false,
        }
    }

    /// Whether nothing more will be reported.
    pub(crate) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    fn heard(&mut self, now: u64) -> Option<LinkEvent> {
        let silent_ns = now.saturating_sub(self.heard_at);
        self.heard_at = now;
        self.base = now;
        self.excuses = 0;
        let was = std::mem::replace(&mut self.gap, Gap::None);
        (was != Gap::None).then_some(LinkEvent {
            at_ns: now,
            kind: LinkEventKind::Heard { silent_ns },
        })
    }

    /// Takes what was seen; at most one event comes of it.
    ///
    /// Everything readable is taken in before [`Detector::tick`] is asked: a host that was
    /// stopped itself finds the peer's heartbeats in its socket, and must not call it silent.
    pub(crate) fn input(&mut self, now: u64, input: Input) -> Option<LinkEvent> {
        if self.is_over() {
            return None;
        }
        let event = |kind| Some(LinkEvent { at_ns: now, kind });
        match input {
            Input::Connected => {
                let again = std::mem::replace(&mut self.connected_before, true);
                if self.phase == Phase::Waiting {
                    self.phase = Phase::Watching;
                    (self.heard_at, self.base, self.last_tick, self.moved_at) =
                        (now, now, now, now);
                }
                event(LinkEventKind::Up { again })
            }
            Input::Alive(theirs) => {
                let before = self.theirs.replace(theirs);
                if before.is_none_or(|b| epochs(&b) != epochs(&theirs)) {
                    self.moved(now);
                }
                self.heard(now)
            }
            Input::Goodbye => {
                self.phase = Phase::Over;
                event(LinkEventKind::Goodbye)
            }
            Input::Ended => {
                self.phase = Phase::Over;
                event(LinkEventKind::DeathNotice)
            }
            Input::Broken(reason) => event(LinkEventKind::Broken { reason }),
        }
    }

    fn moved(&mut self, now: u64) {
        self.moved_at = now;
        self.stalled = false;
    }

    /// Looks at the clock. Called after everything readable was taken in; call it again until
    /// it returns `None`.
    pub(crate) fn tick(&mut self, now: u64, mine: Progress) -> Option<LinkEvent> {
        let pause = now.saturating_sub(self.last_tick);
        self.last_tick = now;
        if self.phase != Phase::Watching {
            return None;
        }
        if pause > self.own_pause_ns {
            self.excuse(now, pause);
        }
        if epochs(&self.mine) != epochs(&mine) {
            self.moved(now);
        }
        self.mine = mine;
        self.silence(now).or_else(|| self.stall(now))
    }

    /// This host itself did not run: what it did not hear meanwhile proves little. Silence is put
    /// off by half the detection time, a few times at most, so that a host that keeps
    /// stumbling still notices a peer that is gone.
    fn excuse(&mut self, now: u64, pause: u64) {
        self.moved_at = self.moved_at.saturating_add(pause).min(now);
        if self.excuses < MAX_EXCUSES {
            self.excuses += 1;
            self.base = self.base.max(now.saturating_sub(self.detect_ns / 2));
        }
    }

    fn silence(&mut self, now: u64) -> Option<LinkEvent> {
        let silent_ns = now.saturating_sub(self.heard_at);
        let counted = now.saturating_sub(self.base);
        let kind = if counted >= self.detect_ns && self.gap < Gap::Silent {
            self.gap = Gap::Silent;
            LinkEventKind::Silence { silent_ns }
        } else if counted >= self.missed_ns && self.gap < Gap::Missed {
            self.gap = Gap::Missed;
            LinkEventKind::Missed { silent_ns }
        } else {
            return None;
        };
        Some(LinkEvent { at_ns: now, kind })
    }

    fn stall(&mut self, now: u64) -> Option<LinkEvent> {
        let theirs = self.theirs?;
        if !(self.mine.pending || theirs.pending) {
            self.moved(now);
            return None;
        }
        let idle_ns = now.saturating_sub(self.moved_at);
        // A silent peer is reported as silent.
        if self.stalled || self.gap == Gap::Silent || idle_ns < self.stall_ns {
            return None;
        }
        self.stalled = true;
        let mine = self.mine;
        Some(LinkEvent {
            at_ns: now,
            kind: LinkEventKind::Stall {
                idle_ns,
                mine,
                theirs,
            },
        })
    }

    /// When the next silence is due, if one can be.
    pub(crate) fn silence_due(&self) -> Option<u64> {
        (self.phase == Phase::Watching && self.gap < Gap::Silent)
            .then(|| self.base.saturating_add(self.detect_ns))
    }
}

#[cfg(test)]
mod tests;
