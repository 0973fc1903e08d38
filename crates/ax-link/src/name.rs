//! Names of hosts and witnesses.

use std::str::FromStr;

/// A host's name: 1 to 63 ASCII letters, digits, `-`, `_` and `.`, beginning with a letter or
/// digit. Safe as a file name and in a log.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(String);

/// Not a host name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a host name: use 1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit"
)]
pub struct NameError(String);

impl HostName {
    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let starts = s.starts_with(|c: char| c.is_ascii_alphanumeric());
        if s.len() <= 63 && starts && s.chars().all(allowed) {
            Ok(HostName(s.to_owned()))
        } else {
            Err(NameError(s.chars().take(80).collect()))
        }
    }
}

impl std::fmt::Display for HostName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_file_names() {
        for good in ["a", "host-1", "h.example.org", "A_b", "9"] {
            assert_eq!(good.parse::<HostName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<HostName>().is_err(), "{bad:?}");
        }
    }
}
