//! What a protected VM's process tells of its epochs: one by one, and as histograms.
//!
//! Records are numbered from 1 by each engine: a process makes a new one for each shadow it is protected by. A
//! reader asks for those from a number on, and begins anew at 1 when [`Origin`] has changed.

use std::collections::BTreeMap;

use ax_wire::Incarnation;
use serde::{Deserialize, Serialize};

/// Most records in one answer: well below [`crate::host::MAX_LINE`].
pub const MOST_RECORDS: u32 = 1000;

/// Why an epoch ended.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Nothing waited: it was as old as it may become.
    Idle,
    /// Output waited.
    Output,
    /// It was asked for: a device waited for room, the machine was reset.
    Asked,
    /// A dirty ring was full.
    RingFull,
    /// It had as many bytes as it may have.
    Full,
    /// It had as many bytes as it may have, and the guest stood still until there was room to end it.
    Backpressure,
    /// It was to be the last one.
    Final,
    /// One that the reader's build does not know.
    #[default]
    #[serde(other)]
    Other,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Reason::Idle => "idle",
            Reason::Output => "output",
            Reason::Asked => "asked",
            Reason::RingFull => "ring-full",
            Reason::Full => "full",
            Reason::Backpressure => "backpressure",
            Reason::Final => "final",
            Reason::Other => "other",
        })
    }
}

/// One epoch, or a capture that failed. Times are nanoseconds since [`EpochRecord::began_ns`]; none of what
/// has not happened, or not yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EpochRecord {
    /// Its number among the records of its engine, from 1.
    pub number: u64,
    /// The epoch's number. A capture that failed leaves it to the next one.
    pub epoch: u64,
    /// Why it ended.
    pub reason: Reason,
    /// The capture failed and was undone.
    pub failed: bool,
    /// The first kick, nanoseconds of the host's CLOCK_BOOTTIME.
    pub began_ns: u64,
    /// The first of its outputs began to wait: mostly before the kick, so negative.
    pub held_ns: Option<i64>,
    /// Every vCPU was parked.
    pub parked_ns: Option<u64>,
    /// Every device was quiet, too.
    pub quiet_ns: Option<u64>,
    /// The machine's state was saved.
    pub saved_ns: Option<u64>,
    /// The dirty pages were known.
    pub harvested_ns: Option<u64>,
    /// They were copied.
    pub copied_ns: Option<u64>,
    /// Its outputs and disk writes were closed.
    pub closed_ns: Option<u64>,
    /// Devices and vCPUs were let go.
    pub resumed_ns: Option<u64>,
    /// The last vCPU ran again; known from the next pause on.
    pub running_ns: Option<u64>,
    /// It began to be written to the link.
    pub encoding_ns: Option<u64>,
    /// All of it was written but what the last call sends.
    pub encoded_ns: Option<u64>,
    /// All of it was sent.
    pub sent_ns: Option<u64>,
    /// Its acknowledgement was read.
    pub acked_ns: Option<u64>,
    /// Its outputs had left.
    pub released_ns: Option<u64>,
    /// Dirty pages.
    pub pages: u64,
    /// Bytes of machine state.
    pub state_bytes: u64,
    /// Bytes of disk records.
    pub disk_bytes: u64,
    /// Outputs held.
    pub outputs: u64,
    /// Bytes of their records.
    pub output_bytes: u64,
    /// Bytes written to the link for it.
    pub shipped_bytes: u64,
}

impl EpochRecord {
    /// When the pause was over: the last vCPU ran again, or, before that is known, all were let go.
    pub fn pause_end_ns(&self) -> Option<u64> {
        self.running_ns.or(self.resumed_ns)
    }

    /// How long its first output waited to leave, nanoseconds.
    pub fn held_for_ns(&self) -> Option<u64> {
        let released = i64::try_from(self.released_ns?).ok()?;
        u64::try_from(released.checked_sub(self.held_ns?)?).ok()
    }
}

/// Whose records or figures these are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The host; empty from a process, which leaves it to its axd.
    #[serde(default)]
    pub host: String,
    /// The process's run.
    pub incarnation: Incarnation,
    /// When its engine was made, nanoseconds of the host's CLOCK_BOOTTIME.
    pub engine_ns: u64,
}

/// Records of the last epochs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceReport {
    /// Whose they are.
    pub of: Origin,
    /// Oldest first. Those that made room for newer ones are missing.
    pub records: Vec<EpochRecord>,
    /// The number to go on from.
    pub next: u64,
    /// The number that the next epoch's record will have.
    pub end: u64,
}

/// Values counted in buckets at most a thirty-second wide of their size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buckets {
    /// The largest value ever counted.
    pub max: u64,
    /// Those that have any: the largest value of the bucket, and how many values are in it. Ascending.
    pub buckets: Vec<(u64, u64)>,
}

impl Buckets {
    /// How many values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, n)| n).sum()
    }

    /// About their sum: at most 3.2 % too much.
    pub fn total(&self) -> u64 {
        let each = self.buckets.iter();
        each.fold(0, |sum, (top, n)| {
            sum.saturating_add(top.min(&self.max).saturating_mul(*n))
        })
    }

    /// The value that so many of a thousand are not above; 0 with none.
    pub fn per_mille(&self, of: u64) -> u64 {
        let rank = (self.count() * of).div_ceil(1000).max(1);
        let mut seen = 0;
        let at = self.buckets.iter().find(|(_, n)| {
            seen += n;
            seen >= rank
        });
        at.map_or(0, |(top, _)| (*top).min(self.max))
    }

    /// The largest value, as exact as its bucket.
    pub fn largest(&self) -> u64 {
        self.per_mille(1000)
    }

    /// What was counted since `earlier`, the same histogram before.
    #[must_use]
    pub fn since(&self, earlier: &Buckets) -> Buckets {
        let mut before = earlier.buckets.iter().peekable();
        let mut more = |(top, n): &(u64, u64)| {
            while before.next_if(|(other, _)| other < top).is_some() {}
            let had = before.next_if(|(other, _)| other == top);
            let more = n.saturating_sub(had.map_or(0, |(_, n)| *n));
            (more > 0).then_some((*top, more))
        };
        Buckets {
            max: self.max,
            buckets: self.buckets.iter().filter_map(&mut more).collect(),
        }
    }
}

/// What was counted since an engine was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Whose figures these are.
    pub of: Origin,
    /// Now, nanoseconds of the host's CLOCK_BOOTTIME.
    pub now_ns: u64,
    /// Age of the oldest output held, nanoseconds; 0 with none.
    pub oldest_held_ns: u64,
    /// Epochs captured, by the reason they ended for.
    pub reasons: BTreeMap<Reason, u64>,
    /// What else was counted, by name.
    pub counts: BTreeMap<String, u64>,
    /// By name, which ends with the unit: `pause_ns`, `shipped_bytes`, `pages`.
    pub histograms: BTreeMap<String, Buckets>,
}

impl StatsReport {
    /// Epochs captured.
    pub fn epochs(&self) -> u64 {
        self.reasons.values().sum()
    }

    /// A histogram; an empty one if the process does not know it.
    pub fn histogram(&self, name: &str) -> Buckets {
        self.histograms.get(name).cloned().unwrap_or_default()
    }

    /// What was counted since `earlier`; none if that is of another engine.
    pub fn since(&self, earlier: &StatsReport) -> Option<StatsReport> {
        if self.of != earlier.of {
            return None;
        }
        fn more<K: Ord + Clone>(
            now: &BTreeMap<K, u64>,
            then: &BTreeMap<K, u64>,
        ) -> BTreeMap<K, u64> {
            let had = |name: &K| then.get(name).copied().unwrap_or(0);
            let each = now.iter();
            each.map(|(name, n)| (name.clone(), n.saturating_sub(had(name))))
                .collect()
        }
        let histograms = self.histograms.iter().map(|(name, now)| {
            let then = earlier.histograms.get(name);
            (
                name.clone(),
                then.map_or_else(|| now.clone(), |then| now.since(then)),
            )
        });
        Some(StatsReport {
            of: self.of.clone(),
            now_ns: self.now_ns,
            oldest_held_ns: self.oldest_held_ns,
            reasons: more(&self.reasons, &earlier.reasons),
            counts: more(&self.counts, &earlier.counts),
            histograms: histograms.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(of: &[(u64, u64)], max: u64) -> Buckets {
        Buckets {
            max,
            buckets: of.to_vec(),
        }
    }

    #[test]
    fn percentiles_and_differences_of_buckets() {
        let then = buckets(&[(10, 90), (20, 9)], 19);
        let now = buckets(&[(5, 1), (10, 90), (20, 10), (40, 1)], 35);
        assert_eq!(
            (now.count(), now.per_mille(500), now.per_mille(990)),
            (102, 10, 20)
        );
        assert_eq!((now.largest(), now.per_mille(999)), (35, 35));
        assert_eq!(now.since(&then), buckets(&[(5, 1), (20, 1), (40, 1)], 35));
        assert_eq!(now.since(&now).count(), 0);
        assert_eq!(Buckets::default().per_mille(500), 0);
        assert_eq!(buckets(&[(10, 2), (40, 1)], 35).total(), 55);
    }

    #[test]
    fn a_whole_answer_fits_a_line() {
        let all = Some(u64::MAX >> 20);
        let record = EpochRecord {
            number: u64::MAX >> 20,
            epoch: u64::MAX >> 20,
            reason: Reason::Backpressure,
            began_ns: u64::MAX >> 4,
            held_ns: Some(i64::MIN >> 20),
            parked_ns: all,
            quiet_ns: all,
            saved_ns: all,
            harvested_ns: all,
            copied_ns: all,
            closed_ns: all,
            resumed_ns: all,
            running_ns: all,
            encoding_ns: all,
            encoded_ns: all,
            sent_ns: all,
            acked_ns: all,
            released_ns: all,
            pages: 1 << 32,
            shipped_bytes: 1 << 40,
            state_bytes: 1 << 32,
            disk_bytes: 1 << 40,
            outputs: 1 << 32,
            output_bytes: 1 << 32,
            ..EpochRecord::default()
        };
        let line = serde_json::to_string(&record).unwrap();
        let whole = line.len() * MOST_RECORDS as usize;
        assert!(whole < crate::host::MAX_LINE * 9 / 10, "{whole}: {line}");
        assert_eq!(serde_json::from_str::<EpochRecord>(&line).unwrap(), record);
        // Of a later build.
        let later = r#"{"number":7,"reason":"whim","dreamt_ns":4}"#;
        let read: EpochRecord = serde_json::from_str(later).unwrap();
        assert_eq!((read.number, read.reason), (7, Reason::Other));
    }

    #[test]
    fn a_new_engine_has_no_earlier_figures() {
        let report = |engine_ns, output| StatsReport {
            of: Origin {
                host: "a".into(),
                incarnation: Incarnation(1),
                engine_ns,
            },
            now_ns: 9,
            oldest_held_ns: 0,
            reasons: [(Reason::Output, output)].into(),
            counts: BTreeMap::new(),
            histograms: [("pause_ns".into(), buckets(&[(9, output)], 9))].into(),
        };
        let more = report(1, 5).since(&report(1, 3)).unwrap();
        assert_eq!((more.epochs(), more.histogram("pause_ns").count()), (2, 2));
        assert_eq!(report(2, 5).since(&report(1, 3)), None);
        let line = serde_json::to_string(&more).unwrap();
        assert_eq!(serde_json::from_str::<StatsReport>(&line).unwrap(), more);
    }

    #[test]
    fn how_long_output_waited_counts_from_before_the_kick() {
        let record = EpochRecord {
            held_ns: Some(-40),
            released_ns: Some(100),
            resumed_ns: Some(60),
            ..EpochRecord::default()
        };
        assert_eq!(
            (record.held_for_ns(), record.pause_end_ns()),
            (Some(140), Some(60))
        );
        assert_eq!(EpochRecord::default().held_for_ns(), None);
    }
}
