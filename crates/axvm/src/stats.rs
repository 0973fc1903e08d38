//! `axvm stats`: what was counted of a VM's epochs.

use std::time::Duration;

use ax_api::host::{Code, Reply, Request};
use ax_api::trace::{Buckets, StatsReport};
use serde_json::{Value, json};

use crate::cli::Output;
use crate::client::{Client, Failure};
use crate::show::Show;

/// What the histograms are called for people, and what of, in the order of an epoch's life. The rest follow under
/// their own names.
const NAMES: [(&str, &str); 15] = [
    ("length_ns", "from one pause to the next"),
    ("pause_ns", "pause: first kick to the last vCPU running"),
    ("park_ns", "  park: vCPUs parked, devices quiet"),
    ("save_ns", "  save: machine state"),
    ("harvest_ns", "  harvest: which pages are dirty"),
    ("copy_ns", "  copy: these pages"),
    ("close_ns", "  close: outputs and disk writes"),
    ("resume_ns", "  resume"),
    ("ship_ns", "ship: encoded and sent"),
    ("ack_ns", "ack: sent to acknowledged"),
    ("commit_ns", "commit: resumed to acknowledged"),
    ("release_ns", "release: acknowledged to outputs gone"),
    ("held_ns", "held: how long the first output waited"),
    ("pages", "dirty pages an epoch"),
    ("shipped_bytes", "bytes sent an epoch"),
];

/// The figures of a VM, now.
///
/// # Errors
/// There is no such VM, nothing protects it, or it can't be asked.
pub fn ask(client: &Client, show: &Show, name: &str) -> Result<StatsReport, Failure> {
    let request = Request::Stats {
        name: name.to_owned(),
    };
    match client.ask(&request, show)? {
        Reply::Stats { stats } => Ok(*stats),
        other => Err(Failure::unexpected(&other)),
    }
}

/// A value of a histogram of this name, with its unit where it has one.
pub fn value(name: &str, of: u64) -> String {
    match name {
        name if !name.ends_with("_ns") => of.to_string(),
        _ if of >= 1_000_000 => format!("{:.2} ms", of as f64 / 1e6),
        _ => format!("{:.1} us", of as f64 / 1e3),
    }
}

fn text(name: &str, stats: &StatsReport) -> String {
    let mut reasons: Vec<_> = stats.reasons.iter().filter(|(_, n)| **n > 0).collect();
    reasons.sort_by_key(|(reason, n)| (std::cmp::Reverse(**n), **reason));
    let reasons: Vec<String> = reasons.iter().map(|(r, n)| format!("{r} {n}")).collect();
    let mut text = format!(
        "{name} on {}: {} epochs{}{}\n",
        stats.of.host,
        stats.epochs(),
        if reasons.is_empty() { "" } else { ": " },
        reasons.join(", "),
    );
    let counts = stats.counts.iter().filter(|(_, n)| **n > 0);
    let counts: Vec<String> = counts.map(|(what, n)| format!("{what} {n}")).collect();
    if !counts.is_empty() {
        text.push_str(&format!("{}\n", counts.join(", ")));
    }
    let row = |what: &str, cells: [&str; 6]| {
        let cells = cells.map(|cell| format!("{cell:>11}"));
        format!("{what:<44}{}\n", cells.concat())
    };
    text.push('\n');
    text.push_str(&row("", ["COUNT", "P50", "P90", "P99", "P99.9", "MAX"]));
    let known = NAMES.into_iter();
    let known = known.filter(|(name, _)| stats.histograms.contains_key(*name));
    let others = stats.histograms.keys().map(String::as_str);
    let others = others.filter(|name| NAMES.iter().all(|(known, _)| known != name));
    for (name, what) in known.chain(others.map(|name| (name, name))) {
        let of = stats.histogram(name);
        let at = [500, 900, 990, 999, 1000].map(|of_1000| value(name, of.per_mille(of_1000)));
        let [p50, p90, p99, p999, max] = at.each_ref().map(String::as_str);
        let count = of.count().to_string();
        text.push_str(&row(what, [&count, p50, p90, p99, p999, max]));
    }
    text
}

fn histogram(of: &Buckets) -> Value {
    json!({
        "count": of.count(), "p50": of.per_mille(500), "p90": of.per_mille(900), "p99": of.per_mille(990),
        "p999": of.per_mille(999), "max": of.largest(), "buckets": of.buckets,
    })
}

fn document(name: &str, stats: &StatsReport) -> Value {
    let each = stats.histograms.iter();
    let histograms: serde_json::Map<_, _> = each
        .map(|(name, of)| (name.clone(), histogram(of)))
        .collect();
    json!({
        "vm": name, "host": stats.of.host, "incarnation": stats.of.incarnation, "epochs": stats.epochs(),
        "reasons": stats.reasons, "counts": stats.counts, "oldest_held_ns": stats.oldest_held_ns,
        "histograms": histograms,
    })
}

/// Does what the command line asks for: what was counted since the VM's engine was made, or in the next
/// `seconds`.
///
/// # Errors
/// As [`ask`]; or the VM changed its process or shadow meanwhile.
pub fn run(
    client: &Client,
    name: &str,
    seconds: Option<u64>,
    output: Output,
    show: &Show,
) -> Result<(), Failure> {
    let mut stats = ask(client, show, name)?;
    if let Some(seconds) = seconds {
        std::thread::sleep(Duration::from_secs(seconds));
        stats = ask(client, show, name)?.since(&stats).ok_or_else(|| {
            let why = format!("{name} changed its host or its shadow meanwhile; ask again");
            Failure::new(Code::State, why)
        })?;
    }
    match output {
        Output::Json => println!("{}", document(name, &stats)),
        _ => print!("{}", text(name, &stats)),
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use ax_api::trace::{Origin, Reason};
    use ax_wire::Incarnation;

    use super::*;

    /// Figures in which a pause takes 150 us, and each other time 40 us.
    pub fn report(epochs: u64, now_ns: u64) -> StatsReport {
        let histogram = |(name, _): (&str, &str)| {
            let top = match name {
                "pause_ns" => 150_000,
                "length_ns" => 4_000_000,
                "pages" => 90,
                "shipped_bytes" => 400_000,
                _ => 40_000,
            };
            let buckets = Buckets {
                max: top * 3,
                buckets: vec![(top, epochs - epochs / 100), (top * 3, epochs / 100)],
            };
            (name.to_owned(), buckets)
        };
        StatsReport {
            of: Origin {
                host: "alpha".into(),
                incarnation: Incarnation(7),
                engine_ns: 5,
            },
            now_ns,
            oldest_held_ns: 420_000,
            reasons: [
                (Reason::Output, epochs.saturating_sub(10)),
                (Reason::Idle, 10),
            ]
            .into(),
            counts: [
                ("failed_captures".into(), 0),
                ("shipped_bytes".into(), epochs * 400_000),
            ]
            .into(),
            histograms: NAMES.map(histogram).into(),
        }
    }

    #[test]
    fn people_get_a_table_and_programs_every_bucket() {
        let stats = report(1000, 1);
        let text = text("web", &stats);
        assert!(
            text.starts_with("web on alpha: 1000 epochs: output 990, idle 10\n"),
            "{text}"
        );
        let pause = text.lines().find(|l| l.starts_with("pause: ")).unwrap();
        let cells: Vec<&str> = pause[44..].split_whitespace().collect();
        assert_eq!(
            cells.join(" "),
            "1000 150.0 us 150.0 us 150.0 us 450.0 us 450.0 us"
        );
        assert!(
            text.lines()
                .any(|l| l.starts_with("dirty pages") && l.ends_with("270"))
        );
        let document = document("web", &stats);
        let pause = &document["histograms"]["pause_ns"];
        assert_eq!(
            (&pause["p50"], &pause["p999"]),
            (&json!(150_000), &json!(450_000))
        );
        assert_eq!(pause["buckets"], json!([[150_000, 990], [450_000, 10]]));
        assert_eq!(document["reasons"]["output"], 990);
    }

    #[test]
    fn a_histogram_of_a_later_build_is_shown_under_its_own_name() {
        let mut stats = report(100, 1);
        stats.histograms.insert(
            "dream_ns".into(),
            Buckets {
                max: 9,
                buckets: vec![(9, 1)],
            },
        );
        let text = text("web", &stats);
        let dream = text.lines().find(|l| l.starts_with("dream_ns")).unwrap();
        assert_eq!(dream[44..].split_whitespace().next(), Some("1"), "{text}");
    }
}
