//! What can go wrong with the devices as a whole. (What a guest does wrong breaks only its device.)

use std::io;

use ax_wire::state::{StateError, StateFull};

/// Why the devices could not be made, started, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More devices than there are interrupt lines for.
    #[error("{asked} virtio devices asked for, at most {most} have an interrupt line: remove some")]
    TooMany {
        /// Devices asked for.
        asked: usize,
        /// Interrupt lines there are.
        most: usize,
    },
    /// `DeviceSpec::disks` and `Ports::disks` differ.
    #[error("{spec} disks in the device specification, {given} disks given")]
    Disks {
        /// Disks in the specification.
        spec: usize,
        /// Disks given.
        given: usize,
    },
    /// A disk's size is not usable.
    #[error("disk {disk} has {size} bytes: must be a multiple of 512, and not 0")]
    DiskSize {
        /// Which disk.
        disk: usize,
        /// Its size, bytes.
        size: u64,
    },
    /// An event descriptor, poll set or thread could not be made.
    #[error("cannot {doing}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The state buffer is too small.
    #[error("cannot save device state")]
    Full(#[from] StateFull),
    /// Saving or restoring needs the devices quiet.
    #[error("device state cannot be {0} while devices are running: quiesce them first")]
    NotQuiet(&'static str),
    /// The saved state cannot be read.
    #[error("device state is damaged")]
    Damaged(#[from] StateError),
    /// The saved state is not of these devices.
    #[error("saved state of {device} does not fit: {why}")]
    State {
        /// Block kind and number.
        device: String,
        /// What is wrong with it.
        why: String,
    },
}
