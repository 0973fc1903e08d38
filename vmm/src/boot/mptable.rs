//! The MP table (Intel MultiProcessor Specification 1.4): processors, the IOAPIC and its lines, for
//! kernels that get no ACPI tables.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, EBDA};
use crate::memory::GuestMemory;

pub(super) const LAPIC: u32 = 0xfee0_0000;
pub(super) const IOAPIC: u32 = 0xfec0_0000;
const ISA_IRQS: u8 = 24;
/// LAPIC and IOAPIC version as KVM's.
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

fn with_checksum(mut table: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = table.get_mut(at) {
        *checksum = sum.wrapping_neg();
    }
    table
}

/// The floating pointer and, behind it, the table.
fn table(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = if id == 0 { 3 } else { 1 }; // enabled, boot processor
        // family 6 with FPU and APIC
        entries.push(
            [
                &[0, id, APIC_VERSION, flags][..],
                &0x600u32.to_le_bytes(),
                &0x201u32.to_le_bytes(),
                &[0; 8],
            ]
            .concat(),
        );
    }
    entries.push([&[1, 0][..], b"ISA   "].concat());
    entries.push([&[2, vcpus, IOAPIC_VERSION, 1][..], &IOAPIC.to_le_bytes()].concat());
    // interrupt, "conforms to the bus" (ISA: edge, high), ISA line n to pin n
    entries.extend((0..ISA_IRQS).map(|irq| vec![3, 0, 0, 0, 0, irq, vcpus, irq]));
    // LINT0 of the boot processor: the PIC; LINT1 of all: NMI
    entries.push(vec![4, 3, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, 1, 0, 0, 0, 0, 0xff, 1]);
    let body = entries.concat();
    let header = [
        b"PCMP",
        &(44 + body.len() as u16).to_le_bytes()[..],
        &[4, 0],
        b"AX      ",
        b"AX          ",
        &[0; 6],
        &(entries.len() as u16).to_le_bytes(),
        &LAPIC.to_le_bytes(),
        &[0; 4],
    ]
    .concat();
    let pointer = [
        b"_MP_",
        &(EBDA as u32 + 16).to_le_bytes()[..],
        &[1, 4, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    [
        with_checksum(pointer, 10),
        with_checksum([header, body].concat(), 7),
    ]
    .concat()
}

/// Writes it where kernels look for it: the last KiB of base memory.
pub(super) fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), BootError> {
    let put = memory.write_slice(&table(vcpus), GuestAddress(EBDA));
    put.map_err(|source| BootError::Memory {
        what: "the MP table",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_have_right_lengths_and_sums_and_fit() {
        for vcpus in 1..=crate::config::MAX_VCPUS {
            let table = table(vcpus);
            assert!(table.len() <= 1024);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            let (pointer, table) = table.split_at(16);
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(usize::from(count), usize::from(vcpus) + 2 + 24 + 2);
        }
    }
}
