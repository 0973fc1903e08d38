//! The devices a guest sees: virtio net, disk and entropy over virtio-mmio, serial console, fixed ports.
mod error;
pub mod kinds;
pub use error::Error;

use crate::ports::{Disk, Outputs};
use ax_wire::state::{StateReader, StateWriter};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// Which devices a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The MAC address of each network device.
    pub nics: Vec<[u8; 6]>,
    /// Number of disks.
    pub disks: usize,
    /// Whether there is an entropy device.
    pub rng: bool,
}

/// What the devices need from outside.
#[derive(Clone)]
pub struct Ports {
    /// Where frames, console bytes and power events go.
    pub outputs: Arc<dyn Outputs>,
    /// The disks, in order; as many as [`DeviceSpec::disks`].
    pub disks: Vec<Arc<dyn Disk>>,
}

/// How one virtio-mmio device is connected to the machine.
#[derive(Debug)]
pub struct Wire {
    /// Guest-physical address of its register window.
    pub base: u64,
    /// Size of the window, bytes.
    pub size: u64,
    /// Global system interrupt: register `irq` for it as irqfd (edge, no resample).
    pub gsi: u32,
    /// Written to raise the interrupt.
    pub irq: EventFd,
    /// Doorbells: (address of QueueNotify, queue number to match as a 32-bit datum, event).
    pub doorbells: Vec<(u64, u32, EventFd)>,
}

/// What became of a received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxOutcome {
    /// In the guest's memory, counted.
    Delivered,
    /// The device is done with it without the guest seeing it (too large or too short): counted.
    Dropped,
    /// The guest has given no buffer: try again after [`DeviceSet::rx_wakeup`].
    NoBuffers,
    /// The guest's driver is not running (yet).
    NotReady,
}

/// All devices of one machine.
pub struct DeviceSet {
    wires: Vec<Wire>,
    serial_irq: EventFd,
    rx: EventFd,
}

#[allow(missing_docs, unused_variables)]
impl DeviceSet {
    pub fn new(mem: GuestMemory, spec: DeviceSpec, ports: Ports) -> Result<Self, Error> {
        let ev = || {
            EventFd::new(0).map_err(|source| Error::Os {
                doing: "make an event",
                source,
            })
        };
        Ok(DeviceSet {
            wires: Vec::new(),
            serial_irq: ev()?,
            rx: ev()?,
        })
    }
    pub fn wires(&self) -> &[Wire] {
        &self.wires
    }
    pub fn serial_irq(&self) -> (u32, &EventFd) {
        (4, &self.serial_irq)
    }
    pub fn cmdline(&self) -> String {
        String::new()
    }
    pub fn mmio_read(&self, addr: u64, out: &mut [u8]) {
        out.fill(0xff);
    }
    pub fn mmio_write(&self, addr: u64, data: &[u8]) {}
    pub fn pio_read(&self, port: u16, out: &mut [u8]) {
        out.fill(0xff);
    }
    pub fn pio_write(&self, port: u16, data: &[u8]) {}
    pub fn start(&self) -> Result<(), Error> {
        Ok(())
    }
    pub fn stop(&self) {}
    pub fn quiesce(&self) {}
    pub fn release(&self) {}
    pub fn save(&self, out: &mut StateWriter<'_>) -> Result<(), Error> {
        Ok(())
    }
    pub fn restore(&self, state: StateReader<'_>) -> Result<(), Error> {
        Ok(())
    }
    pub fn reset(&self) -> Result<(), Error> {
        Ok(())
    }
    pub fn kick_all(&self) {}
    pub fn net_rx(&self, nic: usize, frame: &[u8]) -> RxOutcome {
        RxOutcome::NotReady
    }
    pub fn rx_delivered(&self, nic: usize) -> u64 {
        0
    }
    pub fn rx_wakeup(&self, nic: usize) -> Option<&EventFd> {
        Some(&self.rx)
    }
    pub fn console_in(&self, bytes: &[u8]) -> usize {
        0
    }
    pub fn console_wakeup(&self) -> &EventFd {
        &self.rx
    }
    pub fn retry_outputs(&self) {}
}
