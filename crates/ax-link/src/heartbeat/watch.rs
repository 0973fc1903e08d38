//! The sentinel's thread. See the module's rule: no descriptor but its own, no log, no callback.

use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use ax_wire::channel::{Channel, Preamble};
use ax_wire::heartbeat::{BEAT, Beat};
use ax_wire::{Incarnation, Session};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::time::{TimeSpec, TimeValLike};

use super::detector::{Detector, Input};
use super::sentinel::{GOODBYE, Line, PeerView, RUN, Shared};
use super::table::own_table;
use super::{LinkEvent, LinkEventKind, ProgressSource, Timing, boottime_ns};
use crate::Stream;
use crate::sock::linger;
use crate::stream::Parts;

/// Messages taken in before the clock is looked at again: a flood cannot starve the rest.
const MAX_BATCH: usize = 256;
/// Limit of one dialling attempt when nothing else is due.
const DIAL: Duration = Duration::from_secs(1);
/// Longest pause between attempts.
const MAX_BACKOFF_NS: u64 = 250_000_000;
/// How long an end in order may wait for the peer to have read it.
const PARTING: Duration = Duration::from_millis(50);

/// What the thread starts from. Descriptors are numbers of the process's table.
pub(super) struct Start {
    pub(super) session: Session,
    pub(super) timing: Timing,
    pub(super) line: Line,
    pub(super) progress: Arc<dyn ProgressSource>,
    pub(super) events: Sender<LinkEvent>,
    pub(super) shared: Arc<Shared>,
    pub(super) parts: Receiver<Parts>,
    pub(super) wake: RawFd,
    pub(super) handoff: RawFd,
}

/// A liveness connection and its half-done messages.
struct Wire {
    stream: Stream,
    input: [u8; BEAT],
    filled: usize,
    output: [u8; BEAT],
    /// Where the unsent rest of `output` begins; `BEAT` when there is none.
    sent: usize,
}

impl Wire {
    fn new(stream: Stream) -> io::Result<Wire> {
        stream.set_nonblocking(true)?;
        Ok(Wire {
            stream,
            input: [0; BEAT],
            filled: 0,
            output: [0; BEAT],
            sent: BEAT,
        })
    }

    /// The next whole message; `None` when there is none yet.
    fn receive(&mut self) -> io::Result<Option<[u8; BEAT]>> {
        while self.filled < BEAT {
            match self.stream.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.filled += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.filled = 0;
        Ok(Some(self.input))
    }

    /// Moves what waits; true when nothing does any more.
    fn drain(&mut self) -> io::Result<bool> {
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
    fn send(&mut self, beat: &Beat) -> io::Result<()> {
        if self.drain()? {
            self.output = beat.encode();
            self.sent = 0;
            self.drain()?;
        }
        Ok(())
    }

    /// Says a last word and ends the connection so that it arrives (bounded by `within`).
    fn part(mut self, last: &Beat, within: Duration) {
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
}

/// The thread's state.
pub(super) struct Watch {
    session: Session,
    interval_ns: u64,
    detect: Duration,
    line: Line,
    progress: Arc<dyn ProgressSource>,
    events: Sender<LinkEvent>,
    shared: Arc<Shared>,
    parts: Receiver<Parts>,
    wake: OwnedFd,
    handoff: OwnedFd,
    detector: Detector,
    wire: Option<Wire>,
    peer: Option<Incarnation>,
    seq_out: u64,
    seq_in: u64,
    next_beat: u64,
    next_dial: u64,
    backoff_ns: u64,
    /// The last batch ended at its bound: more is readable, perhaps where poll cannot see it.
    more: bool,
}

impl Watch {
    /// Takes the calling thread out of the process's file table.
    pub(super) fn begin(start: Start) -> io::Result<Watch> {
        let [wake, handoff] = own_table([start.wake, start.handoff])?;
        go_first();
        let now = boottime_ns();
        let interval = start.timing.interval.max(Duration::from_millis(1));
        let interval_ns = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX / 4);
        Ok(Watch {
            session: start.session,
            interval_ns,
            detect: start.timing.detect,
            line: start.line,
            progress: start.progress,
            events: start.events,
            shared: start.shared,
            parts: start.parts,
            wake,
            handoff,
            detector: Detector::new(&start.timing, now),
            wire: None,
            peer: None,
            seq_out: 0,
            seq_in: 0,
            next_beat: now,
            next_dial: now,
            backoff_ns: interval_ns,
            more: false,
        })
    }

    /// Watches until the end.
    pub(super) fn run(mut self) {
        // A subscriber may write to a descriptor of the process: none here (libraries log too).
        let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
        while !self.detector.is_over() {
            match self.shared.command.load(Ordering::Acquire) {
                RUN => {}
                GOODBYE => return self.say_goodbye(),
                _ => return,
            }
            if let Err(e) = self.turn() {
                let reason = e.to_string();
                self.report(LinkEvent {
                    at_ns: boottime_ns(),
                    kind: LinkEventKind::Failed { reason },
                });
                return;
            }
        }
    }

    fn say_goodbye(mut self) {
        let last = Beat::Goodbye(self.session_now());
        if let Some(wire) = self.wire.take() {
            wire.part(&last, PARTING);
        }
    }

    fn session_now(&self) -> Session {
        Session {
            generation: self.progress.generation(),
            ..self.session
        }
    }

    fn report(&self, event: LinkEvent) {
        // Nobody listens any more only when the handle is being dropped.
        let _ = self.events.send(event);
    }

    fn input(&mut self, input: Input) {
        if let Some(event) = self.detector.input(boottime_ns(), input) {
            self.report(event);
        }
    }

    /// Waits for something, then reads before it looks at the clock (see [`Detector::input`]).
    fn turn(&mut self) -> io::Result<()> {
        let (handed, readable) = self.wait()?;
        if handed {
            self.take_handed()?;
        }
        if readable || handed || self.more {
            self.take_in();
        }
        let now = boottime_ns();
        let mine = self.progress.progress(now);
        while let Some(event) = self.detector.tick(now, mine) {
            self.report(event);
        }
        if now >= self.next_beat {
            self.next_beat = (self.next_beat + self.interval_ns).max(now);
            self.beat(now);
        }
        if self.wire.is_none() && now >= self.next_dial && !self.detector.is_over() {
            self.dial(now);
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<(bool, bool)> {
        let mut due = self.next_beat;
        if let Some(silence) = self.detector.silence_due() {
            due = due.min(silence);
        }
        if self.wire.is_none() && matches!(self.line, Line::Dial(_)) {
            due = due.min(self.next_dial);
        }
        let due = if self.more { 0 } else { due };
        let timeout = i64::try_from(due.saturating_sub(boottime_ns())).unwrap_or(i64::MAX);
        let mut events = PollFlags::POLLIN;
        if self
            .wire
            .as_ref()
            .is_some_and(|w| w.sent < BEAT || w.stream.wants_write())
        {
            events |= PollFlags::POLLOUT;
        }
        let mut fds = vec![
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.handoff.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.wire
                .as_ref()
                .map(|w| PollFd::new(w.stream.as_fd(), events)),
        );
        match nix::poll::ppoll(&mut fds, Some(TimeSpec::nanoseconds(timeout)), None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok((false, false)),
            Err(e) => return Err(e.into()),
        }
        let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok((ready(1), ready(2)))
    }

    /// Receives the sockets handed over; the last one counts.
    fn take_handed(&mut self) -> io::Result<()> {
        while let Some(sock) = receive_socket(&self.handoff)? {
            // The state was sent before its socket.
            let Ok(parts) = self.parts.try_recv() else {
                return Err(io::Error::other(
                    "a socket was handed over without its state",
                ));
            };
            self.adopt(Stream::from_parts(TcpStream::from(sock), parts));
        }
        Ok(())
    }

    fn adopt(&mut self, stream: Stream) {
        match Wire::new(stream) {
            Ok(wire) => {
                self.wire = Some(wire);
                self.next_beat = boottime_ns();
                self.backoff_ns = self.interval_ns;
                self.input(Input::Connected);
            }
            Err(e) => self.input(Input::Broken(e.to_string())),
        }
    }

    /// Reads everything there is, up to a bound.
    fn take_in(&mut self) {
        self.more = true;
        for _ in 0..MAX_BATCH {
            let Some(wire) = &mut self.wire else {
                self.more = false;
                return;
            };
            let bytes = match wire.receive() {
                Ok(Some(bytes)) => bytes,
                Ok(None) => {
                    self.more = false;
                    break;
                }
                Err(e) => return self.ended(&e),
            };
            match self.understand(&bytes) {
                Ok(input @ Input::Alive(_)) => self.input(input),
                Ok(input) => {
                    // Goodbye, or the peer's word that it could not read us.
                    self.wire = None;
                    self.next_dial = boottime_ns();
                    return self.input(input);
                }
                Err(reason) => return self.give_up(reason),
            }
        }
        let Some(wire) = &mut self.wire else { return };
        if let Err(e) = wire.drain() {
            self.ended(&e);
        }
    }

    /// What a message means; an error when it is not one of this peer's.
    fn understand(&mut self, bytes: &[u8; BEAT]) -> Result<Input, String> {
        let beat = Beat::parse(bytes).map_err(|e| e.to_string())?;
        let session = beat.session();
        if session.pair != self.session.pair {
            return Err(format!("heartbeat of another pair, {}", session.pair));
        }
        if session.incarnation == self.session.incarnation {
            return Err("this side's own heartbeat came back".into());
        }
        let known = *self.peer.get_or_insert(session.incarnation);
        if session.incarnation != known {
            return Err("heartbeat of another process than before (incarnation differs)".into());
        }
        match beat {
            Beat::Goodbye(_) => Ok(Input::Goodbye),
            Beat::Broken(_) => Ok(Input::Broken("the peer could not read this side".into())),
            Beat::Alive { seq, progress, .. } => {
                if seq <= self.seq_in {
                    return Err(format!("heartbeat {seq} after {}: replayed", self.seq_in));
                }
                self.seq_in = seq;
                // A reader that holds the lock reads the one before; the next is 10 ms away.
                if let Some(mut peer) = self.shared.peer.try_lock() {
                    *peer = Some(PeerView {
                        session,
                        progress,
                        heard_at_ns: boottime_ns(),
                    });
                }
                Ok(Input::Alive(progress))
            }
        }
    }

    /// The connection ended. An end by the peer without a word is its death; an error of the way
    /// (TLS, timeout, route) is not.
    fn ended(&mut self, error: &io::Error) {
        let wire = self.wire.take();
        self.next_dial = boottime_ns();
        let input = match error.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => Input::Ended,
            _ => Input::Broken(error.to_string()),
        };
        let broken = matches!(input, Input::Broken(_));
        self.input(input);
        if let (true, Some(wire)) = (broken, wire) {
            // A TLS alert is on its way: a reset must not overtake it and read as a death.
            linger(
                wire.stream.socket(),
                Instant::now() + PARTING.min(self.detect / 10),
            );
        }
    }

    /// This side cannot read the connection: say so, so that the peer does not take its end for
    /// a death, and make another.
    fn give_up(&mut self, reason: String) {
        self.input(Input::Broken(reason));
        let last = Beat::Broken(self.session_now());
        if let Some(wire) = self.wire.take() {
            wire.part(&last, PARTING.min(self.detect / 10));
        }
        self.next_dial = boottime_ns();
    }

    fn beat(&mut self, now: u64) {
        let session = self.session_now();
        let Some(wire) = &mut self.wire else { return };
        self.seq_out += 1;
        let progress = self.progress.progress(now);
        let result = wire.send(&Beat::Alive {
            session,
            seq: self.seq_out,
            progress,
        });
        if let Err(e) = result {
            // A reset fails the write before the goodbye that came ahead of it was read.
            self.take_in();
            if self.wire.is_some() {
                self.ended(&e);
            }
        }
    }

    /// Dials once. It blocks, so it is limited to return before a silence is due.
    fn dial(&mut self, now: u64) {
        let Line::Dial(connector) = &self.line else {
            return;
        };
        let limit = match self.detector.silence_due() {
            Some(due) => Duration::from_nanos(due.saturating_sub(now)).min(DIAL),
            None => DIAL,
        };
        let preamble = Preamble::of(Channel::Heartbeat, self.session_now());
        let opened = connector.open_until(preamble, Instant::now() + limit);
        match opened {
            Ok(stream) => self.adopt(stream),
            Err(_) => {
                // A listener that does not know the session yet refuses; it may know it soon.
                self.next_dial = boottime_ns() + self.backoff_ns;
                self.backoff_ns = (self.backoff_ns * 2).min(MAX_BACKOFF_NS);
            }
        }
    }
}

/// One socket from the handing-over socket, if one is there.
fn receive_socket(from: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<()>(from.as_raw_fd(), &mut iov, Some(&mut space), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    // The handle is going away: the command says how.
    if message.bytes == 0 {
        return Ok(None);
    }
    let mut sock = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just put this descriptor into this thread's table for
                // this message; nobody else owns it.
                sock = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(sock)
}

/// A busy host must not look like a dead one: this thread sleeps nearly always, and is due when it is
/// due. Where real-time scheduling is not allowed (an ordinary user) it goes on as it is.
fn go_first() {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: `param` is valid for the call; 0 names the calling thread.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
}
