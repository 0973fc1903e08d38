//! Why a process could not begin, with the exit code axd reads.

use std::path::PathBuf;

/// A failure to start, or one that ends the process. [`Self::code`] is the exit code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec file could not be read or makes no sense.
    #[error("spec {path}: {why}", path = path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        why: String,
    },
    /// The machine could not be built.
    #[error("build the machine: {0}")]
    Machine(#[from] vmm::Error),
    /// A disk image is missing, in use, or of the wrong size.
    #[error(transparent)]
    Image(#[from] ax_disk::OpenError),
    /// A tap interface could not be opened.
    #[error(
        "network device {nic}: tap {tap}: {source}; create it with `ip tuntap add {tap} mode tap`"
    )]
    Tap {
        /// Number of the device.
        nic: usize,
        /// The interface.
        tap: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The control socket or a link address could not be used.
    #[error("listen on {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The link's keys could not be used.
    #[error("link: {0}")]
    Link(String),
    /// The arbiter does not allow this side to run.
    #[error("the arbiter refuses: {0}")]
    Arbiter(String),
    /// A thread could not be started.
    #[error("start a thread: {0}")]
    Thread(#[source] std::io::Error),
}

impl Error {
    /// The exit code: what kind of thing was wrong.
    pub fn code(&self) -> u8 {
        match self {
            Error::Spec { .. } | Error::Machine(vmm::Error::Config(_) | vmm::Error::Boot(_)) => 2,
            Error::Machine(vmm::Error::NoKvm(_) | vmm::Error::Missing(_)) => 3,
            Error::Machine(vmm::Error::Ram { .. }) => 6,
            Error::Machine(_) | Error::Thread(_) => 1,
            Error::Image(_) => 4,
            Error::Tap { .. } => 5,
            Error::Listen { .. } | Error::Link(_) => 7,
            Error::Arbiter(_) => 8,
        }
    }
}
