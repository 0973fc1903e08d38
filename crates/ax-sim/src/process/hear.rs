//! What reaches a process becomes an event of its state machine.

use std::time::Duration;

use ax_wire::record::{Change, Record, Refusal};
use ax_wire::{EpochId, Generation, Session};
use io_barrier::Clock;
use statepoint::link::ShadowLink;
use statepoint::pair::{Event, Pair, Phase};
use statepoint::primary::Start;

use crate::following::{Following, Shadowing};
use crate::protecting::{Protecting, Protection};
use crate::universe::{PAIR, Running, place};

use super::{Input, LEASE, MARGIN, Order, PERMISSION, Process, Running2, TURN, Word};

impl Process {
    pub(super) fn take(&mut self, input: Input) {
        match input {
            Input::Heard(change, answer) => self.hear(change, answer),
            Input::Protecting(stint, what) if stint == self.stint => self.protecting(what),
            Input::Following(stint, what) if stint == self.stint => match what {
                Following::Known(generation) => self.step(Event::Confirmed(generation)),
                Following::Spoiled(why) => {
                    self.say(&format!("is spoiled: {why}"));
                    self.ended = true;
                }
            },
            Input::Protecting(..) | Input::Following(..) => {}
            Input::ShadowAt(shadow) => {
                if let Some(Phase::Alone {
                    record,
                    filling: None,
                }) = self.phase()
                    && self.protection.is_none()
                {
                    let after = self.last_epoch.max(self.parts.barrier.sealed());
                    let generation = record.generation;
                    self.dial(shadow, generation, Start::FullCopy { after });
                }
            }
            Input::Session {
                session,
                primary,
                links,
            } => self.session(session, primary, links),
            Input::Rejoin(of, links) => match &self.shadowing {
                Some(shadowing) if shadowing.primary.me == of => shadowing.join(links),
                _ => (links.close)(),
            },
            Input::Beat(who, at, pending) => {
                let now = self.here.now();
                if let Some(watch) = self.watch.as_mut().filter(|w| w.who.me.incarnation == who) {
                    watch.heard = now;
                    if watch.theirs != at {
                        (watch.theirs, watch.moved) = (at, now);
                    }
                    watch.pending = pending;
                }
            }
            Input::Died(who) => {
                if self.watches(who) {
                    self.peer_died = true;
                    self.peer_lost("its death");
                    self.peer_died = false;
                }
            }
            Input::Said(who, word) => self.said(who.0, word),
            Input::DiskFails(flush) => self.disk_fails(flush),
            Input::Order(Order::Failover) => {
                let settled = self.turning.is_none() && self.protection.is_some();
                let settled = settled && !self.parts.universe.setting.ha;
                if settled && matches!(self.phase(), Some(Phase::Ft { .. })) {
                    self.step(Event::Failover);
                }
            }
            Input::Order(Order::Stop) => {
                if self.turning.is_none() {
                    self.step(Event::Stop);
                }
            }
        }
    }

    /// How long after its last acknowledgement the other side may still show outputs.
    pub(super) fn permission(&self) -> u64 {
        match self.parts.universe.setting.ha {
            true => LEASE + LEASE / 50 + MARGIN,
            false => PERMISSION + MARGIN,
        }
    }

    /// How much of it to wait for, as the product does.
    pub(super) fn permission_left(&self) -> u64 {
        let permitted = self.shadowing.as_ref().map(|s| s.engine.permitted_ns());
        let since = match permitted {
            Some(at) if self.peer_died && at > 0 => self.parts.clock.now_ns().saturating_sub(at),
            _ => 0,
        };
        self.permission().saturating_sub(since)
    }

    /// Rule 19: the guest goes on from the other copy. Without one a request is tried again, but for a FLUSH: what
    /// it was to make durable may be gone, so the guest is told, and crashes.
    pub(super) fn disk_fails(&mut self, flush: bool) {
        let settled = self.turning.is_none() && self.protection.is_some();
        match self.phase() {
            Some(Phase::Ft { .. }) if settled => self.step(Event::Resign),
            Some(Phase::Alone { .. }) if flush => {
                self.say("its guest was told of a FLUSH that failed, and crashed");
                self.ended = true;
            }
            _ => {}
        }
    }

    pub(super) fn hear(&mut self, change: Option<Change>, answer: Result<Record, Refusal>) {
        match (change, answer) {
            (None, Ok(record)) => {
                let me = self.parts.mine.me;
                let other = record.holder().is_some_and(|m| m.side != me.side);
                if other && record.shadow().is_some() {
                    // Its permission of some moment ago is over first (rules 24, 28).
                    self.here.sleep(Duration::from_nanos(self.permission()));
                }
                let flush = self.parts.universe.flush();
                let (pair, actions) = Pair::starting(me, flush, record.generation);
                self.pair = Some(pair);
                for action in actions {
                    self.perform(action);
                }
            }
            (None, Err(_)) => self.ended = true,
            (Some(_), Ok(record)) => self.step(Event::Granted(record)),
            (Some(_), Err(refusal)) => self.step(Event::Refused(refusal)),
        }
    }

    pub(super) fn protecting(&mut self, what: Protecting) {
        if self.protection.is_none() {
            return;
        }
        match what {
            Protecting::CopyDone => self.step(Event::CopyDone),
            Protecting::Confirmed => {
                let generation = match self.phase() {
                    Some(Phase::Entering { record, .. }) => record.generation,
                    _ => Generation(0),
                };
                self.step(Event::Confirmed(generation));
            }
            Protecting::Final(epoch) => self.final_epoch(epoch),
            Protecting::Lost(why) => self.peer_lost(&why),
        }
    }

    pub(super) fn final_epoch(&mut self, epoch: EpochId) {
        self.durable = self.parts.image.flush().is_ok();
        self.last_epoch = epoch;
        match &self.protection {
            Some(protection) => self.tell(&protection.shadow, Word::Settle),
            None => self.step(Event::FinalDone {
                epoch,
                durable: self.durable,
            }),
        }
    }

    pub(super) fn tell(&self, to: &Running, word: Word) {
        let at = place(self.parts.mine.me.side as usize);
        let mine = Running2(self.parts.mine.clone());
        to.inbox.send(at, Input::Said(mine, word));
    }

    pub(super) fn said(&mut self, who: Running, word: Word) {
        if !self.watches(who.me.incarnation) {
            return;
        }
        match word {
            Word::Settle => {
                let done = self.shadowing.as_ref().map(|s| s.replica.settle().is_ok());
                self.tell(&who, Word::Settled(done == Some(true)));
            }
            Word::Settled(true) => self.step(Event::FinalDone {
                epoch: self.last_epoch,
                durable: self.durable,
            }),
            Word::Settled(false) => self.peer_lost("it could not settle"),
            Word::HandOver(record) => {
                self.turning = Some(self.here.now() + TURN);
                self.step(Event::HandedOver(record));
                let runs = self.pair.as_ref().and_then(Pair::may_release).is_some();
                let answer = match runs {
                    true => {
                        self.turned = Some(self.parts.clock.now_ns());
                        Word::Running
                    }
                    false => {
                        self.turning = None;
                        Word::CouldNot
                    }
                };
                self.tell(&who, answer);
            }
            Word::Running => self.step(Event::Running),
            Word::CouldNot => self.step(Event::PromotionFailed),
            Word::Show => {
                if let (Some(stamp), Some(Phase::Ft { .. })) = (self.turned, self.phase()) {
                    let _ = self.parts.barrier.release(self.last_epoch, stamp);
                }
            }
            Word::Follow(shadow) => {
                if let (Some(Phase::Ft { record }), true) = (self.phase(), self.turning.is_some()) {
                    let (at, generation) = (self.last_epoch, record.generation);
                    if !self.dial(shadow.0, generation, Start::Synced { at }) {
                        return self.peer_lost("it could not be dialled");
                    }
                    (self.turning, self.parting) = (None, None);
                }
            }
            Word::Stopped(record) => self.step(Event::PeerStopped(record)),
        }
    }

    pub(super) fn dial(&mut self, shadow: Running, generation: Generation, start: Start) -> bool {
        self.stint += 1;
        let session = Session {
            pair: PAIR,
            generation,
            incarnation: self.parts.mine.me.incarnation,
        };
        let incarnation = shadow.me.incarnation;
        let begun = Protection::begin(&self.parts, shadow.clone(), session, start, self.stint);
        let Some(protection) = begun else {
            return false;
        };
        self.protection = Some(protection);
        self.watch(Some(shadow));
        if matches!(start, Start::FullCopy { .. }) {
            self.step(Event::CopyBegun(incarnation));
        }
        true
    }

    pub(super) fn session(&mut self, session: Session, primary: Running, links: ShadowLink) {
        if let Some(shadowing) = &self.shadowing {
            match shadowing.primary.me == primary.me {
                true => {
                    shadowing.join(links);
                    self.turning = None;
                }
                false => (links.close)(),
            }
            return;
        }
        if self.phase() != Some(&Phase::Copying) {
            return (links.close)();
        }
        self.stint += 1;
        self.shadowing = Shadowing::begin(&self.parts, session, primary.clone(), None, self.stint);
        if let Some(shadowing) = &self.shadowing {
            shadowing.join(links);
            self.watch(Some(primary));
        }
    }
}
