//! Which saved-state blocks belong to the devices.

/// First block kind of the devices.
pub const FIRST: u16 = 0x100;
/// Last block kind kept for the devices.
pub const LAST: u16 = 0x1ff;

/// A device's state block ([`ax_wire::state`]); the block's index numbers devices of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// virtio-net: transport, queues, frames received.
    Net = FIRST,
    /// virtio-blk: transport, queue, capacity.
    Disk = 0x101,
    /// virtio-rng: transport, queue.
    Rng = 0x102,
    /// The serial port: registers, input FIFO, output not yet handed over, console offset.
    Serial = 0x103,
    /// CMOS, RTC, power button and the other fixed ports.
    Platform = 0x104,
}

impl Kind {
    /// The layout version this build writes, and the only one it reads.
    pub const VERSION: u16 = 1;

    /// The number in the block's header.
    pub const fn number(self) -> u16 {
        self as u16
    }
}
