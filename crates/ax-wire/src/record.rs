//! The arbiter's record of a pair: who may run, and what a side may ask to change (rules 20–27).
//!
//! A [`Record`] says who may release output. Every change is a compare-and-swap from the
//! generation the caller knows to the next one. The types admit no impossible pair: a shadow is
//! always on the holder's other side, a stopped pair has no holder, and only a protected one has a
//! shadow. The rules themselves are `ax_arbiter::rules`.

mod codec;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

pub use self::codec::SideOf;
use crate::ids::{EpochId, Generation, Incarnation, MachineId, PairId, Side};

/// One process of one side: the only thing that is ever granted anything.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct Member {
    /// Which host.
    pub side: Side,
    /// Which run of its process.
    pub incarnation: Incarnation,
}

/// One witness and one life of its store. A wiped or new store has another `store` (rule 27).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct WitnessId {
    /// The witness, for its whole life.
    pub identity: [u8; 16],
    /// Its store, made when the store was created.
    pub store: [u8; 16],
}

/// Who decides for a pair. Exactly one is active, named in the record (rule 27).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Arbiter {
    /// Only an operator.
    Operator,
    /// A witness, with the store it had when it came to know the pair.
    Witness(WitnessId),
}

/// Which sides hold the current disks.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Copies {
    /// Both: the VM may start on either.
    Both,
    /// One side alone; the other's copy is stale (I4).
    Only(Side),
    /// None: the only current one went with a machine that was replaced. An operator's word starts another.
    Lost,
}

/// Where a FLUSH must be durable before it completes (`disk.secondary`, rule 15).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Flush {
    /// On the holder's disk.
    Local,
    /// On both disks: after a crash of both hosts either may start.
    Both,
}

/// What the pair is doing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum State {
    /// Fault tolerant: the holder releases what the shadow has acknowledged; the shadow, in sync,
    /// may take over.
    Ft {
        /// Who may release.
        holder: Member,
        /// The in-sync shadow's process; its side is the other one.
        shadow: Incarnation,
        /// Where its FLUSHes are durable.
        flush: Flush,
    },
    /// The holder releases without acknowledgements; nobody may take over.
    Alone {
        /// Who may release.
        holder: Member,
    },
    /// Nobody runs; stopped in order or never started (rule 26).
    Stopped {
        /// Last epoch committed.
        epoch: EpochId,
        /// Whose disks are current and durable.
        current: Copies,
    },
}

/// Which machine is which side, once the one before was replaced, which then is no side any more; before, any
/// that is trusted may be.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    Encode,
    Decode,
)]
pub struct Machines([Option<MachineId>; 2]);

impl Machines {
    /// True when another machine than this one is known to be that side.
    pub fn name_another(self, side: Side, machine: Option<MachineId>) -> bool {
        let known = self.0[side as usize];
        known.is_some() && known != machine
    }

    /// True when this machine is known to be that side.
    pub fn name(self, side: Side, machine: MachineId) -> bool {
        self.0[side as usize] == Some(machine)
    }

    /// The same, with this machine as that side.
    #[must_use]
    pub fn with(mut self, side: Side, machine: MachineId) -> Machines {
        self.0[side as usize] = Some(machine);
        self
    }

    /// No machine was ever replaced.
    pub fn are_unnamed(&self) -> bool {
        *self == Machines::default()
    }
}

/// The arbiter's record of a pair. Its binary form without machines is that of builds which know of none
/// (decisions/0024): they read it, and refuse one that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// Counts changes.
    pub generation: Generation,
    /// Who decides.
    pub arbiter: Arbiter,
    /// Whose request made this record; none when it was registered by both sides.
    pub by: Option<Member>,
    /// What holds.
    pub state: State,
    /// Which machines the sides are.
    #[serde(default, skip_serializing_if = "Machines::are_unnamed")]
    pub machines: Machines,
}

/// A change one side asks for.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Change {
    /// Out of FT: the holder drops its shadow, or the in-sync shadow takes over (rules 21, 22).
    /// The shadow asks only when everything it has acknowledged is applied and durable: the
    /// record will say that its disk is the current one, whatever happens to it next.
    TakeSolo,
    /// Into FT with this process of the other side as shadow, memory and disk in sync (rule 22).
    EnterFt {
        /// The shadow's process.
        shadow: Incarnation,
        /// Where FLUSHes are durable from now on. With [`Flush::Both`] the shadow's disk must be
        /// durable already.
        flush: Flush,
    },
    /// Planned failover: the in-sync shadow becomes holder, the caller its shadow (rule 25).
    Handover,
    /// Orderly stop by the holder (rule 26).
    Stop {
        /// Last epoch committed.
        epoch: EpochId,
        /// Whose disks are current and durable.
        current: Copies,
    },
    /// Start a stopped pair, or start cold after a crash, on a side whose copy is current
    /// (rule 23). The caller must already have made sure that no older process of its own side
    /// runs (rule 17). If the record it starts from is FT and the holder was the other side, its
    /// first output waits until the holder's permission is over (rule 24).
    Start,
    /// Start on this side whatever the record says, by an operator who has read the loss and
    /// knows that the other side is down (rule 23).
    StartByOperator,
    /// Another arbiter decides from now on; this one then grants nothing (rule 27). Both
    /// sides must be current.
    MoveArbiter {
        /// The next one.
        to: Arbiter,
    },
    /// The other side's machine is gone for good and this one takes its place, with no copy of anything: what
    /// the old one had counts as lost. Asked in the name of the process that runs alone, of which then
    /// nothing changes, the generation neither; or in nobody's, where no process of this side lives.
    Replace {
        /// The new machine.
        machine: MachineId,
        /// An operator says that the old one is dead, and has read what is lost with it.
        word: bool,
    },
}

/// One side's request to change the record of a pair. Its binary form without a machine is that of builds
/// which know of none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Request {
    /// Which pair.
    pub pair: PairId,
    /// Who asks.
    pub caller: Member,
    /// On which machine; none where it has not been told, or is not understood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// The generation it knows.
    pub from: Generation,
    /// What it asks for.
    pub change: Change,
}

/// The arbiter's answer to a [`Request`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Decision {
    /// Granted now; durable before the answer was sent.
    Granted(Record),
    /// Granted to this very caller before; its answer may have been lost.
    Already(Record),
    /// Nothing changed.
    Refused(Refusal),
}

/// Why nothing changed, and what holds instead.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct Refusal {
    /// The record as it stands; none when the arbiter does not know the pair.
    pub record: Option<Record>,
    /// Why.
    pub why: Why,
}

/// Why a request was refused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Why {
    /// The arbiter does not know the pair: both sides must register (rule 27).
    UnknownPair,
    /// The record has moved on from the generation the caller knows.
    Stale,
    /// The caller knows a later generation than the arbiter: the arbiter's store is old.
    StoreBehind,
    /// Only the holder may ask for this.
    NotHolder,
    /// The caller is neither the holder nor exactly the in-sync shadow of the record.
    NotInSync,
    /// The pair is not in FT.
    NotProtected,
    /// The pair is stopped.
    NotRunning,
    /// The pair is in FT already; the holder must leave it first.
    Protected,
    /// The caller's side does not hold the current copy; starting there loses this.
    NotCurrent(Loss),
    /// The claimed copies do not follow from the record.
    Copies,
    /// The record names another arbiter.
    OtherArbiter,
    /// No arbiter but an operator: this needs the operator's word or the peer's agreement.
    NeedsOperator,
    /// The generation cannot grow any more.
    Exhausted,
    /// Another machine is the caller's side.
    Replaced,
    /// The other host runs the VM, as far as the record says.
    OtherHolds,
}

/// What starting on a side that is not current would lose.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct Loss {
    /// The side that has what would be lost.
    pub side: Side,
    /// Since when its copy is the only current one.
    pub since: Generation,
}

impl Record {
    /// The record with which both sides of a newly defined pair register: generation 0, stopped.
    pub fn defined(current: Copies, arbiter: Arbiter) -> Record {
        Record {
            generation: Generation(0),
            arbiter,
            by: None,
            state: State::Stopped {
                epoch: EpochId(0),
                current,
            },
            machines: Machines::default(),
        }
    }

    /// Who may release, if anyone.
    pub fn holder(&self) -> Option<Member> {
        match self.state {
            State::Ft { holder, .. } | State::Alone { holder } => Some(holder),
            State::Stopped { .. } => None,
        }
    }

    /// The in-sync shadow, if there is one.
    pub fn shadow(&self) -> Option<Member> {
        match self.state {
            State::Ft { holder, shadow, .. } => Some(Member {
                side: holder.side.other(),
                incarnation: shadow,
            }),
            State::Alone { .. } | State::Stopped { .. } => None,
        }
    }

    /// True when both records say the same about the pair, whoever the arbiter is.
    pub fn agrees_with(&self, other: &Record) -> bool {
        (self.generation, self.state) == (other.generation, other.state)
    }
}

impl Decision {
    /// The record the caller may now act on, or why not.
    ///
    /// # Errors
    /// The refusal.
    pub fn granted(self) -> Result<Record, Refusal> {
        match self {
            Decision::Granted(record) | Decision::Already(record) => Ok(record),
            Decision::Refused(refusal) => Err(refusal),
        }
    }
}

impl Copies {
    /// True when `side` is current.
    pub fn has(self, side: Side) -> bool {
        match self {
            Copies::Both => true,
            Copies::Only(only) => only == side,
            Copies::Lost => false,
        }
    }
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}/{:016x}", self.side, self.incarnation.0)
    }
}

impl std::fmt::Display for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "generation {}, ", self.generation.0)?;
        match (self.state, self.shadow()) {
            (State::Ft { holder, .. }, Some(shadow)) => {
                write!(f, "ft, holder {holder}, shadow {shadow} in sync")
            }
            (State::Ft { holder, .. } | State::Alone { holder }, _) => {
                write!(f, "alone, holder {holder}")
            }
            (State::Stopped { epoch, current }, _) => {
                write!(f, "stopped at epoch {}, current on ", epoch.0)?;
                match current {
                    Copies::Both => f.write_str("both sides"),
                    Copies::Only(side) => write!(f, "side {side:?} only"),
                    Copies::Lost => f.write_str("neither side: lost with a replaced host"),
                }
            }
        }
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "what side {:?} has done since generation {}",
            self.side, self.since.0
        )
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Why::UnknownPair => f.write_str(
                "the arbiter does not know the pair: both hosts must be up and register with it",
            ),
            Why::Stale => f.write_str("the record has moved on"),
            Why::StoreBehind => f.write_str(
                "the arbiter knows less than the caller: its store was restored from an old copy; \
                 wipe it and let both hosts register",
            ),
            Why::NotHolder => f.write_str("only the holder may ask for this"),
            Why::NotInSync => f.write_str("the caller is neither holder nor in-sync shadow"),
            Why::NotProtected => f.write_str("the pair is not in FT"),
            Why::NotRunning => f.write_str("the pair is stopped"),
            Why::Protected => f.write_str("the pair is in FT already"),
            Why::NotCurrent(loss) => write!(
                f,
                "this side is not current: it waits for side {:?}; starting here by an operator's \
                 word loses {loss}",
                loss.side
            ),
            Why::Copies => f.write_str("the copies claimed current do not follow from the record"),
            Why::OtherArbiter => f.write_str("the record names another arbiter"),
            Why::NeedsOperator => f.write_str(
                "there is no witness: this needs the other host's agreement or an operator's word",
            ),
            Why::Exhausted => f.write_str("the generation cannot grow any more"),
            Why::Replaced => f.write_str(
                "this host was replaced: another machine has its place in the pair, and what this one \
                 has of the VM counts for nothing",
            ),
            Why::OtherHolds => f.write_str("the record says that the other host runs it"),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.record {
            Some(record) => write!(f, "{} ({record})", self.why),
            None => write!(f, "{}", self.why),
        }
    }
}

impl std::error::Error for Refusal {}
