//! The hot set: pages dirty in nearly every epoch.
//!
//! Protecting a page costs the guest a fault at its next write; comparing it with a copy costs us less.
//! So a page found dirty in [`PROMOTE`] harvests, hardly missing one, is no longer protected. KVM then
//! calls it dirty for ever, and each harvest compares it with what was last reported, unless it has
//! changed so often that it is taken for changed most times. When it has not changed for [`COOL`]
//! harvests it is protected again.

use ax_wire::{PAGE_SIZE, PageAligned};

use crate::memory::Ram;

/// Harvests a page must be dirty in before it is hot.
const PROMOTE: u32 = 8;
/// A page may miss this many harvests in between.
const MISS: u32 = 1;
/// Harvests without a change after which a hot page cools off.
const COOL: u32 = 8;
/// Changes in a row after which a hot page is taken for changed without a look, since to compare costs
/// more than to ship it: most of the pause, with many pages.
const SURE: u32 = 4;
/// Then it is copied and compared in two harvests out of so many, not all pages in the same ones.
const LOOK_EVERY: u32 = 16;
/// Pages watched for becoming hot; those that share a place compete.
const CANDIDATES: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Hot {
    page: u64,
    /// Which of the copies is this page's.
    copy: usize,
    /// The copy is what was last reported, and that report stands.
    copy_valid: bool,
    /// Harvests since it last changed.
    quiet: u32,
    /// Harvests in a row in which it was found changed.
    changes: u32,
    /// Harvest that last saw it.
    seen: u32,
    /// Protected again, and about to be forgotten.
    leaving: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Candidate {
    page: u64,
    score: u32,
    seen: u32,
}

/// A bounded set; all its memory is taken at the start.
#[derive(Debug)]
pub(super) struct HotSet {
    hot: Vec<Hot>,
    copies: PageAligned<u8>,
    free: Vec<usize>,
    candidates: Box<[Candidate]>,
    harvest: u32,
}

impl HotSet {
    /// At most `max` pages.
    pub(super) fn new(max: usize) -> Self {
        let candidates = if max == 0 { 0 } else { CANDIDATES };
        HotSet {
            hot: Vec::with_capacity(max),
            copies: PageAligned::new(max * PAGE_SIZE),
            free: (0..max).rev().collect(),
            candidates: vec![Candidate::default(); candidates].into(),
            harvest: 0,
        }
    }

    /// No page is hot any more.
    pub(super) fn clear(&mut self) {
        self.free.extend(self.hot.drain(..).map(|h| h.copy));
        self.candidates.fill(Candidate::default());
    }

    /// A harvest begins. Pages that were quiet long enough begin to leave: it protects them again,
    /// compares them a last time, and the next one finds them gone unless they changed.
    pub(super) fn next_harvest(&mut self) {
        let (free, last) = (&mut self.free, self.harvest);
        self.hot.retain_mut(|h| {
            if h.seen != last {
                h.quiet += 1; // still protected since it became hot, and not written
            }
            let stays = !h.leaving || h.quiet < COOL;
            if !stays {
                free.push(h.copy);
            }
            h.leaving = h.quiet >= COOL;
            stays
        });
        self.harvest = self.harvest.wrapping_add(1);
    }

    /// Calls `each` with the pages in `from..to` that are not to be protected.
    pub(super) fn pages_within(&self, from: u64, to: u64, mut each: impl FnMut(u64)) {
        let start = self.hot.partition_point(|h| h.page < from);
        let inside = self.hot.iter().skip(start).take_while(|h| h.page < to);
        inside.filter(|h| !h.leaving).for_each(|h| each(h.page));
    }

    /// Whether to report a page found dirty: not when it is hot and as last reported.
    ///
    /// While the guest runs, what the caller copies later may be newer than what is here now; so
    /// then every page is reported and no copy counts.
    pub(super) fn report(&mut self, ram: &Ram, page: u64, paused: bool) -> bool {
        match self.hot.binary_search_by_key(&page, |h| h.page) {
            Ok(at) => self.report_hot(ram, at, paused),
            Err(at) => {
                if self.is_now_hot(page) && paused {
                    self.promote(ram, page, at);
                }
                true
            }
        }
    }

    fn report_hot(&mut self, ram: &Ram, at: usize, paused: bool) -> bool {
        let Some(hot) = self.hot.get_mut(at) else {
            return true;
        };
        hot.seen = self.harvest;
        let looks =
            hot.changes < SURE || self.harvest.wrapping_add(hot.page as u32) % LOOK_EVERY < 2;
        if !paused || !looks {
            hot.copy_valid = false;
            return true;
        }
        let changed =
            refresh(ram, hot.page, copy_of(&mut self.copies, hot.copy)) || !hot.copy_valid;
        hot.copy_valid = true;
        if changed {
            (hot.quiet, hot.changes) = (0, hot.changes.saturating_add(1));
        } else {
            (hot.quiet, hot.changes) = (hot.quiet + 1, 0);
        }
        changed
    }

    /// Counts a page dirty once more; true when that makes it hot.
    fn is_now_hot(&mut self, page: u64) -> bool {
        let at = (page % CANDIDATES as u64) as usize;
        let Some(c) = self.candidates.get_mut(at) else {
            return false;
        };
        let age = self.harvest.wrapping_sub(c.seen);
        if c.page == page && c.score > 0 && age <= 1 + MISS {
            c.score += 1;
        } else if c.page == page || c.score == 0 || age > 1 + MISS {
            *c = Candidate {
                page,
                score: 1,
                seen: self.harvest,
            };
        } else {
            return false; // its place is taken by a page that is dirty as often
        }
        c.seen = self.harvest;
        c.score >= PROMOTE
    }

    fn promote(&mut self, ram: &Ram, page: u64, at: usize) {
        if let Some(copy) = self.free.pop() {
            refresh(ram, page, copy_of(&mut self.copies, copy));
            let seen = self.harvest;
            self.hot.insert(
                at,
                Hot {
                    page,
                    copy,
                    copy_valid: true,
                    quiet: 0,
                    changes: 0,
                    seen,
                    leaving: false,
                },
            );
        }
    }

    /// A page's last report does not stand: the next harvest reports it whatever it holds.
    pub(super) fn forget_copy(&mut self, page: u64) {
        if let Ok(at) = self.hot.binary_search_by_key(&page, |h| h.page)
            && let Some(hot) = self.hot.get_mut(at)
        {
            hot.copy_valid = false;
        }
    }
}

/// Copy number `copy`.
fn copy_of(copies: &mut [u8], copy: usize) -> &mut [u8] {
    let at = copy * PAGE_SIZE;
    copies.get_mut(at..at + PAGE_SIZE).unwrap_or_default()
}

/// Makes the copy equal to the page; true when it was not.
fn refresh(ram: &Ram, page: u64, copy: &mut [u8]) -> bool {
    match ram.locate(page) {
        Some((slot, page)) => ram.compare_and_copy(slot, page, copy),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(ram: &Ram, page: u64, byte: u8) {
        ram.write_pages(page, &[byte; PAGE_SIZE]).unwrap();
    }

    /// A harvest in which KVM calls the pages dirty; those reported.
    fn harvest(hot: &mut HotSet, ram: &Ram, dirty: &[u64], paused: bool) -> Vec<u64> {
        hot.next_harvest();
        dirty
            .iter()
            .copied()
            .filter(|p| hot.report(ram, *p, paused))
            .collect()
    }

    fn hot_pages(hot: &HotSet) -> Vec<u64> {
        let mut pages = Vec::new();
        hot.pages_within(0, u64::MAX, |p| pages.push(p));
        pages
    }

    fn heated(max: usize, pages: &[u64]) -> (Ram, HotSet) {
        let ram = Ram::new(16 << 20).unwrap();
        let mut hot = HotSet::new(max);
        for _ in 0..PROMOTE {
            assert_eq!(harvest(&mut hot, &ram, pages, true), pages);
        }
        (ram, hot)
    }

    #[test]
    fn a_page_dirty_in_every_harvest_becomes_hot_and_is_reported_only_when_changed() {
        let (ram, mut hot) = heated(4, &[3, 7]);
        assert_eq!(hot_pages(&hot), [3, 7]);
        write(&ram, 7, 1);
        assert_eq!(harvest(&mut hot, &ram, &[3, 7], true), [7]);
        assert_eq!(harvest(&mut hot, &ram, &[3, 7], true), [] as [u64; 0]);
    }

    #[test]
    fn a_quiet_page_cools_off_without_being_reported() {
        let (ram, mut hot) = heated(4, &[3]);
        for _ in 0..COOL {
            assert!(harvest(&mut hot, &ram, &[3], true).is_empty());
        }
        assert_eq!(hot_pages(&hot), [3]);
        assert!(harvest(&mut hot, &ram, &[3], true).is_empty()); // protected again
        assert!(hot_pages(&hot).is_empty());
        assert!(harvest(&mut hot, &ram, &[], true).is_empty());
        write(&ram, 3, 1);
        assert_eq!(harvest(&mut hot, &ram, &[3], true), [3]);
    }

    #[test]
    fn a_page_that_changes_while_leaving_is_reported_and_stays() {
        let (ram, mut hot) = heated(4, &[3]);
        for _ in 0..COOL {
            assert!(harvest(&mut hot, &ram, &[3], true).is_empty());
        }
        write(&ram, 3, 1);
        assert_eq!(harvest(&mut hot, &ram, &[3], true), [3]);
        assert!(harvest(&mut hot, &ram, &[3], true).is_empty());
        assert_eq!(hot_pages(&hot), [3]);
    }

    #[test]
    fn a_page_given_back_is_reported_again_though_unchanged() {
        let (ram, mut hot) = heated(4, &[3]);
        write(&ram, 3, 9);
        assert_eq!(harvest(&mut hot, &ram, &[3], true), [3]);
        hot.forget_copy(3);
        assert_eq!(harvest(&mut hot, &ram, &[3], true), [3]);
        assert!(harvest(&mut hot, &ram, &[3], true).is_empty());
    }

    #[test]
    fn a_harvest_of_a_running_guest_hides_nothing_now_or_next_time() {
        let (ram, mut hot) = heated(4, &[3]);
        assert_eq!(harvest(&mut hot, &ram, &[3], false), [3]);
        // The caller may have copied content that has changed back since.
        assert_eq!(harvest(&mut hot, &ram, &[3], true), [3]);
    }

    #[test]
    fn a_page_that_always_changed_is_found_out_when_it_stops() {
        let (ram, mut hot) = heated(4, &[7]);
        for n in 0..SURE as u8 {
            write(&ram, 7, n + 1);
            assert_eq!(harvest(&mut hot, &ram, &[7], true), [7]);
        }
        // It may be reported for a while though it has not changed, but it cools off.
        let mut late = 0;
        for harvests in 0.. {
            if hot_pages(&hot).is_empty() {
                break;
            }
            assert!(harvests < 2 * LOOK_EVERY, "still hot");
            late += harvest(&mut hot, &ram, &[7], true).len();
        }
        assert!((1..=LOOK_EVERY as usize).contains(&late), "{late}");
        // What it holds afterwards is not missed.
        harvest(&mut hot, &ram, &[], true);
        write(&ram, 7, 99);
        assert_eq!(harvest(&mut hot, &ram, &[7], true), [7]);
    }

    #[test]
    fn no_change_of_a_page_that_always_changes_is_missed() {
        let (ram, mut hot) = heated(4, &[7]);
        for n in 1..=100 {
            write(&ram, 7, n);
            assert_eq!(harvest(&mut hot, &ram, &[7], true), [7], "{n}");
        }
        assert_eq!(hot_pages(&hot), [7]);
    }

    #[test]
    fn the_set_is_bounded() {
        let pages: Vec<u64> = (10..20).collect();
        let (ram, mut hot) = heated(4, &pages);
        assert_eq!(hot_pages(&hot).len(), 4);
        assert_eq!(harvest(&mut hot, &ram, &pages, true).len(), 6);
        hot.clear();
        assert!(hot_pages(&hot).is_empty());
        let (_, none) = heated(0, &pages);
        assert!(hot_pages(&none).is_empty());
    }
}
