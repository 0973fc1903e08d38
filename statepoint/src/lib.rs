//! Epochs: trigger, capture, ship, stage, check, acknowledge, commit, apply.
//!
//! Knows nothing of KVM. A guest is anything that implements [`guest::Guest`]; the copy of
//! it on the other host is anything that implements [`guest::ShadowGuest`]. The same engines
//! drive the real machine and the simulated one of the tests.
//!
//! The story of one epoch:
//!
//! 1. the [`policy`] decides that it is time (rule 1), woken by the [`trigger`];
//! 2. the [`primary`] engine pauses the guest, captures into a preallocated slot, closes outputs and
//!    disk writes under the epoch's number, resumes, and ships (rules 2–6);
//! 3. the [`shadow`] engine stages it whole, checks it, acknowledges, applies;
//! 4. the acknowledgement commits the epoch, and the I/O barrier lets its outputs leave.
//!
//! [`pair`] decides, apart from all this and without doing anything itself, who may run.

pub mod guest;
pub mod link;
pub mod pair;
pub mod policy;
pub mod primary;
pub mod shadow;
pub mod stats;
pub mod trace;
pub mod trigger;

mod arena;
mod digest;
