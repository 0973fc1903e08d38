//! Which of several paths to the peer works: pure, on a clock given by the caller.
//!
//! The peer sends its heartbeats on every path at the same moment. So a path on which they fail to come
//! while they come on another is lost, and a peer that stands still loses no path: that is the
//! [`detector`](super::detector)'s silence.

use std::time::Duration;

use super::Timing;

/// Paths that a session watches, at most.
pub const MAX_PATHS: usize = 8;

/// How one path to the peer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathState {
    /// Nothing has come by it yet.
    #[default]
    New,
    /// Heartbeats come and go.
    Up,
    /// It worked and does not now.
    Lost,
}

impl PathState {
    /// Heartbeats come and go.
    pub fn works(self) -> bool {
        self == PathState::Up
    }
}

/// How a path was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathLoss {
    /// The peer is heard on another path, and not on this one.
    Silent,
    /// The peer says that it does not hear this side there.
    OneWay,
    /// Its connection ended by an error.
    Broken,
}

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PathEvent {
    /// It is lost.
    Lost(usize, PathLoss),
    /// It works again.
    Back(usize),
}

#[derive(Clone, Copy, Debug, Default)]
struct Path {
    state: PathState,
    /// A connection is open on it.
    open: bool,
    /// When that was opened.
    opened_at: u64,
    heard_at: u64,
    /// Heartbeats that came on another path did not come on this one.
    late: bool,
    /// The peer's word that it hears nothing of this side there.
    deaf: bool,
}

/// The pure part. Times are CLOCK_BOOTTIME ns, never decreasing.
#[derive(Debug)]
pub(crate) struct Paths {
    late_ns: u64,
    again_ns: u64,
    all: [Path; MAX_PATHS],
}

/// How much later than on another path heartbeats may come: a third of the detection time, so that there is
/// time to move before anybody would call the peer silent.
pub(crate) fn late(timing: &Timing) -> Duration {
    (timing.detect / 3)
        .max(timing.interval * 3)
        .min(timing.detect)
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Paths {
    pub(crate) fn new(timing: &Timing) -> Paths {
        Paths {
            late_ns: ns(late(timing)),
            again_ns: ns(timing.detect),
            all: [Path::default(); MAX_PATHS],
        }
    }

    fn others(&self, path: usize) -> impl Iterator<Item = &Path> {
        let all = self.all.iter().enumerate();
        all.filter(move |(i, other)| *i != path && other.open)
            .map(|(_, other)| other)
    }

    /// Whether the peer was heard on another path just now: an error on this one is not its death.
    pub(crate) fn another_works(&self, path: usize, now: u64) -> bool {
        let heard = |other: &Path| now.saturating_sub(other.heard_at) < self.late_ns;
        self.others(path).any(heard)
    }

    pub(crate) fn state(&self, path: usize) -> PathState {
        self.all.get(path).map_or(PathState::New, |path| path.state)
    }

    /// What the peer is to be told on this path: that nothing of it comes there.
    pub(crate) fn is_deaf(&self, path: usize) -> bool {
        self.all.get(path).is_some_and(|path| path.late)
    }

    /// Whether a new connection should be made on this path.
    pub(crate) fn wants_dialling(&self, path: usize, now: u64) -> bool {
        self.all.get(path).is_some_and(|path| {
            let old = now.saturating_sub(path.opened_at) >= self.again_ns;
            !path.open || (path.state == PathState::Lost && old)
        })
    }

    /// A connection is open on it.
    pub(crate) fn opened(&mut self, path: usize, now: u64) {
        if let Some(path) = self.all.get_mut(path) {
            (path.open, path.opened_at) = (true, now);
            (path.late, path.deaf) = (false, false);
        }
    }

    /// Its connection has ended by an error. Of the only path that is no news: it is made anew, or the peer
    /// is silent.
    pub(crate) fn closed(&mut self, path: usize) -> Option<PathEvent> {
        let alone = self.others(path).next().is_none();
        let at = self.all.get_mut(path)?;
        (at.open, at.late, at.deaf) = (false, false, false);
        if alone && at.state == PathState::Up {
            at.state = PathState::New;
        }
        self.lose(path, PathLoss::Broken)
    }

    fn lose(&mut self, path: usize, how: PathLoss) -> Option<PathEvent> {
        let at = self.all.get_mut(path)?;
        (at.state == PathState::Up).then(|| {
            at.state = PathState::Lost;
            PathEvent::Lost(path, how)
        })
    }

    /// A heartbeat came on it; `deaf` is what the peer says there.
    pub(crate) fn heard(&mut self, path: usize, now: u64, deaf: bool) -> Option<PathEvent> {
        let at = self.all.get_mut(path)?;
        (at.heard_at, at.late, at.deaf) = (now, false, deaf);
        if deaf {
            return self.lose(path, PathLoss::OneWay);
        }
        match std::mem::replace(&mut at.state, PathState::Up) {
            PathState::Lost => Some(PathEvent::Back(path)),
            PathState::New | PathState::Up => None,
        }
    }

    /// Compares the paths. Call it after everything readable was taken in, until it returns `None`.
    pub(crate) fn tick(&mut self, now: u64) -> Option<PathEvent> {
        for path in 0..MAX_PATHS {
            let Some(at) = self.all.get(path).filter(|at| at.open && !at.late) else {
                continue;
            };
            let last = at.heard_at.max(at.opened_at);
            let due = last.saturating_add(self.late_ns);
            let came = |other: &Path| !other.deaf && other.heard_at >= due;
            if now < due || !self.others(path).any(came) {
                continue;
            }
            if let Some(at) = self.all.get_mut(path) {
                at.late = true;
            }
            if let Some(event) = self.lose(path, PathLoss::Silent) {
                return Some(event);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
