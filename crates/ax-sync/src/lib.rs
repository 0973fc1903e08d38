//! Threads, locks and waiting, for code that must also run under a seeded scheduler.
//!
//! The engines, the barrier and the disks use these instead of `std::thread` and `parking_lot`, which is
//! what they are on any ordinary thread. On a thread of a [`sim::World`] they hand the turn to that
//! world's scheduler instead: one thread runs at a time, who goes next is drawn from a seed, and time
//! is a number that grows when nobody can run. So a whole pair with its real threads runs
//! deterministically, and whatever order of steps broke it once breaks it again.
//!
//! What an ordinary thread pays is one look at a thread-local flag for each call.

mod lock;
pub mod sim;
pub mod thread;

pub use lock::{Condvar, Mutex, MutexGuard, WaitTimeoutResult};
