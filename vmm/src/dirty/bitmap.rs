//! KVM's dirty bitmap with manual protect: fetched as a whole, protected again page by page, except
//! for the hot set.

use ax_wire::PageAligned;
use kvm_ioctls::VmFd;

use super::Source;
use super::hot::HotSet;
use crate::error::{Doing, Result};
use crate::memory::Ram;
use crate::sys;

/// Bitmap of one slot, and the pages to protect again.
struct Slot {
    first_page: u64,
    pages: u64,
    fetched: PageAligned<u64>,
    /// What an estimate fetches: on another thread than a capture, whose core keeps `fetched` in its
    /// caches.
    looked_at: PageAligned<u64>,
    clear: Box<[u64]>,
}

/// Dirty pages by bitmap.
pub(super) struct BitmapSource {
    slots: Vec<Slot>,
    hot: HotSet,
}

impl BitmapSource {
    pub(super) fn new(ram: &Ram, hot_pages: usize) -> Self {
        let slots = ram.regions().iter().map(|r| {
            let words = r.pages.div_ceil(64) as usize;
            Slot {
                first_page: r.start,
                pages: r.pages,
                fetched: PageAligned::new(words),
                looked_at: PageAligned::new(words),
                clear: vec![0; words].into(),
            }
        });
        BitmapSource {
            slots: slots.collect(),
            hot: HotSet::new(hot_pages),
        }
    }
}

/// Calls `each` with the words that are not zero, and where they are. Most are: a cache line is looked at
/// as a whole.
fn each_dirty_word(words: &[u64], mut each: impl FnMut(usize, u64)) {
    for (line, words) in words.chunks(8).enumerate() {
        if words.iter().fold(0, |all, word| all | word) == 0 {
            continue;
        }
        for (at, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            each(line * 8 + at, *word);
        }
    }
}

impl Source for BitmapSource {
    /// Switching the log off and on has cleared KVM's bitmap and protected every page.
    fn start(&mut self, _: &VmFd, _: &Ram) -> Result<()> {
        self.hot.clear();
        Ok(())
    }

    /// Fetches, marks, then protects again what is not hot. A page written between fetch and
    /// protection is marked already, and its content copied later.
    fn collect(&mut self, vm: &VmFd, ram: &Ram) -> Result<()> {
        self.hot.next_harvest();
        for (number, slot) in self.slots.iter_mut().enumerate() {
            sys::get_dirty_log(vm, number as u32, slot.pages, &mut slot.fetched)
                .doing("KVM_GET_DIRTY_LOG")?;
            let Some(marks) = ram.dirty(number) else {
                continue;
            };
            let (mut first, mut last) = (usize::MAX, 0);
            each_dirty_word(&slot.fetched, |at, word| {
                marks.mark_word(at, word);
                if let Some(clear) = slot.clear.get_mut(at) {
                    *clear = word;
                }
                (first, last) = (first.min(at), at);
            });
            if first == usize::MAX {
                continue;
            }
            let (from, to) = (
                slot.first_page + first as u64 * 64,
                slot.first_page + last as u64 * 64 + 64,
            );
            self.hot.pages_within(from, to, |page| {
                let at = (page - slot.first_page) as usize;
                if let Some(word) = slot.clear.get_mut(at / 64) {
                    *word &= !(1 << (at % 64));
                }
            });
            let window = slot.clear.get_mut(first..=last).unwrap_or_default();
            let from = first as u64 * 64;
            let count = (window.len() as u64 * 64).min(slot.pages - from);
            let cleared = if window.iter().any(|w| *w != 0) {
                sys::clear_dirty_log(vm, number as u32, from, count as u32, window)
            } else {
                Ok(())
            };
            window.fill(0);
            cleared.doing("KVM_CLEAR_DIRTY_LOG")?;
        }
        Ok(())
    }

    fn estimate(&mut self, vm: &VmFd, _: &Ram) -> Result<usize> {
        let mut dirty = 0;
        for (number, slot) in self.slots.iter_mut().enumerate() {
            sys::get_dirty_log(vm, number as u32, slot.pages, &mut slot.looked_at)
                .doing("KVM_GET_DIRTY_LOG")?;
            each_dirty_word(&slot.looked_at, |_, word| {
                dirty += word.count_ones() as usize
            });
        }
        Ok(dirty)
    }

    fn report(&mut self, ram: &Ram, page: u64, paused: bool) -> bool {
        self.hot.report(ram, page, paused)
    }

    fn given_back(&mut self, page: u64) {
        self.hot.forget_copy(page);
    }
}
