//! What the engines tell the sentinel: shared atomics, no locks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use ax_wire::heartbeat::Progress;
use ax_wire::{EpochId, Generation};

/// Where the sentinel reads how far this side has come. Called every interval from the
/// sentinel's thread: it must not block, log, or use a file descriptor.
pub trait ProgressSource: Send + Sync {
    /// The generation under which this side runs now.
    fn generation(&self) -> Generation;
    /// How far it has come; `now_ns` is CLOCK_BOOTTIME.
    fn progress(&self, now_ns: u64) -> Progress;
}

/// A [`ProgressSource`] of atomics. Values are independent: a reader may see one newer than the
/// other, which only makes a heartbeat a moment old.
#[derive(Debug, Default)]
pub struct SharedProgress {
    generation: AtomicU64,
    captured: AtomicU64,
    staged: AtomicU64,
    applied: AtomicU64,
    acked: AtomicU64,
    /// CLOCK_BOOTTIME at which the oldest held output was held; 0 for none.
    oldest_held_at_ns: AtomicU64,
    pending: AtomicBool,
}

impl SharedProgress {
    /// Starts under a generation, with nothing done.
    pub fn new(generation: Generation) -> SharedProgress {
        SharedProgress {
            generation: generation.0.into(),
            ..SharedProgress::default()
        }
    }

    /// This side runs under another generation now.
    pub fn set_generation(&self, generation: Generation) {
        self.generation.store(generation.0, Relaxed);
    }

    /// An epoch was captured (primary).
    pub fn set_captured(&self, epoch: EpochId) {
        self.captured.store(epoch.0, Relaxed);
    }

    /// An epoch was staged whole (shadow).
    pub fn set_staged(&self, epoch: EpochId) {
        self.staged.store(epoch.0, Relaxed);
    }

    /// An epoch was applied (shadow).
    pub fn set_applied(&self, epoch: EpochId) {
        self.applied.store(epoch.0, Relaxed);
    }

    /// An epoch's acknowledgement was sent (shadow) or received (primary).
    pub fn set_acked(&self, epoch: EpochId) {
        self.acked.store(epoch.0, Relaxed);
    }

    /// When the oldest held output was held, CLOCK_BOOTTIME ns; `None` when none is.
    pub fn set_oldest_held(&self, at_ns: Option<u64>) {
        self.oldest_held_at_ns.store(at_ns.unwrap_or(0), Relaxed);
    }

    /// Whether this side waits for something to happen: without it, no progress is no stall.
    pub fn set_pending(&self, pending: bool) {
        self.pending.store(pending, Relaxed);
    }
}

impl ProgressSource for SharedProgress {
    fn generation(&self) -> Generation {
        Generation(self.generation.load(Relaxed))
    }

    fn progress(&self, now_ns: u64) -> Progress {
        let epoch = |counter: &AtomicU64| EpochId(counter.load(Relaxed));
        let held_at = self.oldest_held_at_ns.load(Relaxed);
        Progress {
            captured: epoch(&self.captured),
            staged: epoch(&self.staged),
            applied: epoch(&self.applied),
            acked: epoch(&self.acked),
            oldest_held_ns: if held_at == 0 {
                0
            } else {
                now_ns.saturating_sub(held_at).max(1)
            },
            pending: self.pending.load(Relaxed),
        }
    }
}
