//! The ledger on TCP 7000: a record is answered for once it is written and flushed.
//!
//! Records that arrive while one batch is on its way to the disk form the next batch: one
//! write and one flush for all of them (group commit).

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write as _;

use crate::ledger::{self, GENESIS, MAX_PAYLOAD, RECORD};
use crate::stack::{Conn, Consumed, line};
use crate::virtio::blk::{Blk, MAX_DATA, Op, Ticket};

const BATCH: usize = 64;

struct Request {
    conn: usize,
    generation: u32,
    what: What,
}

enum What {
    Append(Vec<u8>),
    Read(u64),
}

enum Phase {
    Idle,
    Writing { count: usize, link: u64 },
    Flushing { count: usize, link: u64 },
    Reading { number: u64 },
}

/// The ledger of one disk.
pub struct Ledger {
    /// Number of the next record.
    tail: u64,
    link: u64,
    capacity: u64,
    queue: Vec<Request>,
    /// The front `count` of the queue are in this phase.
    phase: Phase,
    ticket: Option<Ticket>,
    buffer: Vec<u8>,
    /// No further record is taken.
    closed: bool,
}

/// The record of a guest that switched itself off because its power button was pressed.
const LAST: &[u8] = b"button";
/// The connection of a request that nobody waits for.
const NOBODY: usize = usize::MAX;

impl Ledger {
    /// Finds the tail on `disk`. The ledger has the first half of the disk's sectors.
    pub fn open(disk: &mut Blk) -> Result<Self, &'static str> {
        let capacity = disk.sectors / 2;
        let mut it = Self {
            tail: 0,
            link: GENESIS,
            capacity,
            queue: Vec::with_capacity(BATCH),
            phase: Phase::Idle,
            ticket: None,
            buffer: vec![0; BATCH * RECORD],
            closed: false,
        };
        let mut scan = vec![0; MAX_DATA];
        // The first look is small: most ledgers are new.
        let mut look = 8 * RECORD;
        'scan: while it.tail < capacity {
            let left = usize::try_from(capacity - it.tail).unwrap_or(usize::MAX);
            let n = look.min(left.saturating_mul(RECORD));
            if !disk.blocking(Op::Read, it.tail, &mut scan[..n]) {
                return Err("ledger: cannot read the disk");
            }
            for sector in scan[..n].as_chunks::<RECORD>().0 {
                match ledger::decode(it.tail, Some(it.link), sector) {
                    Some((_, link)) => (it.tail, it.link) = (it.tail + 1, link),
                    None => break 'scan,
                }
            }
            look = MAX_DATA;
        }
        Ok(it)
    }

    /// Number of the next record.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Deals with input of connection `conn`.
    pub fn serve(
        &mut self,
        conn: usize,
        generation: u32,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Consumed {
        let done = |bytes, close, wait| Consumed { bytes, close, wait };
        let (text, taken) = match line(input, MAX_PAYLOAD + 64) {
            Ok(Some(found)) => found,
            Ok(None) => return done(0, false, false),
            Err(()) => {
                out.extend_from_slice(b"ERR line too long\n");
                return done(input.len(), true, false);
            }
        };
        let (word, rest) = match text.iter().position(|b| *b == b' ') {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, &b""[..]),
        };
        let what = if word.eq_ignore_ascii_case(b"append") {
            if rest.len() > MAX_PAYLOAD {
                out.extend_from_slice(b"ERR payload longer than 480 bytes\n");
                return done(taken, false, false);
            }
            if self.closed {
                out.extend_from_slice(b"ERR the guest is about to switch itself off\n");
                return done(taken, true, false);
            }
            What::Append(rest.to_vec())
        } else if word.eq_ignore_ascii_case(b"read") {
            match core::str::from_utf8(rest)
                .ok()
                .and_then(|n| n.trim().parse::<u64>().ok())
            {
                Some(n) if n < self.tail => What::Read(n),
                Some(_) => {
                    out.extend_from_slice(b"ERR no such record\n");
                    return done(taken, false, false);
                }
                None => {
                    out.extend_from_slice(b"ERR usage: READ <number>\n");
                    return done(taken, false, false);
                }
            }
        } else if word.eq_ignore_ascii_case(b"tail") {
            out.extend_from_slice(format!("{}\n", self.tail).as_bytes());
            return done(taken, false, false);
        } else {
            out.extend_from_slice(b"ERR usage: APPEND <payload> | READ <number> | TAIL\n");
            return done(taken, false, false);
        };
        self.queue.push(Request {
            conn,
            generation,
            what,
        });
        done(taken, false, true)
    }

    /// Takes no further record but a last one of its own; whether all are written and flushed.
    pub fn close(&mut self) -> bool {
        if !core::mem::replace(&mut self.closed, true) {
            self.queue.push(Request {
                conn: NOBODY,
                generation: 0,
                what: What::Append(LAST.to_vec()),
            });
        }
        self.queue.is_empty()
    }

    /// Moves the work on the disk on and answers what is done. True if anything happened.
    pub fn poll(&mut self, disk: &mut Blk, conns: &mut [Conn]) -> bool {
        let mut active = false;
        if self.ticket.is_some() {
            match disk.take(&mut self.ticket) {
                None => return false,
                Some(good) => self.advance(good, disk, conns),
            }
            active = true;
        }
        if matches!(self.phase, Phase::Idle) && !self.queue.is_empty() {
            self.begin(disk, conns);
            active = true;
        }
        active
    }

    fn begin(&mut self, disk: &mut Blk, conns: &mut [Conn]) {
        if let What::Read(number) = self.queue[0].what {
            // SAFETY: the buffer is the ledger's own and is left alone until the ticket is taken.
            self.ticket = unsafe { disk.submit(Op::Read, number, &raw mut self.buffer[..RECORD]) };
            if self.ticket.is_some() {
                self.phase = Phase::Reading { number };
            }
            return;
        }
        let room = usize::try_from(self.capacity - self.tail).unwrap_or(usize::MAX);
        if room == 0 || disk.read_only {
            return self.answer(1, conns, |_| "ERR the disk takes no more records\n".into());
        }
        let (mut count, mut link) = (0, self.link);
        let slots = self.buffer.as_chunks_mut::<RECORD>().0;
        for (request, slot) in self.queue.iter().zip(slots).take(room) {
            let What::Append(payload) = &request.what else {
                break;
            };
            match ledger::encode(self.tail + count as u64, link, payload, slot) {
                Ok(next) => link = next,
                Err(_) => break,
            }
            count += 1;
        }
        // SAFETY: as above.
        self.ticket =
            unsafe { disk.submit(Op::Write, self.tail, &raw mut self.buffer[..count * RECORD]) };
        if self.ticket.is_some() {
            self.phase = Phase::Writing { count, link };
        }
    }

    fn advance(&mut self, good: bool, disk: &mut Blk, conns: &mut [Conn]) {
        match core::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => {}
            Phase::Reading { number } => {
                let found = self
                    .buffer
                    .first_chunk::<RECORD>()
                    .filter(|_| good)
                    .and_then(|sector| ledger::decode(number, None, sector))
                    .map(|(payload, _)| payload.to_vec());
                self.answer(1, conns, |_| match &found {
                    Some(payload) => {
                        let mut text = payload.clone();
                        text.push(b'\n');
                        text
                    }
                    None => b"ERR the record cannot be read\n".to_vec(),
                });
            }
            Phase::Writing { count, link } if good => {
                // SAFETY: a flush has no data.
                self.ticket = unsafe { disk.submit(Op::Flush, 0, &raw mut self.buffer[..0]) };
                if self.ticket.is_some() {
                    self.phase = Phase::Flushing { count, link };
                } else {
                    self.failed(count, conns);
                }
            }
            Phase::Flushing { count, link } if good => {
                let first = self.tail;
                (self.tail, self.link) = (first + count as u64, link);
                self.answer(count, conns, |i| {
                    let mut text = alloc::string::String::new();
                    // Writing to memory does not fail.
                    let _ = writeln!(text, "{}", first + i as u64);
                    text.into_bytes()
                });
            }
            Phase::Writing { count, .. } | Phase::Flushing { count, .. } => {
                self.failed(count, conns);
            }
        }
    }

    fn failed(&mut self, count: usize, conns: &mut [Conn]) {
        self.answer(count, conns, |_| {
            "ERR the disk failed; nothing recorded\n".into()
        });
    }

    /// Answers the front `count` requests.
    fn answer(&mut self, count: usize, conns: &mut [Conn], text: impl Fn(usize) -> Vec<u8>) {
        for (i, request) in self.queue.drain(..count).enumerate() {
            if let Some(conn) = conns.get_mut(request.conn)
                && conn.generation == request.generation
            {
                conn.answer(&text(i));
            }
        }
    }
}
