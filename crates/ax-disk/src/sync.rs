//! Resync (rule 16): of the regions that may differ, the blocks that do, sent through the log that
//! guest writes go through.
//!
//! The shadow says what it has at some place in the stream; the primary compares that with what it has
//! when it looks, under the image's order lock. A block that is equal then need not travel: whatever
//! the guest writes to it later, and whatever of its earlier writes the shadow had not applied when it
//! looked, is in the log behind (decisions/0013).

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use ax_wire::records::record_size;
use ax_wire::resync::{
    self, ANSWER_REGIONS, ASK_REGIONS, Ask, BLOCK, DiskAsk, DiskBasis, Entry, REGION,
    REGION_BLOCKS, SUM,
};

use crate::image::Image;
use crate::log::WriteLog;
use crate::map::Regions;
use crate::sums::{block_sum, is_blank};

/// Bytes compared at a time: so long a guest write may have to wait.
pub const CHUNK: usize = 256 << 10;

/// Regions asked for and not compared yet, at most: what their hashes take is half a mebibyte.
const WINDOW: usize = 8 * ANSWER_REGIONS as usize;

/// What the shadow has in a run of regions.
#[derive(Debug)]
struct Theirs {
    bytes: Range<u64>,
    /// None when all zeros; else of one region.
    blocks: Option<Blocks>,
}

#[derive(Debug)]
struct Blocks {
    present: [u8; REGION_BLOCKS / 8],
    sums: Vec<[u8; SUM]>,
}

impl Blocks {
    fn has(&self, block: usize) -> bool {
        let byte = self.present.get(block / 8);
        byte.is_some_and(|byte| byte >> (block % 8) & 1 != 0)
    }

    /// Hash of block `block` of the region, if it is not all zeros.
    fn sum(&self, block: usize) -> Option<&[u8; SUM]> {
        if !self.has(block) {
            return None;
        }
        let before = (0..block).filter(|b| self.has(*b)).count();
        self.sums.get(before)
    }
}

/// How a step of the resync ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// Every disk is equal to the other side's once the log is applied there.
    Done,
    /// The log has no room.
    Full,
    /// The other side has been asked and has not answered.
    Waits,
}

/// How far a resync of all disks has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncProgress {
    /// Bytes of the disks that are known equal, or sent.
    pub done: u64,
    /// Bytes of all disks.
    pub total: u64,
    /// Bytes whose hashes were compared.
    pub compared: u64,
    /// Bytes that travelled either way for it: blocks, hashes, maps, questions.
    pub moved: u64,
}

/// The resync of all disks, from the primary's side.
#[derive(Debug)]
pub struct SyncCursor {
    disks: Vec<Arc<Image>>,
    key: [u8; 32],
    unit: usize,
    /// Of this disk: what is to be asked for yet; none while the other side's map is not here.
    union: Option<Regions>,
    /// The next region of the other side's map that is wanted.
    map_from: u64,
    ours: Option<(crate::meta::Basis, Regions)>,
    asked: VecDeque<Ask>,
    ready: VecDeque<Theirs>,
    /// Regions to ask for at once: more while they are all zeros.
    stride: u64,
    chunk: Vec<u8>,
    progress: SyncProgress,
}

impl SyncCursor {
    /// Begins with the first disk. `log` must be recording: what is written from here on is in it or in
    /// the map.
    ///
    /// # Errors
    /// The host gives no random bytes.
    pub fn new(disks: Vec<Arc<Image>>) -> io::Result<SyncCursor> {
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        let total = disks.iter().map(|d| d.size()).sum();
        let mut cursor = SyncCursor {
            disks,
            key,
            unit: 0,
            union: None,
            map_from: 0,
            ours: None,
            asked: VecDeque::new(),
            ready: VecDeque::new(),
            stride: ANSWER_REGIONS,
            chunk: vec![0; CHUNK],
            progress: SyncProgress {
                total,
                ..SyncProgress::default()
            },
        };
        cursor.skip_empty();
        Ok(cursor)
    }

    /// How far it has come.
    pub fn progress(&self) -> SyncProgress {
        self.progress
    }

    /// The next question, if one is due; each is answered by one call of [`Self::answered`], in order.
    pub fn ask(&mut self) -> Option<Ask> {
        let disk = self.disks.get(self.unit)?;
        let unit = (self.unit as u64).into();
        let ask = match &mut self.union {
            None if self.asked.is_empty() => {
                let ours = self.ours.get_or_insert_with(|| disk.differing());
                Ask::Basis(DiskBasis {
                    unit,
                    size: disk.size().into(),
                    from: self.map_from.into(),
                    basis: ours.0.0,
                })
            }
            None => return None,
            Some(union) => {
                let pending = self.asked.len() * ANSWER_REGIONS as usize + self.ready.len();
                if pending + ANSWER_REGIONS as usize > WINDOW {
                    return None;
                }
                let run = union.take_run(0, self.stride)?;
                Ask::Sums(DiskAsk {
                    unit,
                    first: run.start.into(),
                    count: (run.end - run.start).into(),
                    key: self.key,
                })
            }
        };
        self.asked.push_back(ask);
        self.progress.moved += ask.as_bytes().len() as u64;
        Some(ask)
    }

    /// The payload of the other side's next answer. False when it answers something else, or nothing that
    /// was asked: the peer is hostile or broken.
    #[must_use]
    pub fn answered(&mut self, payload: &[u8]) -> bool {
        self.progress.moved += payload.len() as u64;
        match self.asked.pop_front() {
            Some(Ask::Basis(basis)) => self.map(&basis, payload).is_some(),
            Some(Ask::Sums(ask)) => self.sums(&ask, payload).is_some(),
            None => false,
        }
    }

    fn map(&mut self, ask: &DiskBasis, payload: &[u8]) -> Option<()> {
        let (head, bits) = resync::map(payload).ok()?;
        let (from, count) = (ask.from.get(), head.count.get());
        let (_, ours) = self.ours.as_mut()?;
        let end = from.checked_add(count)?;
        if (head.unit, head.from) != (ask.unit, ask.from) || count == 0 || end > ours.count() {
            return None;
        }
        if head.everything.get() != 0 {
            *ours = Regions::all(ours.count());
            self.map_from = ours.count();
        } else {
            ours.unite_bits(from, bits);
            self.map_from = end;
        }
        if self.map_from == ours.count() {
            let (_, union) = self.ours.take()?;
            let size = self.disks.get(self.unit)?.size();
            // The last region may be shorter than the others.
            let tail = union.count() * REGION - size;
            let short = union.contains(union.count() - 1);
            let differing = union.len() * REGION - if short { tail } else { 0 };
            self.progress.done += size - differing;
            self.union = Some(union);
            self.next_disk();
        }
        Some(())
    }

    fn sums(&mut self, ask: &DiskAsk, payload: &[u8]) -> Option<()> {
        let size = self.disks.get(self.unit)?.size();
        let (head, entries) = resync::sums(payload).ok()?;
        if (head.unit, head.first) != (ask.unit, ask.first) {
            return None;
        }
        let (first, mut content) = (ask.first.get(), 0);
        let (mut at, end) = (first, first + ask.count.get());
        for entry in entries {
            let (count, blocks) = match entry.ok()? {
                Entry::Zeros(count) => (count, None),
                Entry::Blocks { present, sums } => {
                    content += 1;
                    let (present, sums) = (*present, sums.to_vec());
                    (1, Some(Blocks { present, sums }))
                }
            };
            if count > end - at || content > ANSWER_REGIONS {
                return None;
            }
            let bytes = at * REGION..((at + count) * REGION).min(size);
            self.ready.push_back(Theirs { bytes, blocks });
            at += count;
        }
        if at == first {
            return None;
        }
        // What did not fit the answer is asked for again.
        self.union.as_mut()?.insert(at..end);
        let blank = content == 0 && at == end;
        self.stride = match blank {
            true => (self.stride * 4).min(ASK_REGIONS),
            false => ANSWER_REGIONS,
        };
        Some(())
    }

    /// Goes on with the next disk if nothing is left of this one.
    fn next_disk(&mut self) {
        let over = self.union.as_ref().is_some_and(Regions::is_empty);
        if over && self.asked.is_empty() && self.ready.is_empty() {
            self.unit += 1;
            (self.union, self.map_from, self.stride) = (None, 0, ANSWER_REGIONS);
            self.skip_empty();
        }
    }

    fn skip_empty(&mut self) {
        while self.disks.get(self.unit).is_some_and(|d| d.size() == 0) {
            self.unit += 1;
        }
    }

    /// Compares what the other side has told of and puts the blocks that differ in `log`.
    ///
    /// Some blocks are read, compared and put in the log as one step with respect to guest writes (the
    /// image's order lock), so that an old block can never follow a newer write to the same place.
    ///
    /// # Errors
    /// The image could not be read, or a read-only image differs; the cursor stays where it was.
    pub fn step(&mut self, log: &WriteLog) -> io::Result<Stepped> {
        while let Some(disk) = self.disks.get(self.unit) {
            let disk = Arc::clone(disk);
            let Some(mut theirs) = self.ready.pop_front() else {
                return Ok(Stepped::Waits);
            };
            let compared = self.compare(&disk, &mut theirs, log);
            if theirs.bytes.is_empty() {
                self.next_disk();
            } else {
                self.ready.push_front(theirs);
            }
            if !compared? {
                return Ok(Stepped::Full);
            }
        }
        Ok(Stepped::Done)
    }

    /// False when the log has no room; `theirs` begins where it stopped.
    fn compare(&mut self, disk: &Image, theirs: &mut Theirs, log: &WriteLog) -> io::Result<bool> {
        let end = theirs.bytes.end;
        while theirs.bytes.start < end {
            let mut at = theirs.bytes.start;
            if theirs.blocks.is_none() {
                // Zeros there: holes here are equal, and are not looked into.
                let data = disk.next_data(at)?.map_or(end, |data| data.start.min(end));
                let skipped = (data - data % BLOCK as u64).max(at) - at;
                self.passed(theirs, skipped);
                at += skipped;
                if data == end {
                    self.passed(theirs, end - at);
                    break;
                }
            }
            let len = (CHUNK as u64).min(end - at) as usize;
            let Some(chunk) = self.chunk.get_mut(..len) else {
                break; // a chunk is as large as that
            };
            let _order = disk.order.lock();
            let hole = disk
                .next_data(at)?
                .is_none_or(|data| data.start >= at + len as u64);
            match hole {
                true => chunk.fill(0),
                false => disk.read(at, chunk)?,
            }
            let (sent, moved) =
                put_differing(self.unit as u8, disk, theirs, &self.key, chunk, log)?;
            self.progress.moved += moved;
            self.passed(theirs, sent as u64);
            if sent < len {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn passed(&mut self, theirs: &mut Theirs, bytes: u64) {
        theirs.bytes.start += bytes;
        self.progress.done += bytes;
        self.progress.compared += bytes;
    }
}

/// What has to be done with a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Same,
    Zero,
    Send,
}

/// Puts the blocks of `chunk`, which begins where `theirs` does, that differ in the log; returns bytes
/// dealt with, which is less than all when there is no room, and bytes put there.
fn put_differing(
    unit: u8,
    disk: &Image,
    theirs: &Theirs,
    key: &[u8; 32],
    chunk: &[u8],
    log: &WriteLog,
) -> io::Result<(usize, u64)> {
    let start = theirs.bytes.start;
    let first = (start % REGION) as usize / BLOCK;
    let fate = |(n, block): (usize, &[u8])| {
        let sum = theirs.blocks.as_ref().and_then(|b| b.sum(first + n));
        match (is_blank(block), sum) {
            (true, None) => Fate::Same,
            (true, Some(_)) => Fate::Zero,
            (false, Some(sum)) if block_sum(key, block) == *sum => Fate::Same,
            (false, _) => Fate::Send,
        }
    };
    let mut fates = chunk.chunks(BLOCK).enumerate().map(fate).peekable();
    let (mut at, mut moved) = (0, 0);
    while let Some(fate) = fates.next() {
        let mut end = (at + BLOCK).min(chunk.len());
        while fates.next_if_eq(&fate).is_some() {
            end = (end + BLOCK).min(chunk.len());
        }
        if fate != Fate::Same && disk.read_only() {
            let what = format!("the read-only image differs at byte {}", start + at as u64);
            return Err(io::Error::other(what));
        }
        let run = chunk.get(at..end).unwrap_or_default();
        let put = match fate {
            Fate::Same => true,
            Fate::Send => log.bulk(unit, start + at as u64, run),
            Fate::Zero => log.bulk_zeros(unit, start + at as u64, run.len() as u64),
        };
        if !put {
            break;
        }
        moved += match fate {
            Fate::Same => 0,
            Fate::Send => record_size(run.len()),
            Fate::Zero => record_size(size_of::<u64>()),
        };
        at = end;
    }
    Ok((at, moved as u64))
}
