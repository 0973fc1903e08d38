//! Epochs as rows for people. All times are microseconds.

use super::Told;

/// The row above.
pub const HEAD: &str = "   EPOCH WHY             PAUSE   PARK  QUIET   SAVE HARVST   COPY  CLOSE RESUME    SEND     ACK RELEASE    HELD   PAGES   SENT\n";

/// From one moment to another, with a decimal.
fn span(from: Option<u64>, to: Option<u64>) -> String {
    let ns = to.zip(from).map(|(to, from)| to.saturating_sub(from));
    micros(ns)
}

fn micros(ns: Option<u64>) -> String {
    match ns {
        None => "-".to_owned(),
        // Where a decimal would be noise.
        Some(ns @ 10_000_000..) => (ns / 1000).to_string(),
        Some(ns) => format!("{:.1}", ns as f64 / 1000.0),
    }
}

/// Bytes in four characters and a unit.
fn bytes(of: u64) -> String {
    match of {
        0..10_000 => of.to_string(),
        10_000..10_000_000 => format!("{}K", of / 1000),
        _ => format!("{}M", of / 1_000_000),
    }
}

fn row(told: &Told) -> String {
    let r = &told.record;
    let why = match r.failed {
        true => format!("{}, FAILED", r.reason),
        false => r.reason.to_string(),
    };
    let begun = Some(0);
    format!(
        "{:>8} {why:<13} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:>7} {:>7} {:>7} {:>7} {:>6}\n",
        r.epoch,
        span(begun, r.pause_end_ns()),
        span(begun, r.parked_ns),
        span(r.parked_ns, r.quiet_ns),
        span(r.quiet_ns, r.saved_ns),
        span(r.saved_ns, r.harvested_ns),
        span(r.harvested_ns, r.copied_ns),
        span(r.copied_ns, r.closed_ns),
        span(r.closed_ns, r.pause_end_ns()),
        span(r.encoding_ns, r.sent_ns),
        span(r.sent_ns, r.acked_ns),
        span(r.acked_ns, r.released_ns),
        micros(r.held_for_ns()),
        r.pages,
        bytes(r.shipped_bytes),
    )
}

/// A row each.
pub fn rows(told: &[Told]) -> String {
    told.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::epoch;
    use super::*;

    #[test]
    fn each_column_is_below_its_name() {
        let mut told = epoch(7, 1_000_000);
        let text = rows(&[told.clone()]);
        assert_eq!(
            text,
            "       7 output          150.0   20.0    2.0   30.0   10.0   40.0    8.0   40.0    30.0   100.0     5.0   500.0      90   372K\n"
        );
        assert_eq!(text.len(), HEAD.len());
        (told.record.failed, told.record.running_ns) = (true, None);
        (told.record.resumed_ns, told.record.released_ns) = (None, None);
        let text = rows(&[told]);
        assert!(text.contains("output, FAILED"), "{text}");
        assert!(text.contains("   -"), "{text}");
    }
}
