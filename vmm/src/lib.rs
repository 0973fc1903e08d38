//! The KVM machine: memory, vCPUs, interrupt chips, clock, devices; boot, save, restore.
//!
//! Knows nothing of epochs or links. What it needs from outside are [`ports`].

pub mod ports;
