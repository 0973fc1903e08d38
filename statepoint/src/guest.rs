//! What the protocol asks of a guest.

use ax_wire::PAGE_SIZE;
use ax_wire::runs::Patch;
use ax_wire::state::StateWriter;

/// A guest-physical page number (guest-physical address / 4096).
pub type Page = u64;

/// Something went wrong inside the guest's machine; the epoch in progress is abandoned (I6).
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub struct GuestError {
    /// What was being done.
    pub doing: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First page.
    pub start: Page,
    /// Number of pages.
    pub pages: u64,
}

/// A running guest whose state can be captured. Called from the epoch thread only.
///
/// Order within one epoch (rule 3): `pause` → `save` → `harvest` → page reads → `resume`.
/// Between `pause` and `resume` nothing changes guest memory or device state.
pub trait Guest {
    /// RAM, ascending and disjoint; fixed for the guest's life.
    fn ram(&self) -> &[RamRegion];

    /// Starts (true) or stops dirty tracking. On start every page counts as clean.
    fn track_dirty(&mut self, on: bool) -> Result<(), GuestError>;

    /// About how many pages are dirty since the last harvest; may be called while it runs.
    fn dirty_estimate(&mut self) -> Result<usize, GuestError>;

    /// Parks every vCPU with its pending exit complete, then quiets the devices.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Pauses the guest that `of` finds in `whole` and then calls `act` once, on whatever thread is best
    /// for it: the one that ran the guest has what it wrote in its caches. Returns what `act` has
    /// returned, which may have resumed the guest.
    ///
    /// # Errors
    /// As [`Guest::pause`]; `act` was not called.
    fn pause_and<T: Send, R: Send>(
        whole: &mut T,
        of: impl Fn(&mut T) -> &mut Self,
        act: impl FnOnce(&mut T) -> R + Send,
    ) -> Result<R, GuestError>
    where
        Self: Sized,
    {
        of(whole).pause()?;
        Ok(act(whole))
    }

    /// Whether the guest had nothing to do when its state was last saved: the pause cost it nothing.
    fn was_idle(&self) -> bool {
        false
    }

    /// Appends all CPU, irqchip, clock and device state. Only while paused, before `harvest`.
    fn save(&mut self, out: &mut StateWriter<'_>) -> Result<(), GuestError>;

    /// Replaces `dirty` by the pages (unique, ascending) written since the last harvest, by vCPUs
    /// or devices, and counts them clean from here on. While paused it is exact; it may also be
    /// called while the guest runs (pre-copy), then a page written meanwhile is in this or the next.
    fn harvest(&mut self, dirty: &mut Vec<Page>) -> Result<(), GuestError>;

    /// Counts `pages` dirty again: their capture failed (I6).
    fn give_back(&mut self, pages: &[Page]);

    /// Copies consecutive pages starting at `first` into `out` (a multiple of [`PAGE_SIZE`] bytes).
    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError>;

    /// Lets devices and vCPUs go on.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// When the last vCPU was parked in the last `pause`, before the devices were quieted, nanoseconds of
    /// the engine's clock, if that is known. While paused.
    fn parked_ns(&self) -> Option<u64> {
        None
    }

    /// When the last vCPU ran again after the last `resume`, nanoseconds of the engine's clock, if that
    /// is known. While paused.
    fn resumed_ns(&self) -> Option<u64> {
        None
    }
}

/// The copy of a guest that does not run yet.
pub trait ShadowGuest {
    /// RAM, as the primary's.
    fn ram(&self) -> &[RamRegion];

    /// Writes consecutive pages starting at `first`; `data` is a multiple of [`PAGE_SIZE`] bytes.
    ///
    /// # Errors
    /// A page outside RAM: the peer is hostile or broken.
    fn write_pages(&mut self, first: Page, data: &[u8]) -> Result<(), GuestError>;

    /// Changes parts of one page.
    ///
    /// # Errors
    /// As [`ShadowGuest::write_pages`].
    fn patch_page(&mut self, page: Page, patch: &Patch<'_>) -> Result<(), GuestError> {
        let mut content = [0; PAGE_SIZE];
        self.read_pages(page, &mut content)?;
        patch.apply(&mut content);
        self.write_pages(page, &content)
    }

    /// Copies consecutive pages starting at `first` into `out`, for the verify mode's digest.
    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError>;
}

/// Bytes of `pages` pages.
pub const fn bytes_of(pages: usize) -> usize {
    pages * PAGE_SIZE
}
