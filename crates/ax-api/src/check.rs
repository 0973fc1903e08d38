//! What a check of a host found: `axd selfcheck` and `ax-vmm --selfcheck` say it alike.

use std::io::Write as _;

use serde::{Deserialize, Serialize};

use crate::host::Code;

/// What one check found. With `-o json` it is one line of the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, and what to do about it.
    pub detail: String,
    /// Exit status this failure asks for ([`Code`]); 0 when ok.
    #[serde(default)]
    pub code: i32,
}

impl Check {
    /// All is well.
    pub fn ok(check: &str, detail: impl Into<String>) -> Check {
        Check {
            check: check.to_owned(),
            ok: true,
            detail: detail.into(),
            code: 0,
        }
    }

    /// Something is wrong.
    pub fn bad(check: &str, code: Code, detail: impl Into<String>) -> Check {
        Check {
            check: check.to_owned(),
            ok: false,
            detail: detail.into(),
            code: i32::from(code.exit()),
        }
    }

    /// Prints it to standard output: one JSON document, or one line for people.
    pub fn print(&self, json: bool) {
        // Whoever stopped reading still gets the exit status.
        let _ = match serde_json::to_string(self) {
            Ok(line) if json => writeln!(std::io::stdout(), "{line}"),
            _ => writeln!(std::io::stdout(), "{self}"),
        };
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = if self.ok { "ok  " } else { "FAIL" };
        write!(f, "{mark} {}: {}", self.check, self.detail)
    }
}
