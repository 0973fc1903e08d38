//! The applying thread.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ax_failpoint::Point;
use ax_sync::Mutex;
use ax_wire::runs::{Content, Run, Runs};
use ax_wire::stream::Progress;
use ax_wire::{EpochId, PAGE_SIZE};

use super::stage::Stage;
use super::{CommittedState, ShadowError, ShadowSink, Shared};
use crate::digest::digest;
use crate::guest::{GuestError, ShadowGuest};

/// The stages and where they are.
pub(super) struct Stages {
    pub free: Vec<Stage>,
    /// Committed, to be applied in order.
    ready: VecDeque<Stage>,
    /// Why applying ended.
    pub failed: Option<ShadowError>,
    ending: bool,
}

impl Stages {
    pub fn new(stages: [Stage; 2]) -> Stages {
        Stages {
            ready: VecDeque::with_capacity(stages.len()),
            free: stages.into_iter().collect(),
            failed: None,
            ending: false,
        }
    }

    pub fn begin(&mut self) {
        self.ending = false;
    }

    /// The applying thread ends when nothing is left to apply.
    pub fn end(&mut self) {
        self.ending = true;
    }
}

impl Shared {
    /// Waits for a free stage; none when applying has failed.
    pub fn take_stage(&self) -> Option<Stage> {
        let mut stages = self.stages.lock();
        loop {
            if stages.failed.is_some() {
                return None;
            }
            if let Some(stage) = stages.free.pop() {
                return Some(stage);
            }
            self.changed.wait(&mut stages);
        }
    }

    /// Gives an unused stage back.
    pub fn give_stage(&self, mut stage: Stage) {
        stage.clear();
        self.stages.lock().free.push(stage);
    }

    /// Queues a committed epoch.
    pub fn ready(&self, stage: Stage) {
        self.stages.lock().ready.push_back(stage);
        self.changed.notify_all();
    }

    pub fn progress(&self) -> Progress {
        let in_memory = self.applied.load(Ordering::Acquire);
        let on_disk = self.on_disk.load(Ordering::Acquire);
        Progress {
            applied: in_memory.min(on_disk).into(),
            durable: self.durable.load(Ordering::Acquire).into(),
        }
    }
}

/// How long an epoch applied may stay untold when no acknowledgement carries the news.
const TELL: Duration = Duration::from_millis(20);

/// Zero pages, written in pieces.
static ZEROS: [u8; 16 * PAGE_SIZE] = [0; 16 * PAGE_SIZE];

/// Writes page runs into the guest.
pub(super) fn write_runs<G: ShadowGuest>(guest: &mut G, payload: &[u8]) -> Result<(), GuestError> {
    for run in Runs::new(payload) {
        let run = run.map_err(|error| GuestError {
            doing: "reading staged pages",
            source: Box::new(error),
        })?;
        let Run { first, pages, .. } = run;
        match run.content {
            Content::Data(data) => guest.write_pages(first, data)?,
            Content::Patch(patch) => guest.patch_page(first, &patch)?,
            Content::Zero => {
                let mut page = first;
                let end = first.saturating_add(pages);
                while page < end {
                    let n = (end - page).min((ZEROS.len() / PAGE_SIZE) as u64);
                    let zeros = ZEROS.get(..n as usize * PAGE_SIZE).unwrap_or_default();
                    guest.write_pages(page, zeros)?;
                    page += n;
                }
            }
        }
    }
    Ok(())
}

pub(super) fn run<G: ShadowGuest, S: ShadowSink>(
    shared: &Shared,
    guest: &Mutex<&mut G>,
    sink: &Mutex<&mut S>,
) {
    let mut scratch = Vec::new();
    let mut told = shared.progress().applied.get();
    let mut stages = shared.stages.lock();
    loop {
        let Some(mut stage) = stages.ready.pop_front() else {
            if stages.ending {
                return;
            }
            let timed_out = shared.changed.wait_for(&mut stages, TELL).timed_out();
            if timed_out {
                drop(stages);
                told = tell(shared, sink, told);
                stages = shared.stages.lock();
            }
            continue;
        };
        drop(stages);
        let mut target = guest.lock();
        let applied = apply(shared, &mut **target, sink, &mut stage, &mut scratch);
        drop(target);
        stages = shared.stages.lock();
        match applied {
            Ok(()) => {
                stage.clear();
                stages.free.push(stage);
            }
            Err(error) => {
                shared.spoiled.store(true, Ordering::Release);
                // Said before the primary hears of it: it may have this process ended at once.
                tracing::error!(%error, "this shadow can not be promoted");
                let refusal = error.refusal();
                stages.failed = Some(error);
                stages.ready.clear();
                drop(stages);
                shared.changed.notify_all();
                // The receiver may be waiting for bytes: it must not go on acknowledging.
                shared.backward.refuse(shared.me(), refusal);
                let close = shared.close.lock().clone();
                if let Some(close) = close {
                    close();
                }
                return;
            }
        }
        shared.changed.notify_all();
    }
}

/// Spoils the copy as a bad memory module would, for a test of the verify mode.
fn flip_a_bit<G: ShadowGuest>(guest: &mut G) -> Result<(), GuestError> {
    let last = guest.ram().last().map_or(0, |r| r.start + r.pages - 1);
    let mut page = [0; PAGE_SIZE];
    guest.read_pages(last, &mut page)?;
    page[PAGE_SIZE / 2] ^= 1;
    guest.write_pages(last, &page)
}

/// Tells the primary how far this side is, if it has not been told.
fn tell<S: ShadowSink>(shared: &Shared, sink: &Mutex<&mut S>, told: u64) -> u64 {
    let (on_disk, durable) = {
        let sink = sink.lock();
        (sink.applied().0, sink.durable().0)
    };
    shared.on_disk.fetch_max(on_disk, Ordering::AcqRel);
    let before = shared.durable.fetch_max(durable, Ordering::AcqRel);
    let applied = shared.progress().applied.get();
    if applied > told || durable > before {
        let epoch = EpochId(shared.staged.load(Ordering::Acquire));
        shared
            .backward
            .applied(shared.me(), epoch, shared.progress());
    }
    applied
}

fn apply<G: ShadowGuest, S: ShadowSink>(
    shared: &Shared,
    guest: &mut G,
    sink: &Mutex<&mut S>,
    stage: &mut Stage,
    scratch: &mut Vec<u8>,
) -> Result<(), ShadowError> {
    let epoch = stage.epoch.0;
    let failed = |source| ShadowError::Apply { epoch, source };
    ax_failpoint::reached(Point::Applying);
    write_runs(guest, stage.runs.as_slice()).map_err(failed)?;
    stage
        .unspill(|payload| write_runs(guest, payload))
        .map_err(failed)?;
    if ax_failpoint::fails(Point::Written) {
        flip_a_bit(guest).map_err(failed)?;
    }
    if let Some(there) = stage.digest {
        let ram = guest.ram().to_vec();
        shared.verifying.store(true, Ordering::Release);
        let here = digest(&ram, scratch, |first, out| guest.read_pages(first, out));
        shared.verifying.store(false, Ordering::Release);
        let here = here.map_err(failed)?;
        if here != there {
            return Err(ShadowError::Diverged { epoch, here, there });
        }
    }
    let mut sink = sink.lock();
    sink.committed(stage.epoch, &mut stage.disk)
        .map_err(failed)?;
    shared.on_disk.fetch_max(sink.applied().0, Ordering::AcqRel);
    shared.durable.fetch_max(sink.durable().0, Ordering::AcqRel);
    if stage.first {
        sink.in_sync(stage.epoch, shared.primary().generation)
            .map_err(failed)?;
    }
    drop(sink);
    let mut committed = shared.committed.lock();
    // Swapping keeps both buffers: nothing is allocated from the third epoch on.
    let mut state = committed.take().map(|c| c.state).unwrap_or_default();
    std::mem::swap(&mut state, &mut stage.state);
    *committed = Some(CommittedState {
        epoch: stage.epoch,
        state,
        arrived_ns: stage.arrived_ns,
        rx_given: stage.rx_given,
    });
    drop(committed);
    // Before it counts as applied: a promotion knows what every committed epoch let out.
    shared.events.applied(stage.epoch, &stage.outputs);
    shared.applied.store(epoch, Ordering::Release);
    Ok(())
}
