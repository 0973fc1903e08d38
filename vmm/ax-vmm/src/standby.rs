//! The primary's ready connections: one pair for the epoch stream on every path to the shadow, so that a
//! lost cable costs no more than noticing it.
//!
//! A thread per path keeps a pair open there, with nothing written on it. The stream goes over one pair at a
//! time. When the sentinel says that the path of that one is lost, or the pair ends by an error, the stream
//! goes on over the next: the shadow learns of it by the first word on that pair, ends the one before and
//! says what it has staged (rule 10).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_link::heartbeat::{LinkEvent, LinkEventKind, PathState, PathViews};
use ax_link::{Channel, Connector, Preamble, Stream};
use ax_wire::peer::PeerMessage;
use ax_wire::{Session, Version};
use parking_lot::{Condvar, Mutex};
use statepoint::link::{Closer, PrimaryLink};

use crate::session::{self, SessionError};

/// Limit of one attempt to open a connection.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How often a pair is looked after, and the pause after an attempt that failed.
const LOOK: Duration = Duration::from_millis(100);

/// Both connections of the epoch stream, on one path.
#[derive(Debug)]
pub struct Pair {
    /// Epochs.
    pub forward: Stream,
    /// Acknowledgements.
    pub backward: Stream,
}

impl Pair {
    /// Opens both.
    ///
    /// # Errors
    /// The connection's.
    pub fn open(connector: &Connector, session: Session) -> Result<Pair, SessionError> {
        let until = Instant::now() + ATTEMPT;
        let open = |channel| connector.open_until(Preamble::of(channel, session), until);
        Ok(Pair {
            forward: open(Channel::Forward)?,
            backward: open(Channel::Backward)?,
        })
    }

    /// Whether the shadow still holds the other ends.
    fn is_good(&self) -> bool {
        self.forward.is_established() && self.backward.is_established()
    }

    fn link(self) -> std::io::Result<PrimaryLink> {
        let ends = [self.forward.closer()?, self.backward.closer()?];
        Ok(PrimaryLink {
            version: spoken(&self.forward, &self.backward)?,
            forward: Box::new(self.forward),
            backward: Box::new(self.backward),
            close: Arc::new(move || ends.iter().for_each(ax_link::Closer::close)),
        })
    }
}

/// The one wire version of both connections of a pair.
///
/// # Errors
/// They differ: the other ends are of two builds.
pub fn spoken(forward: &Stream, backward: &Stream) -> std::io::Result<Version> {
    match [forward.version(), backward.version()] {
        [one, other] if one == other => Ok(one),
        [one, other] => Err(std::io::Error::other(format!(
            "one connection speaks wire version {one}, its twin {other}"
        ))),
    }
}

#[derive(Default)]
struct State {
    /// By path.
    ready: Vec<Option<Pair>>,
    /// What the stream goes over, and its end.
    active: Option<(usize, Closer)>,
    stopped: bool,
}

/// The pairs of one session.
pub struct Standbys {
    state: Mutex<State>,
    changed: Condvar,
    ways: Vec<(IpAddr, Connector)>,
    session: Session,
    paths: PathViews,
}

impl std::fmt::Debug for Standbys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Standbys({:?})", self.paths)
    }
}

/// Ends the keeping when it is dropped.
#[derive(Debug)]
pub struct Keeping(pub Arc<Standbys>);

impl std::ops::Deref for Keeping {
    type Target = Arc<Standbys>;

    fn deref(&self) -> &Arc<Standbys> {
        &self.0
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// How one path serves the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The shadow's address on it.
    pub address: IpAddr,
    /// What heartbeats say of it.
    pub state: PathState,
    /// The stream goes over it.
    pub carries: bool,
    /// A pair waits there.
    pub ready: bool,
}

impl Standbys {
    /// Begins to keep a pair ready on each way of `connector`.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(
        connector: &Connector,
        session: Session,
        paths: PathViews,
    ) -> std::io::Result<Keeping> {
        let ways = connector.each().into_iter();
        let ways: Vec<_> = ways.map(|(peer, way)| (peer.ip(), way)).collect();
        let ready = ways.iter().map(|_| None).collect();
        let this = Arc::new(Standbys {
            state: Mutex::new(State {
                ready,
                ..State::default()
            }),
            changed: Condvar::new(),
            ways,
            session,
            paths,
        });
        let this = Keeping(this);
        for path in 0..this.ways.len() {
            let its = Arc::clone(&this);
            std::thread::Builder::new()
                .name("standby".into())
                .spawn(move || its.keep(path))?;
        }
        Ok(this)
    }

    fn state_of(&self, path: usize) -> PathState {
        let now = self.paths.now();
        now.get(path).map_or(PathState::New, |path| path.state)
    }

    /// True if a path other than this works: only then is there something to go to.
    fn another_works(&self, path: usize) -> bool {
        let now = self.paths.now().into_iter().enumerate();
        let mut others = now.filter(|(other, _)| *other != path);
        others.any(|(_, other)| other.state.works())
    }

    /// Keeps a pair ready on a path that is not lost.
    fn keep(&self, path: usize) {
        let Some((_, way)) = self.ways.get(path) else {
            return;
        };
        loop {
            let lost = self.state_of(path) == PathState::Lost;
            let mut state = self.state.lock();
            if state.stopped {
                return;
            }
            let slot = state.ready.get_mut(path);
            let missing = slot.is_some_and(|slot| {
                if lost || !slot.as_ref().is_some_and(Pair::is_good) {
                    *slot = None;
                }
                slot.is_none()
            });
            if lost || !missing {
                self.changed.wait_for(&mut state, LOOK);
                continue;
            }
            drop(state);
            let opened = Pair::open(way, self.session);
            let mut state = self.state.lock();
            match opened {
                Ok(pair) if !state.stopped => {
                    if let Some(slot) = state.ready.get_mut(path) {
                        *slot = Some(pair);
                    }
                    self.changed.notify_all();
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, path, "no standby connection");
                    self.changed.wait_for(&mut state, LOOK);
                }
            }
        }
    }

    /// The stream goes over this pair from now on, until it or its path fails.
    ///
    /// # Errors
    /// The system's.
    pub fn begin(&self, path: usize, pair: Pair) -> std::io::Result<PrimaryLink> {
        let link = pair.link()?;
        self.state.lock().active = Some((path, Arc::clone(&link.close)));
        self.look();
        Ok(link)
    }

    /// The pair that was dialled with the session.
    ///
    /// # Errors
    /// The system's.
    pub fn first(&self, pair: Pair) -> std::io::Result<PrimaryLink> {
        let at = pair.forward.peer_addr().ip();
        let path = self.ways.iter().position(|(address, _)| *address == at);
        self.begin(path.unwrap_or(0), pair)
    }

    /// The next pair, told that the stream goes over it now; waits for one until `until`.
    ///
    /// # Errors
    /// None came.
    pub fn next(&self, until: Instant) -> Result<PrimaryLink, SessionError> {
        let none = || SessionError::Talk("no path to the shadow works".into());
        loop {
            let (path, mut pair) = self.take(until).ok_or_else(none)?;
            match session::send(&mut pair.forward, PeerMessage::Begin) {
                Ok(()) => {
                    tracing::info!(path, "the epoch stream goes over another connection");
                    let begun = self.begin(path, pair);
                    return begun.map_err(|e| SessionError::Talk(e.to_string()));
                }
                Err(error) => tracing::debug!(%error, path, "a standby connection had ended"),
            }
        }
    }

    /// Of what is ready: on a path that works, and rather not on the one that was just left.
    fn take(&self, until: Instant) -> Option<(usize, Pair)> {
        let mut state = self.state.lock();
        let left = state.active.take().map(|(path, _)| path);
        loop {
            let rank = |path: &usize| (self.state_of(*path).works(), Some(*path) != left);
            let ready = state.ready.iter().enumerate();
            let ready = ready.filter(|(_, pair)| pair.as_ref().is_some_and(Pair::is_good));
            let best = ready
                .map(|(path, _)| path)
                .filter(|path| self.state_of(*path) != PathState::Lost)
                .max_by_key(rank);
            let pair = best.and_then(|path| state.ready.get_mut(path)?.take());
            self.changed.notify_all();
            if let (Some(path), Some(pair)) = (best, pair) {
                return Some((path, pair));
            }
            if state.stopped || self.changed.wait_until(&mut state, until).timed_out() {
                return None;
            }
        }
    }

    /// Ends the active pair if its path is lost and another works: the stream's thread goes on over that.
    pub fn look(&self) {
        let active = self.state.lock().active.clone();
        if let Some((path, close)) = active
            && self.state_of(path) == PathState::Lost
            && self.another_works(path)
        {
            close();
        }
    }

    /// The sentinel's word, before anybody else hears it.
    pub fn heard(&self, event: &LinkEvent) {
        if matches!(
            event.kind,
            LinkEventKind::PathLost { .. } | LinkEventKind::PathBack { .. }
        ) {
            self.look();
            self.changed.notify_all();
        }
    }

    /// How each path serves the stream.
    pub fn service(&self) -> Vec<Service> {
        let state = self.state.lock();
        if state.stopped {
            return Vec::new();
        }
        let active = state.active.as_ref().map(|(path, _)| *path);
        let paths = self.paths.now().into_iter().enumerate();
        let service = |(path, view): (usize, ax_link::heartbeat::PathView)| Service {
            address: view.address,
            state: view.state,
            carries: active == Some(path),
            ready: state.ready.get(path).is_some_and(Option::is_some),
        };
        paths.map(service).collect()
    }

    /// Whether the path by which something goes to this address is lost.
    pub fn is_lost(&self, address: IpAddr) -> bool {
        let mut now = self.paths.now().into_iter();
        now.any(|path| path.address == address && path.state == PathState::Lost)
    }

    /// No more pairs are kept; the active one stays as it is.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        state.ready.iter_mut().for_each(|pair| *pair = None);
        self.changed.notify_all();
    }
}
