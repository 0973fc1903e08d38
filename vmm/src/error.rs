//! What can go wrong with a machine.

use std::io;

use ax_wire::state::{StateError, StateFull};

use crate::boot::BootError;

/// Result of machine operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with a machine, where, and where it helps what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration can't be run.
    #[error("machine configuration: {0}")]
    Config(String),
    /// /dev/kvm can't be used.
    #[error("no usable KVM: opening /dev/kvm: {why}; {cure}", why = .0, cure = cure(.0))]
    NoKvm(#[source] io::Error),
    /// KVM lacks something this machine can't do without.
    #[error("this KVM lacks {0}")]
    Missing(&'static str),
    /// A KVM call failed.
    #[error("{doing}: {source}")]
    Kvm {
        /// The call and its object.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Guest RAM could not be made.
    #[error("guest RAM of {bytes} bytes: {source}")]
    Ram {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Pages that are not guest RAM, or not whole pages.
    #[error("{bytes} bytes from page {page:#x} are not whole pages of one region of guest RAM")]
    OutsideRam {
        /// First page.
        page: u64,
        /// Length asked for.
        bytes: usize,
    },
    /// The kernel could not be loaded.
    #[error("boot: {0}")]
    Boot(#[from] BootError),
    /// A device could not be made, saved or restored.
    #[error("devices: {0}")]
    Devices(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The state buffer is too small.
    #[error(transparent)]
    StateFull(#[from] StateFull),
    /// Saved state can't be read.
    #[error("saved state: {0}")]
    StateBytes(#[from] StateError),
    /// Saved state is not this machine's.
    #[error("saved state does not fit this machine: {0}")]
    State(String),
    /// A thread could not be started.
    #[error("starting thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An operation that needs the guest paused (or running) found it otherwise.
    #[error("{0}")]
    Order(&'static str),
    /// A vCPU thread ended on its own; the machine can't go on.
    #[error("a vCPU thread has ended unexpectedly")]
    VcpuGone,
}

/// What to do about a /dev/kvm that can't be opened.
fn cure(why: &io::Error) -> &'static str {
    match why.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "enable virtualisation in the firmware (inside a VM: nested virtualisation on its host) \
             and load kvm_intel or kvm_amd"
        }
        Some(libc::EACCES | libc::EPERM) => "add this user to group kvm, or run as root",
        Some(libc::EBUSY) => "another hypervisor holds the CPU's virtualisation: stop it",
        _ => "see the kernel's log",
    }
}

/// Names the KVM call that failed.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn doing(self, doing: &'static str) -> Result<T> {
        self.map_err(|e| Error::Kvm {
            doing,
            source: io::Error::from_raw_os_error(e.errno()),
        })
    }
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str) -> Result<T> {
        self.map_err(|source| Error::Kvm { doing, source })
    }
}
