//! Heartbeats (rule 9): fixed messages on their own connection.
//!
//! Each carries its session (rule 5) and how far the sender has come, so that the receiver sees
//! a peer that lives but makes no progress. A connection that is about to end for a reason other
//! than death says so first: [`Beat::Goodbye`] or [`Beat::Broken`]. An end without either is a
//! death notice (rule 10).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use crate::{EpochId, Generation, Incarnation, PairId, Session};

const MAGIC: [u8; 4] = *b"AXhb";
const LAYOUT: u16 = 1;

/// Bytes of every heartbeat message.
pub const BEAT: usize = size_of::<Raw>();

/// How far one side has come; epochs are 0 before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Last epoch captured (primary).
    pub captured: EpochId,
    /// Last epoch staged whole (shadow).
    pub staged: EpochId,
    /// Last epoch applied (shadow).
    pub applied: EpochId,
    /// Last epoch acknowledged: sent by the shadow, received by the primary.
    pub acked: EpochId,
    /// Age of the oldest held output, ns; 0 when none is held.
    pub oldest_held_ns: u64,
    /// Whether the sender waits for something to happen.
    pub pending: bool,
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// The sender lives.
    Alive {
        /// Whose.
        session: Session,
        /// Counts messages of this sender, from 1, across its connections.
        seq: u64,
        /// How far it has come.
        progress: Progress,
        /// Nothing of the receiver reaches the sender on this connection, though on another it does: this
        /// path carries one way only. Builds that do not know it send and read it as false.
        deaf: bool,
    },
    /// The sender ends on purpose; the end of this connection is not a death.
    Goodbye(Session),
    /// The sender could not read this connection and gives it up: reconnect.
    Broken(Session),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    layout: little_endian::U16,
    kind: u8,
    pending: u8,
    pair: [u8; 16],
    generation: little_endian::U64,
    incarnation: little_endian::U64,
    seq: little_endian::U64,
    captured: little_endian::U64,
    staged: little_endian::U64,
    applied: little_endian::U64,
    acked: little_endian::U64,
    oldest_held_ns: little_endian::U64,
    deaf: u8,
    zero: [u8; 3],
    crc: little_endian::U32,
}

/// Why a heartbeat was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BeatError {
    /// Not a heartbeat.
    #[error("not a heartbeat (first bytes {0:02x?})")]
    Magic([u8; 4]),
    /// A layout this build does not know.
    #[error("heartbeat of layout {0}; this build knows {LAYOUT}")]
    Layout(u16),
    /// Damaged on the way.
    #[error("heartbeat fails its CRC32")]
    Crc,
    /// A field has an impossible value.
    #[error("heartbeat with impossible {0}")]
    Field(&'static str),
}

impl Beat {
    /// The session that every message carries.
    pub fn session(&self) -> Session {
        match self {
            Beat::Alive { session, .. } | Beat::Goodbye(session) | Beat::Broken(session) => {
                *session
            }
        }
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; BEAT] {
        let (kind, seq, p, deaf) = match self {
            Beat::Alive {
                seq,
                progress,
                deaf,
                ..
            } => (1, *seq, *progress, *deaf),
            Beat::Goodbye(_) => (2, 0, Progress::default(), false),
            Beat::Broken(_) => (3, 0, Progress::default(), false),
        };
        let session = self.session();
        let mut raw = Raw {
            magic: MAGIC,
            layout: LAYOUT.into(),
            kind,
            pending: p.pending.into(),
            pair: session.pair.0,
            generation: session.generation.0.into(),
            incarnation: session.incarnation.0.into(),
            seq: seq.into(),
            captured: p.captured.0.into(),
            staged: p.staged.0.into(),
            applied: p.applied.0.into(),
            acked: p.acked.0.into(),
            oldest_held_ns: p.oldest_held_ns.into(),
            deaf: deaf.into(),
            zero: [0; 3],
            crc: 0.into(),
        };
        raw.crc = crc32fast::hash(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &[u8; BEAT]) -> Result<Beat, BeatError> {
        let mut raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(BeatError::Magic(raw.magic));
        }
        if raw.layout.get() != LAYOUT {
            return Err(BeatError::Layout(raw.layout.get()));
        }
        let crc = raw.crc.get();
        raw.crc = 0.into();
        if crc32fast::hash(raw.as_bytes()) != crc {
            return Err(BeatError::Crc);
        }
        let session = Session {
            pair: PairId(raw.pair),
            generation: Generation(raw.generation.get()),
            incarnation: Incarnation(raw.incarnation.get()),
        };
        if session.incarnation.0 == 0 {
            return Err(BeatError::Field("incarnation"));
        }
        let flag = |byte, what| match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(BeatError::Field(what)),
        };
        let pending = flag(raw.pending, "pending flag")?;
        let deaf = flag(raw.deaf, "deaf flag")?;
        Ok(match raw.kind {
            1 => Beat::Alive {
                session,
                seq: raw.seq.get(),
                progress: Progress {
                    captured: EpochId(raw.captured.get()),
                    staged: EpochId(raw.staged.get()),
                    applied: EpochId(raw.applied.get()),
                    acked: EpochId(raw.acked.get()),
                    oldest_held_ns: raw.oldest_held_ns.get(),
                    pending,
                },
                deaf,
            },
            2 => Beat::Goodbye(session),
            3 => Beat::Broken(session),
            _ => return Err(BeatError::Field("kind")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alive() -> Beat {
        Beat::Alive {
            session: session(),
            seq: 17,
            progress: Progress {
                captured: EpochId(5),
                staged: EpochId(4),
                applied: EpochId(3),
                acked: EpochId(4),
                oldest_held_ns: 1_000_000,
                pending: true,
            },
            deaf: true,
        }
    }

    fn session() -> Session {
        Session {
            pair: PairId([1; 16]),
            generation: Generation(2),
            incarnation: Incarnation(3),
        }
    }

    #[test]
    fn beats_read_back() {
        for beat in [alive(), Beat::Goodbye(session()), Beat::Broken(session())] {
            assert_eq!(Beat::parse(&beat.encode()), Ok(beat));
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(at in 0usize..BEAT, bit in 0u8..8) {
            let mut bytes = alive().encode();
            bytes[at] ^= 1 << bit;
            prop_assert!(Beat::parse(&bytes).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), BEAT..=BEAT)) {
            let _ = Beat::parse(bytes.as_slice().try_into().unwrap());
        }
    }
}
