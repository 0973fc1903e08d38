//! Where the time goes: counters and histograms that cost a few atomic additions an epoch.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::Reason;

/// Buckets per power of two.
const SUB: u32 = 32;
const BUCKETS: usize = 64 * SUB as usize;

/// Values in buckets a thirty-second of a power of two wide: percentiles within 3.2 %.
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max: AtomicU64::new(0),
        }
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.summary())
    }
}

fn bucket(value: u64) -> usize {
    if value < u64::from(SUB) {
        return value as usize;
    }
    let log = value.ilog2();
    let sub = (value >> (log - SUB.ilog2())) & u64::from(SUB - 1);
    ((log - SUB.ilog2() + 1) * SUB) as usize + sub as usize
}

/// Largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let (row, sub) = (bucket as u32 / SUB, bucket as u64 % u64::from(SUB));
    if row == 0 {
        return sub;
    }
    let shift = row - 1;
    ((u64::from(SUB) + sub) << shift) | ((1 << shift) - 1)
}

impl Histogram {
    /// Counts one value.
    pub fn record(&self, value: u64) {
        if let Some(bucket) = self.buckets.get(bucket(value)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.max.fetch_max(value, Ordering::Relaxed);
    }

    /// What has been counted so far, value by value.
    pub fn counts(&self) -> Counts {
        let buckets = self.buckets.iter().map(|b| b.load(Ordering::Relaxed));
        Counts {
            buckets: buckets.collect(),
            max: self.max.load(Ordering::Relaxed),
        }
    }

    /// What has been counted so far.
    pub fn summary(&self) -> Summary {
        self.counts().since(None)
    }
}

/// A [`Histogram`] at one moment. Two of them tell what was counted between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    buckets: Box<[u64]>,
    max: u64,
}

impl Counts {
    /// What was counted: the largest value of each bucket that has any, and how many it has. Ascending.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let counts = self.buckets.iter().enumerate();
        let some = counts.filter(|(_, count)| **count != 0);
        some.map(|(at, count)| (upper(at), *count))
    }

    /// The largest value ever counted.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// What was counted since `earlier`, a moment of the same histogram; since its beginning with none.
    pub fn since(&self, earlier: Option<&Counts>) -> Summary {
        let before = |at: usize| {
            let count = earlier.and_then(|e| e.buckets.get(at));
            count.copied().unwrap_or(0)
        };
        let counts = self.buckets.iter().enumerate();
        let counts: Vec<u64> = counts.map(|(at, n)| n.saturating_sub(before(at))).collect();
        let count: u64 = counts.iter().sum();
        let percentile = |percent: u64| {
            let rank = (count * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let at = counts.iter().position(|n| {
                seen += n;
                seen >= rank
            });
            at.map_or(0, |at| upper(at).min(self.max))
        };
        Summary {
            count,
            p50: percentile(50),
            p99: percentile(99),
            max: percentile(100),
        }
    }
}

/// A histogram, read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Values counted.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest, as exact as a percentile.
    pub max: u64,
}

/// The parts of a pause, in their order (rule 3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts<T> {
    /// First kick to every vCPU parked and every device quiet.
    pub park: T,
    /// Saving the machine's state.
    pub save: T,
    /// Learning which pages are dirty, and protecting them again.
    pub harvest: T,
    /// Copying the dirty pages, and the digest of the verify mode.
    pub copy: T,
    /// Closing the epoch's outputs and disk writes.
    pub close: T,
    /// Letting devices and vCPUs go, to the last vCPU running again.
    pub resume: T,
}

impl<T> Parts<T> {
    /// Something of each part, taken in their order.
    pub fn map<'a, U>(&'a self, mut of: impl FnMut(&'a T) -> U) -> Parts<U> {
        Parts {
            park: of(&self.park),
            save: of(&self.save),
            harvest: of(&self.harvest),
            copy: of(&self.copy),
            close: of(&self.close),
            resume: of(&self.resume),
        }
    }

    /// Each part with that of `other`.
    pub fn zip<'a, U>(&'a self, other: &'a Parts<U>) -> Parts<(&'a T, &'a U)> {
        Parts {
            park: (&self.park, &other.park),
            save: (&self.save, &other.save),
            harvest: (&self.harvest, &other.harvest),
            copy: (&self.copy, &other.copy),
            close: (&self.close, &other.close),
            resume: (&self.resume, &other.resume),
        }
    }
}

/// What the primary's engine counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// First kick to the last vCPU running again, nanoseconds.
    pub pause: Histogram,
    /// What that consists of.
    pub parts: Parts<Histogram>,
    /// Dirty pages per epoch.
    pub pages: Histogram,
    /// Writing an epoch to the link, nanoseconds.
    pub ship: Histogram,
    /// From the resume to the acknowledgement, nanoseconds.
    pub commit: Histogram,
    /// From just before an epoch's last byte was sent to the acknowledgement, nanoseconds.
    pub ack: Histogram,
    /// From the acknowledgement to the last output having left, nanoseconds.
    pub release: Histogram,
    /// How long the first output of an epoch waited to leave, nanoseconds.
    pub held: Histogram,
    /// From one pause's first kick to the next one's, nanoseconds.
    pub length: Histogram,
    /// Bytes shipped per epoch.
    pub shipped: Histogram,
    /// Epochs captured, by [`Reason`].
    pub reasons: [AtomicU64; Reason::ALL.len()],
    /// Bytes shipped.
    pub bytes: AtomicU64,
    /// Bytes of disks compared by the latest initial copy.
    pub disk_compared: AtomicU64,
    /// Bytes that travelled either way for the disks in the latest initial copy.
    pub disk_moved: AtomicU64,
    /// Captures that failed and were undone (I6).
    pub failed_captures: AtomicU64,
    /// Times an acknowledgement's permission expired (rule 24).
    pub expired: AtomicU64,
    /// Epochs larger than their slot.
    pub spilled: AtomicU64,
    /// Received frames not forwarded for lack of room.
    pub received_dropped: AtomicU64,
}

/// What happened in a span of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// First kick to the last vCPU running again, nanoseconds.
    pub pause_ns: Summary,
    /// What that consists of.
    pub parts_ns: Parts<Summary>,
    /// Dirty pages per epoch.
    pub pages: Summary,
    /// Writing an epoch to the link, nanoseconds.
    pub ship_ns: Summary,
    /// From the resume to the acknowledgement, nanoseconds.
    pub commit_ns: Summary,
    /// Bytes shipped.
    pub bytes: u64,
    /// Captures that failed and were undone.
    pub failed_captures: u64,
    /// Times an acknowledgement's permission expired.
    pub expired: u64,
    /// Epochs larger than their slot.
    pub spilled: u64,
    /// Received frames not forwarded for lack of room.
    pub received_dropped: u64,
}

/// [`Counters`] at one moment. Two of them tell what happened between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    pause: Counts,
    parts: Parts<Counts>,
    pages: Counts,
    ship: Counts,
    commit: Counts,
    bytes: u64,
    failed_captures: u64,
    expired: u64,
    spilled: u64,
    received_dropped: u64,
}

impl Counters {
    /// Every histogram with its name, which ends with what it counts.
    pub fn histograms(&self) -> [(&'static str, &Histogram); 15] {
        [
            ("pause_ns", &self.pause),
            ("park_ns", &self.parts.park),
            ("save_ns", &self.parts.save),
            ("harvest_ns", &self.parts.harvest),
            ("copy_ns", &self.parts.copy),
            ("close_ns", &self.parts.close),
            ("resume_ns", &self.parts.resume),
            ("ship_ns", &self.ship),
            ("ack_ns", &self.ack),
            ("commit_ns", &self.commit),
            ("release_ns", &self.release),
            ("held_ns", &self.held),
            ("length_ns", &self.length),
            ("pages", &self.pages),
            ("shipped_bytes", &self.shipped),
        ]
    }

    /// Epochs captured for `reason`.
    pub fn captured_for(&self, reason: Reason) -> u64 {
        let count = self.reasons.get(reason as usize);
        count.map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Reads everything.
    pub fn reading(&self) -> Reading {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Reading {
            pause: self.pause.counts(),
            parts: self.parts.map(Histogram::counts),
            pages: self.pages.counts(),
            ship: self.ship.counts(),
            commit: self.commit.counts(),
            bytes: get(&self.bytes),
            failed_captures: get(&self.failed_captures),
            expired: get(&self.expired),
            spilled: get(&self.spilled),
            received_dropped: get(&self.received_dropped),
        }
    }
}

impl Reading {
    /// What happened since `earlier`, a reading of the same counters; since the beginning with none.
    pub fn since(&self, earlier: Option<&Reading>) -> Snapshot {
        let times = |of: fn(&Reading) -> &Counts| of(self).since(earlier.map(of));
        let more = |of: fn(&Reading) -> u64| of(self).saturating_sub(earlier.map_or(0, of));
        Snapshot {
            pause_ns: times(|r| &r.pause),
            parts_ns: match earlier {
                Some(e) => (self.parts.zip(&e.parts)).map(|(now, then)| now.since(Some(then))),
                None => self.parts.map(|now| now.since(None)),
            },
            pages: times(|r| &r.pages),
            ship_ns: times(|r| &r.ship),
            commit_ns: times(|r| &r.commit),
            bytes: more(|r| r.bytes),
            failed_captures: more(|r| r.failed_captures),
            expired: more(|r| r.expired),
            spilled: more(|r| r.spilled),
            received_dropped: more(|r| r.received_dropped),
        }
    }

    /// Bytes shipped since the engine was made.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn percentiles_of_a_known_series() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|v| histogram.record(v));
        let s = histogram.summary();
        assert_eq!((s.count, s.max), (1000, 1000));
        assert!((500..=516).contains(&s.p50), "{s:?}");
        assert!((990..=1000).contains(&s.p99), "{s:?}");
        assert_eq!(Histogram::default().summary(), Summary::default());
        let counts = histogram.counts();
        assert_eq!(counts.buckets().next(), Some((1, 1)));
        assert_eq!(counts.buckets().map(|(_, n)| n).sum::<u64>(), 1000);
        let tops: Vec<u64> = counts.buckets().map(|(top, _)| top).collect();
        assert!(tops.is_sorted() && tops.last() >= Some(&counts.max()));
    }

    #[test]
    fn a_span_of_time_shows_only_what_was_counted_in_it() {
        let histogram = Histogram::default();
        (0..1000).for_each(|_| histogram.record(1_000_000));
        let before = histogram.counts();
        (1..=100).for_each(|v| histogram.record(v));
        let s = histogram.counts().since(Some(&before));
        assert_eq!(s.count, 100);
        assert!((50..=52).contains(&s.p50), "{s:?}");
        assert!((99..=102).contains(&s.max), "{s:?}");
        let nothing = histogram.counts().since(Some(&histogram.counts()));
        assert_eq!(nothing, Summary::default());
    }

    proptest! {
        #[test]
        fn a_value_is_in_its_bucket(value: u64) {
            let at = bucket(value);
            prop_assert!(at < BUCKETS);
            prop_assert!(value <= upper(at));
            prop_assert!(at == 0 || value > upper(at - 1));
        }
    }
}
