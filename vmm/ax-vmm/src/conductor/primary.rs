//! The primary's side: finding a shadow, being protected by it, losing it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_api::process::{Reply, What};
use ax_api::vm::Mode;
use ax_link::Connector;
use ax_link::heartbeat::{LinkEvent, LinkEventKind, PathLoss, Timing as LinkTiming};
use ax_wire::hello::Role as HelloRole;
use ax_wire::peer::PeerMessage;
use ax_wire::records::RecordKind;
use ax_wire::{Generation, Incarnation, Session};
use statepoint::pair::{Event, Phase};
use statepoint::primary::{PrimaryConfig, Start as EngineStart};

use super::{Conductor, Input, Stint};
use crate::error::Error;
use crate::guest::Part;
use crate::hello::hello;
use crate::protect::{self, Protecting, Protection};
use crate::session::{self, Dialled};
use crate::shadowing::Shadowing;

/// A session with a shadow, on its way to be formed.
pub(super) struct Dial {
    shadow: Incarnation,
    connector: Connector,
    session: Session,
    start: EngineStart,
    /// Who asked for it, if somebody did.
    reply: Option<mpsc::Sender<Reply>>,
}

impl Dial {
    fn answer(&self, reply: Reply) {
        if let Some(waiting) = &self.reply {
            let _ = waiting.send(reply);
        }
    }
}

impl Conductor {
    /// axd has found a shadow for a guest that runs alone.
    pub(super) fn protect(
        &mut self,
        addresses: Vec<SocketAddr>,
        shadow: Incarnation,
        reply: mpsc::Sender<Reply>,
    ) -> Result<(), String> {
        if self.spec.vm.mode == Mode::None {
            return Err("this VM has mode none: it takes no shadow".into());
        }
        let Some(Phase::Alone {
            record,
            filling: None,
        }) = self.phase()
        else {
            return Err("this VM does not run alone: it can't take a shadow now".into());
        };
        let generation = record.generation;
        // An earlier protection may have closed one more epoch after it was given up.
        let start = EngineStart::FullCopy {
            after: self.last_epoch.max(self.parts.barrier.sealed()),
        };
        self.dial(&addresses, shadow, generation, start, Some(reply))
    }

    /// Forms a session with the shadow at `addresses`, in a thread; ends in [`Self::dialled`].
    pub(super) fn dial(
        &self,
        addresses: &[SocketAddr],
        shadow: Incarnation,
        generation: Generation,
        start: EngineStart,
        reply: Option<mpsc::Sender<Reply>>,
    ) -> Result<(), String> {
        let session = Session {
            pair: self.spec.vm.pair,
            generation,
            incarnation: self.me.incarnation,
        };
        let dial = Dial {
            shadow,
            connector: self
                .parts
                .connector(&self.spec, addresses)
                .map_err(|e| e.to_string())?,
            session,
            start,
            reply,
        };
        if let Some(desk) = &self.desk {
            desk.peer_at(dial.connector.clone());
        }
        let mine = hello(
            &self.spec,
            self.parts.machine.lock().caps(),
            session,
            HelloRole::Primary,
        );
        let tell = self.sender.clone();
        let dialling = move || {
            let dialled = session::dial(&dial.connector, &mine, session).map_err(|e| e.to_string());
            let _ = tell.send(Input::Dialled(Box::new(dialled), Box::new(dial)));
        };
        std::thread::Builder::new()
            .name("dial".into())
            .spawn(dialling)
            .map(drop)
            .map_err(|e| e.to_string())
    }

    /// Tells the shadow that it is not wanted any more.
    pub(super) fn dismiss_shadow(&self) {
        if let (Some(protection), Some(Phase::Alone { record, .. })) =
            (&self.protection, self.phase())
        {
            protection.dismiss(*record);
        }
    }

    /// What of the guest the two sides share, by its mode.
    pub(super) fn part(&self) -> Part {
        match self.spec.vm.mode {
            Mode::Ha => Part::Disks,
            Mode::Ft | Mode::None => Part::Whole,
        }
    }

    pub(super) fn link_timing(&self) -> LinkTiming {
        LinkTiming {
            interval: Duration::from_millis(self.spec.timing.heartbeat_ms),
            detect: Duration::from_millis(self.spec.timing.detect_ms),
            stall: Duration::from_millis(self.spec.timing.stall_ms),
        }
    }

    /// True while this process is in the state for which `dial` was begun.
    fn still_wants(&self, dial: &Dial) -> bool {
        match (self.phase(), dial.start) {
            (
                Some(Phase::Alone {
                    record,
                    filling: None,
                }),
                EngineStart::FullCopy { .. },
            )
            | (Some(Phase::Ft { record }), EngineStart::Synced { .. }) => {
                record.generation == dial.session.generation && self.protection.is_none()
            }
            _ => false,
        }
    }

    pub(super) fn dialled(
        &mut self,
        dialled: Result<Dialled, String>,
        dial: Dial,
    ) -> Result<(), Error> {
        let checked = dialled.and_then(|dialled| {
            let vm = dialled.theirs.body.vm.as_ref();
            if vm.map(|vm| vm.session.incarnation) == Some(dial.shadow) {
                Ok(dialled)
            } else {
                Err("another run of the shadow's process answers there".into())
            }
        });
        if !self.still_wants(&dial) {
            dial.answer(Reply::Refused {
                why: "the VM left the state in which it can take a shadow".into(),
            });
            return Ok(());
        }
        let turning = matches!(dial.start, EngineStart::Synced { .. });
        let begun = match checked {
            Ok(dialled) => {
                if !turning {
                    // The state machine knows of the shadow before its engine can say anything.
                    self.copied = (0, self.spec.vm.memory);
                    self.step(Event::CopyBegun(dial.shadow))?;
                }
                self.begin_protection(dialled, &dial)
                    .map_err(|e| e.to_string())
            }
            Err(why) if turning => Err(why),
            Err(why) => {
                dial.answer(Reply::Refused { why });
                return Ok(());
            }
        };
        match begun {
            Ok(protection) => {
                self.board.goes_by(protection.services());
                self.protection = Some(protection);
                self.turned();
                dial.answer(Reply::Done);
                Ok(())
            }
            Err(why) if turning => {
                self.peer_lost(format!("link-error: no session after the failover: {why}"))
            }
            Err(why) => {
                dial.answer(Reply::Refused { why });
                self.step(Event::PeerLost)
            }
        }
    }

    fn begin_protection(&mut self, dialled: Dialled, dial: &Dial) -> Result<Protection, Error> {
        let mut config = PrimaryConfig::new(dial.session, dial.shadow, dial.start);
        let part = self.part();
        match part {
            Part::Whole => {
                self.understands_headers(&dialled)?;
                config.verify_every = self.spec.vm.verify_every.unwrap_or(0).into();
            }
            Part::Disks => {
                let lease = Duration::from_millis(self.spec.timing.lease_ms);
                config.lease_ns = Some(lease.as_nanos() as u64);
            }
        }
        config.state_bytes = config
            .state_bytes
            .max(self.parts.machine.lock().state_capacity());
        let setting = protect::Setting {
            session: dial.session,
            config,
            timing: self.link_timing(),
            nics: self.spec.vm.nics.len(),
            part,
        };
        let (tell, stint) = (self.sender.clone(), self.next_stint());
        let tell = Arc::new(move |what| {
            let _ = tell.send(Input::Protecting(stint, what));
        });
        Protection::begin(&self.parts, dial.connector.clone(), dialled, setting, tell)
    }

    /// Whether the shadow's build knows the headers that the guest's frames may come behind.
    fn understands_headers(&self, dialled: &Dialled) -> Result<(), Error> {
        if !self.spec.vm.nics.iter().any(|nic| nic.offload) {
            return Ok(());
        }
        let known = dialled.peer.version().has(&RecordKind::FrameWithHeader);
        known.map_err(|lacks| Error::Link(lacks.to_string()))
    }

    pub(super) fn protecting(&mut self, stint: Stint, what: Protecting) -> Result<(), Error> {
        if stint != self.stint || self.protection.is_none() {
            return self.parting_says(stint, what);
        }
        match what {
            Protecting::Copying(done, total) => {
                self.copied = (done, total);
                self.show();
                Ok(())
            }
            Protecting::CopyDone => self.step(Event::CopyDone),
            Protecting::Confirmed => {
                let generation = match self.phase() {
                    Some(Phase::Entering { record, .. }) => record.generation,
                    _ => Generation(0),
                };
                self.step(Event::Confirmed(generation))
            }
            Protecting::Final(epoch) => self.final_epoch(epoch),
            Protecting::Settled(Ok(PeerMessage::Done)) => self.drained(),
            Protecting::Settled(answer) => {
                tracing::warn!(?answer, "the shadow could not make its disks durable");
                self.peer_lost("link-error: the shadow could not make its disks durable".into())
            }
            Protecting::HandedOver(Ok(PeerMessage::Running)) => self.step(Event::Running),
            Protecting::HandedOver(answer) => {
                tracing::warn!(?answer, "the other side could not run");
                self.step(Event::PromotionFailed)
            }
            Protecting::Lost(why) => self.peer_lost(format!("link-error: {why}")),
            Protecting::Link(event) => self.link(event),
        }
    }

    /// Tells of a path that was lost or is back.
    fn tell_of_path(&self, event: &LinkEvent) {
        let of_protection = self.protection.as_ref().map(Protection::service);
        let of_shadowing = self.shadowing.as_ref().map(Shadowing::service);
        let service = of_protection.or(of_shadowing).unwrap_or_default();
        let at = |path: usize| service.get(path).map(|path| path.address);
        let what = match event.kind {
            LinkEventKind::PathLost { path, how } => at(path).map(|at| What::PathLost {
                address: at,
                how: match how {
                    PathLoss::Silent => "silence",
                    PathLoss::OneWay => "one-way",
                    PathLoss::Broken => "link-error",
                }
                .into(),
            }),
            LinkEventKind::PathBack { path } => at(path).map(|at| What::PathBack { address: at }),
            _ => None,
        };
        if let Some(what) = what {
            self.events.tell(what);
        }
    }

    pub(super) fn link(&mut self, event: LinkEvent) -> Result<(), Error> {
        self.tell_of_path(&event);
        match loss(&event) {
            // Each side says goodbye to what it was, once the new session stands.
            Some("goodbye") if self.turning.is_some() => Ok(()),
            Some(how) => {
                self.peer_died = event.kind == LinkEventKind::DeathNotice;
                let lost = self.peer_lost(how.into());
                self.peer_died = false;
                lost
            }
            None => Ok(()),
        }
    }

    pub(super) fn peer_lost(&mut self, how: String) -> Result<(), Error> {
        if self.ended.is_some() || self.phase() == Some(&Phase::Ended) {
            return Ok(());
        }
        if self.lost_at.is_none() {
            self.lost_at = Some(Instant::now());
            self.events.tell(What::PeerLost { how });
        }
        self.lost_while_turning();
        if let Some(protection) = &self.protection {
            self.last_epoch = protection.engine.progress().captured;
        }
        self.step(Event::PeerLost)?;
        if self.protection.is_none() && self.shadowing.is_none() {
            self.lost_at = None;
        }
        Ok(())
    }
}

/// How an event says that the peer is lost, if it does.
fn loss(event: &LinkEvent) -> Option<&'static str> {
    match event.kind {
        LinkEventKind::DeathNotice => Some("death-notice"),
        LinkEventKind::Silence { .. } => Some("silence"),
        LinkEventKind::Stall { .. } => Some("stall"),
        LinkEventKind::Goodbye => Some("goodbye"),
        LinkEventKind::Failed { .. } => Some("link-error"),
        LinkEventKind::Up { .. }
        | LinkEventKind::Missed { .. }
        | LinkEventKind::Heard { .. }
        | LinkEventKind::Broken { .. }
        | LinkEventKind::PathLost { .. }
        | LinkEventKind::PathBack { .. } => None,
    }
}
