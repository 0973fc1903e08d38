//! Which third party decides for a pair, and which is to, as one host knows it; durable.
//!
//! The configuration says who shall decide; this file says who does. They differ from the moment an
//! operator writes another arbiter into `axd.toml` until both hosts have changed to it (rule 27).

use std::path::{Path, PathBuf};

use ax_api::process::Arbiter;
use ax_arbiter::change::Aim;
use ax_arbiter::manual;
use ax_wire::record::Record;
use serde::{Deserialize, Serialize};

/// The file, in the folder of the VM's state.
const FILE: &str = "arbiter.json";

/// What is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    /// Who decides.
    now: Arbiter,
    /// That one counts for nothing any more and is asked nothing: this one is to decide.
    void_for: Option<Arbiter>,
    /// The latest record this host knows, acted on or not.
    record: Option<Record>,
}

/// Who decides, and who is to.
#[derive(Debug)]
pub struct Course {
    written: Written,
    file: PathBuf,
    /// The last record this host acted on.
    acted_on: PathBuf,
    configured: Arbiter,
    standby: Option<Arbiter>,
}

/// True when both are the same third party, whatever addresses it has.
fn same(one: &Arbiter, other: &Arbiter) -> bool {
    match (one, other) {
        (Arbiter::Witness { name: one, .. }, Arbiter::Witness { name: other, .. }) => one == other,
        (Arbiter::Etcd { members: one }, Arbiter::Etcd { members: other }) => {
            one.iter().any(|member| other.contains(member))
        }
        (one, other) => one == other,
    }
}

/// Reads the last record this host acted on.
fn load(file: &Path) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

impl Course {
    /// Reads what is written in `state_dir`; the configured one decides for a pair of which nothing is.
    ///
    /// # Errors
    /// The file can't be read or written, or is not what was written.
    pub fn open(
        state_dir: &Path,
        configured: Arbiter,
        standby: Option<Arbiter>,
    ) -> std::io::Result<Course> {
        let file = state_dir.join(FILE);
        let (written, known) = match std::fs::read(&file) {
            Ok(bytes) => (serde_json::from_slice(&bytes)?, true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let now = configured.clone();
                let new = Written {
                    now,
                    void_for: None,
                    record: None,
                };
                (new, false)
            }
            Err(e) => return Err(e),
        };
        let mut course = Course {
            written,
            file,
            acted_on: state_dir.join(manual::FILE),
            configured: configured.clone(),
            standby: standby.clone(),
        };
        if !known {
            course.write(course.written.clone())?;
        }
        course.aim(configured, standby)?;
        Ok(course)
    }

    /// No third party decides from now on.
    ///
    /// # Errors
    /// What was written can't be removed.
    pub fn forget(state_dir: &Path) -> std::io::Result<()> {
        match std::fs::remove_file(state_dir.join(FILE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The configuration says this from now on.
    ///
    /// # Errors
    /// New addresses of the one that decides could not be written.
    pub fn aim(&mut self, configured: Arbiter, standby: Option<Arbiter>) -> std::io::Result<()> {
        (self.configured, self.standby) = (configured, standby);
        let present = &self.written.now;
        let named = [Some(&self.configured), self.standby.as_ref()];
        let moved = named.into_iter().flatten().find(|a| same(a, present));
        match moved.filter(|at| *at != present).cloned() {
            Some(now) => self.write(Written {
                now,
                ..self.written.clone()
            }),
            None => Ok(()),
        }
    }

    /// Who decides.
    pub fn now(&self) -> &Arbiter {
        &self.written.now
    }

    /// True when the one that decided is asked nothing any more.
    pub fn is_void(&self) -> bool {
        self.written.void_for.is_some()
    }

    /// Who is to decide instead, and when.
    pub fn next(&self) -> Option<(&Arbiter, Aim)> {
        let is_now = |arbiter: &Arbiter| same(arbiter, &self.written.now);
        let next = match (&self.written.void_for, &self.standby) {
            (Some(to), _) => Some((to, Aim::Always)),
            (None, Some(standby)) if is_now(&self.configured) => Some((standby, Aim::WhenLost)),
            (None, Some(standby)) if is_now(standby) => Some((&self.configured, Aim::WhenLost)),
            _ => Some((&self.configured, Aim::Always)),
        };
        // Without a third party the hosts keep the record in another way, from their next start on.
        next.filter(|(to, _)| !is_now(to) && **to != Arbiter::Manual)
    }

    /// The latest record this host knows.
    pub fn record(&self) -> Option<Record> {
        let known = [load(&self.acted_on), self.written.record];
        known.into_iter().flatten().max_by_key(|r| r.generation)
    }

    /// Writes down a record that was granted, to be acted on.
    ///
    /// # Errors
    /// It could not be written.
    pub fn granted(&self, record: &Record) -> std::io::Result<()> {
        manual::write(&self.acted_on, record)
    }

    /// Writes down a record that is known.
    ///
    /// # Errors
    /// It could not be written.
    pub fn learned(&mut self, record: Record) -> std::io::Result<()> {
        if self.record() == Some(record) {
            return Ok(());
        }
        self.write(Written {
            record: Some(record),
            ..self.written.clone()
        })
    }

    /// Writes down that the one that decided counts for nothing any more.
    ///
    /// # Errors
    /// It could not be written.
    pub fn void(&mut self, for_this: Arbiter) -> std::io::Result<()> {
        self.write(Written {
            void_for: Some(for_this),
            ..self.written.clone()
        })
    }

    /// Writes down that this one decides, by this record.
    ///
    /// # Errors
    /// It could not be written.
    pub fn settle(&mut self, now: Arbiter, record: Record) -> std::io::Result<()> {
        self.write(Written {
            now,
            void_for: None,
            record: Some(record),
        })
    }

    fn write(&mut self, written: Written) -> std::io::Result<()> {
        manual::write(&self.file, &written)?;
        self.written = written;
        Ok(())
    }
}

impl std::fmt::Display for Course {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.next() {
            Some((next, Aim::Always)) => {
                write!(f, "{}, to be replaced by {next}", self.now())
            }
            Some((next, Aim::WhenLost)) => write!(f, "{}; {next} stands by", self.now()),
            None => write!(f, "{}", self.now()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panic")]
mod tests {
    use super::*;

    fn witness(name: &str, port: u16) -> Arbiter {
        Arbiter::Witness {
            name: name.into(),
            addresses: vec![([10, 0, 0, 1], port).into()],
        }
    }

    #[test]
    fn who_decides_outlives_a_change_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (witness("one", 1), witness("two", 2));
        let mut course = Course::open(dir.path(), one.clone(), None).unwrap();
        assert_eq!((course.now(), course.next()), (&one, None));
        course.aim(two.clone(), None).unwrap();
        assert_eq!(course.next(), Some((&two, Aim::Always)));
        drop(course);
        let mut course = Course::open(dir.path(), two.clone(), None).unwrap();
        assert_eq!(course.now(), &one);
        // Void for one, it goes there and nowhere else first, whatever is configured then.
        course.void(two.clone()).unwrap();
        let course = Course::open(dir.path(), witness("three", 3), None).unwrap();
        assert!(course.is_void());
        assert_eq!(course.next(), Some((&two, Aim::Always)));
    }

    #[test]
    fn of_two_configured_one_decides_and_the_other_stands_by() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (witness("one", 1), witness("two", 2));
        let mut course = Course::open(dir.path(), one.clone(), Some(two.clone())).unwrap();
        assert_eq!(course.next(), Some((&two, Aim::WhenLost)));
        let record = Record::defined(ax_wire::record::Copies::Both, {
            ax_wire::record::Arbiter::Operator
        });
        course.settle(two.clone(), record).unwrap();
        let course = Course::open(dir.path(), one.clone(), Some(two.clone())).unwrap();
        assert_eq!(course.now(), &two);
        assert_eq!(course.next(), Some((&one, Aim::WhenLost)));
        assert_eq!(course.record(), Some(record));
    }

    #[test]
    fn another_address_is_not_another_witness() {
        let dir = tempfile::tempdir().unwrap();
        let mut course = Course::open(dir.path(), witness("one", 1), None).unwrap();
        course.aim(witness("one", 9), None).unwrap();
        assert_eq!((course.now(), course.next()), (&witness("one", 9), None));
    }
}
