//! A guest's virtqueue, with nothing in it believed.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::memory::GuestMemory;

/// What a guest did wrong with a queue. Its device is broken until the guest resets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("a ring lies outside RAM, is misaligned or has a size that is not offered")]
    Ring,
    #[error("the available index ran ahead by more than the queue's size")]
    AvailIndex,
    #[error("a descriptor index is not below the queue's size")]
    Head,
    #[error("a descriptor chain does not end: a loop, or a wrong index")]
    Endless,
    #[error("a descriptor chain has more than {} buffers", Segments::MOST)]
    TooMany,
    #[error("a readable buffer follows a writable one")]
    Order,
    #[error("a buffer lies outside RAM")]
    Outside,
    #[error("a request lacks its header or status byte")]
    TooShort,
}

/// A ready queue and the memory it lies in.
#[derive(Debug)]
pub(super) struct Ring<'a> {
    pub(super) queue: &'a mut Queue,
    pub(super) mem: &'a GuestMemory,
    /// The used index at the last look at whether the driver wants an interrupt.
    pub(super) looked_at: &'a mut u16,
}

impl<'a> Ring<'a> {
    /// Takes the next available chain, if there is one.
    pub(super) fn next(&mut self) -> Result<Option<DescriptorChain<&'a GuestMemory>>, Fault> {
        let mut available = self.queue.iter(self.mem).map_err(|_| Fault::AvailIndex)?;
        match available.next() {
            Some(chain) if chain.head_index() >= self.queue.size() => Err(Fault::Head),
            next => Ok(next),
        }
    }

    /// Gives the chain just taken back: the next [`Ring::next`] returns it again.
    pub(super) fn untake(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Takes the chain given back by [`Ring::untake`] for good.
    pub(super) fn retake(&mut self) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_add(1));
    }

    /// Returns chain `head` to the guest with `len` bytes written.
    pub(super) fn used(&mut self, head: u16, len: u32) -> Result<(), Fault> {
        self.fill(0, head, len)?;
        self.publish(1)
    }

    /// Writes the entry of chain `head` `ahead` places after the last one that the guest can see. It sees it
    /// when it is published, with those before it.
    pub(super) fn fill(&mut self, ahead: u16, head: u16, len: u32) -> Result<(), Fault> {
        let slot = self.queue.next_used().wrapping_add(ahead) % self.queue.size();
        let at = self.queue.used_ring() + 4 + 8 * u64::from(slot);
        let mut entry = [0; 8];
        let (id, written) = entry.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        written.copy_from_slice(&len.to_le_bytes());
        self.mem
            .write_slice(&entry, GuestAddress(at))
            .map_err(|_| Fault::Outside)
    }

    /// Shows the guest the next `count` entries, all at once.
    pub(super) fn publish(&mut self, count: u16) -> Result<(), Fault> {
        let next = self.queue.next_used().wrapping_add(count);
        self.queue.set_next_used(next);
        let at = GuestAddress(self.queue.used_ring() + 2);
        self.mem
            .store(next.to_le(), at, Ordering::Release)
            .map_err(|_| Fault::Outside)
    }

    /// Asks for a doorbell at the next available chain. True when one came meanwhile: look again.
    ///
    /// Writes guest memory only if that changes it, so that a look at an idle queue dirties nothing.
    pub(super) fn arm(&mut self) -> Result<bool, Fault> {
        let used = self.queue.used_ring();
        let (at, want) = if self.queue.event_idx_enabled() {
            (
                used + 4 + 8 * u64::from(self.queue.size()),
                self.queue.next_avail(),
            )
        } else {
            (used, 0)
        };
        self.set(at, want)?;
        // The doorbell's arming comes before the look, as the driver's publishing comes before
        // its look at the arming: one of the two sees the other.
        fence(Ordering::SeqCst);
        let available = self
            .queue
            .avail_idx(self.mem, Ordering::Acquire)
            .map_err(|_| Fault::Outside)?;
        Ok(available.0 != self.queue.next_avail())
    }

    /// Asks for no doorbells: the queue is being looked at anyway.
    pub(super) fn disarm(&mut self) -> Result<(), Fault> {
        if self.queue.event_idx_enabled() {
            return Ok(()); // once used, an event index is in the past
        }
        self.set(self.queue.used_ring(), VRING_USED_F_NO_NOTIFY as u16)
    }

    fn set(&self, at: u64, want: u16) -> Result<(), Fault> {
        let at = GuestAddress(at);
        let is: u16 = self
            .mem
            .load(at, Ordering::Relaxed)
            .map_err(|_| Fault::Outside)?;
        if u16::from_le(is) != want {
            self.mem
                .store(want.to_le(), at, Ordering::Relaxed)
                .map_err(|_| Fault::Outside)?;
        }
        Ok(())
    }

    /// True when the driver wants an interrupt for what was used since the last call.
    pub(super) fn wants_interrupt(&mut self) -> Result<bool, Fault> {
        let next = self.queue.next_used();
        let last = std::mem::replace(self.looked_at, next);
        // What was used is seen before what the driver wants is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let load = |at| {
            let value: Result<u16, _> = self.mem.load(GuestAddress(at), Ordering::Relaxed);
            value.map(u16::from_le).map_err(|_| Fault::Outside)
        };
        if self.queue.event_idx_enabled() {
            // Virtio 1.2, 2.7.10: once the entry that the driver names is among the new ones.
            let named = load(available + 4 + 2 * u64::from(self.queue.size()))?;
            let since = next.wrapping_sub(named).wrapping_sub(1);
            return Ok(since < next.wrapping_sub(last));
        }
        Ok(load(available)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    addr: u64,
    len: u32,
}

/// Descriptor chains, read once and checked: every buffer lies in RAM, readable ones first.
///
/// Reused from chain to chain; parsing allocates nothing.
#[derive(Debug)]
pub(super) struct Segments {
    all: [Segment; Segments::MOST],
    count: usize,
    readable: usize,
    /// Bytes the device may read.
    pub(super) read_len: usize,
    /// Bytes the device may write.
    pub(super) write_len: usize,
    /// The latest chain's first descriptor.
    pub(super) head: u16,
}

impl Default for Segments {
    fn default() -> Self {
        Segments {
            all: [Segment::default(); Segments::MOST],
            count: 0,
            readable: 0,
            read_len: 0,
            write_len: 0,
            head: 0,
        }
    }
}

impl Segments {
    /// Most buffers in all: the largest queue offered.
    pub(super) const MOST: usize = 256;

    /// Forgets all chains.
    pub(super) fn clear(&mut self) {
        (self.count, self.readable) = (0, 0);
        (self.read_len, self.write_len) = (0, 0);
    }

    /// Replaces what is here by `chain`. After an error the contents mean nothing.
    pub(super) fn parse(
        &mut self,
        mem: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
    ) -> Result<(), Fault> {
        self.clear();
        self.add(mem, chain)
    }

    /// Appends `chain` to what is here. After an error the contents mean nothing.
    pub(super) fn add(
        &mut self,
        mem: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
    ) -> Result<(), Fault> {
        self.head = chain.head_index();
        // The iterator ends silently at a wrong index, a loop or 2³² bytes; a chain that is
        // whole ends with a descriptor that names no next one.
        let mut ended = false;
        for descriptor in chain {
            ended = !descriptor.has_next();
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if len == 0 {
                continue;
            }
            let access = if descriptor.is_write_only() {
                self.write_len += len as usize;
                Permissions::Write
            } else if self.write_len > 0 {
                return Err(Fault::Order);
            } else {
                self.read_len += len as usize;
                self.readable += 1;
                Permissions::Read
            };
            if !mem.check_range(addr, len as usize, access) {
                return Err(Fault::Outside);
            }
            *self.all.get_mut(self.count).ok_or(Fault::TooMany)? = Segment { addr: addr.0, len };
            self.count += 1;
        }
        if ended { Ok(()) } else { Err(Fault::Endless) }
    }

    /// Copies the readable bytes from `offset` on into `out`; all of `out` must be covered.
    pub(super) fn read(
        &self,
        mem: &GuestMemory,
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), Fault> {
        let segments = self.all.get(..self.readable).unwrap_or_default();
        walk(segments, offset, out.len(), |addr, range| {
            let part = out.get_mut(range).ok_or(Fault::TooShort)?;
            mem.read_slice(part, addr).map_err(|_| Fault::Outside)
        })
    }

    /// Copies `data` to the writable bytes from `offset` on; all of it must fit.
    pub(super) fn write(&self, mem: &GuestMemory, offset: usize, data: &[u8]) -> Result<(), Fault> {
        let segments = self.all.get(self.readable..self.count).unwrap_or_default();
        walk(segments, offset, data.len(), |addr, range| {
            let part = data.get(range).ok_or(Fault::TooShort)?;
            mem.write_slice(part, addr).map_err(|_| Fault::Outside)
        })
    }
}

/// Calls `copy` with the address and the place in the caller's buffer of each piece of
/// `len` bytes at `offset` of `segments` laid end to end.
fn walk(
    segments: &[Segment],
    offset: usize,
    len: usize,
    mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let (mut skip, mut done) = (offset, 0);
    for segment in segments {
        let size = segment.len as usize;
        if done == len {
            break;
        }
        if skip >= size {
            skip -= size;
            continue;
        }
        let n = (size - skip).min(len - done);
        copy(GuestAddress(segment.addr + skip as u64), done..done + n)?;
        (skip, done) = (0, done + n);
    }
    if done == len {
        Ok(())
    } else {
        Err(Fault::TooShort)
    }
}
