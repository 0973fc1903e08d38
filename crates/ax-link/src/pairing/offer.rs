//! The offering side: makes a token and waits for it to be used.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use ax_wire::MachineId;
use ax_wire::frame::FrameKind;
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use subtle::ConstantTimeEq;

use super::{
    Before, PairError, Paired, Reply, Request, STORED, Token, VERSION, decode, encode,
    is_of_another_version, nothing,
};
use crate::sock::{Timed, linger, poll_until};
use crate::{Fingerprint, HostName, Identity, LinkError, Stream, TrustStore, message, tls};

/// Why a request of another version of the dialogue is refused.
const OTHER_VERSION: &str = "it has another AX version; use the same on both hosts";

/// Wrong secrets until the token is void.
const TRIES: u32 = 3;
/// Connections at a time.
const MAX_TALKING: usize = 8;
/// Limit of one dialogue.
const DIALOGUE: Duration = Duration::from_secs(10);

/// A token and the port that waits for it.
pub struct Offer {
    token: Token,
    listeners: Vec<TcpListener>,
    expires: Instant,
    identity: Identity,
    trust: TrustStore,
    machine: Option<MachineId>,
    before: Before,
}

/// What the dialogues share: whether the secret is still worth anything.
struct Secret {
    token: Token,
    expires: Instant,
    wrong: u32,
    used: bool,
}

impl Offer {
    /// Listens on `addrs`, which the token names, so they must be ones the peer can reach (port
    /// 0 takes a free one). The token is good for one use within `valid_for`.
    ///
    /// # Errors
    /// An address that cannot be listened on or dialled.
    pub fn open(
        identity: &Identity,
        trust: &TrustStore,
        addrs: &[SocketAddr],
        valid_for: Duration,
    ) -> Result<Offer, PairError> {
        let mut listeners = Vec::new();
        let mut bound = Vec::new();
        for addr in addrs {
            if addr.ip().is_unspecified() {
                return Err(PairError::Unspecified(*addr));
            }
            let listen = |source| LinkError::Listen {
                addr: *addr,
                source,
            };
            let listener = TcpListener::bind(addr).map_err(listen)?;
            listener.set_nonblocking(true).map_err(listen)?;
            bound.push(listener.local_addr().map_err(listen)?);
            listeners.push(listener);
        }
        if bound.is_empty() || bound.len() > 8 {
            return Err(super::TokenError::Addresses.into());
        }
        Ok(Offer {
            token: Token::new(bound, identity.fingerprint())?,
            listeners,
            expires: Instant::now() + valid_for,
            identity: identity.clone(),
            trust: trust.clone(),
            machine: None,
            before: nothing(),
        })
    }

    /// Says which machine this is; `before` is done with who comes before it is trusted.
    #[must_use]
    pub fn doing(mut self, machine: Option<MachineId>, before: Before) -> Offer {
        (self.machine, self.before) = (machine, before);
        self
    }

    /// The token to show.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// Waits until the token is used, void or expired.
    ///
    /// # Errors
    /// [`PairError`]; nothing was stored then.
    pub fn wait(self) -> Result<Paired, PairError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map(Arc::new)
            .map_err(|e| LinkError::System {
                what: "make an eventfd",
                source: e.into(),
            })?;
        let (results_in, results) = channel();
        let dialogue = Dialogue {
            identity: self.identity,
            trust: self.trust,
            machine: self.machine,
            before: self.before,
            secret: Arc::new(Mutex::new(Secret {
                token: self.token,
                expires: self.expires,
                wrong: 0,
                used: false,
            })),
            results: results_in,
            wake: wake.clone(),
        };
        let mut expires = self.expires;
        loop {
            // Asked first: a result that came as the time ran out still counts.
            if let Ok(result) = results.try_recv() {
                return result;
            }
            if Instant::now() >= expires {
                if !dialogue.secret.lock().used {
                    return Err(PairError::Expired);
                }
                // Used in time, still being finished: that has a limit of its own.
                expires = Instant::now() + DIALOGUE;
            }
            let mut fds: Vec<_> = self
                .listeners
                .iter()
                .map(|l| l.as_fd())
                .chain([wake.as_fd()])
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            // A failed or interrupted poll is one more turn.
            let _ = nix::poll::poll(&mut fds, poll_until(expires));
            for listener in &self.listeners {
                if let Ok((sock, addr)) = listener.accept() {
                    dialogue.start(sock, addr);
                }
            }
        }
    }
}

#[derive(Clone)]
struct Dialogue {
    identity: Identity,
    trust: TrustStore,
    machine: Option<MachineId>,
    before: Before,
    secret: Arc<Mutex<Secret>>,
    results: Sender<Result<Paired, PairError>>,
    wake: Arc<EventFd>,
}

impl Dialogue {
    fn start(&self, sock: TcpStream, addr: SocketAddr) {
        // Each dialogue holds a clone; the offer's own is one.
        if Arc::strong_count(&self.secret) > MAX_TALKING {
            tracing::warn!(%addr, "too many connections to the pairing port; dropped one");
            return;
        }
        let this = self.clone();
        let spawned = std::thread::Builder::new()
            .name("ax-pairing".into())
            .spawn(move || {
                if let Some(result) = this.talk(sock, addr) {
                    // The offer may have ended by another dialogue.
                    let _ = this.results.send(result);
                    let _ = this.wake.write(1);
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%addr, %error, "cannot start a thread for a pairing connection");
        }
    }

    /// One connection; `None` when it does not decide the offer.
    fn talk(&self, sock: TcpStream, addr: SocketAddr) -> Option<Result<Paired, PairError>> {
        let deadline = Instant::now() + DIALOGUE;
        let (mut stream, request) = match self.greet(sock, addr, deadline) {
            Ok(greeted) => greeted,
            Err(error) => {
                tracing::warn!(%addr, %error, "a pairing connection failed");
                return None;
            }
        };
        match self.judge(&request) {
            Err((reason, end)) => {
                tracing::warn!(%addr, reason, "refused a pairing");
                refuse(&mut stream, reason, deadline);
                end.map(Err)
            }
            Ok(()) => Some(self.exchange(&mut stream, &request, deadline)),
        }
    }

    fn greet(
        &self,
        sock: TcpStream,
        addr: SocketAddr,
        deadline: Instant,
    ) -> Result<(Stream, Request), LinkError> {
        sock.set_nonblocking(false)
            .map_err(|source| LinkError::System {
                what: "set socket options",
                source,
            })?;
        let mut conn = tls::server(&self.identity, tls::Pins::AnyForPairing, tls::PAIRING)?;
        conn.complete_io(&mut Timed::new(&sock, deadline))
            .map_err(|e| LinkError::opening("finish the TLS handshake", &addr.to_string(), e))?;
        let mut stream = Stream::new(sock, Some(conn.into()), addr, None);
        let body = message::receive(&mut stream, FrameKind::Pairing, deadline, "send its secret")?;
        match decode(&body) {
            Some(request) => Ok((stream, request)),
            None => {
                let peer = stream.describe();
                let why = match is_of_another_version(&body) {
                    true => OTHER_VERSION,
                    false => "malformed request",
                };
                refuse(&mut stream, why, deadline);
                Err(LinkError::Closed { peer })
            }
        }
    }

    /// Whether the request may use the token, using it up if so. The error's second part ends
    /// the offer.
    fn judge(&self, request: &Request) -> Result<(), (&'static str, Option<PairError>)> {
        if request.version != VERSION {
            return Err((OTHER_VERSION, None));
        }
        let mut secret = self.secret.lock();
        if secret.used {
            return Err(("the token was used already; make a new one", None));
        }
        if Instant::now() >= secret.expires {
            return Err(("the token has expired; make a new one", None));
        }
        if secret.wrong >= TRIES {
            return Err(("the token is void after too many wrong secrets", None));
        }
        if !bool::from(request.secret.ct_eq(&secret.token.secret)) {
            secret.wrong += 1;
            let end = (secret.wrong == TRIES).then_some(PairError::TooManyTries(TRIES));
            return Err(("wrong secret; copy the token again, whole", end));
        }
        secret.used = true;
        Ok(())
    }

    fn exchange(
        &self,
        stream: &mut Stream,
        request: &Request,
        deadline: Instant,
    ) -> Result<Paired, PairError> {
        let name: HostName = request.name.parse().map_err(|e| {
            refuse(stream, "the name is not a host name", deadline);
            LinkError::Name(e)
        })?;
        if name == *self.identity.name() {
            refuse(
                stream,
                "both sides have the same name; change one",
                deadline,
            );
            return Err(PairError::SameName(name));
        }
        let cert = stream
            .peer_certificate()
            .cloned()
            .ok_or_else(|| LinkError::Closed {
                peer: stream.describe(),
            })?;
        let fingerprint = Fingerprint::of(&cert);
        let mut paired = Paired {
            name: name.clone(),
            fingerprint,
            machine: request.machine,
            side: None,
        };
        match (self.before)(&paired) {
            Ok(side) => paired.side = side,
            Err(why) => {
                refuse(stream, &why, Instant::now() + DIALOGUE);
                return Err(PairError::Before(why));
            }
        }
        // That may have taken its time.
        let deadline = deadline.max(Instant::now() + DIALOGUE);
        let known = self.trust.name_of(&fingerprint).as_ref() == Some(&name);
        if let Err(error) = self.trust.add(&name, &cert) {
            refuse(stream, &error.to_string(), deadline);
            return Err(error.into());
        }
        let reply = encode(&Reply::Paired {
            name: self.identity.name().to_string(),
            machine: self.machine,
            side: paired.side,
        })?;
        let kind = FrameKind::Pairing;
        let stored = message::send(stream, kind, &reply, deadline, "take the answer")
            .and_then(|()| message::receive(stream, kind, deadline, "store the certificate"))
            .is_ok_and(|body| body == STORED);
        if stored {
            return Ok(paired);
        }
        if !known {
            self.trust.remove(&name)?;
        }
        Err(PairError::Unfinished { peer: name })
    }
}

fn refuse(stream: &mut Stream, reason: &str, deadline: Instant) {
    let reply = Reply::Refused {
        reason: reason.chars().take(900).collect(),
    };
    // A peer that is gone needs no answer.
    if let Ok(body) = encode(&reply)
        && message::send(
            stream,
            FrameKind::Pairing,
            &body,
            deadline,
            "take the answer",
        )
        .is_ok()
    {
        stream.finish();
        linger(
            stream.socket(),
            deadline.min(Instant::now() + Duration::from_millis(500)),
        );
    }
}
