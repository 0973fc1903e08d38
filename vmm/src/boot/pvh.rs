//! ELF kernels by the PVH boot protocol (Xen's; QEMU and Cloud Hypervisor speak it too).

use std::io::{Read, Seek, SeekFrom};

use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, CMDLINE, Entry, HIMEM, Load, PVH_CMDLINE_MAX, Reader, acpi};

/// Where the start info is; the module list and the memory map follow.
pub(super) const START_INFO: u64 = 0x6000;
const MODULES: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
/// More program headers than any kernel has.
const MAX_HEADERS: u16 = 64;

/// Checks the ELF, loads its segments (zeroing what they don't fill: after a reset RAM is not
/// zero), and writes the start info.
pub(super) fn load(load: &Load<'_>, image: &mut Reader) -> Result<Entry, BootError> {
    let end = check_and_zero(load, image)?;
    let loaded = image
        .load_by::<Elf>(load.memory, None, None)
        .map_err(|e| image.bad_kernel(e))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(image.bad_kernel("an ELF without a PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)"));
    };
    load.put_cmdline(PVH_CMDLINE_MAX)?;
    let initrd = load.put_initrd(end, u64::from(u32::MAX))?;
    if let Some((paddr, size)) = initrd {
        put(
            load,
            MODULES,
            &hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            },
        )?;
    }
    let entry_of = |(addr, size): (u64, u64), type_| hvm_memmap_table_entry {
        addr,
        size,
        type_,
        ..Default::default()
    };
    let mut map: Vec<_> = load
        .map
        .ram
        .iter()
        .map(|r| entry_of(*r, XEN_HVM_MEMMAP_TYPE_RAM))
        .collect();
    map.insert(1, entry_of(load.map.reserved, XEN_HVM_MEMMAP_TYPE_RESERVED));
    for (i, entry) in map.iter().enumerate() {
        put(
            load,
            MEMORY_MAP + (i * size_of::<hvm_memmap_table_entry>()) as u64,
            entry,
        )?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: acpi::RSDP,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    put(load, START_INFO, &info)?;
    Ok(Entry::Pvh { at: entry.0 })
}

/// Where the kernel ends. Every segment must lie in RAM from 1 MiB up.
fn check_and_zero(load: &Load<'_>, image: &mut Reader) -> Result<u64, BootError> {
    let read = |image: &mut Reader, bytes: &mut [u8]| {
        image
            .read_exact(bytes)
            .map_err(|e| image.bad_kernel(format_args!("truncated ({e})")))
    };
    let mut header = Elf64_Ehdr::default();
    read(image, header.as_mut_slice())?;
    // e_ident[4] = 2: 64-bit
    if header.e_machine != EM_X86_64 || header.e_ident.get(4) != Some(&2) {
        return Err(BootError::NotAKernel { path: image.path() });
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_HEADERS {
        return Err(image.bad_kernel(format_args!("{} program headers", header.e_phnum)));
    }
    let at = image.seek(SeekFrom::Start(header.e_phoff));
    at.map_err(|source| image.error("kernel", source))?;
    let mut kernel_end = HIMEM;
    for _ in 0..header.e_phnum {
        let mut segment = Elf64_Phdr::default();
        read(image, segment.as_mut_slice())?;
        if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        let end = segment.p_paddr.checked_add(segment.p_memsz);
        let end = end.filter(|_| segment.p_paddr >= HIMEM && segment.p_filesz <= segment.p_memsz);
        let end = end.ok_or_else(|| {
            let (at, len) = (segment.p_paddr, segment.p_memsz);
            image.bad_kernel(format_args!(
                "impossible segment of {len:#x} bytes at {at:#x} (must be at 1 MiB or above)"
            ))
        })?;
        load.check_end(image, end)?;
        kernel_end = kernel_end.max(end);
        zero(load, segment.p_paddr + segment.p_filesz, end)?;
    }
    Ok(kernel_end)
}

fn zero(load: &Load<'_>, from: u64, to: u64) -> Result<(), BootError> {
    static ZEROS: [u8; 65536] = [0; 65536];
    let mut at = from;
    while at < to {
        let len = (to - at).min(ZEROS.len() as u64);
        load.put("zeros", at, ZEROS.get(..len as usize).unwrap_or_default())?;
        at += len;
    }
    Ok(())
}

fn put<T: ByteValued>(load: &Load<'_>, at: u64, value: &T) -> Result<(), BootError> {
    let put = load.memory.write_obj(*value, GuestAddress(at));
    put.map_err(|source| BootError::Memory {
        what: "the PVH start info",
        source,
    })
}
