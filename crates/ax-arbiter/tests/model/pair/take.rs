//! What a step does to a world.

use ax_arbiter::rules::decide;
use ax_wire::record::{Change, Decision, Flush, Member, Request, State};
use ax_wire::{EpochId, Incarnation, PairId, Side};
use statepoint::pair::{Event, Goal, Phase};

use super::{Gate, ME, SIDES, Session, Step, World, at};

fn final_done(durable: bool) -> Event {
    Event::FinalDone {
        epoch: EpochId(1),
        durable,
    }
}

impl World {
    /// What holds after the step.
    pub fn take(&mut self, step: Step) {
        match step {
            Step::Decide(side) => {
                let asking = self.processes[at(side)].as_ref().and_then(|p| p.asking);
                if let Some(request) = asking {
                    let decision = self.decide(&request);
                    if let Some(process) = &mut self.processes[at(side)] {
                        process.answer = Some(decision);
                    }
                }
            }
            Step::Stray(at) => {
                let request = self.strays.remove(at);
                self.decide(&request);
            }
            Step::Deliver(side) => {
                if let Some(process) = &mut self.processes[at(side)]
                    && let Some(decision) = process.answer.take()
                {
                    process.asking = None;
                    let event = match decision.granted() {
                        Ok(record) => Event::Granted(record),
                        Err(refusal) => Event::Refused(refusal),
                    };
                    self.feed(side, event);
                }
            }
            Step::Show(side) => self.show(side),
            Step::Acknowledge => {
                if let Some(session) = &self.session {
                    self.permits[at(session.holder)] = true;
                }
            }
            Step::Expire(side) => self.permits[at(side)] = false,
            Step::CopyBegins => self.copy_begins(),
            Step::CopyDone => {
                if let Some(session) = &mut self.session {
                    let holder = session.holder;
                    self.feed(holder, Event::CopyDone);
                    if let Some(session) = &mut self.session {
                        session.shipped = true;
                        session.fresh = true;
                    }
                }
            }
            Step::ShadowConfirms => self.shadow_confirms(),
            Step::HolderConfirms => {
                if let Some(holder) = self.session.as_ref().map(|session| session.holder) {
                    self.feed(holder, Event::Confirmed(self.record.generation));
                }
            }
            Step::Lose(side) => {
                if self.linked() {
                    self.budget.suspicions -= 1;
                }
                self.feed(side, Event::PeerLost);
                self.close(side);
            }
            Step::PermissionOver(side) => {
                // Everything acknowledged is applied and durable before anyone is asked: were it
                // only before the first output, a crash between the grant and that moment would
                // leave a record that names a stale disk.
                self.disks[at(side)] = self.is_current(side);
                self.permits[at(side.other())] = false;
                self.feed(side, Event::PermissionOver);
            }
            Step::Told => self.told(),
            Step::Running(side) | Step::SeesRunning(side) => self.feed(side, Event::Running),
            Step::PromotionFails(side) => {
                self.budget.failures -= 1;
                self.feed(side, Event::PromotionFailed);
            }
            Step::Failover(side) => {
                self.budget.failovers -= 1;
                self.feed(side, Event::Failover);
            }
            Step::Stop(side) => {
                self.budget.stops -= 1;
                self.feed(side, Event::Stop);
            }
            Step::Leave(side) => {
                self.budget.leaves -= 1;
                self.leaving = Some(side);
                self.feed(side, Event::Leave);
            }
            Step::Resign(side) => {
                self.budget.failures -= 1;
                self.feed(side, Event::Resign);
            }
            Step::FinalDone(side) if self.resigns(side) => {
                // What the guest was told is durable here was so; the rest is on the other side alone.
                self.disks[at(side.other())] = true;
                self.feed(side, final_done(false));
            }
            Step::FinalDone(side) => {
                if self.linked() && self.holds_session(side) {
                    self.disks = [true, true];
                } else {
                    // Durable here: all that this guest has written.
                    self.marked[at(side)] = false;
                    self.disks[at(side)] |= self.is_current(side);
                }
                self.feed(side, final_done(true));
            }
            Step::FinalNotDurable(side) => {
                self.budget.failures -= 1;
                self.disks = [false, false];
                self.disks[at(side.other())] = true;
                self.marked[at(side)] = true;
                self.feed(side, final_done(false));
            }
            Step::Answer(_)
            | Step::Hear(_)
            | Step::Forget(_)
            | Step::Late(_)
            | Step::Look(_)
            | Step::Word(_)
            | Step::Meet(_)
            | Step::Part
            | Step::Join => self.take_of_hosts(step),
            Step::Replace(side) => self.replace(side),
            Step::Crash(side) => {
                self.budget.crashes -= 1;
                self.end(side);
            }
            Step::StartBoot(side) | Step::StartShadow(side) => {
                if self.incarnations >= 2 {
                    self.budget.restarts -= 1;
                }
                self.start(side, matches!(step, Step::StartBoot(_)));
            }
        }
        self.forget_what_cannot_matter();
    }

    /// As `axd pair --replace` does it: in the name of the process that runs alone on this side, or of nobody.
    fn replace(&mut self, side: Side) {
        let other = side.other();
        self.budget.replacements -= 1;
        self.machines[at(other)] += 1;
        let process = self.processes[at(side)].as_ref();
        let caller = Member {
            side,
            incarnation: process.map_or(Incarnation(0), |p| p.pair.me.incarnation),
        };
        let change = Change::Replace {
            machine: self.machine(other),
            word: true,
        };
        let request = Request {
            pair: PairId([0; 16]),
            caller,
            machine: Some(self.machine(side)),
            from: self.record.generation,
            change,
        };
        let decision = self.decide(&request);
        assert!(decision.granted().is_ok(), "{decision:?}");
        // The new one has no disks.
        self.disks[at(other)] = false;
        self.marked[at(other)] = false;
    }

    fn resigns(&self, side: Side) -> bool {
        let goal = match self.phase(side) {
            Some(Phase::Parking { goal, .. }) => *goal,
            _ => return false,
        };
        goal == Goal::Resign
    }

    fn decide(&mut self, request: &Request) -> Decision {
        let decision = decide(ME, Some(&self.record), request);
        if let Decision::Granted(record) = decision {
            self.record = record;
        }
        decision
    }

    /// Something leaves the building: from now on a copy without it is stale.
    fn show(&mut self, side: Side) {
        let other = side.other();
        let acked = self.processes[at(side)]
            .as_ref()
            .is_some_and(|p| p.gate == Gate::Acked);
        // The holder writes its disk at once; the shadow applies later, unless what the guest
        // flushed must be durable on both.
        self.disks[at(side)] = true;
        self.disks[at(other)] &= acked && self.flush == Flush::Both;
        if acked {
            return;
        }
        if let Some(process) = &mut self.processes[at(other)] {
            process.current = false;
        }
        if let Some(session) = &mut self.session {
            session.fresh = false;
        }
    }

    fn copy_begins(&mut self) {
        let Some(holder) = SIDES
            .into_iter()
            .find(|side| matches!(self.phase(*side), Some(Phase::Alone { filling: None, .. })))
        else {
            return;
        };
        let Some(shadow) = &self.processes[at(holder.other())] else {
            return;
        };
        let incarnation = shadow.pair.me.incarnation;
        self.session = Some(Session {
            holder,
            open: [true, true],
            shipped: false,
            fresh: false,
            confirmed: false,
            told: None,
        });
        self.feed(holder, Event::CopyBegun(incarnation));
    }

    fn shadow_confirms(&mut self) {
        let Some(generation) = self.shadow_confirmation() else {
            return;
        };
        let Some(session) = &mut self.session else {
            return;
        };
        session.confirmed = true;
        let (holder, shadow, fresh) = (session.holder, session.holder.other(), session.fresh);
        if self.linked() {
            self.permits[at(holder)] = true;
        }
        if let Some(process) = &mut self.processes[at(shadow)]
            && process.pair.phase == Phase::Copying
        {
            process.current = fresh;
            // With FLUSH durable on both sides, in sync means a durable disk.
            self.disks[at(shadow)] |= fresh && self.flush == Flush::Both;
            self.marked[at(shadow)] = false;
        }
        self.feed(shadow, Event::Confirmed(generation));
    }

    fn told(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        let shadow = session.holder.other();
        let Some(record) = session.told.take() else {
            return;
        };
        let event = match record.state {
            State::Stopped { .. } => Event::PeerStopped(record),
            State::Alone { .. } => Event::Dismissed(record),
            _ => Event::HandedOver(record),
        };
        let before = self.session.clone();
        self.feed(shadow, event);
        // A handover turns the link round instead of closing it.
        if matches!(self.phase(shadow), Some(Phase::Promoting { .. })) {
            self.session = before;
        }
    }

    /// Requests that can no longer be granted, so that equal worlds look equal.
    fn forget_what_cannot_matter(&mut self) {
        if self.hosts.is_some() {
            return;
        }
        let now = self.record.generation;
        self.strays.retain(|request| request.from >= now);
        self.strays.sort_unstable();
        self.strays.dedup();
    }
}
