//! One split virtqueue of 32 entries: all three parts in 1 KiB.

use core::sync::atomic::{Ordering, fence};

/// Entries.
pub const SIZE: u16 = 32;
const N: usize = SIZE as usize;
/// Bytes of memory a queue takes, 1024-aligned.
pub const BYTES: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Available {
    flags: u16,
    idx: u16,
    ring: [u16; N],
    used_event: u16,
}

#[repr(C)]
struct Used {
    flags: u16,
    idx: u16,
    ring: [(u32, u32); N],
    avail_event: u16,
}

#[repr(C)]
struct Memory {
    descriptors: [Descriptor; N],
    available: Available,
    _align: [u8; 4],
    used: Used,
}

const _: () = assert!(size_of::<Memory>() <= BYTES);
const _: () = assert!(core::mem::offset_of!(Memory, used).is_multiple_of(4));

/// One buffer of a chain.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Address, guest-physical as well as virtual.
    pub addr: *mut u8,
    /// Bytes.
    pub len: u32,
    /// Written by the device.
    pub writable: bool,
}

/// The driver's side of a queue.
pub struct Queue {
    mem: *mut Memory,
    notify: *mut u32,
    index: u16,
    event_idx: bool,
    next: u16,
    told: u16,
    used: u16,
}

impl Queue {
    pub(super) fn new(
        memory: &'static mut [u8],
        notify: *mut u32,
        index: u16,
        event_idx: bool,
    ) -> Self {
        let mem = memory.as_mut_ptr().cast();
        Self {
            mem,
            notify,
            index,
            event_idx,
            next: 0,
            told: 0,
            used: 0,
        }
    }

    pub(super) fn addresses(&self) -> [u64; 3] {
        // SAFETY: `mem` points to BYTES bytes; only addresses are taken.
        unsafe {
            [
                &raw const (*self.mem).descriptors as u64,
                &raw const (*self.mem).available as u64,
                &raw const (*self.mem).used as u64,
            ]
        }
    }

    /// Offers a chain whose descriptors are `first..first + chain.len()`. The caller owns
    /// these descriptors and the buffers' memory, until [`Queue::take`] gives `first` back.
    pub fn offer(&mut self, first: u16, chain: &[Buffer]) {
        for (i, b) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let id = (first + i as u16) % SIZE;
            let d = Descriptor {
                addr: b.addr as u64,
                len: b.len,
                flags: if last { 0 } else { NEXT } | if b.writable { WRITE } else { 0 },
                next: if last { 0 } else { id + 1 },
            };
            // SAFETY: id < SIZE; the device does not read this descriptor before it is offered.
            unsafe { (&raw mut (*self.mem).descriptors[usize::from(id)]).write_volatile(d) };
        }
        let slot = usize::from(self.next % SIZE);
        self.next = self.next.wrapping_add(1);
        // SAFETY: slot < SIZE. The index goes last: descriptors and slot are there before it.
        unsafe {
            (&raw mut (*self.mem).available.ring[slot]).write_volatile(first % SIZE);
            fence(Ordering::Release);
            (&raw mut (*self.mem).available.idx).write_volatile(self.next);
        }
    }

    /// Tells the device of everything offered since the last time, if it wants to be told.
    pub fn kick(&mut self) {
        if self.told == self.next {
            return;
        }
        fence(Ordering::SeqCst);
        // SAFETY: reads of the device's part; a write to its notify register.
        unsafe {
            let wanted = if self.event_idx {
                let event = (&raw const (*self.mem).used.avail_event).read_volatile();
                let (new, old) = (self.next, self.told);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            } else {
                (&raw const (*self.mem).used.flags).read_volatile() & NO_NOTIFY == 0
            };
            self.told = self.next;
            if wanted {
                self.notify.write_volatile(u32::from(self.index));
            }
        }
    }

    /// The next chain the device is done with: its first descriptor and the bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        // SAFETY: reads of the device's part; slot < SIZE.
        unsafe {
            if (&raw const (*self.mem).used.idx).read_volatile() == self.used {
                return None;
            }
            fence(Ordering::Acquire);
            let slot = usize::from(self.used % SIZE);
            let (id, len) = (&raw const (*self.mem).used.ring[slot]).read_volatile();
            self.used = self.used.wrapping_add(1);
            Some(((id % u32::from(SIZE)) as u16, len))
        }
    }

    /// Asks for an interrupt at the next completion; true if there is one already. With event
    /// indices the request is spent by that interrupt: further ones need asking again.
    pub fn want_interrupt(&mut self) -> bool {
        // SAFETY: writes of the driver's part, reads of the device's.
        unsafe {
            (&raw mut (*self.mem).available.flags).write_volatile(0);
            (&raw mut (*self.mem).available.used_event).write_volatile(self.used);
            fence(Ordering::SeqCst);
            (&raw const (*self.mem).used.idx).read_volatile() != self.used
        }
    }

    /// Asks for no interrupts.
    pub fn no_interrupt(&mut self) {
        // SAFETY: writes of the driver's part.
        unsafe {
            if self.event_idx {
                let far = self.used.wrapping_sub(1);
                (&raw mut (*self.mem).available.used_event).write_volatile(far);
            } else {
                (&raw mut (*self.mem).available.flags).write_volatile(NO_INTERRUPT);
            }
        }
    }
}
