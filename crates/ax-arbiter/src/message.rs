//! What a host and a witness say to each other: framed, CRC-checked, bounded, versioned.
//!
//! A connection carries one question at a time, each answered before the next. The first must be
//! [`Ask::Hello`], which settles the version and tells the host which witness, with which store,
//! it has reached.

use std::io::{Read, Write};

use ax_wire::frame::{self, FrameError, FrameHeader, FrameKind};
use ax_wire::record::{Decision, Record, Request, WitnessId};
use ax_wire::{Generation, PairId};
use bincode::{Decode, Encode};

use crate::rules::{Registered, Registration, Standing};

/// Versions of this dialogue that this build speaks, oldest and newest.
pub const VERSIONS: Versions = Versions {
    oldest: 1,
    newest: 3,
};

/// From this version on a witness knows [`Ask::Stand`].
pub const MOVES: u16 = 2;
/// From this version on it is told on which machine a host is.
pub const MACHINES: u16 = 3;

/// A range of versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl Versions {
    /// The newest version both speak.
    pub fn common(self, other: Versions) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

impl Ask {
    /// The same, as a dialogue of this version can say it.
    #[must_use]
    pub fn in_version(mut self, version: u16) -> Ask {
        if version < MACHINES {
            match &mut self {
                Ask::Change(request) => request.machine = None,
                Ask::Register { registration, .. } | Ask::Stand { registration, .. } => {
                    registration.machine = None;
                }
                Ask::Hello(_) | Ask::Ping | Ask::Look(_) | Ask::Forget { .. } => {}
            }
        }
        self
    }
}

/// A question, numbered so that an answer cannot be taken for another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Call {
    /// Chosen by the asker, returned in the answer.
    pub id: u64,
    /// The question.
    pub ask: Ask,
}

/// What a host may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Ask {
    /// First on every connection.
    Hello(Versions),
    /// Are you there?
    Ping,
    /// What is the record of this pair?
    Look(PairId),
    /// Change it (rule 20).
    Change(Request),
    /// This is what I know of a pair (rule 27).
    Register {
        /// What the side knows.
        registration: Registration,
        /// An operator has said to take one side's word.
        by_operator: bool,
    },
    /// The pair is undefined: forget it. Only a stopped pair is forgotten.
    Forget {
        /// Which pair.
        pair: PairId,
        /// The generation the caller knows.
        from: Generation,
    },
    /// This is what I know of a pair that another arbiter decides for, or did ([`MOVES`]).
    Stand {
        /// What the side knows.
        registration: Registration,
        /// How it stands to the arbiter asked.
        standing: Standing,
    },
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Answer {
    /// The call's.
    pub id: u64,
    /// The answer.
    pub said: Said,
}

/// What a witness may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Said {
    /// To [`Ask::Hello`].
    Hello {
        /// What the connection speaks from here on.
        version: u16,
        /// Who answers, with which store.
        witness: WitnessId,
    },
    /// To [`Ask::Ping`].
    Pong,
    /// To [`Ask::Look`].
    Record(Option<Record>),
    /// To [`Ask::Change`].
    Decision(Decision),
    /// To [`Ask::Register`] and [`Ask::Stand`].
    Registered(Registered),
    /// To [`Ask::Forget`]: true when the pair is now unknown.
    Forgotten(bool),
    /// The question was not considered.
    Fault(Fault),
}

/// Why a question was not considered. Nothing was changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum Fault {
    /// No common version.
    #[error(
        "the witness speaks versions {} to {} of its protocol, this host {} to {}: upgrade the older",
        .0.oldest, .0.newest, VERSIONS.oldest, VERSIONS.newest
    )]
    Version(Versions),
    /// A question before hello, or a second hello.
    #[error("the witness expected a hello first, once")]
    Order,
    /// Another host registered this side.
    #[error("the witness knows another host as this side of the pair")]
    WrongHost,
}

/// Why a message could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The connection failed or ended.
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    /// Not a frame of this dialogue.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The frame's body is no message.
    #[error("a message that cannot be understood")]
    Malformed,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<{ FrameKind::ArbiterCall.max_len() }>()
}

/// Writes one message and flushes.
///
/// # Errors
/// The connection's.
pub fn write<T: Encode>(
    to: &mut (impl Write + ?Sized),
    kind: FrameKind,
    m: &T,
) -> Result<(), MessageError> {
    let body = bincode::encode_to_vec(m, config()).map_err(|_| MessageError::Malformed)?;
    to.write_all(&frame::frame(kind, &body)?)?;
    to.flush()?;
    Ok(())
}

/// Reads one message. Reads no further than its last byte and never more than the kind's bound.
///
/// # Errors
/// The connection's, or what is wrong with the bytes.
pub fn read<T: Decode<()>>(
    from: &mut (impl Read + ?Sized),
    kind: FrameKind,
) -> Result<T, MessageError> {
    let mut header = [0; frame::HEADER];
    from.read_exact(&mut header)?;
    let header = FrameHeader::parse(&header, kind)?;
    let mut body = vec![0; header.body_len()];
    from.read_exact(&mut body)?;
    header.check(&body)?;
    match bincode::decode_from_slice(&body, config()) {
        Ok((message, used)) if used == body.len() => Ok(message),
        _ => Err(MessageError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_wire::record::{Arbiter, Copies};
    use proptest::prelude::*;

    fn call() -> Call {
        let me = Arbiter::Witness(WitnessId {
            identity: [1; 16],
            store: [2; 16],
        });
        let registration = Registration {
            pair: PairId([7; 16]),
            side: ax_wire::Side::B,
            machine: None,
            record: Record::defined(Copies::Both, me),
        };
        Call {
            id: 9,
            ask: Ask::Register {
                registration,
                by_operator: false,
            },
        }
    }

    #[test]
    fn a_message_reads_back() {
        let mut bytes = Vec::new();
        write(&mut bytes, FrameKind::ArbiterCall, &call()).unwrap();
        assert_eq!(
            read::<Call>(&mut &bytes[..], FrameKind::ArbiterCall).unwrap(),
            call()
        );
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        let mut body = bincode::encode_to_vec(call(), config()).unwrap();
        body.push(0);
        let bytes = frame::frame(FrameKind::ArbiterCall, &body).unwrap();
        let got = read::<Call>(&mut &bytes[..], FrameKind::ArbiterCall);
        assert!(matches!(got, Err(MessageError::Malformed)));
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let v = |oldest, newest| Versions { oldest, newest };
        assert_eq!(v(1, 2).common(v(2, 3)), Some(2));
        assert_eq!(v(2, 3).common(v(1, 9)), Some(3));
        assert_eq!(v(1, 2).common(v(3, 4)), None);
    }

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let bytes = frame::frame(FrameKind::ArbiterCall, &body).unwrap();
            let _ = read::<Call>(&mut &bytes[..], FrameKind::ArbiterCall);
            let bytes = frame::frame(FrameKind::ArbiterAnswer, &body).unwrap();
            let _ = read::<Answer>(&mut &bytes[..], FrameKind::ArbiterAnswer);
        }

        #[test]
        fn any_flipped_bit_is_found(at in 0usize..40, bit in 0u8..8) {
            let mut bytes = Vec::new();
            write(&mut bytes, FrameKind::ArbiterCall, &call()).unwrap();
            // Bytes 6 and 7 of the header are ignored.
            prop_assume!(!(6..8).contains(&at));
            bytes[at] ^= 1 << bit;
            prop_assert!(read::<Call>(&mut &bytes[..], FrameKind::ArbiterCall).is_err());
        }
    }
}
