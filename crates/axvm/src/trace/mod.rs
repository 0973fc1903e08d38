//! `axvm trace`: the last epochs of a VM, or those to come, one by one.
//!
//! - [`reader`]: reads on in the records, across failovers. [`text`], [`perfetto`]: how they are printed.

mod perfetto;
mod reader;
mod text;

use std::io::Write;
use std::time::{Duration, Instant};

use ax_api::host::Code;
use ax_api::trace::EpochRecord;
use serde::Serialize;
use serde_json::json;

use crate::cli::{Output, TraceArgs};
use crate::client::{Client, Failure};
use crate::show::Show;
use reader::Reader;

/// Between two looks at the records: the ring holds two seconds of the fastest epochs.
const LOOK: Duration = Duration::from_millis(200);

/// Records shown when nobody says how many.
const COUNT: u64 = 20;

/// An epoch and the host it was captured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Told {
    host: String,
    #[serde(flatten)]
    record: EpochRecord,
}

/// Writes to standard output. False when nobody reads any more.
fn print(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.is_ok()
}

/// Lines of records as they come.
fn lines(told: &[Told], output: Output) -> String {
    match output {
        Output::Json => {
            let line = |told| serde_json::to_string(told).map(|line| line + "\n");
            told.iter().filter_map(|told| line(told).ok()).collect()
        }
        _ => text::rows(told),
    }
}

/// All of them at once.
fn document(name: &str, told: &[Told], missed: u64, output: Output) -> String {
    match output {
        Output::Json => format!(
            "{}\n",
            json!({"vm": name, "missed": missed, "records": told})
        ),
        Output::Perfetto => perfetto::events(name, told),
        Output::Text => format!("{}{}", text::HEAD, text::rows(told)),
    }
}

/// Does what the command line asks for.
///
/// # Errors
/// There is no such VM, nothing protects it, or it can't be asked.
pub fn run(client: &Client, args: &TraceArgs, output: Output, show: &Show) -> Result<(), Failure> {
    if args.follow && output == Output::Perfetto {
        return Err(Failure::new(
            Code::Usage,
            "--follow never ends, and what perfetto reads is one whole document: say for how long with --seconds",
        ));
    }
    let back = match (args.count, args.seconds) {
        (Some(count), _) => count,
        (None, Some(_)) => 0,
        (None, None) => COUNT,
    };
    let mut reader = Reader::new(client, show, &args.name, back)?;
    let until = match (args.seconds, args.follow) {
        (Some(seconds), _) => Some(Instant::now() + Duration::from_secs(seconds)),
        (None, true) => None,
        (None, false) => Some(Instant::now()),
    };
    if args.follow && output == Output::Text && !print(text::HEAD) {
        return Ok(());
    }
    let mut told = Vec::new();
    loop {
        let over = until.is_some_and(|until| Instant::now() >= until);
        told.append(&mut reader.more(over)?);
        if args.follow {
            if !print(&lines(&told, output)) {
                return Ok(());
            }
            told.clear();
        }
        if over {
            break;
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        std::thread::sleep(left.map_or(LOOK, |left| left.min(LOOK)));
    }
    if reader.missed > 0 && output != Output::Json {
        eprintln!(
            "{} epochs were over before they could be read",
            reader.missed
        );
    }
    if !args.follow {
        print(&document(&args.name, &told, reader.missed, output));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ax_api::trace::Reason;

    use super::*;

    /// An epoch that began at `began_ns` and has gone all its way.
    pub fn epoch(number: u64, began_ns: u64) -> Told {
        Told {
            host: "alpha".into(),
            record: EpochRecord {
                number,
                epoch: number,
                reason: Reason::Output,
                began_ns,
                held_ns: Some(-200_000),
                parked_ns: Some(20_000),
                quiet_ns: Some(22_000),
                saved_ns: Some(52_000),
                harvested_ns: Some(62_000),
                copied_ns: Some(102_000),
                closed_ns: Some(110_000),
                resumed_ns: Some(130_000),
                running_ns: Some(150_000),
                encoding_ns: Some(165_000),
                encoded_ns: Some(185_000),
                sent_ns: Some(195_000),
                acked_ns: Some(295_000),
                released_ns: Some(300_000),
                pages: 90,
                state_bytes: 4000,
                outputs: 2,
                output_bytes: 200,
                shipped_bytes: 372_000,
                ..EpochRecord::default()
            },
        }
    }

    #[test]
    fn json_is_a_document_or_a_line_each() {
        let told = [epoch(1, 1000), epoch(2, 2000)];
        let whole: serde_json::Value =
            serde_json::from_str(&document("web", &told, 3, Output::Json)).unwrap();
        assert_eq!((&whole["vm"], &whole["missed"]), (&json!("web"), &json!(3)));
        assert_eq!(whole["records"][1]["epoch"], 2);
        assert_eq!(whole["records"][1]["host"], "alpha");
        let lines = lines(&told, Output::Json);
        let each = lines.lines().map(serde_json::from_str::<serde_json::Value>);
        assert_eq!(
            each.filter(|line| line.as_ref().unwrap()["pages"] == 90)
                .count(),
            2
        );
    }
}
