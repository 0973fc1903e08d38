//! A third party keeps the record, a witness or an etcd cluster; this process asks it.
//!
//! The record granted is written down before it is acted on: it is what this host registers should the
//! third party lose its store (rule 27). Where another one is to decide, its steps are taken here
//! ([`change`]), between questions and while one stands: the asking thread does one thing at a time, so
//! nobody who has asked the old one can hear its answer once that is void.

mod changing;

use std::time::{Duration, Instant};

use ax_api::process::Arbiter as Place;
use ax_arbiter::rules::{self, Registered, Registration};
use ax_arbiter::{AskError, ThirdParty};
use ax_failpoint::Point;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Member, Record, Refusal, Request, Why, WitnessId,
};
use ax_wire::{Generation, MachineId, PairId};

use super::course::Course;
use super::{AGAIN, Heard, Keeper, TRY, Tell};
use crate::error::Error;

/// How long a third party may take to answer while nothing is asked: a question would wait behind it.
const GLANCE: Duration = Duration::from_millis(200);
/// How long the arbiter must have been silent before the pair goes to another one without it.
const LOST: Duration = Duration::from_secs(5);
/// Most steps of a change in one round.
const STEPS: usize = 16;

/// Makes a client of a third party. `expected` is the store that the pair's record names, if one does.
pub type Connect =
    Box<dyn Fn(&Place, Option<WitnessId>) -> Result<Box<dyn ThirdParty>, Error> + Send>;

/// A third party, asked for one process of a pair.
pub struct AtThird {
    client: Box<dyn ThirdParty>,
    /// The one that is to decide, or stands by.
    next: Option<(Place, Box<dyn ThirdParty>)>,
    connect: Connect,
    course: Course,
    pair: PairId,
    me: Member,
    /// Where it runs.
    machine: Option<MachineId>,
    /// An operator starts the VM from an older copy, the current one being lost.
    accept_loss: bool,
    /// What both sides register of a pair that no arbiter has ever known.
    first: Record,
    /// Since when the present one does not answer.
    silent_since: Option<Instant>,
    /// Generation before and after a change of arbiter that changed nothing else.
    shift: Option<(Generation, Generation)>,
    /// The arbiter was changed in this process's life.
    changed: bool,
}

fn silent(error: &AskError, tell: &Tell) {
    tell(Heard::Silent(error.to_string()));
    std::thread::sleep(AGAIN);
}

fn witness_of(record: Option<Record>) -> Option<WitnessId> {
    match record?.arbiter {
        Arbiter::Witness(id) => Some(id),
        Arbiter::Operator => None,
    }
}

impl AtThird {
    /// `current` says whose disks are current if the pair was never started; both sides must say the
    /// same.
    ///
    /// # Errors
    /// The third party's name can't be used.
    pub fn new(
        connect: Connect,
        course: Course,
        pair: PairId,
        me: Member,
        current: Copies,
    ) -> Result<AtThird, Error> {
        let mut this = AtThird {
            client: connect(course.now(), witness_of(course.record()))?,
            next: None,
            connect,
            course,
            pair,
            me,
            machine: None,
            accept_loss: false,
            first: Record::defined(current, Arbiter::Operator),
            silent_since: None,
            shift: None,
            changed: false,
        };
        this.look_ahead()?;
        Ok(this)
    }

    /// On this machine. With `accept_loss` an operator has read that the current copy is lost.
    #[must_use]
    pub fn on(mut self, machine: Option<MachineId>, accept_loss: bool) -> AtThird {
        (self.machine, self.accept_loss) = (machine, accept_loss);
        self
    }

    fn mine(&self) -> Record {
        self.course.record().unwrap_or(self.first)
    }

    fn registration(&self) -> Registration {
        Registration {
            pair: self.pair,
            side: self.me.side,
            machine: self.machine,
            record: self.mine(),
        }
    }

    /// Counts how long the present one has been silent.
    fn answered(&mut self, answered: bool) {
        match answered {
            true => self.silent_since = None,
            false => {
                self.silent_since.get_or_insert_with(Instant::now);
            }
        }
    }

    fn is_lost(&self) -> bool {
        self.silent_since
            .is_some_and(|since| since.elapsed() > LOST)
    }

    fn name(&self, tell: &Tell) {
        tell(Heard::Decides(self.course.to_string()));
    }

    fn request(&self, from: Generation, change: Change) -> Request {
        Request {
            pair: self.pair,
            caller: self.me,
            machine: self.machine,
            from,
            change,
        }
    }

    /// Registers what this side knows (rule 27), once; an answer if there is one.
    fn register(&mut self, wait: Duration) -> Result<Option<Result<Record, Refusal>>, String> {
        let mine = self.mine();
        let registration = self.registration();
        let said = self.client.register(&registration, Instant::now() + wait);
        let refusal = |known| Refusal {
            record: Some(known),
            why: Why::Stale,
        };
        match said.map_err(|e| e.to_string())? {
            Registered::Known(record) => {
                self.course.learned(record).map_err(|e| e.to_string())?;
                Ok(Some(Ok(record)))
            }
            Registered::Waiting | Registered::Agreed { .. } => Err(
                "the arbiter does not know this VM yet: it waits for the other host to register it too"
                    .into(),
            ),
            // The other side lives and knows more: this one learns from it, and registers that.
            Registered::Disagrees { other } if other.generation > mine.generation => {
                self.course.learned(other).map_err(|e| e.to_string())?;
                Ok(None)
            }
            Registered::Disagrees { other } if other.generation < mine.generation => {
                Err("the arbiter does not know this VM yet: the other host registers an older \
                     record and has to learn of the present one"
                    .into())
            }
            Registered::Disagrees { other: known } | Registered::Behind { known } => {
                Ok(Some(Err(refusal(known))))
            }
            Registered::Replaced { known } => Ok(Some(Err(Refusal {
                record: Some(known),
                why: Why::Replaced,
            }))),
            Registered::Full => Err("the arbiter is full".into()),
        }
    }

    /// Registers and tells why nothing is known yet.
    fn register_aloud(&mut self, tell: &Tell) -> Option<Result<Record, Refusal>> {
        match self.register(TRY) {
            Ok(said) => said,
            Err(why) => {
                tell(Heard::Silent(why));
                std::thread::sleep(Duration::from_millis(50));
                None
            }
        }
    }

    /// True when the arbiter that gave this record is the one the record names.
    fn is_its_own(&mut self, record: &Record) -> bool {
        let id = self.client.identify(Instant::now() + TRY);
        id.is_ok_and(|id| record.arbiter == Arbiter::Witness(id))
    }
}

impl Keeper for AtThird {
    fn probe(&mut self) -> Heard {
        if self.course.is_void() {
            return Heard::Reachable(Err("its arbiter is being changed".into()));
        }
        let found = self.client.look(self.pair, Instant::now() + TRY);
        ax_failpoint::reached(Point::Found);
        Heard::Reachable(match found {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err("it does not know this VM".into()),
            Err(error) => Err(error.to_string()),
        })
    }

    fn learn(&mut self, tell: &Tell) -> Heard {
        self.name(tell);
        loop {
            if self.course.is_void() {
                if let Some(record) = self.wait_for_next(tell) {
                    return Heard::Known(record);
                }
                continue;
            }
            match self.client.look(self.pair, Instant::now() + TRY) {
                Ok(Some(record)) if !self.is_its_own(&record) => {
                    self.answered(true);
                    if let Some(record) = self.moved_away(&record, tell) {
                        return Heard::Known(record);
                    }
                }
                Ok(Some(record)) => {
                    self.answered(true);
                    if record.generation < self.mine().generation {
                        tell(Heard::Silent(Why::StoreBehind.to_string()));
                        std::thread::sleep(AGAIN);
                        continue;
                    }
                    match self.course.learned(record) {
                        Ok(()) => return Heard::Known(record),
                        Err(error) => {
                            tell(Heard::Silent(error.to_string()));
                            std::thread::sleep(AGAIN);
                        }
                    }
                }
                Ok(None) | Err(AskError::OtherWitness { .. }) => {
                    self.answered(true);
                    match self.register_aloud(tell) {
                        Some(Ok(record)) => return Heard::Known(record),
                        Some(Err(refusal)) => return Heard::Refused(refusal),
                        None => {}
                    }
                    if let Some(record) = self.round(true, tell) {
                        return Heard::Known(record);
                    }
                }
                Err(error) => {
                    self.answered(false);
                    silent(&error, tell);
                    if let Some(record) = self.round(true, tell) {
                        return Heard::Known(record);
                    }
                }
            }
        }
    }

    fn ask(&mut self, from: Generation, change: Change, tell: &Tell) -> Heard {
        let change = super::accepting_loss(self.accept_loss, &self.mine(), change);
        let question = self.request(from, change);
        ax_failpoint::reached(Point::Asking);
        loop {
            if self.course.is_void() {
                self.wait_for_next(tell);
                continue;
            }
            let request = self.translated(&question);
            match self.client.ask(&request, Instant::now() + TRY) {
                Ok(Decision::Granted(record) | Decision::Already(record)) => {
                    self.answered(true);
                    // Without it this host would later register something older: keep trying.
                    match self.course.granted(&record) {
                        Ok(()) => {
                            ax_failpoint::reached(Point::Granted);
                            return Heard::Granted(record);
                        }
                        Err(error) => {
                            tell(Heard::Silent(format!("the record of the grant: {error}")));
                            std::thread::sleep(AGAIN);
                        }
                    }
                }
                Ok(Decision::Refused(Refusal {
                    why: Why::OtherArbiter,
                    record: Some(record),
                })) => {
                    self.answered(true);
                    self.moved_away(&record, tell);
                }
                Ok(Decision::Refused(Refusal {
                    why: Why::UnknownPair,
                    ..
                }))
                | Err(AskError::OtherWitness { .. }) => {
                    self.answered(true);
                    // A new store: nothing is granted until both sides have registered.
                    if let Some(Err(refusal)) = self.register_aloud(tell) {
                        return Heard::Refused(refusal);
                    }
                    self.round(true, tell);
                }
                Ok(Decision::Refused(refusal)) => {
                    self.answered(true);
                    // Granted by the arbiter before, unheard, and brought to this one since.
                    let made = |r: &Record| self.changed && rules::was_made_by(r, &question);
                    match refusal.record.filter(made) {
                        Some(record) if self.course.granted(&record).is_ok() => {
                            return Heard::Granted(record);
                        }
                        _ => return Heard::Refused(refusal),
                    }
                }
                Err(error) => {
                    self.answered(false);
                    silent(&error, tell);
                    self.round(true, tell);
                }
            }
        }
    }

    /// A store that was wiped is told again what this side knows; a change of arbiter goes on.
    fn idle(&mut self, tell: &Tell) {
        self.round(false, tell);
        if self.course.is_void() || !self.client.is_near() {
            self.answered(false);
            return;
        }
        match self.client.look(self.pair, Instant::now() + GLANCE) {
            Ok(Some(record)) => {
                self.answered(true);
                let mine = self.mine();
                // The machine on the other side may have become another one, and nothing else.
                let named_anew = record.agrees_with(&mine) && record.machines != mine.machines;
                if (record.generation > mine.generation || named_anew)
                    && let Err(error) = self.course.learned(record)
                {
                    tracing::warn!(%error, "the record of the pair");
                }
            }
            Ok(None) | Err(AskError::OtherWitness { .. }) => {
                self.answered(true);
                match self.register(GLANCE) {
                    Ok(Some(Ok(record))) => {
                        tell(Heard::Note(format!(
                            "registered with the arbiter anew: {record}"
                        )));
                    }
                    Ok(_) => {}
                    Err(why) => tell(Heard::Note(why)),
                }
            }
            Err(_) => self.answered(false),
        }
    }

    fn aim(
        &mut self,
        configured: Place,
        standby: Option<Place>,
        tell: &Tell,
    ) -> Result<(), String> {
        let aimed = self.course.aim(configured, standby);
        aimed.map_err(|e| e.to_string())?;
        self.look_ahead().map_err(|e| e.to_string())?;
        self.name(tell);
        Ok(())
    }
}

#[cfg(test)]
#[path = "third_tests.rs"]
mod tests;
