//! What wakes the epoch thread.

use std::time::Duration;

use ax_sync::{Condvar, Mutex};

/// A doorbell: rung from any thread, waited for by one. Rings before a wait are not lost.
#[derive(Debug, Default)]
pub struct Trigger {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Trigger {
    /// Wakes the waiting thread, or lets its next wait return at once.
    pub fn ring(&self) {
        let mut rung = self.rung.lock();
        if !*rung {
            *rung = true;
            self.bell.notify_one();
        }
    }

    /// Waits until rung, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let mut rung = self.rung.lock();
        if !*rung {
            self.bell.wait_for(&mut rung, timeout);
        }
        *rung = false;
    }
}
