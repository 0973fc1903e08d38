//! The devices' saved state, as laid out in its blocks (little-endian, version 1 of each kind).
//!
//! A disk has no list of requests in flight: a request stays at the head of the available ring,
//! in guest memory, until it completes, so the queue's place says it all (rule 13).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::transport::MOST_QUEUES;

/// A virtqueue's registers and place.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub(super) struct QueueRecord {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    /// As the guest wrote it; meaningful when it is a power of two within the offered size.
    pub(super) size: u32,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    /// 1 when in use.
    pub(super) ready: u64,
}

/// The virtio-mmio registers of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct TransportRecord {
    pub(super) accepted: u64,
    pub(super) status: u32,
    pub(super) interrupts: u32,
    pub(super) device_sel: u32,
    pub(super) driver_sel: u32,
    pub(super) queue_sel: u32,
    pub(super) unused: u32,
    pub(super) queues: [QueueRecord; MOST_QUEUES],
}

/// A network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct NetRecord {
    pub(super) transport: TransportRecord,
    pub(super) mac: [u8; 6],
    pub(super) unused: [u8; 2],
    /// Received frames the device is done with (rule 7).
    pub(super) received: u64,
}

/// A disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct DiskRecord {
    pub(super) transport: TransportRecord,
    /// Size, bytes.
    pub(super) size: u64,
    /// 1 when the guest may not write.
    pub(super) read_only: u64,
}

/// The entropy device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RngRecord {
    pub(super) transport: TransportRecord,
}

/// Bytes of the serial port's input FIFO.
pub(super) const FIFO: usize = 64;
/// Console bytes kept while nobody takes them.
pub(super) const BACKLOG: usize = 1024;

/// The serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct SerialRecord {
    /// Place in the console stream of the first byte of the backlog (rule 8).
    pub(super) offset: u64,
    pub(super) backlog_len: u16,
    pub(super) divisor_low: u8,
    pub(super) divisor_high: u8,
    pub(super) interrupt_enable: u8,
    pub(super) interrupt_identification: u8,
    pub(super) line_control: u8,
    pub(super) line_status: u8,
    pub(super) modem_control: u8,
    pub(super) modem_status: u8,
    pub(super) scratch: u8,
    pub(super) fifo_len: u8,
    pub(super) unused: [u8; 4],
    pub(super) fifo: [u8; FIFO],
    pub(super) backlog: [u8; BACKLOG],
}

/// The fixed ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct PlatformRecord {
    /// Latest time the guest has read from the RTC, seconds since 1970, UTC (I7).
    pub(super) latest: u64,
    pub(super) cmos_index: u8,
    pub(super) unused: [u8; 3],
    /// PM1a registers. Zero in what a build without them has saved: nobody listened to the button.
    pub(super) pm1_status: u16,
    pub(super) pm1_enable: u16,
    pub(super) cmos: [u8; 128],
}
