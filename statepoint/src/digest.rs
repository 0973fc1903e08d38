//! The verify mode's digest of a whole RAM.

use ax_wire::PAGE_SIZE;

use crate::guest::{GuestError, Page, RamRegion};

/// Pages hashed at a time.
const CHUNK: u64 = 64;

/// Digest of all `ram`, read through `read` in ascending order. Not cryptographic: it finds bugs, not
/// forgers (the stream is authenticated).
pub(crate) fn digest(
    ram: &[RamRegion],
    scratch: &mut Vec<u8>,
    mut read: impl FnMut(Page, &mut [u8]) -> Result<(), GuestError>,
) -> Result<u64, GuestError> {
    let mut sum = 0x9e37_79b9_7f4a_7c15u64;
    for region in ram {
        let mut page = region.start;
        let end = region.start.saturating_add(region.pages);
        while page < end {
            let pages = (end - page).min(CHUNK);
            scratch.resize(pages as usize * PAGE_SIZE, 0);
            read(page, scratch)?;
            sum ^= u64::from(crc32fast::hash(scratch)) ^ page.rotate_left(32);
            sum = sum.rotate_left(23).wrapping_mul(0xff51_afd7_ed55_8ccd);
            page += pages;
        }
    }
    Ok(sum)
}
