//! Does this host's KVM keep what AX builds on? Tried on guests of a few hundred bytes.
//!
//! - [`moves`]: a guest saved and restored into fresh machines goes on as if undisturbed;
//! - [`dirty`]: dirty tracking misses no page, by KVM's bitmap and by its rings.
//!
//! `ax-vmm --selfcheck` runs them for a moment on the host at hand, the tests of this crate for
//! longer. [`payload`] is the guest, [`rig`] what builds and reads its machines.

pub mod dirty;
pub mod moves;
pub mod payload;
pub mod rig;

use std::time::{Duration, Instant};

/// Longest a guest may take for what it should do at once; reached only when it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was found wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A machine could not be made or driven.
    #[error(transparent)]
    Machine(#[from] crate::Error),
    /// The guest stopped doing something.
    #[error("the guest hangs: waited in vain until {0}")]
    Hangs(&'static str),
    /// The guest showed something though all is well with it only while it is silent.
    #[error("the guest took an exception")]
    Exception,
    /// A guest that was moved did other work than one that was not.
    #[error("after {moves} moves the guest's memory differs from an undisturbed run's")]
    Differs {
        /// Times it was saved and restored.
        moves: usize,
    },
    /// Pages changed and were not reported dirty.
    #[error("epoch {epoch}: {} pages changed but were not reported dirty, the first at {:#x}",
        pages.len(), pages.first().unwrap_or(&0) * 4096)]
    Missed {
        /// Which harvest.
        epoch: usize,
        /// The pages, by number.
        pages: Vec<u64>,
    },
    /// Pages were reported that nobody can have written.
    #[error("epoch {epoch}: {pages} pages were reported dirty though no vCPU ran")]
    Spurious {
        /// Which harvest.
        epoch: usize,
        /// How many.
        pages: usize,
    },
    /// Harvested pages were not unique and ascending.
    #[error("epoch {epoch}: the harvested pages are not unique and ascending")]
    Disorder {
        /// Which harvest.
        epoch: usize,
    },
    /// The guest wrote less than it should have: nothing was tried.
    #[error("only {pages} dirty pages in {epochs} epochs: the guest writes more than that")]
    Idle {
        /// Harvests.
        epochs: usize,
        /// Pages in all of them.
        pages: usize,
    },
}

/// Waits until `condition` holds.
///
/// # Errors
/// [`Fault::Hangs`] after a time that means never, or the condition's own.
pub fn until(
    what: &'static str,
    mut condition: impl FnMut() -> Result<bool, Fault>,
) -> Result<(), Fault> {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > PATIENCE {
            return Err(Fault::Hangs(what));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
