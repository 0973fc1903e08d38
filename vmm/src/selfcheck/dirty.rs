//! Dirty tracking misses nothing: after each epoch a copy that got only the reported pages equals
//! guest memory, all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::payload::{COUNTERS, TICKS};
use super::rig::{Mirror, Random, word};
use super::{Fault, until};
use crate::Machine;

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exact {
    /// Epochs compared.
    pub epochs: usize,
    /// Dirty pages in all of them.
    pub pages: usize,
    /// Times a dirty ring was full.
    pub ring_full: usize,
}

/// Takes a machine ready to start through `epochs` epochs of a few milliseconds, and compares all of
/// its RAM after each; on some, a harvest while it runs comes before. `harvest` is
/// [`Machine::harvest`], but in a test of this check.
///
/// # Errors
/// What was missed, or why it could not be tried.
pub fn exactness(
    machine: &mut Machine,
    vcpus: u8,
    epochs: usize,
    mut harvest: impl FnMut(&mut Machine, &mut Vec<u64>) -> crate::Result<()>,
) -> Result<Exact, Fault> {
    let full = Arc::new(AtomicUsize::new(0));
    let triggered = Arc::clone(&full);
    machine.on_ring_full(Arc::new(move || {
        triggered.fetch_add(1, Ordering::Relaxed);
    }));
    machine.track_dirty(true)?;
    let mut mirror = Mirror::of(machine)?;
    machine.start()?;
    let mut random = Random(99);
    let mut dirty = Vec::new();
    let mut pages = 0;
    for epoch in 0..epochs {
        random.nap(if epoch % 40 == 0 { 20_000 } else { 2000 });
        if random.below(4) == 0 {
            harvest(machine, &mut dirty)?;
            mirror.take(machine, &dirty)?;
        }
        machine.pause()?;
        harvest(machine, &mut dirty)?;
        if !dirty.is_sorted_by(|a, b| a < b) {
            return Err(Fault::Disorder { epoch });
        }
        mirror.take(machine, &dirty)?;
        pages += dirty.len();
        let missed = mirror.differing(machine)?;
        if !missed.is_empty() {
            return Err(Fault::Missed {
                epoch,
                pages: missed,
            });
        }
        harvest(machine, &mut dirty)?;
        if !dirty.is_empty() {
            let pages = dirty.len();
            return Err(Fault::Spurious { epoch, pages });
        }
        machine.resume()?;
    }
    if pages <= epochs {
        return Err(Fault::Idle { epochs, pages });
    }
    // Full rings hold nobody up once nothing is tracked.
    machine.track_dirty(false)?;
    for vcpu in 0..u64::from(vcpus) {
        for place in [COUNTERS, TICKS] {
            let before = word(machine, place + 64 * vcpu)?;
            until("every vCPU and its timer go on", || {
                Ok(word(machine, place + 64 * vcpu)? > before)
            })?;
        }
    }
    Ok(Exact {
        epochs,
        pages,
        ring_full: full.load(Ordering::Relaxed),
    })
}
