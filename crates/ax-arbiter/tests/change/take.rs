//! What a step does to a world.

use ax_arbiter::change::{self, Old};
use ax_arbiter::rules::{self, Registered, Told, decide, not_current};
use ax_wire::Side;
use ax_wire::record::{Decision, Flush, Member, Record, Request};
use ax_wire::{Incarnation, PairId};
use statepoint::pair::{Action, Event, Pair, Phase};

use super::world::{Fate, NEW, OLD, Process, SIDES, Step, Stray, World, arbiter, at};

impl World {
    pub fn take(&mut self, step: Step) {
        match step {
            Step::Decide(side, fate) => self.decide(side, fate),
            Step::Deliver(side) => self.deliver(side),
            Step::Arrive(which) => match self.strays.remove(which) {
                Stray::Ask(keeper, request) => drop(self.decided(keeper, &request)),
                Stray::Tell(side, told) => drop(self.told_new(side, told)),
            },
            Step::Change(side, fate) => self.change(side, fate),
            Step::Silent(side) => {
                self.budget.silences -= 1;
                if let Some(process) = &mut self.processes[at(side)] {
                    process.old = Some(Old::Lost);
                }
            }
            Step::SettleHalf(side) => {
                let settled = self.view(side).map(|view| change::next(&view));
                if let Some(change::Step::Settle(record)) = settled {
                    self.hosts[at(side)].record = record;
                    self.budget.crashes -= 1;
                    self.end(side);
                }
            }
            Step::Lose(side) => {
                if self.linked {
                    self.budget.suspicions -= 1;
                    self.linked = false;
                }
                self.feed(side, Event::PeerLost);
            }
            Step::PermissionOver(side) => {
                // What was acknowledged is applied and durable before anyone is asked.
                self.hosts[at(side)].current = true;
                self.permits[at(side.other())] = false;
                self.feed(side, Event::PermissionOver);
            }
            Step::Running(side) => self.feed(side, Event::Running),
            Step::Show(side) => {
                self.hosts[at(side)].current = true;
                // What the guest writes is on the other disk later, or never.
                self.hosts[at(side.other())].current = false;
            }
            Step::Crash(side) => {
                self.budget.crashes -= 1;
                self.end(side);
            }
            Step::StartBoot(side) => self.start(side, true),
            Step::StartShadow(side) => self.start(side, false),
            Step::Learn(side) => {
                let now = self.hosts[at(side)].now;
                if let Some(record) = self.keepers[now].record {
                    self.learned(side, record);
                }
            }
            Step::Copy(side) => self.copy(side),
        }
        self.forget_what_cannot_matter();
    }

    /// Messages that can no longer change anything, so that equal worlds look equal.
    fn forget_what_cannot_matter(&mut self) {
        let keepers = &self.keepers;
        let known = |keeper: usize| keepers[keeper].record.map(|record| record.generation);
        self.strays.retain(|stray| match stray {
            Stray::Ask(keeper, request) => known(*keeper) == Some(request.from),
            Stray::Tell(_, told) => known(NEW).is_none_or(|known| known < told.record.generation),
        });
        self.strays.sort_unstable();
        self.strays.dedup();
    }

    fn decided(&mut self, keeper: usize, request: &Request) -> Decision {
        let known = &mut self.keepers[keeper].record;
        let decision = decide(arbiter(keeper), known.as_ref(), request);
        if let Decision::Granted(record) = decision {
            *known = Some(record);
        }
        decision
    }

    fn told_new(&mut self, side: Side, told: Told) -> Registered {
        let keeper = &mut self.keepers[NEW];
        let other = keeper.waiting[at(side.other())];
        let me = arbiter(NEW);
        let said = rules::register(me, keeper.record.as_ref(), other.as_ref(), &told, false);
        match said {
            Registered::Known(record) => {
                keeper.record = Some(record);
                keeper.waiting = [None; 2];
            }
            Registered::Behind { .. } | Registered::Full | Registered::Replaced { .. } => {}
            _ => keeper.waiting[at(side)] = Some(told),
        }
        said
    }

    fn decide(&mut self, side: Side, fate: Fate) {
        let now = self.hosts[at(side)].now;
        let Some(request) = self.question(side) else {
            return;
        };
        match fate {
            Fate::Late => {
                self.budget.delays -= 1;
                self.strays.push(Stray::Ask(now, request));
            }
            Fate::AnswerLost => {
                self.budget.losses -= 1;
                self.decided(now, &request);
            }
            Fate::Answered => {
                let decision = self.decided(now, &request);
                if let Some(process) = &mut self.processes[at(side)] {
                    process.answer = Some(decision);
                }
            }
        }
    }

    /// The keeper of the record sees the answer first: the record granted is durable before anyone acts.
    fn deliver(&mut self, side: Side) {
        let Some(process) = &mut self.processes[at(side)] else {
            return;
        };
        let Some(decision) = process.answer.take() else {
            return;
        };
        let event = match decision.granted() {
            Ok(record) => {
                self.hosts[at(side)].record = record;
                Event::Granted(record)
            }
            Err(refusal) if refusal.why == ax_wire::record::Why::OtherArbiter => {
                // The old one has a successor: the question goes there once it has taken over.
                process.old = refusal.record.map(Old::Knows);
                return;
            }
            Err(refusal) => match (refusal.record, self.asked(side)) {
                // Granted by the old arbiter, unheard, and brought to the new one since.
                (Some(record), Some(request)) if rules::was_made_by(&record, &request) => {
                    self.hosts[at(side)].record = record;
                    Event::Granted(record)
                }
                _ => Event::Refused(refusal),
            },
        };
        if let Some(process) = &mut self.processes[at(side)] {
            process.asking = None;
        }
        self.feed(side, event);
    }

    fn asked(&self, side: Side) -> Option<Request> {
        self.processes[at(side)].as_ref().and_then(|p| p.asking)
    }

    fn change(&mut self, side: Side, fate: Fate) {
        let Some(view) = self.view(side) else { return };
        match fate {
            Fate::Answered => {}
            Fate::AnswerLost => self.budget.losses -= 1,
            Fate::Late => self.budget.delays -= 1,
        }
        let (mut old, mut new) = (view.old, view.new);
        match change::next(&view) {
            change::Step::Rest => (old, new) = (None, None),
            change::Step::Look => {
                old = Some(self.keepers[OLD].record.map_or(Old::Nothing, Old::Knows));
                if let Some(process) = &mut self.processes[at(side)] {
                    process.old = old;
                }
                // Nothing that happens between the two makes a difference that a lost answer does not.
                if let Some(view) = self.view(side)
                    && let change::Step::Tell(_) = change::next(&view)
                {
                    return self.change(side, Fate::Answered);
                }
            }
            change::Step::Tell(standing) => {
                let told = self.told(side, standing);
                match fate {
                    Fate::Late => {
                        self.strays.push(Stray::Tell(side, told));
                        (old, new) = (None, None);
                    }
                    Fate::AnswerLost => {
                        self.told_new(side, told);
                        (old, new) = (None, None);
                    }
                    Fate::Answered => new = Some(self.told_new(side, told)),
                }
            }
            change::Step::AskMove => {
                let Some(request) = self.move_request(side) else {
                    return;
                };
                (old, new) = (None, None);
                match fate {
                    Fate::Late => self.strays.push(Stray::Ask(OLD, request)),
                    Fate::Answered | Fate::AnswerLost => {
                        let decision = self.decided(OLD, &request);
                        if fate == Fate::Answered
                            && let Ok(record) = decision.granted()
                        {
                            self.learns_of_move(side, record);
                        }
                    }
                }
            }
            change::Step::Void => {
                self.hosts[at(side)].void = true;
                self.drop_question(side);
                (old, new) = (None, None);
            }
            change::Step::Adopt(record) => {
                self.learns_of_move(side, record);
                (old, new) = (None, None);
            }
            change::Step::Settle(record) => {
                self.settle(side, record);
                (old, new) = (None, None);
            }
        }
        if let Some(process) = &mut self.processes[at(side)] {
            (process.old, process.new) = (old, new);
        }
    }

    /// The question may still reach the old arbiter; its answer is heard by nobody.
    fn drop_question(&mut self, side: Side) {
        if let Some(request) = self.question(side) {
            self.strays.push(Stray::Ask(OLD, request));
        }
        if let Some(process) = &mut self.processes[at(side)] {
            process.answer = None;
        }
    }

    fn learns_of_move(&mut self, side: Side, record: Record) {
        let before = std::mem::replace(&mut self.hosts[at(side)].record, record);
        if let Some(process) = &mut self.processes[at(side)]
            && record.arbiter == arbiter(NEW)
        {
            process.shifts(&before, &record);
        }
    }

    fn settle(&mut self, side: Side, record: Record) {
        self.drop_question(side);
        let host = &mut self.hosts[at(side)];
        let before = host.record;
        host.record = record;
        (host.now, host.void) = (NEW, false);
        let Some(process) = &mut self.processes[at(side)] else {
            return;
        };
        process.shifts(&before, &record);
        if process.pair.is_err() {
            self.learned(side, record);
        }
    }

    fn learned(&mut self, side: Side, record: Record) {
        let host = &mut self.hosts[at(side)];
        if record.generation < host.record.generation {
            return;
        }
        if record.generation > host.record.generation {
            host.record = record;
        }
        let Some(process) = &mut self.processes[at(side)] else {
            return;
        };
        let Err(boot) = process.pair else { return };
        if boot {
            let (pair, actions) = Pair::starting(process.me, Flush::Local, record.generation);
            process.pair = Ok(pair);
            self.perform(side, actions);
        } else {
            process.pair = Ok(Pair::shadow(process.me, Flush::Local));
        }
    }

    fn copy(&mut self, side: Side) {
        let other = side.other();
        let Some(shadow) = self.processes[at(other)].as_ref().map(|p| p.me) else {
            return;
        };
        let Some(Phase::Alone { record, .. }) = self.phase(side) else {
            return;
        };
        let generation = record.generation;
        self.linked = true;
        self.permits[at(side)] = true;
        for event in [
            Event::CopyBegun(shadow.incarnation),
            Event::CopyDone,
            Event::Confirmed(generation),
        ] {
            if event == Event::Confirmed(generation) {
                self.feed(other, event.clone());
            }
            self.feed(side, event);
        }
    }

    fn start(&mut self, side: Side, boot: bool) {
        self.budget.restarts = self.budget.restarts.saturating_sub(1);
        self.incarnations += 1;
        let me = Member {
            side,
            incarnation: Incarnation(self.incarnations),
        };
        self.processes[at(side)] = Some(Process {
            me,
            pair: Err(boot),
            asking: None,
            answer: None,
            shift: None,
            old: None,
            new: None,
        });
    }

    fn end(&mut self, side: Side) {
        self.drop_question(side);
        self.processes[at(side)] = None;
        self.linked = false;
    }

    fn feed(&mut self, side: Side, event: Event) {
        let Some(process) = &mut self.processes[at(side)] else {
            return;
        };
        let Ok(pair) = process.pair.clone() else {
            return;
        };
        let (pair, actions) = pair.step(event);
        process.pair = Ok(pair);
        self.perform(side, actions);
    }

    fn perform(&mut self, side: Side, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask(from, change) => {
                    if let Some(process) = &mut self.processes[at(side)] {
                        process.asking = Some(Request {
                            pair: PairId([0; 16]),
                            caller: process.me,
                            machine: None,
                            from,
                            change,
                        });
                    }
                }
                Action::Boot(_) => self.stale_start |= !self.hosts[at(side)].current,
                Action::DropShadow => self.linked = false,
                Action::EndFenced(_) | Action::EndClean(_) => self.end(side),
                _ => {}
            }
        }
    }

    /// With nothing going wrong any more and both hosts up, a guest shows output in the end; `without`
    /// the old arbiter, if so. A pair that has ended is started where its record says.
    pub fn runs_in_the_end(&self, without: bool) -> bool {
        let mut world = self.clone();
        world.strays.clear();
        for _ in 0..200 {
            if SIDES.iter().any(|side| world.may_show(*side)) {
                return true;
            }
            for side in SIDES {
                world.look_after(side);
                let mut steps = Vec::new();
                world.steps(&mut steps);
                for step in steps {
                    let (of, asks_old) = match step {
                        Step::Decide(of, Fate::Answered) | Step::Learn(of) => {
                            (of, world.hosts[at(of)].now == OLD)
                        }
                        Step::Deliver(of) | Step::PermissionOver(of) | Step::Running(of) => {
                            (of, false)
                        }
                        Step::Lose(of) if !world.linked => (of, false),
                        _ => continue,
                    };
                    if of != side || (asks_old && without) {
                        continue;
                    }
                    world.take(step);
                    break;
                }
                // A change goes on beside everything else.
                world.change_once(side, without);
            }
        }
        false
    }

    /// What a side's daemon does: a guest that is nowhere is started where its disk is current, a new
    /// shadow waits for a primary, and one that waits in vain gives way.
    fn look_after(&mut self, side: Side) {
        let waits = |world: &World, side: Side| {
            world.processes[at(side)].as_ref().is_none_or(|process| {
                let fresh = |pair: &Pair| pair.phase == Phase::Copying;
                process.pair.as_ref().map_or_else(|boot| !boot, fresh)
            })
        };
        let missing = self.processes[at(side)].is_none();
        if waits(self, side) && waits(self, side.other()) {
            if not_current(&self.latest(), side).is_none() {
                self.start(side, true);
            } else if missing {
                self.start(side, false);
            }
        } else if missing {
            self.start(side, false);
        }
    }

    fn change_once(&mut self, side: Side, without: bool) {
        let step = self.view(side).map(|view| change::next(&view));
        match step {
            None => {}
            Some(change::Step::Look) if without => {
                if let Some(process) = &mut self.processes[at(side)] {
                    process.old = Some(Old::Lost);
                }
            }
            Some(change::Step::AskMove) if without => {
                if let Some(process) = &mut self.processes[at(side)] {
                    (process.old, process.new) = (None, None);
                }
            }
            Some(_) => self.change(side, Fate::Answered),
        }
    }

    /// The latest record that counts.
    fn latest(&self) -> Record {
        let of = |keeper: usize| {
            self.keepers[keeper]
                .record
                .filter(|r| r.arbiter == arbiter(keeper))
        };
        let void = self.hosts.iter().any(|host| host.void || host.now == NEW);
        let of_hosts = self.hosts.iter().map(|host| host.record);
        of_hosts
            .chain(of(NEW))
            .chain(of(OLD).filter(|_| !void))
            .max_by_key(|record| record.generation)
            .unwrap_or(self.hosts[0].record)
    }
}
