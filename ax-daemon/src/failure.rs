//! Why a request could not be done: what axvm prints and exits with.

use ax_api::host::{Code, Reply};

/// A refusal or failure, ready to be shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// What kind.
    pub code: Code,
    /// What was wrong and what to do.
    pub why: String,
}

impl Failure {
    /// A failure of a kind.
    pub fn new(code: Code, why: impl Into<String>) -> Failure {
        Failure {
            code,
            why: why.into(),
        }
    }

    /// A failure of the system below axd: `doing` says what axd was about.
    pub fn io(doing: impl std::fmt::Display, error: &std::io::Error) -> Failure {
        Failure::new(Code::Failed, format!("{doing}: {error}"))
    }

    /// The same, with the place it happened at put before it.
    pub fn at(self, place: impl std::fmt::Display) -> Failure {
        Failure {
            why: format!("{place}: {}", self.why),
            ..self
        }
    }

    /// As the last line of an answer.
    pub fn into_reply(self) -> Reply {
        Reply::Failed {
            code: self.code,
            why: self.why,
        }
    }
}

/// An error with its causes, once each.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
