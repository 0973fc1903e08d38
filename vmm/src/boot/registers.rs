//! The first registers of vCPU 0.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use ax_wire::PAGE_SIZE;

use super::{BootError, Entry, Load, linux, pvh};
use crate::error::{Doing, Result};

/// Page tables of the first GiB.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The GDT: null, (reserved), code, data, TSS.
pub(super) const GDT: u64 = 0x500;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const DATA: u8 = 3;
const CODE: u8 = 11;
const BUSY_TSS: u8 = 11;

fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        db: (!long).into(),
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}

/// Writes the GDT, for kernels that load segments again before they have one of their own, and for
/// Linux page tables that map the first GiB to itself by 2 MiB pages.
pub(super) fn write_tables(load: &Load<'_>, entry: Entry) -> std::result::Result<(), BootError> {
    let long = matches!(entry, Entry::Linux { .. });
    let code = if long {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    let words = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    load.put("the GDT", GDT, &words(&[0, 0, code, 0x00cf_9300_0000_ffff]))?;
    if long {
        let page = PAGE_SIZE as u64;
        let table = |entry| words(&[entry]);
        load.put("page tables", PAGE_TABLES, &table((PAGE_TABLES + page) | 3))?;
        load.put(
            "page tables",
            PAGE_TABLES + page,
            &table((PAGE_TABLES + 2 * page) | 3),
        )?;
        let large: Vec<u64> = (0..512).map(|i| i << 21 | 0x83).collect();
        load.put("page tables", PAGE_TABLES + 2 * page, &words(&large))?;
    }
    Ok(())
}

pub(super) fn set(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let mut sregs = vcpu.get_sregs().doing("KVM_GET_SREGS")?;
    let long = matches!(entry, Entry::Linux { .. });
    sregs.cs = flat(0x10, CODE, long);
    let data = flat(0x18, DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Pvh { at } => {
            regs.rip = at;
            regs.rbx = pvh::START_INFO;
        }
        Entry::Linux { at } => {
            regs.rip = at;
            regs.rsi = linux::ZERO_PAGE;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
    vcpu.set_sregs(&sregs).doing("KVM_SET_SREGS")?;
    vcpu.set_regs(&regs).doing("KVM_SET_REGS")?;
    let mut lapic = vcpu.get_lapic().doing("KVM_GET_LAPIC")?;
    // As firmware leaves them: LINT0 takes the PIC's interrupts (ExtINT), LINT1 is NMI.
    for (at, mode) in [(0x350, 7u8), (0x360, 4)] {
        for (byte, value) in lapic.regs.iter_mut().skip(at).take(4).zip([0, mode, 0, 0]) {
            *byte = value as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).doing("KVM_SET_LAPIC")
}
