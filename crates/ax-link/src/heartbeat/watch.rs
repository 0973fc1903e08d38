//! The sentinel's thread. See the module's rule: no descriptor but its own, no log, no callback.

use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use ax_wire::heartbeat::{BEAT, Beat};
use ax_wire::{Incarnation, Session};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::time::{TimeSpec, TimeValLike};

use super::detector::{Detector, Input};
use super::dial::Dialler;
use super::handoff::{Handed, receive_socket};
use super::paths::{MAX_PATHS, PathEvent, Paths};
use super::sentinel::{GOODBYE, PeerView, RUN, Shared};
use super::table::{go_first, own_table};
use super::wire::Wire;
use super::{LinkEvent, LinkEventKind, ProgressSource, Timing, boottime_ns};
use crate::Stream;
use crate::sock::linger;

/// Messages of one path taken in before the clock is looked at again: a flood cannot starve the rest.
const MAX_BATCH: usize = 256;
/// How long an end in order may wait for the peer to have read it.
const PARTING: Duration = Duration::from_millis(50);

/// What the thread starts from. Descriptors are numbers of the process's table.
pub(super) struct Start {
    pub(super) session: Session,
    pub(super) timing: Timing,
    pub(super) diallers: Vec<Dialler>,
    pub(super) progress: Arc<dyn ProgressSource>,
    pub(super) events: Sender<LinkEvent>,
    pub(super) shared: Arc<Shared>,
    pub(super) handed: Receiver<Handed>,
    pub(super) wake: RawFd,
    pub(super) handoff: RawFd,
}

/// The thread's state.
pub(super) struct Watch {
    session: Session,
    interval_ns: u64,
    detect: Duration,
    /// By path; none where the peer dials.
    diallers: Vec<Dialler>,
    progress: Arc<dyn ProgressSource>,
    events: Sender<LinkEvent>,
    shared: Arc<Shared>,
    handed: Receiver<Handed>,
    wake: OwnedFd,
    handoff: OwnedFd,
    detector: Detector,
    paths: Paths,
    /// The open connection of each path.
    wires: [Option<Wire>; MAX_PATHS],
    peer: Option<Incarnation>,
    seq_out: u64,
    /// The last heartbeat of each path: a recorded one is refused on a later connection too.
    seq_in: [u64; MAX_PATHS],
    next_beat: u64,
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
            diallers: start.diallers,
            progress: start.progress,
            events: start.events,
            shared: start.shared,
            handed: start.handed,
            wake,
            handoff,
            detector: Detector::new(&start.timing, now),
            paths: Paths::new(&start.timing),
            wires: Default::default(),
            peer: None,
            seq_out: 0,
            seq_in: [0; MAX_PATHS],
            next_beat: now,
            more: false,
        })
    }

    /// Watches until the end.
    pub(super) fn run(mut self) {
        // A subscriber may write to a descriptor of the process: none here (libraries log too).
        let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
        self.watch();
        self.shared.over.store(true, Ordering::Release);
        self.diallers
            .iter()
            .for_each(|dialler| dialler.thread.unpark());
    }

    fn watch(&mut self) {
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

    fn say_goodbye(&mut self) {
        // One on its way here would end without a word.
        let _ = self.take_handed();
        let until = Instant::now() + PARTING;
        let last = Beat::Goodbye(self.session_now());
        // Those that work first: the word on them is the one that arrives.
        for works in [true, false] {
            for (path, wire) in self.wires.iter_mut().enumerate() {
                if self.paths.state(path).works() == works
                    && let Some(wire) = wire.take()
                {
                    wire.part(&last, until.saturating_duration_since(Instant::now()));
                }
            }
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

    fn path(&self, event: Option<PathEvent>) {
        let Some(event) = event else { return };
        let (PathEvent::Lost(path, _) | PathEvent::Back(path)) = event;
        self.shared.set_path(path, self.paths.state(path));
        let kind = match event {
            PathEvent::Lost(path, how) => LinkEventKind::PathLost { path, how },
            PathEvent::Back(path) => LinkEventKind::PathBack { path },
        };
        let at_ns = boottime_ns();
        self.report(LinkEvent { at_ns, kind });
    }

    /// Waits for something, then reads before it looks at the clock (see [`Detector::input`]).
    fn turn(&mut self) -> io::Result<()> {
        let (handed, readable) = self.wait()?;
        if handed {
            self.take_handed()?;
        }
        if readable || handed || self.more {
            self.more = false;
            (0..MAX_PATHS).for_each(|path| self.take_in(path));
        }
        let now = boottime_ns();
        let mine = self.progress.progress(now);
        while let Some(event) = self.paths.tick(now) {
            self.path(Some(event));
        }
        while let Some(event) = self.detector.tick(now, mine) {
            self.report(event);
        }
        if now >= self.next_beat {
            self.next_beat = (self.next_beat + self.interval_ns).max(now);
            self.beat(now);
        }
        if !self.detector.is_over() {
            for (path, dialler) in self.diallers.iter().enumerate() {
                if self.paths.wants_dialling(path, now) && dialler.order.want() {
                    dialler.thread.unpark();
                }
            }
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<(bool, bool)> {
        let mut due = self.next_beat;
        if let Some(silence) = self.detector.silence_due() {
            due = due.min(silence);
        }
        let due = if self.more { 0 } else { due };
        let timeout = i64::try_from(due.saturating_sub(boottime_ns())).unwrap_or(i64::MAX);
        let mut fds = vec![
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.handoff.as_fd(), PollFlags::POLLIN),
        ];
        let events = |wire: &Wire| match wire.wants_write() {
            true => PollFlags::POLLIN | PollFlags::POLLOUT,
            false => PollFlags::POLLIN,
        };
        let wires = self.wires.iter().flatten();
        fds.extend(wires.map(|wire| PollFd::new(wire.stream.as_fd(), events(wire))));
        match nix::poll::ppoll(&mut fds, Some(TimeSpec::nanoseconds(timeout)), None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok((false, false)),
            Err(e) => return Err(e.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        Ok((fds.get(1).is_some_and(ready), fds.iter().skip(2).any(ready)))
    }

    /// Receives the sockets handed over; of a path the last one counts.
    fn take_handed(&mut self) -> io::Result<()> {
        while let Some(sock) = receive_socket(&self.handoff)? {
            // The state was sent before its socket.
            let Ok(Handed { path, parts }) = self.handed.try_recv() else {
                return Err(io::Error::other(
                    "a socket was handed over without its state",
                ));
            };
            self.adopt(path, Stream::from_parts(TcpStream::from(sock), parts));
        }
        Ok(())
    }

    fn adopt(&mut self, path: usize, stream: Stream) {
        if let Some(dialler) = self.diallers.get(path) {
            dialler.order.have();
        }
        let last = Beat::Broken(self.session_now());
        match (Wire::new(stream), self.wires.get_mut(path)) {
            (Ok(wire), Some(slot)) => {
                if let Some(old) = slot.replace(wire) {
                    old.give_up(&last);
                }
                let now = boottime_ns();
                self.next_beat = now;
                self.paths.opened(path, now);
                self.input(Input::Connected);
            }
            (Err(e), _) => self.input(Input::Broken(e.to_string())),
            (Ok(_), None) => {}
        }
    }

    /// Takes the connection of a path away.
    fn close(&mut self, path: usize) -> Option<Wire> {
        let event = self.paths.closed(path);
        self.path(event);
        self.wires.get_mut(path)?.take()
    }

    /// Reads everything there is on a path, up to a bound.
    fn take_in(&mut self, path: usize) {
        for _ in 0..MAX_BATCH {
            let Some(wire) = self.wires.get_mut(path).and_then(Option::as_mut) else {
                return;
            };
            let bytes = match wire.receive() {
                Ok(Some(bytes)) => bytes,
                Ok(None) => {
                    if let Err(e) = wire.drain() {
                        self.ended(path, &e);
                    }
                    return;
                }
                Err(e) => return self.ended(path, &e),
            };
            match self.understand(path, &bytes) {
                Ok((input @ Input::Alive(_), deaf)) => {
                    let event = self.paths.heard(path, boottime_ns(), deaf);
                    self.shared.set_path(path, self.paths.state(path));
                    self.path(event);
                    self.input(input);
                }
                Ok((input, _)) => {
                    // Goodbye, or the peer's word that it could not read us.
                    match input {
                        Input::Broken(_) => drop(self.close(path)),
                        _ => drop(self.wires.get_mut(path).and_then(Option::take)),
                    }
                    return self.input(input);
                }
                Err(reason) => return self.give_up(path, reason),
            }
        }
        self.more = true;
    }

    /// What a message means; an error when it is not one of this peer's.
    fn understand(&mut self, path: usize, bytes: &[u8; BEAT]) -> Result<(Input, bool), String> {
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
            Beat::Goodbye(_) => Ok((Input::Goodbye, false)),
            Beat::Broken(_) => {
                let why = "the peer could not read this side, or gave this connection up";
                Ok((Input::Broken(why.into()), false))
            }
            Beat::Alive {
                seq,
                progress,
                deaf,
                ..
            } => {
                if let Some(last) = self.seq_in.get_mut(path) {
                    if seq <= *last {
                        return Err(format!("heartbeat {seq} after {last}: replayed"));
                    }
                    *last = seq;
                }
                // A reader that holds the lock reads the one before; the next is 10 ms away.
                if let Some(mut peer) = self.shared.peer.try_lock() {
                    *peer = Some(PeerView {
                        session,
                        progress,
                        heard_at_ns: boottime_ns(),
                    });
                }
                Ok((Input::Alive(progress), deaf))
            }
        }
    }

    /// A connection ended. An end by the peer without a word is its death: its kernel closes what it had
    /// open. An error of the way (TLS, timeout, route) is not, nor is a reset while the peer is heard on
    /// another path, nor the end of a connection that nothing ever came by.
    fn ended(&mut self, path: usize, error: &io::Error) {
        let elsewhere = self.paths.another_works(path, boottime_ns());
        let died = match error.kind() {
            ErrorKind::UnexpectedEof => true,
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => {
                !elsewhere
            }
            _ => false,
        };
        let wire = self.wires.get(path).and_then(Option::as_ref);
        if died && wire.is_some_and(Wire::was_heard) {
            return self.input(Input::Ended);
        }
        let wire = self.close(path);
        self.input(Input::Broken(error.to_string()));
        if let Some(wire) = wire {
            match elsewhere {
                // What a lost path has not carried is not waited for: other paths wait meanwhile.
                true => wire.give_up(&Beat::Broken(self.session_now())),
                // A TLS alert is on its way: a reset must not overtake it and read as a death.
                false => linger(
                    wire.stream.socket(),
                    Instant::now() + PARTING.min(self.detect / 10),
                ),
            }
        }
    }

    /// This side cannot read the connection: say so, so that the peer does not take its end for
    /// a death, and make another.
    fn give_up(&mut self, path: usize, reason: String) {
        self.input(Input::Broken(reason));
        let last = Beat::Broken(self.session_now());
        if let Some(wire) = self.close(path) {
            wire.part(&last, PARTING.min(self.detect / 10));
        }
    }

    fn beat(&mut self, now: u64) {
        let session = self.session_now();
        self.seq_out += 1;
        let (seq, progress) = (self.seq_out, self.progress.progress(now));
        for path in 0..MAX_PATHS {
            let Some(wire) = self.wires.get_mut(path).and_then(Option::as_mut) else {
                continue;
            };
            let result = wire.send(&Beat::Alive {
                session,
                seq,
                progress,
                deaf: self.paths.is_deaf(path),
            });
            if let Err(e) = result {
                // A reset fails the write before the goodbye that came ahead of it was read.
                self.take_in(path);
                if self.wires.get(path).is_some_and(Option::is_some) {
                    self.ended(path, &e);
                }
            }
        }
    }
}
