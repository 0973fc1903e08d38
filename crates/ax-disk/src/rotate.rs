//! Rotating the dirty-region maps while protected: bits are dropped once both disks are durable.
//!
//! ```text
//! primary                                   shadow
//! 1 what is touched from here on stays
//! 2 mark in the log ──── epoch E ─────────► what is touched after the mark stays
//!                                           E applied: fsync
//!                 ◄───── durable ≥ E ──────
//! 3 fsync
//! 4 drop older bits, new basis
//! 5 end mark ───── a later epoch ─────────► drop older bits, new basis
//! ```
//!
//! What was recorded before the mark is durable on both sides at 4. A crash between 4 and the end of 5
//! leaves two bases: then everything is compared, once. The basis is new each time, so that a map that
//! somebody has brought back from a backup never passes for a present one.

use std::io;
use std::sync::Arc;

use crate::image::Image;
use crate::log::WriteLog;
use crate::meta::{Basis, MetaError};

/// Why bits could not be dropped. They stay.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// An image could not be made durable, or there were no random bytes.
    #[error("rotating the dirty-region maps: {0}")]
    Io(#[from] io::Error),
    /// The map could not be written.
    #[error(transparent)]
    Meta(#[from] MetaError),
}

/// What a rotation came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotated {
    /// Both maps are relative to its end, or will be soon; or there was nothing to drop.
    pub done: bool,
    /// Regions whose bits were dropped here. Each costs the guest an fsync of the map, on both sides, when
    /// it is written again.
    pub dropped: u64,
}

/// Drops the bits of what is durable on both sides from the primary's maps, and has the shadow do so. For a thread of its own: it waits for the shadow and for fsyncs. Only while a
/// shadow is in sync. Ends early when `go_on` says no. Does nothing when no bit could be dropped, unless
/// `anyway`: then the maps get a common basis all the same.
///
/// # Errors
/// [`RotateError`]; whatever bits are left tell what may differ.
pub fn rotate(
    disks: &[Arc<Image>],
    log: &WriteLog,
    anyway: bool,
    go_on: impl Fn() -> bool,
) -> Result<Rotated, RotateError> {
    let mut rotated = Rotated::default();
    if disks.iter().any(|disk| disk.is_doubtful()) {
        return Ok(rotated);
    }
    if !anyway && !disks.iter().any(|disk| disk.worth_rotating()) {
        rotated.done = true;
        return Ok(rotated);
    }
    let writable = disks.iter().filter(|disk| !disk.read_only());
    // Before the mark: a write that is not touched after this was recorded before it.
    let rotations: Vec<_> = writable.map(|disk| (disk, disk.begin_rotation())).collect();
    let Some(epoch) = log.mark_and_wait(&go_on) else {
        return Ok(rotated);
    };
    rotations
        .iter()
        .try_for_each(|(disk, _)| disk.flush_apart())?;
    let basis = Basis::random()?;
    let mut all = true;
    for (disk, rotation) in rotations {
        let dropped = disk.end_rotation(rotation, basis)?;
        rotated.dropped += dropped.unwrap_or(0);
        all &= dropped.is_some();
    }
    rotated.done = all && log.mark_end(epoch, basis.0);
    Ok(rotated)
}
