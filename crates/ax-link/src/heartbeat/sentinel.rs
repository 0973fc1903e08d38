//! The handle of the sentinel: starting, handing it a connection, saying goodbye.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use ax_wire::Session;
use ax_wire::heartbeat::Progress;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use parking_lot::Mutex;

use super::dial::Dialling;
use super::handoff::Handoff;
use super::paths::{MAX_PATHS, PathState};
use super::watch::{self, Watch};
use super::{LinkEvent, LinkEventKind, ProgressSource, Timing};
use crate::{Connector, LinkError, Stream};

/// How the liveness connections come to be: one for each path.
#[derive(Clone, Debug)]
pub enum Line {
    /// This side dials each path of the connector, and again whenever its connection is lost.
    Dial(Connector),
    /// The peer dials; every heartbeat channel accepted for this session is given to
    /// [`Sentinel::attach`].
    Await,
}

/// One path to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathView {
    /// The awaiting side's address on it: both sides name the path by that.
    pub address: IpAddr,
    /// How it is.
    pub state: PathState,
}

/// Who is told. Called from an ordinary thread, one event at a time.
pub trait LinkEvents: Send + 'static {
    /// Something about the peer. It should hand the event on and return: the next one waits.
    fn event(&self, event: LinkEvent);
}

impl<F: Fn(LinkEvent) + Send + 'static> LinkEvents for F {
    fn event(&self, event: LinkEvent) {
        self(event);
    }
}

/// What the peer last said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerView {
    /// Its session; the generation is the one it runs under now.
    pub session: Session,
    /// How far it has come.
    pub progress: Progress,
    /// When this was heard, CLOCK_BOOTTIME ns.
    pub heard_at_ns: u64,
}

pub(super) const RUN: u8 = 0;
pub(super) const STOP: u8 = 1;
pub(super) const GOODBYE: u8 = 2;

/// What the handle and the thread share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) command: AtomicU8,
    pub(super) peer: Mutex<Option<PeerView>>,
    /// The thread has ended.
    pub(super) over: AtomicBool,
    paths: [AtomicU8; MAX_PATHS],
}

impl Shared {
    pub(super) fn set_path(&self, path: usize, state: PathState) {
        if let Some(at) = self.paths.get(path) {
            at.store(state as u8, Ordering::Release);
        }
    }

    fn path(&self, path: usize) -> PathState {
        let at = self.paths.get(path).map(|at| at.load(Ordering::Acquire));
        let all = [PathState::Up, PathState::Lost];
        let known = all.into_iter().find(|state| at == Some(*state as u8));
        known.unwrap_or_default()
    }
}

/// What the present state of each path is read from, by any thread.
#[derive(Clone)]
pub struct PathViews {
    shared: Arc<Shared>,
    handoff: Arc<Handoff>,
}

impl std::fmt::Debug for PathViews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.now()).finish()
    }
}

impl PathViews {
    /// Every path, by number.
    pub fn now(&self) -> Vec<PathView> {
        let paths = self.handoff.paths().into_iter().enumerate();
        let view = |(path, address)| PathView {
            address,
            state: self.shared.path(path),
        };
        paths.map(view).collect()
    }
}

/// Watches one peer for one session; see the module's story.
///
/// Dropping it ends the watch without a goodbye: to the peer that is a death. A planned end
/// calls [`Sentinel::goodbye`].
pub struct Sentinel {
    shared: Arc<Shared>,
    wake: EventFd,
    handoff: Arc<Handoff>,
    /// Kept here too, so that the thread, in whose table they would mean something else, is
    /// never the one to drop what the source may own.
    _progress: Arc<dyn ProgressSource>,
    threads: Option<(JoinHandle<()>, JoinHandle<()>)>,
}

impl std::fmt::Debug for Sentinel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sentinel")
            .field("peer", &self.peer())
            .finish_non_exhaustive()
    }
}

fn system(what: &'static str) -> impl Fn(nix::errno::Errno) -> LinkError {
    move |e| LinkError::System {
        what,
        source: e.into(),
    }
}

impl Sentinel {
    /// Starts watching. `session` is this side's; its generation is taken from `progress` from
    /// then on. Returns when the thread has its own file table.
    ///
    /// # Errors
    /// The system refuses a thread, a socket pair, or a file table.
    pub fn start(
        session: Session,
        timing: Timing,
        line: Line,
        progress: Arc<dyn ProgressSource>,
        events: impl LinkEvents,
    ) -> Result<Sentinel, LinkError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags).map_err(system("make an eventfd"))?;
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(system("make a socket pair"))?;
        let (handed_in, handed) = channel();
        let (events_in, events_out) = channel();
        let (ready_in, ready) = channel();
        let shared = Arc::new(Shared::default());
        let mut ways = match line {
            // A disk that hangs does not keep a connection from being made anew.
            Line::Dial(connector) => connector.frozen().each(),
            Line::Await => Vec::new(),
        };
        ways.truncate(MAX_PATHS);
        let addresses = ways.iter().map(|(peer, _)| peer.ip()).collect();
        let handoff = Arc::new(Handoff::new(ours, handed_in, addresses));
        let dial = |(path, (_, connector))| {
            let dialling = Dialling {
                path,
                connector,
                session,
                progress: progress.clone(),
                handoff: handoff.clone(),
                shared: shared.clone(),
            };
            dialling.start()
        };
        let diallers: Result<_, _> = ways.into_iter().enumerate().map(dial).collect();
        let spawn = |source| LinkError::System {
            what: "start the sentinel",
            source,
        };
        let start = watch::Start {
            session,
            timing,
            diallers: diallers.map_err(spawn)?,
            progress: progress.clone(),
            events: events_in,
            shared: shared.clone(),
            handed,
            wake: wake.as_raw_fd(),
            handoff: theirs.as_raw_fd(),
        };
        let watcher = std::thread::Builder::new()
            .name("ax-sentinel".into())
            .spawn(move || match Watch::begin(start) {
                Ok(watch) => {
                    // Only a caller that gave up would not listen.
                    let _ = ready_in.send(Ok(()));
                    watch.run();
                }
                Err(source) => {
                    let _ = ready_in.send(Err(source));
                }
            })
            .map_err(spawn)?;
        let started = ready
            .recv()
            .unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
        // The thread has its copy of `theirs`, or has ended.
        drop(theirs);
        if let Err(source) = started {
            let _ = watcher.join();
            return Err(LinkError::System {
                what: "give the sentinel a file table of its own",
                source,
            });
        }
        let peer = session.pair;
        let relay = std::thread::Builder::new()
            .name("ax-link-events".into())
            .spawn(move || relay(&events_out, &peer.to_string(), &events));
        let mut sentinel = Sentinel {
            shared,
            wake,
            handoff,
            _progress: progress,
            threads: None,
        };
        match relay {
            Ok(relay) => sentinel.threads = Some((watcher, relay)),
            Err(source) => {
                sentinel.command(STOP);
                let _ = watcher.join();
                return Err(spawn(source));
            }
        }
        Ok(sentinel)
    }

    /// Gives the thread an accepted heartbeat channel; it replaces the one before of the same path, which
    /// is known by the address it was accepted at. The socket leaves the process's file table, so no duplicate of it may be kept.
    ///
    /// # Errors
    /// [`LinkError::SentinelEnded`] after a death notice, a goodbye or a failure;
    /// [`LinkError::TooManyPaths`].
    pub fn attach(&self, stream: Stream) -> Result<(), LinkError> {
        self.handoff.accepted(stream)
    }

    /// The paths to the peer, to be read while it is watched and after.
    pub fn paths(&self) -> PathViews {
        PathViews {
            shared: self.shared.clone(),
            handoff: self.handoff.clone(),
        }
    }

    /// What the peer last said of itself.
    pub fn peer(&self) -> Option<PeerView> {
        *self.shared.peer.lock()
    }

    /// Tells the peer that this side ends on purpose, waits (50 ms at most) for it to have
    /// heard, and ends the watch. No event is delivered after it returns.
    pub fn goodbye(mut self) {
        self.end(GOODBYE);
    }

    fn command(&self, command: u8) {
        self.shared.command.store(command, Ordering::Release);
        // Fails only when set already.
        let _ = self.wake.write(1);
    }

    fn end(&mut self, command: u8) {
        let Some((watcher, relay)) = self.threads.take() else {
            return;
        };
        self.command(command);
        // Panics were reported by the panic hook; there is nothing to add.
        let _ = watcher.join();
        // A callback may own the sentinel: its thread cannot wait for itself.
        if relay.thread().id() != std::thread::current().id() {
            let _ = relay.join();
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.end(STOP);
    }
}

/// The ordinary thread: logs, and tells the caller.
fn relay(events: &Receiver<LinkEvent>, pair: &str, sink: &impl LinkEvents) {
    for event in events {
        match &event.kind {
            LinkEventKind::Up { again } => tracing::info!(pair, again, "heartbeats: connected"),
            LinkEventKind::Missed { silent_ns } => {
                tracing::debug!(pair, silent_ns, "heartbeats: overdue");
            }
            LinkEventKind::Heard { silent_ns } => {
                tracing::debug!(pair, silent_ns, "heartbeats: heard again");
            }
            LinkEventKind::Silence { silent_ns } => {
                tracing::warn!(pair, silent_ns, "heartbeats: the peer is silent");
            }
            LinkEventKind::Stall {
                idle_ns,
                mine,
                theirs,
            } => {
                tracing::warn!(
                    pair,
                    idle_ns,
                    ?mine,
                    ?theirs,
                    "heartbeats: no epoch goes forward"
                );
            }
            LinkEventKind::Broken { reason } => {
                tracing::warn!(
                    pair,
                    reason,
                    "heartbeats: connection broken, making it anew"
                );
            }
            LinkEventKind::PathLost { path, how } => {
                tracing::warn!(pair, path, ?how, "heartbeats: a path is lost");
            }
            LinkEventKind::PathBack { path } => {
                tracing::info!(pair, path, "heartbeats: a path is back");
            }
            LinkEventKind::DeathNotice => {
                tracing::warn!(pair, "heartbeats: the peer's process has died");
            }
            LinkEventKind::Goodbye => tracing::info!(pair, "heartbeats: the peer ended"),
            LinkEventKind::Failed { reason } => {
                tracing::error!(pair, reason, "heartbeats: cannot watch the peer any more");
            }
        }
        sink.event(event);
    }
}
