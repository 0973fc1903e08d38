//! Changing how a running guest is protected (rule 22).
//!
//! Every change goes by way of a guest that runs alone: out of protection by the arbiter's grant first,
//! then by a new shadow into the new one, which axd brings. A guest that no arbiter knows becomes one
//! side of a pair before that: registered with the other side, and granted to run alone.

use std::sync::mpsc;
use std::time::Instant;

use ax_api::process::Reply;
use ax_api::vm::Mode;
use ax_wire::record::{Record, Refusal};
use statepoint::pair::{Event, Pair, Phase};

use super::{Conductor, Life};
use crate::asker::Asker;
use crate::error::Error;

/// A change of mode under way.
#[derive(Debug)]
pub(super) struct Change {
    to: Mode,
    step: ChangeStep,
    since: Instant,
    reply: mpsc::Sender<Reply>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChangeStep {
    /// A guest no arbiter knows: what the arbiter's record of the pair is, is being asked.
    Learning,
    /// The arbiter is looked for before the protection is left.
    Probing,
    /// It leaves its protection, or joins a pair: done when it runs alone.
    UntilAlone,
}

impl Change {
    fn answer(&self, reply: Reply) {
        let _ = self.reply.send(reply);
    }
}

impl Conductor {
    /// Begins a change of mode; the reply comes when the guest is ready for the new one.
    pub(super) fn set_mode(&mut self, to: Mode, reply: mpsc::Sender<Reply>) -> Result<(), String> {
        if self.changing.is_some() || !self.probing.is_empty() || self.turning.is_some() {
            return Err("another change of this VM is under way; try again in a moment".into());
        }
        if self.leaving {
            return Err("the VM is being stopped or moved; try again in a moment".into());
        }
        let step = match (&self.life, self.phase()) {
            (Life::Local, _) if to == Mode::None => None,
            (Life::Local, _) => Some(self.learn_of_pair()?),
            (_, Some(Phase::Alone { filling: None, .. })) => None,
            _ if to == self.spec.vm.mode => None,
            (_, Some(Phase::Ft { .. })) => {
                let asker = self.asker.as_ref().ok_or("no arbiter is configured")?;
                asker.probe();
                Some(ChangeStep::Probing)
            }
            (_, Some(Phase::Alone { .. } | Phase::Entering { .. } | Phase::AskingFt { .. })) => {
                Some(ChangeStep::UntilAlone)
            }
            _ => return Err("the VM is between two states; try again in a moment".into()),
        };
        match step {
            None => {
                self.aim_at(to);
                let _ = reply.send(Reply::Done);
            }
            Some(step) => {
                self.changing = Some(Change {
                    to,
                    step,
                    since: Instant::now(),
                    reply,
                });
                if step == ChangeStep::UntilAlone {
                    self.leave_protection(to).map_err(|e| e.to_string())?;
                }
            }
        }
        Ok(())
    }

    fn aim_at(&mut self, mode: Mode) {
        self.spec.vm.mode = mode;
        self.board.aims_at(mode);
        self.show();
    }

    fn leave_protection(&mut self, to: Mode) -> Result<(), Error> {
        self.aim_at(to);
        self.dismissing = true;
        let left = self.step(Event::Leave);
        self.mode_reached();
        left
    }

    /// Asks the arbiter for its record of this pair, on behalf of a guest that runs without one.
    fn learn_of_pair(&mut self) -> Result<ChangeStep, String> {
        if self.spec.peer.is_none() {
            return Err("this host has no peer: a VM here can only have mode none".into());
        }
        match &self.asker {
            Some(asker) => asker.learn(),
            None => {
                let keeper = self.keeper().map_err(|e| e.to_string())?;
                let asker = Asker::start(keeper, self.tell()).map_err(|e| e.to_string())?;
                asker.learn();
                self.asker = Some(asker);
            }
        }
        Ok(ChangeStep::Learning)
    }

    /// The arbiter's record of the pair that this guest, which runs without it, is to be one side of.
    pub(super) fn pair_known(&mut self, record: Record) -> Result<(), Error> {
        let Some(change) = &mut self.changing else {
            return Ok(()); // given up meanwhile
        };
        if change.step != ChangeStep::Learning {
            return Ok(());
        }
        change.step = ChangeStep::UntilAlone;
        let (pair, actions) = Pair::joining(self.me, self.flush(), record.generation);
        self.life = Life::Paired(pair);
        for action in actions {
            self.perform(action)?;
        }
        Ok(())
    }

    /// The guest is one side of a pair: the record is durable beside its images.
    pub(super) fn joined(&mut self, record: &Record) -> Result<(), Error> {
        for image in self.parts.images.iter().filter(|i| !i.read_only()) {
            let mut meta = image.meta().lock();
            meta.set_generation(record.generation)
                .map_err(ax_disk::OpenError::from)?;
        }
        if let Some(change) = &self.changing {
            let to = change.to;
            self.aim_at(to);
        }
        Ok(())
    }

    /// The guest goes on as it did.
    pub(super) fn stay_local(&mut self, refusal: &Refusal) {
        self.life = Life::Local;
        self.give_up_change(&format!("the arbiter refused: {refusal}"));
    }

    /// The arbiter does not answer: a change that has not begun is given up.
    pub(super) fn change_unanswered(&mut self, why: &str) {
        let in_vain = |c: &Change| {
            c.step == ChangeStep::Learning && c.since.elapsed() > super::ARBITER_PATIENCE
        };
        if self.changing.as_ref().is_some_and(in_vain) {
            self.give_up_change(&format!("the arbiter is out of reach: {why}"));
        }
    }

    fn give_up_change(&mut self, why: &str) {
        if let Some(change) = self.changing.take() {
            change.answer(Reply::Refused { why: why.into() });
        }
        self.show();
    }

    /// The arbiter was looked for before the protection is left; true if that was what it was for.
    pub(super) fn found_for_change(
        &mut self,
        found: &Result<Record, String>,
    ) -> Result<bool, Error> {
        let Some(change) = &mut self.changing else {
            return Ok(false);
        };
        if change.step != ChangeStep::Probing {
            return Ok(false);
        }
        let to = change.to;
        change.step = ChangeStep::UntilAlone;
        match (found, self.phase()) {
            (Err(why), _) => self.give_up_change(&format!(
                "the arbiter is out of reach ({why}): nothing was changed; try again when it answers"
            )),
            (Ok(_), Some(Phase::Ft { .. } | Phase::AskingAlone { .. } | Phase::Alone { .. })) => {
                self.leave_protection(to)?;
            }
            (Ok(_), _) => self.give_up_change("the VM is between two states; try again"),
        }
        Ok(true)
    }

    /// Answers a change of mode once the guest runs alone.
    pub(super) fn mode_reached(&mut self) {
        let alone = matches!(self.phase(), Some(Phase::Alone { filling: None, .. }));
        let over = self.ended.is_some() || self.phase() == Some(&Phase::Ended);
        let until_alone = |c: &Change| c.step == ChangeStep::UntilAlone;
        if !self.changing.as_ref().is_some_and(until_alone) || !(alone || over) {
            return;
        }
        self.dismissing = false;
        if let Some(change) = self.changing.take() {
            change.answer(match alone {
                true => Reply::Done,
                false => Reply::Refused {
                    why: "the VM ended on this host before the change was done".into(),
                },
            });
        }
    }
}
