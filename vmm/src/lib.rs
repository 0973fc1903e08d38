//! The KVM machine: memory, vCPUs, interrupt chips, clock, devices; boot, save, restore.
//!
//! Knows nothing of epochs or links. What it needs from outside are [`ports`]. One [`Machine`] is
//! made either to boot ([`Machine::boot`]) or to take over a saved one ([`Machine::restore`]); both
//! ends in [`Machine::start`]. While it runs, its owner repeats
//! `pause → save → harvest → read_pages → resume` (rule 3), and anyone may hold a
//! [`MachineHandle`] to feed it frames and console bytes.
//!
//! The modules, in the order a machine lives through them:
//!
//! - [`config`]: what it consists of; [`caps`]: what this host can give and the peer must too;
//! - [`memory`], [`bitmap`]: guest RAM and which of its pages devices wrote;
//! - [`boot`]: kernels into memory, first registers;
//! - `vm`, `vcpu`, `gate`: the KVM objects, the vCPU threads, and how they are parked;
//! - `dirty`: which pages changed, by KVM's ring or bitmap;
//! - `state`, [`clock`]: what is saved, in which order, and what time it is after a restore;
//! - [`machine`]: all of it together; `handle`: what other threads may do with it;
//! - [`selfcheck`]: whether this host's KVM keeps what all of it builds on.

pub mod bitmap;
pub mod boot;
pub mod caps;
pub mod clock;
pub mod config;
mod cpuid;
pub mod devices;
mod dirty;
mod error;
mod gate;
mod handle;
pub mod machine;
pub mod memory;
mod msrs;
pub mod ports;
mod power;
pub mod selfcheck;
mod state;
mod sys;
mod vcpu;
mod vm;

pub use caps::HostCaps;
pub use config::{BootConfig, DirtyTracking, Image, MachineConfig, NicConfig};
pub use devices::{Ports, RxOutcome};
pub use error::{Error, Result};
pub use handle::{MachineHandle, Stats};
pub use machine::{Machine, Parking, Press};
pub use memory::{GuestMemory, RamRegion};
pub use vcpu::RingFull;
