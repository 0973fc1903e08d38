//! Keeps the disks' dirty-region maps short while a shadow is in sync (rule 16).
//!
//! A thread rotates them now and then ([`ax_disk::rotate`]), so that a shadow lost after an hour costs
//! what was written since the last rotation. It has its own pace: no epoch and no guest waits for it.

use std::sync::Arc;
use std::time::Duration;

use ax_disk::{Image, WriteLog, rotate};
use parking_lot::{Condvar, Mutex};

/// From one rotation to the next, when anything was written.
const INTERVAL: Duration = Duration::from_secs(10);

/// More than that for each region dropped: a guest that writes everywhere has to set its bit again, with an
/// fsync of some milliseconds, which then takes a tenth of its time at most.
const PER_REGION: Duration = Duration::from_millis(20);

/// When the next rotation is due after one that dropped so many regions.
fn pace(dropped: u64) -> Duration {
    let regions = u32::try_from(dropped).unwrap_or(u32::MAX);
    INTERVAL.max(PER_REGION.saturating_mul(regions))
}

#[derive(Default)]
struct State {
    in_sync: bool,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread that rotates the maps. It ends soon after this is dropped and is not waited for: whatever
/// it still does is right at any time, and an fsync may take long.
pub struct MapKeeper(Arc<Shared>);

impl Drop for MapKeeper {
    fn drop(&mut self) {
        self.0.state.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl MapKeeper {
    /// Starts the thread; it waits for [`Self::in_sync`].
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(disks: Vec<Arc<Image>>, log: Arc<WriteLog>) -> std::io::Result<MapKeeper> {
        let shared = Arc::new(Shared::default());
        let keeper = MapKeeper(Arc::clone(&shared));
        std::thread::Builder::new()
            .name("disk-maps".into())
            .spawn(move || run(&shared, &disks, &log))?;
        Ok(keeper)
    }

    /// The shadow is in sync from here on. Never blocks.
    pub fn in_sync(&self) {
        self.0.state.lock().in_sync = true;
        self.0.changed.notify_all();
    }
}

fn run(shared: &Shared, disks: &[Arc<Image>], log: &WriteLog) {
    let mut state = shared.state.lock();
    while !state.in_sync && !state.ended {
        shared.changed.wait(&mut state);
    }
    // The first one gives both sides' maps a common basis, whether anything was written or not.
    let mut anyway = true;
    while !state.ended {
        drop(state);
        let rotated = rotate::rotate(disks, log, anyway, || !shared.state.lock().ended);
        let dropped = match rotated {
            Ok(rotated) => {
                anyway = !rotated.done;
                rotated.dropped
            }
            Err(error) => {
                tracing::error!(%error, "the dirty-region maps keep what they have: a resync compares more");
                return;
            }
        };
        state = shared.state.lock();
        if !state.ended {
            shared.changed.wait_for(&mut state, pace(dropped));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_writes_everywhere_is_rotated_rarely() {
        assert_eq!(pace(0), INTERVAL);
        assert_eq!(pace(500), INTERVAL);
        assert_eq!(pace(5000), Duration::from_secs(100));
        assert!(pace(u64::MAX) > Duration::from_secs(3600));
    }
}
