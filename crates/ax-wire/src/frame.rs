//! Small control messages: a 16-byte header and a body, each message of one kind.
//!
//! For handshakes and pairing only; the epoch stream and heartbeats have their own fixed
//! layouts. The header is checked before a byte of the body is read, so a hostile length never
//! makes the reader allocate more than the kind's bound.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

const MAGIC: [u8; 4] = *b"AXfr";

/// Bytes of a frame's header.
pub const HEADER: usize = size_of::<Raw>();

/// What a frame carries. Each kind has its own bound on the body's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// [`crate::hello::Hello`].
    Hello = 1,
    /// [`crate::hello::Verdict`].
    Verdict = 2,
    /// Whether the listener takes a channel ([`crate::channel::Answer`]).
    ChannelAnswer = 3,
    /// A message of the pairing dialogue.
    Pairing = 4,
    /// A question to a witness.
    ArbiterCall = 5,
    /// A witness's answer.
    ArbiterAnswer = 6,
    /// [`crate::peer::PeerMessage`].
    Peer = 7,
}

impl FrameKind {
    /// The longest body of this kind, bytes.
    pub const fn max_len(self) -> usize {
        match self {
            FrameKind::Hello => 256 << 10,
            FrameKind::Verdict => 64 << 10,
            FrameKind::ChannelAnswer => 2 << 10,
            FrameKind::Pairing => 4 << 10,
            FrameKind::ArbiterCall | FrameKind::ArbiterAnswer | FrameKind::Peer => 1 << 10,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    kind: little_endian::U16,
    zero: [u8; 2],
    len: little_endian::U32,
    crc: little_endian::U32,
}

/// Why a frame was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first bytes are not a frame's.
    #[error(
        "not a control message of this protocol (first bytes {0:02x?}); is the peer an AX host of a compatible version?"
    )]
    Magic([u8; 4]),
    /// Another kind was due.
    #[error("control message of kind {got} where {expected:?} was due")]
    Kind {
        /// What was due.
        expected: FrameKind,
        /// The kind read.
        got: u16,
    },
    /// Longer than its kind allows.
    #[error("{kind:?} message of {len} bytes; at most {} are allowed", kind.max_len())]
    Length {
        /// The message's kind.
        kind: FrameKind,
        /// The length announced or asked for.
        len: usize,
    },
    /// The body is not what was sent.
    #[error("{0:?} message fails its CRC32")]
    Crc(FrameKind),
}

/// A checked header: what to read next, and its CRC.
#[derive(Clone, Copy, Debug)]
pub struct FrameHeader {
    kind: FrameKind,
    len: usize,
    crc: u32,
}

impl FrameHeader {
    /// Parses a header of the `expected` kind.
    ///
    /// # Errors
    /// Wrong magic or kind, or a length above the kind's bound.
    pub fn parse(bytes: &[u8; HEADER], expected: FrameKind) -> Result<FrameHeader, FrameError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(FrameError::Magic(raw.magic));
        }
        if raw.kind.get() != expected as u16 {
            return Err(FrameError::Kind {
                expected,
                got: raw.kind.get(),
            });
        }
        let len = raw.len.get() as usize;
        if len > expected.max_len() {
            return Err(FrameError::Length {
                kind: expected,
                len,
            });
        }
        Ok(FrameHeader {
            kind: expected,
            len,
            crc: raw.crc.get(),
        })
    }

    /// Bytes of body that follow; never above the kind's bound.
    pub fn body_len(&self) -> usize {
        self.len
    }

    /// Checks the body read.
    ///
    /// # Errors
    /// The body differs from the one sent.
    pub fn check(&self, body: &[u8]) -> Result<(), FrameError> {
        if body.len() != self.len || crc32fast::hash(body) != self.crc {
            return Err(FrameError::Crc(self.kind));
        }
        Ok(())
    }
}

/// Header and body in one buffer, ready to send.
///
/// # Errors
/// A body longer than the kind allows.
pub fn frame(kind: FrameKind, body: &[u8]) -> Result<Vec<u8>, FrameError> {
    let too_long = FrameError::Length {
        kind,
        len: body.len(),
    };
    if body.len() > kind.max_len() {
        return Err(too_long);
    }
    let raw = Raw {
        magic: MAGIC,
        kind: (kind as u16).into(),
        zero: [0; 2],
        len: u32::try_from(body.len()).map_err(|_| too_long)?.into(),
        crc: crc32fast::hash(body).into(),
    };
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(raw.as_bytes());
    out.extend_from_slice(body);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bytes: &[u8], kind: FrameKind) -> Result<&[u8], FrameError> {
        let (header, body) = bytes.split_at(HEADER);
        let header = FrameHeader::parse(header.try_into().unwrap(), kind)?;
        let body = &body[..header.body_len().min(body.len())];
        header.check(body).map(|()| body)
    }

    #[test]
    fn a_length_above_the_bound_is_refused_before_the_body() {
        let mut bytes = frame(FrameKind::Pairing, b"x").unwrap();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            parse(&bytes, FrameKind::Pairing),
            Err(FrameError::Length { .. })
        ));
    }

    #[test]
    fn another_kind_is_refused() {
        let bytes = frame(FrameKind::Verdict, b"x").unwrap();
        let got = parse(&bytes, FrameKind::Hello).unwrap_err();
        assert_eq!(
            got,
            FrameError::Kind {
                expected: FrameKind::Hello,
                got: 2
            }
        );
    }

    proptest! {
        #[test]
        fn bodies_read_back(body in prop::collection::vec(any::<u8>(), 0..2000)) {
            let bytes = frame(FrameKind::Hello, &body).unwrap();
            prop_assert_eq!(parse(&bytes, FrameKind::Hello).unwrap(), &body[..]);
        }

        #[test]
        fn any_flipped_bit_is_found(at in 0usize..36, bit in 0u8..8) {
            let mut bytes = frame(FrameKind::Hello, &[0x5a; 20]).unwrap();
            prop_assume!(!(6..8).contains(&at));
            bytes[at] ^= 1 << bit;
            prop_assert!(parse(&bytes, FrameKind::Hello).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), HEADER..100)) {
            let _ = parse(&bytes, FrameKind::Hello);
        }
    }
}
