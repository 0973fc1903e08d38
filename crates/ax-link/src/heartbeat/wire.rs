//! One liveness connection and its half-done messages.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use ax_wire::heartbeat::{BEAT, Beat};

use crate::Stream;
use crate::sock::{linger, reset_on_close};

/// A liveness connection and its half-done messages.
pub(super) struct Wire {
    pub(super) stream: Stream,
    input: [u8; BEAT],
    filled: usize,
    /// Something came by it.
    heard: bool,
    output: [u8; BEAT],
    /// Where the unsent rest of `output` begins; `BEAT` when there is none.
    sent: usize,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> io::Result<Wire> {
        stream.set_nonblocking(true)?;
        Ok(Wire {
            stream,
            input: [0; BEAT],
            filled: 0,
            heard: false,
            output: [0; BEAT],
            sent: BEAT,
        })
    }

    /// The next whole message; `None` when there is none yet.
    pub(super) fn receive(&mut self) -> io::Result<Option<[u8; BEAT]>> {
        while self.filled < BEAT {
            match self.stream.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.filled += n;
                    self.heard = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.filled = 0;
        Ok(Some(self.input))
    }

    /// Moves what waits; true when nothing does any more.
    pub(super) fn drain(&mut self) -> io::Result<bool> {
        loop {
            let result = if self.sent < BEAT {
                self.stream
                    .write(&self.output[self.sent..])
                    .map(|n| self.sent += n)
            } else if self.stream.wants_write() {
                self.stream.flush()
            } else {
                return Ok(true);
            };
            match result {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends a message, or leaves it out when earlier ones still wait: a peer that does not read
    /// needs no backlog.
    pub(super) fn send(&mut self, beat: &Beat) -> io::Result<()> {
        if self.drain()? {
            self.output = beat.encode();
            self.sent = 0;
            self.drain()?;
        }
        Ok(())
    }

    /// Says a last word and ends the connection so that it arrives (bounded by `within`).
    pub(super) fn part(mut self, last: &Beat, within: Duration) {
        let deadline = Instant::now() + within;
        // Whatever fails here, the connection ends; the peer then sees an end without a word.
        let said = self
            .stream
            .set_nonblocking(false)
            .and_then(|()| self.stream.set_write_timeout(Some(within)))
            .and_then(|()| self.send(last));
        if said.is_ok() {
            self.stream.finish();
            linger(self.stream.socket(), deadline);
        }
    }

    /// Whether anything came by it. Who dials may give an opening up that this side has answered: an end
    /// before the first heartbeat is no death.
    pub(super) fn was_heard(&self) -> bool {
        self.heard
    }

    /// Whether something waits for room in the socket.
    pub(super) fn wants_write(&self) -> bool {
        self.sent < BEAT || self.stream.wants_write()
    }

    /// Gives the connection up without waiting, so that the peer does not take its end for a death:
    /// either the word is ahead of the end, or the end is a reset.
    pub(super) fn give_up(mut self, last: &Beat) {
        if !(self.send(last).is_ok() && self.drain().is_ok_and(|all| all)) {
            reset_on_close(self.stream.socket());
        }
    }
}
