//! The primary's gate: what it holds and what leaves. How the gate changes is in [`gates`].

mod gates;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ax_sync::{Mutex, MutexGuard};
use ax_wire::EpochId;
use ax_wire::offload::{HEADER, carried};
use ax_wire::records::{Record, RecordKind, Records, push, record_size};

use crate::Clock;

/// Why the guest machine as a whole stops or starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Switched off.
    Off,
    /// Reset.
    Reset,
    /// Crashed.
    Crash,
}

/// Where released outputs go. Called by one thread at a time, in order; must not call back into the
/// barrier and should not block: a frame the network does not take is lost as on any network.
pub trait OutputSink: Send {
    /// An Ethernet frame of network device `nic`, and the header that says what is left to be done with it
    /// ([`ax_wire::offload`]). After a promotion both may be the peer's: nothing of them has been checked.
    fn frame(&mut self, nic: u8, header: &[u8; HEADER], frame: &[u8]);

    /// Console bytes at stream offset `offset`. After a failover earlier bytes may come again with
    /// their old offsets: the reader takes each offset once (rule 8).
    fn console(&mut self, offset: u64, bytes: &[u8]);

    /// The guest powered off, reset or crashed.
    fn power(&mut self, what: Power);
}

/// No room to hold more of the open epoch's output; try again when told (`on_room`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room to hold more output in this epoch")]
pub struct Full;

/// What the barrier does with outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Nothing leaves and nothing is released: no permission (yet), or somebody was asked for one.
    Frozen,
    /// Outputs leave at once: the VM runs alone.
    Passing,
    /// Outputs are held; acknowledgements release nothing yet (rule 22, steps 1–3).
    Entering,
    /// Outputs are held and released on acknowledgement.
    Protected,
    /// Outputs leave at once while a lease lasts that acknowledgements renew (rule 28).
    Leased,
}

impl Gate {
    /// Outputs leave without being held.
    fn lets_through(self) -> bool {
        matches!(self, Gate::Passing | Gate::Leased)
    }
}

/// How a call of [`Barrier::release`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Release {
    /// Every output of epochs ≤ the one asked for has left.
    Done,
    /// The permission expired with outputs left (rule 24): ask "still my shadow?" and release again
    /// with the stamp taken before that question.
    Expired,
    /// The gate does not release ([`Gate::Frozen`], [`Gate::Entering`]); they stay held.
    Withheld,
}

/// Why an epoch's outputs could not be closed. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// As many epochs wait for release as may ([`BarrierConfig::max_epochs`]).
    #[error("{0} epochs already wait for the release of their outputs")]
    TooMany(usize),
    /// Outputs leave at once: call [`Barrier::start_holding`] first (rule 22).
    #[error("outputs are not being held")]
    Passing,
    /// Epochs only grow (I5).
    #[error("epoch {asked:?} does not follow {last:?}")]
    Order {
        /// Last epoch sealed.
        last: EpochId,
        /// The one asked for.
        asked: EpochId,
    },
}

/// What [`Barrier::seal`] closed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Bytes of its output records.
    pub bytes: usize,
    /// How many outputs these are.
    pub outputs: u64,
    /// When the first of them was held, nanoseconds of the barrier's clock; none without output.
    pub since_ns: Option<u64>,
}

/// Bounds and times.
#[derive(Debug, Clone, Copy)]
pub struct BarrierConfig {
    /// Bytes of output one epoch may hold, headers included.
    pub epoch_bytes: usize,
    /// Sealed epochs that may wait for release.
    pub max_epochs: usize,
    /// W: how long an acknowledgement permits release, nanoseconds (rule 24).
    pub permission_ns: u64,
}

impl Default for BarrierConfig {
    fn default() -> Self {
        BarrierConfig {
            epoch_bytes: 1 << 20,
            max_epochs: 6,
            permission_ns: 5_000_000,
        }
    }
}

/// Bytes of each epoch kept for a power output, which must always find room.
const POWER_RESERVE: usize = record_size(0);

#[derive(Debug)]
struct Held {
    epoch: EpochId,
    /// Output records ([`ax_wire::records`]).
    records: Vec<u8>,
    /// Bytes of `records` that have left.
    at: usize,
    /// When its first output was held.
    since_ns: u64,
}

#[derive(Debug)]
struct Queue {
    gate: Gate,
    open: Vec<u8>,
    open_outputs: u64,
    open_since_ns: u64,
    open_has_power: bool,
    sealed: VecDeque<Held>,
    /// The epoch that is leaving right now is not in `sealed`.
    leaving_since_ns: Option<u64>,
    spare: Vec<Vec<u8>>,
    last_sealed: EpochId,
    outputs: u64,
}

type Hook = Box<dyn Fn() + Send + Sync>;

/// Holds what the guest shows to the outside until its epoch is committed (I1).
///
/// Two locks, always taken in this order: `sink` serialises what leaves and every change of the gate;
/// `queue` is short and is all that a device takes while outputs are held.
pub struct Barrier {
    sink: Mutex<Box<dyn OutputSink>>,
    queue: Mutex<Queue>,
    clock: Arc<dyn Clock>,
    config: BarrierConfig,
    released: AtomicU64,
    /// How long an acknowledgement lets outputs leave with [`Gate::Leased`].
    lease_ns: AtomicU64,
    /// Until when outputs may leave by the last permission given ([`Gate::Protected`], [`Gate::Leased`]).
    permitted_until: AtomicU64,
    refused: AtomicBool,
    on_pending: OnceLock<Hook>,
    on_room: OnceLock<Hook>,
}

impl std::fmt::Debug for Barrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue.lock();
        write!(
            f,
            "Barrier({:?}, {} bytes open, {} epochs sealed, released {:?})",
            queue.gate,
            queue.open.len(),
            queue.sealed.len(),
            self.released()
        )
    }
}

/// The one place where a byte leaves (I1). Callers hold the sink's lock and have checked the gate.
fn leave(sink: &mut dyn OutputSink, record: Record<'_>) {
    match record.kind {
        RecordKind::Frame | RecordKind::FrameWithHeader => match carried(&record) {
            Some((header, frame)) => sink.frame(record.unit, &header, frame),
            None => tracing::error!("a frame shorter than its header: ignored"),
        },
        RecordKind::Console => sink.console(record.at, record.payload),
        RecordKind::PowerOff => sink.power(Power::Off),
        RecordKind::Reset => sink.power(Power::Reset),
        RecordKind::Crash => sink.power(Power::Crash),
        RecordKind::DiskWrite
        | RecordKind::DiskFlush
        | RecordKind::DiskZero
        | RecordKind::DiskMark
        | RecordKind::Received
        | RecordKind::ReceivedWithHeader => {
            tracing::error!(kind = ?record.kind, "not an output: ignored");
        }
    }
}

fn is_power(kind: RecordKind) -> bool {
    matches!(
        kind,
        RecordKind::PowerOff | RecordKind::Reset | RecordKind::Crash
    )
}

impl Barrier {
    /// A barrier that lets nothing out: a process begins without permission ([`Gate::Frozen`]).
    pub fn new(config: BarrierConfig, sink: Box<dyn OutputSink>, clock: Arc<dyn Clock>) -> Barrier {
        let config = BarrierConfig {
            max_epochs: config.max_epochs.max(1),
            ..config
        };
        let arena = || Vec::with_capacity(config.epoch_bytes.max(POWER_RESERVE));
        Barrier {
            sink: Mutex::new(sink),
            queue: Mutex::new(Queue {
                gate: Gate::Frozen,
                open: arena(),
                open_outputs: 0,
                open_since_ns: 0,
                open_has_power: false,
                sealed: VecDeque::with_capacity(config.max_epochs),
                leaving_since_ns: None,
                spare: (0..config.max_epochs).map(|_| arena()).collect(),
                last_sealed: EpochId(0),
                outputs: 0,
            }),
            clock,
            config,
            released: AtomicU64::new(0),
            lease_ns: AtomicU64::new(0),
            permitted_until: AtomicU64::new(0),
            refused: AtomicBool::new(false),
            on_pending: OnceLock::new(),
            on_room: OnceLock::new(),
        }
    }

    /// Sets who is told that the open epoch has its first output, or no room for more: the epoch
    /// engine's trigger. Called by device threads with no barrier lock held; must be quick. Set once.
    pub fn on_pending(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_pending.set(Box::new(hook));
    }

    /// Sets who is told that a hold refused as [`Full`] may be tried again. Set once.
    pub fn on_room(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_room.set(Box::new(hook));
    }

    /// What the gate does now.
    pub fn gate(&self) -> Gate {
        self.queue.lock().gate
    }

    /// Takes one output of the guest: holds it in the open epoch, or lets it leave when the VM runs
    /// alone. Call it under the lock of the device whose state tells of the output.
    ///
    /// Power outputs always find room; a second one in the same epoch says nothing new.
    ///
    /// # Errors
    /// [`Full`]: keep the request and try again after `on_room`.
    pub fn hold(&self, record: Record<'_>) -> Result<(), Full> {
        let queue = self.queue.lock();
        if !queue.gate.lets_through() {
            return self.hold_open(queue, record);
        }
        drop(queue);
        // The gate changes under the sink's lock only, so it stays as it is seen here.
        let mut sink = self.sink.lock();
        let queue = self.queue.lock();
        let gate = queue.gate;
        if !gate.lets_through() {
            drop(sink);
            return self.hold_open(queue, record);
        }
        drop(queue);
        if gate == Gate::Leased
            && self.clock.now_ns() > self.permitted_until.load(Ordering::Acquire)
        {
            drop(sink);
            if is_power(record.kind) {
                return self.hold_open(self.queue.lock(), record);
            }
            self.refused.store(true, Ordering::Release);
            return Err(Full);
        }
        leave(sink.as_mut(), record);
        Ok(())
    }

    fn hold_open(
        &self,
        mut queue: MutexGuard<'_, Queue>,
        mut record: Record<'_>,
    ) -> Result<(), Full> {
        let power = is_power(record.kind);
        if power && queue.open_has_power {
            return Ok(());
        }
        let first = queue.open.is_empty();
        let reserve = if power || queue.open_has_power {
            0
        } else {
            POWER_RESERVE
        };
        let room = queue.open.capacity().saturating_sub(reserve);
        if matches!(record.kind, RecordKind::Frame | RecordKind::FrameWithHeader) {
            record.at = queue.outputs;
        }
        let fits = queue.open.len() + record_size(record.payload.len()) <= room;
        if !fits || !push(&mut queue.open, record) {
            self.refused.store(true, Ordering::Release);
            drop(queue);
            self.tell(&self.on_pending);
            return Err(Full);
        }
        queue.outputs += 1;
        queue.open_outputs += 1;
        queue.open_has_power |= power;
        if first {
            queue.open_since_ns = self.clock.now_ns();
        }
        drop(queue);
        if first {
            self.tell(&self.on_pending);
        }
        Ok(())
    }

    fn tell(&self, hook: &OnceLock<Hook>) {
        if let Some(hook) = hook.get() {
            hook();
        }
    }

    /// Closes the open epoch's outputs under `epoch` and appends a copy of their records to `out`,
    /// which travels to the shadow. Call it with the guest paused, when nothing of the capture can
    /// fail any more.
    ///
    /// # Errors
    /// [`SealError`]; nothing has changed.
    pub fn seal(&self, epoch: EpochId, out: &mut Vec<u8>) -> Result<Sealed, SealError> {
        let mut queue = self.queue.lock();
        if queue.gate == Gate::Passing {
            return Err(SealError::Passing);
        }
        if epoch <= queue.last_sealed {
            return Err(SealError::Order {
                last: queue.last_sealed,
                asked: epoch,
            });
        }
        if queue.gate == Gate::Leased {
            // Nothing was held: what left needs no epoch.
            queue.last_sealed = epoch;
            return Ok(Sealed::default());
        }
        let Some(next) = queue.spare.pop() else {
            return Err(SealError::TooMany(queue.sealed.len()));
        };
        let records = std::mem::replace(&mut queue.open, next);
        out.extend_from_slice(&records);
        let bytes = records.len();
        let since_ns = queue.open_since_ns;
        queue.sealed.push_back(Held {
            epoch,
            records,
            at: 0,
            since_ns,
        });
        queue.last_sealed = epoch;
        queue.open_has_power = false;
        Ok(Sealed {
            bytes,
            outputs: std::mem::take(&mut queue.open_outputs),
            since_ns: (bytes != 0).then_some(since_ns),
        })
    }

    /// True when [`Barrier::seal`] would find room.
    pub fn can_seal(&self) -> bool {
        !self.queue.lock().spare.is_empty()
    }

    /// The guest runs again after a seal: whoever was refused for lack of room is told to try again.
    pub fn resumed(&self) {
        if self.refused.swap(false, Ordering::AcqRel) {
            self.tell(&self.on_room);
        }
    }

    /// Epochs ≤ `up_to` are committed by an acknowledgement whose permission began at `stamp_ns` (taken
    /// before what was acknowledged was sent): their outputs leave, in order, each only while
    /// now ≤ `stamp_ns` + W.
    pub fn release(&self, up_to: EpochId, stamp_ns: u64) -> Release {
        let mut sink = self.sink.lock();
        let gate = self.queue.lock().gate;
        match gate {
            Gate::Protected => {}
            Gate::Passing => return Release::Done,
            Gate::Leased => {
                let lease = self.lease_ns.load(Ordering::Acquire);
                let until = stamp_ns.saturating_add(lease);
                self.permitted_until.fetch_max(until, Ordering::AcqRel);
                self.released.fetch_max(up_to.0, Ordering::AcqRel);
                if self.clock.now_ns() <= until {
                    self.drain_open(&mut sink);
                }
                drop(sink);
                self.resumed();
                return Release::Done;
            }
            Gate::Frozen | Gate::Entering => return Release::Withheld,
        }
        self.permit(stamp_ns);
        let permission = self.config.permission_ns;
        self.drain_sealed(&mut sink, up_to, |now| {
            now.saturating_sub(stamp_ns) <= permission
        })
    }

    /// Outputs of committed epochs may leave while now ≤ `stamp_ns` + W: the shadow, since that moment, has
    /// promised not to ask for the VM before then (rule 24).
    pub fn permit(&self, stamp_ns: u64) {
        let until = stamp_ns.saturating_add(self.config.permission_ns);
        self.permitted_until.fetch_max(until, Ordering::AcqRel);
    }

    /// Does `act`, which shows something that is no output of the guest, if a committed output might leave
    /// now; returns whether it did. The gate does not change meanwhile.
    pub fn if_permitted(&self, act: impl FnOnce()) -> bool {
        let _sink = self.sink.lock();
        let permitted = match self.gate() {
            Gate::Passing => true,
            Gate::Protected | Gate::Leased => {
                self.clock.now_ns() <= self.permitted_until.load(Ordering::Acquire)
            }
            Gate::Frozen | Gate::Entering => false,
        };
        if permitted {
            act();
        }
        permitted
    }

    fn drain_sealed(
        &self,
        sink: &mut MutexGuard<'_, Box<dyn OutputSink>>,
        up_to: EpochId,
        permitted: impl Fn(u64) -> bool,
    ) -> Release {
        loop {
            let mut queue = self.queue.lock();
            let held = match queue.sealed.front() {
                Some(first) if first.epoch <= up_to => queue.sealed.pop_front(),
                _ => None,
            };
            let Some(mut held) = held else {
                return Release::Done;
            };
            queue.leaving_since_ns = (!held.records.is_empty()).then_some(held.since_ns);
            drop(queue);
            let mut expired = false;
            let rest = held.records.get(held.at..).unwrap_or_default();
            let mut records = Records::new(rest);
            loop {
                let at = records.position();
                let Some(record) = records.next() else { break };
                if !permitted(self.clock.now_ns()) {
                    held.at += at;
                    expired = true;
                    break;
                }
                match record {
                    Ok(record) => leave(sink.as_mut(), record),
                    Err(error) => tracing::error!(%error, "held outputs"),
                }
            }
            let mut queue = self.queue.lock();
            queue.leaving_since_ns = None;
            if expired {
                queue.sealed.push_front(held);
                return Release::Expired;
            }
            self.released.store(held.epoch.0, Ordering::Release);
            held.records.clear();
            queue.spare.push(held.records);
        }
    }

    /// M: every output of epochs ≤ this one has left. Travels in each epoch's header (rule 6).
    pub fn released(&self) -> EpochId {
        EpochId(self.released.load(Ordering::Acquire))
    }

    /// The last epoch whose outputs were closed, whatever became of it: the next one follows it.
    pub fn sealed(&self) -> EpochId {
        self.queue.lock().last_sealed
    }

    /// True when the open epoch holds output.
    pub fn pending(&self) -> bool {
        !self.queue.lock().open.is_empty()
    }

    /// When the open epoch's first output was held and its bytes; none without output.
    pub fn open(&self) -> Option<(u64, usize)> {
        let queue = self.queue.lock();
        (!queue.open.is_empty()).then_some((queue.open_since_ns, queue.open.len()))
    }

    /// Age of the oldest output held, nanoseconds; 0 with none (rule 9).
    pub fn oldest_held_ns(&self) -> u64 {
        let queue = self.queue.lock();
        let sealed = queue.sealed.iter().find(|h| !h.records.is_empty());
        let open = (!queue.open.is_empty()).then_some(queue.open_since_ns);
        let oldest = queue
            .leaving_since_ns
            .or(sealed.map(|h| h.since_ns))
            .or(open);
        oldest.map_or(0, |since| self.clock.now_ns().saturating_sub(since))
    }
}
