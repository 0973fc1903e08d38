//! What happened in each of the last epochs, moment by moment: a ring that nobody waits for.
//!
//! The epoch thread writes a record once its epoch is captured, when the guest runs again, and it and the
//! reading thread add what happens to it later. That is some thirty plain stores in three cache lines,
//! whether anybody reads or not: no lock, no allocation, no system call. A reader never holds a writer
//! up; a record that is replaced while it is read is left out.
//!
//! Each slot is a sequence lock (a counter around data that are themselves atomics, so that a torn read is
//! seen, not undefined). What is added later is one word each, and belongs to its slot's record for
//! certain: epochs in flight are few, the slots many.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use ax_wire::EpochId;

use crate::policy::Reason;

/// Records kept: two seconds of two thousand epochs each.
pub const SLOTS: usize = 4096;

/// What happens to an epoch, in this order unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// The first of its outputs began to wait. Any time before [`Moment::Closed`].
    Held,
    /// The first kick.
    Began,
    /// Every vCPU was parked.
    Parked,
    /// Every device was quiet, too.
    Quiet,
    /// The machine's state was saved.
    Saved,
    /// The dirty pages were known.
    Harvested,
    /// They were copied.
    Copied,
    /// Its outputs and disk writes were closed.
    Closed,
    /// Devices and vCPUs were let go.
    Resumed,
    /// The last vCPU ran again. Learned at the next pause. Any time after [`Moment::Closed`].
    Running,
    /// It began to be written to the link.
    Encoding,
    /// All of it was written but what the last call sends.
    Encoded,
    /// All of it was sent. Of one that was sent again after a reconnection: the last time.
    Sent,
    /// Its acknowledgement was read.
    Acked,
    /// Its outputs had left.
    Released,
}

impl Moment {
    /// All of them.
    pub const ALL: [Moment; 15] = [
        Moment::Held,
        Moment::Began,
        Moment::Parked,
        Moment::Quiet,
        Moment::Saved,
        Moment::Harvested,
        Moment::Copied,
        Moment::Closed,
        Moment::Resumed,
        Moment::Running,
        Moment::Encoding,
        Moment::Encoded,
        Moment::Sent,
        Moment::Acked,
        Moment::Released,
    ];
}

/// How much of something an epoch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Dirty pages.
    Pages,
    /// Bytes of machine state.
    State,
    /// Bytes of disk records.
    Disk,
    /// Outputs held.
    Outputs,
    /// Bytes of their records.
    OutputBytes,
    /// Bytes written to the link for it.
    Shipped,
}

const MOMENTS: usize = Moment::ALL.len();
const SIZES: usize = 6;
/// Beside moments and sizes: the epoch, and its reason and outcome.
const WORDS: usize = MOMENTS + SIZES + 2;
/// In the word of the reason: the capture failed.
const FAILED: u64 = 1 << 8;

/// One epoch, or a capture that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number in the ring, from 1; 0 in one that is not there yet.
    pub number: u64,
    /// The epoch's number. A capture that failed leaves its number to the next one.
    pub epoch: EpochId,
    /// Why it ended.
    pub reason: Reason,
    /// The capture failed and was undone (I6).
    pub failed: bool,
    /// Nanoseconds of the engine's clock, 0 for what has not happened (yet).
    moments: [u64; MOMENTS],
    sizes: [u64; SIZES],
}

impl Record {
    /// Nothing has happened yet.
    pub fn new(epoch: EpochId, reason: Reason) -> Record {
        Record {
            number: 0,
            epoch,
            reason,
            failed: false,
            moments: [0; MOMENTS],
            sizes: [0; SIZES],
        }
    }

    /// The same with `moment` at `ns` of the engine's clock.
    #[must_use]
    pub fn with(mut self, moment: Moment, ns: u64) -> Record {
        if let Some(at) = self.moments.get_mut(moment as usize) {
            *at = ns;
        }
        self
    }

    /// The same with so much of `size`.
    #[must_use]
    pub fn sized(mut self, size: Size, value: u64) -> Record {
        if let Some(at) = self.sizes.get_mut(size as usize) {
            *at = value;
        }
        self
    }

    /// When that happened, nanoseconds of the engine's clock; none if it has not (yet).
    pub fn at(&self, moment: Moment) -> Option<u64> {
        let at = self.moments.get(moment as usize).copied();
        at.filter(|ns| *ns != 0)
    }

    /// How much of it.
    pub fn size(&self, size: Size) -> u64 {
        self.sizes.get(size as usize).copied().unwrap_or(0)
    }

    /// From `from` to `to`, nanoseconds; none unless both have happened, in this order.
    pub fn between(&self, from: Moment, to: Moment) -> Option<u64> {
        self.at(to)?.checked_sub(self.at(from)?)
    }

    fn to_words(self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let outcome = if self.failed { FAILED } else { 0 };
        let values = self.moments.into_iter().chain(self.sizes);
        let values = values.chain([self.epoch.0, self.reason as u64 | outcome]);
        words.iter_mut().zip(values).for_each(|(w, v)| *w = v);
        words
    }

    fn from_words(number: u64, words: &[u64; WORDS]) -> Option<Record> {
        let (moments, rest) = words.split_first_chunk()?;
        let (sizes, rest) = rest.split_first_chunk()?;
        let [epoch, kind] = rest else { return None };
        let mut record = Record {
            number,
            epoch: EpochId(*epoch),
            reason: Reason::from_number(kind & (FAILED - 1))?,
            failed: kind & FAILED != 0,
            moments: *moments,
            sizes: *sizes,
        };
        // The acknowledgement may be read before the call that sent the epoch has returned.
        if let (Some(sent), Some(acked)) = (record.at(Moment::Sent), record.at(Moment::Acked)) {
            record = record.with(Moment::Sent, sent.min(acked));
        }
        Some(record)
    }
}

/// One record's place: three cache lines.
#[derive(Debug)]
#[repr(align(64))]
struct Slot {
    /// Number of the record that is here whole; 0 while it is being replaced, and before the first.
    number: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Slot {
    fn read(&self, number: u64) -> Option<Record> {
        if self.number.load(Ordering::Acquire) != number {
            return None;
        }
        let mut words = [0; WORDS];
        for (copy, word) in words.iter_mut().zip(&self.words) {
            *copy = word.load(Ordering::Relaxed);
        }
        // The words were read before the number is looked at again.
        fence(Ordering::Acquire);
        if self.number.load(Ordering::Relaxed) != number {
            return None;
        }
        Record::from_words(number, &words)
    }

    fn replace(&self, number: u64, words: &[u64; WORDS]) {
        self.number.store(0, Ordering::Relaxed);
        // Who reads one of the new words sees the old number gone.
        fence(Ordering::Release);
        for (word, new) in self.words.iter().zip(words) {
            word.store(*new, Ordering::Relaxed);
        }
        self.number.store(number, Ordering::Release);
    }
}

/// The last records.
pub struct Trace {
    slots: Box<[Slot]>,
    /// Number of the next record.
    next: AtomicU64,
}

impl Default for Trace {
    fn default() -> Self {
        Trace::new(SLOTS)
    }
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trace(next {})", self.next())
    }
}

impl Trace {
    /// Room for the last `slots` records, at least one.
    pub fn new(slots: usize) -> Trace {
        let slot = |_| Slot {
            number: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Trace {
            slots: (0..slots.max(1)).map(slot).collect(),
            next: AtomicU64::new(1),
        }
    }

    fn slot(&self, number: u64) -> Option<&Slot> {
        let at = number.checked_sub(1)? % self.slots.len() as u64;
        self.slots.get(at as usize)
    }

    /// Number of the next record.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Adds a record in place of the oldest and returns its number. By one thread at a time.
    pub fn push(&self, record: Record) -> u64 {
        let number = self.next.load(Ordering::Relaxed);
        if let Some(slot) = self.slot(number) {
            slot.replace(number, &record.to_words());
        }
        self.next.store(number.wrapping_add(1), Ordering::Release);
        number
    }

    fn set(&self, number: u64, word: usize, value: u64) {
        let slot = self.slot(number);
        let slot = slot.filter(|slot| slot.number.load(Ordering::Relaxed) == number);
        if let Some(word) = slot.and_then(|slot| slot.words.get(word)) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// `moment` of record `number` was at `ns` of the engine's clock. Nothing happens if the record is gone.
    pub fn mark(&self, number: u64, moment: Moment, ns: u64) {
        self.set(number, moment as usize, ns);
    }

    /// Record `number` has so much of `size`. Nothing happens if it is gone.
    pub fn measure(&self, number: u64, size: Size, value: u64) {
        self.set(number, MOMENTS + size as usize, value);
    }

    /// Record `number`; none if it is gone, or is not there yet.
    pub fn get(&self, number: u64) -> Option<Record> {
        self.slot(number)?.read(number)
    }

    /// The records from number `from` on that are still there, oldest first, `most` at most, and the number
    /// to go on from. None come before number 1.
    pub fn since(&self, from: u64, most: usize) -> (Vec<Record>, u64) {
        let next = self.next();
        let oldest = next.saturating_sub(self.slots.len() as u64).max(1);
        let from = from.clamp(oldest, next);
        let end = next.min(from.saturating_add(most as u64));
        let records = (from..end).filter_map(|number| self.get(number));
        (records.collect(), end)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// A record whose every word follows from `n`.
    fn of(n: u64) -> Record {
        let reason = Reason::ALL[n as usize % Reason::ALL.len()];
        let mut record = Record::new(EpochId(n * 3), reason);
        record.failed = n.is_multiple_of(5);
        let moments = Moment::ALL.into_iter().zip(n * 100 + 1..);
        record = moments.fold(record, |record, (moment, ns)| record.with(moment, ns));
        record.sizes = std::array::from_fn(|at| n * 7 + at as u64);
        record
    }

    #[test]
    fn records_come_back_whole_and_what_happens_later_is_added() {
        let trace = Trace::new(8);
        let begun = Record::new(EpochId(4), Reason::Output).with(Moment::Began, 50);
        let number = trace.push(begun.sized(Size::Pages, 9));
        assert_eq!(number, 1);
        trace.mark(number, Moment::Acked, 90);
        trace.measure(number, Size::Shipped, 4096);
        let read = trace.get(number).unwrap();
        assert_eq!(
            (read.epoch, read.reason, read.failed),
            (EpochId(4), Reason::Output, false)
        );
        assert_eq!(read.between(Moment::Began, Moment::Acked), Some(40));
        assert_eq!(read.at(Moment::Released), None);
        assert_eq!(
            (read.size(Size::Pages), read.size(Size::Shipped)),
            (9, 4096)
        );
        assert_eq!((trace.get(0), trace.get(2)), (None, None));
        // The acknowledgement was read first: by then it had been sent.
        trace.mark(number, Moment::Sent, 95);
        assert_eq!(trace.get(number).unwrap().at(Moment::Sent), Some(90));
    }

    #[test]
    fn old_records_make_room_and_are_not_written_to_any_more() {
        let trace = Trace::new(4);
        (1..=10).for_each(|n| assert_eq!(trace.push(of(n)), n));
        let numbers = |from, most| {
            let (records, next) = trace.since(from, most);
            (records.iter().map(|r| r.number).collect::<Vec<_>>(), next)
        };
        assert_eq!(numbers(0, 100), (vec![7, 8, 9, 10], 11));
        assert_eq!(numbers(8, 2), (vec![8, 9], 10));
        assert_eq!(numbers(11, 100), (vec![], 11));
        assert_eq!(numbers(99, 100), (vec![], 11));
        trace.mark(6, Moment::Acked, 1);
        assert_eq!(trace.get(6), None);
        let expected = Record {
            number: 10,
            ..of(10)
        };
        assert_eq!(trace.get(10), Some(expected));
    }

    /// Readers look at slots as they are being replaced: few slots, so that it happens all the time.
    #[test]
    fn a_record_that_is_replaced_while_it_is_read_is_left_out_and_never_torn() {
        const PUSHED: u64 = 400_000;
        let trace = Trace::new(3);
        let over = AtomicBool::new(false);
        let read = std::thread::scope(|scope| {
            let reader = || {
                let mut seen = 0u64;
                while !over.load(Ordering::Relaxed) {
                    for record in trace.since(0, 3).0 {
                        let expected = Record {
                            number: record.number,
                            ..of(record.number)
                        };
                        assert_eq!(record, expected);
                        seen += 1;
                    }
                }
                seen
            };
            let readers = [scope.spawn(reader), scope.spawn(reader)];
            for n in 1..=PUSHED {
                trace.push(of(n));
            }
            over.store(true, Ordering::Relaxed);
            readers.map(|reader| reader.join().unwrap())
        });
        assert_eq!(trace.next(), PUSHED + 1);
        assert!(read.iter().sum::<u64>() > 0, "{read:?}");
    }
}
