//! The rules by which an arbiter decides (rules 20–27), as pure functions of its record.

use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Flush, Loss, Member, Record, Refusal, Request, SideOf,
    State, Why,
};
use ax_wire::{EpochId, Generation, MachineId, PairId, Side};
use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Decides on one request to the arbiter `me`, whose record of the pair is `record`.
///
/// A granted record must be durable before the answer leaves. The same caller asking for the
/// same again, its answer lost, gets [`Decision::Already`]; so a client may ask until it is
/// answered, and a copy of a request that arrives late changes nothing.
pub fn decide(me: Arbiter, record: Option<&Record>, request: &Request) -> Decision {
    let refused = |why| {
        Decision::Refused(Refusal {
            record: record.copied(),
            why,
        })
    };
    let Some(record) = record else {
        return refused(Why::UnknownPair);
    };
    let side = request.caller.side;
    if record.machines.name_another(side, request.machine) {
        return refused(Why::Replaced);
    }
    let Some(next) = request.from.0.checked_add(1).map(Generation) else {
        return refused(Why::Exhausted);
    };
    if record.generation == next && was_made_by(record, request) {
        return Decision::Already(*record);
    }
    if record.arbiter != me {
        return refused(Why::OtherArbiter);
    }
    if request.from < record.generation {
        return refused(Why::Stale);
    }
    if request.from > record.generation {
        return refused(Why::StoreBehind);
    }
    let state = match next_state(record, request) {
        Ok(state) => state,
        Err(why) => return refused(why),
    };
    let arbiter = match request.change {
        Change::MoveArbiter { to } => to,
        _ => me,
    };
    let mut machines = record.machines;
    if let Change::Replace { machine, .. } = request.change {
        machines = machines.with(side.other(), machine);
        if record.holder() == Some(request.caller) {
            // It runs alone, and goes on by the generation it knows.
            return Decision::Granted(Record {
                machines,
                ..*record
            });
        }
    }
    Decision::Granted(Record {
        generation: next,
        arbiter,
        by: Some(request.caller),
        state,
        machines,
    })
}

/// True when this very request, or one of the same caller with the same outcome, made the record.
pub fn was_made_by(record: &Record, request: &Request) -> bool {
    let caller = request.caller;
    record.by == Some(caller)
        && match request.change {
            Change::TakeSolo | Change::Start | Change::StartByOperator => {
                record.state == State::Alone { holder: caller }
            }
            Change::EnterFt { shadow, flush } => {
                record.state
                    == State::Ft {
                        holder: caller,
                        shadow,
                        flush,
                    }
            }
            Change::Handover => record.shadow() == Some(caller),
            Change::Stop { epoch, current } => record.state == State::Stopped { epoch, current },
            Change::MoveArbiter { to } => record.arbiter == to,
            Change::Replace { machine, .. } => record.machines.name(caller.side.other(), machine),
        }
}

/// What holds after the change, or why it is refused. The generation has been compared.
fn next_state(record: &Record, request: &Request) -> Result<State, Why> {
    let caller = request.caller;
    match request.change {
        Change::TakeSolo => take_solo(record, caller),
        Change::EnterFt { shadow, flush } => match record.state {
            State::Alone { holder } if holder == caller => Ok(State::Ft {
                holder,
                shadow,
                flush,
            }),
            State::Alone { .. } => Err(Why::NotHolder),
            State::Ft { .. } => Err(Why::Protected),
            State::Stopped { .. } => Err(Why::NotRunning),
        },
        Change::Handover => match record.state {
            State::Ft {
                holder,
                shadow,
                flush,
            } if holder == caller => Ok(State::Ft {
                holder: Member {
                    side: holder.side.other(),
                    incarnation: shadow,
                },
                shadow: holder.incarnation,
                flush,
            }),
            State::Ft { .. } => Err(Why::NotHolder),
            State::Alone { .. } => Err(Why::NotProtected),
            State::Stopped { .. } => Err(Why::NotRunning),
        },
        Change::Stop { epoch, current } => {
            let holder = record.holder().ok_or(Why::NotRunning)?;
            let protected = record.shadow().is_some();
            match current {
                _ if holder != caller => Err(Why::NotHolder),
                Copies::Lost => Err(Why::Copies),
                // The holder says which disks it has seen made durable.
                _ if protected => Ok(State::Stopped { epoch, current }),
                Copies::Only(side) if side == caller.side => Ok(State::Stopped { epoch, current }),
                _ => Err(Why::Copies),
            }
        }
        Change::Start => match not_current(record, caller.side) {
            None => Ok(State::Alone { holder: caller }),
            Some(loss) => Err(Why::NotCurrent(loss)),
        },
        Change::StartByOperator => Ok(State::Alone { holder: caller }),
        Change::MoveArbiter { .. } => match record.state {
            State::Ft { holder, .. } if holder != caller => Err(Why::NotHolder),
            State::Ft { .. }
            | State::Stopped {
                current: Copies::Both,
                ..
            } => Ok(record.state),
            State::Alone { .. } | State::Stopped { .. } => Err(Why::NotProtected),
        },
        Change::Replace { word, .. } => without_the_other(record, caller, word),
    }
}

/// What is left of a pair on `side` when the other side's machine is gone for good. The machine that comes in
/// its place has no copy of anything, so none is current there (I4). By `word` an operator knows that the old
/// one is dead and what is lost with it.
fn without_the_other(record: &Record, caller: Member, word: bool) -> Result<State, Why> {
    let side = caller.side;
    let loss = not_current(record, side);
    if let (Some(loss), false) = (loss, word) {
        return Err(Why::NotCurrent(loss));
    }
    if record.shadow().is_some() && record.holder() == Some(caller) {
        return Err(Why::Protected);
    }
    let held_there = record.holder().is_some_and(|holder| holder.side != side);
    if held_there && !word {
        return Err(Why::OtherHolds);
    }
    let current = match loss {
        None => Copies::Only(side),
        Some(_) => Copies::Lost,
    };
    Ok(match record.state {
        State::Ft { holder, .. } | State::Alone { holder } if !held_there => {
            State::Alone { holder }
        }
        State::Stopped { epoch, .. } => State::Stopped { epoch, current },
        State::Ft { .. } | State::Alone { .. } => State::Stopped {
            epoch: EpochId(0),
            current,
        },
    })
}

/// Out of FT: whichever of the two members of the record asks first (rules 20–22). A process of
/// the shadow's side that is not exactly the one named is stale (rule 23, I4).
fn take_solo(record: &Record, caller: Member) -> Result<State, Why> {
    match record.state {
        State::Ft { holder, .. } if holder == caller => Ok(State::Alone { holder: caller }),
        State::Ft { .. } if record.shadow() == Some(caller) => Ok(State::Alone { holder: caller }),
        State::Ft { .. } => Err(Why::NotInSync),
        State::Alone { .. } => Err(Why::NotProtected),
        State::Stopped { .. } => Err(Why::NotRunning),
    }
}

/// What a cold start on `side` would lose; none when its copy is current (rule 23). An operator
/// is shown this before giving the word.
pub fn not_current(record: &Record, side: Side) -> Option<Loss> {
    let current = match record.state {
        State::Ft {
            flush: Flush::Both, ..
        } => true,
        State::Ft { holder, .. } | State::Alone { holder } => holder.side == side,
        State::Stopped { current, .. } => current.has(side),
    };
    (!current).then(|| Loss {
        side: side.other(),
        since: record.generation,
    })
}

/// What one side says it knows, so that an arbiter that does not know the pair may learn it.
/// Its binary form without a machine is that of builds which know of none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Which pair.
    pub pair: PairId,
    /// Which side says so.
    pub side: Side,
    /// On which machine; none where it has not been told.
    pub machine: Option<MachineId>,
    /// The latest record it knows.
    pub record: Record,
}

impl Encode for Registration {
    fn encode<E: Encoder>(&self, to: &mut E) -> Result<(), EncodeError> {
        self.pair.encode(to)?;
        SideOf::new(self.side, self.machine).encode(to)?;
        self.record.encode(to)
    }
}

impl<C> Decode<C> for Registration {
    fn decode<D: Decoder<Context = C>>(from: &mut D) -> Result<Self, DecodeError> {
        let pair = PairId::decode(from)?;
        let of = SideOf::decode(from)?;
        Ok(Registration {
            pair,
            side: of.side(),
            machine: of.machine(),
            record: Record::decode(from)?,
        })
    }
}

bincode::impl_borrow_decode!(Registration);

impl Registration {
    /// True when another machine is known to be this side, by the arbiter's record or by its own: it was
    /// replaced, and registers nothing.
    pub fn is_replaced(&self, known: Option<&Record>) -> bool {
        let records = [known, Some(&self.record)];
        let mut records = records.into_iter().flatten();
        records.any(|record| record.machines.name_another(self.side, self.machine))
    }
}

/// How a side stands to the arbiter it speaks to (rule 27).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub enum Standing {
    /// Another one decides for it; it would change to this one together with the other side.
    Proposes,
    /// It knows of no other arbiter.
    Registers,
    /// The arbiter it had counts for nothing any more, durably: it asks that one nothing.
    Moves,
    /// The record that the arbiter before this one granted names this one.
    TakesOver,
}

/// What one side has told an arbiter.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct Told {
    /// The latest record it knows.
    pub record: Record,
    /// How it stands to this arbiter.
    pub standing: Standing,
}

/// What came of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Registered {
    /// The arbiter knows the pair; this is its record.
    Known(Record),
    /// The other side has not registered yet: register again until it has.
    Waiting,
    /// The other side knows another record; the one with the older must learn from its peer.
    Disagrees {
        /// What the other side knows.
        other: Record,
    },
    /// The arbiter once knew a later generation of this pair.
    Behind {
        /// What it knew.
        known: Record,
    },
    /// Too many pairs, known or waiting.
    Full,
    /// To a proposal: the other side is here too and knows the same.
    Agreed {
        /// It asks nobody else any more.
        firm: bool,
    },
    /// Another machine is the caller's side.
    Replaced {
        /// What holds.
        known: Record,
    },
}

/// Hears what one side knows; `me` is the arbiter (rule 27).
///
/// `known` is its record, `other` what the other side has told it lately. Nothing becomes known
/// before both sides say the same, or an operator says so, or the arbiter before this one has made it
/// its successor by a change of the record. A pair that is known stays as it is, unless it went to
/// another arbiter and comes back later.
///
/// A pair that both sides bring from another arbiter begins one generation later: so whatever an
/// arbiter still has of a pair that left it is older than anything either side knows.
pub fn register(
    me: Arbiter,
    known: Option<&Record>,
    other: Option<&Told>,
    mine: &Told,
    by_operator: bool,
) -> Registered {
    let Told { record, standing } = *mine;
    match known {
        Some(known) if known.arbiter == me => {
            let (known_at, at) = (known.generation, record.generation);
            let named = record.arbiter == me && known_at == at;
            if standing == Standing::Registers || known_at > at || named {
                return Registered::Known(*known);
            }
        }
        Some(known) if known.generation > record.generation => {
            return Registered::Behind { known: *known };
        }
        _ => {}
    }
    let here = |record: Record| Record {
        arbiter: me,
        ..record
    };
    match (other, standing) {
        (_, Standing::TakesOver) if record.arbiter == me => Registered::Known(record),
        (_, Standing::TakesOver) => Registered::Waiting,
        _ if by_operator => Registered::Known(here(record)),
        (None, _) => Registered::Waiting,
        (Some(other), _) if !other.record.agrees_with(&record) => Registered::Disagrees {
            other: other.record,
        },
        (Some(other), Standing::Proposes) => Registered::Agreed {
            firm: other.standing != Standing::Proposes,
        },
        (Some(other), _) if other.standing == Standing::Proposes => Registered::Waiting,
        (Some(other), _) => {
            let moved = [standing, other.standing].contains(&Standing::Moves);
            let generation = record.generation.0.saturating_add(u64::from(moved));
            Registered::Known(Record {
                generation: Generation(generation),
                ..here(record)
            })
        }
    }
}

/// Whose word stands behind a change where no witness decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Nobody's.
    Nobody,
    /// The other host is connected, agrees, and has recorded the same change.
    Peer,
    /// An operator's, who knows what the other host does.
    Operator,
}

/// Decides where no witness is configured: never alone, but that who runs alone may stop: it takes
/// nothing, and nobody else may start before the hosts have met or an operator speaks.
pub fn decide_by_word(word: Word, record: Option<&Record>, request: &Request) -> Decision {
    let decision = decide(Arbiter::Operator, record, request);
    let alone = record
        .is_some_and(|r| matches!(r.state, State::Alone { holder } if holder == request.caller));
    let enough = match (word, request.change) {
        (Word::Nobody, Change::Stop { .. }) => alone,
        (Word::Nobody, _) | (Word::Peer, Change::StartByOperator | Change::Replace { .. }) => false,
        (Word::Peer | Word::Operator, _) => true,
    };
    match decision {
        Decision::Granted(_) if !enough => Decision::Refused(Refusal {
            record: record.copied(),
            why: Why::NeedsOperator,
        }),
        other => other,
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
