//! Answer times: percentiles and the longest silence.

use std::ops::Range;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// When requests were sent and answered, in order of the answers.
#[derive(Debug, Clone)]
pub struct Samples {
    started: Instant,
    ended: Instant,
    /// (sent, answered), nanoseconds since `started`.
    answers: Vec<(u64, u64)>,
}

/// Percentiles of a set of durations, in microseconds (nearest rank).
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many there were.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

impl Percentiles {
    /// Percentiles of `nanoseconds`, in any order. All zero when there are none.
    pub fn of(mut nanoseconds: Vec<u64>) -> Percentiles {
        nanoseconds.sort_unstable();
        let n = nanoseconds.len();
        let at = |share: f64| {
            let rank = (share * n as f64).ceil() as usize;
            nanoseconds
                .get(rank.clamp(1, n.max(1)) - 1)
                .map_or(0.0, |ns| *ns as f64 / 1e3)
        };
        let sum: u64 = nanoseconds.iter().sum();
        Percentiles {
            count: n as u64,
            mean: if n == 0 {
                0.0
            } else {
                sum as f64 / n as f64 / 1e3
            },
            p50: at(0.50),
            p90: at(0.90),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
        }
    }
}

/// A silence between two successive answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// When the last answer before it came (or the run began).
    pub began: Instant,
    /// How long it lasted.
    pub length: Duration,
}

impl Gap {
    /// Its length in milliseconds.
    pub fn ms(&self) -> f64 {
        self.length.as_secs_f64() * 1e3
    }
}

impl Samples {
    pub(crate) fn begin() -> Samples {
        let started = Instant::now();
        Samples {
            started,
            ended: started,
            answers: Vec::new(),
        }
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn record(&mut self, sent: Instant, answered: Instant) {
        self.answers
            .push((self.since_start(sent), self.since_start(answered)));
    }

    pub(crate) fn end(&mut self) {
        self.ended = Instant::now();
    }

    /// The run ended at `at`.
    pub(super) fn end_at(&mut self, at: Instant) {
        self.ended = at;
    }

    fn since_start(&self, t: Instant) -> u64 {
        t.saturating_duration_since(self.started).as_nanos() as u64
    }

    /// How many answers there were.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether there was no answer at all.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Request-to-answer times over the whole run.
    pub fn latency(&self) -> Percentiles {
        Percentiles::of(
            self.answers
                .iter()
                .map(|(s, a)| a.saturating_sub(*s))
                .collect(),
        )
    }

    /// Request-to-answer times of the requests sent in `[from, until)`, in nanoseconds.
    pub fn latencies_between(&self, from: Instant, until: Instant) -> Vec<u64> {
        let window = self.since_start(from)..self.since_start(until);
        self.answers
            .iter()
            .filter(|(sent, _)| window.contains(sent))
            .map(|(s, a)| a.saturating_sub(*s))
            .collect()
    }

    /// The longest time without an answer that ended at or after `from` (the start of the run if
    /// `None`). The run's beginning and end count as answers, so a service that never came back
    /// shows.
    pub fn longest_gap(&self, from: Option<Instant>) -> Gap {
        let from = from.map_or(0, |t| self.since_start(t));
        self.longest(|_, ended| ended >= from)
    }

    /// The longest time without an answer of those of which a part lies in `window`; as
    /// [`Samples::longest_gap`] else.
    pub fn longest_gap_during(&self, window: Range<Instant>) -> Gap {
        let window = self.since_start(window.start)..self.since_start(window.end);
        self.longest(|began, ended| began < window.end && ended >= window.start)
    }

    fn longest(&self, counts: impl Fn(u64, u64) -> bool) -> Gap {
        let end = self.since_start(self.ended);
        let mut before = 0;
        let mut longest = (0, 0);
        for at in self.answers.iter().map(|(_, a)| *a).chain([end]) {
            if counts(before, at) && at.saturating_sub(before) > longest.1 {
                longest = (before, at - before);
            }
            before = at;
        }
        Gap {
            began: self.started + Duration::from_nanos(longest.0),
            length: Duration::from_nanos(longest.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(answers_ms: &[(u64, u64)], end_ms: u64) -> Samples {
        let started = Instant::now();
        let at = |ms: u64| started + Duration::from_millis(ms);
        let mut s = Samples {
            started,
            ended: at(end_ms),
            answers: Vec::new(),
        };
        for (sent, answered) in answers_ms {
            s.record(at(*sent), at(*answered));
        }
        s
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let p = Percentiles::of((1..=1000u64).rev().map(|us| us * 1000).collect());
        assert_eq!(
            (p.p50, p.p90, p.p99, p.p999, p.max),
            (500.0, 900.0, 990.0, 999.0, 1000.0)
        );
        assert_eq!(p.mean, 500.5);
        assert_eq!(Percentiles::of(vec![7_000]).p50, 7.0);
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }

    #[test]
    fn the_longest_silence_is_found_also_at_the_end() {
        let s = samples(&[(0, 1), (1, 2), (3, 42), (41, 43)], 50);
        assert_eq!(s.longest_gap(None).length, Duration::from_millis(40));
        assert_eq!(
            s.longest_gap(None).began,
            s.started() + Duration::from_millis(2)
        );
        let dead = samples(&[(0, 1), (1, 2)], 900);
        assert_eq!(dead.longest_gap(None).length, Duration::from_millis(898));
        assert_eq!(
            samples(&[], 30).longest_gap(None).length,
            Duration::from_millis(30)
        );
    }

    #[test]
    fn a_window_leaves_out_what_was_over_before() {
        let s = samples(&[(0, 100), (101, 102), (102, 110)], 111);
        let from = s.started() + Duration::from_millis(101);
        assert_eq!(s.longest_gap(Some(from)).length, Duration::from_millis(8));
        let until = s.started() + Duration::from_millis(102);
        assert_eq!(s.latencies_between(from, until), [1_000_000]);
    }

    #[test]
    fn a_silence_of_another_time_is_not_that_of_the_window() {
        let s = samples(&[(0, 10), (11, 12), (12, 52), (53, 54), (54, 154)], 155);
        let at = |ms: u64| s.started() + Duration::from_millis(ms);
        let during = |from, until| s.longest_gap_during(at(from)..at(until)).length;
        assert_eq!(during(13, 20), Duration::from_millis(40));
        assert_eq!(during(20, 53), Duration::from_millis(40));
        assert_eq!(during(20, 55), Duration::from_millis(100));
        assert_eq!(during(1, 2), Duration::from_millis(10));
    }
}
