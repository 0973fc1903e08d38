//! What the process shows of itself.

use ax_api::process::{Phase as Shown, Role, Start, What};
use ax_api::vm::Mode;
use ax_wire::Generation;
use statepoint::pair::{Goal, Phase};

use super::{Conductor, Life};

impl Conductor {
    /// Puts the present phase on the board, and tells of a new one.
    pub(super) fn show(&mut self) {
        self.keep_desk();
        self.parts.faults.stand(self.standing());
        let held = |why: &str| Shown::Held {
            waits_for: why.into(),
        };
        let asking = matches!(&self.life, Life::Paired(pair) if pair.is_asking());
        if !asking && self.spec.start == Start::Boot && self.phase().is_some() {
            self.waits_for = None;
        }
        let (role, shown, generation) = match self.phase() {
            None if matches!(self.life, Life::Unborn) => {
                (Role::Primary, Shown::Starting, Generation(0))
            }
            None => (Role::Primary, Shown::Unprotected, Generation(0)),
            Some(phase) => match phase {
                Phase::Starting { from } => (Role::Primary, Shown::Starting, *from),
                Phase::Joining { from } => (Role::Primary, Shown::Unprotected, *from),
                Phase::Alone {
                    record,
                    filling: None,
                } if self.spec.vm.mode == Mode::None => {
                    (Role::Primary, Shown::Unprotected, record.generation)
                }
                Phase::Alone {
                    record,
                    filling: None,
                } => (Role::Primary, Shown::Alone, record.generation),
                Phase::Alone {
                    record,
                    filling: Some(_),
                } => {
                    let (done, total) = self.copied;
                    (
                        Role::Primary,
                        Shown::Syncing { done, total },
                        record.generation,
                    )
                }
                Phase::Entering { record, .. } | Phase::AskingFt { record, .. } => {
                    (Role::Primary, Shown::Entering, record.generation)
                }
                Phase::Ft { record } => (Role::Primary, Shown::Protected, record.generation),
                Phase::AskingAlone { record } => {
                    (Role::Primary, held("the arbiter"), record.generation)
                }
                Phase::Parking {
                    record,
                    goal: Goal::Stop,
                }
                | Phase::AskingStop { record, .. } => {
                    (Role::Primary, Shown::Ending, record.generation)
                }
                Phase::Parking { record, .. }
                | Phase::AskingHandover { record, .. }
                | Phase::HandedOver { record } => {
                    (Role::Primary, Shown::FailingOver, record.generation)
                }
                Phase::Copying if self.shadowing.is_none() => {
                    (Role::Shadow, Shown::Waiting, Generation(0))
                }
                Phase::Copying => {
                    let (done, total) = self.copied;
                    (Role::Shadow, Shown::Syncing { done, total }, Generation(0))
                }
                Phase::InSync { known } => (Role::Shadow, Shown::Protected, *known),
                Phase::Waiting { known } | Phase::AskingTakeover { known } => {
                    (Role::Shadow, Shown::FailingOver, *known)
                }
                Phase::Promoting { record } => {
                    (Role::Shadow, Shown::FailingOver, record.generation)
                }
                Phase::Ended => (self.board.status().role, Shown::Ending, Generation(0)),
            },
        };
        let shown = match &self.waits_for {
            Some(why) if asking || matches!(shown, Shown::Starting) => held(why),
            // Of a paused guest that lacks the protection it should have, the latter is said.
            _ if self.parts.machine.is_parked()
                && matches!(shown, Shown::Unprotected | Shown::Protected)
                && role == Role::Primary =>
            {
                Shown::Paused
            }
            _ => shown,
        };
        if self.board.now(role, shown.clone(), generation) {
            self.events.tell(What::Phase {
                role,
                phase: shown,
                generation,
            });
        }
    }
}
