//! Linux bzImages by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, CMDLINE, Entry, HIMEM, Load, Reader, acpi};

/// Where the zero page is.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// The magic "HdrS" is here in the file.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "undefined loader": no number is assigned to this one.
const LOADER: u8 = 0xff;
/// xloadflags: has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Least boot protocol version: 2.12 brought xloadflags.
const MIN_VERSION: u16 = 0x020c;
/// The 64-bit entry point, from the loaded kernel's start.
const ENTRY_64: u64 = 0x200;

/// Loads kernel and initrd and writes the zero page.
pub(super) fn load(load: &Load<'_>, image: &mut Reader) -> Result<Entry, BootError> {
    let at = GuestAddress(HIMEM);
    let loaded = image.load_by::<BzImage>(load.memory, Some(at), Some(at));
    let loaded = loaded.map_err(|e| match e {
        linux_loader::loader::Error::Bzimage(
            linux_loader::loader::bzimage::Error::ReadBzImageCompressedKernel,
        ) => BootError::TooLittleMemory {
            path: image.path(),
            end: u64::MAX,
            ram_end: load.map.low_end,
        },
        _ => BootError::NotAKernel { path: image.path() },
    })?;
    let mut header = loaded
        .setup_header
        .ok_or(BootError::NotAKernel { path: image.path() })?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < MIN_VERSION || flags & XLF_KERNEL_64 == 0 {
        return Err(image.bad_kernel(format_args!(
            "no 64-bit entry point (boot protocol {version:#06x}, flags {flags:#x})"
        )));
    }
    let start = loaded.kernel_load.0;
    let end = loaded.kernel_end.max(start + u64::from(header.init_size));
    load.check_end(image, end)?;
    load.put_cmdline(header.cmdline_size as usize)?;
    let initrd = load.put_initrd(end, u64::from(header.initrd_addr_max) + 1)?;
    header.type_of_loader = LOADER;
    header.cmd_line_ptr = CMDLINE as u32;
    if let Some((address, size)) = initrd {
        header.ramdisk_image = address as u32;
        header.ramdisk_size = size as u32;
    }
    let mut zero_page = boot_params {
        hdr: header,
        acpi_rsdp_addr: acpi::RSDP,
        ..Default::default()
    };
    let mut map: Vec<_> = load
        .map
        .ram
        .iter()
        .map(|(a, s)| e820(*a, *s, E820_RAM))
        .collect();
    map.insert(
        1,
        e820(load.map.reserved.0, load.map.reserved.1, E820_RESERVED),
    );
    zero_page.e820_entries = map.len() as u8;
    let mut table = zero_page.e820_table;
    table
        .iter_mut()
        .zip(map)
        .for_each(|(slot, entry)| *slot = entry);
    zero_page.e820_table = table;
    let put = load.memory.write_obj(zero_page, GuestAddress(ZERO_PAGE));
    put.map_err(|source| BootError::Memory {
        what: "the zero page",
        source,
    })?;
    Ok(Entry::Linux {
        at: start + ENTRY_64,
    })
}

fn e820(addr: u64, size: u64, kind: u32) -> boot_e820_entry {
    boot_e820_entry {
        addr,
        size,
        r#type: kind,
    }
}
