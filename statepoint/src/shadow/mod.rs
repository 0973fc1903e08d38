//! The shadow's engine: stage whole, check, acknowledge, apply.
//!
//! One thread, the caller of [`ShadowEngine::run`], reads the forward connection and stages epoch
//! N in a preallocated stage. When N is whole and every check has passed it is committed: its
//! outputs are remembered, it is acknowledged, and handed to a second thread that applies it while
//! N+1 is being staged. At most two epochs are staged or being applied; a slow shadow slows the stream.
//!
//! Invariant I2: `run` returns only when every acknowledged epoch is wholly applied, and
//! [`ShadowEngine::committed`] gives nothing when one could not be. The machine state of the last applied
//! epoch is kept apart from the stages, so that what is being received is never what is promoted.

mod apply;
mod backward;
mod receive;
mod stage;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ax_sync::{Condvar, Mutex};
use ax_wire::offload::Packet;
use ax_wire::resync::Ask;
use ax_wire::stream::{FrameError, Refusal, Resume};
use ax_wire::{EpochId, Generation, Incarnation, Session};
use io_barrier::{Clock, ReceivedLog, RxCounts, ShadowOutputs};

use crate::guest::{GuestError, ShadowGuest};
use crate::link::{Closer, FrameReader, LinkError, ShadowLink};

use apply::Stages;
use backward::Backward;
use stage::Stage;

/// What besides memory belongs to an epoch, on the shadow's side.
pub trait ShadowSink: Send {
    /// An initial copy begins: the disks are to be overwritten in part.
    fn begin_sync(&mut self) -> Result<(), GuestError>;

    /// Answers the primary's question about the disks as they are at this place of the initial copy:
    /// replaces `answer` by the payload. False when there is no such thing: the peer is hostile or broken.
    fn asked(&mut self, _ask: &Ask, _answer: &mut Vec<u8>) -> Result<bool, GuestError> {
        Ok(false)
    }

    /// Applies disk records of the initial copy at once.
    fn bulk(&mut self, records: &[u8]) -> Result<(), GuestError>;

    /// The initial copy is as good as over: makes durable what it has written so far, so that little is left
    /// to be done while the guest's outputs are held.
    fn nearly_in_sync(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// A committed epoch's disk records, in order (take the buffer by swapping). May block: that slows
    /// the primary.
    fn committed(&mut self, epoch: EpochId, records: &mut Vec<u8>) -> Result<(), GuestError>;

    /// The first epoch is applied, memory and disks: makes "in sync" true before it is acknowledged
    /// (rule 22, step 2).
    fn in_sync(&mut self, epoch: EpochId, generation: Generation) -> Result<(), GuestError>;

    /// Last epoch whose disk writes are in the images here, as far as that is known.
    fn applied(&self) -> EpochId;

    /// Last epoch whose disk writes are durable here.
    fn durable(&self) -> EpochId;
}

/// What the engine tells while it runs. Quick, non-blocking.
pub trait ShadowEvents: Send + Sync {
    /// Bytes of the initial copy received so far.
    fn copying(&self, _received: u64) {}

    /// The first epoch was acknowledged under this generation: this shadow is in sync (rule 23).
    fn confirmed(&self, _epoch: EpochId, _generation: Generation) {}

    /// A committed epoch is applied; what it let out, as records ([`ax_wire::records`]).
    fn applied(&self, _epoch: EpochId, _outputs: &[u8]) {}

    /// The primary was granted this generation.
    fn granted(&self, _generation: Generation) {}
}

/// Tells nobody.
impl ShadowEvents for () {}

/// How an engine works.
#[derive(Clone, Debug)]
pub struct ShadowConfig {
    /// What the primary's frames carry when the engine begins. Later generations are told in the
    /// stream.
    pub primary: Session,
    /// This process.
    pub me: Incarnation,
    /// Bytes of pages, as they travel, that a stage holds in memory; the rest of a larger epoch goes to
    /// a temporary file in `spill_dir`.
    pub stage_bytes: usize,
    /// Bytes of machine state an epoch may have.
    pub state_bytes: usize,
    /// Bytes of disk records an epoch may have.
    pub disk_bytes: usize,
    /// Bytes of outputs that may be unreleased.
    pub output_bytes: usize,
    /// Bytes of received frames remembered (rule 7).
    pub received_bytes: usize,
    /// Folder for the part of an epoch that does not fit a stage.
    pub spill_dir: PathBuf,
}

impl ShadowConfig {
    /// The defaults for this pair of processes.
    pub fn new(primary: Session, me: Incarnation, spill_dir: PathBuf) -> ShadowConfig {
        ShadowConfig {
            primary,
            me,
            stage_bytes: 13 << 20,
            state_bytes: 1 << 20,
            disk_bytes: 32 << 20,
            output_bytes: 10 << 20,
            received_bytes: 2 << 20,
            spill_dir,
        }
    }
}

/// Oldest received frame given to the guest at promotion, nanoseconds (rule 7).
const RECEIVED_AGE_NS: u64 = 1_000_000_000;

/// Why [`ShadowEngine::run`] returned.
#[derive(Debug, thiserror::Error)]
pub enum ShadowError {
    /// The connection has ended or was broken. What was staged in part is discarded; connect again and
    /// `run` goes on from the last committed epoch (rule 10).
    #[error("epoch stream: {0}")]
    Link(#[from] LinkError),
    /// An epoch that is not the next, not whole or not as it says.
    #[error("epoch {epoch}: {what}")]
    Epoch {
        /// Its number.
        epoch: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// This side's machine, disk or file failed: this shadow must not be promoted any more.
    #[error("epoch {epoch} could not be applied: {source}")]
    Apply {
        /// Its number; 0 during the initial copy.
        epoch: u64,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// The memory differs from the primary's (verify mode): this shadow must not be promoted any more.
    #[error(
        "MEMORY DIVERGED: after epoch {epoch} the digest is {here:016x}, the primary's {there:016x}"
    )]
    Diverged {
        /// The epoch.
        epoch: u64,
        /// This side's digest.
        here: u64,
        /// The primary's.
        there: u64,
    },
}

impl ShadowError {
    fn refusal(&self) -> Refusal {
        match self {
            ShadowError::Link(LinkError::Frame(FrameError::Session { .. })) => Refusal::Session,
            ShadowError::Link(_) | ShadowError::Epoch { .. } => Refusal::Broken,
            ShadowError::Apply { .. } => Refusal::Failed,
            ShadowError::Diverged { .. } => Refusal::Diverged,
        }
    }

    /// True when this shadow's own copy is spoiled.
    fn spoils(&self) -> bool {
        matches!(
            self,
            ShadowError::Apply { .. } | ShadowError::Diverged { .. }
        )
    }
}

/// The last committed epoch, wholly applied: what may be promoted (I2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedState {
    /// Its number.
    pub epoch: EpochId,
    /// The machine's state blocks ([`ax_wire::state`]).
    pub state: Vec<u8>,
    /// When the epoch was whole here, nanoseconds of the engine's clock (for rule 11).
    pub arrived_ns: u64,
    /// Received frames that guest has been given.
    pub rx_given: RxCounts,
}

/// What a process has that becomes shadow by a planned failover (rule 25): its guest's memory is that
/// of the final epoch, and so are its disks.
#[derive(Debug)]
pub struct Inheritance {
    /// The final epoch.
    pub committed: CommittedState,
    /// Outputs of committed epochs that have not left here ([`io_barrier::Barrier::retire`]).
    pub outputs: ShadowOutputs,
}

/// What was committed and what outlives the connection.
struct Memory {
    outputs: ShadowOutputs,
    received: ReceivedLog,
}

struct Shared {
    config: ShadowConfig,
    clock: Arc<dyn Clock>,
    events: Arc<dyn ShadowEvents>,
    /// Generation the stream is in.
    generation: AtomicU64,
    backward: Backward,
    memory: Mutex<Memory>,
    stages: Mutex<Stages>,
    changed: Condvar,
    committed: Mutex<Option<CommittedState>>,
    staged: AtomicU64,
    /// In memory.
    applied: AtomicU64,
    /// In the disks' images.
    on_disk: AtomicU64,
    durable: AtomicU64,
    spoiled: AtomicBool,
    /// The whole RAM is being digested, which takes as long as it is large.
    verifying: AtomicBool,
    close: Mutex<Option<Closer>>,
}

impl Shared {
    fn primary(&self) -> Session {
        Session {
            generation: Generation(self.generation.load(Ordering::Acquire)),
            ..self.config.primary
        }
    }

    fn me(&self) -> Session {
        Session {
            incarnation: self.config.me,
            ..self.primary()
        }
    }
}

/// How far the shadow has come, for heartbeats and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowProgress {
    /// Last epoch staged whole: committed.
    pub staged: EpochId,
    /// Last epoch applied to memory.
    pub applied: EpochId,
    /// Last epoch whose disk writes are durable.
    pub durable: EpochId,
}

/// Reaches the engine from other threads. Cheap to clone.
#[derive(Clone)]
pub struct ShadowHandle {
    shared: Arc<Shared>,
}

impl ShadowHandle {
    /// Rule 21: from the return on no acknowledgement and no answer is ever written again, on this
    /// connection or a later one. Call it before the arbiter is asked.
    pub fn freeze_acks(&self) {
        let close = || self.disconnect();
        self.shared.backward.freeze(close);
    }

    /// When this side last permitted a release, nanoseconds of the engine's clock; 0 when it never has. Final
    /// once [`ShadowHandle::freeze_acks`] has returned. The primary's permission began before that (rule 24).
    pub fn permitted_ns(&self) -> u64 {
        self.shared.backward.permitted_ns()
    }

    /// Ends the present connection, if any; `run` applies what is committed and returns.
    pub fn disconnect(&self) {
        let close = self.shared.close.lock().clone();
        if let Some(close) = close {
            close();
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> ShadowProgress {
        let get = |at: &AtomicU64| EpochId(at.load(Ordering::Acquire));
        ShadowProgress {
            staged: get(&self.shared.staged),
            applied: get(&self.shared.applied),
            durable: get(&self.shared.durable),
        }
    }

    /// True when an epoch is staged and not applied (rule 9: work pending). Not while the whole RAM is
    /// digested for the verify mode: of a large guest that may take longer than any stall.
    pub fn work_pending(&self) -> bool {
        let progress = self.progress();
        progress.applied < progress.staged && !self.shared.verifying.load(Ordering::Acquire)
    }

    /// The disks are durable up to `epoch`, and the primary waits to hear it. For the disks' own thread.
    pub fn tell_durable(&self, epoch: EpochId) {
        let shared = &self.shared;
        shared.durable.fetch_max(epoch.0, Ordering::AcqRel);
        let staged = EpochId(shared.staged.load(Ordering::Acquire));
        shared
            .backward
            .applied(shared.me(), staged, shared.progress());
    }

    /// The generation the stream is in.
    pub fn generation(&self) -> Generation {
        self.shared.primary().generation
    }

    /// True once this copy can not be promoted any more, whatever was acknowledged.
    pub fn is_spoiled(&self) -> bool {
        self.shared.spoiled.load(Ordering::Acquire)
    }

    /// The last epoch wholly applied; none before the first, while later ones are being applied, or
    /// on a spoiled copy (I2). Stable once `run` has returned.
    pub fn committed(&self) -> Option<CommittedState> {
        let committed = self.shared.committed.lock().clone();
        let staged = EpochId(self.shared.staged.load(Ordering::Acquire));
        committed.filter(|c| c.epoch == staged && !self.is_spoiled())
    }

    /// Promotion: works with the outputs of committed epochs that are not known released (rule 6).
    pub fn with_outputs<T>(&self, work: impl FnOnce(&ShadowOutputs) -> T) -> T {
        work(&self.shared.memory.lock().outputs)
    }

    /// Promotion: hands `give` every received frame the committed guest has not been given (rule 7).
    pub fn drain_received(&self, give: impl FnMut(u8, Packet<'_>)) {
        let now = self.shared.clock.now_ns();
        self.shared.memory.lock().received.drain(now, give);
    }
}

/// The shadow's engine. Lives as long as this process is the shadow of one primary process;
/// connections come and go ([`ShadowEngine::run`]).
pub struct ShadowEngine<G, S> {
    guest: G,
    sink: S,
    shared: Arc<Shared>,
}

impl<G: ShadowGuest + Send, S: ShadowSink> ShadowEngine<G, S> {
    /// An engine and the handle by which other threads reach it. Allocates every buffer.
    ///
    /// `from` is what this process has when it becomes shadow by a planned failover (rule 25); none for
    /// a shadow that needs the initial copy.
    pub fn new(
        config: ShadowConfig,
        guest: G,
        sink: S,
        from: Option<Inheritance>,
        events: Arc<dyn ShadowEvents>,
        clock: Arc<dyn Clock>,
    ) -> (ShadowEngine<G, S>, ShadowHandle) {
        let (from, outputs) = match from {
            Some(from) => (Some(from.committed), from.outputs),
            None => (None, ShadowOutputs::new(config.output_bytes)),
        };
        let epoch = from.as_ref().map_or(0, |c| c.epoch.0);
        let stages = Stages::new([Stage::new(&config), Stage::new(&config)]);
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(config.primary.generation.0),
            backward: Backward::new(Arc::clone(&clock)),
            memory: Mutex::new(Memory {
                outputs,
                received: ReceivedLog::new(config.received_bytes, RECEIVED_AGE_NS),
            }),
            stages: Mutex::new(stages),
            changed: Condvar::new(),
            committed: Mutex::new(from),
            staged: AtomicU64::new(epoch),
            applied: AtomicU64::new(epoch),
            on_disk: AtomicU64::new(epoch),
            durable: AtomicU64::new(epoch),
            spoiled: AtomicBool::new(false),
            verifying: AtomicBool::new(false),
            close: Mutex::new(None),
            config,
            clock,
            events,
        });
        let handle = ShadowHandle {
            shared: Arc::clone(&shared),
        };
        let engine = ShadowEngine {
            guest,
            sink,
            shared,
        };
        (engine, handle)
    }

    /// Receives over one connection until it ends. Returns when every acknowledged epoch is applied;
    /// an epoch received in part is discarded. Blocks; call it from a thread of its own.
    ///
    /// # Errors
    /// Always: [`ShadowError::Link`] is the ordinary end.
    pub fn run(&mut self, link: ShadowLink) -> ShadowError {
        let close = link.close.clone();
        *self.shared.close.lock() = Some(close.clone());
        let result = self.connection(link);
        close();
        *self.shared.close.lock() = None;
        self.shared.backward.disconnect();
        match result {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn connection(&mut self, link: ShadowLink) -> Result<std::convert::Infallible, ShadowError> {
        let shared = Arc::clone(&self.shared);
        let staged = shared.staged.load(Ordering::Acquire);
        let resume = Resume {
            has_epoch: u64::from(staged != 0).into(),
            staged: staged.into(),
        };
        shared
            .backward
            .connect(link.backward, link.version, shared.me(), resume)?;
        let reader = FrameReader::new(link.forward, link.version);
        shared.stages.lock().begin();
        let guest = Mutex::new(&mut self.guest);
        let sink = Mutex::new(&mut self.sink);
        ax_sync::thread::scope(|scope| {
            let apply = || apply::run(&shared, &guest, &sink);
            let applier = scope.spawn("epoch-apply", apply).map_err(LinkError::Io)?;
            let mut receiver = receive::Receiver::new(&shared, reader, &guest, &sink);
            let received = receiver.run();
            drop(receiver);
            shared.stages.lock().end();
            shared.changed.notify_all();
            let _ = applier.join();
            let failed = shared.stages.lock().failed.take();
            let error = failed.unwrap_or(match received {
                Err(error) => error,
                Ok(never) => match never {},
            });
            if error.spoils() && !shared.spoiled.swap(true, Ordering::AcqRel) {
                tracing::error!(%error, "this shadow can not be promoted");
            }
            // A connection that just ended needs no reason.
            if !matches!(
                error,
                ShadowError::Link(LinkError::Closed | LinkError::Io(_))
            ) {
                shared.backward.refuse(shared.me(), error.refusal());
            }
            Err(error)
        })
    }

    /// The guest and the sink, for promotion or the end.
    pub fn into_parts(self) -> (G, S) {
        (self.guest, self.sink)
    }
}
