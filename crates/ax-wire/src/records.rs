//! Records that travel with an epoch: disk writes and barriers, held outputs, received frames.
//!
//! A record is a 16-byte header and its payload, padded with zeros to 8 bytes. Records keep the
//! order in which the guest made them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes, little_endian};

use crate::Version;
use crate::version::Since;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(u8)]
pub enum RecordKind {
    /// Bytes written to disk `unit` at byte offset `at`.
    DiskWrite = 1,
    /// A FLUSH of disk `unit`: earlier writes before later ones. No payload. `at` is
    /// [`FLUSH_AWAITED`] when the guest has not been told that it is done.
    DiskFlush = 2,
    /// A frame sent by network device `unit`; `at` numbers outputs.
    Frame = 3,
    /// Console bytes at stream offset `at`.
    Console = 4,
    /// The guest powered off. No payload.
    PowerOff = 5,
    /// The guest asked for a reset. No payload.
    Reset = 6,
    /// The guest crashed. No payload.
    Crash = 7,
    /// A frame received for network device `unit`; `at` is its sequence number (rule 7).
    Received = 8,
    /// Zeros written to disk `unit` at byte offset `at` by a resync; the payload is their number, 8
    /// bytes little-endian.
    DiskZero = 9,
    /// A rotation of the dirty-region maps of all disks (rule 16): with `at` 0 one begins here; else it ends
    /// that of epoch `at`, and the payload is the 16 bytes both maps are relative to from now on.
    DiskMark = 10,
    /// A [`RecordKind::Frame`] behind the header that says what is left to be done with it
    /// ([`crate::offload`]).
    FrameWithHeader = 11,
    /// A [`RecordKind::Received`] behind such a header.
    ReceivedWithHeader = 12,
}

impl Since for RecordKind {
    fn since(&self) -> Version {
        match self {
            RecordKind::DiskWrite
            | RecordKind::DiskFlush
            | RecordKind::Frame
            | RecordKind::Console
            | RecordKind::PowerOff
            | RecordKind::Reset
            | RecordKind::Crash
            | RecordKind::Received
            | RecordKind::DiskZero
            | RecordKind::DiskMark => Version::FIRST,
            RecordKind::FrameWithHeader | RecordKind::ReceivedWithHeader => Version::SECOND,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            RecordKind::DiskWrite => "disk write",
            RecordKind::DiskFlush => "disk flush",
            RecordKind::Frame => "frame",
            RecordKind::Console => "console",
            RecordKind::PowerOff => "power off",
            RecordKind::Reset => "reset",
            RecordKind::Crash => "crash",
            RecordKind::Received => "received frame",
            RecordKind::DiskZero => "disk zeros",
            RecordKind::DiskMark => "disk mark",
            RecordKind::FrameWithHeader => "frame with offload header",
            RecordKind::ReceivedWithHeader => "received frame with offload header",
        }
    }
}

/// Place of a FLUSH that completes only once the shadow has made it durable
/// (`disk.secondary = sync`); that of any other is 0.
pub const FLUSH_AWAITED: u64 = 1;

/// What precedes each record's payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    kind: u8,
    unit: u8,
    zero: [u8; 2],
    len: little_endian::U32,
    at: little_endian::U64,
}

const HEADER: usize = size_of::<Header>();

/// Bytes a record with this payload takes in a buffer.
pub const fn record_size(payload: usize) -> usize {
    HEADER + payload.next_multiple_of(8)
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// What it is.
    pub kind: RecordKind,
    /// Which disk or network device.
    pub unit: u8,
    /// Offset or number, by kind.
    pub at: u64,
    /// Its bytes.
    pub payload: &'a [u8],
}

/// Appends a record if it fits the buffer's capacity (never grows it); false if not.
#[must_use]
pub fn push(buf: &mut Vec<u8>, record: Record<'_>) -> bool {
    let Ok(len) = u32::try_from(record.payload.len()) else {
        return false;
    };
    if record_size(record.payload.len()) > buf.capacity() - buf.len() {
        return false;
    }
    let header = Header {
        kind: record.kind as u8,
        unit: record.unit,
        zero: [0; 2],
        len: len.into(),
        at: record.at.into(),
    };
    buf.extend_from_slice(header.as_bytes());
    buf.extend_from_slice(record.payload);
    buf.resize(buf.len().next_multiple_of(8), 0);
    true
}

/// Why records could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The buffer ends inside a record.
    #[error("records are truncated at byte {0}")]
    Truncated(usize),
    /// No such kind.
    #[error("record of unknown kind {kind} at byte {at}")]
    Kind {
        /// What was read.
        kind: u8,
        /// Offset of the record.
        at: usize,
    },
}

/// Reads records one after the other; stops after the first error.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    buf: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    /// Reads from the start of `buf`.
    pub fn new(buf: &'a [u8]) -> Self {
        Records { buf, at: 0 }
    }

    /// Offset of the next record in the buffer.
    pub fn position(&self) -> usize {
        self.at
    }

    fn read(&mut self) -> Result<Record<'a>, RecordError> {
        let at = self.at;
        let rest = self.buf.get(at..).unwrap_or_default();
        let (header, rest) =
            Header::read_from_prefix(rest).map_err(|_| RecordError::Truncated(at))?;
        let kind =
            RecordKind::try_read_from_bytes(&[header.kind]).map_err(|_| RecordError::Kind {
                kind: header.kind,
                at,
            })?;
        let len = header.len.get() as usize;
        let payload = rest.get(..len).ok_or(RecordError::Truncated(at))?;
        self.at = at + record_size(len);
        Ok(Record {
            kind,
            unit: header.unit,
            at: header.at.get(),
            payload,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.buf.len() {
            return None;
        }
        let record = self.read();
        if record.is_err() {
            self.at = self.buf.len();
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_read_back_in_order() {
        let mut buf = Vec::with_capacity(4096);
        let sent = [
            Record {
                kind: RecordKind::DiskWrite,
                unit: 1,
                at: 4096,
                payload: b"hello",
            },
            Record {
                kind: RecordKind::DiskFlush,
                unit: 1,
                at: 0,
                payload: b"",
            },
            Record {
                kind: RecordKind::Frame,
                unit: 0,
                at: 7,
                payload: &[9; 60],
            },
        ];
        sent.iter().for_each(|r| assert!(push(&mut buf, *r)));
        let read: Vec<_> = Records::new(&buf).collect::<Result<_, _>>().unwrap();
        assert_eq!(read, sent);
    }

    #[test]
    fn a_record_that_does_not_fit_changes_nothing() {
        let mut buf = Vec::with_capacity(64);
        let big = vec![0; buf.capacity()];
        let record = Record {
            kind: RecordKind::Frame,
            unit: 0,
            at: 0,
            payload: &big,
        };
        assert!(!push(&mut buf, record));
        assert!(buf.is_empty());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Records::new(&bytes).for_each(drop);
        }
    }
}
