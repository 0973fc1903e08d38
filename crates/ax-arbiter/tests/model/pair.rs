//! Two hosts, each running the pair's state machine, one arbiter deciding by its rules, and a
//! network that loses, delays and reorders: the model that is checked.
//!
//! What the guest has shown to the world is tracked by one question per copy: does it contain
//! everything that has been shown? The holder's copy always does; another's does as long as
//! nothing is shown that it has not acknowledged.

mod hosts;
mod offer;
mod take;

pub use hosts::Hosts;

use ax_arbiter::rules::{decide, not_current};
use ax_wire::record::{Arbiter, Change, Copies, Decision, Flush, Member, Record, Request};
use ax_wire::{EpochId, Incarnation, MachineId, PairId, Side};
use statepoint::pair::{Action, Event, Goal, Pair, Phase};

pub const ME: Arbiter = Arbiter::Operator;
pub const SIDES: [Side; 2] = [Side::A, Side::B];

/// How much may go wrong in one history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Processes killed.
    pub crashes: u8,
    /// Connections taken for dead that are not.
    pub suspicions: u8,
    /// Processes started, beyond the first two.
    pub restarts: u8,
    /// Planned failovers.
    pub failovers: u8,
    /// Orderly stops.
    pub stops: u8,
    /// Promotions that fail.
    pub failures: u8,
    /// Orders to leave FT and run on alone.
    pub leaves: u8,
    /// Times at which the hosts stop seeing each other.
    pub cuts: u8,
    /// Hosts that are gone for good, another machine taking their place.
    pub replacements: u8,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub pair: Pair,
    /// What it has asked the arbiter and not been answered.
    asking: Option<Request>,
    /// The arbiter's answer on its way; a later one replaces a lost one.
    answer: Option<Decision>,
    /// Its memory contains everything that was shown.
    current: bool,
    /// Outputs pass, as far as this gate goes: the last thing its actions said.
    gate: Gate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Gate {
    Shut,
    /// Outputs pass when acknowledged, while the permission lasts.
    Acked,
    Open,
}

/// The connection over which epochs flow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Session {
    holder: Side,
    /// Whether each side still takes part.
    open: [bool; 2],
    /// An epoch has been shipped whole.
    shipped: bool,
    /// Nothing was shown since that the shipped epoch does not contain.
    fresh: bool,
    /// The shadow confirmed it.
    confirmed: bool,
    /// A record the holder told the shadow: handed over, or stopped.
    told: Option<Record>,
}

/// The whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    flush: Flush,
    /// The arbiter's record.
    pub record: Record,
    /// What the two hosts know, where they have no arbiter.
    pub hosts: Option<Hosts>,
    pub processes: [Option<Process>; 2],
    /// Each side's disk, durable, contains everything that was shown.
    pub disks: [bool; 2],
    /// Each side's disk is durably marked: no guest is booted from it.
    marked: [bool; 2],
    /// Each side's permission to release by its shadow's last acknowledgement still lasts (rule 24).
    pub permits: [bool; 2],
    session: Option<Session>,
    /// The side that leaves FT by an order: it tells its shadow.
    leaving: Option<Side>,
    /// How many machines each side has had before the present one.
    pub machines: [u8; 2],
    /// Requests of processes that no longer wait for the answer, still on their way.
    strays: Vec<Request>,
    incarnations: u64,
    pub budget: Budget,
    /// A guest was started from a copy that lacks something shown (I4).
    pub stale_start: bool,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The arbiter decides on what this side asks.
    Decide(Side),
    /// Its answer arrives.
    Deliver(Side),
    /// A request of a process that no longer waits arrives at the arbiter.
    Stray(usize),
    /// The holder's outputs of an acknowledged epoch, or its own if it is alone, leave.
    Show(Side),
    /// The shadow acknowledges an epoch, which renews the holder's permission.
    Acknowledge,
    /// Too much time has passed since the last acknowledgement this side had.
    Expire(Side),
    CopyBegins,
    CopyDone,
    /// The shadow confirms the first epoch, or one of a later generation.
    ShadowConfirms,
    HolderConfirms,
    /// This side takes its peer for lost.
    Lose(Side),
    PermissionOver(Side),
    /// What the holder told the shadow arrives.
    Told,
    Running(Side),
    PromotionFails(Side),
    /// The old holder sees the new one run.
    SeesRunning(Side),
    Failover(Side),
    Stop(Side),
    /// An operator wants this side's guest out of FT.
    Leave(Side),
    FinalDone(Side),
    FinalNotDurable(Side),
    /// This side's disks fail: its shadow's copy is to go on.
    Resign(Side),
    Crash(Side),
    /// A new process is started to boot the guest; it knows the record as it is.
    StartBoot(Side),
    /// A new process is started to wait for a primary.
    StartShadow(Side),
    /// Without an arbiter: the other host gets this side's letter and answers it.
    Answer(Side),
    /// The answer arrives.
    Hear(Side),
    /// The answer is lost.
    Forget(Side),
    /// The letter of a process that is gone arrives at this side.
    Late(Side),
    /// This side finds the answer in what its host knows.
    Look(Side),
    /// The operator tells this side that the other host is dead.
    Word(Side),
    /// The hosts meet with nothing to ask.
    Meet(Side),
    Part,
    Join,
    /// The other side's host is gone for good: this side's has another machine take its place.
    Replace(Side),
}

fn machine(side: Side, before: u8) -> MachineId {
    let mut id = [before + 1; 16];
    id[0] = side as u8;
    MachineId(id)
}

fn at(side: Side) -> usize {
    side as usize
}

impl World {
    /// A pair just defined: nobody runs.
    pub fn new(budget: Budget, flush: Flush) -> World {
        World {
            flush,
            record: Record::defined(Copies::Both, ME),
            hosts: None,
            processes: [None, None],
            disks: [true, true],
            marked: [false, false],
            permits: [false, false],
            session: None,
            leaving: None,
            machines: [0, 0],
            strays: Vec::new(),
            incarnations: 0,
            budget,
            stale_start: false,
        }
    }

    /// The present machine of a side.
    pub fn machine(&self, side: Side) -> MachineId {
        machine(side, self.machines[at(side)])
    }

    /// A machine that was replaced comes back with all it knew, and asks: what it is told. None of the
    /// answers may be a grant.
    pub fn replaced_is_granted_something(&self) -> bool {
        let stop = Change::Stop {
            epoch: EpochId(1),
            current: Copies::Both,
        };
        let changes = [
            Change::Start,
            Change::StartByOperator,
            Change::TakeSolo,
            Change::Handover,
            stop,
        ];
        let members = [self.record.holder(), self.record.shadow()];
        let asks = |side: Side, before: u8| {
            let incarnations = members.into_iter().flatten().map(|m| m.incarnation);
            let callers = incarnations
                .chain([Incarnation(99)])
                .map(move |incarnation| Member { side, incarnation });
            callers.flat_map(move |caller| {
                changes.map(|change| Request {
                    pair: PairId([0; 16]),
                    caller,
                    machine: Some(machine(side, before)),
                    from: self.record.generation,
                    change,
                })
            })
        };
        let befores = |side: Side| (0..self.machines[at(side)]).map(move |before| (side, before));
        SIDES
            .into_iter()
            .flat_map(befores)
            .flat_map(|(side, before)| asks(side, before))
            .any(|ask| !matches!(decide(ME, Some(&self.record), &ask), Decision::Refused(_)))
    }

    fn phase(&self, side: Side) -> Option<&Phase> {
        self.processes[at(side)]
            .as_ref()
            .map(|process| &process.pair.phase)
    }

    /// True when something may leave this side now.
    pub fn may_show(&self, side: Side) -> bool {
        self.processes[at(side)]
            .as_ref()
            .is_some_and(|process| match process.gate {
                Gate::Shut => false,
                Gate::Acked => self.permits[at(side)],
                Gate::Open => true,
            })
    }

    /// True when the guest runs here and its outputs are not held for an answer.
    pub fn runs_alone(&self, side: Side) -> bool {
        matches!(self.phase(side), Some(Phase::Alone { .. })) && self.may_show(side)
    }

    /// I4 of what may be shown: the copy contains all that was shown before.
    pub fn is_current(&self, side: Side) -> bool {
        self.processes[at(side)]
            .as_ref()
            .is_some_and(|process| process.current)
    }

    fn linked(&self) -> bool {
        let apart = self.hosts.as_ref().is_some_and(|hosts| hosts.apart);
        !apart
            && self
                .session
                .as_ref()
                .is_some_and(|session| session.open == [true, true])
    }

    fn holds_session(&self, side: Side) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.holder == side)
    }

    fn takes_part(&self, side: Side) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.open[at(side)])
    }

    fn close(&mut self, side: Side) {
        if let Some(session) = &mut self.session {
            session.open[at(side)] = false;
            if session.open == [false, false] {
                self.session = None;
            }
        }
    }

    fn start(&mut self, side: Side, boot: bool) {
        self.incarnations += 1;
        let me = Member {
            side,
            incarnation: Incarnation(self.incarnations),
        };
        let (pair, actions) = if boot {
            Pair::starting(me, self.flush, self.record_on(side).generation)
        } else {
            (Pair::shadow(me, self.flush), Vec::new())
        };
        let process = Process {
            pair,
            asking: None,
            answer: None,
            current: false,
            gate: Gate::Shut,
        };
        self.processes[at(side)] = Some(process);
        self.permits[at(side)] = false;
        self.act(side, actions);
    }

    /// The process is gone: killed, or ended by itself.
    fn end(&mut self, side: Side) {
        if let Some(process) = self.processes[at(side)].take() {
            match &mut self.hosts {
                Some(hosts) => hosts.orphan(side, process.asking),
                None => self.strays.extend(process.asking),
            }
        }
        self.permits[at(side)] = false;
        self.close(side);
    }

    fn feed(&mut self, side: Side, event: Event) {
        let Some(process) = &mut self.processes[at(side)] else {
            return;
        };
        let (pair, actions) = process.pair.clone().step(event);
        process.pair = pair;
        self.act(side, actions);
    }

    fn act(&mut self, side: Side, actions: Vec<Action>) {
        for action in actions {
            let Some(process) = &mut self.processes[at(side)] else {
                return;
            };
            match action {
                Action::Ask(from, change) => {
                    let caller = process.pair.me;
                    let request = Request {
                        pair: PairId([0; 16]),
                        caller,
                        machine: Some(machine(caller.side, self.machines[at(caller.side)])),
                        from,
                        change,
                    };
                    let before = process.asking.replace(request);
                    process.answer = None;
                    match &mut self.hosts {
                        Some(hosts) => hosts.forget(side),
                        None => self.strays.extend(before),
                    }
                }
                Action::FreezeOutputs | Action::HoldOutputs => process.gate = Gate::Shut,
                Action::ReleaseAlone(_) => process.gate = Gate::Open,
                Action::ReleaseAcked(_) => process.gate = Gate::Acked,
                Action::FreezeAcks => self.close(side),
                Action::Boot(_) => {
                    // A cold start reads the disk; what only memory held was never shown.
                    process.current = true;
                    self.stale_start |= !self.disks[at(side)];
                    // With FLUSH durable on both sides the shadow's host may start while the old
                    // holder's permission lasts: its first output waits for the end of that.
                    self.permits[at(side.other())] = false;
                }
                Action::DropShadow => {
                    if self.leaving.take() == Some(side)
                        && let (Some(session), Phase::Alone { record, .. }) =
                            (&mut self.session, &process.pair.phase)
                    {
                        session.told = Some(*record);
                    }
                    self.close(side);
                }
                Action::TellShadow(record) => {
                    if let Some(session) = &mut self.session {
                        session.told = Some(record);
                    }
                }
                // What a marked disk lacks nobody sends it.
                Action::BecomeShadow(_) if self.marked[at(side)] => self.end(side),
                Action::BecomeShadow(_) => {
                    self.session = Some(Session {
                        holder: side.other(),
                        open: [true, true],
                        shipped: true,
                        fresh: true,
                        confirmed: false,
                        told: None,
                    });
                }
                Action::EndClean(_) | Action::EndFenced(_) => self.end(side),
                // An acknowledgement permits the release of its own epoch: one had in an earlier
                // tenure permits nothing now.
                Action::Promote(_) => self.permits[at(side)] = false,
                // The world offers what follows from these as steps of their own.
                Action::AwaitPermissionOver | Action::ParkForGood | Action::Unpark => {}
                // Of guests that no arbiter knows: none here.
                Action::Joined(_) | Action::StayLocal(_) => {}
            }
        }
    }

    /// True when this side, all by itself with the arbiter in reach, should end up running: it
    /// holds, it is exactly the shadow in sync, or its disk is the current one.
    pub fn is_entitled(&self, side: Side) -> bool {
        let shadow_in_sync = self.processes[at(side)].as_ref().is_some_and(|process| {
            self.record.shadow() == Some(process.pair.me)
                && matches!(
                    process.pair.phase,
                    Phase::InSync { .. }
                        | Phase::Waiting { .. }
                        | Phase::AskingTakeover { .. }
                        | Phase::Promoting { .. }
                        | Phase::HandedOver { .. }
                )
                && process.current
                // Refused because the holder's request to enter FT had not arrived yet, and it
                // arrives after that holder's death: held, waiting for the holder's host.
                && !matches!(process.answer, Some(Decision::Refused(_)))
        });
        let stopping = matches!(
            self.phase(side),
            Some(
                Phase::Parking {
                    goal: Goal::Stop,
                    ..
                } | Phase::AskingStop { .. }
            )
        );
        let holds = self.processes[at(side)]
            .as_ref()
            .is_some_and(|process| self.record.holder() == Some(process.pair.me));
        let may_boot = not_current(&self.record, side).is_none() && !self.marked[at(side)];
        !stopping && (shadow_in_sync || holds || may_boot)
    }

    /// What becomes of this side when the other is gone for good, nothing else fails, and whoever
    /// supervises it starts it again as often as that is allowed.
    pub fn settle(&self, side: Side) -> World {
        let mut world = self.clone();
        world.budget = Budget {
            crashes: 0,
            suspicions: 0,
            restarts: 8,
            failovers: 0,
            stops: 0,
            failures: 0,
            leaves: 0,
            cuts: 0,
            replacements: 0,
        };
        world.end(side.other());
        for _ in 0..64 {
            if world.runs_alone(side) {
                break;
            }
            let mut steps = Vec::new();
            world.steps(&mut steps);
            let wanted = |step: &Step| match *step {
                Step::Deliver(s)
                | Step::Lose(s)
                | Step::PermissionOver(s)
                | Step::Running(s)
                | Step::FinalDone(s)
                | Step::StartBoot(s) => s == side,
                Step::ShadowConfirms | Step::Told => true,
                _ => false,
            };
            let last = Some(Step::Decide(side)).filter(|decide| steps.contains(decide));
            match steps.iter().copied().find(wanted).or(last) {
                Some(next) => world.take(next),
                // A process that waits for a primary which will not come gives way to one that
                // boots the guest.
                None if matches!(world.phase(side), Some(Phase::Copying)) => world.end(side),
                None => break,
            }
        }
        world
    }
}
