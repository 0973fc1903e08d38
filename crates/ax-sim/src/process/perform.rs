//! The state machine's actions, performed.

use std::sync::Arc;
use std::time::Duration;

use ax_wire::Session;
use ax_wire::record::{Record, Request, State};
use io_barrier::{FtGrant, Grant, ShadowOutputs, SoloGrant};
use statepoint::pair::{Action, Event};
use statepoint::shadow::Inheritance;

use crate::following::Shadowing;
use crate::guest::Ports;
use crate::universe::{Broken, PAIR};

use super::{Input, LEASE, Process, Running2, TURN, Word};

impl Process {
    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::Ask(from, change) => self.asker.ask(Some(Request {
                pair: PAIR,
                caller: self.parts.mine.me,
                machine: None,
                from,
                change,
            })),
            Action::FreezeOutputs => self.parts.barrier.freeze(),
            Action::HoldOutputs => {
                match self.parts.universe.setting.ha {
                    true => self.parts.barrier.start_leasing(LEASE),
                    false => self.parts.barrier.start_holding(),
                };
            }
            Action::ReleaseAlone(record) => self.release_alone(&record),
            Action::ReleaseAcked(record) => self.release_acked(&record),
            Action::FreezeAcks => {
                if let Some(shadowing) = &self.shadowing {
                    shadowing.engine.freeze_acks();
                }
            }
            Action::AwaitPermissionOver => {
                self.permission_over = Some(self.here.now() + self.permission_left());
                if self.breaks(Broken::Permission) {
                    self.permission_over = Some(self.here.now());
                }
                if let Err(why) = self.prepare(false) {
                    self.say(&format!("can't take over: {why}"));
                    self.permission_over = None;
                    self.step(Event::PromotionFailed);
                }
            }
            Action::Boot(record) => {
                let durable = self.parts.image.meta().lock();
                let mut durable = durable;
                let _ = durable.set_generation(record.generation);
                drop(durable);
                self.run_guest();
            }
            Action::Promote(record) => self.promote(&record),
            Action::DropShadow => {
                match self.protection.take() {
                    Some(protection) => protection.end(&self.parts, true),
                    None => self.parts.log.record(false),
                }
                self.watch(None);
                self.parts.log.release_flushes();
            }
            Action::ParkForGood => match &self.protection {
                Some(protection) => {
                    if self.parts.universe.setting.ha {
                        self.parts.machine.park(true);
                    }
                    protection.engine.request_final_epoch();
                }
                None => {
                    self.parts.machine.park(true);
                    self.final_epoch(self.last_epoch);
                }
            },
            Action::Unpark => {
                if let Some(protection) = &self.protection {
                    protection.unpark();
                }
                self.parts.machine.park(false);
            }
            Action::TellShadow(record) => {
                if let Some(protection) = &self.protection {
                    let word = match record.state {
                        State::Stopped { .. } => Word::Stopped(record),
                        _ => Word::HandOver(record),
                    };
                    self.tell(&protection.shadow, word);
                }
            }
            Action::BecomeShadow(record) => self.become_shadow(&record),
            Action::EndClean(record) => {
                self.say(&format!("ends in order: {record}"));
                self.parts.image.close();
                // The other side hears of it first.
                self.here.sleep(Duration::from_millis(2));
                self.ended = true;
            }
            Action::EndFenced(ending) => {
                self.say(&format!("ends: {ending:?}"));
                self.ended = true;
            }
            Action::Joined(_) | Action::StayLocal(_) => {}
        }
    }

    pub(super) fn run_guest(&self) {
        let parts = &self.parts;
        let (universe, failed) = (Arc::clone(&parts.universe), Arc::clone(&parts.failed));
        let me = parts.mine.me;
        let (_, answered) = universe.oracle.answers();
        let ports = Ports {
            barrier: Arc::clone(&parts.barrier),
            image: Arc::clone(&parts.image),
            log: Arc::clone(&parts.log),
            sync: universe.setting.sync,
            booted: Box::new(move |last, found| {
                universe.say(&format!("{me} booted; its ledger ends with {last}"));
                if let Err(why) = universe.oracle.booted(answered, last, found) {
                    failed(&why);
                }
            }),
            trouble: {
                let inbox = parts.mine.inbox.clone();
                Box::new(move |flush| inbox.tell(Input::DiskFails(flush)))
            },
            failed: Arc::clone(&parts.failed),
        };
        if let Err(error) = parts.machine.start(ports) {
            (parts.failed)(&error.to_string());
        }
    }

    pub(super) fn release_alone(&mut self, record: &Record) {
        let Some(grant) = SoloGrant::of(record, self.parts.mine.me) else {
            return (self.parts.failed)("released alone without a record that says so");
        };
        *self.parts.releases.lock() = record.generation.0;
        match self.shadowing.take() {
            None => self.parts.barrier.pass(grant),
            Some(shadowing) => self.release_promoted(grant.into(), &shadowing),
        }
    }

    pub(super) fn release_promoted(&self, grant: Grant, shadowing: &Shadowing) {
        if self.breaks(Broken::Resend) {
            let none = ShadowOutputs::new(0);
            return self.parts.barrier.promote(grant, &none, self.last_epoch);
        }
        let (barrier, committed) = (&self.parts.barrier, self.last_epoch);
        shadowing
            .engine
            .with_outputs(|outputs| barrier.promote(grant, outputs, committed));
    }

    pub(super) fn release_acked(&mut self, record: &Record) {
        let Some(grant) = FtGrant::of(record, self.parts.mine.me) else {
            return (self.parts.failed)("released under FT without a record that says so");
        };
        *self.parts.releases.lock() = record.generation.0;
        match &self.protection {
            Some(protection) => {
                if !self.parts.universe.setting.ha {
                    self.parts.barrier.protect(grant);
                }
                protection.engine.granted(record.generation);
            }
            None => {
                let Some(shadowing) = self.shadowing.take() else {
                    return;
                };
                self.release_promoted(grant.into(), &shadowing);
                self.parting = Some(shadowing);
            }
        }
    }

    pub(super) fn prepare(&mut self, protected: bool) -> Result<(), String> {
        let shadowing = self.shadowing.as_mut().ok_or("no session")?;
        let committed = shadowing.finish().ok_or("nothing is committed")?;
        shadowing.replica.settle().map_err(|e| e.to_string())?;
        if self.parts.universe.setting.ha {
            // The guest boots.
            self.last_epoch = committed.epoch;
            self.prepared = Some(committed);
            return Ok(());
        }
        let mut machine = self.parts.machine.clone();
        if protected {
            use statepoint::guest::Guest;
            machine.track_dirty(true).map_err(|e| e.to_string())?;
        }
        if let Err(why) = machine.restore(&committed.state) {
            (self.parts.failed)(&why);
        }
        self.parts.log.record(protected);
        self.last_epoch = committed.epoch;
        self.prepared = Some(committed);
        Ok(())
    }

    pub(super) fn promote(&mut self, record: &Record) {
        let prepared = match self.prepared {
            Some(_) => Ok(()),
            None => self.prepare(matches!(record.state, State::Ft { .. })),
        };
        let promoted = prepared.and_then(|()| {
            self.prepared.take();
            let shadowing = self.shadowing.as_ref().ok_or("no session")?;
            let promoted = shadowing.replica.promote(record.generation);
            promoted.map_err(|e| e.to_string())
        });
        match promoted {
            Ok(()) => {
                self.run_guest();
                self.step(Event::Running);
            }
            Err(why) => {
                self.say(&format!("can't be promoted: {why}"));
                self.step(Event::PromotionFailed);
            }
        }
    }

    pub(super) fn become_shadow(&mut self, record: &Record) {
        let lost = |why: &str| (self.parts.failed)(&format!("after a planned failover: {why}"));
        let Some(protection) = self.protection.take() else {
            return lost("no protection");
        };
        let primary = protection.shadow.clone();
        self.tell(&primary, Word::Show);
        let Some(committed) = protection.hand_over(&self.parts) else {
            return lost("the final epoch is gone");
        };
        let mut outputs = ShadowOutputs::new(1 << 20);
        if self.parts.barrier.retire(&mut outputs).is_err() {
            return lost("its outputs do not fit");
        }
        self.parts.machine.vacate();
        self.last_epoch = committed.epoch;
        let session = Session {
            pair: PAIR,
            generation: record.generation,
            incarnation: primary.me.incarnation,
        };
        self.stint += 1;
        let from = Some(Inheritance { committed, outputs });
        self.shadowing = Shadowing::begin(&self.parts, session, primary.clone(), from, self.stint);
        self.turning = Some(self.here.now() + TURN);
        let mine = Running2(self.parts.mine.clone());
        self.tell(&primary, Word::Follow(mine));
    }
}
