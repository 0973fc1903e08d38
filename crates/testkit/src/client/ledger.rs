//! Appends to the ledger and reads every record back at the end.
//!
//! The service (port 7000 of the probe guest) answers each line with one line: `APPEND
//! <payload>` with the record's number, from 0, once it is durable; `READ <n>` with the payload;
//! `TAIL` with how many records there are. `ERR …` is a refusal.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::conversation::{Conversation, bad};
use super::{Control, Oracle, Origin, Samples, Verdict};
use crate::Result;

/// Questions sent before their answers are read, when reading everything back.
const PIPELINE: u64 = 64;

/// What to do.
#[derive(Debug, Clone)]
pub struct LedgerSpec {
    /// The ledger service.
    pub target: SocketAddr,
    /// Distinguishes this run's records from others'; no spaces.
    pub run: String,
    /// Rest between an answer and the next append.
    pub pace: Duration,
    /// How long an answer may take before the connection counts as broken.
    pub patience: Duration,
}

impl LedgerSpec {
    /// Full speed; an answer may take 30 s.
    pub fn new(target: SocketAddr, run: impl Into<String>) -> LedgerSpec {
        let patience = Duration::from_secs(30);
        LedgerSpec {
            target,
            run: run.into(),
            pace: Duration::ZERO,
            patience,
        }
    }
}

/// What it saw.
#[derive(Debug, Clone, Serialize)]
pub struct LedgerReport {
    /// The verdict, after reading everything back.
    pub verdict: Verdict,
    /// Records of this run found at the end.
    pub records: u64,
    /// What ended connections, in the order they broke.
    pub breaks: Vec<String>,
    /// Answer times of the appends.
    #[serde(skip)]
    pub samples: Samples,
}

/// Starts the oracle. Stopping it reads all records back, which takes a moment.
///
/// # Errors
/// When no thread can be started.
pub fn start(origin: &Origin, spec: LedgerSpec) -> Result<Oracle<LedgerReport>> {
    Oracle::start("ledger", origin, move |control| Ok(run(control, &spec)))
}

/// Acknowledged appends: number the service gave → which of ours it was.
type Acknowledged = BTreeMap<u64, u64>;

fn run(control: &Control, spec: &LedgerSpec) -> LedgerReport {
    let mut report = LedgerReport {
        verdict: Verdict::default(),
        records: 0,
        breaks: Vec::new(),
        samples: Samples::begin(),
    };
    let mut acknowledged = Acknowledged::new();
    let mut twice = 0;
    let mut serial = 0;
    while !control.stopping() {
        let talked = append(
            control,
            spec,
            &mut serial,
            &mut acknowledged,
            &mut twice,
            &mut report,
        );
        match talked {
            Ok(()) => break,
            Err(e) => {
                report.broke(&e);
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    report.samples.end();
    match read_back(spec, &acknowledged) {
        Ok(found) => {
            report.records = found
                .values()
                .filter(|p| p.run_serial(spec).is_some())
                .count() as u64;
            judge(spec, &acknowledged, &found, &mut report.verdict);
        }
        Err(e) => {
            // What cannot be read back is as good as lost.
            report.broke(&e);
            report.verdict.lost = acknowledged.len() as u64;
        }
    }
    // One number given to two appends: one of them is overwritten.
    report.verdict.lost += twice;
    report
}

impl LedgerReport {
    fn broke(&mut self, e: &io::Error) {
        self.verdict.connections_broken += 1;
        self.breaks.push(e.to_string());
    }
}

fn append(
    control: &Control,
    spec: &LedgerSpec,
    serial: &mut u64,
    acknowledged: &mut Acknowledged,
    twice: &mut u64,
    report: &mut LedgerReport,
) -> io::Result<()> {
    let mut peer = Conversation::connect(spec.target, spec.patience)?;
    while !control.stopping() {
        *serial += 1;
        let request = format!("APPEND {}\n", payload(spec, *serial));
        let sent = Instant::now();
        let number = number(&peer.ask(request.as_bytes())?)?;
        report.samples.record(sent, Instant::now());
        report.verdict.requests += 1;
        control.answered();
        if acknowledged.insert(number, *serial).is_some() {
            *twice += 1;
        }
        if !spec.pace.is_zero() {
            thread::sleep(spec.pace);
        }
    }
    Ok(())
}

fn payload(spec: &LedgerSpec, serial: u64) -> String {
    format!("{}:{serial}", spec.run)
}

fn value(line: &str) -> io::Result<&str> {
    if line.starts_with("ERR") {
        return Err(bad(format!("the ledger refused: {line}")));
    }
    Ok(line)
}

fn number(line: &str) -> io::Result<u64> {
    value(line)?
        .parse()
        .map_err(|_| bad(format!("a record number was due, not {line:?}")))
}

/// A record as read back: its payload, or nothing where the service has none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record(Option<String>);

impl Record {
    fn run_serial(&self, spec: &LedgerSpec) -> Option<u64> {
        self.0
            .as_ref()?
            .strip_prefix(&spec.run)?
            .strip_prefix(':')?
            .parse()
            .ok()
    }
}

/// Reads every record from the first acknowledged one to the tail.
fn read_back(spec: &LedgerSpec, acknowledged: &Acknowledged) -> io::Result<BTreeMap<u64, Record>> {
    let mut found = BTreeMap::new();
    let (Some(first), Some(last)) = (acknowledged.keys().next(), acknowledged.keys().last()) else {
        return Ok(found);
    };
    let mut peer = Conversation::connect(spec.target, spec.patience)?;
    let tail = number(&peer.ask(b"TAIL\n")?)?.max(*last + 1);
    let mut next = *first;
    while next < tail {
        let batch = next..tail.min(next + PIPELINE);
        let mut requests = String::new();
        for n in batch.clone() {
            requests.push_str(&format!("READ {n}\n"));
        }
        peer.send(requests.as_bytes())?;
        next = batch.end;
        for n in batch {
            found.insert(n, Record(value(&peer.line()?).ok().map(str::to_string)));
        }
    }
    Ok(found)
}

fn judge(
    spec: &LedgerSpec,
    acknowledged: &Acknowledged,
    found: &BTreeMap<u64, Record>,
    verdict: &mut Verdict,
) {
    for (number, serial) in acknowledged {
        if found.get(number).and_then(|r| r.run_serial(spec)) != Some(*serial) {
            verdict.lost += 1;
        }
    }
    let mut copies = BTreeMap::<u64, u64>::new();
    let mut highest = 0;
    for serial in found.values().filter_map(|r| r.run_serial(spec)) {
        *copies.entry(serial).or_default() += 1;
        if serial < highest {
            verdict.reordered += 1;
        }
        highest = highest.max(serial);
    }
    verdict.duplicated += copies.values().map(|n| n - 1).sum::<u64>();
}
