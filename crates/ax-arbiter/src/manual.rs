//! One host's durable knowledge of one pair that no third party decides for.
//!
//! Two hosts alone cannot tell a dead peer from a cut cable, so neither ever decides by itself: a
//! change needs the connected peer's agreement, or an operator ([`word`]). A host that lost its peer is
//! held until then.
//!
//! The file is the one in which a process keeps its witness's last record, so that a pair which gets a
//! witness later registers with what both hosts agreed on (rule 27). Who answers for the host holds a
//! lock beside it: the pair's process as long as it lives, else the daemon for the moment of an answer.
//! So an answer given without a process is given while none lives.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use ax_wire::Side;
use ax_wire::record::{Refusal, Request};
use ax_wire::word::{Answer, Known, Letter};
use parking_lot::Mutex;

use crate::rules::Word;
use crate::word::{self, Conflict, Stance};

/// The file with what this host knows of the pair, in the folder of its VM's state.
pub const FILE: &str = "record.json";
const LOCK: &str = "record.lock";

/// Why a host's knowledge of a pair can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ManualError {
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The process of the pair has it.
    #[error("{} is in use by the VM's process", .0.display())]
    InUse(PathBuf),
    /// The file is not what was written.
    #[error(
        "{path}: {why}; if the other host knows the pair, remove this file: it is learned from there",
        path = path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// What this host knows of one pair, and nobody else decides on meanwhile.
#[derive(Debug)]
pub struct Manual {
    file: PathBuf,
    known: Mutex<Option<Known>>,
    _lock: File,
}

/// What came of an answer or a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What was known before.
    pub before: Option<Known>,
    /// What is known now, durable.
    pub now: Option<Known>,
}

impl Manual {
    /// Opens what is known in the folder `dir`, which must exist. Nothing is known of a pair that was
    /// never started.
    ///
    /// # Errors
    /// Someone else has it, or it can't be read.
    pub fn open(dir: &Path) -> Result<Manual, ManualError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| ManualError::Io { path, source }
        };
        let lock_path = dir.join(LOCK);
        let lock = File::create(&lock_path).map_err(io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ManualError::InUse(lock_path)),
            Err(TryLockError::Error(source)) => return Err(io(&lock_path)(source)),
        }
        let file = dir.join(FILE);
        let known = match std::fs::read(&file) {
            Ok(bytes) => {
                let known = serde_json::from_slice::<Known>(&bytes);
                Some(known.map_err(|e| ManualError::Damaged {
                    path: file.clone(),
                    why: e.to_string(),
                })?)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(io(&file)(e)),
        };
        Ok(Manual {
            file,
            known: Mutex::new(known.map(word::normal)),
            _lock: lock,
        })
    }

    /// What this host knows.
    pub fn known(&self) -> Option<Known> {
        *self.known.lock()
    }

    /// Answers the other host's letter; what it changes here is durable when this returns. `stance` is
    /// asked for while nothing else can change what is known.
    ///
    /// # Errors
    /// The change could not be written; the answer must not leave.
    pub fn answer(
        &self,
        side: Side,
        stance: impl FnOnce() -> Stance,
        letter: &Letter,
    ) -> Result<(Answer, Change), ManualError> {
        let mut known = self.known.lock();
        let before = *known;
        let (answer, now) = word::answer(side, stance(), before.as_ref(), letter);
        self.keep(&mut known, now)?;
        Ok((answer, Change { before, now }))
    }

    /// Takes in what the other host answered to a letter that said `told`; durable when this returns.
    ///
    /// # Errors
    /// It could not be written: whatever was agreed to must not be acted on. Inside, a [`Conflict`].
    pub fn heard(
        &self,
        told: &Known,
        request: Option<&Request>,
        answer: &Answer,
    ) -> Result<Result<Change, Box<Conflict>>, ManualError> {
        let mut known = self.known.lock();
        let before = *known;
        let mine = before.unwrap_or(*told);
        match word::heard(&mine, request, answer) {
            Ok(now) => {
                self.keep(&mut known, now.or(before))?;
                Ok(Ok(Change {
                    before,
                    now: *known,
                }))
            }
            Err(conflict) => Ok(Err(conflict)),
        }
    }

    /// Changes the record without the other host; durable when this returns. `told` is what holds of a
    /// pair never started.
    ///
    /// # Errors
    /// It could not be written. Inside, the rules' refusal.
    pub fn alone(
        &self,
        told: &Known,
        word: Word,
        request: &Request,
    ) -> Result<Result<Known, Refusal>, ManualError> {
        let mut known = self.known.lock();
        match word::alone(&known.unwrap_or(*told), word, request) {
            Ok(now) => {
                self.keep(&mut known, Some(now))?;
                Ok(Ok(now))
            }
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Writes durably what has changed, so that a crash leaves the old or the new.
    fn keep(&self, known: &mut Option<Known>, now: Option<Known>) -> Result<(), ManualError> {
        let Some(now) = now.filter(|now| Some(*now) != *known) else {
            return Ok(());
        };
        write(&self.file, &now).map_err(|source| ManualError::Io {
            path: self.file.clone(),
            source,
        })?;
        *known = Some(now);
        Ok(())
    }
}

/// Writes durably what is known of a pair, so that a crash leaves the old or the new.
///
/// # Errors
/// The file's.
pub fn write(file: &Path, what: &impl serde::Serialize) -> std::io::Result<()> {
    let new = file.with_extension("new");
    let mut out = File::create(&new)?;
    out.write_all(&serde_json::to_vec(what)?)?;
    out.sync_all()?;
    std::fs::rename(&new, file)?;
    match file.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
