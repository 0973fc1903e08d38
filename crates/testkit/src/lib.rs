//! testkit: what the tests and the demo need besides the product.
//!
//! A test of AX reads like a story with four places in it. [`net::Lab`] builds them: two
//! hosts `a` and `b`, a `witness` and a `client`, each a network, process and mount namespace
//! of its own, joined by a business network and by dedicated links whose cables can be cut.
//! [`product`] builds and starts the real programs there, [`builds`] has other versions of them, [`site::Site`] sets up a whole pair
//! with its witness as a customer would; [`client`] are the oracles that stand
//! outside and notice a lost, doubled or reordered answer; [`net::Host::kill_all`] is the power
//! plug, and [`fault`] strikes inside a process, between two steps of an epoch. [`cable`] is a slower
//! way through user space, for faults no real cable has: delay, corruption, truncation, one direction
//! silent. [`fuse`] are disks that lose what was not flushed when their power is cut, that fail, are
//! slow, or hang.
//!
//! A test that cannot run here says so by name ([`require_kvm!`], [`require_lab!`]) and is
//! never counted as passed: see [`skip`].

pub mod builds;
pub mod cable;
mod chance;
pub mod client;
pub mod fault;
pub mod fuse;
pub mod kvm;
pub mod net;
mod power;
pub mod product;
pub mod site;
pub mod skip;
pub mod thread_stop;

use std::io;

pub use chance::Chance;

/// What went wrong in the test equipment itself, never in the product under test.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}")]
    Os {
        /// What was being attempted, with names.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused a change to the test network.
    #[error("{what}")]
    Netlink {
        /// What was being attempted, with names.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// This user may not create namespaces.
    #[error(
        "cannot create namespaces for the test hosts: {why}. Run as root, or as a user who may \
         create user namespaces (sysctl kernel.unprivileged_userns_clone=1, \
         user.max_user_namespaces > 0, kernel.apparmor_restrict_unprivileged_userns=0)"
    )]
    NoNamespaces {
        /// The kernel's answer.
        why: String,
    },
    /// A program of the product could not be built, found or started.
    #[error("{0}")]
    Product(String),
    /// A program did not say what it was waited for to say.
    #[error("waited {seconds} s for {program} to print {wanted:?}; its log so far:\n{log}")]
    NotReady {
        /// The program.
        program: String,
        /// The text waited for.
        wanted: String,
        /// How long, in seconds.
        seconds: u64,
        /// Everything it printed.
        log: String,
    },
    /// A thread of the test equipment panicked.
    #[error("a thread of the test equipment panicked: {0}")]
    Panicked(String),
}

/// Result with the test equipment's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Os { what, source }
    }
}

pub(crate) fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_string())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no message)".to_string())
}
