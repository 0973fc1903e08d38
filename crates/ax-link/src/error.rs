//! What can go wrong on the link, said so that a person knows what to do.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use ax_wire::channel::{Channel, PreambleError};
use ax_wire::frame::FrameError;
use ax_wire::hello::{HelloError, Refusal};
use ax_wire::version::TooFarApart;

use crate::{Fingerprint, HostName, NameError};

/// An error of the link. The source chain holds the cause.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A file of the identity or trust store.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {problem}")]
    BadFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A name that cannot be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A certificate or key could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(String),
    /// A certificate is already trusted under this name.
    #[error(
        "another certificate ({fingerprint}) is already trusted as {name}; if {name} was set up anew on the same machine, with its data, remove {path} and pair again; if another machine takes the place of {name}, `axd pair --replace {name}`"
    )]
    AlreadyTrusted {
        /// The name.
        name: HostName,
        /// The fingerprint of the trusted certificate.
        fingerprint: Fingerprint,
        /// Where it is stored.
        path: PathBuf,
    },
    /// No address answered.
    #[error("cannot reach {peer}: {}", attempts.join("; "))]
    Unreachable {
        /// Who was meant.
        peer: String,
        /// One entry per address, with its cause.
        attempts: Vec<String>,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {addr}; is the port in use, and the address one of this host?")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// TLS refused or failed.
    #[error("TLS with {peer}: {}", tls_text(source))]
    Tls {
        /// The other end.
        peer: String,
        /// What TLS says.
        source: rustls::Error,
    },
    /// Reading or writing failed.
    #[error("cannot {what} ({peer})")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The other end.
        peer: String,
        /// Why not.
        source: io::Error,
    },
    /// The other end was too slow.
    #[error("{peer} did not {what} in time")]
    Deadline {
        /// What was due.
        what: &'static str,
        /// The other end.
        peer: String,
    },
    /// The peer ended the connection during the opening.
    #[error("{peer} closed the connection while it was being opened")]
    Closed {
        /// The other end.
        peer: String,
    },
    /// A malformed preamble.
    #[error("refused a connection from {peer}")]
    Preamble {
        /// The other end.
        peer: String,
        /// What is wrong.
        source: PreambleError,
    },
    /// A malformed control message.
    #[error("bad message from {peer}")]
    Frame {
        /// The other end.
        peer: String,
        /// What is wrong.
        source: FrameError,
    },
    /// The listener does not want this channel.
    #[error("{peer} refused the {channel} channel: {reason}")]
    Refused {
        /// The other end.
        peer: String,
        /// Which channel.
        channel: Channel,
        /// The peer's reason.
        reason: String,
    },
    /// The two have no wire version in common.
    #[error("{peer}: {source}")]
    TooFarApart {
        /// The other end.
        peer: String,
        /// The versions.
        source: TooFarApart,
    },
    /// A malformed or incompatible hello.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// This host found that the two cannot be a pair.
    #[error(transparent)]
    Incompatible(#[from] Refusal),
    /// The peer found that the two cannot be a pair.
    #[error("the peer refused the handshake: {}", .0.join("; "))]
    PeerRefused(Vec<String>),
    /// The local system refused something the link needs.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// More paths than a session watches.
    #[error("a heartbeat connection by one more path than the {0} that are watched")]
    TooManyPaths(usize),
    /// The sentinel has ended.
    #[error("the sentinel has ended; start another for the new session")]
    SentinelEnded,
}

impl LinkError {
    /// Sorts an I/O error of an opening by what it means.
    pub(crate) fn opening(what: &'static str, peer: &str, error: io::Error) -> LinkError {
        let peer = peer.to_owned();
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                LinkError::Deadline { what, peer }
            }
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => LinkError::Closed { peer },
            _ => match error.downcast::<rustls::Error>() {
                Ok(source) => LinkError::Tls { peer, source },
                Err(source) => LinkError::Io { what, peer, source },
            },
        }
    }
}

/// How a peer's refusal of this host's certificate begins.
const DISTRUST: &str = "the peer does not trust this host's certificate";

impl LinkError {
    /// True when the peer is there and does not trust this host: it is not paired with it, or not any more.
    pub fn is_distrust(&self) -> bool {
        match self {
            LinkError::Tls { source, .. } => tls_text(source).starts_with(DISTRUST),
            LinkError::Unreachable { attempts, .. } => {
                attempts.iter().any(|a| a.contains(DISTRUST))
            }
            _ => false,
        }
    }
}

/// What TLS says, and what to do about the likely causes.
fn tls_text(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError, Error};
    match error {
        Error::InvalidCertificate(CertificateError::Other(why)) => why.to_string(),
        Error::AlertReceived(
            Alert::CertificateUnknown
            | Alert::BadCertificate
            | Alert::AccessDenied
            | Alert::UnknownCA
            | Alert::CertificateRequired,
        ) => format!(
            "{DISTRUST}; pair the hosts (axd pair), unless another machine has taken this one's place \
             (axd pair --replace): then empty this one's data folder first"
        ),
        Error::AlertReceived(Alert::NoApplicationProtocol) | Error::NoApplicationProtocol => {
            "the peer listens for something else (a pairing port is not a link port); check the address".into()
        }
        Error::AlertReceived(Alert::ProtocolVersion) | Error::PeerIncompatible(_) => {
            format!("{error}; both sides must speak TLS 1.3")
        }
        Error::InvalidMessage(_) => {
            format!("{error}; does the peer have security = \"plain\"?")
        }
        other => other.to_string(),
    }
}
