//! Asks the arbiter, in a thread of its own, until it answers.
//!
//! Asking is a point of no return (rule 21): a question is repeated, the same each time, until
//! there is an answer; it is never withdrawn. The record granted is durable here before anyone
//! acts on it. Who answers is a [`Keeper`]'s business: a third party ([`third`]), or the two hosts and
//! their operator ([`manual`]).

mod course;
mod mail;
pub mod manual;
pub mod third;

pub use course::Course;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ax_api::process::Arbiter;
use ax_wire::Generation;
use ax_wire::record::{Change, Copies, Record, Refusal, State};

use crate::error::Error;

/// How long one try may take before the conductor is told that nobody answers.
const TRY: Duration = Duration::from_millis(1500);

/// Between two tries after a failure.
const AGAIN: Duration = Duration::from_millis(200);

/// How often a keeper that is asked nothing may look after itself.
const IDLE: Duration = Duration::from_secs(1);

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
    /// Nothing was asked, and this record took the guest away from this process.
    Superseded(Record),
    /// Nothing was asked; an operator must hear of this.
    Alarm(String),
    /// Nothing was asked; worth a line.
    Note(String),
    /// Who decides, and who is to, in words.
    Decides(String),
}

/// Reports to the conductor.
pub type Tell = Arc<dyn Fn(Heard) + Send + Sync>;

/// Keeps the record, or knows who does.
pub trait Keeper: Send {
    /// Learns the record; ends in [`Heard::Known`] or [`Heard::Refused`].
    fn learn(&mut self, tell: &Tell) -> Heard;
    /// Looks once whether a change could be granted now; ends in [`Heard::Reachable`].
    fn probe(&mut self) -> Heard;
    /// Asks for a change; ends in [`Heard::Granted`] or [`Heard::Refused`].
    fn ask(&mut self, from: Generation, change: Change, tell: &Tell) -> Heard;
    /// Nothing has been asked for [`IDLE`].
    fn idle(&mut self, _tell: &Tell) {}
    /// The configuration names this arbiter, and one that stands by, from now on.
    ///
    /// # Errors
    /// Why this process can't take that in.
    fn aim(
        &mut self,
        configured: Arbiter,
        standby: Option<Arbiter>,
        tell: &Tell,
    ) -> Result<(), String>;
}

/// An operator who accepts the loss of the only current copy starts what is left: that, and no more.
fn accepting_loss(accepts: bool, record: &Record, change: Change) -> Change {
    let lost = matches!(
        record.state,
        State::Stopped {
            current: Copies::Lost,
            ..
        }
    );
    match change {
        Change::Start if accepts && lost => Change::StartByOperator,
        change => change,
    }
}

enum Task {
    Learn,
    Probe,
    Ask(Generation, Change),
    Aim(Arbiter, Option<Arbiter>),
}

/// The handle to the asking thread.
#[derive(Debug, Clone)]
pub struct Asker {
    tasks: mpsc::Sender<Task>,
}

impl Asker {
    /// Starts the thread. `tell` is called from it.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(mut keeper: Box<dyn Keeper>, tell: Tell) -> Result<Asker, Error> {
        let (tasks, todo) = mpsc::channel();
        let run = move || {
            loop {
                let heard = match todo.recv_timeout(IDLE) {
                    Ok(Task::Learn) => keeper.learn(&tell),
                    Ok(Task::Probe) => {
                        let heard = keeper.probe();
                        let is_lost = matches!(heard, Heard::Reachable(Err(_)));
                        tell(heard);
                        if is_lost {
                            // Who looks for it again and again must not keep it from being registered with.
                            keeper.idle(&tell);
                        }
                        continue;
                    }
                    Ok(Task::Ask(from, change)) => keeper.ask(from, change, &tell),
                    Ok(Task::Aim(configured, standby)) => {
                        if let Err(why) = keeper.aim(configured, standby, &tell) {
                            tell(Heard::Note(format!("the arbiter configured now: {why}")));
                        }
                        continue;
                    }
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        keeper.idle(&tell);
                        continue;
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                };
                tell(heard);
            }
        };
        std::thread::Builder::new()
            .name("asker".into())
            .spawn(run)
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

    /// The configuration names this arbiter, and one that stands by, from now on.
    pub fn aim(&self, configured: Arbiter, standby: Option<Arbiter>) {
        let _ = self.tasks.send(Task::Aim(configured, standby));
    }

    /// Asks for a change; ends in [`Heard::Granted`] or [`Heard::Refused`].
    pub fn ask(&self, from: Generation, change: Change) {
        let _ = self.tasks.send(Task::Ask(from, change));
    }
}
