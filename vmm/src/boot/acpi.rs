//! ACPI tables (ACPI 6.5, chapter 5) for a machine with fixed hardware: processors and interrupt lines,
//! the power button and soft off, and the virtio-mmio devices, which kernels without
//! `virtio_mmio.device=` on their command line find in no other way.
//!
//! All of them lie in the last 128 KiB below 1 MiB, which the memory map reserves, from where a BIOS has
//! its RSDP (5.2.5.1).

use acpi_tables::aml::{
    AmlStr, Device, Interrupt, Memory32Fixed, Name, PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::mptable::{IOAPIC, LAPIC};
use super::{HIMEM, Load, Window};
use crate::devices::pm1;

/// Where the RSDP is.
pub(super) const RSDP: u64 = 0xe_0000;
/// The FACS is aligned to 64 bytes; the others need less.
const ALIGN: usize = 64;

const OEM: [u8; 6] = *b"AX    ";
const OEM_TABLE: [u8; 8] = *b"AXVMM   ";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header.
const HEADER: u32 = 36;

/// FADT, IA-PC boot architecture flags (5.2.9.3): devices on the ISA bus; no VGA; no MSI.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 3;
/// Processor sleep states C2 and C3 are not there (table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// The port that resets, and what to write there.
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 6;

/// MADT flag: there are two 8259, too (5.2.12).
const PCAT_COMPAT: u32 = 1;
/// An interrupt line that is active high and level-triggered (5.2.12.5).
const HIGH_LEVEL: u16 = 0b01 | 0b11 << 2;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The table with this signature and content.
fn table(signature: [u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(content);
    table.as_slice().to_vec()
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut content = [LAPIC.to_le_bytes(), PCAT_COMPAT.to_le_bytes()].concat();
    for id in 0..vcpus {
        // processor local APIC, enabled
        content.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    // I/O APIC, its lines from 0 on
    content.extend([1, 12, vcpus, 0]);
    content.extend(IOAPIC.to_le_bytes());
    content.extend([0; 4]);
    // interrupt source override: ISA line 9, the system control interrupt
    content.extend([2, 10, 0, pm1::SCI as u8]);
    content.extend(pm1::SCI.to_le_bytes());
    content.extend(HIGH_LEVEL.to_le_bytes());
    // local APIC NMI: LINT1 of all
    content.extend([4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 5, &content)
}

/// A device of the virtio-mmio bus, as QEMU and Linux name it.
fn virtio(number: usize, window: &Window) -> Vec<u8> {
    // The virtio windows and their lengths lie below 4 GiB.
    let at = Memory32Fixed::new(true, window.base as u32, window.size as u32);
    let line = Interrupt::new(true, true, false, false, window.gsi);
    let hid: AmlStr = "LNRO0005";
    let name = format!("VR{number:02}");
    bytes(&Device::new(
        Path::new(&name),
        vec![
            &Name::new(Path::new("_HID"), &hid),
            &Name::new(Path::new("_UID"), &(number as u32)),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&at, &line])),
        ],
    ))
}

/// AML that is there already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn dsdt(windows: &[Window]) -> Vec<u8> {
    let mut s5 = PackageBuilder::new();
    for value in [pm1::S5, pm1::S5, 0, 0] {
        s5.add_element(&value);
    }
    let devices = windows.iter().enumerate();
    let devices: Vec<_> = devices.map(|(n, w)| Raw(virtio(n, w))).collect();
    let devices = devices.iter().map(|d| d as &dyn Aml).collect();
    let content = [
        bytes(&Name::new(Path::new("_S5_"), &s5)),
        bytes(&Scope::new(Path::new("_SB_"), devices)),
    ];
    table(*b"DSDT", 2, &content.concat())
}

fn fadt(dsdt: u64, facs: u32) -> Vec<u8> {
    let port = |len: u8, at: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            len * 8,
            0,
            AccessSize::WordAccess,
            at.into(),
        )
    };
    // The button is a fixed one: the flag that says "control method" is not set, that for sleep is.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = (pm1::SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(pm1::EVENT_BLOCK).into();
    fadt.pm1_evt_len = pm1::EVENT_LEN;
    fadt.x_pm1a_evt_blk = port(pm1::EVENT_LEN, pm1::EVENT_BLOCK);
    fadt.pm1a_cnt_blk = u32::from(pm1::CONTROL_BLOCK).into();
    fadt.pm1_cnt_len = pm1::CONTROL_LEN;
    fadt.x_pm1a_cnt_blk = port(pm1::CONTROL_LEN, pm1::CONTROL_BLOCK);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        RESET_PORT,
    );
    fadt.reset_value = RESET_VALUE;
    fadt.century = 0x32;
    bytes(&fadt.finalize())
}

/// All tables, as they are from [`RSDP`] on.
pub(super) fn tables(vcpus: u8, windows: &[Window]) -> Vec<u8> {
    let mut all = vec![0; ALIGN];
    let mut place = |table: Vec<u8>| {
        let at = RSDP + all.len() as u64;
        all.extend(table);
        all.resize(all.len().next_multiple_of(ALIGN), 0);
        at
    };
    let facs = place(bytes(&FACS::new()));
    let dsdt = place(dsdt(windows));
    let fadt = place(fadt(dsdt, facs as u32));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    [fadt, madt].into_iter().for_each(|at| xsdt.add_entry(at));
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    all.iter_mut().zip(rsdp).for_each(|(to, from)| *to = from);
    all
}

/// Writes them where kernels look for them.
pub(super) fn write(
    load: &Load<'_>,
    vcpus: u8,
    windows: &[Window],
) -> Result<(), super::BootError> {
    let tables = tables(vcpus, windows);
    debug_assert!(RSDP + tables.len() as u64 <= HIMEM);
    load.put("the ACPI tables", RSDP, &tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables of a machine with this many processors and virtio devices.
    fn machine(vcpus: u8, devices: usize) -> Vec<u8> {
        let windows: Vec<_> = (0..devices)
            .map(|n| Window {
                base: 0xd000_0000 + n as u64 * 0x1000,
                size: 0x1000,
                gsi: 5 + n as u32,
            })
            .collect();
        tables(vcpus, &windows)
    }

    fn read<const N: usize>(all: &[u8], at: u64) -> [u8; N] {
        let at = (at - RSDP) as usize;
        all[at..at + N].try_into().unwrap()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `at`, whole, with a right checksum.
    fn sound(all: &[u8], at: u64) -> &[u8] {
        let len = u32::from_le_bytes(read(all, at + 4)) as usize;
        let from = (at - RSDP) as usize;
        let table = &all[from..from + len];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    fn word(table: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(table[at..at + 2].try_into().unwrap())
    }

    fn double(table: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
    }

    fn quad(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    /// Offsets by ACPI 6.5, tables 5.3, 5.9, 5.10, 5.19, read without the library that wrote them.
    #[test]
    fn the_tables_lead_to_each_other_and_say_what_the_machine_has() {
        for (vcpus, devices) in [(1, 0), (2, 3), (crate::config::MAX_VCPUS, 17)] {
            let all = machine(vcpus, devices);
            assert!(RSDP + all.len() as u64 <= HIMEM);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!((sum(&all[..20]), sum(&all[..36]), all[15]), (0, 0, 2));
            let xsdt = sound(&all, quad(&all, 24));
            assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
            let fadt = sound(&all, quad(xsdt, 36));
            assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
            assert_eq!(word(fadt, 46), 9, "SCI");
            assert_eq!(double(fadt, 48), 0, "no SMI command port");
            assert_eq!((double(fadt, 56), fadt[88]), (0x600, 4), "PM1a event block");
            assert_eq!(
                (double(fadt, 64), fadt[89]),
                (0x604, 2),
                "PM1a control block"
            );
            assert_eq!((fadt[148], fadt[149], quad(fadt, 152)), (1, 32, 0x600));
            assert_eq!((fadt[172], fadt[173], quad(fadt, 176)), (1, 16, 0x604));
            assert_eq!((double(fadt, 76), fadt[91]), (0, 0), "no timer");
            let flags = double(fadt, 112);
            assert_eq!(flags & 1 << 4, 0, "a fixed power button");
            assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
            assert_eq!((quad(fadt, 120), fadt[128]), (0xcf9, 6), "reset register");
            let facs = u64::from(double(fadt, 36));
            assert_eq!((facs % 64, &read::<4>(&all, facs)), (0, b"FACS"));
            let dsdt = sound(&all, quad(fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            assert_eq!(dsdt[36..48], *b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00");
            let named = dsdt.windows(9).filter(|w| w == b"LNRO0005\0").count();
            assert_eq!(named, devices);
            for n in 0..devices {
                let window = [0xd000_0000 + n as u32 * 0x1000, 0x1000].map(u32::to_le_bytes);
                let line = [&b"\x89\x06\x00\x03\x01"[..], &(5 + n as u32).to_le_bytes()].concat();
                let crs = [&b"\x86\x09\x00\x01"[..], &window.concat(), &line].concat();
                assert!(dsdt.windows(crs.len()).any(|w| w == crs), "device {n}");
            }
            let madt = sound(&all, quad(xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            assert_eq!((double(madt, 36), double(madt, 40)), (LAPIC, 1));
            let (mut at, mut kinds) = (44, Vec::new());
            while at < madt.len() {
                kinds.push(madt[at]);
                if madt[at] == 2 {
                    assert_eq!(madt[at + 2..at + 10], [0, 9, 9, 0, 0, 0, 0x0d, 0]);
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            let expected = [vec![0; vcpus.into()], vec![1, 2, 4]].concat();
            assert_eq!(kinds, expected);
        }
    }

    /// The probe guest's own reader, which shares nothing with what wrote them.
    #[test]
    fn a_guest_finds_the_button_through_them() {
        let all = machine(2, 3);
        let read = |at: u64| {
            all.get(usize::try_from(at.checked_sub(RSDP)?).ok()?)
                .copied()
        };
        let found = probe_guest::acpi::Fixed::find(RSDP, read);
        assert_eq!(
            found,
            Some(probe_guest::acpi::Fixed {
                events: 0x600,
                control: 0x604,
                sci: 9,
                s5: 0,
            })
        );
    }
}
