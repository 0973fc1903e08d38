//! What one failover was like from outside, and what all of them were like together.

use serde::Serialize;
use testkit::client::{Percentiles, Verdict};

/// One host's death, as the client saw it.
#[derive(Debug, Clone)]
pub struct Failover {
    /// What the client counted.
    pub verdict: Verdict,
    /// Epochs committed.
    pub epochs: u64,
    /// UDP echo times under fault tolerance, before the death, nanoseconds.
    pub protected: Vec<u64>,
    /// UDP echo times of the same guest without protection, nanoseconds.
    pub unprotected: Vec<u64>,
    /// Longest gap between successive UDP echoes, milliseconds.
    pub gap_udp_ms: f64,
    /// Longest gap between successive INCR answers, milliseconds.
    pub gap_incr_ms: f64,
}

impl Failover {
    /// The worse of the two gaps, milliseconds.
    pub fn blackout_ms(&self) -> f64 {
        self.gap_udp_ms.max(self.gap_incr_ms)
    }
}

/// Added latency, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AddedLatency {
    /// Median with protection minus median without.
    pub p50: f64,
    /// The same of the 99th percentiles.
    pub p99: f64,
}

/// The line `--json` ends with; its fields and their order are promised to scripts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Protection.
    pub mode: &'static str,
    /// Requests answered: ledger appends and increments.
    pub requests: u64,
    /// Acknowledged ledger records and increments that are gone.
    pub lost: u64,
    /// Ledger records and increments done twice; never frames.
    pub duplicated: u64,
    /// Ledger records out of order.
    pub reordered: u64,
    /// TCP connections that broke.
    pub connections_broken: u64,
    /// Epochs committed.
    pub epochs: u64,
    /// UDP echo, by what protection added.
    pub added_latency_us: AddedLatency,
    /// Longest time without an answer, the worse of UDP echo and INCR; the median over several
    /// failovers.
    pub blackout_ms: f64,
}

impl Summary {
    /// Sums up one failover or several.
    pub fn of(failovers: &[Failover]) -> Summary {
        let verdict = failovers
            .iter()
            .fold(Verdict::default(), |sum, f| sum + f.verdict);
        let times = |pick: fn(&Failover) -> &Vec<u64>| {
            Percentiles::of(failovers.iter().flat_map(pick).copied().collect())
        };
        let (with, without) = (times(|f| &f.protected), times(|f| &f.unprotected));
        Summary {
            mode: "ft",
            requests: verdict.requests,
            lost: verdict.lost,
            duplicated: verdict.duplicated,
            reordered: verdict.reordered,
            connections_broken: verdict.connections_broken,
            epochs: failovers.iter().map(|f| f.epochs).sum(),
            added_latency_us: AddedLatency {
                p50: round(with.p50 - without.p50),
                p99: round(with.p99 - without.p99),
            },
            blackout_ms: round(median(
                failovers.iter().map(Failover::blackout_ms).collect(),
            )),
        }
    }

    /// Whether nobody outside could tell.
    pub fn is_clean(&self) -> bool {
        self.lost == 0
            && self.duplicated == 0
            && self.reordered == 0
            && self.connections_broken == 0
    }
}

/// The median; of an even number, the mean of the middle two. Zero of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match (values.get(n.wrapping_sub(1) / 2), values.get(n / 2)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

/// To a tenth: more digits than that are noise.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failover(gap_udp_ms: f64, gap_incr_ms: f64) -> Failover {
        Failover {
            verdict: Verdict {
                requests: 100,
                ..Verdict::default()
            },
            epochs: 7,
            protected: vec![900_000, 1_000_000, 3_000_000],
            unprotected: vec![100_000, 200_000, 500_000],
            gap_udp_ms,
            gap_incr_ms,
        }
    }

    #[test]
    fn the_line_is_as_promised() {
        let line = serde_json::to_string(&Summary::of(&[failover(30.0, 41.26)])).unwrap();
        assert_eq!(
            line,
            r#"{"mode":"ft","requests":100,"lost":0,"duplicated":0,"reordered":0,"connections_broken":0,"epochs":7,"added_latency_us":{"p50":800.0,"p99":2500.0},"blackout_ms":41.3}"#
        );
    }

    #[test]
    fn several_failovers_add_up_and_the_blackout_is_their_median() {
        let mut all = vec![
            failover(10.0, 1.0),
            failover(1.0, 50.0),
            failover(30.0, 2.0),
        ];
        let sum = Summary::of(&all);
        assert_eq!((sum.requests, sum.epochs, sum.blackout_ms), (300, 21, 30.0));
        assert!(sum.is_clean());
        all[1].verdict.lost = 1;
        assert!(!Summary::of(&all).is_clean());
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
    }
}
