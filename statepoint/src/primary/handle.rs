//! What other threads see of the primary's engine.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ax_sync::Mutex;
use ax_wire::offload::Packet;
use ax_wire::records::push;
use ax_wire::stream::{FrameKind, MAX_PAYLOAD, Refusal};
use ax_wire::{EpochId, Generation, Incarnation, Session};
use io_barrier::{Barrier, Clock, Gate, Release};

use super::capture::Slot;
use super::{PrimaryConfig, PrimaryError};
use crate::link::{Closer, LinkError};
use crate::stats::{Counters, Reading, Snapshot};
use crate::trace::Trace;
use crate::trigger::Trigger;

/// Received frames waiting to be forwarded, bytes: one frame of the stream.
pub(super) const RECEIVED_BYTES: usize = MAX_PAYLOAD;

/// An epoch captured and not acknowledged.
#[derive(Debug)]
pub(super) struct Flight {
    pub epoch: EpochId,
    /// Taken before its last byte was sent: an acknowledgement permits release from here on.
    pub stamp_ns: u64,
    pub resumed_ns: u64,
    /// Number of its record in the trace.
    pub record: u64,
    /// Its content, to be sent again after a reconnection; away while it is being sent.
    pub slot: Option<Slot>,
}

/// Why the reading thread ended.
#[derive(Debug)]
pub(super) enum Failure {
    Link(LinkError),
    Refused(Refusal),
}

impl From<Failure> for PrimaryError {
    fn from(failure: Failure) -> PrimaryError {
        match failure {
            Failure::Link(error) => PrimaryError::Link(error),
            Failure::Refused(refusal) => PrimaryError::Refused(refusal),
        }
    }
}

#[derive(Debug)]
pub(super) struct Flow {
    pub free: Vec<Slot>,
    pub flying: VecDeque<Flight>,
    pub acked: EpochId,
    pub acked_stamp_ns: u64,
    pub failure: Option<Failure>,
}

/// The question of rule 24 on its way.
#[derive(Debug, Default)]
pub(super) struct Question {
    pub wanted: bool,
    pub nonce: u64,
    /// When the question with `nonce` was sent, while its answer is awaited.
    pub stamp_ns: Option<u64>,
}

/// What the shadow says of its disks during the initial copy.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// What its next answers have to be, oldest question first.
    pub due: VecDeque<FrameKind>,
    /// Answers that have come.
    pub come: VecDeque<Vec<u8>>,
}

pub(super) struct Shared {
    pub trigger: Trigger,
    pub barrier: Arc<Barrier>,
    pub clock: Arc<dyn Clock>,
    pub made_ns: u64,
    pub counters: Counters,
    pub trace: Trace,
    /// First record of the trace whose outputs have not all left.
    pub unreleased: AtomicU64,
    pub flow: Mutex<Flow>,
    pub question: Mutex<Question>,
    pub answers: Mutex<Answers>,
    pub received: Mutex<Vec<u8>>,
    pub session: Session,
    pub shadow: Incarnation,
    pub generation: AtomicU64,
    pub connected: AtomicBool,
    pub stop: AtomicBool,
    pub last: AtomicBool,
    pub asked: AtomicBool,
    /// A dirty ring was why.
    pub ring_full: AtomicBool,
    /// The epoch thread waits for an acknowledgement or a release: only then is it woken by one.
    pub hungry: AtomicBool,
    pub confirmed: AtomicBool,
    /// The whole RAM is being digested, which takes as long as it is large.
    pub verifying: AtomicBool,
    /// Last epoch with a digest, which the shadow compares as it applies it.
    pub verified: AtomicU64,
    pub captured: AtomicU64,
    pub shipped: AtomicU64,
    pub acked: AtomicU64,
    pub applied: AtomicU64,
    pub durable: AtomicU64,
    pub close: Mutex<Option<Closer>>,
}

impl Shared {
    pub fn new(
        config: &PrimaryConfig,
        slots: Vec<Slot>,
        after: EpochId,
        confirmed: bool,
        barrier: Arc<Barrier>,
        clock: Arc<dyn Clock>,
    ) -> Shared {
        Shared {
            trigger: Trigger::default(),
            barrier,
            made_ns: clock.now_ns(),
            clock,
            counters: Counters::default(),
            trace: Trace::default(),
            unreleased: AtomicU64::new(1),
            flow: Mutex::new(Flow {
                flying: VecDeque::with_capacity(slots.len()),
                free: slots,
                acked: after,
                acked_stamp_ns: 0,
                failure: None,
            }),
            question: Mutex::default(),
            answers: Mutex::default(),
            received: Mutex::new(Vec::with_capacity(RECEIVED_BYTES)),
            session: config.session,
            shadow: config.shadow,
            generation: AtomicU64::new(config.session.generation.0),
            connected: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            last: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            ring_full: AtomicBool::new(false),
            hungry: AtomicBool::new(false),
            confirmed: AtomicBool::new(confirmed),
            verifying: AtomicBool::new(false),
            verified: AtomicU64::new(0),
            captured: AtomicU64::new(after.0),
            shipped: AtomicU64::new(after.0),
            acked: AtomicU64::new(after.0),
            applied: AtomicU64::new(after.0),
            durable: AtomicU64::new(after.0),
            close: Mutex::new(None),
        }
    }

    /// The session frames carry now.
    pub fn current_session(&self) -> Session {
        Session {
            generation: Generation(self.generation.load(Ordering::Acquire)),
            ..self.session
        }
    }

    /// Epochs ≤ `epoch` are staged whole on the shadow: frees their slots and returns the stamp from
    /// which the permission counts; none when that was known already.
    ///
    /// # Errors
    /// An epoch that was never shipped.
    pub fn commit(&self, epoch: EpochId) -> Result<Option<u64>, ()> {
        let now = self.clock.now_ns();
        let mut flow = self.flow.lock();
        if epoch.0 > self.shipped.load(Ordering::Acquire) {
            return Err(());
        }
        if epoch <= flow.acked {
            return Ok(None);
        }
        while flow.flying.front().is_some_and(|f| f.epoch <= epoch) {
            if let Some(flight) = flow.flying.pop_front() {
                self.counters
                    .commit
                    .record(now.saturating_sub(flight.resumed_ns));
                self.trace_acked(&flight, now);
                flow.acked_stamp_ns = flight.stamp_ns;
                flow.free.extend(flight.slot);
            }
        }
        flow.acked = epoch;
        self.acked.store(epoch.0, Ordering::Release);
        Ok(Some(flow.acked_stamp_ns))
    }

    /// Offers everything committed for release under a permission that began at `stamp_ns`; asks for
    /// a newer one if it has expired.
    pub fn release(&self, stamp_ns: u64) {
        let acked = EpochId(self.acked.load(Ordering::Acquire));
        if self.barrier.release(acked, stamp_ns) == Release::Expired {
            self.counters.expired.fetch_add(1, Ordering::Relaxed);
            self.ask();
        }
        self.trace_released();
        if self.hungry.swap(false, Ordering::AcqRel) {
            self.trigger.ring();
        }
    }

    /// Has "still my shadow?" asked, unless it is being asked.
    pub fn ask(&self) {
        self.question.lock().wanted = true;
        self.trigger.ring();
    }
}

/// How far the primary has come, for heartbeats and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrimaryProgress {
    /// Last epoch captured.
    pub captured: EpochId,
    /// Last epoch written to the link whole.
    pub shipped: EpochId,
    /// Last epoch acknowledged: committed.
    pub acked: EpochId,
    /// Last epoch the shadow says it has applied.
    pub applied: EpochId,
    /// Last epoch whose disk writes are durable on the shadow's disks.
    pub durable: EpochId,
    /// Age of the oldest held output, nanoseconds; 0 with none.
    pub oldest_held_ns: u64,
}

/// Reaches the engine from other threads. Cheap to clone.
#[derive(Clone)]
pub struct PrimaryHandle {
    pub(super) shared: Arc<Shared>,
}

impl PrimaryHandle {
    /// Wakes the engine: output may be pending. For the barrier's `on_pending`.
    pub fn wake(&self) {
        self.shared.trigger.ring();
    }

    /// Ends the open epoch soon, output or not: a device waits for room, the machine was reset.
    pub fn trigger(&self) {
        self.shared.asked.store(true, Ordering::Release);
        self.shared.trigger.ring();
    }

    /// Ends the open epoch soon: a dirty ring is full.
    pub fn ring_full(&self) {
        self.shared.ring_full.store(true, Ordering::Release);
        self.trigger();
    }

    /// Has the next epoch be the last: the guest stays paused, `run` returns [`super::Ended::Final`]
    /// once it is acknowledged.
    pub fn request_final_epoch(&self) {
        self.shared.last.store(true, Ordering::Release);
        self.shared.trigger.ring();
    }

    /// Takes [`Self::request_final_epoch`] back, if it is not too late.
    pub fn cancel_final_epoch(&self) {
        self.shared.last.store(false, Ordering::Release);
    }

    /// Ends the run and its connections; `run` returns [`super::Ended::Stopped`]. For good.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.disconnect();
    }

    /// Ends the present connection, if any; `run` returns a link error.
    pub fn disconnect(&self) {
        let close = self.shared.close.lock().clone();
        if let Some(close) = close {
            close();
        }
        self.shared.trigger.ring();
    }

    /// The arbiter granted `generation`: later frames carry it, the shadow is told, and what is
    /// committed already is released (call [`Barrier::protect`] first; rule 22, step 4).
    pub fn granted(&self, generation: Generation) {
        self.shared
            .generation
            .fetch_max(generation.0, Ordering::AcqRel);
        self.shared.ask();
    }

    /// Forwards a frame received for network device `nic`, its `seq`-th (from 1), without waiting
    /// (rule 7). Dropped when no shadow listens or there is no room: it is then a frame that only this
    /// host has seen.
    pub fn received(&self, nic: u8, seq: u64, packet: Packet<'_>) {
        if !self.shared.connected.load(Ordering::Acquire) {
            return;
        }
        let record = packet.received(nic, seq);
        if !push(&mut self.shared.received.lock(), record) {
            self.shared
                .counters
                .received_dropped
                .fetch_add(1, Ordering::Relaxed);
        }
        self.shared.trigger.ring();
    }

    /// How far it has come.
    pub fn progress(&self) -> PrimaryProgress {
        let get = |at: &AtomicU64| EpochId(at.load(Ordering::Acquire));
        PrimaryProgress {
            captured: get(&self.shared.captured),
            shipped: get(&self.shared.shipped),
            acked: get(&self.shared.acked),
            applied: get(&self.shared.applied),
            durable: get(&self.shared.durable),
            oldest_held_ns: self.shared.barrier.oldest_held_ns(),
        }
    }

    /// True when something waits for the shadow: output held for an acknowledgement, or an epoch
    /// captured and not acknowledged (rule 9: work pending). Not while either side digests the whole
    /// RAM for the verify mode: of a large guest that may take longer than any stall.
    pub fn work_pending(&self) -> bool {
        let progress = self.progress();
        if self.shared.verifying.load(Ordering::Acquire)
            || self.shared.verified.load(Ordering::Acquire) > progress.applied.0
        {
            return false;
        }
        progress.captured > progress.acked
            || (self.shared.barrier.gate() == Gate::Protected && progress.oldest_held_ns > 0)
    }

    /// Times and counts since the engine was made.
    pub fn stats(&self) -> Snapshot {
        self.reading().since(None)
    }

    /// When the engine was made, nanoseconds of its clock.
    pub fn made_ns(&self) -> u64 {
        self.shared.made_ns
    }

    /// Now by the engine's clock, nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.shared.clock.now_ns()
    }

    /// Every histogram and counter.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What happened in the last epochs.
    pub fn trace(&self) -> &Trace {
        &self.shared.trace
    }

    /// The latest initial copy: bytes of disks compared, and bytes that travelled either way for them.
    pub fn disk_sync(&self) -> (u64, u64) {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (get(&counters.disk_compared), get(&counters.disk_moved))
    }

    /// Times and counts at this moment, to be compared with those of another.
    pub fn reading(&self) -> Reading {
        self.shared.counters.reading()
    }
}
