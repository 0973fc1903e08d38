//! The dialling side: from the peer's addresses to an open channel.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ax_wire::Versions;
use ax_wire::channel::{Answer, Preamble};
use ax_wire::frame::FrameKind;
use ax_wire::version::TooFarApart;

use crate::sock::{Timed, connect_any};
use crate::{Fingerprint, HostName, LinkError, Security, Stream, message, tls};

/// One way to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPair {
    /// The local address to leave from; `None` lets the system choose.
    pub local: Option<IpAddr>,
    /// Where the peer listens.
    pub peer: SocketAddr,
}

impl From<SocketAddr> for AddressPair {
    fn from(peer: SocketAddr) -> Self {
        AddressPair { local: None, peer }
    }
}

/// Opens channels to one peer. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connector {
    security: Security,
    paths: Vec<AddressPair>,
    peer: Option<HostName>,
    timeout: Duration,
}

impl Connector {
    /// Dials `paths`, the preferred first. `peer` is who must answer; `None` takes any trusted
    /// peer (and is all that plain connections can check).
    pub fn new(security: Security, paths: Vec<AddressPair>, peer: Option<HostName>) -> Connector {
        security.warn_if_plain("dialling");
        Connector {
            security,
            paths,
            peer,
            timeout: Duration::from_secs(5),
        }
    }

    /// Limits each opening as a whole; 5 s unless set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Connector {
        self.timeout = timeout;
        self
    }

    /// One connector per way to the peer, the preferred first: each dials that one alone.
    pub fn each(&self) -> Vec<(SocketAddr, Connector)> {
        let only = |path: &AddressPair| {
            let paths = vec![*path];
            let this = self.clone();
            (path.peer, Connector { paths, ..this })
        };
        self.paths.iter().map(only).collect()
    }

    /// The same, not reading the trust store from disk any more.
    pub(crate) fn frozen(&self) -> Connector {
        Connector {
            security: self.security.frozen(),
            ..self.clone()
        }
    }

    /// Opens a channel: connects, proves both identities, says which channel and which wire versions
    /// this host speaks, and waits for the listener's yes, with the version that both speak.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`] with every address's failure; [`LinkError::Refused`] with the
    /// listener's reason; [`LinkError::TooFarApart`].
    pub fn open(&self, preamble: Preamble) -> Result<Stream, LinkError> {
        self.open_until(preamble, Instant::now() + self.timeout)
    }

    /// [`Connector::open`] with an own deadline.
    ///
    /// # Errors
    /// As [`Connector::open`].
    pub fn open_until(&self, preamble: Preamble, deadline: Instant) -> Result<Stream, LinkError> {
        let paths = self.paths.iter().map(|p| (p.local, p.peer));
        let mut stream = connect_any(paths, deadline, |sock, addr| {
            // One path that stalls in its handshake must leave time for the others.
            let left = deadline.saturating_duration_since(Instant::now());
            let share = if self.paths.len() > 1 { left / 2 } else { left };
            self.authenticate(sock, addr, Instant::now() + share)
        })
        .map_err(|failures| self.unreachable(failures))?;
        message::write_all(
            &mut stream,
            &preamble.encode(),
            deadline,
            "take the preamble",
        )?;
        let body = message::receive(
            &mut stream,
            FrameKind::ChannelAnswer,
            deadline,
            "open the channel",
        )?;
        match Answer::parse(&body) {
            Answer::Accepted(version) => {
                let ours = preamble.versions();
                let theirs = Versions::only(version);
                let version = ours.common(theirs);
                let version = version.ok_or(LinkError::TooFarApart {
                    peer: stream.describe(),
                    source: TooFarApart { theirs, ours },
                })?;
                stream.speak(version);
                message::no_deadline(&stream)?;
                Ok(stream)
            }
            Answer::Refused(reason) => Err(LinkError::Refused {
                peer: stream.describe(),
                channel: preamble.channel(),
                reason,
            }),
        }
    }

    fn unreachable(&self, failures: Vec<(SocketAddr, String)>) -> LinkError {
        let mut attempts: Vec<_> = failures
            .into_iter()
            .map(|(addr, why)| format!("{addr}: {why}"))
            .collect();
        if attempts.is_empty() {
            attempts.push("no address configured".into());
        }
        let peer = self
            .peer
            .as_ref()
            .map_or_else(|| "the peer".into(), HostName::to_string);
        LinkError::Unreachable { peer, attempts }
    }

    fn authenticate(
        &self,
        sock: TcpStream,
        addr: SocketAddr,
        deadline: Instant,
    ) -> Result<Stream, LinkError> {
        let Security::Mtls(identity, trust) = &self.security else {
            return Ok(Stream::new(sock, None, addr, None));
        };
        let mut conn = tls::client(identity, tls::Pins::Trusted(trust.clone()), tls::LINK)?;
        conn.complete_io(&mut Timed::new(&sock, deadline))
            .map_err(|e| LinkError::opening("finish the TLS handshake", &addr.to_string(), e))?;
        let found = conn
            .peer_certificates()
            .and_then(|certs| certs.first())
            .and_then(|cert| trust.name_of(&Fingerprint::of(cert)));
        if let Some(expected) = &self.peer
            && found.as_ref() != Some(expected)
        {
            let found = found.map_or_else(|| "an unknown peer".into(), |n| n.to_string());
            return Err(LinkError::Unreachable {
                peer: expected.to_string(),
                attempts: vec![format!("{found} answers there; check the address")],
            });
        }
        Ok(Stream::new(sock, Some(conn.into()), addr, found))
    }
}
