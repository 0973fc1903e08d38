//! The listening side: one port for every channel.
//!
//! Each connection is authenticated and says its channel on a thread of its own, within a
//! deadline, so that a stalled or hostile peer holds up nobody else. Their number is bounded,
//! in all and per source address. What comes out is an [`Incoming`], to be accepted or refused
//! by whoever knows the sessions.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ax_wire::channel::{Answer, PREAMBLE, Preamble};
use ax_wire::frame::FrameKind;
use ax_wire::version::TooFarApart;
use ax_wire::{Version, Versions};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use crate::sock::{Timed, linger, tune};
use crate::{Fingerprint, LinkError, Security, Stream, message, tls};

/// Connections being opened at a time, in all and from one address.
const MAX_OPENING: usize = 64;
const MAX_OPENING_PER_SOURCE: usize = 16;
/// Opened connections waiting to be taken.
const MAX_WAITING: usize = 64;

/// A connection that has proven who it is and said what it is for. Dropping it closes it.
#[derive(Debug)]
pub struct Incoming {
    stream: Stream,
    preamble: Preamble,
    version: Version,
    deadline: Instant,
}

impl Incoming {
    /// Channel and session asked for.
    pub fn preamble(&self) -> &Preamble {
        &self.preamble
    }

    /// The connection, to ask who it is.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Opens the channel.
    ///
    /// # Errors
    /// The peer has gone.
    pub fn accept(mut self) -> Result<Stream, LinkError> {
        self.answer(&Answer::Accepted(self.version))?;
        self.stream.speak(self.version);
        message::no_deadline(&self.stream)?;
        Ok(self.stream)
    }

    /// Refuses it, telling the peer why, and closes it.
    pub fn refuse(mut self, reason: &str) {
        let peer = self.stream.describe();
        tracing::info!(peer, channel = %self.preamble.channel(), reason, "refused a channel");
        // A peer that is gone needs no answer.
        if self.answer(&Answer::Refused(reason.into())).is_ok() {
            self.stream.finish();
            linger(
                self.stream.socket(),
                Instant::now() + Duration::from_millis(50),
            );
        }
    }

    fn answer(&mut self, answer: &Answer) -> Result<(), LinkError> {
        // The caller may have taken its time; the write itself gets at least this much.
        let deadline = self
            .deadline
            .max(Instant::now() + Duration::from_millis(500));
        let body = answer.encode();
        let what = "take the answer to its preamble";
        message::send(
            &mut self.stream,
            FrameKind::ChannelAnswer,
            &body,
            deadline,
            what,
        )
    }
}

/// Listens on one or several addresses. Dropping it stops listening.
#[derive(Debug)]
pub struct Acceptor {
    incoming: Receiver<Incoming>,
    addrs: Vec<SocketAddr>,
    stop: Stopper,
    thread: Option<JoinHandle<()>>,
}

/// Stops an [`Acceptor`] from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Stops listening; [`Acceptor::accept`] returns `None` soon after.
    pub fn stop(&self) {
        // An eventfd write fails only when it would overflow: then it is set already.
        let _ = self.0.write(1);
    }
}

impl Acceptor {
    /// Listens on `addrs`; port 0 takes a free one. Openings have 5 s.
    ///
    /// # Errors
    /// [`LinkError::Listen`] naming the address.
    pub fn bind(addrs: &[SocketAddr], security: Security) -> Result<Acceptor, LinkError> {
        let listen = |addr: &SocketAddr| {
            TcpListener::bind(addr).map_err(|source| LinkError::Listen {
                addr: *addr,
                source,
            })
        };
        let listeners = addrs.iter().map(listen).collect::<Result<_, _>>()?;
        Acceptor::new(listeners, security, Duration::from_secs(5))
    }

    /// Serves listeners made elsewhere (another network namespace, before privileges were
    /// dropped). `timeout` limits each opening as a whole.
    ///
    /// # Errors
    /// The system's, at starting the thread.
    pub fn new(
        listeners: Vec<TcpListener>,
        security: Security,
        timeout: Duration,
    ) -> Result<Acceptor, LinkError> {
        security.warn_if_plain("listening");
        let system = |what| move |source| LinkError::System { what, source };
        let mut addrs = Vec::new();
        for listener in &listeners {
            listener
                .set_nonblocking(true)
                .map_err(system("make a listener nonblocking"))?;
            addrs.push(
                listener
                    .local_addr()
                    .map_err(system("read a listener's address"))?,
            );
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|e| system("make an eventfd")(e.into()))?;
        let stop = Stopper(Arc::new(event));
        let (sender, incoming) = sync_channel(MAX_WAITING);
        let opener = Opener {
            security,
            timeout,
            sender,
            opening: Arc::new(Mutex::new(HashMap::new())),
        };
        let event = stop.clone();
        let thread = std::thread::Builder::new()
            .name("ax-accept".into())
            .spawn(move || listen(&listeners, &event, &opener))
            .map_err(system("start the accepting thread"))?;
        Ok(Acceptor {
            incoming,
            addrs,
            stop,
            thread: Some(thread),
        })
    }

    /// The addresses listened on, with their actual ports.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// Waits for the next connection; `None` once stopped.
    pub fn accept(&self) -> Option<Incoming> {
        self.incoming.recv().ok()
    }

    /// Waits at most `timeout`; `Ok(None)` if nobody came.
    ///
    /// # Errors
    /// Stopped.
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<Incoming>, RecvTimeoutError> {
        match self.incoming.recv_timeout(timeout) {
            Ok(incoming) => Ok(Some(incoming)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(stopped) => Err(stopped),
        }
    }

    /// A handle to stop it from another thread.
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

/// What an opening thread needs.
#[derive(Clone)]
struct Opener {
    security: Security,
    timeout: Duration,
    sender: SyncSender<Incoming>,
    opening: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One of the bounded openings under way.
struct Slot {
    opening: Arc<Mutex<HashMap<IpAddr, usize>>>,
    source: IpAddr,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut opening = self.opening.lock();
        if let Some(n) = opening.get_mut(&self.source) {
            *n -= 1;
            if *n == 0 {
                opening.remove(&self.source);
            }
        }
    }
}

fn listen(listeners: &[TcpListener], stop: &Stopper, opener: &Opener) {
    loop {
        let mut fds: Vec<_> = listeners
            .iter()
            .map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN))
            .chain([PollFd::new(stop.0.as_fd(), PollFlags::POLLIN)])
            .collect();
        match nix::poll::poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for connections; listening ends");
                return;
            }
        }
        if fds.last().is_some_and(|fd| fd.any().unwrap_or(true)) {
            return;
        }
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        for (listener, ready) in listeners.iter().zip(ready) {
            if ready {
                take_one(listener, opener);
            }
        }
    }
}

fn take_one(listener: &TcpListener, opener: &Opener) {
    match listener.accept() {
        Ok((sock, addr)) => opener.start(sock, addr),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            // Out of descriptors, most likely: the connection stays queued, so do not spin.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Opener {
    fn start(&self, sock: TcpStream, addr: SocketAddr) {
        let Some(slot) = self.slot(addr.ip()) else {
            tracing::warn!(%addr, "too many connections being opened; dropped one");
            return;
        };
        let this = self.clone();
        let spawned = std::thread::Builder::new()
            .name("ax-open".into())
            .spawn(move || {
                let _slot = slot;
                this.open(sock, addr);
            });
        if let Err(error) = spawned {
            tracing::warn!(%addr, %error, "cannot start a thread for a connection; dropped it");
        }
    }

    fn slot(&self, source: IpAddr) -> Option<Slot> {
        let mut opening = self.opening.lock();
        let all: usize = opening.values().sum();
        let of_source = opening.get(&source).copied().unwrap_or(0);
        if all >= MAX_OPENING || of_source >= MAX_OPENING_PER_SOURCE {
            return None;
        }
        *opening.entry(source).or_insert(0) += 1;
        Some(Slot {
            opening: self.opening.clone(),
            source,
        })
    }

    fn open(&self, sock: TcpStream, addr: SocketAddr) {
        let deadline = Instant::now() + self.timeout;
        match self
            .authenticate(sock, addr, deadline)
            .and_then(|s| read_preamble(s, deadline))
        {
            Ok(Ok(incoming)) => match self.sender.try_send(incoming) {
                Ok(()) => {}
                Err(TrySendError::Full(incoming)) => incoming.refuse("too many connections wait"),
                Err(TrySendError::Disconnected(incoming)) => incoming.refuse("shutting down"),
            },
            Ok(Err((incoming, TooFarApart { theirs, ours }))) => incoming.refuse(&format!(
                "the dialling host speaks {theirs}, the listening one {ours}: upgrade the older host; \
                 hosts may be one wire version apart, no more"
            )),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%addr, %error, cause, "a connection was not opened");
            }
        }
    }

    fn authenticate(
        &self,
        sock: TcpStream,
        addr: SocketAddr,
        deadline: Instant,
    ) -> Result<Stream, LinkError> {
        sock.set_nonblocking(false)
            .and_then(|()| tune(&sock))
            .map_err(|source| LinkError::System {
                what: "set socket options",
                source,
            })?;
        let Security::Mtls(identity, trust) = &self.security else {
            return Ok(Stream::new(sock, None, addr, None));
        };
        let mut conn = tls::server(identity, tls::Pins::Trusted(trust.clone()), tls::LINK)?;
        if let Err(e) = conn.complete_io(&mut Timed::new(&sock, deadline)) {
            // complete_io has sent the alert; let it arrive.
            linger(&sock, Instant::now() + Duration::from_millis(100));
            return Err(LinkError::opening(
                "finish the TLS handshake",
                &addr.to_string(),
                e,
            ));
        }
        let name = conn
            .peer_certificates()
            .and_then(|certs| certs.first())
            .and_then(|cert| trust.name_of(&Fingerprint::of(cert)));
        Ok(Stream::new(sock, Some(conn.into()), addr, name))
    }
}

/// What came in, or that it can only be refused.
type Opened = Result<Incoming, (Incoming, TooFarApart)>;

fn read_preamble(mut stream: Stream, deadline: Instant) -> Result<Opened, LinkError> {
    let mut bytes = [0; PREAMBLE];
    message::read_exact(&mut stream, &mut bytes, deadline, "send its preamble")?;
    let preamble = Preamble::parse(&bytes).map_err(|source| LinkError::Preamble {
        peer: stream.describe(),
        source,
    })?;
    let (theirs, ours) = (preamble.versions(), Versions::ours());
    let common = ours.common(theirs);
    let incoming = Incoming {
        stream,
        preamble,
        version: common.unwrap_or(Version::FIRST),
        deadline,
    };
    Ok(match common {
        Some(_) => Ok(incoming),
        None => Err((incoming, TooFarApart { theirs, ours })),
    })
}
