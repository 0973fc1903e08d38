//! Planned failover (rule 25): the guest moves to the other side and this one becomes its shadow.
//!
//! ```text
//!  old primary                                      old shadow
//!  arbiter in reach? else refused, nothing stops
//!  park, final epoch ──────────────────────────────► acknowledge
//!  flush; "settle" ────────────────────────────────► apply, flush; "done"
//!  ask the arbiter for (g+1, ft, B, A)
//!  "hand over" ────────────────────────────────────► restore with dirty pages tracked, open taps, run;
//!                                                    outputs stay held; "running"
//!  vacate the machine, RAM as it is; close taps
//!  "follow": dial me here ─────────────────────────► dial; protected from the final epoch on
//! ```
//!
//! Until the new session stands both sides keep watching each other over the old one's sentinels:
//! whoever loses the other there goes on as from any lost peer, with the arbiter's grant.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_api::process::{Reply, What};
use ax_disk::Condition;
use ax_failpoint::Point;
use ax_link::heartbeat::Sentinel;
use ax_wire::peer::PeerMessage;
use ax_wire::record::Record;
use ax_wire::{EpochId, Session};
use io_barrier::{FtGrant, ShadowOutputs};
use statepoint::pair::{Event, Phase};
use statepoint::primary::Start as EngineStart;
use statepoint::shadow::Inheritance;

use super::{Conductor, Ended, Stint};
use crate::error::Error;
use crate::guest::Part;
use crate::protect::{HandedOver, Protecting};
use crate::session::Talk;
use crate::shadowing::Shadowing;

/// How long the new session may take before the other side counts as lost. Death and silence are
/// noticed sooner, by the old session's sentinels.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of unreleased outputs that the old primary keeps as shadow: all its barrier can hold.
const OUTPUTS: usize = 10 << 20;

/// A planned failover whose new session is not formed yet.
#[derive(Debug)]
pub(super) struct Turning {
    /// None once the other side has been given up.
    by: Option<Instant>,
}

impl Turning {
    fn begun() -> Turning {
        Turning {
            by: Some(Instant::now() + PATIENCE),
        }
    }

    /// True when the session should have been formed by now.
    pub(super) fn is_overdue(&self) -> bool {
        self.by.is_some_and(|by| Instant::now() >= by)
    }
}

/// What a process was before the roles turned, kept for its sentinel until the new session's takes over.
#[derive(Debug)]
pub(super) enum Parting {
    /// It was the primary.
    Protection {
        stint: Stint,
        sentinel: Sentinel,
        /// The connection stays while the other side may still answer on it.
        _talk: Talk,
    },
    /// It was the shadow.
    Shadowing(Box<Shadowing>),
}

impl Conductor {
    /// An operator asks for a planned failover. It begins once the arbiter has been found within
    /// reach: without it the guest would stand still until it is.
    pub(super) fn fail_over(&mut self, reply: mpsc::Sender<Reply>) -> Result<(), String> {
        if !matches!(self.phase(), Some(Phase::Ft { .. })) || self.turning.is_some() {
            return Err("the VM is not protected: there is nobody to take over".into());
        }
        if self.parts.machine.is_parked() {
            return Err("the VM is paused; `axvm resume` it first".into());
        }
        if self.part() == Part::Disks {
            let why = "a VM of mode ha is not moved while it runs: `axvm set-mode` it to ft first, or stop \
                       it and start it on the other host";
            return Err(why.into());
        }
        if self.changing.is_some() {
            return Err("the VM's mode is being changed; try again in a moment".into());
        }
        let Some(asker) = &self.asker else {
            return Err("no arbiter is configured".into());
        };
        asker.probe();
        self.probing.push(reply);
        Ok(())
    }

    /// The arbiter was looked for before a planned failover.
    pub(super) fn arbiter_found(&mut self, found: Result<Record, String>) -> Result<(), Error> {
        if self.found_for_change(&found)? || self.found_for_resigning(&found)? {
            return Ok(());
        }
        let paused = self.parts.machine.is_parked();
        let refused = match (found, self.phase()) {
            (Ok(_), _) if paused => Some("the VM was paused; `axvm resume` it first".to_owned()),
            (Err(why), _) => Some(format!(
                "the arbiter is out of reach ({why}): nothing was stopped; try again when it answers"
            )),
            // An arbiter that was registered with anew has another name.
            (Ok(found), Some(Phase::Ft { record })) if found.agrees_with(record) => None,
            (Ok(_), _) => Some("the VM is not protected any more".into()),
        };
        match refused {
            Some(why) => {
                for waiting in self.probing.drain(..) {
                    let _ = waiting.send(Reply::Refused { why: why.clone() });
                }
                Ok(())
            }
            None => {
                self.waiting.append(&mut self.probing);
                self.step(Event::Failover)
            }
        }
    }

    /// The guest is parked and its last epoch is on both sides: makes the disks durable there.
    pub(super) fn final_epoch(&mut self, epoch: EpochId) -> Result<(), Error> {
        // Of disks that are left because they fail, nothing is expected any more.
        self.not_durable = match self.resigns() {
            true => None,
            false => self.flush_disks().err(),
        };
        if let Some(why) = &self.not_durable {
            self.events.note(why.clone());
        }
        self.last_epoch = epoch;
        match &self.protection {
            Some(protection) => {
                protection.settle();
                Ok(())
            }
            None => self.drained(),
        }
    }

    /// The final epoch is where it is to be; what of it is durable here is known. Disks here that are
    /// not are marked before anybody is asked: from the grant on a record may name this side in sync, and
    /// this process may die at any moment (I4). The mark stays on a guest that goes on here after all,
    /// until it ends with its disks durable or another copy takes their place.
    pub(super) fn drained(&mut self) -> Result<(), Error> {
        if self.resigns() {
            self.mark_as_failed();
            return self.step(Event::FinalDone {
                epoch: self.last_epoch,
                durable: false,
            });
        }
        let marked = match (&self.protection, &self.not_durable) {
            (Some(_), Some(_)) => self.mark_disks(Condition::Inconsistent),
            (None, None) => self.mark_disks(Condition::Consistent),
            _ => Ok(()),
        };
        if let Err(why) = marked {
            // Nobody is asked for anything that a record could say too early: it goes on here.
            self.events.note(why.clone());
            if self.protection.is_some() {
                return self.peer_lost(format!("link-error: {why}"));
            }
        }
        self.step(Event::FinalDone {
            epoch: self.last_epoch,
            durable: self.not_durable.is_none(),
        })
    }

    pub(super) fn flush_disks(&self) -> Result<(), String> {
        self.flush_in_time()?;
        match ax_failpoint::fails(Point::Draining) {
            true => Err("a test has the flush fail".into()),
            false => Ok(()),
        }
    }

    /// Durably says of the images here, as far as it has not been said, whether they may be started from.
    /// A flush that failed once may be said to have worked the next time, with what was written gone: such
    /// an image may not, while there is a better copy.
    fn mark_disks(&self, condition: Condition) -> Result<(), String> {
        for image in self.parts.images.iter().filter(|i| !i.read_only()) {
            let mut meta = image.meta().lock();
            let generation = meta.generation();
            let marked = match condition {
                same if same == meta.condition() => Ok(()),
                Condition::Consistent => meta.mark_consistent(generation),
                Condition::Inconsistent => meta.mark_inconsistent(),
            };
            marked.map_err(|error| format!("{}: {error}", image.path().display()))?;
        }
        Ok(())
    }

    /// The guest runs on the other side, and the disks here are not as the final epoch left them: this
    /// process can't follow.
    fn end_for_its_disks(&mut self, disk: &str) {
        let why = format!(
            "the guest runs on the other host, without protection: the disks of this host could not be made durable: {disk}"
        );
        self.answer(&Reply::Refused { why: why.clone() });
        self.events.tell(What::Ended { why, clean: false });
        self.ended = Some(Ended::Fenced);
    }

    /// The old primary: the other side runs. Everything that made this process the primary ends, and
    /// it follows the other side from the final epoch on.
    ///
    /// # Errors
    /// It can't follow: the process ends, and the other side finds itself without a shadow.
    pub(super) fn become_shadow(&mut self, record: &Record) -> Result<(), Error> {
        ax_failpoint::reached(Point::Following);
        if let Some(disk) = self.not_durable.take() {
            self.end_for_its_disks(&disk);
            return Ok(());
        }
        let lost = |why: &str| Error::Link(format!("after a planned failover: {why}"));
        let holder = record.holder().ok_or_else(|| lost("nobody holds"))?;
        if let Some(protection) = &self.protection {
            protection.let_show();
        }
        self.turned_ns = None;
        let protection = self.protection.take();
        let stint = self.stint;
        let HandedOver {
            committed,
            sentinel,
            talk,
        } = protection
            .and_then(|protection| protection.hand_over(&self.parts))
            .ok_or_else(|| lost("the final epoch is gone"))?;
        let mut outputs = ShadowOutputs::new(OUTPUTS);
        self.parts
            .barrier
            .retire(&mut outputs)
            .map_err(|e| lost(&e.to_string()))?;
        self.parts.machine.vacate()?;
        self.leaving = false;
        self.parts.taps.close();
        self.parts.console.dismiss();
        let primary = Session {
            pair: self.spec.vm.pair,
            generation: record.generation,
            incarnation: holder.incarnation,
        };
        self.last_epoch = committed.epoch;
        let inheritance = Inheritance { committed, outputs };
        self.shadowing = Some(self.follow(primary, Some(inheritance))?);
        self.turning = Some(Turning::begun());
        self.door.open();
        let heard = |answer| {
            if !matches!(answer, Ok(PeerMessage::Done)) {
                tracing::warn!(?answer, "the other side does not take this shadow");
            }
        };
        let addresses = self.board.status().listen;
        talk.say(PeerMessage::Follow(addresses), Box::new(heard));
        self.parting = Some(Parting::Protection {
            stint,
            sentinel,
            _talk: talk,
        });
        Ok(())
    }

    /// The shadow, told to run: from here on a session with the roles turned is due.
    pub(super) fn begin_turn(&mut self) {
        self.turning = Some(Turning::begun());
        self.lost_at = Some(Instant::now());
    }

    /// The new primary: runs, and its outputs wait for a shadow that is not connected yet.
    pub(super) fn release_turned(&mut self, grant: FtGrant) {
        let Some(shadowing) = self.shadowing.take() else {
            return tracing::error!("protected without a shadow or a promotion");
        };
        self.release_promoted(grant.into(), &shadowing);
        self.parting = Some(Parting::Shadowing(Box::new(shadowing)));
    }

    /// The new primary: the old one follows and waits to be dialled.
    pub(super) fn take_shadow(&mut self, addresses: &[SocketAddr]) -> Result<PeerMessage, Error> {
        let (Some(Phase::Ft { record }), Some(Parting::Shadowing(old))) =
            (self.phase(), &self.parting)
        else {
            return Ok(PeerMessage::CouldNot);
        };
        let start = EngineStart::Synced {
            at: self.last_epoch,
        };
        let shadow = old.primary.incarnation;
        ax_failpoint::reached(Point::Dialling);
        match self.dial(addresses, shadow, record.generation, start, None) {
            Ok(()) => Ok(PeerMessage::Done),
            Err(why) => {
                self.peer_lost(format!("link-error: {why}"))?;
                Ok(PeerMessage::CouldNot)
            }
        }
    }

    /// The new session stands: what this process was before ends in peace.
    pub(super) fn turned(&mut self) {
        if self.turning.take().is_none() {
            return;
        }
        match self.parting.take() {
            Some(Parting::Protection { sentinel, .. }) => {
                sentinel.goodbye();
                self.events
                    .note("the guest runs on the other host; this one is its shadow");
                self.answer(&Reply::Done);
            }
            Some(Parting::Shadowing(old)) => old.leave(true),
            None => {}
        }
        self.show();
    }

    /// The other side was lost before the new session stood.
    pub(super) fn lost_while_turning(&mut self) {
        let Some(turning) = &mut self.turning else {
            return;
        };
        turning.by = None;
        if matches!(self.parting, Some(Parting::Protection { .. })) {
            (self.turning, self.parting) = (None, None);
            let why = "the other host took over and was lost at once; this one takes the VM back";
            self.answer(&Reply::Refused { why: why.into() });
        }
    }

    /// The new primary lost the old one before it could follow: the guest runs alone.
    pub(super) fn stop_turning(&mut self) {
        if self.turning.take().is_none() {
            return;
        }
        if let Some(Parting::Shadowing(old)) = self.parting.take() {
            old.leave(false);
        }
        self.parts.log.record(false);
        if let Err(error) = self.parts.machine.lock().track_dirty(false) {
            tracing::warn!(%error, "dirty tracking could not be stopped");
        }
    }

    /// A word of a protection that is over. Its sentinel is what tells of the other side's death until
    /// the new session stands.
    pub(super) fn parting_says(&mut self, stint: Stint, what: Protecting) -> Result<(), Error> {
        match (&self.parting, what) {
            (Some(Parting::Protection { stint: of, .. }), Protecting::Link(event))
                if *of == stint =>
            {
                self.link(event)
            }
            _ => Ok(()),
        }
    }
}
