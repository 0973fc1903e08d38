//! Frames on blocking streams: the two connections between the engines.
//!
//! Two half-duplex connections: forward (only the primary writes) and backward (only the shadow
//! writes), so that each has one reader and one writer and no lock is held while waiting.

use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;

use ax_wire::stream::{FrameError, FrameKind, HEADER, Header, MAX_PAYLOAD};
use ax_wire::{EpochId, Session, Version};

/// Ends both connections at once: every blocked read and write on them returns an error soon. Called
/// from any thread, more than once.
pub type Closer = Arc<dyn Fn() + Send + Sync>;

/// The primary's ends.
pub struct PrimaryLink {
    /// Written by the primary.
    pub forward: Box<dyn Write + Send>,
    /// Read by the primary.
    pub backward: Box<dyn Read + Send>,
    /// What is spoken on both.
    pub version: Version,
    /// Ends both.
    pub close: Closer,
}

/// The shadow's ends.
pub struct ShadowLink {
    /// Read by the shadow.
    pub forward: Box<dyn Read + Send>,
    /// Written by the shadow.
    pub backward: Box<dyn Write + Send>,
    /// What is spoken on both.
    pub version: Version,
    /// Ends both.
    pub close: Closer,
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer, or this side, ended it.
    #[error("the connection has ended")]
    Closed,
    /// Reading or writing failed.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
    /// The peer sent what it must not.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> LinkError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected => LinkError::Closed,
            _ => LinkError::Io(error),
        }
    }
}

/// Gathers frames into one buffer and writes it in large pieces.
pub(crate) struct FrameWriter {
    out: Box<dyn Write + Send>,
    buf: Vec<u8>,
    session: Session,
    version: Version,
    number: u32,
    /// Bytes written in all.
    pub(crate) written: u64,
}

/// What the buffer holds before it is written without being asked.
const FLUSH_AT: usize = 256 << 10;

impl FrameWriter {
    pub(crate) fn new(
        out: Box<dyn Write + Send>,
        session: Session,
        version: Version,
    ) -> FrameWriter {
        FrameWriter {
            out,
            buf: Vec::with_capacity(FLUSH_AT + HEADER + MAX_PAYLOAD),
            session,
            version,
            number: 0,
            written: 0,
        }
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn session(&self) -> Session {
        self.session
    }

    pub(crate) fn set_session(&mut self, session: Session) {
        self.session = session;
    }

    /// Adds one frame whose payload `fill` appends (at most [`MAX_PAYLOAD`] bytes).
    pub(crate) fn frame(
        &mut self,
        kind: FrameKind,
        epoch: EpochId,
        fill: impl FnOnce(&mut Vec<u8>),
    ) -> Result<usize, LinkError> {
        let fill = |out: &mut Vec<u8>| {
            fill(out);
            true
        };
        self.frame_if(kind, epoch, fill)
            .map(Option::unwrap_or_default)
    }

    /// The same if `fill` returns true, else nothing.
    pub(crate) fn frame_if(
        &mut self,
        kind: FrameKind,
        epoch: EpochId,
        fill: impl FnOnce(&mut Vec<u8>) -> bool,
    ) -> Result<Option<usize>, LinkError> {
        if self.buf.len() >= FLUSH_AT {
            self.flush()?;
        }
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; HEADER]);
        if !fill(&mut self.buf) {
            self.buf.truncate(start);
            return Ok(None);
        }
        let payload = self.buf.get(start + HEADER..).unwrap_or_default();
        let header = Header {
            version: self.version,
            kind,
            session: self.session,
            epoch,
            len: payload.len(),
            payload_crc: crc32fast::hash(payload),
            number: self.number,
        };
        if header.len > MAX_PAYLOAD {
            self.buf.truncate(start);
            return Err(FrameError::TooLong {
                kind,
                len: header.len,
            }
            .into());
        }
        if let Some(place) = self.buf.get_mut(start..start + HEADER) {
            place.copy_from_slice(&header.to_bytes());
        }
        self.number = self.number.wrapping_add(1);
        Ok(Some(header.len))
    }

    /// Writes everything gathered.
    pub(crate) fn flush(&mut self) -> Result<(), LinkError> {
        self.out.write_all(&self.buf)?;
        self.out.flush()?;
        self.written += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }
}

/// Reads frames in order.
pub(crate) struct FrameReader {
    from: BufReader<Box<dyn Read + Send>>,
    version: Version,
    number: u32,
}

impl FrameReader {
    pub(crate) fn new(from: Box<dyn Read + Send>, version: Version) -> FrameReader {
        FrameReader {
            from: BufReader::with_capacity(64 << 10, from),
            version,
            number: 0,
        }
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The next header, its place checked; the session is the caller's to check.
    pub(crate) fn header(&mut self) -> Result<Header, LinkError> {
        let mut bytes = [0; HEADER];
        self.from.read_exact(&mut bytes)?;
        let header = Header::parse(&bytes, self.version)?;
        if header.number != self.number {
            return Err(FrameError::Number {
                expected: self.number,
                got: header.number,
            }
            .into());
        }
        self.number = self.number.wrapping_add(1);
        Ok(header)
    }

    /// The payload of `header`, which was read last; `out` is exactly `header.len` bytes.
    pub(crate) fn payload(&mut self, header: &Header, out: &mut [u8]) -> Result<(), LinkError> {
        self.from.read_exact(out)?;
        header.check(out)?;
        Ok(())
    }

    /// As [`Self::payload`], appended to `out`.
    pub(crate) fn append(&mut self, header: &Header, out: &mut Vec<u8>) -> Result<(), LinkError> {
        let start = out.len();
        out.resize(start + header.len, 0);
        self.payload(header, out.get_mut(start..).unwrap_or_default())
    }
}
