//! The epoch stream: what the primary sends forward and the shadow sends backward.
//!
//! A frame is a fixed 64-byte header and at most [`MAX_PAYLOAD`] bytes. Header and payload have
//! their own CRC32; frames of one direction of one connection are numbered from 0, so that a frame
//! dropped, doubled or moved is found at once.
//!
//! ```text
//! forward   Bulk* DiskBasis* DiskAsk* SyncDone   then per epoch  Begin (State* | StatePatch) Pages* Disk* Outputs* End
//!           Received, Question, Granted between epochs
//! backward  Resume  then  DiskMap* DiskSums* during the initial copy  Ack  Applied  Answer  Refuse
//! ```
//!
//! Parsing has two steps: [`Header::parse`] (is this a frame of this session, and how long is its
//! payload), then the kind's own body. Both bound every length before anything is read or allocated.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes, little_endian};

use crate::{EpochId, Generation, Incarnation, PairId, Session, Version};

const MAGIC: u32 = u32::from_le_bytes(*b"AXep");

/// Largest payload of one frame, bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Bytes of a frame's header.
pub const HEADER: usize = size_of::<RawHeader>();

/// Network devices counted in an epoch's header.
pub const NICS: usize = 8;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(u8)]
pub enum FrameKind {
    /// Pages of the initial copy, applied at once: page runs.
    BulkPages = 1,
    /// Part of a piece of the disks' initial copy: disk records.
    BulkDisk = 2,
    /// The end of such a piece: its records are whole now.
    BulkDiskEnd = 3,
    /// The initial copy is complete; the first epoch follows. No payload.
    SyncDone = 4,
    /// An epoch begins: [`EpochBegin`].
    EpochBegin = 5,
    /// Part of the machine's state blocks.
    State = 6,
    /// Page runs ([`crate::runs`]).
    Pages = 7,
    /// Part of the epoch's disk records.
    Disk = 8,
    /// Part of the epoch's output records.
    Outputs = 9,
    /// The epoch is whole: [`EpochEnd`].
    EpochEnd = 10,
    /// Frames received for the guest: whole `Received` records (rule 7).
    Received = 11,
    /// "Still my shadow?" [`Nonce`] (rule 24).
    Question = 12,
    /// The arbiter granted a new generation; the frames after this carry it. Payload: none; the
    /// generation is in this header already.
    Granted = 13,
    /// "Your map of this disk?" [`DiskBasis`](crate::resync::DiskBasis) (rule 16).
    DiskBasis = 14,
    /// "Your blocks of these regions?" [`DiskAsk`](crate::resync::DiskAsk).
    DiskAsk = 15,
    /// The machine's state blocks as patches of those of the epoch before, by pieces of 4096 bytes: page runs
    /// ([`crate::runs`]), numbered from 0; bytes beyond the end count as zero. In place of [`FrameKind::State`].
    StatePatch = 16,
    /// The first word of a shadow on a new connection: [`Resume`].
    Resume = 32,
    /// Every epoch ≤ this one is staged whole: [`Progress`].
    Ack = 33,
    /// How far the shadow has applied: [`Progress`].
    Applied = 34,
    /// The answer to a question: its [`Nonce`].
    Answer = 35,
    /// The stream is refused and this connection ends: [`Refusal`].
    Refuse = 36,
    /// The answer to a [`FrameKind::DiskBasis`]: [`DiskMap`](crate::resync::DiskMap).
    DiskMap = 37,
    /// The answer to a [`FrameKind::DiskAsk`]: [`DiskSums`](crate::resync::DiskSums).
    DiskSums = 38,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    magic: little_endian::U32,
    version: little_endian::U16,
    kind: u8,
    zero: u8,
    pair: [u8; 16],
    generation: little_endian::U64,
    incarnation: little_endian::U64,
    epoch: little_endian::U64,
    len: little_endian::U32,
    payload_crc: little_endian::U32,
    number: little_endian::U32,
    header_crc: little_endian::U32,
}

/// Bytes of the header its own CRC covers: all before it.
const COVERED: usize = HEADER - 4;

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The wire version, that of its connection.
    pub version: Version,
    /// What the frame is.
    pub kind: FrameKind,
    /// The sender's session (rule 5).
    pub session: Session,
    /// The epoch it belongs to, or the last one for frames between epochs.
    pub epoch: EpochId,
    /// Payload length, bytes, at most [`MAX_PAYLOAD`].
    pub len: usize,
    /// CRC32 of the payload.
    pub payload_crc: u32,
    /// Place in its connection's direction, from 0, wrapping.
    pub number: u32,
}

/// Why a frame was refused. The connection it came on is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are wrong.
    #[error("not a frame of the epoch stream (magic {0:#010x})")]
    Magic(u32),
    /// Not in the wire version of its connection.
    #[error("a frame of wire version {got} on a connection of wire version {spoken}")]
    Version {
        /// The connection's.
        spoken: Version,
        /// The frame's.
        got: u16,
    },
    /// The header's CRC32 is wrong.
    #[error("frame {0}: header fails its CRC32")]
    HeaderCrc(u32),
    /// The payload's CRC32 is wrong.
    #[error("frame {number} ({kind:?}): payload fails its CRC32")]
    PayloadCrc {
        /// The frame.
        number: u32,
        /// Its kind.
        kind: FrameKind,
    },
    /// No such kind.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// The payload would be longer than any may be.
    #[error("{kind:?} frame of {len} bytes; at most {MAX_PAYLOAD} are allowed")]
    TooLong {
        /// Its kind.
        kind: FrameKind,
        /// Its length.
        len: usize,
    },
    /// A frame is missing, doubled or out of order.
    #[error("frame {got} where {expected} was due")]
    Number {
        /// What was due.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// A frame of another session.
    #[error("frame of session {got:?}; this stream belongs to {expected:?}")]
    Session {
        /// Whose stream this is.
        expected: Session,
        /// What the frame says.
        got: Session,
    },
    /// A payload that is not what its kind says.
    #[error("{kind:?} frame: {what}")]
    Body {
        /// Its kind.
        kind: FrameKind,
        /// What is wrong.
        what: &'static str,
    },
}

impl Header {
    /// The header's 64 bytes.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut raw = RawHeader {
            magic: MAGIC.into(),
            version: self.version.number().into(),
            kind: self.kind as u8,
            zero: 0,
            pair: self.session.pair.0,
            generation: self.session.generation.0.into(),
            incarnation: self.session.incarnation.0.into(),
            epoch: self.epoch.0.into(),
            len: u32::try_from(self.len).unwrap_or(u32::MAX).into(),
            payload_crc: self.payload_crc.into(),
            number: self.number.into(),
            header_crc: 0.into(),
        };
        raw.header_crc = crc32fast::hash(&raw.as_bytes()[..COVERED]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a header on a connection of this version. The session is the caller's to compare
    /// ([`Header::of_session`]).
    ///
    /// # Errors
    /// [`FrameError`], the first that applies in the order magic, version, CRC, kind, length.
    pub fn parse(bytes: &[u8; HEADER], version: Version) -> Result<Header, FrameError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != MAGIC {
            return Err(FrameError::Magic(raw.magic.get()));
        }
        if raw.version.get() != version.number() {
            return Err(FrameError::Version {
                spoken: version,
                got: raw.version.get(),
            });
        }
        if crc32fast::hash(&bytes[..COVERED]) != raw.header_crc.get() {
            return Err(FrameError::HeaderCrc(raw.number.get()));
        }
        let kind =
            FrameKind::try_read_from_bytes(&[raw.kind]).map_err(|_| FrameError::Kind(raw.kind))?;
        let len = raw.len.get() as usize;
        if len > MAX_PAYLOAD {
            return Err(FrameError::TooLong { kind, len });
        }
        Ok(Header {
            version,
            kind,
            session: Session {
                pair: PairId(raw.pair),
                generation: Generation(raw.generation.get()),
                incarnation: Incarnation(raw.incarnation.get()),
            },
            epoch: EpochId(raw.epoch.get()),
            len,
            payload_crc: raw.payload_crc.get(),
            number: raw.number.get(),
        })
    }

    /// Checks that the frame belongs to `expected` (rule 5).
    ///
    /// # Errors
    /// [`FrameError::Session`].
    pub fn of_session(&self, expected: Session) -> Result<(), FrameError> {
        if self.session == expected {
            return Ok(());
        }
        Err(FrameError::Session {
            expected,
            got: self.session,
        })
    }

    /// Checks a payload that was read for this header.
    ///
    /// # Errors
    /// [`FrameError::PayloadCrc`].
    pub fn check(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() == self.len && crc32fast::hash(payload) == self.payload_crc {
            return Ok(());
        }
        Err(FrameError::PayloadCrc {
            number: self.number,
            kind: self.kind,
        })
    }
}

/// Payload of [`FrameKind::EpochBegin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct EpochBegin {
    /// M: every output of epochs ≤ this has left (rule 6).
    pub released: little_endian::U64,
    /// Received frames the guest has been given so far, per network device (rule 7).
    pub rx_given: [little_endian::U64; NICS],
    /// Bytes of state that follow.
    pub state: little_endian::U64,
    /// Bytes of disk records that follow.
    pub disk: little_endian::U64,
    /// Bytes of output records that follow.
    pub outputs: little_endian::U64,
    /// Pages that follow.
    pub pages: little_endian::U64,
}

/// Payload of [`FrameKind::EpochEnd`]: what the receiver must have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct EpochEnd {
    /// Frames of the epoch, with its begin, without this one.
    pub frames: little_endian::U64,
    /// Payload bytes of those frames.
    pub bytes: little_endian::U64,
    /// Pages, zero pages included.
    pub pages: little_endian::U64,
    /// Digest of the whole RAM after this epoch, if `has_digest`.
    pub digest: little_endian::U64,
    /// 1 when there is a digest (verify mode), else 0.
    pub has_digest: little_endian::U64,
}

/// Payload of [`FrameKind::Question`] and [`FrameKind::Answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Nonce {
    /// Chosen by who asks; an answer repeats it.
    pub nonce: little_endian::U64,
}

/// Payload of [`FrameKind::Resume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Resume {
    /// 1 when an epoch is staged whole, 0 for a shadow that needs the initial copy.
    pub has_epoch: little_endian::U64,
    /// The last epoch staged whole.
    pub staged: little_endian::U64,
}

/// Payload of [`FrameKind::Ack`] and [`FrameKind::Applied`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Progress {
    /// Last epoch applied, its disk writes included.
    pub applied: little_endian::U64,
    /// Last epoch whose disk writes are durable on the shadow's disks.
    pub durable: little_endian::U64,
}

/// Why a shadow refuses a stream; payload of [`FrameKind::Refuse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(u8)]
pub enum Refusal {
    /// A frame or epoch failed a check: connect again and resume.
    Broken = 1,
    /// Another session.
    Session = 2,
    /// The shadow's memory differs from the digest: this pair must not fail over.
    Diverged = 3,
    /// The shadow's own machine or disk failed.
    Failed = 4,
}

/// Reads a fixed body.
///
/// # Errors
/// [`FrameError::Body`] when the length is not exactly the body's.
pub fn body<T: TryFromBytes + KnownLayout + Immutable>(
    kind: FrameKind,
    payload: &[u8],
) -> Result<T, FrameError> {
    T::try_read_from_bytes(payload).map_err(|_| FrameError::Body {
        kind,
        what: "not a body of this kind",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WIRE_VERSION;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            version: WIRE_VERSION,
            kind: FrameKind::Pages,
            session: Session {
                pair: PairId([7; 16]),
                generation: Generation(3),
                incarnation: Incarnation(99),
            },
            epoch: EpochId(12),
            len: 5,
            payload_crc: crc32fast::hash(b"hello"),
            number: 4,
        }
    }

    #[test]
    fn a_header_is_at_most_64_bytes_and_reads_back() {
        const { assert!(HEADER <= 64) };
        let read = Header::parse(&header().to_bytes(), WIRE_VERSION).unwrap();
        assert_eq!(read, header());
        read.check(b"hello").unwrap();
        assert!(read.check(b"hellp").is_err());
        assert!(read.check(b"hell").is_err());
    }

    #[test]
    fn each_check_has_its_own_error() {
        let bytes = header().to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = bytes;
            bytes[at] = value;
            Header::parse(&bytes, WIRE_VERSION).unwrap_err()
        };
        let resealed = |change: &dyn Fn(&mut [u8; HEADER])| {
            let mut bytes = bytes;
            change(&mut bytes);
            let crc = crc32fast::hash(&bytes[..COVERED]).to_le_bytes();
            bytes[COVERED..].copy_from_slice(&crc);
            Header::parse(&bytes, WIRE_VERSION).unwrap_err()
        };
        assert!(matches!(with(0, 0), FrameError::Magic(_)));
        for other in [0, 77, WIRE_VERSION.number() as u8 + 1] {
            let spoken = WIRE_VERSION;
            let got = u16::from(other);
            assert_eq!(with(4, other), FrameError::Version { spoken, got });
        }
        assert!(matches!(with(30, 1), FrameError::HeaderCrc(4)));
        assert!(matches!(resealed(&|b| b[6] = 99), FrameError::Kind(99)));
        assert!(matches!(
            resealed(&|b| b[51] = 1),
            FrameError::TooLong { .. }
        ));
        let mut other = header().session;
        other.generation = Generation(4);
        assert!(matches!(
            header().of_session(other),
            Err(FrameError::Session { .. })
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(
            header in prop::array::uniform32(any::<u8>()), payload in prop::collection::vec(any::<u8>(), 0..200)
        ) {
            let mut bytes = [0; HEADER];
            bytes[..32].copy_from_slice(&header);
            let _ = Header::parse(&bytes, WIRE_VERSION);
            bytes[..4].copy_from_slice(b"AXep");
            let _ = Header::parse(&bytes, WIRE_VERSION);
            let _ = body::<EpochBegin>(FrameKind::EpochBegin, &payload);
            let _ = body::<Refusal>(FrameKind::Refuse, &payload);
        }

        #[test]
        fn any_flipped_header_bit_is_found(at in 0usize..HEADER, bit in 0u8..8) {
            let mut bytes = header().to_bytes();
            bytes[at] ^= 1 << bit;
            prop_assert!(Header::parse(&bytes, WIRE_VERSION).is_err());
        }
    }
}
