//! From what the repetitions measured to the one table: medians, what protection added, what is kept.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::system::{Case, System};
use crate::summary::median;

/// What one repetition measured of one case. What was not measured is not there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The system's name.
    pub system: String,
    /// The case's name.
    pub case: String,
    /// Median answer time, microseconds.
    pub p50_us: Option<f64>,
    /// 99th percentile of it.
    pub p99_us: Option<f64>,
    /// Answers a second.
    pub per_s: Option<f64>,
    /// Processor time of all the system's processes, seconds in a run's time.
    pub cpu_s: Option<f64>,
    /// Longest silence after the kill, milliseconds.
    pub blackout_ms: Option<f64>,
    /// Requests lost, done twice, or broken by the failover.
    pub harm: Option<u64>,
    /// How long the guest stood still at a checkpoint, the median, milliseconds, where the system tells.
    pub stop_ms: Option<f64>,
    /// Why there is nothing.
    pub why_not: Option<String>,
}

/// A row as scripts get it: its fields and their order are promised. Null where it was not run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The system's name.
    pub system: String,
    /// The case's name.
    pub case: String,
    /// Median answer time, by what protection added to that of the same VMM without it, microseconds.
    pub p50_us: Option<f64>,
    /// The same of the 99th percentile.
    pub p99_us: Option<f64>,
    /// Share of the throughput of the same VMM without protection.
    pub kept: Option<f64>,
    /// Processor time of all the system's processes, seconds in a run's time.
    pub cpu_s: Option<f64>,
    /// Longest silence after the kill, milliseconds.
    pub blackout_ms: Option<f64>,
}

/// Medians of all repetitions of a case.
#[derive(Debug, Default, Clone, PartialEq)]
struct Medians {
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    per_s: Option<f64>,
    cpu_s: Option<f64>,
    blackout_ms: Option<f64>,
    stop_ms: Option<f64>,
    harm: Option<u64>,
    counted: usize,
}

fn of_case(all: &[Measured], system: System, case: Case) -> Medians {
    let (system, case) = (system.to_string(), case.to_string());
    let ours = || all.iter().filter(|m| m.system == system && m.case == case);
    let middle = |pick: fn(&Measured) -> Option<f64>| {
        let values: Vec<f64> = ours().filter_map(pick).collect();
        (!values.is_empty()).then(|| median(values))
    };
    Medians {
        p50_us: middle(|m| m.p50_us),
        p99_us: middle(|m| m.p99_us),
        per_s: middle(|m| m.per_s),
        cpu_s: middle(|m| m.cpu_s),
        blackout_ms: middle(|m| m.blackout_ms),
        stop_ms: middle(|m| m.stop_ms),
        harm: ours().filter_map(|m| m.harm).reduce(|a, b| a + b),
        counted: ours().filter(|m| m.why_not.is_none()).count(),
    }
}

fn less(of: Option<f64>, base: Option<f64>) -> Option<f64> {
    Some(rounded(of? - base?, 10.0))
}

/// The rows of the chosen systems, in the order of the table.
pub fn rows(all: &[Measured], systems: &[System]) -> Vec<Row> {
    let cells = systems.iter().flat_map(|s| Case::ALL.map(|c| (*s, c)));
    cells
        .map(|(system, case)| {
            let own = of_case(all, system, case);
            let base = of_case(all, system.baseline(), case);
            let kept = match (own.per_s, base.per_s) {
                (Some(own), Some(base)) if base > 0.0 => Some(rounded(own / base, 1000.0)),
                _ => None,
            };
            Row {
                system: system.to_string(),
                case: case.to_string(),
                p50_us: less(own.p50_us, base.p50_us),
                p99_us: less(own.p99_us, base.p99_us),
                kept,
                cpu_s: own.cpu_s.map(|s| rounded(s, 100.0)),
                blackout_ms: own.blackout_ms.map(|ms| rounded(ms, 10.0)),
            }
        })
        .collect()
}

/// The table for the reader: as the rows, with the answer times and rates themselves.
pub fn text(all: &[Measured], systems: &[System]) -> String {
    let mut text = String::from(
        "| system | case | n | p50 µs | p99 µs | added p50 | added p99 | answers/s | kept | CPU s | stop ms | blackout ms | harm |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let cell =
        |value: Option<f64>, digits: usize| value.map_or("–".into(), |v| format!("{v:.digits$}"));
    let cells = systems.iter().flat_map(|s| Case::ALL.map(|c| (*s, c)));
    for ((system, case), row) in cells.zip(rows(all, systems)) {
        let own = of_case(all, system, case);
        let harm = own.harm.map_or("–".into(), |n| n.to_string());
        let columns = [
            row.system,
            row.case,
            own.counted.to_string(),
            cell(own.p50_us, 0),
            cell(own.p99_us, 0),
            cell(row.p50_us, 0),
            cell(row.p99_us, 0),
            cell(own.per_s, 0),
            cell(row.kept, 3),
            cell(row.cpu_s, 2),
            cell(own.stop_ms, 1),
            cell(row.blackout_ms, 1),
            harm,
        ];
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {} |", columns.join(" | "));
    }
    text
}

/// How many repetitions there are of the system that has the most.
pub fn repetitions(all: &[Measured]) -> usize {
    let last = Case::Failover.to_string();
    let of = |system: System| {
        let system = system.to_string();
        all.iter()
            .filter(|m| m.system == system && m.case == last)
            .count()
    };
    System::ALL.into_iter().map(of).max().unwrap_or(0)
}

/// What was not run and why, each reason once.
pub fn reasons(all: &[Measured]) -> Vec<String> {
    let mut reasons: Vec<String> = Vec::new();
    for m in all {
        if let Some(why) = &m.why_not {
            let reason = format!("{}, {}: {why}", m.system, m.case);
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
    }
    reasons
}

/// More digits than that are noise.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(system: System, case: Case, p50: f64, per_s: f64) -> Measured {
        Measured {
            system: system.to_string(),
            case: case.to_string(),
            p50_us: Some(p50),
            p99_us: Some(10.0 * p50),
            per_s: Some(per_s),
            cpu_s: Some(1.0),
            ..Measured::default()
        }
    }

    fn row(rows: &[Row], system: System, case: Case) -> Row {
        let found = rows
            .iter()
            .find(|r| r.system == system.to_string() && r.case == case.to_string());
        found.unwrap().clone()
    }

    const COLO: System = System::Colo(100);

    #[test]
    fn what_is_added_and_kept_is_against_the_same_vmm_without_protection() {
        let mut all = Vec::new();
        for (p50, per_s) in [(90.0, 900.0), (100.0, 1000.0), (5000.0, 10.0)] {
            all.push(measured(System::Qemu, Case::UdpEcho, p50, per_s));
            all.push(measured(COLO, Case::UdpEcho, 3.0 * p50, per_s / 4.0));
            all.push(measured(System::AxNone, Case::UdpEcho, 50.0, 800.0));
            all.push(measured(System::AxFt, Case::UdpEcho, 350.0, 720.0));
        }
        let rows = rows(&all, &System::ALL);
        let colo = row(&rows, COLO, Case::UdpEcho);
        assert_eq!((colo.p50_us, colo.p99_us), (Some(200.0), Some(2000.0)));
        assert_eq!((colo.kept, colo.cpu_s), (Some(0.25), Some(1.0)));
        let ft = row(&rows, System::AxFt, Case::UdpEcho);
        assert_eq!((ft.p50_us, ft.kept), (Some(300.0), Some(0.9)));
        let plain = row(&rows, System::Qemu, Case::UdpEcho);
        assert_eq!((plain.p50_us, plain.kept), (Some(0.0), Some(1.0)));
    }

    #[test]
    fn what_was_not_run_is_null_and_the_line_is_as_promised() {
        let mut failover = Measured {
            system: COLO.to_string(),
            case: Case::Failover.to_string(),
            blackout_ms: Some(93.25),
            ..Measured::default()
        };
        let mut all = vec![failover.clone(), measured(COLO, Case::Idle, 1.0, 1.0)];
        failover.blackout_ms = None;
        failover.why_not = Some("nobody answered".into());
        all.push(failover);
        let rows = rows(&all, &[COLO]);
        assert_eq!(rows.len(), Case::ALL.len());
        let line = serde_json::to_string(&row(&rows, COLO, Case::Failover)).unwrap();
        assert_eq!(
            line,
            r#"{"system":"colo-100","case":"failover","p50_us":null,"p99_us":null,"kept":null,"cpu_s":null,"blackout_ms":93.3}"#
        );
        // Without the baseline in the run there is nothing to compare with.
        assert_eq!(row(&rows, COLO, Case::Idle).kept, None);
        assert_eq!(reasons(&all), ["colo-100, failover: nobody answered"]);
        let table = text(&all, &[COLO]);
        assert_eq!(table.lines().count(), 2 + Case::ALL.len());
        let last = table.lines().last().unwrap();
        assert!(last.starts_with("| colo-100 | failover | 1 | –"), "{last}");
    }

    #[test]
    fn the_median_of_repetitions_leaves_out_those_that_failed() {
        let mut failed = measured(COLO, Case::Ledger, 0.0, 0.0);
        (failed.p50_us, failed.why_not) = (None, Some("no".into()));
        let all = [
            measured(COLO, Case::Ledger, 10.0, 1.0),
            failed,
            measured(COLO, Case::Ledger, 30.0, 1.0),
        ];
        let m = of_case(&all, COLO, Case::Ledger);
        assert_eq!((m.p50_us, m.counted), (Some(20.0), 2));
        assert_eq!(repetitions(&all), 0);
        let ended = measured(System::AxFt, Case::Failover, 1.0, 1.0);
        assert_eq!(repetitions(&[ended.clone(), ended]), 2);
    }
}
