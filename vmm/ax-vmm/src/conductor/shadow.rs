//! The shadow's side: following a primary.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ax_api::process::What;
use ax_failpoint::Point;
use ax_link::Stream;
use ax_link::heartbeat::boottime_ns;
use ax_wire::Session;
use ax_wire::peer::PeerMessage;
use statepoint::pair::{Event, Phase};
use statepoint::shadow::Inheritance;

use super::{Conductor, Ended, Input, Life, Stint};
use crate::error::Error;
use crate::session::Gathered;
use crate::shadowing::{self, Following, Shadowing};

/// How long a spoiled shadow lives on once it has said why.
const FAREWELL: Duration = Duration::from_millis(100);

impl Conductor {
    pub(super) fn gathered(&mut self, gathered: Gathered) -> Result<(), Error> {
        if let Some(shadowing) = &mut self.shadowing {
            let primary = shadowing.primary;
            if (primary.pair, primary.incarnation)
                != (gathered.session.pair, gathered.session.incarnation)
            {
                tracing::warn!("a session came of another primary");
                return Ok(());
            }
            return shadowing.join(gathered);
        }
        if self.phase() != Some(&Phase::Copying) || gathered.session.pair != self.spec.vm.pair {
            tracing::warn!("a session came that nobody waits for");
            return Ok(());
        }
        self.copied = (0, self.spec.vm.memory);
        let mut shadowing = self.follow(gathered.session, None)?;
        shadowing.join(gathered)?;
        self.shadowing = Some(shadowing);
        self.show();
        Ok(())
    }

    /// The primary lost the connection that the conversation went over.
    pub(super) fn talk_goes_on(&mut self, session: Session, peer: Stream) -> Result<(), Error> {
        match &self.shadowing {
            Some(shadowing) if shadowing.primary.incarnation == session.incarnation => {
                shadowing.converse(peer)
            }
            _ => Ok(()), // closed: this process follows nobody any more
        }
    }

    /// Gets ready to follow the primary with this session.
    pub(super) fn follow(
        &mut self,
        primary: Session,
        from: Option<Inheritance>,
    ) -> Result<Shadowing, Error> {
        let (tell, stint) = (self.sender.clone(), self.next_stint());
        let tell = Arc::new(move |what| {
            let _ = tell.send(Input::Following(stint, what));
        });
        let setting = shadowing::Setting {
            me: self.me.incarnation,
            timing: self.link_timing(),
            spill_dir: self.spec.state_dir.clone(),
            from,
            part: self.part(),
        };
        let shadowing = Shadowing::begin(&self.parts, primary, setting, tell)?;
        self.board.follows(Some(shadowing.engine.clone()));
        self.board.goes_by(shadowing.services());
        Ok(shadowing)
    }

    pub(super) fn following(&mut self, stint: Stint, what: Following) -> Result<(), Error> {
        if stint != self.stint {
            return Ok(()); // a late word of one that is over
        }
        match what {
            Following::Copying(received) => {
                self.copied.0 = received;
                self.show();
                Ok(())
            }
            Following::Confirmed(generation) | Following::Known(generation) => {
                self.step(Event::Confirmed(generation))
            }
            Following::Spoiled(why) => {
                self.spoiled_by_its_disk(&why);
                self.events
                    .note(format!("this shadow's copy is spoiled: {why}"));
                self.events.tell(What::Ended { why, clean: false });
                // The primary hears why before it hears of this process's end.
                std::thread::sleep(FAREWELL);
                self.ended = Some(Ended::Fenced);
                Ok(())
            }
            Following::Link(event) => self.link(event),
            Following::Said(message, reply) => self.said(message, &reply),
        }
    }

    fn said(
        &mut self,
        message: PeerMessage,
        reply: &mpsc::Sender<PeerMessage>,
    ) -> Result<(), Error> {
        let answer = match message {
            PeerMessage::Settle => self.settle(),
            PeerMessage::Known(record) => {
                self.step(Event::Confirmed(record.generation))?;
                PeerMessage::Done
            }
            PeerMessage::HandOver(record) if !self.is_on_record(&record) => PeerMessage::CouldNot,
            PeerMessage::HandOver(record) => {
                ax_failpoint::reached(Point::TakingOver);
                self.begin_turn();
                self.step(Event::HandedOver(record))?;
                ax_failpoint::reached(Point::Running);
                match &self.life {
                    Life::Paired(pair) if pair.may_release().is_some() => {
                        // Before it is said; what is said again says no more than the first time.
                        self.turned_ns.get_or_insert_with(boottime_ns);
                        PeerMessage::Running
                    }
                    _ => {
                        self.turning = None;
                        PeerMessage::CouldNot
                    }
                }
            }
            PeerMessage::Stopped(record) => {
                let _ = reply.send(PeerMessage::Done);
                return self.step(Event::PeerStopped(record));
            }
            PeerMessage::Dismissed(record) => {
                let _ = reply.send(PeerMessage::Done);
                return self.step(Event::Dismissed(record));
            }
            PeerMessage::Show => {
                self.may_show();
                PeerMessage::Done
            }
            PeerMessage::Follow(addresses) => self.take_shadow(&addresses)?,
            PeerMessage::Begin
            | PeerMessage::Running
            | PeerMessage::CouldNot
            | PeerMessage::Done => PeerMessage::CouldNot,
        };
        let _ = reply.send(answer);
        Ok(())
    }

    /// Applies what is committed and makes the disks durable, without promoting anything.
    fn settle(&mut self) -> PeerMessage {
        let Some(shadowing) = &self.shadowing else {
            return PeerMessage::CouldNot;
        };
        match shadowing.replica.settle() {
            Ok(()) => PeerMessage::Done,
            Err(error) => {
                self.events
                    .note(format!("the disks could not be made durable: {error}"));
                PeerMessage::CouldNot
            }
        }
    }
}
