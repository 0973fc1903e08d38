//! What a disk does wrong by order.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is asked of a disk. Looking (at names, sizes, holes) always works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Bytes of a file.
    Read,
    /// Bytes, holes and sizes of a file.
    Write,
    /// `fsync` and `fdatasync`, of files and folders.
    Sync,
    /// To make, rename and remove files and folders.
    Names,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 4] = [Op::Read, Op::Write, Op::Sync, Op::Names];
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// EIO. After a failed sync what was to become durable never does, though it can be read.
    Error,
    /// ENOSPC for whatever takes more room than there is already.
    Full,
    /// It takes so much longer.
    Slow(Duration),
    /// It does not end until the harm is lifted, or the power is cut.
    Hang,
}

#[derive(Debug)]
struct Rule {
    under: PathBuf,
    ops: Vec<Op>,
    harm: Harm,
}

/// How an operation may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Free,
    /// As long as it takes no room.
    Full,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    /// Counts what was ordered and lifted.
    version: u64,
    /// Counts power cuts: an operation of an earlier life ends with EIO.
    life: u64,
}

/// The harms in force.
#[derive(Debug, Default)]
pub(super) struct Faults {
    state: Mutex<State>,
    changed: Condvar,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl State {
    fn harms(&self, path: &Path, op: Op) -> impl Iterator<Item = Harm> {
        let due = move |rule: &&Rule| rule.ops.contains(&op) && path.starts_with(&rule.under);
        self.rules.iter().filter(due).map(|rule| rule.harm)
    }

    fn way(&self, path: &Path, op: Op) -> io::Result<Way> {
        let mut way = Way::Free;
        for harm in self.harms(path, op) {
            match harm {
                Harm::Error => return Err(eio()),
                Harm::Full => way = Way::Full,
                Harm::Slow(_) | Harm::Hang => {}
            }
        }
        Ok(way)
    }

    /// How long an operation that begins now waits; none for as long as it is not lifted.
    fn delay(&self, path: &Path, op: Op) -> Option<Duration> {
        self.harms(path, op)
            .try_fold(Duration::ZERO, |so_far, harm| match harm {
                Harm::Slow(more) => Some(so_far + more),
                Harm::Hang => None,
                Harm::Error | Harm::Full => Some(so_far),
            })
    }
}

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.version += 1;
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn add(&self, under: &Path, ops: &[Op], harm: Harm) {
        let rule = Rule {
            under: under.to_path_buf(),
            ops: ops.to_vec(),
            harm,
        };
        self.update(|state| state.rules.push(rule));
    }

    pub(super) fn lift(&self) {
        self.update(|state| state.rules.clear());
    }

    /// Whatever waits now ends with an error.
    pub(super) fn end_life(&self) {
        self.update(|state| state.life += 1);
    }

    pub(super) fn life(&self) -> u64 {
        self.state().life
    }

    /// How `op` may go on at once; none when it has to wait.
    pub(super) fn at_once(&self, life: u64, path: &Path, op: Op) -> Option<io::Result<Way>> {
        let state = self.state();
        if state.life != life {
            return Some(Err(eio()));
        }
        (state.delay(path, op) == Some(Duration::ZERO)).then(|| state.way(path, op))
    }

    /// Waits as ordered, less when that is lifted meanwhile.
    pub(super) fn wait(&self, life: u64, path: &Path, op: Op) -> io::Result<Way> {
        let began = Instant::now();
        let mut state = self.state();
        loop {
            if state.life != life {
                return Err(eio());
            }
            let left = state
                .delay(path, op)
                .map(|delay| delay.saturating_sub(began.elapsed()));
            state = match left {
                Some(Duration::ZERO) => return state.way(path, op),
                Some(left) => {
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let woken = self.changed.wait(state);
                    woken.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}
