//! Page runs: what the pages of an epoch, or of the initial copy, look like in a frame.
//!
//! A run is a 16-byte header and what its content asks for: nothing (zero pages), the pages' bytes, or a
//! *patch*, which says what of one page has changed since the epoch before:
//!
//! ```text
//! patch   extents u32, extents × (offset u16, length u16), then the extents' bytes one after the other
//! ```
//!
//! A patch is of use only to who has the page as it was after the epoch before; the stream is applied
//! in order, so a shadow in step has. Wire version 2 has patches.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use crate::stream::{FrameError, FrameKind, MAX_PAYLOAD};
use crate::{PAGE_SIZE, Since, Version};

/// What precedes each run of consecutive pages.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRun {
    first: little_endian::U64,
    pages: little_endian::U32,
    content: little_endian::U32,
}

/// Bytes of a run's header.
pub const RUN_HEADER: usize = size_of::<RawRun>();

/// Most pages with content that one frame can carry in one run.
pub const MAX_RUN: usize = (MAX_PAYLOAD - RUN_HEADER) / PAGE_SIZE;

const ZERO: u32 = 0;
const DATA: u32 = 1;
const PATCH: u32 = 2;

/// A part of a page, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawExtent {
    offset: little_endian::U16,
    length: little_endian::U16,
}

/// What is said of the pages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Every byte is zero.
    Zero,
    /// Their bytes.
    Data(&'a [u8]),
    /// What of the one page has changed.
    Patch(Patch<'a>),
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// First guest page number.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// What they hold.
    pub content: Content<'a>,
}

/// The parts of one page that have changed; every one of them lies within the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch<'a> {
    extents: &'a [RawExtent],
    bytes: &'a [u8],
}

impl<'a> Patch<'a> {
    /// Changes `page`, [`PAGE_SIZE`] bytes.
    pub fn apply(&self, page: &mut [u8]) {
        for (at, part) in self.parts() {
            if let Some(place) = page.get_mut(at..at + part.len()) {
                place.copy_from_slice(part);
            }
        }
    }

    /// Each part: its offset in the page and what it holds now.
    pub fn parts(&self) -> impl Iterator<Item = (usize, &'a [u8])> {
        let mut rest = self.bytes;
        self.extents.iter().map_while(move |extent| {
            let (part, more) = rest.split_at_checked(usize::from(extent.length.get()))?;
            rest = more;
            Some((usize::from(extent.offset.get()), part))
        })
    }
}

/// Patches, as something that not every wire version has.
#[derive(Clone, Copy, Debug)]
pub struct Patches;

impl Since for Patches {
    fn since(&self) -> Version {
        Version::SECOND
    }

    fn name(&self) -> &'static str {
        "patch of a page"
    }
}

fn header(first: u64, pages: u32, content: u32) -> [u8; RUN_HEADER] {
    let raw = RawRun {
        first: first.into(),
        pages: pages.into(),
        content: content.into(),
    };
    zerocopy::transmute!(raw)
}

/// A run's header: `data` tells whether `pages` × [`PAGE_SIZE`] bytes follow or all are zero.
pub fn run_header(first: u64, pages: u32, data: bool) -> [u8; RUN_HEADER] {
    header(first, pages, if data { DATA } else { ZERO })
}

/// Appends the patch that makes `new` of `old`, both [`PAGE_SIZE`] bytes, as a run of the page `page`, if it
/// takes at most `most` bytes; else nothing. Returns whether it did. Equal pages make a patch without parts.
pub fn push_patch(page: u64, old: &[u8], new: &[u8], most: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.extend_from_slice(&header(page, 1, PATCH));
    let count_at = out.len();
    out.extend_from_slice(&[0; 4]);
    let mut extents = 0u32;
    let mut bytes = 0;
    each_change(old, new, |offset, part| {
        let raw = RawExtent {
            offset: (offset as u16).into(),
            length: (part.len() as u16).into(),
        };
        out.extend_from_slice(raw.as_bytes());
        (extents, bytes) = (extents + 1, bytes + part.len());
        out.len() - start + bytes <= most
    });
    if out.len() - start + bytes > most {
        out.truncate(start);
        return false;
    }
    if let Some(place) = out.get_mut(count_at..count_at + 4) {
        place.copy_from_slice(&extents.to_le_bytes());
    }
    let mut at = count_at + 4;
    for _ in 0..extents {
        let raw = out
            .get(at..)
            .and_then(|rest| RawExtent::read_from_prefix(rest).ok());
        let Some((raw, _)) = raw else { break };
        let from = usize::from(raw.offset.get());
        let to = from + usize::from(raw.length.get());
        out.extend_from_slice(new.get(from..to).unwrap_or_default());
        at += size_of::<RawExtent>();
    }
    true
}

/// Bytes compared at once where pages are equal.
const LINE: usize = 64;
/// Grain of a part, bytes.
const WORD: usize = 8;
/// Equal bytes between two changes that are sent all the same: they cost no more than another extent.
const GAP: usize = WORD;

/// Calls `each` with the parts of `new` that differ from `old`, ascending, while it returns true.
fn each_change<'n>(old: &[u8], new: &'n [u8], mut each: impl FnMut(usize, &'n [u8]) -> bool) {
    let mut open: Option<(usize, usize)> = None;
    let lines = old.chunks_exact(LINE).zip(new.chunks_exact(LINE));
    for (line, (old, fresh)) in lines.enumerate() {
        if old == fresh {
            continue;
        }
        let words = old.chunks_exact(WORD).zip(fresh.chunks_exact(WORD));
        for (word, _) in words.enumerate().filter(|(_, (old, new))| old != new) {
            let at = line * LINE + word * WORD;
            open = match open {
                Some((from, to)) if at - to <= GAP => Some((from, at + WORD)),
                Some((from, to)) => {
                    if !each(from, new.get(from..to).unwrap_or_default()) {
                        return;
                    }
                    Some((at, at + WORD))
                }
                None => Some((at, at + WORD)),
            };
        }
    }
    if let Some((from, to)) = open {
        each(from, new.get(from..to).unwrap_or_default());
    }
}

/// Reads the page runs of a payload; stops after the first error.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    rest: &'a [u8],
}

impl<'a> Runs<'a> {
    /// Reads `payload` from its start.
    pub fn new(payload: &'a [u8]) -> Self {
        Runs { rest: payload }
    }

    fn read(&mut self) -> Option<Run<'a>> {
        let (raw, rest) = RawRun::read_from_prefix(self.rest).ok()?;
        let (first, pages) = (raw.first.get(), u64::from(raw.pages.get()));
        if pages == 0 || first.checked_add(pages).is_none() {
            return None;
        }
        let (content, rest) = match raw.content.get() {
            ZERO => (Content::Zero, rest),
            DATA => {
                let len = usize::try_from(pages).ok()?.checked_mul(PAGE_SIZE)?;
                let (data, rest) = rest.split_at_checked(len)?;
                (Content::Data(data), rest)
            }
            PATCH if pages == 1 => {
                let (patch, rest) = read_patch(rest)?;
                (Content::Patch(patch), rest)
            }
            _ => return None,
        };
        self.rest = rest;
        Some(Run {
            first,
            pages,
            content,
        })
    }
}

fn read_patch(bytes: &[u8]) -> Option<(Patch<'_>, &[u8])> {
    let (count, rest) = little_endian::U32::read_from_prefix(bytes).ok()?;
    let count = usize::try_from(count.get()).ok()?;
    if count > PAGE_SIZE {
        return None;
    }
    let (extents, rest) = <[RawExtent]>::ref_from_prefix_with_elems(rest, count).ok()?;
    let mut bytes = 0;
    for extent in extents {
        let (offset, length) = (extent.offset.get(), usize::from(extent.length.get()));
        if usize::from(offset) + length > PAGE_SIZE {
            return None;
        }
        bytes += length;
    }
    let (bytes, rest) = rest.split_at_checked(bytes)?;
    Some((Patch { extents, bytes }, rest))
}

impl<'a> Iterator for Runs<'a> {
    type Item = Result<Run<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let run = self.read();
        if run.is_none() {
            self.rest = &[];
        }
        Some(run.ok_or(FrameError::Body {
            kind: FrameKind::Pages,
            what: "not a list of page runs",
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn page_runs_read_back() {
        let mut payload = vec![];
        payload.extend_from_slice(&run_header(16, 2, true));
        payload.extend_from_slice(&[5; 2 * PAGE_SIZE]);
        payload.extend_from_slice(&run_header(1000, 70_000, false));
        let runs: Vec<_> = Runs::new(&payload).collect::<Result<_, _>>().unwrap();
        assert_eq!(runs.len(), 2);
        assert_eq!((runs[0].first, runs[0].pages), (16, 2));
        assert_eq!(runs[0].content, Content::Data(&[5; 2 * PAGE_SIZE][..]));
        assert_eq!(
            runs[1],
            Run {
                first: 1000,
                pages: 70_000,
                content: Content::Zero
            }
        );
    }

    fn patched(old: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut page = old.to_vec();
        for run in Runs::new(payload) {
            let Content::Patch(patch) = run.unwrap().content else {
                panic!("not a patch");
            };
            patch.apply(&mut page);
        }
        page
    }

    #[test]
    fn a_patch_is_small_where_little_has_changed_and_absent_where_much_has() {
        let old = vec![1; PAGE_SIZE];
        let mut new = old.clone();
        (new[0], new[7], new[20], new[4095]) = (2, 3, 4, 5);
        let mut out = vec![9];
        assert!(push_patch(77, &old, &new, 1000, &mut out));
        // Two parts: 0..24 by its gap of eight bytes, and the last word.
        assert_eq!(out.len(), 1 + RUN_HEADER + 4 + 2 * 4 + 24 + 8);
        assert_eq!(patched(&old, &out[1..]), new);
        let much = vec![7; PAGE_SIZE];
        assert!(!push_patch(77, &old, &much, 1000, &mut out));
        assert_eq!(out.len(), 1 + RUN_HEADER + 4 + 2 * 4 + 24 + 8);
        let mut none = vec![];
        assert!(push_patch(77, &old, &old, 1000, &mut none));
        assert_eq!(patched(&old, &none), old);
    }

    #[test]
    fn a_part_outside_its_page_is_refused() {
        for (offset, length, fits) in [(4088u16, 8u16, true), (4089, 8, false), (0, 4097, false)] {
            let mut payload = header(3, 1, PATCH).to_vec();
            payload.extend_from_slice(&1u32.to_le_bytes());
            payload.extend_from_slice(&offset.to_le_bytes());
            payload.extend_from_slice(&length.to_le_bytes());
            payload.resize(payload.len() + usize::from(length), 1);
            let runs: Vec<_> = Runs::new(&payload).collect();
            assert_eq!(runs.len(), 1);
            assert_eq!(runs[0].is_ok(), fits, "{offset} {length}");
        }
        let mut many = header(3, 1, PATCH).to_vec();
        many.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(Runs::new(&many).next().unwrap().is_err());
        let several = header(3, 2, PATCH);
        assert!(Runs::new(&several).next().unwrap().is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(payload in prop::collection::vec(any::<u8>(), 0..200), content in 0u8..4) {
            let mut bytes = payload;
            if let Some(at) = bytes.get_mut(12..16) {
                at.copy_from_slice(&[content, 0, 0, 0]);
            }
            Runs::new(&bytes).for_each(drop);
        }

        #[test]
        fn a_patch_makes_the_new_page_of_the_old_one(
            old in prop::collection::vec(0u8..3, PAGE_SIZE),
            changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..300),
            most in 0usize..6000,
        ) {
            let mut new = old.clone();
            changes.iter().for_each(|(at, byte)| new[*at] = *byte);
            let mut out = vec![];
            if push_patch(5, &old, &new, most, &mut out) {
                prop_assert!(out.len() <= most);
                prop_assert_eq!(patched(&old, &out), new);
            } else {
                prop_assert!(out.is_empty());
            }
        }
    }
}
