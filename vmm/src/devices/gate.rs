//! The gate every device action passes, and which a capture closes.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};

/// Lets any number of device actions in together, or one capture alone.
///
/// A reader-writer lock rather than "hold every device's mutex": closing costs one atomic
/// operation however many devices there are, and a closer that has to wait keeps newcomers out,
/// so it waits for the actions already inside only. Those are short by construction: a batch of
/// frames, one chunk of a disk read. Disk I/O itself happens outside.
#[derive(Debug, Default)]
pub(super) struct Gate {
    lock: RwLock<()>,
    closed: AtomicBool,
    stopped: AtomicBool,
}

/// Proof that the gate is open and stays so.
#[derive(Debug)]
pub(super) struct Inside<'a>(
    #[expect(dead_code, reason = "held for its drop")] RwLockReadGuard<'a, ()>,
);

impl Gate {
    /// Enters, waiting while the gate is closed. `None` after [`Gate::stop`]: do nothing more.
    ///
    /// Ordering: the gate comes before any device's mutex, and is never entered twice by one
    /// thread (a closer waiting in between would deadlock both).
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let inside = self.lock.read();
        (!self.stopped.load(Ordering::Acquire)).then_some(Inside(inside))
    }

    /// Closes: on return nobody is inside and nobody gets in. Closing a closed gate does nothing.
    pub(super) fn close(&self) {
        if !self.closed.load(Ordering::Acquire) {
            mem::forget(self.lock.write());
            self.closed.store(true, Ordering::Release);
        }
    }

    /// Opens a closed gate; an open one stays open.
    pub(super) fn open(&self) {
        if self.closed.swap(false, Ordering::AcqRel) {
            // SAFETY: `closed` is true only between the forgotten write guard of `close` and
            // here, and the swap lets only one caller undo it: the lock is write-locked.
            unsafe { self.lock.force_unlock_write() };
        }
    }

    /// True between `close` and `open`.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// From here on nobody gets in ([`Gate::enter`] returns `None`) until [`Gate::restart`], also
    /// not those who wait at the closed gate. Opens it, so that they can leave.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.open();
    }

    /// Undoes [`Gate::stop`].
    pub(super) fn restart(&self) {
        self.stopped.store(false, Ordering::Release);
    }

    /// True after [`Gate::stop`].
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}
