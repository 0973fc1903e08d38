//! The sentinel: tells death, silence, stall and goodbye apart (rules 9 and 10).
//!
//! Each `ax-vmm` has one [`Sentinel`]: a thread with a file table of its own that owns the
//! liveness connections, one for each path to the peer, on all of which it sends every heartbeat. The kernel tears down a killed process's memory before its files, but a
//! thread's own table goes with the thread: the peer reads the end of the connection within a
//! millisecond or so of a SIGKILL, whatever the size of the guest's RAM.
//!
//! - [`detector`] is the pure part: what was heard when, on whichever path, to what it means.
//! - [`paths`] is pure too: which of the paths works.
//! - [`progress`] is what the engines tell the sentinel: shared atomics.
//! - [`sentinel`] is the handle; [`watch`] the thread; [`table`] its file table; [`wire`] a connection.
//! - [`dial`]: ordinary threads that make connections; [`handoff`]: how the sentinel gets them.
//!
//! What it reports is evidence, never a permission: only the arbiter grants (rule 10).
//!
//! The rule that binds the thread: **it uses no file descriptor it did not make or was not sent.**
//! Descriptor numbers of the process mean nothing in its table, so it does not log, and calls
//! nobody's callbacks; a second, ordinary thread does both.

pub mod detector;
mod dial;
mod handoff;
pub mod paths;
pub mod progress;
pub mod sentinel;
mod table;
mod watch;
mod wire;

pub use detector::{LinkEvent, LinkEventKind, Timing};
pub use paths::{MAX_PATHS, PathLoss, PathState};
pub use progress::{ProgressSource, SharedProgress};
pub use sentinel::{Line, LinkEvents, PathView, PathViews, PeerView, Sentinel};

/// Now on CLOCK_BOOTTIME, ns; it counts suspended time, as the rules' clocks do.
pub fn boottime_ns() -> u64 {
    // The clock exists on every kernel this runs on; a failure would read as 1970, which can
    // only make the sentinel patient.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(0, |t| {
        let nanos = t
            .tv_sec()
            .saturating_mul(1_000_000_000)
            .saturating_add(t.tv_nsec());
        u64::try_from(nanos).unwrap_or(0)
    })
}
