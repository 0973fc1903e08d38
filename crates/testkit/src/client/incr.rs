//! INCR in a closed loop over one RESP connection: an increment done twice or forgotten shows in
//! the very next answer.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::conversation::{Conversation, bad};
use super::{Control, Oracle, Origin, Samples, Verdict};
use crate::Result;

/// What to do.
#[derive(Debug, Clone)]
pub struct IncrSpec {
    /// The RESP service.
    pub target: SocketAddr,
    /// A key nobody else uses; it is deleted first.
    pub key: String,
    /// Rest between an answer and the next request.
    pub pace: Duration,
    /// How long an answer may take before the connection counts as broken.
    pub patience: Duration,
}

impl IncrSpec {
    /// Full speed; an answer may take 30 s.
    pub fn new(target: SocketAddr, key: impl Into<String>) -> IncrSpec {
        let patience = Duration::from_secs(30);
        IncrSpec {
            target,
            key: key.into(),
            pace: Duration::ZERO,
            patience,
        }
    }
}

/// What it saw.
#[derive(Debug, Clone, Serialize)]
pub struct IncrReport {
    /// The verdict; each missing or surplus increment counts as one.
    pub verdict: Verdict,
    /// What ended connections, in the order they broke.
    pub breaks: Vec<String>,
    /// Answer times.
    #[serde(skip)]
    pub samples: Samples,
}

/// Starts the oracle.
///
/// # Errors
/// When no thread can be started.
pub fn start(origin: &Origin, spec: IncrSpec) -> Result<Oracle<IncrReport>> {
    Oracle::start("incr", origin, move |control| Ok(run(control, &spec)))
}

fn run(control: &Control, spec: &IncrSpec) -> IncrReport {
    let mut report = IncrReport {
        verdict: Verdict::default(),
        breaks: Vec::new(),
        samples: Samples::begin(),
    };
    let mut count = Count::default();
    let mut reset = true;
    while !control.stopping() {
        match converse(control, spec, &mut report, &mut count, &mut reset) {
            Ok(()) => break,
            Err(e) => {
                report.verdict.connections_broken += 1;
                report.breaks.push(e.to_string());
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    report.samples.end();
    report.verdict.lost = count.lost;
    report.verdict.duplicated = count.duplicated;
    report
}

/// Talks over one connection until told to stop.
fn converse(
    control: &Control,
    spec: &IncrSpec,
    report: &mut IncrReport,
    count: &mut Count,
    reset: &mut bool,
) -> std::io::Result<()> {
    let mut peer = Conversation::connect(spec.target, spec.patience)?;
    let key = &spec.key;
    if *reset {
        integer(&peer.ask(format!("*2\r\n$3\r\nDEL\r\n${}\r\n{key}\r\n", key.len()).as_bytes())?)?;
        *reset = false;
    }
    let request = format!("*2\r\n$4\r\nINCR\r\n${}\r\n{key}\r\n", key.len());
    while !control.stopping() {
        let sent = Instant::now();
        count.asked();
        let answer = integer(&peer.ask(request.as_bytes())?)?;
        report.samples.record(sent, Instant::now());
        report.verdict.requests += 1;
        control.answered();
        count.answered(answer);
        if !spec.pace.is_zero() {
            thread::sleep(spec.pace);
        }
    }
    Ok(())
}

fn integer(line: &str) -> std::io::Result<u64> {
    line.strip_prefix(':')
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| bad(format!("an integer was due, not {line:?}")))
}

/// Compares what the counter says with what was asked of it.
#[derive(Debug, Default)]
struct Count {
    value: u64,
    /// Increments asked for since the last answer; more than one only after a broken
    /// connection, when nobody can tell whether the last was done.
    open: u64,
    lost: u64,
    duplicated: u64,
}

impl Count {
    fn asked(&mut self) {
        self.open += 1;
    }

    fn answered(&mut self, value: u64) {
        let (least, most) = (self.value + 1, self.value + self.open);
        self.lost += least.saturating_sub(value);
        self.duplicated += value.saturating_sub(most);
        self.value = value;
        self.open = 0;
    }
}
