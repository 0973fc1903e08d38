//! The primary's engine: initial copy, capture, ship, commit.
//!
//! One thread, the caller of [`PrimaryEngine::run`], pauses, captures and writes the forward
//! connection; a second reads the backward connection, commits epochs and releases their outputs.
//! The guest runs while an epoch is shipped; up to [`PrimaryConfig::in_flight`] epochs may be
//! unacknowledged, each kept in its slot so that it can be sent again after a reconnection.

mod acks;
mod capture;
mod handle;
mod run;
mod sent;
mod ship;
mod sync;
mod traced;

use std::sync::Arc;

use ax_wire::resync::Ask;
use ax_wire::stream::Refusal;
use ax_wire::{EpochId, Incarnation, Session};
use io_barrier::{Barrier, Clock, RxCounts, SealError};

use crate::guest::{Guest, GuestError, Page};
use crate::link::LinkError;
use crate::policy::Policy;
use crate::shadow::CommittedState;
use crate::stats::Parts;

use capture::Slot;
use handle::Shared;
pub use handle::{PrimaryHandle, PrimaryProgress};
use sent::{Sent, SentState};

/// What besides memory and machine state belongs to an epoch. Called from the epoch thread.
pub trait EpochSource: Send {
    /// The disks' initial copy begins (again): what differs from the shadow's is to be found and sent.
    fn restart_sync(&mut self) -> Result<(), GuestError>;

    /// The next question to the shadow about its disks, if one is due. There are never more unanswered
    /// than this side has room for the answers of.
    fn sync_ask(&mut self) -> Option<Ask> {
        None
    }

    /// The shadow's answer to the oldest unanswered question. False when it is none: the peer is hostile
    /// or broken.
    fn sync_answered(&mut self, _payload: &[u8]) -> bool {
        false
    }

    /// Replaces `records` by the next piece of the disks' initial copy, as disk records; true once
    /// nothing of it is left. What the guest writes is among them from the beginning of the copy on.
    fn sync_step(&mut self, records: &mut Vec<u8>) -> Result<bool, GuestError>;

    /// How far the disks' initial copy has come.
    fn sync_progress(&self) -> DiskSync {
        DiskSync::default()
    }

    /// Bytes of disk records in the open epoch, for the running count (rule 2).
    fn disk_bytes(&self) -> usize;

    /// Ends the open epoch, `epoch`: `records` is replaced by its disk records (swap buffers, do not
    /// allocate). The guest is paused and nothing of the capture can fail any more.
    fn seal(&mut self, epoch: EpochId, records: &mut Vec<u8>);

    /// Received frames the guest has been given so far, per network device (rule 7). The guest is
    /// paused.
    fn rx_given(&self) -> RxCounts;
}

/// How far the disks' initial copy has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskSync {
    /// Bytes of the disks that are equal on both sides, or sent.
    pub done: u64,
    /// Bytes of the disks.
    pub total: u64,
    /// Bytes whose content was compared.
    pub compared: u64,
    /// Bytes that travelled either way for it.
    pub moved: u64,
}

/// What the engine tells while it runs. Quick, non-blocking.
pub trait PrimaryEvents: Send + Sync {
    /// The initial copy: bytes of memory sent and of disks found equal or sent so far, and in all as far as
    /// that is known.
    fn copying(&self, _sent: u64, _total: u64) {}

    /// The rest is small enough for one epoch; from the return on outputs must be held (rule 22; the
    /// engine makes sure of it).
    fn copy_done(&self) {}

    /// The shadow acknowledged its first whole epoch, with disks in sync. From the reading thread.
    fn confirmed(&self, _epoch: EpochId) {}

    /// An epoch is committed and its outputs were offered for release. From the reading thread.
    fn committed(&self, _epoch: EpochId) {}

    /// The shadow has applied the epochs up to this one, which is committed, to memory and disks. From the
    /// reading thread.
    fn applied(&self, _epoch: EpochId) {}

    /// The shadow's disks are durable up to this epoch, which is committed. From the reading thread.
    fn durable(&self, _epoch: EpochId) {}

    /// A capture failed and was undone (I6); the engine tries again.
    fn capture_failed(&self, _error: &CaptureError) {}
}

/// Tells nobody.
impl PrimaryEvents for () {}

/// Where the shadow stands when the engine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It has nothing: copy everything; the first epoch is the one after this (I5).
    FullCopy {
        /// Last epoch of this guest's life so far.
        after: EpochId,
    },
    /// It has exactly this committed epoch (roles swapped by a planned failover, rule 25). Dirty
    /// tracking must have been on since the guest left that epoch.
    Synced {
        /// The epoch.
        at: EpochId,
    },
}

/// How an engine works.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// What this side's frames carry.
    pub session: Session,
    /// The shadow's process: frames of another are refused.
    pub shadow: Incarnation,
    /// Where the shadow stands.
    pub start: Start,
    /// When epochs end.
    pub policy: Policy,
    /// Epochs that may be unacknowledged (at least 1).
    pub in_flight: usize,
    /// Bytes of pages one slot holds. An epoch with more is shipped with the guest paused.
    pub slot_bytes: usize,
    /// Bytes of machine state one slot holds.
    pub state_bytes: usize,
    /// Bytes of held output a slot has room for without growing (the barrier's bound per epoch).
    pub output_bytes: usize,
    /// Every so many epochs a digest of the whole RAM travels along; 0 never.
    pub verify_every: u64,
    /// Outputs leave at once, each while a lease of so many nanoseconds from an acknowledgement lasts
    /// (rule 28: disks are mirrored, nothing else); none: they wait for their epoch's acknowledgement.
    pub lease_ns: Option<u64>,
    /// Initial copy: rounds before the rest is sent as an epoch whatever its size.
    pub copy_rounds: u32,
    /// Initial copy: dirty pages that are few enough for an epoch.
    pub copy_rest: usize,
}

impl PrimaryConfig {
    /// The defaults for this pair of processes.
    pub fn new(session: Session, shadow: Incarnation, start: Start) -> PrimaryConfig {
        PrimaryConfig {
            session,
            shadow,
            start,
            policy: Policy::default(),
            in_flight: 2,
            slot_bytes: 12 << 20,
            state_bytes: 1 << 20,
            output_bytes: 1 << 20,
            verify_every: 0,
            lease_ns: None,
            copy_rounds: 20,
            copy_rest: 1024,
        }
    }
}

/// Why an epoch was not captured. The guest runs on and nothing is lost (I6).
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The guest's machine failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The outputs could not be closed.
    #[error("closing the epoch's outputs: {0}")]
    Seal(#[from] SealError),
}

/// A refusal in words.
fn said(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Broken => "a frame or an epoch failed a check",
        Refusal::Session => "it belongs to another session",
        Refusal::Diverged => "its memory differs",
        Refusal::Failed => "its own machine or disk failed",
    }
}

/// Why [`PrimaryEngine::run`] returned without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum PrimaryError {
    /// The connection is gone or was broken: connect again within the detection time and call `run`
    /// again; unacknowledged epochs are sent again (rule 10).
    #[error("epoch stream: {0}")]
    Link(#[from] LinkError),
    /// The shadow refused the stream. [`Refusal::Broken`] is as a broken link.
    #[error("the shadow ended the epoch stream: {}", said(*.0))]
    Refused(Refusal),
    /// The shadow does not stand where this engine left it: it needs a new initial copy. If it was
    /// never confirmed, `run` makes one once outputs pass again ([`Barrier::pass`]; the record still
    /// says alone); otherwise it is lost.
    #[error("the shadow stands at {shadow:?}; this primary can go on from {from:?} to {to:?} only")]
    OutOfStep {
        /// Where it says it stands.
        shadow: Option<EpochId>,
        /// Last epoch known acknowledged.
        from: EpochId,
        /// Last epoch captured.
        to: EpochId,
    },
    /// Captures keep failing; each was undone and the guest runs.
    #[error("capturing an epoch: {0}")]
    Capture(#[from] CaptureError),
    /// The guest could not go on after a capture.
    #[error("resuming the guest: {0}")]
    Resume(#[source] GuestError),
}

/// How a run ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// [`PrimaryHandle::stop`] was called.
    Stopped,
    /// The final epoch was acknowledged; the guest stays paused (rule 25).
    Final {
        /// Its number.
        epoch: EpochId,
    },
}

/// The primary's engine. Lives as long as this process protects its guest by one shadow process;
/// connections come and go ([`PrimaryEngine::run`]).
pub struct PrimaryEngine<G, S> {
    config: PrimaryConfig,
    guest: G,
    source: S,
    events: Arc<dyn PrimaryEvents>,
    shared: Arc<Shared>,
    /// The number of the open epoch.
    next: EpochId,
    tracking: bool,
    /// When the guest was parked, while it is.
    parked_since: Option<u64>,
    /// The epoch after whose capture it stays paused until the acknowledgement.
    stays: Option<EpochId>,
    /// That epoch is the final one.
    is_final: bool,
    resumed: u64,
    /// What the last pause cost the guest, nanoseconds; nothing if it was idle.
    paused_for: u64,
    /// When the last pause began, until the next one: only then its end is known.
    uncounted_pause: Option<u64>,
    /// When each part of that pause ended.
    ends: Parts<u64>,
    /// What its record in the trace needs besides.
    traced: traced::Traced,
    estimate: usize,
    estimated: u64,
    failures: u32,
    /// What the shadow has of the pages sent last.
    sent: Sent,
    /// The machine's state as it was sent last.
    sent_state: SentState,
    scratch: Vec<u8>,
    pages: Vec<Page>,
    received: Vec<u8>,
}

impl<G: Guest, S: EpochSource> PrimaryEngine<G, S> {
    /// An engine and the handle by which other threads reach it. Allocates every buffer.
    pub fn new(
        config: PrimaryConfig,
        guest: G,
        source: S,
        events: Arc<dyn PrimaryEvents>,
        barrier: Arc<Barrier>,
        clock: Arc<dyn Clock>,
    ) -> (PrimaryEngine<G, S>, PrimaryHandle) {
        let total = guest.ram().iter().map(|r| r.pages).sum::<u64>() as usize;
        let slots = (0..config.in_flight.max(1))
            .map(|_| Slot::new(&config, total))
            .collect();
        let after = match config.start {
            Start::FullCopy { after } => after,
            Start::Synced { at } => at,
        };
        let confirmed = matches!(config.start, Start::Synced { .. });
        let shared = Arc::new(Shared::new(
            &config, slots, after, confirmed, barrier, clock,
        ));
        let engine = PrimaryEngine {
            guest,
            source,
            events,
            shared: Arc::clone(&shared),
            next: after.next(),
            tracking: confirmed,
            parked_since: None,
            stays: None,
            is_final: false,
            resumed: shared.clock.now_ns(),
            paused_for: 0,
            uncounted_pause: None,
            ends: Parts::default(),
            traced: traced::Traced::default(),
            estimate: 0,
            estimated: 0,
            failures: 0,
            sent: Sent::new(sent::KEPT.min(total)),
            sent_state: SentState::new(config.state_bytes),
            scratch: Vec::with_capacity(ship::CHUNK_BYTES),
            pages: Vec::with_capacity(total),
            received: Vec::with_capacity(handle::RECEIVED_BYTES),
            config,
        };
        (engine, PrimaryHandle { shared })
    }

    /// Lets a guest go on that this engine left paused (final epoch, or an epoch larger than its slot
    /// when the link was lost). Call it only when the guest may run here.
    ///
    /// # Errors
    /// The guest could not be resumed.
    pub fn unpark(&mut self) -> Result<(), GuestError> {
        if self.parked_since.take().is_some() {
            (self.stays, self.is_final) = (None, false);
            self.guest.resume()?;
            self.resumed = self.shared.clock.now_ns();
            self.shared.barrier.resumed();
        }
        Ok(())
    }

    /// The last committed epoch's machine state, while its slot still has it: after
    /// [`Ended::Final`] it always does. What this process can be a shadow from (rule 25) once roles
    /// have swapped.
    pub fn last_committed(&self) -> Option<CommittedState> {
        let flow = self.shared.flow.lock();
        let slot = flow.free.iter().find(|slot| slot.epoch == flow.acked)?;
        Some(CommittedState {
            epoch: slot.epoch,
            state: slot.state.clone(),
            arrived_ns: slot.resumed_ns,
            rx_given: slot.rx_given,
        })
    }

    /// True while the guest is paused by this engine.
    pub fn is_parked(&self) -> bool {
        self.parked_since.is_some()
    }

    /// Ends protection: dirty tracking stops and the guest and the source come back. A parked guest
    /// stays parked.
    ///
    /// # Errors
    /// Dirty tracking could not be stopped; the parts come back all the same.
    pub fn into_parts(mut self) -> (G, S, Result<(), GuestError>) {
        let stopped = if self.tracking {
            self.guest.track_dirty(false)
        } else {
            Ok(())
        };
        (self.guest, self.source, stopped)
    }
}
