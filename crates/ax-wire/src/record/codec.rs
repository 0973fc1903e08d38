//! The binary form of records and requests.
//!
//! Wire version 1 knew no machines (decisions/0024, 0025). What names none is said as that version says it, byte for
//! byte; what names one uses tags that version 1 refuses, so that nobody takes it for something else.

use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

use super::{Change, Copies, Flush, Machines, Member, Record, Request, State};
use crate::ids::{EpochId, Generation, Incarnation, MachineId, PairId, Side};

/// A side and, if it is said, its machine: as [`Side`], or with the next two tags and the machine behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SideOf {
    /// Side A.
    A,
    /// Side B.
    B,
    /// Side A on this machine.
    AOn(MachineId),
    /// Side B on this machine.
    BOn(MachineId),
}

impl SideOf {
    /// A side, on a machine if that is said.
    pub fn new(side: Side, machine: Option<MachineId>) -> SideOf {
        match (side, machine) {
            (Side::A, None) => SideOf::A,
            (Side::B, None) => SideOf::B,
            (Side::A, Some(machine)) => SideOf::AOn(machine),
            (Side::B, Some(machine)) => SideOf::BOn(machine),
        }
    }

    /// Which side.
    pub fn side(self) -> Side {
        match self {
            SideOf::A | SideOf::AOn(_) => Side::A,
            SideOf::B | SideOf::BOn(_) => Side::B,
        }
    }

    /// On which machine.
    pub fn machine(self) -> Option<MachineId> {
        match self {
            SideOf::A | SideOf::B => None,
            SideOf::AOn(machine) | SideOf::BOn(machine) => Some(machine),
        }
    }
}

/// What follows in a record after who made it: as [`State`], or with the next tag and the machines before it.
#[derive(Encode, Decode)]
enum Rest {
    Ft {
        holder: Member,
        shadow: Incarnation,
        flush: Flush,
    },
    Alone {
        holder: Member,
    },
    Stopped {
        epoch: EpochId,
        current: Copies,
    },
    Named(Machines, State),
}

impl From<&Record> for Rest {
    fn from(record: &Record) -> Rest {
        match record.state {
            state if !record.machines.are_unnamed() => Rest::Named(record.machines, state),
            State::Ft {
                holder,
                shadow,
                flush,
            } => Rest::Ft {
                holder,
                shadow,
                flush,
            },
            State::Alone { holder } => Rest::Alone { holder },
            State::Stopped { epoch, current } => Rest::Stopped { epoch, current },
        }
    }
}

impl Encode for Record {
    fn encode<E: Encoder>(&self, to: &mut E) -> Result<(), EncodeError> {
        self.generation.encode(to)?;
        self.arbiter.encode(to)?;
        self.by.encode(to)?;
        Rest::from(self).encode(to)
    }
}

impl<C> Decode<C> for Record {
    fn decode<D: Decoder<Context = C>>(from: &mut D) -> Result<Record, DecodeError> {
        let (generation, arbiter, by) = Decode::decode(from)?;
        let none = Machines::default();
        let (machines, state) = match Rest::decode(from)? {
            Rest::Ft {
                holder,
                shadow,
                flush,
            } => {
                let state = State::Ft {
                    holder,
                    shadow,
                    flush,
                };
                (none, state)
            }
            Rest::Alone { holder } => (none, State::Alone { holder }),
            Rest::Stopped { epoch, current } => (none, State::Stopped { epoch, current }),
            Rest::Named(machines, state) => (machines, state),
        };
        Ok(Record {
            generation,
            arbiter,
            by,
            state,
            machines,
        })
    }
}
bincode::impl_borrow_decode!(Record);

impl Encode for Request {
    fn encode<E: Encoder>(&self, to: &mut E) -> Result<(), EncodeError> {
        self.pair.encode(to)?;
        SideOf::new(self.caller.side, self.machine).encode(to)?;
        self.caller.incarnation.encode(to)?;
        self.from.encode(to)?;
        self.change.encode(to)
    }
}

impl<C> Decode<C> for Request {
    fn decode<D: Decoder<Context = C>>(from: &mut D) -> Result<Request, DecodeError> {
        let pair = PairId::decode(from)?;
        let of = SideOf::decode(from)?;
        let incarnation = Incarnation::decode(from)?;
        Ok(Request {
            pair,
            caller: Member {
                side: of.side(),
                incarnation,
            },
            machine: of.machine(),
            from: Generation::decode(from)?,
            change: Change::decode(from)?,
        })
    }
}
bincode::impl_borrow_decode!(Request);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Arbiter, WitnessId};
    use super::*;

    /// A record as version 1 had it.
    #[derive(Encode, Decode, PartialEq, Debug)]
    struct RecordV1 {
        generation: Generation,
        arbiter: Arbiter,
        by: Option<Member>,
        state: State,
    }

    /// A request as version 1 had it.
    #[derive(Encode, Decode, PartialEq, Debug)]
    struct RequestV1 {
        pair: PairId,
        caller: Member,
        from: Generation,
        change: Change,
    }

    fn bytes(what: impl Encode) -> Vec<u8> {
        bincode::encode_to_vec(what, bincode::config::standard()).unwrap()
    }

    fn read<T: Decode<()>>(bytes: &[u8]) -> Option<T> {
        let (what, used) = bincode::decode_from_slice(bytes, bincode::config::standard()).ok()?;
        (used == bytes.len()).then_some(what)
    }

    fn member(side: Side) -> Member {
        Member {
            side,
            incarnation: Incarnation(77_000),
        }
    }

    fn states() -> [State; 3] {
        [
            State::Ft {
                holder: member(Side::A),
                shadow: Incarnation(3),
                flush: Flush::Both,
            },
            State::Alone {
                holder: member(Side::B),
            },
            State::Stopped {
                epoch: EpochId(9),
                current: Copies::Only(Side::B),
            },
        ]
    }

    #[test]
    fn without_machines_records_are_those_of_version_1_and_with_them_it_refuses_them() {
        let id = WitnessId {
            identity: [4; 16],
            store: [5; 16],
        };
        for (state, by) in states()
            .into_iter()
            .zip([None, Some(member(Side::B)), None])
        {
            let old = RecordV1 {
                generation: Generation(700),
                arbiter: Arbiter::Witness(id),
                by,
                state,
            };
            let mut new = Record {
                generation: old.generation,
                arbiter: old.arbiter,
                by,
                state,
                machines: Machines::default(),
            };
            assert_eq!(bytes(new), bytes(&old));
            assert_eq!(read::<Record>(&bytes(&old)), Some(new));
            new.machines = new.machines.with(Side::B, MachineId([6; 16]));
            assert_eq!(read::<Record>(&bytes(new)), Some(new));
            assert_eq!(read::<RecordV1>(&bytes(new)), None);
        }
    }

    #[test]
    fn without_a_machine_requests_are_those_of_version_1_and_with_one_it_refuses_them() {
        for side in [Side::A, Side::B] {
            let old = RequestV1 {
                pair: PairId([1; 16]),
                caller: member(side),
                from: Generation(300),
                change: Change::TakeSolo,
            };
            let mut new = Request {
                pair: old.pair,
                caller: old.caller,
                machine: None,
                from: old.from,
                change: old.change,
            };
            assert_eq!(bytes(new), bytes(&old));
            assert_eq!(read::<Request>(&bytes(&old)), Some(new));
            new.machine = Some(MachineId([6; 16]));
            assert_eq!(read::<Request>(&bytes(new)), Some(new));
            assert_eq!(read::<RequestV1>(&bytes(new)), None);
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = read::<Record>(&bytes);
            let _ = read::<Request>(&bytes);
        }
    }
}
