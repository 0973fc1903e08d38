//! virtio-blk: a few requests at a time, each with a slot that holds it until it is taken.

use super::queue::Buffer;
use super::{Queue, Transport, take_dma};

/// VIRTIO_BLK_F_RO.
const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_FLUSH.
const F_FLUSH: u64 = 1 << 9;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const SLOTS: usize = 8;
/// Descriptors per slot: header, data, status.
const CHAIN: u16 = 3;
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Most data bytes in one request.
pub const MAX_DATA: usize = 64 * 1024;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
    /// Makes completed writes durable.
    Flush,
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Busy,
    Done(bool),
}

/// A request under way; [`Blk::take`] ends it.
#[derive(PartialEq, Eq, Debug)]
pub struct Ticket(usize);

/// One disk.
pub struct Blk {
    transport: Transport,
    queue: Queue,
    requests: *mut u8,
    slots: [State; SLOTS],
    /// Size in sectors.
    pub sectors: u64,
    /// The device takes no writes.
    pub read_only: bool,
    flush: bool,
    /// Requests completed.
    pub completed: u64,
}

/// Header and status of a slot, in device memory.
const REQUEST: usize = 32;

impl Blk {
    /// Takes over the device.
    pub fn new(mut transport: Transport) -> Option<Self> {
        let features = transport.negotiate(|offered| offered & (F_RO | F_FLUSH))?;
        let mut capacity = [0; 8];
        transport.config(0, &mut capacity);
        let it = Self {
            queue: transport.queue(0, features)?,
            requests: take_dma(SLOTS * REQUEST, 32)?.as_mut_ptr(),
            slots: [State::Free; SLOTS],
            sectors: u64::from_le_bytes(capacity),
            read_only: features & F_RO != 0,
            flush: features & F_FLUSH != 0,
            completed: 0,
            transport,
        };
        let mut it = it;
        it.transport.ready();
        Some(it)
    }

    /// Starts a request over `data` (whole sectors, at most [`MAX_DATA`]; empty for a flush).
    /// `None` if all slots are taken; try again after the next completion.
    ///
    /// # Safety
    /// `data` stays valid, and untouched for a read, until the ticket is taken back.
    pub unsafe fn submit(&mut self, op: Op, sector: u64, data: *mut [u8]) -> Option<Ticket> {
        let slot = self.slots.iter().position(|s| *s == State::Free)?;
        if op == Op::Flush && !self.flush {
            // Without the feature the device has no cache to flush.
            self.slots[slot] = State::Done(true);
            return Some(Ticket(slot));
        }
        let at = self.requests.wrapping_add(slot * REQUEST);
        let kind = match op {
            Op::Read => IN,
            Op::Write => OUT,
            Op::Flush => FLUSH,
        };
        let sector = if op == Op::Flush { 0 } else { sector };
        // SAFETY: the slot's own 32 bytes, aligned; not the device's while the slot is free.
        unsafe {
            at.cast::<Header>().write_volatile(Header {
                kind,
                reserved: 0,
                sector,
            });
            at.add(16).write_volatile(0xff);
        }
        let header = Buffer {
            addr: at,
            len: 16,
            writable: false,
        };
        let status = Buffer {
            addr: at.wrapping_add(16),
            len: 1,
            writable: true,
        };
        let first = slot as u16 * CHAIN;
        if op == Op::Flush {
            self.queue.offer(first, &[header, status]);
        } else {
            let data = Buffer {
                addr: data.cast(),
                len: data.len() as u32,
                writable: op == Op::Read,
            };
            self.queue.offer(first, &[header, data, status]);
        }
        self.slots[slot] = State::Busy;
        Some(Ticket(slot))
    }

    /// Passes on requests and collects completions.
    pub fn poll(&mut self) {
        self.transport.acknowledge();
        self.queue.kick();
        self.collect();
    }

    fn collect(&mut self) {
        while let Some((first, _)) = self.queue.take() {
            let slot = usize::from(first / CHAIN);
            if let Some(state @ State::Busy) = self.slots.get_mut(slot) {
                // SAFETY: the slot's status byte; the device is done with it.
                let status = unsafe { self.requests.add(slot * REQUEST + 16).read_volatile() };
                *state = State::Done(status == 0);
                self.completed += 1;
            }
        }
    }

    /// If the request is done: whether it succeeded. Frees its slot.
    pub fn take(&mut self, ticket: &mut Option<Ticket>) -> Option<bool> {
        let Some(Ticket(slot)) = ticket else {
            return None;
        };
        let State::Done(good) = self.slots[*slot] else {
            return None;
        };
        self.slots[*slot] = State::Free;
        *ticket = None;
        Some(good)
    }

    /// Readies the device for the CPU's sleep; true if there is work already.
    pub fn before_sleep(&mut self) -> bool {
        self.queue.kick();
        self.queue.want_interrupt() || self.slots.iter().any(|s| matches!(s, State::Done(_)))
    }

    /// Does one request and waits for it; for the time before services start.
    pub fn blocking(&mut self, op: Op, sector: u64, data: &mut [u8]) -> bool {
        // SAFETY: `data` is borrowed until this function returns, after the ticket is taken.
        let mut ticket = unsafe { self.submit(op, sector, data) };
        while ticket.is_some() {
            let seen = crate::percpu::events(0);
            self.poll();
            if let Some(good) = self.take(&mut ticket) {
                return good;
            }
            if !self.queue.want_interrupt() {
                crate::cpu::wait(0, seen);
            }
        }
        false
    }
}
