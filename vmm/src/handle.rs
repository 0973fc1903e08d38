//! What other threads may do with a machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ax_wire::offload::Packet;

use crate::devices::{DeviceSet, RxOutcome};
use crate::vcpu::Counters;

/// Counts since the machine was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Port accesses answered.
    pub io_exits: u64,
    /// MMIO accesses answered.
    pub mmio_exits: u64,
    /// Stops because a dirty ring was full.
    pub ring_full_exits: u64,
    /// Times a vCPU was interrupted out of KVM_RUN.
    pub interrupted: u64,
}

/// A way to feed a machine from other threads.
#[derive(Clone)]
pub struct MachineHandle {
    pub(crate) devices: Arc<DeviceSet>,
    pub(crate) counters: Arc<Counters>,
}

impl std::fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineHandle")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl MachineHandle {
    /// Gives the guest a frame received for network device `nic`, behind its header.
    pub fn net_rx(&self, nic: usize, packet: Packet<'_>) -> RxOutcome {
        self.devices.net_rx(nic, packet)
    }

    /// How many received frames network device `nic` is done with (rule 7).
    pub fn rx_delivered(&self, nic: usize) -> u64 {
        self.devices.rx_delivered(nic)
    }

    /// Types bytes into the guest's console; how many it took.
    pub fn console_in(&self, bytes: &[u8]) -> usize {
        self.devices.console_in(bytes)
    }

    /// There is room for outputs again after [`crate::ports::Full`]: devices try again.
    pub fn retry_outputs(&self) {
        self.devices.retry_outputs();
    }

    /// The devices, for their wake-up events.
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// What has happened so far.
    pub fn stats(&self) -> Stats {
        let count = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        Stats {
            io_exits: count(&self.counters.io_exits),
            mmio_exits: count(&self.counters.mmio_exits),
            ring_full_exits: count(&self.counters.ring_full_exits),
            interrupted: count(&self.counters.interrupted),
        }
    }
}
