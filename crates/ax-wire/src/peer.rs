//! What the two processes of a pair tell each other besides epochs.
//!
//! Sent as frames of kind [`FrameKind::Peer`] on a connection of their own, after the handshake. The
//! primary speaks, the shadow answers each message with one of its own, so that one thread a
//! side is enough.

use std::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::frame::{FrameError, FrameKind, frame};
use crate::record::Record;
use crate::version::{Lacks, Since, Version};

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// Primary to shadow: every connection of the session is there, the initial copy begins.
    Begin,
    /// Primary to shadow: the arbiter granted this record; known from here on.
    Known(Record),
    /// Primary to shadow: this record makes you the holder (rule 25).
    HandOver(Record),
    /// Primary to shadow, parked: apply every committed epoch and make the disks durable.
    Settle,
    /// Shadow to primary, in answer to a hand-over: the guest runs here.
    Running,
    /// Shadow to primary: it could not be done, and nothing has left.
    CouldNot,
    /// Shadow to primary, in answer to anything else: understood.
    Done,
    /// Primary to shadow: stopped in order by this record (rule 26).
    Stopped(Record),
    /// The one that handed over to the one that now runs: it is the shadow from here on, in sync at
    /// the final epoch, and is to be dialled at one of these addresses (rule 25).
    Follow(Vec<SocketAddr>),
    /// Primary to shadow: the VM is not to be protected any more, by an operator's order; this record
    /// lets the primary run alone.
    Dismissed(Record),
    /// The one that handed over, which has heard [`PeerMessage::Running`]: from here on it waits as a shadow
    /// does before it asks for the VM, so that the one that now runs may show outputs (rules 24, 25).
    Show,
}

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The body can't be read.
    #[error("message of the peer process: {0}")]
    Body(String),
    /// The version spoken on this connection has no such message.
    #[error(transparent)]
    Lacks(#[from] Lacks),
    /// The frame can't be made.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Most bytes of a message's body.
const MAX: usize = FrameKind::Peer.max_len();

impl Since for PeerMessage {
    fn since(&self) -> Version {
        match self {
            PeerMessage::Begin
            | PeerMessage::Known(_)
            | PeerMessage::HandOver(_)
            | PeerMessage::Settle
            | PeerMessage::Running
            | PeerMessage::CouldNot
            | PeerMessage::Done
            | PeerMessage::Stopped(_)
            | PeerMessage::Follow(_)
            | PeerMessage::Dismissed(_) => Version::FIRST,
            PeerMessage::Show => Version::SECOND,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            PeerMessage::Begin => "begin",
            PeerMessage::Known(_) => "known",
            PeerMessage::HandOver(_) => "hand over",
            PeerMessage::Settle => "settle",
            PeerMessage::Running => "running",
            PeerMessage::CouldNot => "could not",
            PeerMessage::Done => "done",
            PeerMessage::Stopped(_) => "stopped",
            PeerMessage::Follow(_) => "follow",
            PeerMessage::Dismissed(_) => "dismissed",
            PeerMessage::Show => "show",
        }
    }
}

impl PeerMessage {
    /// Header and body, ready to send on a connection of this version.
    ///
    /// # Errors
    /// [`PeerError::Lacks`]; no other in practice: a message is far smaller than its bound.
    pub fn encode(&self, version: Version) -> Result<Vec<u8>, PeerError> {
        version.has(self)?;
        let config = bincode::config::standard().with_limit::<MAX>();
        let body =
            bincode::encode_to_vec(self, config).map_err(|e| PeerError::Body(e.to_string()))?;
        Ok(frame(FrameKind::Peer, &body)?)
    }

    /// Reads a body, all of it, from a connection of this version.
    ///
    /// # Errors
    /// [`PeerError::Body`], [`PeerError::Lacks`].
    pub fn parse(body: &[u8], version: Version) -> Result<PeerMessage, PeerError> {
        let config = bincode::config::standard().with_limit::<MAX>();
        let (message, used): (PeerMessage, _) =
            bincode::decode_from_slice(body, config).map_err(|e| PeerError::Body(e.to_string()))?;
        if used != body.len() {
            return Err(PeerError::Body(format!(
                "{} bytes too many",
                body.len() - used
            )));
        }
        version.has(&message)?;
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WIRE_VERSION;
    use crate::frame::HEADER;
    use crate::record::{Arbiter, Copies};
    use proptest::prelude::*;

    #[test]
    fn a_message_reads_back_and_nothing_may_follow_it() {
        let record = Record::defined(Copies::Both, Arbiter::Operator);
        let at = ["192.0.2.1:7000", "[2001:db8::1]:7000"].map(|a| a.parse().unwrap());
        for message in [
            PeerMessage::HandOver(record),
            PeerMessage::Follow(at.to_vec()),
        ] {
            let mut bytes = message.encode(WIRE_VERSION).unwrap();
            let read = PeerMessage::parse(&bytes[HEADER..], WIRE_VERSION);
            assert_eq!(read, Ok(message));
            bytes.push(0);
            assert!(PeerMessage::parse(&bytes[HEADER..], WIRE_VERSION).is_err());
        }
    }

    #[test]
    fn what_the_version_lacks_is_neither_sent_nor_read() {
        let newer = PeerMessage::Show;
        let bytes = newer.encode(Version::SECOND).unwrap();
        assert!(matches!(
            newer.encode(Version::FIRST),
            Err(PeerError::Lacks(_))
        ));
        let read = |version| PeerMessage::parse(&bytes[HEADER..], version);
        assert!(matches!(read(Version::FIRST), Err(PeerError::Lacks(_))));
        assert_eq!(read(Version::SECOND), Ok(newer));
    }

    /// What a build of version 1 sends for these, byte for byte: it must be understood for as long as that
    /// version is spoken, and must not change meanwhile.
    #[test]
    fn messages_of_version_1_are_what_they_were() {
        let record = Record::defined(Copies::Both, Arbiter::Operator);
        let known = [0, 0, 0, 2, 0, 0];
        let of = |message: PeerMessage, kind: u8, rest: &[u8]| {
            let bytes = message.encode(Version::FIRST).unwrap();
            assert_eq!(bytes[HEADER..], [&[kind], rest].concat(), "{message:?}");
        };
        of(PeerMessage::Begin, 0, &[]);
        of(PeerMessage::Known(record), 1, &known);
        of(PeerMessage::HandOver(record), 2, &known);
        of(PeerMessage::Settle, 3, &[]);
        of(PeerMessage::Running, 4, &[]);
        of(PeerMessage::CouldNot, 5, &[]);
        of(PeerMessage::Done, 6, &[]);
        of(PeerMessage::Stopped(record), 7, &known);
        let at = "192.0.2.1:7000".parse().unwrap();
        let rest = [1, 0, 192, 0, 2, 1, 251, 88, 27];
        of(PeerMessage::Follow(vec![at]), 8, &rest);
        of(PeerMessage::Dismissed(record), 9, &known);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = PeerMessage::parse(&bytes, WIRE_VERSION);
        }
    }
}
