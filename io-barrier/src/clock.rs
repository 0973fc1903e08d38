//! The clock of permissions and ages.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of a clock that never stops while the host sleeps.
pub trait Clock: Send + Sync {
    /// Now, nanoseconds.
    fn now_ns(&self) -> u64;
}

/// `CLOCK_BOOTTIME`: goes on through suspend, so that a permission expires there too (rule 24).
#[derive(Clone, Copy, Debug, Default)]
pub struct Boottime;

impl Clock for Boottime {
    /// On a kernel without the clock (none this runs on) time is at its end: every permission has
    /// expired, which is the safe answer.
    fn now_ns(&self) -> u64 {
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(u64::MAX, |t| {
            (t.tv_sec() as u64)
                .saturating_mul(1_000_000_000)
                .saturating_add(t.tv_nsec() as u64)
        })
    }
}
