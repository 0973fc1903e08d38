//! A dirty bitmap with a summary, so that finding few dirty pages in much RAM is cheap.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use ax_wire::PAGE_SIZE;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// One bit per page of a region of guest RAM, and one summary bit per 64 of them.
///
/// It is the bitmap of the region in vm-memory, so every device write marks it; pages that KVM
/// reports and pages given back (I6) are marked in it too. Draining it yields the union, unique
/// and ascending. A drain of 4 GiB with nothing dirty reads 256 words.
#[derive(Debug, Default)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
    pages: usize,
}

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyBitmap {
    /// All clean.
    pub fn new(pages: usize) -> Self {
        let words = pages.div_ceil(64);
        DirtyBitmap {
            words: zeroed(words),
            summary: zeroed(words.div_ceil(64)),
            pages,
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Marks the pages whose bits are set in `bits`, which stands for pages `64 * word ..`. Bits
    /// past the last page are ignored.
    ///
    /// The word is marked before its summary, and `fetch_or` orders both after the caller's write
    /// of the page itself: a drain that misses the mark has its page reported by the next one.
    pub fn mark_word(&self, word: usize, bits: u64) {
        let last = self.pages.saturating_sub(word.saturating_mul(64));
        let bits = if last >= 64 {
            bits
        } else {
            bits & ((1u64 << last) - 1)
        };
        if bits == 0 {
            return;
        }
        if let Some(w) = self.words.get(word)
            && w.fetch_or(bits, Ordering::SeqCst) == 0
            && let Some(s) = self.summary.get(word / 64)
        {
            s.fetch_or(1 << (word % 64), Ordering::SeqCst);
        }
    }

    /// Marks one page. A page outside the region is ignored.
    pub fn mark_page(&self, page: usize) {
        self.mark_word(page / 64, 1 << (page % 64));
    }

    /// True when `page` is marked.
    pub fn is_marked(&self, page: usize) -> bool {
        let word = self.words.get(page / 64);
        word.is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 == 1)
    }

    /// Number of marked pages.
    pub fn count(&self) -> usize {
        let mut count = 0;
        for (i, summary) in self.summary.iter().enumerate() {
            for_each_bit(summary.load(Ordering::Relaxed), |bit| {
                if let Some(word) = self.words.get(i * 64 + bit) {
                    count += word.load(Ordering::Relaxed).count_ones() as usize;
                }
            });
        }
        count
    }

    /// Unmarks every page and calls `each` with those that were marked, ascending.
    pub fn drain(&self, mut each: impl FnMut(usize)) {
        for (i, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::SeqCst) == 0 {
                continue;
            }
            for_each_bit(summary.swap(0, Ordering::SeqCst), |bit| {
                let at = i * 64 + bit;
                if let Some(word) = self.words.get(at) {
                    for_each_bit(word.swap(0, Ordering::SeqCst), |bit| each(at * 64 + bit));
                }
            });
        }
    }
}

/// Calls `each` with the numbers of the set bits of `word`, ascending.
pub(crate) fn for_each_bit(mut word: u64, mut each: impl FnMut(usize)) {
    while word != 0 {
        each(word.trailing_zeros() as usize);
        word &= word - 1;
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        (offset / PAGE_SIZE..=last.min(self.pages.saturating_sub(1)))
            .for_each(|p| self.mark_page(p));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked(offset / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        const PAGE: Option<NonZeroUsize> = NonZeroUsize::new(PAGE_SIZE);
        DirtyBitmap::new(PAGE.map_or(0, |p| len.div_ceil(p.get())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn drained(b: &DirtyBitmap) -> Vec<usize> {
        let mut out = Vec::new();
        b.drain(|p| out.push(p));
        out
    }

    #[test]
    fn drain_yields_each_marked_page_once_and_ascending() {
        let bitmap = DirtyBitmap::new(10_001);
        let mut want = BTreeSet::new();
        let mut x = 1u64;
        for _ in 0..3000 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let page = (x >> 33) as usize % 11_000;
            bitmap.mark_page(page);
            if page < 10_001 {
                want.insert(page);
            }
        }
        assert_eq!(bitmap.count(), want.len());
        assert_eq!(drained(&bitmap), want.into_iter().collect::<Vec<_>>());
        assert!(drained(&bitmap).is_empty());
    }

    #[test]
    fn a_range_marks_every_page_it_touches_and_no_other() {
        let bitmap = DirtyBitmap::new(200);
        bitmap.mark_dirty(63 * PAGE_SIZE + 4095, 2);
        bitmap.mark_dirty(199 * PAGE_SIZE, 10 * PAGE_SIZE);
        bitmap.mark_dirty(5 * PAGE_SIZE, 0);
        assert!(bitmap.dirty_at(64 * PAGE_SIZE + 7));
        assert_eq!(drained(&bitmap), [63, 64, 199]);
    }

    #[test]
    fn no_mark_is_lost_between_concurrent_drains() {
        let bitmap = DirtyBitmap::new(4096);
        let mut seen = vec![0u32; 4096];
        std::thread::scope(|s| {
            let marker = s.spawn(|| (0..4096).for_each(|p| bitmap.mark_page(p)));
            while !marker.is_finished() {
                bitmap.drain(|p| seen[p] += 1);
            }
        });
        bitmap.drain(|p| seen[p] += 1);
        assert!(seen.iter().all(|n| *n == 1));
    }
}
