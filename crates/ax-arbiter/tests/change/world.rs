//! What there is: two arbiters, two hosts with what is durable on them, a process on each.

use ax_arbiter::change::{self, Aim, Old, View};
use ax_arbiter::rules::{Registered, Standing, Told};
use ax_wire::record::{
    Arbiter, Change, Decision, Flush, Member, Record, Request, State, WitnessId,
};
use ax_wire::{Generation, Incarnation, PairId, Side};
use statepoint::pair::{Pair, Phase};

pub const SIDES: [Side; 2] = [Side::A, Side::B];
pub const OLD: usize = 0;
pub const NEW: usize = 1;

/// The arbiter with this number.
pub fn arbiter(number: usize) -> Arbiter {
    let id = [number as u8 + 1; 16];
    Arbiter::Witness(WitnessId {
        identity: id,
        store: id,
    })
}

pub fn at(side: Side) -> usize {
    side as usize
}

/// How much may go wrong in one history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Processes killed.
    pub crashes: u8,
    /// Processes started.
    pub restarts: u8,
    /// Times a side finds the old arbiter silent for long.
    pub silences: u8,
    /// Connections between the sides taken for dead that are not.
    pub suspicions: u8,
    /// Answers of an arbiter that are lost.
    pub losses: u8,
    /// Messages to an arbiter that arrive later, or never.
    pub delays: u8,
}

/// An arbiter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Keeper {
    pub record: Option<Record>,
    pub waiting: [Option<Told>; 2],
}

/// What is durable on a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub record: Record,
    pub void: bool,
    pub now: usize,
    /// Its disk contains all that was shown.
    pub current: bool,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub me: Member,
    /// None until it knows the arbiter's record: it is to boot the guest, or not.
    pub pair: Result<Pair, bool>,
    pub asking: Option<Request>,
    pub answer: Option<Decision>,
    /// Generation before and after a change of arbiter that changed nothing else.
    pub shift: Option<(Generation, Generation)>,
    /// What this round has heard.
    pub old: Option<Old>,
    pub new: Option<Registered>,
}

impl Process {
    /// The record `before` has become `after` by a change of arbiter alone.
    pub fn shifts(&mut self, before: &Record, after: &Record) {
        if before.state == after.state && before.generation != after.generation {
            let from = match self.shift {
                Some((first, last)) if last == before.generation => first,
                _ => before.generation,
            };
            self.shift = Some((from, after.generation));
        }
    }
}

/// A message to an arbiter on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stray {
    Ask(usize, Request),
    Tell(Side, Told),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub aim: Aim,
    pub keepers: [Keeper; 2],
    pub hosts: [Host; 2],
    pub processes: [Option<Process>; 2],
    /// This side's permission to show what its shadow has acknowledged (rule 24).
    pub permits: [bool; 2],
    /// The sides are connected.
    pub linked: bool,
    pub strays: Vec<Stray>,
    pub incarnations: u64,
    pub budget: Budget,
    pub stale_start: bool,
}

/// How a message to an arbiter fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Answered,
    AnswerLost,
    Late,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The arbiter in effect decides on what this side asks; the answer is on its way.
    Decide(Side, Fate),
    Deliver(Side),
    /// A late message arrives.
    Arrive(usize),
    /// The next step of this side's change of arbiter.
    Change(Side, Fate),
    /// The old arbiter is found silent for long.
    Silent(Side),
    /// The process dies after the first of the two writes of [`change::Step::Settle`].
    SettleHalf(Side),
    Lose(Side),
    PermissionOver(Side),
    Running(Side),
    Show(Side),
    Crash(Side),
    StartBoot(Side),
    StartShadow(Side),
    /// A process just started learns the record.
    Learn(Side),
    /// The guest that runs alone is copied to a new shadow, whole.
    Copy(Side),
}

impl World {
    /// A pair in FT by the old arbiter: A holds.
    pub fn new(budget: Budget, aim: Aim) -> World {
        let me = |side: Side| Member {
            side,
            incarnation: Incarnation(1 + side as u64),
        };
        let (a, b) = (me(Side::A), me(Side::B));
        let record = Record {
            generation: Generation(2),
            arbiter: arbiter(OLD),
            by: Some(a),
            state: State::Ft {
                holder: a,
                shadow: b.incarnation,
                flush: Flush::Local,
            },
            machines: Default::default(),
        };
        let host = |current| Host {
            record,
            void: false,
            now: OLD,
            current,
        };
        let process = |me, phase| {
            Some(Process {
                me,
                pair: Ok(Pair {
                    me,
                    flush: Flush::Local,
                    phase,
                }),
                asking: None,
                answer: None,
                shift: None,
                old: None,
                new: None,
            })
        };
        World {
            aim,
            keepers: [
                Keeper {
                    record: Some(record),
                    waiting: [None; 2],
                },
                Keeper {
                    record: None,
                    waiting: [None; 2],
                },
            ],
            hosts: [host(true), host(false)],
            processes: [
                process(a, Phase::Ft { record }),
                process(
                    b,
                    Phase::InSync {
                        known: record.generation,
                    },
                ),
            ],
            permits: [true, false],
            linked: true,
            strays: Vec::new(),
            incarnations: 2,
            budget,
            stale_start: false,
        }
    }

    pub fn phase(&self, side: Side) -> Option<&Phase> {
        let process = self.processes[at(side)].as_ref()?;
        process.pair.as_ref().ok().map(|pair| &pair.phase)
    }

    /// Something may leave this side now.
    pub fn may_show(&self, side: Side) -> bool {
        match self.phase(side) {
            Some(Phase::Alone { .. }) => true,
            Some(Phase::Ft { .. }) => self.permits[at(side)],
            _ => false,
        }
    }

    pub fn processes_live(&self) -> bool {
        self.processes.iter().all(Option::is_some)
    }

    /// What this side sees of its change of arbiter, if it is not through.
    pub fn view(&self, side: Side) -> Option<View> {
        let host = &self.hosts[at(side)];
        let process = self.processes[at(side)].as_ref()?;
        // A question stands between a side and the old arbiter's record.
        let protected = host.record.holder() == Some(process.me)
            && host.record.shadow().is_some()
            && process.asking.is_none();
        (host.now == OLD).then_some(View {
            mine: host.record,
            void: host.void,
            to: arbiter(NEW),
            aim: self.aim,
            protected,
            old: process.old,
            new: process.new,
        })
    }

    /// What this side asks of the arbiter in effect: a question from before a change of arbiter means
    /// the same after it.
    pub fn question(&self, side: Side) -> Option<Request> {
        let process = self.processes[at(side)].as_ref()?;
        let request = process.asking?;
        match process.shift {
            Some((before, after)) if before == request.from => Some(Request {
                from: after,
                ..request
            }),
            _ => Some(request),
        }
    }

    /// The request by which the holder makes the new arbiter the old one's successor.
    pub fn move_request(&self, side: Side) -> Option<Request> {
        Some(Request {
            pair: PairId([0; 16]),
            caller: self.processes[at(side)].as_ref()?.me,
            machine: None,
            from: self.hosts[at(side)].record.generation,
            change: Change::MoveArbiter { to: arbiter(NEW) },
        })
    }

    pub fn steps(&self, steps: &mut Vec<Step>) {
        let fates = [
            (true, Fate::Answered),
            (self.budget.losses > 0, Fate::AnswerLost),
            (self.budget.delays > 0, Fate::Late),
        ];
        let fates = || fates.into_iter().filter(|(may, _)| *may).map(|(_, f)| f);
        for side in SIDES {
            let (host, other) = (&self.hosts[at(side)], side.other());
            let Some(process) = &self.processes[at(side)] else {
                if self.budget.restarts > 0 {
                    match &self.processes[at(other)] {
                        Some(_) => steps.push(Step::StartShadow(side)),
                        None => steps.push(Step::StartBoot(side)),
                    }
                }
                continue;
            };
            if self.budget.crashes > 0 {
                steps.push(Step::Crash(side));
            }
            if process.asking.is_some() && process.answer.is_none() && !host.void {
                steps.extend(fates().map(|fate| Step::Decide(side, fate)));
            }
            if process.answer.is_some() {
                steps.push(Step::Deliver(side));
            }
            if process.pair.is_err() && !host.void {
                steps.push(Step::Learn(side));
            }
            if let Some(view) = self.view(side) {
                match change::next(&view) {
                    change::Step::Look => {
                        steps.push(Step::Change(side, Fate::Answered));
                        if self.budget.silences > 0 {
                            steps.push(Step::Silent(side));
                        }
                    }
                    change::Step::Tell(_) | change::Step::AskMove => {
                        steps.extend(fates().map(|fate| Step::Change(side, fate)));
                    }
                    change::Step::Settle(_) => {
                        steps.push(Step::Change(side, Fate::Answered));
                        if self.budget.crashes > 0 {
                            steps.push(Step::SettleHalf(side));
                        }
                    }
                    _ => steps.push(Step::Change(side, Fate::Answered)),
                }
            }
            if self.may_show(side) {
                steps.push(Step::Show(side));
            }
            let has_peer = matches!(
                self.phase(side),
                Some(Phase::Ft { .. } | Phase::InSync { .. })
            );
            if has_peer && (!self.linked || self.budget.suspicions > 0) {
                steps.push(Step::Lose(side));
            }
            match self.phase(side) {
                Some(Phase::Waiting { .. }) => steps.push(Step::PermissionOver(side)),
                Some(Phase::Promoting { .. }) => steps.push(Step::Running(side)),
                Some(Phase::Alone { .. }) if matches!(self.phase(other), Some(Phase::Copying)) => {
                    steps.push(Step::Copy(side));
                }
                _ => {}
            }
        }
        steps.extend((0..self.strays.len()).map(Step::Arrive));
    }

    /// What the record of the arbiter that decides for this side says, as far as it can be asked.
    pub fn told(&self, side: Side, standing: Standing) -> Told {
        Told {
            record: self.hosts[at(side)].record,
            standing,
        }
    }
}
