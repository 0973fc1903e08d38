//! A third party keeps the record, a witness or an etcd cluster; this process asks it.
//!
//! The record granted is written down before it is acted on: it is what this host registers should the
//! third party lose its store (rule 27).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ax_arbiter::rules::{Registered, Registration};
use ax_arbiter::{AskError, ThirdParty, manual};
use ax_failpoint::Point;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Member, Record, Refusal, Request, Why, WitnessId,
};
use ax_wire::{Generation, PairId};

use super::{AGAIN, Heard, Keeper, TRY, Tell};

/// The witness that the last record acted on names, if any: grants of another count for nothing
/// until both sides have registered with it (rule 27).
pub fn known_witness(state_dir: &Path) -> Option<WitnessId> {
    match load(&state_dir.join(manual::FILE))?.arbiter {
        Arbiter::Witness(id) => Some(id),
        Arbiter::Operator => None,
    }
}

/// A third party, asked for one process of a pair.
pub struct AtThird {
    client: Box<dyn ThirdParty>,
    pair: PairId,
    me: Member,
    /// What both sides register of a pair that no arbiter has ever known.
    first: Record,
    file: PathBuf,
}

/// Reads the last record this host acted on.
fn load(file: &Path) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

fn silent(error: &AskError, tell: &Tell) {
    tell(Heard::Silent(error.to_string()));
    std::thread::sleep(AGAIN);
}

impl AtThird {
    /// `current` says whose disks are current if the pair was never started; both sides must say the
    /// same.
    pub fn new(
        client: Box<dyn ThirdParty>,
        pair: PairId,
        me: Member,
        current: Copies,
        state_dir: &Path,
    ) -> AtThird {
        AtThird {
            client,
            pair,
            me,
            first: Record::defined(current, Arbiter::Operator),
            file: state_dir.join(manual::FILE),
        }
    }

    /// Registers what this side knows (rule 27); none while the other side has not done so.
    fn register(&mut self, tell: &Tell) -> Option<Heard> {
        let record = load(&self.file).unwrap_or(self.first);
        let registration = Registration {
            pair: self.pair,
            side: self.me.side,
            record,
        };
        match self.client.register(&registration, Instant::now() + TRY) {
            Ok(Registered::Known(record)) => return Some(Heard::Known(record)),
            Ok(Registered::Waiting) => {
                tell(Heard::Silent(
                    "the arbiter does not know this VM yet: it waits for the other host to \
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
                tell(Heard::Silent("the arbiter is full".into()));
                std::thread::sleep(AGAIN);
            }
            Err(error) => silent(&error, tell),
        }
        None
    }
}

impl Keeper for AtThird {
    fn probe(&mut self) -> Heard {
        let found = self.client.look(self.pair, Instant::now() + TRY);
        ax_failpoint::reached(Point::Found);
        Heard::Reachable(match found {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err("it does not know this VM".into()),
            Err(error) => Err(error.to_string()),
        })
    }

    fn learn(&mut self, tell: &Tell) -> Heard {
        loop {
            match self.client.look(self.pair, Instant::now() + TRY) {
                Ok(Some(record)) => return Heard::Known(record),
                Ok(None) => {
                    if let Some(heard) = self.register(tell) {
                        return heard;
                    }
                }
                Err(AskError::OtherWitness { .. }) => {
                    if let Some(heard) = self.register(tell) {
                        return heard;
                    }
                }
                Err(error) => silent(&error, tell),
            }
        }
    }

    fn ask(&mut self, from: Generation, change: Change, tell: &Tell) -> Heard {
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
                    match manual::write(&self.file, &record) {
                        Ok(()) => {
                            ax_failpoint::reached(Point::Granted);
                            return Heard::Granted(record);
                        }
                        Err(error) => {
                            let file = self.file.display();
                            tell(Heard::Silent(format!("write {file}: {error}")));
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
                    if let Some(Heard::Refused(refusal)) = self.register(tell) {
                        return Heard::Refused(refusal);
                    }
                }
                Ok(Decision::Refused(refusal)) => return Heard::Refused(refusal),
                Err(error) => silent(&error, tell),
            }
        }
    }
}
