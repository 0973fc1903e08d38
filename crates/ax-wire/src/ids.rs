//! Identities that every message carries (rule 5).

use serde::{Deserialize, Serialize};

/// One protected VM, named for its whole life: 16 random bytes made at `define`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub struct PairId(pub [u8; 16]);

impl std::fmt::Display for PairId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for PairId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PairId({self})")
    }
}

impl std::str::FromStr for PairId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        let mut id = [0u8; 16];
        if s.len() != 32 || !s.is_ascii() {
            return Err(ParseIdError);
        }
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| ParseIdError)?;
        }
        Ok(PairId(id))
    }
}

/// A pair identity must be 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a pair identity is 32 hexadecimal digits")]
pub struct ParseIdError;

/// One machine with its data folder: 16 random bytes made with the folder. A machine that takes another's
/// place has another one, whatever its name.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub struct MachineId(pub [u8; 16]);

impl std::fmt::Display for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MachineId({self})")
    }
}

/// One of the two hosts of a pair, fixed for life: `A` is the host whose name sorts first. A machine
/// that replaces a host for good takes its side, whatever its name.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub enum Side {
    /// The host whose name sorts first.
    A,
    /// The other.
    B,
}

impl Side {
    /// The side of the host called `me` in a pair with `peer`. Names must differ (checked at config).
    pub fn of(me: &str, peer: &str) -> Side {
        if me < peer { Side::A } else { Side::B }
    }

    /// The opposite side.
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

/// Counts changes of the arbiter's record of a pair; only a compare-and-swap makes the next one.
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
    bincode::Encode,
    bincode::Decode,
)]
pub struct Generation(pub u64);

/// One run of one `ax-vmm` process: a random number made at its start, never 0.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub struct Incarnation(pub u64);

/// Numbers epochs of a guest; grows for as long as the guest lives, across failovers too (I5).
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
    bincode::Encode,
    bincode::Decode,
)]
pub struct EpochId(pub u64);

impl EpochId {
    /// The epoch after this one. Saturates: at one epoch a microsecond that is 580,000 years away.
    pub fn next(self) -> EpochId {
        EpochId(self.0.saturating_add(1))
    }
}

/// What a stream belongs to. A message of another session is refused whole (rule 5).
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub struct Session {
    /// The pair.
    pub pair: PairId,
    /// The generation under which the sender runs.
    pub generation: Generation,
    /// The sender's process.
    pub incarnation: Incarnation,
}
