//! Wire versions: which a build speaks, which two builds have in common, what one of them lacks.
//!
//! A build speaks its own version N and N−1, so that the two hosts of a pair and their witness can be
//! upgraded one after the other. Every connection between machines settles on one version in its first
//! bytes ([`crate::channel`]), and everything that is said on it is encoded and read by that version. A
//! message says since which version there is such a message ([`Since`]); what the version of a connection
//! lacks is not sent on it, and refused when it is read from it.

/// A wire version, 1 or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u16);

impl Version {
    /// The first. Its builds say nothing of versions in the first bytes of a connection.
    pub const FIRST: Version = Version(1);
    /// Connections say their versions first; [`crate::peer::PeerMessage::Show`]; [patches](crate::runs::Patches)
    /// of pages.
    pub const SECOND: Version = Version(2);

    /// `None` for 0.
    pub const fn new(number: u16) -> Option<Version> {
        match number {
            0 => None,
            number => Some(Version(number)),
        }
    }

    /// Its number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// Whether something may be said in this version.
    ///
    /// # Errors
    /// [`Lacks`].
    pub fn has(self, what: &impl Since) -> Result<(), Lacks> {
        let since = what.since();
        match since <= self {
            true => Ok(()),
            false => Err(Lacks {
                spoken: self,
                since,
                what: what.name(),
            }),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Something that is said between machines, and is not known to every version.
pub trait Since {
    /// The first version that has it.
    fn since(&self) -> Version;

    /// What it is called in an error.
    fn name(&self) -> &'static str;
}

/// The version spoken on a connection has no such message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "wire version {spoken}, which both sides of this connection speak, has no {what:?} (wire version {since} has): \
     upgrade the older host"
)]
pub struct Lacks {
    /// What is spoken.
    pub spoken: Version,
    /// What would have to be.
    pub since: Version,
    /// The message.
    pub what: &'static str,
}

/// The wire versions a build speaks, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    oldest: Version,
    newest: Version,
}

impl Versions {
    /// What this build speaks: N and N−1.
    pub fn ours() -> Versions {
        Versions::up_to(newest())
    }

    /// What a build speaks whose newest version is this.
    pub const fn up_to(newest: Version) -> Versions {
        let oldest = match newest.0 {
            newest @ 2.. => Version(newest - 1),
            first => Version(first),
        };
        Versions { oldest, newest }
    }

    /// Version 1 alone: what a build speaks that does not say what it speaks.
    pub const UNSAID: Versions = Versions {
        oldest: Version::FIRST,
        newest: Version::FIRST,
    };

    /// A range; `None` unless `1 ≤ oldest ≤ newest`.
    pub fn new(oldest: u16, newest: u16) -> Option<Versions> {
        let (oldest, newest) = (Version::new(oldest)?, Version::new(newest)?);
        (oldest <= newest).then_some(Versions { oldest, newest })
    }

    /// One version alone.
    pub const fn only(version: Version) -> Versions {
        Versions {
            oldest: version,
            newest: version,
        }
    }

    /// The oldest.
    pub fn oldest(self) -> Version {
        self.oldest
    }

    /// The newest.
    pub fn newest(self) -> Version {
        self.newest
    }

    /// The newest version both speak.
    pub fn common(self, other: Versions) -> Option<Version> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

#[cfg(not(debug_assertions))]
fn newest() -> Version {
    crate::WIRE_VERSION
}

/// In a build with debug assertions `$AX_WIRE_VERSION` may say another one, for tests of upgrades.
#[cfg(debug_assertions)]
fn newest() -> Version {
    static NEWEST: std::sync::OnceLock<Version> = std::sync::OnceLock::new();
    *NEWEST.get_or_init(|| {
        let said = std::env::var("AX_WIRE_VERSION").ok();
        let number = said.and_then(|said| Version::new(said.parse().ok()?));
        number.unwrap_or(crate::WIRE_VERSION)
    })
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "wire version {}", self.newest)
        } else {
            write!(f, "wire versions {} to {}", self.oldest, self.newest)
        }
    }
}

/// Two machines whose builds have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the peer speaks {theirs}, this host {ours}: upgrade the older host; hosts may be one wire version apart, no more"
)]
pub struct TooFarApart {
    /// What the peer speaks.
    pub theirs: Versions,
    /// What this build speaks.
    pub ours: Versions,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_speak_the_older_ones_version_and_others_do_not_speak() {
        let build = |n: u16| Versions::up_to(Version::new(n).unwrap());
        assert_eq!(build(4).common(build(5)), Version::new(4));
        assert_eq!(build(5).common(build(4)), Version::new(4));
        assert_eq!(build(5).common(build(5)), Version::new(5));
        assert_eq!(build(4).common(build(6)), None);
        assert_eq!(build(1), Versions::UNSAID);
        assert_eq!(Versions::UNSAID.common(build(2)), Version::new(1));
        assert_eq!(Versions::UNSAID.common(build(3)), None);
        assert_eq!(Versions::new(0, 1), None);
        assert_eq!(Versions::new(3, 2), None);
    }

    #[test]
    fn what_a_version_lacks_is_named_with_the_version_that_has_it() {
        struct Newer;
        impl Since for Newer {
            fn since(&self) -> Version {
                Version::SECOND
            }
            fn name(&self) -> &'static str {
                "newer"
            }
        }
        assert_eq!(Version::SECOND.has(&Newer), Ok(()));
        let text = Version::FIRST.has(&Newer).unwrap_err().to_string();
        assert!(text.contains("wire version 1"), "{text}");
        assert!(text.contains("\"newer\" (wire version 2"), "{text}");
    }
}
