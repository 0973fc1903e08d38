//! Guest RAM: where it lies, the memfd behind it, and page-wise access for the epochs.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use ax_wire::PAGE_SIZE;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use crate::bitmap::DirtyBitmap;
use crate::error::{Error, Result};

/// Guest RAM as devices see it. Writes through it mark the dirty bitmap. Clones share the memory.
pub type GuestMemory = GuestMemoryMmap<DirtyBitmap>;

/// Below this RAM, from here to 4 GiB devices: LAPIC, IOAPIC, virtio windows.
pub const MMIO_START: u64 = 3 << 30;
/// RAM that does not fit below [`MMIO_START`] goes on here.
pub const HIGH_START: u64 = 4 << 30;
/// Least RAM of a machine, bytes.
pub const MIN_RAM: u64 = 4 << 20;
/// Most RAM of a machine, bytes.
pub const MAX_RAM: u64 = 1 << 40;

/// A contiguous piece of guest RAM: one KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First page (guest-physical address / 4096).
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

/// Where `bytes` of RAM lie, ascending.
pub fn layout(bytes: u64) -> Result<Vec<RamRegion>> {
    let page = PAGE_SIZE as u64;
    if !(MIN_RAM..=MAX_RAM).contains(&bytes) || !bytes.is_multiple_of(page) {
        return Err(Error::Config(format!(
            "memory of {bytes} bytes: give a multiple of {page} between {MIN_RAM} (4 MiB) and {MAX_RAM} (1 TiB)"
        )));
    }
    let low = bytes.min(MMIO_START);
    let mut regions = vec![RamRegion {
        start: 0,
        pages: low / page,
    }];
    if bytes > low {
        regions.push(RamRegion {
            start: HIGH_START / page,
            pages: (bytes - low) / page,
        });
    }
    Ok(regions)
}

/// RAM of one machine.
#[derive(Debug, Clone)]
pub(crate) struct Ram {
    memory: GuestMemory,
    regions: Arc<[RamRegion]>,
    maps: Arc<[Arc<MmapRegion<DirtyBitmap>>]>,
}

impl Ram {
    /// Makes zeroed RAM on a memfd whose size is sealed.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let regions = layout(bytes)?;
        let wrap = |source: io::Error| Error::Ram { bytes, source };
        let file = Arc::new(sealed_memfd(bytes).map_err(wrap)?);
        let mut offset = 0;
        let (mut maps, mut guest) = (Vec::new(), Vec::new());
        for region in &regions {
            let len = (region.pages as usize) * PAGE_SIZE;
            let map =
                MmapRegionBuilder::new_with_bitmap(len, DirtyBitmap::new(region.pages as usize))
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                    .build()
                    .map_err(|e| wrap(io::Error::other(e)))?;
            let map = Arc::new(map);
            let start = GuestAddress(region.start * PAGE_SIZE as u64);
            guest.push(
                GuestRegionMmap::with_arc(Arc::clone(&map), start)
                    .ok_or_else(|| wrap(io::Error::other("a region wraps the address space")))?,
            );
            maps.push(map);
            offset += len as u64;
        }
        let memory =
            GuestMemory::from_regions(guest).map_err(|e| wrap(io::Error::other(e.to_string())))?;
        Ok(Ram {
            memory,
            regions: regions.into(),
            maps: maps.into(),
        })
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Dirty bitmap of region (slot) `slot`.
    pub(crate) fn dirty(&self, slot: usize) -> Option<&DirtyBitmap> {
        self.maps.get(slot).map(|m| m.bitmap())
    }

    /// Host address of region `slot`, for KVM.
    pub(crate) fn host_address(&self, slot: usize) -> Option<u64> {
        self.maps.get(slot).map(|m| m.as_ptr() as u64)
    }

    /// Slot and page within it of a guest page; `None` outside RAM.
    pub(crate) fn locate(&self, page: u64) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(slot, r)| {
            let at = page.checked_sub(r.start)?;
            (at < r.pages).then_some((slot, at as usize))
        })
    }

    /// Marks a guest page dirty. One outside RAM is ignored.
    pub(crate) fn mark(&self, page: u64) {
        if let Some((slot, at)) = self.locate(page)
            && let Some(dirty) = self.dirty(slot)
        {
            dirty.mark_page(at);
        }
    }

    /// Copies consecutive pages starting at `first` into `out`, a multiple of the page size.
    pub(crate) fn read_pages(&self, first: u64, out: &mut [u8]) -> Result<()> {
        self.page_by_page(first, out.len(), |page, at| {
            if let Some(out) = out.get_mut(at..at + PAGE_SIZE) {
                page.copy_to(out);
            }
        })
    }

    /// Overwrites consecutive pages starting at `first`, without marking them dirty.
    pub(crate) fn write_pages(&self, first: u64, data: &[u8]) -> Result<()> {
        self.page_by_page(first, data.len(), |page, at| {
            if let Some(data) = data.get(at..at + PAGE_SIZE) {
                page.copy_from(data);
            }
        })
    }

    /// Calls `copy` with each page of `len` bytes from page `first`, and its offset in them.
    ///
    /// One at a time, because glibc 2.36 copies 4 to 512 KiB by `rep movsb`, which is ten times slower
    /// on AMD's Zen 3 and 4 when source and destination lie a few bytes apart modulo 4096 (glibc bug
    /// 30995), as they do where what is copied has a header before it.
    fn page_by_page(
        &self,
        first: u64,
        len: usize,
        mut copy: impl FnMut(vm_memory::VolatileSlice<'_, ()>, usize),
    ) -> Result<()> {
        let slice = self.slice(first, len)?;
        for at in (0..len).step_by(PAGE_SIZE) {
            let page = slice.subslice(at, PAGE_SIZE);
            copy(
                page.map_err(|_| Error::OutsideRam {
                    page: first,
                    bytes: len,
                })?,
                at,
            );
        }
        Ok(())
    }

    /// `len` bytes from page `first`, all within one region; writes through it mark nothing.
    fn slice(&self, first: u64, len: usize) -> Result<vm_memory::VolatileSlice<'_, ()>> {
        let outside = Error::OutsideRam {
            page: first,
            bytes: len,
        };
        let (slot, at) = self.locate(first).ok_or(outside)?;
        let map = self.maps.get(slot).ok_or(Error::OutsideRam {
            page: first,
            bytes: len,
        })?;
        let offset = at * PAGE_SIZE;
        if !len.is_multiple_of(PAGE_SIZE) || len > map.size() - offset {
            return Err(Error::OutsideRam {
                page: first,
                bytes: len,
            });
        }
        // SAFETY: `offset + len` lies within the mapping (checked just above), which lives as long
        // as `self`; all access to guest memory is volatile or by KVM, so aliasing is expected.
        Ok(unsafe { vm_memory::VolatileSlice::new(map.as_ptr().add(offset), len) })
    }

    /// True when page `at` of `slot` differs from `copy`; then `copy` is made equal.
    /// Only meaningful while nobody writes guest memory.
    pub(crate) fn compare_and_copy(&self, slot: usize, at: usize, copy: &mut [u8]) -> bool {
        let Some(map) = self.maps.get(slot) else {
            return true;
        };
        let offset = at.saturating_mul(PAGE_SIZE);
        if copy.len() != PAGE_SIZE || offset + PAGE_SIZE > map.size() {
            return true;
        }
        // SAFETY: the page lies within the mapping (checked above). The guest is paused and its
        // devices are quiet (the caller's duty), so nobody writes it during this borrow.
        let page = unsafe { std::slice::from_raw_parts(map.as_ptr().add(offset), PAGE_SIZE) };
        if page == copy {
            return false;
        }
        copy.copy_from_slice(page);
        true
    }
}

/// A memfd of fixed size: no one can shrink it under the guest's feet or grow it.
fn sealed_memfd(bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe {
        libc::memfd_create(
            c"ax-guest-ram".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: plain fcntl on a descriptor we own.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn ram_leaves_the_device_gap_free() {
        assert_eq!(
            layout(256 << 20).unwrap(),
            [RamRegion {
                start: 0,
                pages: 65536
            }]
        );
        assert_eq!(
            layout(4 << 30).unwrap(),
            [
                RamRegion {
                    start: 0,
                    pages: 786_432
                },
                RamRegion {
                    start: 1 << 20,
                    pages: 262_144
                }
            ]
        );
        assert!(layout(1000).is_err() && layout((8 << 20) + 1).is_err());
    }

    #[test]
    fn device_writes_mark_pages_and_epoch_writes_do_not() {
        let ram = Ram::new(8 << 20).unwrap();
        ram.memory()
            .write_slice(&[1; 10], GuestAddress(5 * 4096 - 5))
            .unwrap();
        ram.write_pages(9, &[7; 8192]).unwrap();
        let mut dirty = Vec::new();
        ram.dirty(0).unwrap().drain(|p| dirty.push(p));
        assert_eq!(dirty, [4, 5]);
        let mut page = [0; 4096];
        ram.read_pages(10, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn pages_outside_ram_are_refused() {
        let ram = Ram::new(8 << 20).unwrap();
        assert!(ram.write_pages(2047, &[0; 8192]).is_err());
        assert!(ram.write_pages(2048, &[0; 4096]).is_err());
        assert!(ram.write_pages(u64::MAX, &[0; 4096]).is_err());
        assert!(ram.write_pages(0, &[0; 100]).is_err());
        assert!(ram.read_pages(2047, &mut [0; 4096]).is_ok());
    }
}
