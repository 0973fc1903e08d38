//! Control messages on a stream, each within a total deadline.

use std::io::{Read, Write};
use std::time::Instant;

use ax_wire::frame::{FrameHeader, FrameKind, HEADER, frame};

use crate::{LinkError, Stream};

/// Runs `io` on the stream with `deadline` for all of it together.
///
/// The socket's own timeout is set to what is left before each step of the message. Steps are
/// few (a header, a body), and a TLS record is read whole or not at all, so a dripping peer is
/// cut off by the number of records times the rest, never later than the deadline plus one read.
fn step<T>(
    stream: &mut Stream,
    deadline: Instant,
    what: &'static str,
    io: impl FnOnce(&mut Stream) -> std::io::Result<T>,
) -> Result<T, LinkError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let peer = stream.describe();
    if left.is_zero() {
        return Err(LinkError::Deadline { what, peer });
    }
    stream
        .set_read_timeout(Some(left))
        .and_then(|()| stream.set_write_timeout(Some(left)))
        .and_then(|()| io(stream))
        .map_err(|e| LinkError::opening(what, &peer, e))
}

/// Reads exactly `buf`, all of it by `deadline`.
pub(crate) fn read_exact(
    stream: &mut Stream,
    buf: &mut [u8],
    deadline: Instant,
    what: &'static str,
) -> Result<(), LinkError> {
    let mut filled = 0;
    while filled < buf.len() {
        match step(stream, deadline, what, |s| s.read(&mut buf[filled..]))? {
            0 => {
                return Err(LinkError::Closed {
                    peer: stream.describe(),
                });
            }
            n => filled += n,
        }
    }
    Ok(())
}

/// Writes all of `bytes` by `deadline`.
pub(crate) fn write_all(
    stream: &mut Stream,
    bytes: &[u8],
    deadline: Instant,
    what: &'static str,
) -> Result<(), LinkError> {
    step(stream, deadline, what, |s| {
        s.write_all(bytes).and_then(|()| s.flush())
    })
}

/// Sends one message.
pub(crate) fn send(
    stream: &mut Stream,
    kind: FrameKind,
    body: &[u8],
    deadline: Instant,
    what: &'static str,
) -> Result<(), LinkError> {
    let bytes = frame(kind, body).map_err(|source| LinkError::Frame {
        peer: stream.describe(),
        source,
    })?;
    write_all(stream, &bytes, deadline, what)
}

/// Receives one message of the kind due; its body.
pub(crate) fn receive(
    stream: &mut Stream,
    kind: FrameKind,
    deadline: Instant,
    what: &'static str,
) -> Result<Vec<u8>, LinkError> {
    let mut header = [0; HEADER];
    read_exact(stream, &mut header, deadline, what)?;
    let refused = |stream: &Stream, source| LinkError::Frame {
        peer: stream.describe(),
        source,
    };
    let header = FrameHeader::parse(&header, kind).map_err(|e| refused(stream, e))?;
    let mut body = vec![0; header.body_len()];
    read_exact(stream, &mut body, deadline, what)?;
    header.check(&body).map_err(|e| refused(stream, e))?;
    Ok(body)
}

/// Takes the deadlines off a stream that is open now.
pub(crate) fn no_deadline(stream: &Stream) -> Result<(), LinkError> {
    stream
        .set_read_timeout(None)
        .and_then(|()| stream.set_write_timeout(None))
        .map_err(|source| LinkError::System {
            what: "set socket timeouts",
            source,
        })
}
