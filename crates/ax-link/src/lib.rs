//! The dedicated link between the hosts of a pair: authenticated, heart-beating, reconnecting.
//!
//! The modules in the order two hosts meet them:
//!
//! - [`identity`]: a host's name, self-signed certificate and key; [`trust`]: the certificates of
//!   the peers it is paired with. There is no CA: exactly these certificates are accepted.
//! - [`pairing`]: how two hosts come to trust each other, by a one-time token.
//! - [`security`]: mutual TLS 1.3, or plain TCP where the configuration says so.
//! - [`connect`] and [`accept`]: from addresses to a [`Stream`] for one channel. One listening port
//!   serves every channel; a preamble says which one a connection is.
//! - [`handshake`]: two hosts compare versions and capabilities before they become a pair.
//! - [`heartbeat`]: the sentinel, which tells death, silence, stall and goodbye apart
//!   (rules 9 and 10).
//!
//! Everything is blocking I/O on plain threads: the epoch path never waits for an executor.
//! Everything read is bounded, and every step towards a usable connection has a deadline.

pub mod accept;
pub mod connect;
mod error;
pub mod handshake;
pub mod heartbeat;
pub mod identity;
mod message;
mod name;
pub mod pairing;
pub mod security;
mod sock;
mod stream;
mod tls;
pub mod trust;

pub use accept::{Acceptor, Incoming};
pub use ax_wire::channel::{Channel, Preamble};
pub use connect::{AddressPair, Connector};
pub use error::LinkError;
pub use identity::{Fingerprint, Identity};
pub use name::{HostName, NameError};
pub use security::Security;
pub use stream::{Closer, Stream};
pub use trust::TrustStore;
