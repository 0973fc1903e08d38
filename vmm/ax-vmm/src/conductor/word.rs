//! What becomes of this process by the two hosts' own record, where no third party keeps it.

use ax_api::process::Reply;
use ax_wire::record::Record;
use ax_wire::word::Letter;
use statepoint::pair::{Action, Ending, Phase};

use super::Conductor;
use crate::error::Error;

impl Conductor {
    /// The operator says that the other host is dead.
    ///
    /// # Errors
    /// Nothing waits for that.
    pub(super) fn peer_is_dead(&mut self) -> Result<(), String> {
        match &self.desk {
            Some(desk) => {
                desk.told()?;
                self.events
                    .note("operator: the other host is dead; this one goes on");
                Ok(())
            }
            None => {
                Err("a third party decides for this VM; an operator's word is not needed".into())
            }
        }
    }

    /// The other host writes, by way of the daemons.
    pub(super) fn written_to(&self, letter: &Letter) -> Reply {
        match &self.desk {
            Some(desk) => Reply::Word {
                answer: Box::new(desk.answer(letter)),
            },
            None => Reply::Refused {
                why: "a third party decides for this VM on this host".into(),
            },
        }
    }

    /// True when this host may act on a record that its peer tells it.
    pub(super) fn is_on_record(&self, record: &Record) -> bool {
        self.desk.as_ref().is_none_or(|desk| desk.has(record))
    }

    /// The hosts met, and the other one goes on by a record this one did not know.
    pub(super) fn superseded(&mut self, record: Record) -> Result<(), Error> {
        let primary = matches!(
            self.phase(),
            Some(
                Phase::Alone { .. }
                    | Phase::Entering { .. }
                    | Phase::Ft { .. }
                    | Phase::Parking { .. }
            )
        );
        if !primary {
            return Ok(()); // whoever asks is told by the answer
        }
        self.events.note(format!(
            "the other host was told to go on without this one: {record}"
        ));
        self.perform(Action::FreezeOutputs)?;
        self.perform(Action::EndFenced(Ending::Superseded))
    }

    /// Says once what an operator must hear of.
    pub(super) fn alarm(&mut self, why: String) {
        if self.alarmed.as_ref() != Some(&why) {
            self.events.note(format!("ALARM: {why}"));
            self.board.warn(why.clone());
            self.alarmed = Some(why);
        }
    }

    /// Tells the desk what it must know of this process.
    pub(super) fn keep_desk(&self) {
        if let Some(desk) = &self.desk {
            desk.set_fresh(matches!(self.phase(), Some(Phase::Copying)));
        }
    }
}
