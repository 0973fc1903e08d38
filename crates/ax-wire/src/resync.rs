//! Resync of disks (rule 16): what the two sides say to find the blocks that differ.
//!
//! The primary asks, the shadow answers each question with exactly one frame, in their order:
//!
//! ```text
//! DiskBasis: your map of this disk, from this region on?  → DiskMap: a piece of it, or "everything"
//! DiskAsk:   your blocks of these regions?                → DiskSums: hashes of as many of them as fit
//! ```
//!
//! So neither side ever holds more than it has asked for, and a shadow that answers never waits for a
//! primary that writes. A hash is BLAKE3 keyed with a key the primary draws for the session, so that a
//! guest can't prepare two blocks with one hash.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use crate::stream::{FrameError, FrameKind};

/// Bytes of image that one bit of a dirty-region map stands for.
pub const REGION: u64 = 1 << 20;

/// Bytes that are compared and sent as one.
pub const BLOCK: usize = 4096;

/// Blocks of a region.
pub const REGION_BLOCKS: usize = (REGION as usize) / BLOCK;

/// Bytes of a block's hash: half of BLAKE3's.
pub const SUM: usize = 16;

/// Most regions a [`FrameKind::DiskMap`] tells of: of half a tebibyte.
pub const MAP_REGIONS: u64 = 512 << 10;

/// Regions with content that a [`FrameKind::DiskSums`] tells of at most.
pub const ANSWER_REGIONS: u64 = 16;

/// Most regions one [`FrameKind::DiskAsk`] may ask for.
pub const ASK_REGIONS: u64 = 1 << 16;

/// Longest payload of an answer, bytes.
pub const MAX_ANSWER: usize = 128 << 10;

const ENTRY: usize = size_of::<RawEntry>();
const PRESENT: usize = REGION_BLOCKS / 8;

// Alternating zero regions and regions with content are the longest answer there is.
const _: () = assert!(
    size_of::<DiskSums>()
        + (ANSWER_REGIONS as usize) * (2 * ENTRY + PRESENT + REGION_BLOCKS * SUM)
        + ENTRY
        <= MAX_ANSWER
);
const _: () = assert!(size_of::<DiskMap>() + (MAP_REGIONS as usize) / 8 <= MAX_ANSWER);

/// Payload of [`FrameKind::DiskBasis`]: a disk is about to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DiskBasis {
    /// Which disk.
    pub unit: little_endian::U64,
    /// Its size, bytes.
    pub size: little_endian::U64,
    /// First region of the map that is wanted.
    pub from: little_endian::U64,
    /// What the primary's map is relative to; zeros when to nothing.
    pub basis: [u8; 16],
}

/// Payload of [`FrameKind::DiskAsk`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DiskAsk {
    /// Which disk.
    pub unit: little_endian::U64,
    /// First region.
    pub first: little_endian::U64,
    /// How many, 1 to [`ASK_REGIONS`].
    pub count: little_endian::U64,
    /// Key of the hashes.
    pub key: [u8; 32],
}

/// What a [`FrameKind::DiskMap`] begins with; `count` bits follow, lowest first, unless `everything`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DiskMap {
    /// Which disk.
    pub unit: little_endian::U64,
    /// First region told of.
    pub from: little_endian::U64,
    /// Regions told of; with `everything` all that are left.
    pub count: little_endian::U64,
    /// 1 when any region of the disk may differ: the maps are not relative to the same moment.
    pub everything: little_endian::U64,
}

/// What a [`FrameKind::DiskSums`] begins with; [`Entries`] follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DiskSums {
    /// Which disk.
    pub unit: little_endian::U64,
    /// First region told of.
    pub first: little_endian::U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawEntry {
    content: little_endian::U32,
    count: little_endian::U32,
}

const ZEROS: u32 = 0;
const BLOCKS: u32 = 1;

/// What a shadow has in one region, or in several that are all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// So many regions of zeros (at least 1).
    Zeros(u64),
    /// One region: which of its blocks are not zeros, and the hashes of those.
    Blocks {
        /// A bit per block, lowest first.
        present: &'a [u8; PRESENT],
        /// A hash per bit that is set.
        sums: &'a [[u8; SUM]],
    },
}

/// A question of the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// For the map.
    Basis(DiskBasis),
    /// For hashes.
    Sums(DiskAsk),
}

impl Ask {
    /// The frame it travels in.
    pub fn kind(&self) -> FrameKind {
        match self {
            Ask::Basis(_) => FrameKind::DiskBasis,
            Ask::Sums(_) => FrameKind::DiskAsk,
        }
    }

    /// The frame its answer travels in.
    pub fn answer(&self) -> FrameKind {
        match self {
            Ask::Basis(_) => FrameKind::DiskMap,
            Ask::Sums(_) => FrameKind::DiskSums,
        }
    }

    /// The frame's payload.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Ask::Basis(basis) => basis.as_bytes(),
            Ask::Sums(ask) => ask.as_bytes(),
        }
    }
}

/// Appends "so many regions of zeros".
pub fn push_zeros(out: &mut Vec<u8>, regions: u32) {
    let entry = RawEntry {
        content: ZEROS.into(),
        count: regions.into(),
    };
    out.extend_from_slice(entry.as_bytes());
}

/// Appends a region: `sums` are those of the blocks whose bit is set.
pub fn push_blocks(out: &mut Vec<u8>, present: &[u8; PRESENT], sums: &[[u8; SUM]]) {
    let entry = RawEntry {
        content: BLOCKS.into(),
        count: 1.into(),
    };
    out.extend_from_slice(entry.as_bytes());
    out.extend_from_slice(present);
    out.extend_from_slice(sums.as_bytes());
}

fn body(kind: FrameKind, what: &'static str) -> FrameError {
    FrameError::Body { kind, what }
}

/// Reads the entries of a [`FrameKind::DiskSums`]; stops after the first error.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
}

/// Takes a [`FrameKind::DiskSums`] apart.
///
/// # Errors
/// [`FrameError::Body`]: too short.
pub fn sums(payload: &[u8]) -> Result<(DiskSums, Entries<'_>), FrameError> {
    let (head, rest) =
        DiskSums::read_from_prefix(payload).map_err(|_| body(FrameKind::DiskSums, "too short"))?;
    Ok((head, Entries { rest }))
}

/// Takes a [`FrameKind::DiskMap`] apart: its bits are exactly as long as it says.
///
/// # Errors
/// [`FrameError::Body`]: not of that length.
pub fn map(payload: &[u8]) -> Result<(DiskMap, &[u8]), FrameError> {
    let wrong = || body(FrameKind::DiskMap, "not a piece of a map");
    let (head, bits) = DiskMap::read_from_prefix(payload).map_err(|_| wrong())?;
    let (count, everything) = (head.count.get(), head.everything.get());
    let len = match everything {
        0 if count <= MAP_REGIONS => count.div_ceil(8),
        1 => 0,
        _ => return Err(wrong()),
    };
    if bits.len() as u64 != len {
        return Err(wrong());
    }
    Ok((head, bits))
}

impl<'a> Entries<'a> {
    fn read(&mut self) -> Option<Entry<'a>> {
        let (raw, rest) = RawEntry::read_from_prefix(self.rest).ok()?;
        let count = raw.count.get();
        match raw.content.get() {
            ZEROS if count > 0 => {
                self.rest = rest;
                Some(Entry::Zeros(u64::from(count)))
            }
            BLOCKS if count == 1 => {
                let (present, rest) = rest.split_first_chunk::<PRESENT>()?;
                let blocks: u32 = present.iter().map(|byte| byte.count_ones()).sum();
                let (sums, rest) =
                    <[[u8; SUM]]>::ref_from_prefix_with_elems(rest, blocks as usize).ok()?;
                self.rest = rest;
                Some(Entry::Blocks { present, sums })
            }
            _ => None,
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = self.read();
        if entry.is_none() {
            self.rest = &[];
        }
        Some(entry.ok_or(body(FrameKind::DiskSums, "not a list of regions")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sums_read_back() {
        let head = DiskSums {
            unit: 3.into(),
            first: 9.into(),
        };
        let mut out = head.as_bytes().to_vec();
        let mut present = [0; PRESENT];
        (present[0], present[31]) = (0b101, 0x80);
        push_zeros(&mut out, 70_000);
        push_blocks(&mut out, &present, &[[1; SUM], [2; SUM], [3; SUM]]);
        let (read, entries) = sums(&out).unwrap();
        assert_eq!(read, head);
        let entries: Vec<_> = entries.collect::<Result<_, _>>().unwrap();
        let expected = Entry::Blocks {
            present: &present,
            sums: &[[1; SUM], [2; SUM], [3; SUM]],
        };
        assert_eq!(entries, [Entry::Zeros(70_000), expected]);
        // One hash too few, and a run of nothing.
        let cut = sums(&out[..out.len() - 1]).unwrap().1.last().unwrap();
        assert!(cut.is_err());
        push_zeros(&mut out, 0);
        assert!(sums(&out).unwrap().1.last().unwrap().is_err());
    }

    #[test]
    fn a_map_is_as_long_as_it_says() {
        let piece = |count: u64, everything: u64, bits: usize| {
            let head = DiskMap {
                unit: 0.into(),
                from: 0.into(),
                count: count.into(),
                everything: everything.into(),
            };
            let mut out = head.as_bytes().to_vec();
            out.resize(out.len() + bits, 0xff);
            map(&out).is_ok()
        };
        assert!(piece(17, 0, 3) && piece(1 << 60, 1, 0));
        assert!(!piece(17, 0, 2) && !piece(17, 0, 4) && !piece(17, 1, 3) && !piece(17, 2, 3));
        assert!(!piece(MAP_REGIONS + 8, 0, MAP_REGIONS as usize / 8 + 1));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok((_, entries)) = sums(&bytes) {
                entries.for_each(drop);
            }
            let _ = map(&bytes);
        }
    }
}
