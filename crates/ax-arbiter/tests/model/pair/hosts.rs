//! Two hosts without an arbiter: each with its own record, letters between them that are lost or late,
//! and an honest operator, who gives one word for each loss, to a side of two that are silent.

use ax_arbiter::rules::{Word, decide, not_current};
use ax_arbiter::word::{self, Stance};
use ax_wire::PairId;
use ax_wire::Side;
use ax_wire::record::{Copies, Decision, Record, Request, State};
use ax_wire::word::{Answer, Known, Letter, Said};
use statepoint::pair::Phase;

use super::{Budget, ME, SIDES, Step, World, at};

/// What both hosts know, and what is on its way between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hosts {
    known: [Known; 2],
    /// The other host's answer on its way to this side's process.
    answers: [Option<Answer>; 2],
    /// The last letter of a process of this side that is gone, on its way to the other host.
    late: [Option<Letter>; 2],
    pub apart: bool,
    /// The operator has spoken since the hosts last knew the same.
    spoken: bool,
}

impl Hosts {
    pub fn new() -> Hosts {
        let first = Known::shared(Record::defined(Copies::Both, ME));
        Hosts {
            known: [first; 2],
            answers: [None, None],
            late: [None, None],
            apart: false,
            spoken: false,
        }
    }

    pub fn forget(&mut self, side: Side) {
        self.answers[at(side)] = None;
    }

    /// The process is gone; what it asked may still arrive.
    pub fn orphan(&mut self, side: Side, asking: Option<Request>) {
        self.forget(side);
        if asking.is_some() {
            self.late[at(side)] = Some(letter(self.known[at(side)], asking));
        }
    }
}

fn letter(known: Known, request: Option<Request>) -> Letter {
    Letter {
        pair: PairId([0; 16]),
        known,
        request,
    }
}

impl World {
    /// A pair just defined on two hosts without an arbiter.
    pub fn of_hosts(budget: Budget, flush: super::Flush) -> World {
        World {
            hosts: Some(Hosts::new()),
            ..World::new(budget, flush)
        }
    }

    /// The record as this side sees it.
    pub fn record_on(&self, side: Side) -> Record {
        match &self.hosts {
            Some(hosts) => hosts.known[at(side)].record,
            None => self.record,
        }
    }

    /// What this side asks for and can't be answered from what its host knows.
    fn asks_the_other(&self, side: Side) -> Option<Request> {
        let process = self.processes[at(side)].as_ref()?;
        let request = process.asking.filter(|_| process.answer.is_none())?;
        let decision = decide(ME, Some(&self.record_on(side)), &request);
        matches!(decision, Decision::Granted(_)).then_some(request)
    }

    fn stance(&self, side: Side) -> Stance {
        match &self.processes[at(side)] {
            None => Stance::Empty,
            Some(process) => Stance::Process {
                me: process.pair.me,
                fresh: match process.pair.phase {
                    Phase::Copying => true,
                    Phase::Starting { .. } => word::yields(side),
                    _ => false,
                },
                asking: self
                    .hosts
                    .as_ref()
                    .is_some_and(|hosts| hosts.answers[at(side)].is_some()),
            },
        }
    }

    /// True when nothing this side has been granted is still to be acted on, and it shows nothing: it is
    /// dead or held as far as an operator can see.
    fn is_silent(&self, side: Side) -> bool {
        let waits = self.processes[at(side)].as_ref().is_none_or(|process| {
            process.answer.is_none()
                && !matches!(process.pair.phase, Phase::Promoting { .. })
                && !self.may_show(side)
        });
        let told = self
            .hosts
            .as_ref()
            .is_some_and(|hosts| hosts.answers[at(side)].is_none());
        waits && told
    }

    pub(super) fn steps_of_hosts(&self, steps: &mut Vec<Step>) {
        let Some(hosts) = &self.hosts else {
            return;
        };
        let differ = !hosts.known[0].record.agrees_with(&hosts.known[1].record)
            || hosts.known.iter().any(|known| known.alone_since.is_some());
        for side in SIDES {
            let asking = self.processes[at(side)].as_ref().and_then(|p| p.asking);
            if hosts.answers[at(side)].is_some() {
                steps.extend([Step::Hear(side), Step::Forget(side)]);
            } else if let Some(request) = self.asks_the_other(side) {
                if !hosts.apart {
                    steps.push(Step::Answer(side));
                } else if !hosts.spoken && self.is_silent(side.other()) && self.is_silent(side) {
                    steps.push(Step::Word(side));
                }
                // A guest alone may stop by itself.
                if hosts.apart && self.stops_alone(side, &request) {
                    steps.push(Step::Word(side));
                }
            } else if asking.is_some()
                && self.processes[at(side)]
                    .as_ref()
                    .is_some_and(|p| p.answer.is_none())
            {
                steps.push(Step::Look(side));
            }
            if hosts.late[at(side)].is_some() {
                steps.push(Step::Late(side));
            }
            if !hosts.apart && differ && hosts.answers == [None, None] {
                steps.push(Step::Meet(side));
            }
        }
        if hosts.apart {
            steps.push(Step::Join);
        } else if self.budget.cuts > 0 {
            steps.push(Step::Part);
        }
    }

    fn stops_alone(&self, side: Side, request: &Request) -> bool {
        let Some(hosts) = &self.hosts else {
            return false;
        };
        word::alone(&hosts.known[at(side)], Word::Nobody, request).is_ok()
    }

    pub(super) fn take_of_hosts(&mut self, step: Step) {
        match step {
            Step::Answer(side) => {
                let request = self.asks_the_other(side);
                let answer = self.write(side, None, request);
                if let Some(hosts) = &mut self.hosts {
                    hosts.answers[at(side)] = answer;
                }
            }
            Step::Late(side) => {
                let late = self.hosts.as_mut().and_then(|h| h.late[at(side)].take());
                self.write(side, late, None);
            }
            Step::Meet(side) => {
                if let Some(answer) = self.write(side, None, None) {
                    self.hear(side, None, &answer);
                }
            }
            Step::Hear(side) => {
                let request = self.processes[at(side)].as_ref().and_then(|p| p.asking);
                let answer = self.hosts.as_mut().and_then(|h| h.answers[at(side)].take());
                if let Some(answer) = answer {
                    self.hear(side, request, &answer);
                    self.look(side);
                    if let Said::Refused(refusal) = answer.said
                        && let Some(process) = &mut self.processes[at(side)]
                    {
                        process.answer.get_or_insert(Decision::Refused(refusal));
                    }
                }
            }
            Step::Forget(side) => {
                if let Some(hosts) = &mut self.hosts {
                    hosts.forget(side);
                }
            }
            Step::Look(side) => self.look(side),
            Step::Word(side) => {
                let Some(request) = self.asks_the_other(side) else {
                    return;
                };
                let nobodys = self.stops_alone(side, &request);
                let word = if nobodys {
                    Word::Nobody
                } else {
                    Word::Operator
                };
                if let Some(hosts) = &mut self.hosts {
                    let known = &mut hosts.known[at(side)];
                    if let Ok(now) = word::alone(known, word, &request) {
                        *known = now;
                        hosts.spoken |= !nobodys;
                    }
                }
                self.look(side);
            }
            Step::Part => {
                self.budget.cuts -= 1;
                if let Some(hosts) = &mut self.hosts {
                    hosts.apart = true;
                }
            }
            Step::Join => {
                if let Some(hosts) = &mut self.hosts {
                    hosts.apart = false;
                }
            }
            _ => {}
        }
    }

    /// The other host gets this side's letter (or that one) and answers it.
    fn write(
        &mut self,
        side: Side,
        late: Option<Letter>,
        request: Option<Request>,
    ) -> Option<Answer> {
        let other = side.other();
        let stance = self.stance(other);
        let hosts = self.hosts.as_mut()?;
        let letter = late.unwrap_or(letter(hosts.known[at(side)], request));
        let before = hosts.known[at(other)];
        let (answer, now) = word::answer(other, stance, Some(&before), &letter);
        hosts.known[at(other)] = now.unwrap_or(before);
        self.learned(other, &before);
        Some(answer)
    }

    fn hear(&mut self, side: Side, request: Option<Request>, answer: &Answer) {
        let Some(hosts) = &mut self.hosts else {
            return;
        };
        let before = hosts.known[at(side)];
        if let Ok(Some(now)) = word::heard(&before, request.as_ref(), answer) {
            hosts.known[at(side)] = now;
        }
        self.learned(side, &before);
    }

    /// What this side's host knows may have taken the guest away from a process that asks nothing.
    fn learned(&mut self, side: Side, before: &Known) {
        let Some(hosts) = &mut self.hosts else {
            return;
        };
        let now = hosts.known[at(side)];
        let same = hosts.known[0].record.agrees_with(&hosts.known[1].record);
        if same && hosts.known.iter().all(|known| known.alone_since.is_none()) {
            hosts.spoken = false;
        }
        let superseded = self.processes[at(side)].as_ref().is_some_and(|process| {
            process.asking.is_none() && word::supersedes(Some(before), &now, process.pair.me)
        });
        if superseded {
            self.end(side);
        }
    }

    /// Takes the answer from what this side's host knows, if it is there.
    fn look(&mut self, side: Side) {
        let record = self.record_on(side);
        if let Some(process) = &mut self.processes[at(side)]
            && let Some(request) = process.asking
        {
            match decide(ME, Some(&record), &request) {
                Decision::Granted(_) => {}
                decision => process.answer = Some(decision),
            }
        }
    }

    /// Some side shows outputs or will without anybody's word: what becomes of the pair when the hosts
    /// see each other, nothing fails, and whoever supervises it starts it again where it may be.
    pub fn goes_on_together(&self) -> bool {
        let mut world = self.clone();
        world.budget = Budget {
            restarts: 8,
            // Who waits for a peer that stands still gives it up.
            suspicions: 8,
            ..Budget::default()
        };
        if let Some(hosts) = &mut world.hosts {
            hosts.apart = false;
            hosts.late = [None, None];
        }
        for _ in 0..96 {
            if SIDES
                .iter()
                .any(|side| world.may_show(*side) || world.is_protected(*side))
            {
                return true;
            }
            let mut steps = Vec::new();
            world.steps(&mut steps);
            let wanted = |step: &Step| match *step {
                Step::Hear(_)
                | Step::Look(_)
                | Step::Deliver(_)
                | Step::PermissionOver(_)
                | Step::Running(_)
                | Step::SeesRunning(_)
                | Step::FinalDone(_)
                | Step::ShadowConfirms
                | Step::HolderConfirms
                | Step::Meet(_)
                | Step::Told => true,
                Step::Lose(_) => !world.linked(),
                Step::StartBoot(side) => {
                    world.processes[at(side.other())].is_none()
                        && not_current(&world.record_on(side), side).is_none()
                }
                _ => false,
            };
            let ask = |step: &Step| match *step {
                // Who is refused for now waits while the other one asks.
                Step::Answer(side) => {
                    let mut after = world.clone();
                    after.take(*step);
                    after.take(Step::Hear(side));
                    after.asks_the_other(side).is_none()
                }
                _ => false,
            };
            let next = steps
                .iter()
                .find(|s| wanted(s))
                .or_else(|| steps.iter().find(|s| ask(s)))
                .or_else(|| steps.iter().find(|s| matches!(s, Step::Lose(_))));
            match next.copied() {
                Some(next) => world.take(next),
                None => {
                    // A process that waits for a primary which will not come gives way.
                    let waits = SIDES
                        .into_iter()
                        .find(|side| matches!(world.phase(*side), Some(Phase::Copying)));
                    match waits {
                        Some(side) => world.end(side),
                        None => break,
                    }
                }
            }
        }
        // The only current disk could not be made durable: that is an operator's to sort out.
        let marked = |side: &Side| {
            world.marked[at(*side)] && not_current(&world.record_on(*side), *side).is_none()
        };
        if SIDES.iter().any(marked) {
            return true;
        }
        let stopped = |side: &Side| matches!(world.record_on(*side).state, State::Stopped { .. });
        SIDES.iter().all(stopped) && world.processes == [None, None]
    }

    fn is_protected(&self, side: Side) -> bool {
        matches!(self.phase(side), Some(Phase::Ft { .. })) && self.linked()
    }
}
