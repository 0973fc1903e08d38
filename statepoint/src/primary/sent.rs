//! What the shadow has of the pages that are sent again and again, so that a patch can be sent instead.
//!
//! Most dirty pages of a short epoch are the same as in the one before, and little in them has changed: a
//! stack, a ring's index, a counter. A bounded cache keeps their last sent content; what pays is sent as a
//! patch ([`ax_wire::runs`]). All of it happens while the guest runs.
//!
//! A patch is right only for a shadow that has exactly what is cached. So the cache is emptied with every
//! new connection, from which on epochs may be sent a second time, and a page that is sent any other way
//! is forgotten.

use ax_wire::runs::push_patch;
use ax_wire::{PAGE_SIZE, PageAligned};

use crate::guest::Page;

/// Pages whose content is kept: 4 MiB.
pub(super) const KEPT: usize = 1024;
/// Pages that share a set; the least recently sent one leaves.
const WAYS: usize = 4;
/// Longest patch, bytes, its headers included.
const MOST: usize = PAGE_SIZE * 3 / 4;
/// Patches in a row that did not pay, after which a page is sent whole for a while.
const IN_VAIN: u8 = 2;
/// How often then, without a look.
const REST: u8 = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Tag {
    page: Page,
    /// When it was last sent; 0: the place is free.
    used: u64,
    /// The shadow has what is kept of it.
    known: bool,
    in_vain: u8,
    rest: u8,
}

/// The cache. All its memory is taken at the start, and resident as far as used.
#[derive(Debug)]
pub(super) struct Sent {
    tags: Box<[Tag]>,
    contents: PageAligned<u8>,
    sets: usize,
    now: u64,
}

impl Sent {
    /// Keeps at most `pages` (rounded down to whole sets).
    pub fn new(pages: usize) -> Sent {
        let sets = pages / WAYS;
        Sent {
            tags: vec![Tag::default(); sets * WAYS].into(),
            contents: PageAligned::new(sets * WAYS * PAGE_SIZE),
            sets,
            now: 0,
        }
    }

    /// Forgets everything: a connection begins.
    pub fn clear(&mut self) {
        self.tags.fill(Tag::default());
    }

    /// Where a page is, or may be put.
    fn set(&self, page: Page) -> std::ops::Range<usize> {
        let set = page.checked_rem(self.sets as u64).unwrap_or(0) as usize;
        set * WAYS..((set + 1) * WAYS).min(self.tags.len())
    }

    fn find(&self, page: Page) -> Option<usize> {
        let is = |at: &usize| {
            let tag = self.tags.get(*at);
            tag.is_some_and(|tag| tag.page == page && tag.used != 0)
        };
        self.set(page).find(is)
    }

    /// The page is sent some other way.
    pub fn forget(&mut self, page: Page) {
        if let Some(tag) = self.find(page).and_then(|at| self.tags.get_mut(at)) {
            tag.known = false;
        }
    }

    /// Appends the page as a patch of what was sent last, if that pays; false: it is for the caller to send it
    /// whole. Either way `content` is what the shadow has next.
    pub fn patch(&mut self, page: Page, content: &[u8], out: &mut Vec<u8>) -> bool {
        self.now += 1;
        let Some(at) = self.find(page) else {
            self.meet(page);
            return false;
        };
        let kept = self.contents.get_mut(at * PAGE_SIZE..(at + 1) * PAGE_SIZE);
        let (Some(tag), Some(kept)) = (self.tags.get_mut(at), kept) else {
            return false;
        };
        tag.used = self.now;
        if tag.rest > 0 {
            tag.rest -= 1;
            return false;
        }
        let patched = tag.known && push_patch(page, kept, content, MOST, out);
        if tag.known && !patched {
            tag.in_vain += 1;
            if tag.in_vain >= IN_VAIN {
                (tag.known, tag.in_vain, tag.rest) = (false, 0, REST);
                return false;
            }
        } else {
            tag.in_vain = 0;
        }
        kept.copy_from_slice(content);
        tag.known = true;
        patched
    }

    /// Remembers that the page was sent; its content is kept from the second time on, so that what is
    /// written once costs nothing.
    fn meet(&mut self, page: Page) {
        let now = self.now;
        let set = self.set(page);
        let oldest = self
            .tags
            .get_mut(set)
            .and_then(|set| set.iter_mut().min_by_key(|tag| tag.used));
        if let Some(tag) = oldest {
            *tag = Tag {
                page,
                used: now,
                ..Tag::default()
            };
        }
    }
}

/// The machine's state as it was sent last: from one epoch to the next most of it stays as it is.
#[derive(Debug)]
pub(super) struct SentState {
    /// Whole pieces: what is beyond the state's end is zero.
    last: Vec<u8>,
    fresh: Vec<u8>,
    /// Length of the state in `last`; none when the shadow is not known to have it.
    known: Option<usize>,
}

impl SentState {
    /// For states of at most `bytes`.
    pub fn new(bytes: usize) -> SentState {
        let room = bytes.next_multiple_of(PAGE_SIZE);
        SentState {
            last: Vec::with_capacity(room),
            fresh: Vec::with_capacity(room),
            known: None,
        }
    }

    /// Forgets it: a connection begins.
    pub fn clear(&mut self) {
        self.known = None;
    }

    /// Appends `state` as patches of the one before, if that pays; false: it is for the caller to send it
    /// whole. Either way it is what the shadow has next. A state of no bytes, as of a pair that shares its disks alone,
    /// is sent as none.
    pub fn patch(&mut self, state: &[u8], out: &mut Vec<u8>) -> bool {
        if state.is_empty() {
            self.known = None;
            return false;
        }
        self.fresh.clear();
        self.fresh.extend_from_slice(state);
        self.fresh
            .resize(state.len().next_multiple_of(PAGE_SIZE), 0);
        let start = out.len();
        let most = state.len() / 4 * 3;
        let mut patched = self.known.replace(state.len()) == Some(state.len());
        if patched {
            let pieces = self.last.chunks_exact(PAGE_SIZE);
            for ((old, new), piece) in pieces.zip(self.fresh.chunks_exact(PAGE_SIZE)).zip(0..) {
                let left = most.saturating_sub(out.len() - start);
                if old != new && !push_patch(piece, old, new, left, out) {
                    patched = false;
                    out.truncate(start);
                    break;
                }
            }
        }
        std::mem::swap(&mut self.last, &mut self.fresh);
        patched
    }
}

#[cfg(test)]
mod tests {
    use ax_wire::runs::{Content, Runs};
    use proptest::prelude::*;

    use super::*;

    /// What a shadow makes of the patch in `out` and what it has.
    fn apply(out: &[u8], page: Page, there: &mut [u8]) {
        for run in Runs::new(out) {
            let run = run.unwrap();
            assert_eq!((run.first, run.pages), (page, 1));
            let Content::Patch(patch) = run.content else {
                panic!("{run:?}");
            };
            patch.apply(there);
        }
    }

    fn sends(sent: &mut Sent, page: Page, content: &[u8]) -> Option<usize> {
        let mut out = Vec::new();
        sent.patch(page, content, &mut out).then_some(out.len())
    }

    #[test]
    fn a_page_is_patched_from_the_third_time_on_and_whole_again_after_a_new_connection() {
        let mut sent = Sent::new(64);
        let mut page = vec![1; PAGE_SIZE];
        for (round, patched) in [false, false, true, true].into_iter().enumerate() {
            page[100] = round as u8;
            assert_eq!(sends(&mut sent, 5, &page).is_some(), patched, "{round}");
        }
        assert!(sends(&mut sent, 5, &page).unwrap() < 40);
        sent.forget(5);
        assert_eq!(sends(&mut sent, 5, &page), None);
        assert!(sends(&mut sent, 5, &page).is_some());
        sent.clear();
        assert_eq!(sends(&mut sent, 5, &page), None);
        let mut none = Sent::new(0);
        (0..4).for_each(|_| assert_eq!(sends(&mut none, 5, &page), None));
    }

    #[test]
    fn a_page_that_changes_as_a_whole_is_let_be_and_looked_at_again_later() {
        let mut sent = Sent::new(64);
        let whole = |n: usize| vec![n as u8; PAGE_SIZE];
        for n in 0..8 {
            assert_eq!(sends(&mut sent, 5, &whole(n)), None);
        }
        // It has changed its ways, which is found out in the end.
        let first = (0..40).position(|_| sends(&mut sent, 5, &whole(9)).is_some());
        assert!(first.is_some_and(|n| n > 1), "{first:?}");
    }

    #[test]
    fn the_least_recently_sent_leaves() {
        let mut sent = Sent::new(WAYS);
        let page = vec![1; PAGE_SIZE];
        let all = |sent: &mut Sent, pages: std::ops::Range<u64>| {
            pages.filter(|p| sends(sent, *p, &page).is_some()).count()
        };
        for _ in 0..2 {
            all(&mut sent, 0..4);
        }
        assert_eq!(all(&mut sent, 0..4), 4);
        all(&mut sent, 9..10);
        assert_eq!(all(&mut sent, 1..4), 3, "0 left");
    }

    #[test]
    fn a_state_is_patched_while_its_length_stays_and_little_of_it_changes() {
        let mut sent = SentState::new(10_000);
        let mut out = Vec::new();
        let mut state = vec![1; 9_001];
        assert!(!sent.patch(&state, &mut out));
        assert!(sent.patch(&state, &mut out) && out.is_empty());
        (state[0], state[9_000]) = (2, 3);
        assert!(sent.patch(&state, &mut out));
        let runs: Vec<_> = Runs::new(&out).map(|run| run.unwrap().first).collect();
        assert_eq!(runs, [0, 2]);
        out.clear();
        state.pop();
        assert!(!sent.patch(&state, &mut out));
        state.fill(9);
        assert!(!sent.patch(&state, &mut out));
        assert!(sent.patch(&state, &mut out));
        sent.clear();
        assert!(!sent.patch(&state, &mut out) && out.is_empty());
    }

    #[test]
    fn a_state_of_no_bytes_is_never_patched() {
        let mut sent = SentState::new(10_000);
        let mut out = Vec::new();
        assert!((0..3).all(|_| !sent.patch(&[], &mut out)));
        assert!(!sent.patch(&[1; 4000], &mut out) && sent.patch(&[1; 4000], &mut out));
        assert!(!sent.patch(&[], &mut out) && !sent.patch(&[1; 4000], &mut out));
        assert!(out.is_empty());
    }

    proptest! {
        #[test]
        fn a_shadow_that_does_as_told_has_what_was_sent(
            steps in prop::collection::vec((0u64..12, 0usize..PAGE_SIZE, any::<u8>(), 0usize..9), 1..400),
        ) {
            let mut sent = Sent::new(8);
            let mut here = vec![vec![0u8; PAGE_SIZE]; 12];
            let mut there = here.clone();
            for (page, at, byte, kind) in steps {
                let at_page = page as usize;
                match kind {
                    0 => {
                        sent.forget(page);
                        here[at_page].fill(byte);
                        there[at_page] = here[at_page].clone();
                        continue;
                    }
                    1 => here[at_page].fill(byte),
                    _ => here[at_page][at] = byte,
                }
                let mut out = Vec::new();
                if sent.patch(page, &here[at_page], &mut out) {
                    apply(&out, page, &mut there[at_page]);
                } else {
                    prop_assert!(out.is_empty());
                    there[at_page] = here[at_page].clone();
                }
                prop_assert_eq!(&here[at_page], &there[at_page]);
            }
        }
    }
}
