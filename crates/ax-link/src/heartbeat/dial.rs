//! The dialling side's ordinary threads, one per path: a dead path holds up neither the others nor the
//! sentinel. They dial when the sentinel wants a connection and hand it over; sockets are in the process's
//! file table only until then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use ax_wire::Session;
use ax_wire::channel::{Channel, Preamble};
use ax_wire::heartbeat::Beat;

use super::ProgressSource;
use super::handoff::Handoff;
use super::sentinel::{RUN, Shared};
use super::wire::Wire;
use crate::Connector;

/// Limit of one attempt.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Pauses between attempts.
const BACKOFF: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(250)];

const IDLE: u8 = 0;
const WANTED: u8 = 1;
/// On its way to the sentinel.
const HANDED: u8 = 2;

/// What the sentinel wants of one path's thread.
#[derive(Default)]
pub(super) struct Order(AtomicU8);

impl Order {
    /// A connection is wanted; true if that is news.
    pub(super) fn want(&self) -> bool {
        let set =
            |from, to| (self.0).compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        set(IDLE, WANTED).is_ok()
    }

    /// It has come.
    pub(super) fn have(&self) {
        self.0.store(IDLE, Ordering::Release);
    }
}

/// One path's thread, as the sentinel knows it.
pub(super) struct Dialler {
    pub(super) order: Arc<Order>,
    pub(super) thread: Thread,
}

/// What such a thread works with.
pub(super) struct Dialling {
    pub(super) path: usize,
    pub(super) connector: Connector,
    pub(super) session: Session,
    pub(super) progress: Arc<dyn ProgressSource>,
    pub(super) handoff: Arc<Handoff>,
    pub(super) shared: Arc<Shared>,
}

impl Dialling {
    /// Starts the thread. It ends by itself, soon after the sentinel has.
    pub(super) fn start(self) -> std::io::Result<Dialler> {
        let order = Arc::new(Order::default());
        let its = Arc::clone(&order);
        let thread = std::thread::Builder::new()
            .name("ax-dial".into())
            .spawn(move || self.run(&its))?;
        Ok(Dialler {
            order,
            thread: thread.thread().clone(),
        })
    }

    fn is_over(&self) -> bool {
        self.shared.command.load(Ordering::Acquire) != RUN
            || self.shared.over.load(Ordering::Acquire)
    }

    fn session_now(&self) -> Session {
        Session {
            generation: self.progress.generation(),
            ..self.session
        }
    }

    fn run(self, order: &Order) {
        let [first, most] = BACKOFF;
        let mut pause = first;
        while !self.is_over() {
            if order.0.load(Ordering::Acquire) != WANTED {
                std::thread::park();
                continue;
            }
            let preamble = Preamble::of(Channel::Heartbeat, self.session_now());
            let opened = self
                .connector
                .open_until(preamble, Instant::now() + ATTEMPT);
            match opened {
                Ok(stream) if self.is_over() => {
                    // The peer has it already: its end must not read as a death.
                    if let Ok(wire) = Wire::new(stream) {
                        wire.give_up(&Beat::Broken(self.session_now()));
                    }
                    return;
                }
                Ok(stream) => {
                    pause = first;
                    order.0.store(HANDED, Ordering::Release);
                    if self.handoff.dialled(self.path, stream).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    // A listener that does not know the session yet refuses; it may know it soon.
                    tracing::trace!(%error, "heartbeats: dialling");
                    std::thread::park_timeout(pause);
                    pause = (pause * 2).min(most);
                }
            }
        }
    }
}
