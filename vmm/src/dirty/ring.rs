//! KVM's dirty rings: each vCPU appends the pages it writes. Cost grows with what is dirty, not
//! with RAM, and a full ring stops its vCPU.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use kvm_ioctls::VmFd;

use ax_wire::PAGE_SIZE;

use super::Source;
use crate::error::{Doing, Error, Result};
use crate::memory::Ram;
use crate::sys::{self, Mapping};
use crate::vm::Vm;

/// An entry of the ring, as KVM lays it out (`struct kvm_dirty_gfn`).
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: u32,
    offset: u64,
}

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: usize = size_of::<Entry>();
/// Set by KVM: the entry is to be harvested.
const DIRTY: u32 = 1;
/// Set by us: harvested, KVM may protect the page again and reuse the entry.
const RESET: u32 = 2;

struct Ring {
    map: Mapping,
    /// The entry to harvest next. It counts up for ever and wraps; the ring's size divides 2³².
    next: u32,
    /// How far `estimate` has looked ahead.
    seen: u32,
}

/// The rings of all vCPUs.
pub(super) struct RingSource {
    rings: Vec<Ring>,
    entries: u32,
}

impl RingSource {
    pub(super) fn new(vm: &Vm, entries: u32) -> Result<Self> {
        let len = entries as usize * ENTRY_BYTES;
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let map = |vcpu: &std::sync::Arc<crate::vcpu::Vcpu>| {
            let core = vcpu.core.lock();
            let map = Mapping::shared(&core.fd, len, offset).doing("mapping a dirty ring")?;
            Ok(Ring {
                map,
                next: 0,
                seen: 0,
            })
        };
        if !entries.is_power_of_two() {
            return Err(Error::Config(format!(
                "dirty ring of {entries} entries: not a power of two"
            )));
        }
        Ok(RingSource {
            rings: vm.vcpus.iter().map(map).collect::<Result<_>>()?,
            entries,
        })
    }
}

impl Ring {
    fn entry(&self, index: u32, entries: u32) -> &Entry {
        let at = (index & (entries - 1)) as usize;
        // SAFETY: `at < entries` (a power of two), and the mapping has that many entries; the kernel
        // writes them concurrently, `slot` and `offset` only before it sets `flags` (release).
        unsafe { &*self.map.as_ptr().cast::<Entry>().add(at) }
    }

    /// Harvests every entry that is there; how many.
    fn drain(&mut self, entries: u32, mut each: impl FnMut(u32, u64)) -> usize {
        let mut drained = 0;
        loop {
            let entry = self.entry(self.next, entries);
            if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            each(entry.slot, entry.offset);
            entry.flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            drained += 1;
            if drained == entries as usize {
                break; // once around: what a running vCPU adds meanwhile is for the next harvest
            }
        }
        drained
    }

    /// How many entries wait to be harvested.
    fn pending(&mut self, entries: u32) -> usize {
        if self.seen.wrapping_sub(self.next) > entries {
            self.seen = self.next;
        }
        while self.seen.wrapping_sub(self.next) < entries
            && self.entry(self.seen, entries).flags.load(Ordering::Acquire) & DIRTY != 0
        {
            self.seen = self.seen.wrapping_add(1);
        }
        self.seen.wrapping_sub(self.next) as usize
    }
}

impl Source for RingSource {
    /// The rings were emptied when tracking stopped, and nothing was logged since.
    fn start(&mut self, _: &VmFd, _: &Ram) -> Result<()> {
        Ok(())
    }

    /// Marks first, then RESET_DIRTY_RINGS protects the pages again: a page written between is
    /// marked already, and its content copied later.
    fn collect(&mut self, vm: &VmFd, ram: &Ram) -> Result<()> {
        let mut drained = 0;
        for ring in &mut self.rings {
            drained += ring.drain(self.entries, |slot, offset| {
                // the upper half of `slot` is the address space; ours is 0
                match (ram.dirty(slot as usize), usize::try_from(offset)) {
                    (Some(dirty), Ok(page)) => dirty.mark_page(page),
                    _ => tracing::error!(slot, offset, "dirty ring names a page outside RAM"),
                }
            });
        }
        if drained > 0 {
            sys::reset_dirty_rings(vm).doing("KVM_RESET_DIRTY_RINGS")?;
        }
        Ok(())
    }

    /// Looks only at entries added since it last looked.
    fn estimate(&mut self, _: &VmFd, _: &Ram) -> Result<usize> {
        let entries = self.entries;
        Ok(self.rings.iter_mut().map(|r| r.pending(entries)).sum())
    }

    fn report(&mut self, _: &Ram, _: u64, _: bool) -> bool {
        true
    }

    fn given_back(&mut self, _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: u32 = 256;

    /// A ring in a file, written to as KVM would.
    fn ring(next: u32) -> Ring {
        let len = ENTRIES as usize * ENTRY_BYTES;
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        Ring {
            map: Mapping::shared(&file, len, 0).unwrap(),
            next,
            seen: next,
        }
    }

    fn log(ring: &Ring, at: u32, offset: u64) {
        let entry = (ring.map.as_ptr().cast::<Entry>()).wrapping_add((at % ENTRIES) as usize);
        // SAFETY: within the mapping, which nobody else uses.
        unsafe { (*entry).offset = offset };
        // SAFETY: as above.
        unsafe { &*entry }.flags.store(DIRTY, Ordering::Release);
    }

    #[test]
    fn indices_wrap_past_two_to_the_32_and_no_entry_is_missed_or_taken_twice() {
        let start = u32::MAX - 1000;
        let mut ring = ring(start);
        let (mut at, mut offset) = (start, 0);
        let mut taken = Vec::new();
        // Batches of every size up to a full ring, across the wrap several times over the ring's size.
        for batch in (1..=ENTRIES).chain([ENTRIES; 8]) {
            for _ in 0..batch {
                log(&ring, at, offset);
                (at, offset) = (at.wrapping_add(1), offset + 1);
            }
            assert_eq!(ring.pending(ENTRIES), batch as usize);
            assert_eq!(
                ring.drain(ENTRIES, |_, page| taken.push(page)),
                batch as usize
            );
            assert_eq!(ring.pending(ENTRIES), 0);
            assert_eq!(ring.next, at);
        }
        assert!(at < start, "the index did not wrap");
        assert!(taken.into_iter().eq(0..offset));
    }
}
