//! Asks the arbiter, in a thread of its own, until it answers.
//!
//! Asking is a point of no return (rule 21): a question is repeated, the same each time, until
//! there is an answer; it is never withdrawn. The record granted is durable here before anyone
//! acts on it: it is what this host registers should the witness lose its store (rule 27).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_arbiter::rules::{Registered, Registration};
use ax_arbiter::{AskError, Client};
use ax_failpoint::Point;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Member, Record, Refusal, Request, Why, WitnessId,
};
use ax_wire::{Generation, PairId};

use crate::error::Error;

/// How long one try may take before the conductor is told that nobody answers.
const TRY: Duration = Duration::from_millis(1500);

/// The file with the last record acted on.
const RECORD: &str = "record.json";

/// Between two tries after a failure.
const AGAIN: Duration = Duration::from_millis(200);

/// What the asker reports.
#[derive(Debug)]
pub enum Heard {
    /// The arbiter's record of this pair: known, or just registered by both sides.
    Known(Record),
    /// The change was granted, now or before.
    Granted(Record),
    /// It was refused.
    Refused(Refusal),
    /// Nobody answered yet; the question stands.
    Silent(String),
    /// To [`Asker::probe`]: the record as the arbiter has it now, or why it can't be had.
    Reachable(Result<Record, String>),
}

enum Task {
    Learn,
    Probe,
    Ask(Generation, Change),
}

/// The witness that the last record acted on names, if any: grants of another count for nothing
/// until both sides have registered with it (rule 27).
pub fn known_witness(state_dir: &Path) -> Option<WitnessId> {
    match load(&state_dir.join(RECORD))?.arbiter {
        Arbiter::Witness(id) => Some(id),
        Arbiter::Operator => None,
    }
}

/// The handle to the asking thread.
#[derive(Debug, Clone)]
pub struct Asker {
    tasks: mpsc::Sender<Task>,
}

struct Worker {
    client: Client,
    pair: PairId,
    me: Member,
    /// What both sides register of a pair that no arbiter has ever known.
    first: Record,
    file: PathBuf,
    tell: Box<dyn Fn(Heard) + Send>,
}

/// Reads the last record this host acted on.
fn load(file: &Path) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// Writes it durably, so that a crash leaves the old or the new one.
fn store(file: &Path, record: &Record) -> std::io::Result<()> {
    let new = file.with_extension("new");
    let mut out = std::fs::File::create(&new)?;
    out.write_all(&serde_json::to_vec(record)?)?;
    out.sync_all()?;
    std::fs::rename(&new, file)?;
    match file.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

impl Asker {
    /// Starts the thread. `current` says whose disks are current if the pair was never started;
    /// both sides must say the same. `tell` is called from the thread.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(
        client: Client,
        pair: PairId,
        me: Member,
        current: Copies,
        state_dir: &Path,
        tell: impl Fn(Heard) + Send + 'static,
    ) -> Result<Asker, Error> {
        let (tasks, todo) = mpsc::channel();
        let first = Record::defined(current, Arbiter::Operator);
        let file = state_dir.join(RECORD);
        let worker = Worker {
            client,
            pair,
            me,
            first,
            file,
            tell: Box::new(tell),
        };
        std::thread::Builder::new()
            .name("asker".into())
            .spawn(move || worker.run(&todo))
            .map_err(Error::Thread)?;
        Ok(Asker { tasks })
    }

    /// Learns the arbiter's record, registering this side if it is unknown there; ends in
    /// [`Heard::Known`] or [`Heard::Refused`].
    pub fn learn(&self) {
        let _ = self.tasks.send(Task::Learn);
    }

    /// Looks once whether the arbiter answers; ends in [`Heard::Reachable`].
    pub fn probe(&self) {
        let _ = self.tasks.send(Task::Probe);
    }

    /// Asks for a change; ends in [`Heard::Granted`] or [`Heard::Refused`].
    pub fn ask(&self, from: Generation, change: Change) {
        let _ = self.tasks.send(Task::Ask(from, change));
    }
}

impl Worker {
    fn run(self, todo: &mpsc::Receiver<Task>) {
        while let Ok(task) = todo.recv() {
            let heard = match task {
                Task::Learn => self.learn(),
                Task::Probe => self.probe(),
                Task::Ask(from, change) => self.ask(from, change),
            };
            (self.tell)(heard);
        }
    }

    fn probe(&self) -> Heard {
        let found = self.client.look(self.pair, Instant::now() + TRY);
        ax_failpoint::reached(Point::Found);
        Heard::Reachable(match found {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err("it does not know this VM".into()),
            Err(error) => Err(error.to_string()),
        })
    }

    fn silent(&self, error: &AskError) {
        (self.tell)(Heard::Silent(error.to_string()));
        std::thread::sleep(AGAIN);
    }

    fn learn(&self) -> Heard {
        loop {
            match self.client.look(self.pair, Instant::now() + TRY) {
                Ok(Some(record)) => return Heard::Known(record),
                Ok(None) => {
                    if let Some(heard) = self.register() {
                        return heard;
                    }
                }
                Err(AskError::OtherWitness { .. }) => {
                    if let Some(heard) = self.register() {
                        return heard;
                    }
                }
                Err(error) => self.silent(&error),
            }
        }
    }

    /// Registers what this side knows (rule 27); none while the other side has not done so.
    fn register(&self) -> Option<Heard> {
        let record = load(&self.file).unwrap_or(self.first);
        let registration = Registration {
            pair: self.pair,
            side: self.me.side,
            record,
        };
        match self
            .client
            .register(registration, false, Instant::now() + TRY)
        {
            Ok(Registered::Known(record)) => return Some(Heard::Known(record)),
            Ok(Registered::Waiting) => {
                (self.tell)(Heard::Silent(
                    "the witness does not know this VM yet: it waits for the other host to \
                     register it too"
                        .into(),
                ));
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(Registered::Disagrees { other: known } | Registered::Behind { known }) => {
                let refusal = Refusal {
                    record: Some(known),
                    why: Why::Stale,
                };
                return Some(Heard::Refused(refusal));
            }
            Ok(Registered::Full) => {
                (self.tell)(Heard::Silent("the witness is full".into()));
                std::thread::sleep(AGAIN);
            }
            Err(error) => self.silent(&error),
        }
        None
    }

    fn ask(&self, from: Generation, change: Change) -> Heard {
        let request = Request {
            pair: self.pair,
            caller: self.me,
            from,
            change,
        };
        ax_failpoint::reached(Point::Asking);
        loop {
            match self.client.ask(&request, Instant::now() + TRY) {
                Ok(Decision::Granted(record) | Decision::Already(record)) => {
                    // Without it this host would later register something older: keep trying.
                    match store(&self.file, &record) {
                        Ok(()) => {
                            ax_failpoint::reached(Point::Granted);
                            return Heard::Granted(record);
                        }
                        Err(error) => {
                            let file = self.file.display();
                            (self.tell)(Heard::Silent(format!("write {file}: {error}")));
                            std::thread::sleep(AGAIN);
                        }
                    }
                }
                Ok(Decision::Refused(Refusal {
                    why: Why::UnknownPair,
                    ..
                }))
                | Err(AskError::OtherWitness { .. }) => {
                    // A new store: nothing is granted until both sides have registered.
                    if let Some(Heard::Refused(refusal)) = self.register() {
                        return Heard::Refused(refusal);
                    }
                }
                Ok(Decision::Refused(refusal)) => return Heard::Refused(refusal),
                Err(error) => self.silent(&error),
            }
        }
    }
}
