//! How two hosts, or a host and a witness, come to trust each other.
//!
//! One side makes an [`Offer`] and shows its [`Token`] once; a person carries it to the other
//! side, which calls [`join`]. The token holds the first side's addresses, its certificate's
//! fingerprint, and a random secret. The joining side connects by TLS 1.3, takes exactly the
//! certificate with that fingerprint, and only then sends the secret: so each knows that the
//! other is who the person meant, and each stores the other's certificate.
//!
//! An offer ends at its first right secret, after three wrong ones, or when its time is over.
//! Both certificates are stored or, when either side cannot, neither is. Where a machine takes the place of
//! one that is gone, each does what it has to ([`Before`]) when it knows the other and before it trusts it.

mod join;
mod offer;
mod token;

pub use join::{join, join_as};
pub use offer::Offer;
pub use token::{Token, TokenError};

use std::sync::Arc;

use ax_wire::{MachineId, Side};

use crate::{Fingerprint, HostName, LinkError};

/// Version of the dialogue; a different one is refused by name.
const VERSION: u16 = 2;

/// A peer just paired with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paired {
    /// Its name.
    pub name: HostName,
    /// Its certificate's fingerprint.
    pub fingerprint: Fingerprint,
    /// Which machine it is, if it says so.
    pub machine: Option<MachineId>,
    /// The joining side: the side of every pair that it is from now on, as the machine it takes the place of.
    pub side: Option<Side>,
}

/// Done with a peer that has proven itself, before it is trusted. The offering side says which side the
/// joining one is from now on, where it takes another's place. Its error ends the pairing.
pub type Before = Arc<dyn Fn(&Paired) -> Result<Option<Side>, String> + Send + Sync>;

/// Nothing is to be done before.
pub(crate) fn nothing() -> Before {
    Arc::new(|_| Ok(None))
}

/// Why a pairing did not come about, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The token is not one.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Nobody offers at the token's addresses.
    #[error(
        "nobody answers for this token ({}); it may have been used or have expired, or a firewall is in the way: make a new one with `axd pair` on the other host, and use it while that command runs",
        attempts.join("; ")
    )]
    NobodyOffers {
        /// One entry per address.
        attempts: Vec<String>,
    },
    /// The offering side says no.
    #[error("the other side refused: {0}")]
    Refused(String),
    /// The token's time is over and nobody used it.
    #[error("the token expired unused; make a new one with `axd pair`")]
    Expired,
    /// Somebody tried wrong secrets.
    #[error(
        "{0} wrong secrets were tried, so the token is void; if that was not you, find out who can reach this port, then make a new token with `axd pair`"
    )]
    TooManyTries(u32),
    /// The other side went away in the middle.
    #[error(
        "{peer} went away before it had stored this host's certificate; nothing was kept here: make a new token and try again"
    )]
    Unfinished {
        /// Who joined.
        peer: HostName,
    },
    /// Both have the same name.
    #[error(
        "both sides are called {0}; give one another name in its configuration (and remove its identity directory), then pair again"
    )]
    SameName(HostName),
    /// An address that nobody can dial.
    #[error("{0} is no address that the other host can reach; name one of this host's addresses")]
    Unspecified(std::net::SocketAddr),
    /// What has to be done before the peer is trusted can't be.
    #[error("{0}")]
    Before(String),
    /// The link's own errors.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// The joining side's one question.
#[derive(bincode::Encode, bincode::Decode)]
struct Request {
    version: u16,
    secret: [u8; token::SECRET],
    name: String,
    machine: Option<MachineId>,
}

/// The offering side's answer.
#[derive(bincode::Encode, bincode::Decode)]
enum Reply {
    Paired {
        name: String,
        machine: Option<MachineId>,
        side: Option<Side>,
    },
    Refused {
        reason: String,
    },
}

/// The joining side has stored the certificate.
const STORED: &[u8] = b"stored";

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<4096>()
}

fn encode(value: &impl bincode::Encode) -> Result<Vec<u8>, LinkError> {
    bincode::encode_to_vec(value, config()).map_err(|e| LinkError::System {
        what: "encode a pairing message",
        source: std::io::Error::other(e),
    })
}

/// True for a request of another version of this dialogue: the version comes first in each.
fn is_of_another_version(bytes: &[u8]) -> bool {
    let version = bincode::decode_from_slice::<u16, _>(bytes, config());
    version.is_ok_and(|(version, _)| version != VERSION)
}

/// `None` for anything but exactly one value.
fn decode<T: bincode::Decode<()>>(bytes: &[u8]) -> Option<T> {
    match bincode::decode_from_slice(bytes, config()) {
        Ok((value, used)) if used == bytes.len() => Some(value),
        _ => None,
    }
}
