//! The end of a guest's run: power off, reset, crash.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_wire::offload::Packet;
use parking_lot::Mutex;

use crate::ports::{Full, Outputs, Power};

/// Remembers that the guest powered off, reset or crashed, and passes everything on.
///
/// The first such event counts; vCPUs stay parked from then until the machine is reset.
pub(crate) struct PowerLatch {
    outputs: Arc<dyn Outputs>,
    set: AtomicBool,
    what: Mutex<Option<Power>>,
}

impl PowerLatch {
    pub(crate) fn new(outputs: Arc<dyn Outputs>) -> Self {
        PowerLatch {
            outputs,
            set: false.into(),
            what: Mutex::new(None),
        }
    }

    /// Whether the guest has stopped as a whole.
    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// What happened first, if anything did.
    pub(crate) fn get(&self) -> Option<Power> {
        *self.what.lock()
    }

    /// Sets it without telling anyone.
    pub(crate) fn put(&self, what: Option<Power>) {
        *self.what.lock() = what;
        self.set.store(what.is_some(), Ordering::Release);
    }
}

impl Outputs for PowerLatch {
    fn frame(&self, nic: u8, packet: Packet<'_>) -> std::result::Result<(), Full> {
        self.outputs.frame(nic, packet)
    }

    fn console(&self, offset: u64, bytes: &[u8]) -> std::result::Result<(), Full> {
        self.outputs.console(offset, bytes)
    }

    fn power(&self, what: Power) {
        let mut latched = self.what.lock();
        if latched.is_none() {
            *latched = Some(what);
            self.set.store(true, Ordering::Release);
            drop(latched);
            self.outputs.power(what);
        }
    }
}
