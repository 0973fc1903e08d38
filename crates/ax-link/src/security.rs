//! How connections are protected.

use crate::{Identity, TrustStore};

/// Protection of every channel. There is no default: the caller says which.
#[derive(Clone, Debug)]
pub enum Security {
    /// Mutual TLS 1.3: this identity, and exactly these peers.
    Mtls(Identity, TrustStore),
    /// No protection, for a private cable; only where the configuration says `plain`. Anyone who
    /// can reach the port can read and write guest memory.
    Plain,
}

impl Security {
    /// Says in the log what an unprotected link means.
    pub(crate) fn warn_if_plain(&self, what: &str) {
        if matches!(self, Security::Plain) {
            tracing::warn!(
                "security = \"plain\": {what} without authentication or encryption; guest memory crosses the link readable"
            );
        }
    }

    /// The same, not looking at the disk any more.
    pub(crate) fn frozen(&self) -> Security {
        match self {
            Security::Mtls(identity, trust) => Security::Mtls(identity.clone(), trust.frozen()),
            Security::Plain => Security::Plain,
        }
    }
}
