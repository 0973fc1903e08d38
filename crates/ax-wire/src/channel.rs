//! The first bytes on every connection: which channel it is and whom it belongs to.
//!
//! One listening port serves all channels, so the dialling side says what it wants and the
//! listener answers before anything else is sent. Fixed layout, so that any version can read it.
//!
//! The dialling side also says which wire versions it speaks, and the listener's yes which one is spoken
//! from there on. A build of version 1 says neither, and reads over what others say: a connection with it
//! is one of version 1, byte for byte.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use crate::{Generation, Incarnation, PairId, Session, Version, Versions};

const MAGIC: [u8; 4] = *b"AXch";
const LAYOUT: u16 = 1;

/// Bytes of a preamble.
pub const PREAMBLE: usize = size_of::<Raw>();

/// Longest reason in an [`Answer`], bytes; longer ones are cut.
pub const MAX_REASON: usize = 1024;

/// What a connection is for. Those of [`Channel::needs_session`] belong to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Channel {
    /// Epochs, primary to shadow.
    Forward = 1,
    /// Acknowledgements, shadow to primary.
    Backward = 2,
    /// Heartbeats and the death notice (rules 9, 10).
    Heartbeat = 3,
    /// Initial copy and resync of disks.
    Disk = 4,
    /// Requests between the hosts' daemons.
    Rpc = 5,
    /// Questions to a witness.
    Witness = 6,
    /// The conversation of a pair's two processes: hello, hand-over, stop.
    Peer = 7,
    /// Received frames, primary to shadow (rule 7).
    Received = 8,
}

impl Channel {
    fn parse(raw: u16) -> Option<Channel> {
        use Channel::*;
        [
            Forward, Backward, Heartbeat, Disk, Rpc, Witness, Peer, Received,
        ]
        .into_iter()
        .find(|c| *c as u16 == raw)
    }

    /// Whether the channel carries one session's messages.
    pub fn needs_session(self) -> bool {
        matches!(
            self,
            Channel::Forward
                | Channel::Backward
                | Channel::Heartbeat
                | Channel::Disk
                | Channel::Peer
                | Channel::Received
        )
    }
}

impl std::fmt::Display for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Channel::Forward => "forward",
            Channel::Backward => "backward",
            Channel::Heartbeat => "heartbeat",
            Channel::Disk => "disk",
            Channel::Rpc => "rpc",
            Channel::Witness => "witness",
            Channel::Peer => "peer",
            Channel::Received => "received",
        })
    }
}

/// Which channel a connection is, and whose. A session channel always has its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    channel: Channel,
    session: Option<Session>,
    versions: Versions,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    layout: little_endian::U16,
    channel: little_endian::U16,
    pair: [u8; 16],
    generation: little_endian::U64,
    incarnation: little_endian::U64,
    crc: little_endian::U32,
    /// Zero, as the next, in a build of version 1.
    oldest: little_endian::U16,
    newest: little_endian::U16,
}

/// Why a preamble was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The first bytes are not a preamble's.
    #[error(
        "the peer does not speak this protocol (first bytes {0:02x?}); check the address and port"
    )]
    Magic([u8; 4]),
    /// The preamble has a layout this build does not know.
    #[error("channel preamble of layout {0}; this build knows {LAYOUT}: upgrade the older host")]
    Layout(u16),
    /// Damaged on the way.
    #[error("channel preamble fails its CRC32")]
    Crc,
    /// The versions contradict each other.
    #[error("channel preamble with wire versions {0} to {1}")]
    Versions(u16, u16),
    /// No such channel.
    #[error("unknown channel kind {0}")]
    Channel(u16),
    /// A session channel without a session.
    #[error("{0} channel without a session (pair and incarnation)")]
    NoSession(Channel),
}

impl Preamble {
    /// A channel of a session.
    pub fn of(channel: Channel, session: Session) -> Preamble {
        Preamble {
            channel,
            session: Some(session),
            versions: Versions::ours(),
        }
    }

    /// A channel between the daemons.
    pub fn rpc() -> Preamble {
        Preamble {
            channel: Channel::Rpc,
            session: None,
            versions: Versions::ours(),
        }
    }

    /// A channel to a witness.
    pub fn witness() -> Preamble {
        Preamble {
            channel: Channel::Witness,
            session: None,
            versions: Versions::ours(),
        }
    }

    /// The same from a build that speaks these versions. For tests.
    #[must_use]
    pub fn speaking(self, versions: Versions) -> Preamble {
        Preamble { versions, ..self }
    }

    /// What the dialling side speaks.
    pub fn versions(&self) -> Versions {
        self.versions
    }

    /// What the connection is for.
    pub fn channel(&self) -> Channel {
        self.channel
    }

    /// The session it belongs to; always there when [`Channel::needs_session`].
    pub fn session(&self) -> Option<Session> {
        self.session
    }

    /// The bytes to send first.
    pub fn encode(&self) -> [u8; PREAMBLE] {
        let session = self.session.unwrap_or(Session {
            pair: PairId([0; 16]),
            generation: Generation(0),
            incarnation: Incarnation(0),
        });
        let said = match self.versions {
            Versions::UNSAID => [0; 2],
            versions => [versions.oldest().number(), versions.newest().number()],
        };
        let mut raw = Raw {
            magic: MAGIC,
            layout: LAYOUT.into(),
            channel: (self.channel as u16).into(),
            pair: session.pair.0,
            generation: session.generation.0.into(),
            incarnation: session.incarnation.0.into(),
            crc: 0.into(),
            oldest: said[0].into(),
            newest: said[1].into(),
        };
        raw.crc = crc32fast::hash(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a preamble. An incarnation of 0 means no session.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &[u8; PREAMBLE]) -> Result<Preamble, PreambleError> {
        let mut raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(PreambleError::Magic(raw.magic));
        }
        if raw.layout.get() != LAYOUT {
            return Err(PreambleError::Layout(raw.layout.get()));
        }
        let crc = raw.crc.get();
        raw.crc = 0.into();
        if crc32fast::hash(raw.as_bytes()) != crc {
            return Err(PreambleError::Crc);
        }
        let channel =
            Channel::parse(raw.channel.get()).ok_or(PreambleError::Channel(raw.channel.get()))?;
        let session = (raw.incarnation.get() != 0).then(|| Session {
            pair: PairId(raw.pair),
            generation: Generation(raw.generation.get()),
            incarnation: Incarnation(raw.incarnation.get()),
        });
        if channel.needs_session() && session.is_none() {
            return Err(PreambleError::NoSession(channel));
        }
        let versions = match [raw.oldest.get(), raw.newest.get()] {
            [0, 0] => Versions::UNSAID,
            [a, b] => Versions::new(a, b).ok_or(PreambleError::Versions(a, b))?,
        };
        Ok(Preamble {
            channel,
            session,
            versions,
        })
    }
}

/// The listener's answer to a preamble; a body of [`crate::frame::FrameKind::ChannelAnswer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The channel is open, and this version is spoken on it.
    Accepted(Version),
    /// It is not; why, for people.
    Refused(String),
}

impl Answer {
    /// The frame's body.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Accepted(Version::FIRST) => vec![0],
            Answer::Accepted(version) => {
                let [low, high] = version.number().to_le_bytes();
                vec![0, low, high]
            }
            Answer::Refused(why) => {
                let mut body = vec![1];
                body.extend(why.as_bytes().iter().take(MAX_REASON));
                body
            }
        }
    }

    /// Reads a body; anything but a clear yes is a no. Control characters become spaces.
    pub fn parse(body: &[u8]) -> Answer {
        let malformed = || Answer::Refused("malformed answer".into());
        match body {
            [0] => Answer::Accepted(Version::FIRST),
            [0, low, high] => Version::new(u16::from_le_bytes([*low, *high]))
                .map_or_else(malformed, Answer::Accepted),
            [1, why @ ..] => Answer::Refused(printable(why)),
            _ => malformed(),
        }
    }
}

/// Text from a peer made safe for a log or a terminal: at most [`MAX_REASON`] bytes are read.
pub fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(MAX_REASON)])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn session() -> Session {
        Session {
            pair: PairId([7; 16]),
            generation: Generation(3),
            incarnation: Incarnation(9),
        }
    }

    #[test]
    fn preambles_read_back() {
        for preamble in [
            Preamble::of(Channel::Forward, session()),
            Preamble::of(Channel::Heartbeat, session()),
            Preamble::rpc(),
            Preamble::witness(),
            Preamble::rpc().speaking(Versions::new(6, 7).unwrap()),
            Preamble::rpc().speaking(Versions::UNSAID),
        ] {
            assert_eq!(Preamble::parse(&preamble.encode()), Ok(preamble));
        }
    }

    /// As its builds wrote it: they know neither what is said of versions nor an answer with one.
    #[test]
    fn a_connection_of_version_1_is_opened_as_it_was() {
        let bytes = Preamble::rpc().speaking(Versions::UNSAID).encode();
        assert_eq!(bytes[..8], *b"AXch\x01\0\x05\0");
        assert_eq!(bytes[8..40], [0; 32]);
        let crc = crc32fast::hash(&[&bytes[..40], &[0; 8]].concat());
        assert_eq!(bytes[40..44], crc.to_le_bytes());
        assert_eq!(bytes[44..], [0; 4]);
        assert_eq!(Answer::Accepted(Version::FIRST).encode(), [0]);
    }

    #[test]
    fn versions_that_contradict_each_other_are_refused() {
        for (oldest, newest) in [(0_u16, 1_u16), (3, 2), (1, 0)] {
            let mut bytes = Preamble::rpc().encode();
            bytes[44..46].copy_from_slice(&oldest.to_le_bytes());
            bytes[46..].copy_from_slice(&newest.to_le_bytes());
            bytes[40..44].fill(0);
            let crc = crc32fast::hash(&bytes);
            bytes[40..44].copy_from_slice(&crc.to_le_bytes());
            let refused = Err(PreambleError::Versions(oldest, newest));
            assert_eq!(Preamble::parse(&bytes), refused);
        }
        let nothing = Answer::parse(&[0, 0, 0]);
        assert_eq!(nothing, Answer::Refused("malformed answer".into()));
    }

    #[test]
    fn an_answer_reads_back() {
        for answer in [
            Answer::Accepted(Version::FIRST),
            Answer::Accepted(Version::new(700).unwrap()),
            Answer::Refused("too many".into()),
        ] {
            assert_eq!(Answer::parse(&answer.encode()), answer);
        }
    }

    #[test]
    fn a_session_channel_needs_its_session() {
        let nobody = Session {
            incarnation: Incarnation(0),
            ..session()
        };
        let bytes = Preamble::of(Channel::Forward, nobody).encode();
        assert_eq!(
            Preamble::parse(&bytes),
            Err(PreambleError::NoSession(Channel::Forward))
        );
    }

    #[test]
    fn refusals_cannot_drive_a_terminal() {
        let body = Answer::Refused("no\x1b[2Jway\n".into()).encode();
        assert_eq!(Answer::parse(&body), Answer::Refused("no [2Jway ".into()));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(at in 0usize..PREAMBLE, bit in 0u8..8) {
            let mut bytes = Preamble::of(Channel::Backward, session()).encode();
            bytes[at] ^= 1 << bit;
            prop_assert!(Preamble::parse(&bytes).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform16(any::<u8>())) {
            let mut all = [0; PREAMBLE];
            all[..32].copy_from_slice(&bytes);
            all[32..48].copy_from_slice(&more);
            let _ = Preamble::parse(&all);
            let _ = Answer::parse(&bytes);
        }
    }
}
