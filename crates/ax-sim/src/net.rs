//! The simulated networks: messages and byte streams between three places, with delays and cuts.
//!
//! Everything is as on TCP while its processes live: in order, whole, late at worst. A path that is
//! cut delivers what it was given once it is mended. Who is killed closes its ends; a host without power does not.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use ax_sync::sim::{self, Group, Here};
use ax_wire::WIRE_VERSION;
use parking_lot::Mutex;
use statepoint::link::{PrimaryLink, ShadowLink};

/// Where something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Side A's host.
    A,
    /// Side B's host.
    B,
    /// The arbiter's.
    Arbiter,
}

impl Place {
    fn index(self) -> usize {
        self as usize
    }
}

/// How often a reader looks whether a cut path is mended.
const LOOK: Duration = Duration::from_millis(2);

/// Bytes under way on a stream before its writer waits.
const WINDOW: usize = 192 << 10;

#[derive(Debug)]
struct Paths {
    cut: [[bool; 3]; 3],
    delay: u64,
    jitter: u64,
    usual: u64,
}

/// All paths.
#[derive(Clone, Debug)]
pub struct Net(Arc<Mutex<Paths>>);

impl Net {
    /// Three places that reach each other; a message takes so many nanoseconds.
    pub fn new(usual: u64) -> Net {
        Net(Arc::new(Mutex::new(Paths {
            cut: [[false; 3]; 3],
            delay: usual,
            jitter: usual / 2,
            usual,
        })))
    }

    /// Cuts one direction, or mends it.
    pub fn cut(&self, from: Place, to: Place, cut: bool) {
        self.0.lock().cut[from.index()][to.index()] = cut;
    }

    /// Mends everything.
    pub fn mend(&self) {
        let mut paths = self.0.lock();
        paths.cut = [[false; 3]; 3];
        (paths.delay, paths.jitter) = (paths.usual, paths.usual / 2);
    }

    /// How long a message takes: at least `delay`, and up to `jitter` more, nanoseconds.
    pub fn delay(&self, delay: u64, jitter: u64) {
        let mut paths = self.0.lock();
        (paths.delay, paths.jitter) = (delay, jitter);
    }

    /// True when nothing gets through in this direction.
    pub fn is_cut(&self, from: Place, to: Place) -> bool {
        self.0.lock().cut[from.index()][to.index()]
    }

    fn arrives(&self, here: &Here) -> u64 {
        let (delay, jitter) = {
            let paths = self.0.lock();
            (paths.delay, paths.jitter)
        };
        here.now() + delay + here.below(jitter + 1)
    }
}

struct Entry<T> {
    at: u64,
    from: Place,
    message: T,
}

struct Letters<T> {
    entries: Vec<Entry<T>>,
    /// When the last of each sender arrives: nothing overtakes.
    last: [u64; 3],
}

/// Where one process, or the arbiter, hears what it is told.
pub struct Mailbox<T> {
    inner: Arc<Mutex<Letters<T>>>,
    net: Net,
    place: Place,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Mailbox {
            inner: Arc::clone(&self.inner),
            net: self.net.clone(),
            place: self.place,
        }
    }
}

impl<T> Mailbox<T> {
    /// An empty one at `place`.
    pub fn new(net: &Net, place: Place) -> Mailbox<T> {
        let inner = Letters {
            entries: Vec::new(),
            last: [0; 3],
        };
        Mailbox {
            inner: Arc::new(Mutex::new(inner)),
            net: net.clone(),
            place,
        }
    }

    fn key(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    fn put(&self, from: Place, at: u64, message: T) {
        self.inner.lock().entries.push(Entry { at, from, message });
        if let Some(here) = sim::current() {
            here.wake(self.key());
        }
    }

    /// Tells it something from within its own process.
    pub fn tell(&self, message: T) {
        let Some(here) = sim::current() else { return };
        let at = {
            let mut inner = self.inner.lock();
            let last = &mut inner.last[self.place.index()];
            *last = (*last).max(here.now());
            *last
        };
        self.put(self.place, at, message);
    }

    /// Sends it something, behind what was sent from there before.
    pub fn send(&self, from: Place, message: T) {
        let Some(here) = sim::current() else { return };
        let arrives = self.net.arrives(&here);
        let at = {
            let mut inner = self.inner.lock();
            let last = &mut inner.last[from.index()];
            *last = (*last).max(arrives);
            *last
        };
        self.put(from, at, message);
    }

    /// Sends it something that others may overtake, after `late` nanoseconds more.
    pub fn send_late(&self, from: Place, message: T, late: u64) {
        let Some(here) = sim::current() else { return };
        let at = self.net.arrives(&here) + late;
        self.put(from, at, message);
    }

    /// The next that has arrived, waiting for it until `until` at most.
    pub fn receive(&self, until: u64) -> Option<T> {
        let here = sim::current()?;
        loop {
            let now = here.now();
            let mut wait = until.saturating_sub(now);
            {
                let mut inner = self.inner.lock();
                let open =
                    |e: &Entry<T>| e.from == self.place || !self.net.is_cut(e.from, self.place);
                let next = inner.entries.iter().enumerate();
                let next = next
                    .filter(|(_, e)| open(e))
                    .min_by_key(|(n, e)| (e.at, *n));
                match next.map(|(n, e)| (n, e.at)) {
                    Some((n, at)) if at <= now => return Some(inner.entries.remove(n).message),
                    Some((_, at)) => wait = wait.min(at - now),
                    None => {}
                }
                if inner.entries.iter().any(|e| !open(e)) {
                    wait = wait.min(LOOK.as_nanos() as u64);
                }
            }
            if now >= until {
                return None;
            }
            let wait = Duration::from_nanos(wait.max(1));
            let wait = (wait < Duration::from_secs(3600)).then_some(wait);
            here.block(self.key(), wait);
        }
    }
}

#[derive(Default)]
struct Pipe {
    pieces: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
    last: u64,
    /// Read so far of the first piece.
    at: usize,
}

struct Stream {
    pipes: [Pipe; 2],
    /// When each end was closed, if it was.
    closed: [Option<u64>; 2],
}

/// One connection; end 0 dialled.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Mutex<Stream>>,
    net: Net,
    places: [Place; 2],
    /// Whose process each end is.
    pub owners: [Group; 2],
}

impl Connection {
    /// A connection from one process to another.
    pub fn new(net: &Net, places: [Place; 2], owners: [Group; 2]) -> Connection {
        let stream = Stream {
            pipes: [Pipe::default(), Pipe::default()],
            closed: [None; 2],
        };
        Connection {
            inner: Arc::new(Mutex::new(stream)),
            net: net.clone(),
            places,
            owners,
        }
    }

    fn key(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    /// Closes one end, or both as a reset does.
    pub fn close(&self, end: usize) {
        let Some(here) = sim::current() else { return };
        self.inner.lock().closed[end].get_or_insert(here.now());
        here.wake(self.key());
    }

    fn half(&self, end: usize) -> Half {
        Half {
            connection: self.clone(),
            end,
        }
    }

    /// The primary's links over this connection, which it dialled, and the other one.
    pub fn primary(forward: &Connection, backward: &Connection) -> PrimaryLink {
        let ends = [forward.clone(), backward.clone()];
        PrimaryLink {
            forward: Box::new(forward.half(0)),
            backward: Box::new(backward.half(0)),
            version: WIRE_VERSION,
            close: Arc::new(move || ends.iter().for_each(|end| end.close(0))),
        }
    }

    /// The shadow's.
    pub fn shadow(forward: &Connection, backward: &Connection) -> ShadowLink {
        let ends = [forward.clone(), backward.clone()];
        ShadowLink {
            forward: Box::new(forward.half(1)),
            backward: Box::new(backward.half(1)),
            version: WIRE_VERSION,
            close: Arc::new(move || ends.iter().for_each(|end| end.close(1))),
        }
    }
}

struct Half {
    connection: Connection,
    end: usize,
}

impl Read for Half {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(here) = sim::current() else {
            return Ok(0);
        };
        let (mine, other) = (self.end, 1 - self.end);
        let connection = &self.connection;
        let [from, to] = [connection.places[other], connection.places[mine]];
        loop {
            let now = here.now();
            let mut wait = LOOK * 500;
            {
                let mut stream = connection.inner.lock();
                if stream.closed[mine].is_some() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                let ended = stream.closed[other];
                let pipe = &mut stream.pipes[other];
                if connection.net.is_cut(from, to) {
                    wait = LOOK;
                } else {
                    match pipe.pieces.front() {
                        Some((at, piece)) if *at <= now => {
                            let rest = piece.get(pipe.at..).unwrap_or_default();
                            let n = rest.len().min(out.len());
                            out[..n].copy_from_slice(&rest[..n]);
                            pipe.at += n;
                            if pipe.at == piece.len() {
                                pipe.at = 0;
                                pipe.pieces.pop_front();
                            }
                            pipe.bytes -= n;
                            drop(stream);
                            here.wake(connection.key());
                            return Ok(n);
                        }
                        Some((at, _)) => wait = Duration::from_nanos(at - now),
                        None if ended.is_some_and(|at| now > at + 30_000) => return Ok(0),
                        None if ended.is_some() => wait = Duration::from_micros(30),
                        None => {}
                    }
                }
            }
            here.block(connection.key(), Some(wait));
        }
    }
}

impl Write for Half {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(here) = sim::current() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let (mine, other) = (self.end, 1 - self.end);
        let connection = &self.connection;
        let [from, to] = [connection.places[mine], connection.places[other]];
        here.may_yield();
        loop {
            {
                let mut stream = connection.inner.lock();
                let cut = connection.net.is_cut(to, from);
                if stream.closed[mine].is_some() || (stream.closed[other].is_some() && !cut) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                let pipe = &mut stream.pipes[mine];
                if pipe.bytes < WINDOW {
                    // Pieces of a write may arrive at different times.
                    let n = bytes.len().min(1 + here.below(96 << 10) as usize);
                    pipe.last = pipe.last.max(connection.net.arrives(&here));
                    pipe.bytes += n;
                    let piece = bytes.get(..n).unwrap_or_default().to_vec();
                    pipe.pieces.push_back((pipe.last, piece));
                    drop(stream);
                    here.wake(connection.key());
                    let _ = (from, to);
                    return Ok(n);
                }
            }
            here.block(connection.key(), Some(LOOK));
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
