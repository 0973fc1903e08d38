//! Oracles: clients that stand outside and cannot be talked out of what they saw.
//!
//! Each starts with a spec, runs on threads of its own (inside a [`NetNs`] if asked), and
//! [`Oracle::stop`] gives its report:
//!
//! - [`ledger`]: appends numbered records over TCP and reads all of them back at the end
//! - [`get`]: GET over one RESP connection, one at a time: latency of a request that changes nothing
//! - [`incr`]: INCR over one RESP connection, one at a time; every answer must be one more
//! - [`udp`]: an echo every millisecond whether answered or not: latency and longest silence
//! - [`nonce`]: two different nonces under one counter prove that an uncommitted epoch's output
//!   escaped (I1)
//!
//! What is counted is what a user would sue over, see [`Verdict`]; a frame seen twice is not.

mod conversation;
pub mod get;
pub mod incr;
pub mod ledger;
pub mod nonce;
mod samples;
pub mod udp;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use samples::{Gap, Percentiles, Samples};

use crate::net::NetNs;
use crate::{Error, Result, panic_text};

/// Ports of the probe guest's services.
pub mod port {
    /// Echo, UDP and TCP.
    pub const ECHO: u16 = 7;
    /// RESP, TCP.
    pub const RESP: u16 = 6379;
    /// Ledger, TCP.
    pub const LEDGER: u16 = 7000;
    /// Control, TCP.
    pub const CONTROL: u16 = 7001;
    /// Nonces, UDP.
    pub const NONCE: u16 = 7002;
}

/// What must be zero.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Requests that were answered.
    pub requests: u64,
    /// Acknowledged work that is gone: ledger records, increments.
    pub lost: u64,
    /// Work done more often than asked: ledger records, increments.
    pub duplicated: u64,
    /// Ledger records out of the order they were appended in.
    pub reordered: u64,
    /// TCP connections that ended, timed out or spoke nonsense.
    pub connections_broken: u64,
}

impl Verdict {
    /// Whether nobody outside could tell.
    pub fn is_clean(&self) -> bool {
        self.lost == 0
            && self.duplicated == 0
            && self.reordered == 0
            && self.connections_broken == 0
    }
}

impl std::ops::Add for Verdict {
    type Output = Verdict;

    fn add(self, other: Verdict) -> Verdict {
        Verdict {
            requests: self.requests + other.requests,
            lost: self.lost + other.lost,
            duplicated: self.duplicated + other.duplicated,
            reordered: self.reordered + other.reordered,
            connections_broken: self.connections_broken + other.connections_broken,
        }
    }
}

/// From where an oracle talks.
#[derive(Debug, Clone)]
pub enum Origin {
    /// This process's own network.
    Here,
    /// Inside a network namespace.
    In(NetNs),
}

impl Origin {
    fn enter(&self) -> Result<()> {
        match self {
            Origin::Here => Ok(()),
            Origin::In(ns) => ns.enter(),
        }
    }
}

/// A running oracle.
#[derive(Debug)]
pub struct Oracle<R> {
    control: Arc<Control>,
    thread: JoinHandle<Result<R>>,
}

/// Shared between a running oracle and its owner.
#[derive(Debug, Default)]
pub(crate) struct Control {
    stop: AtomicBool,
    answers: AtomicU64,
}

impl Control {
    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }
}

impl<R: Send + 'static> Oracle<R> {
    fn start(
        name: &str,
        origin: &Origin,
        body: impl FnOnce(&Arc<Control>) -> Result<R> + Send + 'static,
    ) -> Result<Oracle<R>> {
        let control = Arc::new(Control::default());
        let theirs = control.clone();
        let origin = origin.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                origin.enter()?;
                body(&theirs)
            })
            .map_err(Error::os(format!("start the {name} oracle")))?;
        Ok(Oracle { control, thread })
    }

    /// How many answers it has seen so far.
    pub fn answers(&self) -> u64 {
        self.control.answers.load(Ordering::Relaxed)
    }

    /// Waits until it has seen `n` answers in all.
    ///
    /// # Errors
    /// When that takes longer than `patience`, or the oracle has ended by an error.
    pub fn wait_for_answers(&self, n: u64, patience: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + patience;
        while self.answers() < n && !self.thread.is_finished() {
            if std::time::Instant::now() > deadline {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if self.answers() >= n {
            return Ok(());
        }
        let name = self.thread.thread().name().unwrap_or("?").to_string();
        Err(Error::Product(format!(
            "the {name} oracle saw {} of {n} answers within {patience:?}",
            self.answers()
        )))
    }

    /// Ends it, after the answer it is waiting for if any, and returns what it saw.
    ///
    /// # Errors
    /// When the oracle could not do its work at all.
    pub fn stop(self) -> Result<R> {
        self.control.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|p| Error::Panicked(panic_text(&*p)))?
    }
}
