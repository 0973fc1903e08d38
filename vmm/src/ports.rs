//! What the machine's devices need from outside: where outputs go, where disks are.
//!
//! Device emulation calls these with the device's lock held, so that an output or a write belongs
//! to exactly the epoch in which the device state that tells of it changes: a capture holds
//! every device's lock.

use std::io;

use ax_wire::offload::Packet;

/// No room to hold more output: the caller leaves the request in its queue and tries again after
/// the next [`crate::ports::Outputs`] drain (the machine is told by `retry_outputs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room to hold more output")]
pub struct Full;

/// Why the guest machine as a whole stops or starts again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// The guest asked to be switched off.
    Off,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU shut down (triple fault) or KVM could not go on: the guest has crashed.
    Crash,
}

/// Everything the guest shows to the outside. Implemented by the I/O barrier. Never blocks.
pub trait Outputs: Send + Sync {
    /// One Ethernet frame sent by network device `nic`, behind a header that has been checked and says what the
    /// device has agreed to do with it.
    fn frame(&self, nic: u8, packet: Packet<'_>) -> Result<(), Full>;

    /// Console bytes; `offset` is their place in the guest's whole console stream (rule 8),
    /// counted by the serial device and part of its saved state.
    fn console(&self, offset: u64, bytes: &[u8]) -> Result<(), Full>;

    /// The guest powered off, reset or crashed. Its vCPUs stay parked until told otherwise.
    fn power(&self, what: Power);
}

/// One disk. Requests of one disk are executed by one thread, one after the other.
///
/// An error of the kind [`io::ErrorKind::Interrupted`] is none of the guest's: the request is left where it
/// is, for whoever goes on to issue it again (rule 13). Any other one is shown to the guest.
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// True when the guest may not write.
    fn read_only(&self) -> bool;

    /// Reads at byte `offset`. May block; called without any device lock.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Waits until `len` bytes of write payload may be recorded (back-pressure: byte budget), then
    /// writes to the local image. May block; called without any device lock.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes earlier writes durable. May block; called without any device lock.
    fn flush(&self) -> io::Result<()>;

    /// A write that is to be durable when it returns, for a guest that does not flush. May block; called
    /// without any device lock.
    fn write_durably(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)?;
        self.flush()
    }

    /// The write becomes visible to the guest now: records its payload in the open epoch (rule 13).
    /// Called under the device's lock, just before the request is put in the used ring. Never blocks.
    fn write_completed(&self, offset: u64, data: &[u8]);

    /// The flush becomes visible to the guest now: records the barrier in the open epoch. As above.
    fn flush_completed(&self);
}
