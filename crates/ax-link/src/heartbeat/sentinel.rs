//! The handle of the sentinel: starting, handing it a connection, saying goodbye.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use ax_wire::Session;
use ax_wire::heartbeat::Progress;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use parking_lot::Mutex;

use super::watch::{self, Watch};
use super::{LinkEvent, LinkEventKind, ProgressSource, Timing};
use crate::stream::Parts;
use crate::{Connector, LinkError, Stream};

/// How the liveness connection comes to be.
#[derive(Clone, Debug)]
pub enum Line {
    /// This side dials, and dials again after a [`LinkEventKind::Broken`].
    Dial(Connector),
    /// The peer dials; every heartbeat channel accepted for this session is given to
    /// [`Sentinel::attach`].
    Await,
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
}

/// Watches one peer for one session; see the module's story.
///
/// Dropping it ends the watch without a goodbye: to the peer that is a death. A planned end
/// calls [`Sentinel::goodbye`].
pub struct Sentinel {
    shared: Arc<Shared>,
    wake: EventFd,
    handoff: Mutex<(OwnedFd, Sender<Parts>)>,
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
        let (parts_in, parts) = channel();
        let (events_in, events_out) = channel();
        let (ready_in, ready) = channel();
        let shared = Arc::new(Shared::default());
        let line = match line {
            Line::Dial(connector) => Line::Dial(connector.frozen()),
            Line::Await => Line::Await,
        };
        let start = watch::Start {
            session,
            timing,
            line,
            progress: progress.clone(),
            events: events_in,
            shared: shared.clone(),
            parts,
            wake: wake.as_raw_fd(),
            handoff: theirs.as_raw_fd(),
        };
        let spawn = |source| LinkError::System {
            what: "start the sentinel",
            source,
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
            handoff: Mutex::new((ours, parts_in)),
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

    /// Gives the thread an accepted heartbeat channel; it replaces the one before. The socket
    /// leaves the process's file table, so no duplicate of it may be kept.
    ///
    /// # Errors
    /// [`LinkError::SentinelEnded`] after a death notice, a goodbye or a failure.
    pub fn attach(&self, stream: Stream) -> Result<(), LinkError> {
        let (sock, parts) = stream.into_parts();
        let handoff = self.handoff.lock();
        let (socket, sender) = &*handoff;
        sender.send(parts).map_err(|_| LinkError::SentinelEnded)?;
        let fds = [sock.as_raw_fd()];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|_| LinkError::SentinelEnded)?;
        // `sock` closes here: the sentinel's copy is the only one left.
        Ok(())
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
