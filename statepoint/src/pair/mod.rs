//! The pair's state machine: (state, event) → (state, actions). Pure: no time, no I/O.
//!
//! One machine for each process of a pair. It starts as primary or as shadow; a shadow becomes
//! primary by promotion and a primary becomes shadow by a planned failover. The process that runs
//! it performs the [`Action`]s in order and feeds back what happened as [`Event`]s; the model check
//! feeds it every order of events there can be.
//!
//! ```text
//!  primary   Starting ─granted─► Alone ─copied─► Entering ─confirmed─► AskingFt ─granted─► Ft
//!                                 ▲ ▲               │                                     │
//!                                 │ └─ shadow lost ─┘            shadow lost: freeze, ask │
//!                                 └───────────── granted ── AskingAlone ◄─────────────────┘
//!  shadow    Copying ─first epoch acknowledged─► InSync ─peer lost: freeze acks─► Waiting
//!            ─W over─► AskingTakeover ─granted─► Promoting ─runs─► Alone (now primary)
//!  modes     none ─► Joining ─granted─► Alone (now primary); Ft ─leave─► AskingAlone ─granted─► Alone
//!  planned   Ft ─final epoch acknowledged─► AskingHandover ─granted─► HandedOver: the shadow is told
//!            to run ─it runs─► InSync (now shadow); the shadow: InSync ─told─► Promoting ─runs─► Ft
//!  disks     Ft ─they fail─► Parking ─final epoch acknowledged─► Ended; the shadow takes over
//! ```
//!
//! Rules kept here: 20 (every change is asked from the generation known), 21 (whoever has asked
//! neither acknowledges nor releases until answered), 22 (into FT: hold, confirm, ask, only then
//! release; out of FT: grant first), 23 (in sync is a fact of a running shadow), 25, 26.

mod primary;
mod shadow;

#[cfg(test)]
mod tests;

use ax_wire::record::{Change, Copies, Flush, Member, Record, Refusal, State};
use ax_wire::{EpochId, Generation, Incarnation};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Shadow found: the initial copy of memory and disks to this process has begun.
    CopyBegun(Incarnation),
    /// The rest is small enough to go with one epoch.
    CopyDone,
    /// Primary: the shadow acknowledged the first whole epoch, memory and disks in sync.
    /// Shadow: it did so itself, in a session under this generation.
    Confirmed(Generation),
    /// The peer is dead, silent, stalled or unreachable beyond the detection time.
    PeerLost,
    /// The time in which the peer might still release on an old acknowledgement is over (rule 24),
    /// or its host has confirmed that the process is gone.
    PermissionOver,
    /// The arbiter granted the change asked for (or had granted it before).
    Granted(Record),
    /// The arbiter refused; the record as it stands comes with the refusal.
    Refused(Refusal),
    /// Promotion is complete: the guest runs here.
    Running,
    /// Promotion failed before the first output.
    PromotionFailed,
    /// An operator asks for a planned failover.
    Failover,
    /// The disks here have failed; the shadow's copy is good (rule 19).
    Resign,
    /// The guest is parked for good. With a shadow: it has acknowledged the final epoch, applied it
    /// and made its disks durable.
    FinalDone {
        /// The final epoch.
        epoch: EpochId,
        /// The local disks are durable too.
        durable: bool,
    },
    /// An operator, or the guest itself, ends the VM in order.
    Stop,
    /// The primary handed over: this record names this shadow as holder.
    HandedOver(Record),
    /// The peer said that the pair has stopped in order.
    PeerStopped(Record),
    /// An operator wants the VM out of its protection, running on here (rule 22).
    Leave,
    /// The peer said that this shadow is not wanted any more: the record lets the peer run alone.
    Dismissed(Record),
    /// The arbiter does not answer, and nobody has to wait for it.
    Unanswered,
}

/// What to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Ask the arbiter for this change from this generation, until answered.
    Ask(Generation, Change),
    /// Nothing leaves any more, whatever has been acknowledged, until a gate is opened again.
    FreezeOutputs,
    /// From the next epoch on outputs wait (rule 22, step 1).
    HoldOutputs,
    /// Outputs pass at once: this record says this process is alone.
    ReleaseAlone(Record),
    /// Outputs pass as their epochs are acknowledged: this record says so.
    ReleaseAcked(Record),
    /// No acknowledgement is written any more.
    FreezeAcks,
    /// Report [`Event::PermissionOver`] after the permission time and drift margin since the last
    /// acknowledgement; have the peer's host kill the old process meanwhile.
    AwaitPermissionOver,
    /// Start the guest from boot: granted by this record.
    Boot(Record),
    /// The guest, which runs here already, is one side of a pair by this record.
    Joined(Record),
    /// The guest runs on as it did, not one side of a pair: this is why.
    StayLocal(Refusal),
    /// Make this shadow the running guest: granted by this record. Ends in [`Event::Running`].
    Promote(Record),
    /// Forget the shadow; its link is closed.
    DropShadow,
    /// Park the guest, ship what is left as a final epoch, make the disks durable; ends in
    /// [`Event::FinalDone`].
    ParkForGood,
    /// Let the parked guest go on: a planned failover did not happen.
    Unpark,
    /// Tell the shadow that this record makes it holder.
    TellShadow(Record),
    /// Become the shadow of the peer, from the final epoch on, and tell it where to connect.
    BecomeShadow(Record),
    /// End the process; the VM has stopped in order.
    EndClean(Record),
    /// End the process without a trace: another side may run.
    EndFenced(Ending),
}

/// Why a process ends without an orderly stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The record says that the other side runs.
    Superseded,
    /// A shadow that was not in sync lost its primary: its copy is stale (I4).
    Stale,
    /// The arbiter does not allow this side to start.
    MayNotStart,
    /// The primary needs no shadow any more.
    Dismissed,
    /// The disks here have failed: the shadow goes on from the final epoch.
    Resigned,
}

/// Where a process is in the pair's life. Every state that may release outputs carries the record
/// that says so (I3).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Primary: asked whether it may boot.
    Starting {
        /// Generation it asks from.
        from: Generation,
    },
    /// Primary of a guest that runs here without any arbiter's knowledge: asked to be one side of a pair.
    Joining {
        /// Generation it asks from.
        from: Generation,
    },
    /// Primary: runs alone.
    Alone {
        /// What allows it.
        record: Record,
        /// A shadow being filled.
        filling: Option<Incarnation>,
    },
    /// Primary: holds outputs while its first epoch is confirmed.
    Entering {
        /// What allowed it to run alone until now, and would again.
        record: Record,
        /// The shadow.
        shadow: Incarnation,
    },
    /// Primary: asked for FT.
    AskingFt {
        /// What it was granted last.
        record: Record,
        /// The shadow.
        shadow: Incarnation,
        /// The shadow was lost since.
        lost: bool,
    },
    /// Primary: fault tolerant.
    Ft {
        /// What allows it.
        record: Record,
    },
    /// Primary: lost its shadow, frozen, asked to run alone.
    AskingAlone {
        /// What it was granted last.
        record: Record,
    },
    /// Primary: parks for a planned failover or a stop.
    Parking {
        /// What it was granted last.
        record: Record,
        /// What for.
        goal: Goal,
    },
    /// Primary: parked and drained, asked to hand over.
    AskingHandover {
        /// What it was granted last.
        record: Record,
        /// The shadow was lost since: it is not told, whatever is granted.
        lost: bool,
    },
    /// Primary: parked and drained, asked to stop.
    AskingStop {
        /// What it was granted last.
        record: Record,
        /// Last epoch.
        epoch: EpochId,
    },
    /// Primary: the other side was told to run; this one waits to see that it does.
    HandedOver {
        /// The record that names the other side.
        record: Record,
    },
    /// Shadow: not in sync yet.
    Copying,
    /// Shadow: has acknowledged a whole epoch.
    InSync {
        /// The latest generation it knows of.
        known: Generation,
    },
    /// Shadow: lost its primary, waits until old permissions are over.
    Waiting {
        /// The generation it will ask from.
        known: Generation,
    },
    /// Shadow: asked to take over.
    AskingTakeover {
        /// The generation it asked from.
        known: Generation,
    },
    /// Shadow: granted; becoming the running guest.
    Promoting {
        /// What allows it.
        record: Record,
    },
    /// Over.
    Ended,
}

/// What a parking is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Goal {
    /// A planned failover.
    Handover,
    /// An orderly stop.
    Stop,
    /// Leaving the guest to the shadow, which finds this side gone.
    Resign,
}

/// One process's view of its pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// This process.
    pub me: Member,
    /// Where FLUSHes of this VM are durable.
    pub flush: Flush,
    /// Where it is.
    pub phase: Phase,
}

impl Pair {
    /// A process that is to boot the guest, knowing generation `from`: asks first.
    pub fn starting(me: Member, flush: Flush, from: Generation) -> (Pair, Vec<Action>) {
        let pair = Pair {
            me,
            flush,
            phase: Phase::Starting { from },
        };
        (pair, vec![Action::Ask(from, Change::Start)])
    }

    /// A process whose guest runs already, unprotected and unknown to the arbiter, and is to become one
    /// side of a pair, knowing generation `from`: asks first.
    pub fn joining(me: Member, flush: Flush, from: Generation) -> (Pair, Vec<Action>) {
        let pair = Pair {
            me,
            flush,
            phase: Phase::Joining { from },
        };
        (pair, vec![Action::Ask(from, Change::Start)])
    }

    /// A process that waits for a primary.
    pub fn shadow(me: Member, flush: Flush) -> Pair {
        Pair {
            me,
            flush,
            phase: Phase::Copying,
        }
    }

    /// The step. An event that means nothing in this phase changes nothing.
    pub fn step(self, event: Event) -> (Pair, Vec<Action>) {
        let Pair { me, flush, phase } = self;
        let (phase, actions) = match phase {
            Phase::Copying
            | Phase::InSync { .. }
            | Phase::Waiting { .. }
            | Phase::AskingTakeover { .. }
            | Phase::Promoting { .. } => shadow::step(me, phase, event),
            Phase::Ended => (Phase::Ended, Vec::new()),
            primary => primary::step(me, flush, primary, event),
        };
        (Pair { me, flush, phase }, actions)
    }

    /// The record under which this process may show outputs now, if it may (I3).
    pub fn may_release(&self) -> Option<Record> {
        match self.phase {
            Phase::Alone { record, .. } | Phase::Ft { record } => Some(record),
            _ => None,
        }
    }

    /// True when the arbiter has been asked and has not answered.
    pub fn is_asking(&self) -> bool {
        matches!(
            self.phase,
            Phase::Starting { .. }
                | Phase::Joining { .. }
                | Phase::AskingFt { .. }
                | Phase::AskingAlone { .. }
                | Phase::AskingHandover { .. }
                | Phase::AskingStop { .. }
                | Phase::AskingTakeover { .. }
        )
    }
}

/// True when `record` names `me` as holder without a shadow.
fn is_alone(record: &Record, me: Member) -> bool {
    matches!(record.state, State::Alone { holder } if holder == me)
}

/// True when `record` names `me` as holder with `shadow` in sync.
fn is_ft(record: &Record, me: Member, shadow: Incarnation) -> bool {
    matches!(record.state, State::Ft { holder, shadow: s, .. } if holder == me && s == shadow)
}

/// Whose disks are current after an orderly stop under `record`, when those here are `durable` or not.
/// There is no better copy than that of a holder without a shadow.
fn current_copies(record: &Record, me: Member, durable: bool) -> Copies {
    match record.shadow() {
        Some(_) if durable => Copies::Both,
        Some(shadow) => Copies::Only(shadow.side),
        None => Copies::Only(me.side),
    }
}
