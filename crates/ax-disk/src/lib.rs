//! Mirrored disks: epoch-tagged writes, the dirty-region map, initial sync, the replica.
//!
//! The story of one write (rules 13, 15–18): the primary's disk thread has it admitted to the
//! [`log::WriteLog`] (byte budget), sets its region's bit in the [`meta::Meta`] durably, writes the
//! local [`image::Image`] at once, and, in the same critical section in which the guest learns of
//! its completion, records the payload in the log. The log is sealed with the epoch and travels
//! with it. The shadow's [`replica::Replica`] holds an epoch's writes until that epoch has
//! committed, then applies them in the guest's order with its FLUSH barriers, so that every prefix
//! is crash-consistent. A new shadow is filled by [`sync::SyncCursor`] through the same log, so
//! that bulk and guest writes can never overtake each other: it sends the blocks that differ, of the
//! regions that the two sides' maps name. [`rotate`] keeps those maps short while both are in sync.

mod apply;
pub mod busy;
pub mod image;
pub mod log;
pub mod map;
pub mod medium;
pub mod meta;
pub mod replica;
pub mod rotate;
pub mod sums;
pub mod sync;

pub use busy::Busy;
pub use image::{Image, OpenError};
pub use log::WriteLog;
pub use medium::Medium;
pub use meta::{Condition, Meta};
pub use replica::Replica;
pub use sync::{Stepped, SyncCursor, SyncProgress};
