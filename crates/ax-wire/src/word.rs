//! What two hosts tell each other of a pair's record when no third party keeps it.
//!
//! Each host keeps what it knows of the pair ([`Known`]). A host that wants a change writes the other
//! one a [`Letter`]; the other one records the change first and says so in its [`Answer`]
//! (decisions/0009). Letters go between the two processes of the pair, or by way of the daemons.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::PairId;
use crate::record::{Record, Refusal, Request};
use crate::version::Version;

/// What one host knows of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub struct Known {
    /// The latest record.
    #[serde(flatten)]
    pub record: Record,
    /// The last record that both hosts had, when this one has been changed since without the other:
    /// by an operator's word, or by its holder's stop.
    #[serde(default)]
    pub alone_since: Option<Record>,
}

impl Known {
    /// A record that the other host has too.
    pub fn shared(record: Record) -> Known {
        Known {
            record,
            alone_since: None,
        }
    }
}

/// What one host writes the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub struct Letter {
    /// Which pair.
    pub pair: PairId,
    /// What the writer knows.
    pub known: Known,
    /// The change it wants, if any.
    pub request: Option<Request>,
}

impl Letter {
    /// The same, as a connection of this version can say it: the first one knows no machines.
    #[must_use]
    pub fn in_version(mut self, version: Version) -> Letter {
        if let (Some(request), true) = (&mut self.request, version < Version::SECOND) {
            request.machine = None;
        }
        self
    }
}

/// What the other host answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub struct Answer {
    /// What it knows now; none when it knows nothing.
    pub known: Option<Known>,
    /// What it says.
    pub said: Said,
}

/// What a host may say to a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub enum Said {
    /// The change is agreed to, and recorded there.
    Agreed,
    /// No change was asked for, or the writer has to learn of a later record first.
    Met,
    /// The rules do not allow the change.
    Refused(Refusal),
    /// Nothing was changed.
    NotNow(Unwilling),
    /// Both hosts were told to go on without the other.
    Conflict,
}

/// Why a host does not agree to a change that the rules allow.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    Encode,
    Decode,
    thiserror::Error,
)]
pub enum Unwilling {
    /// It is itself waiting for an answer.
    #[error("it is asking for a change itself")]
    Busy,
    /// Its process holds the guest and lives.
    #[error("its process holds the guest and lives")]
    Holds,
    /// Its process has the guest's memory, or is becoming something else.
    #[error("its process of this VM lives and is no new shadow")]
    Lives,
    /// Only an operator may change that.
    #[error("only an operator may do that")]
    NotByAgreement,
    /// The host could not read or write what it knows, or its process does not answer.
    #[error("it can't look into its records now")]
    Unable,
}
