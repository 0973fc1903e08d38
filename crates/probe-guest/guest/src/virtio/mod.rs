//! virtio over MMIO, version 2 (virtio 1.2, section 4.2), with split queues.

pub mod blk;
pub mod net;
mod queue;

pub use queue::Queue;

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::cmdline::Window;

const MAGIC: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SEL: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SEL: usize = 0x024;
const QUEUE_SEL: usize = 0x030;
const QUEUE_NUM_MAX: usize = 0x034;
const QUEUE_NUM: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const INTERRUPT_ACK: usize = 0x064;
const STATUS: usize = 0x070;
const QUEUE_DESC: usize = 0x080;
const QUEUE_AVAIL: usize = 0x090;
const QUEUE_USED: usize = 0x0a0;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;

/// A device's register window and interrupt.
pub struct Transport {
    base: usize,
    pin: u8,
    seen: u32,
}

impl Transport {
    /// Looks at a window; gives the device's type beside its transport if there is a device.
    pub fn probe(window: Window) -> Option<(Self, u32)> {
        let it = Self {
            base: window.addr as usize,
            pin: window.irq,
            seen: 0,
        };
        if it.read(MAGIC) != u32::from_le_bytes(*b"virt") || it.read(VERSION) != 2 {
            return None;
        }
        match it.read(DEVICE_ID) {
            0 => None,
            kind => Some((it, kind)),
        }
    }

    fn read(&self, reg: usize) -> u32 {
        // SAFETY: a register window between 3 and 4 GiB (cmdline.rs), mapped uncached.
        unsafe { ((self.base + reg) as *const u32).read_volatile() }
    }

    fn write(&self, reg: usize, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.base + reg) as *mut u32).write_volatile(value) }
    }

    /// Resets the device and agrees on what is wanted of the features that it offers.
    pub fn negotiate(&mut self, wanted: impl FnOnce(u64) -> u64) -> Option<u64> {
        self.write(STATUS, 0);
        for _ in 0..1000 {
            if self.read(STATUS) == 0 {
                break;
            }
        }
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        let features = offered & (wanted(offered) | VERSION_1 | EVENT_IDX);
        if features & VERSION_1 == 0 {
            return None;
        }
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        (self.read(STATUS) & FEATURES_OK != 0).then_some(features)
    }

    /// Sets up queue `index`.
    pub fn queue(&self, index: u16, features: u64) -> Option<Queue> {
        self.write(QUEUE_SEL, u32::from(index));
        if self.read(QUEUE_NUM_MAX) < u32::from(queue::SIZE) || self.read(QUEUE_READY) != 0 {
            return None;
        }
        let memory = take_dma(queue::BYTES, 1024)?;
        let queue = Queue::new(
            memory,
            (self.base + QUEUE_NOTIFY) as *mut u32,
            index,
            features & EVENT_IDX != 0,
        );
        self.write(QUEUE_NUM, u32::from(queue::SIZE));
        for (reg, address) in [QUEUE_DESC, QUEUE_AVAIL, QUEUE_USED]
            .into_iter()
            .zip(queue.addresses())
        {
            self.write(reg, address as u32);
            self.write(reg + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Some(queue)
    }

    /// The device may work from here on.
    pub fn ready(&mut self) {
        crate::cpu::route_pin(self.pin);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Reads `out.len()` bytes of device configuration.
    pub fn config(&self, offset: usize, out: &mut [u8]) {
        for (i, b) in out.iter_mut().enumerate() {
            // SAFETY: byte-wide reads of the configuration space, as virtio allows.
            *b = unsafe { ((self.base + CONFIG + offset + i) as *const u8).read_volatile() };
        }
    }

    /// If an interrupt came, takes the device's line down, so that the next one is an edge again.
    /// Comes before looking at the queues: what the device adds later interrupts anew.
    pub fn acknowledge(&mut self) {
        let count = crate::percpu::pin_count(self.pin);
        if count != self.seen {
            self.seen = count;
            self.write(INTERRUPT_ACK, 3);
        }
    }
}

/// Memory that devices see, packed into as few pages as can be: every page written in an epoch
/// has its price.
const DMA_BYTES: usize = 2 << 20;

#[repr(C, align(4096))]
struct Dma(core::cell::UnsafeCell<[u8; DMA_BYTES]>);
// SAFETY: handed out piece by piece by `take_dma`, each piece once.
unsafe impl Sync for Dma {}

#[unsafe(link_section = ".bss.dma")]
static DMA: Dma = Dma(core::cell::UnsafeCell::new([0; DMA_BYTES]));
static DMA_TAKEN: AtomicUsize = AtomicUsize::new(0);

/// A zeroed piece of memory for a device, never given back. `None` when all is taken.
pub fn take_dma(bytes: usize, align: usize) -> Option<&'static mut [u8]> {
    let at = DMA_TAKEN.load(Ordering::Relaxed).next_multiple_of(align);
    if at + bytes > DMA_BYTES {
        return None;
    }
    DMA_TAKEN.store(at + bytes, Ordering::Relaxed);
    // SAFETY: [at, at + bytes) is inside the array and was never handed out before (only CPU 0
    // runs drivers).
    let piece = unsafe { core::slice::from_raw_parts_mut(DMA.0.get().cast::<u8>().add(at), bytes) };
    // boot.s leaves this memory as it was before a reset.
    piece.fill(0);
    Some(piece)
}
