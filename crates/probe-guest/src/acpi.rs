//! ACPI's fixed hardware, found through the tables (ACPI 6.5, chapter 5).

/// More bytes than any table here has.
const MOST: u32 = 64 << 10;
/// More tables than any machine here has.
const MOST_TABLES: u32 = 64;

/// The fixed hardware that a power button needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed {
    /// Port of PM1a's status register; the enable register is 2 bytes further.
    pub events: u16,
    /// Port of PM1a's control register.
    pub control: u16,
    /// Pin of the I/O APIC of the system control interrupt.
    pub sci: u8,
    /// Sleep type of soft off.
    pub s5: u8,
}

/// PWRBTN_STS and PWRBTN_EN (4.8.3.1).
pub const POWER_BUTTON: u16 = 1 << 8;

impl Fixed {
    /// Follows RSDP, XSDT, FADT and DSDT. `read` gives the byte at an address, none where there is no
    /// memory. None when a table is missing, damaged, or says that there is no fixed power button.
    pub fn find(rsdp: u64, read: impl Fn(u64) -> Option<u8>) -> Option<Self> {
        let memory = Memory(read);
        if memory.bytes::<8>(rsdp)? != *b"RSD PTR " || memory.sum(rsdp, 36)? != 0 {
            return None;
        }
        let xsdt = memory.table(memory.long(rsdp + 24)?, b"XSDT")?;
        let entries = (xsdt.len.checked_sub(36)? / 8).min(MOST_TABLES);
        let fadt = (0..entries).find_map(|n| {
            let at = memory.long(xsdt.at + 36 + 8 * u64::from(n))?;
            memory.table(at, b"FACP")
        })?;
        let flags = memory.word(fadt.at + 112)?;
        let (no_button, reduced) = (flags & 1 << 4 != 0, flags & 1 << 20 != 0);
        if fadt.len < 148 || no_button || reduced {
            return None;
        }
        let dsdt = memory.table(memory.long(fadt.at + 140)?, b"DSDT")?;
        Some(Self {
            events: u16::try_from(memory.word(fadt.at + 56)?).ok()?,
            control: u16::try_from(memory.word(fadt.at + 64)?).ok()?,
            sci: memory.bytes::<1>(fadt.at + 46)?[0],
            s5: memory.s5(&dsdt)?,
        })
        .filter(|it| it.events != 0 && it.control != 0)
    }
}

struct Memory<R>(R);

struct Table {
    at: u64,
    len: u32,
}

impl<R: Fn(u64) -> Option<u8>> Memory<R> {
    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = (self.0)(at.checked_add(n as u64)?)?;
        }
        Some(bytes)
    }

    fn word(&self, at: u64) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn long(&self, at: u64) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    fn sum(&self, at: u64, len: u32) -> Option<u8> {
        let mut sum = 0u8;
        for n in 0..u64::from(len) {
            sum = sum.wrapping_add((self.0)(at.checked_add(n)?)?);
        }
        Some(sum)
    }

    fn table(&self, at: u64, signature: &[u8; 4]) -> Option<Table> {
        let len = self.word(at.checked_add(4)?)?;
        let sound = self.bytes::<4>(at)? == *signature && (36..=MOST).contains(&len);
        (sound && self.sum(at, len)? == 0).then_some(Table { at, len })
    }

    /// The first element of the package `\_S5`, which is a small integer. A search for its bytes, as is
    /// usual where nothing interprets AML.
    fn s5(&self, dsdt: &Table) -> Option<u8> {
        let end = dsdt.at + u64::from(dsdt.len);
        let name = (dsdt.at + 36..end).find(|at| self.bytes(*at) == Some(*b"_S5_\x12"))?;
        // The length of the package takes one byte here, its number of elements the next.
        let [length, elements, first, second] = self.bytes(name + 5)?;
        match (length >> 6, elements, first) {
            (0, 1.., value @ (0 | 1)) => Some(value),
            (0, 1.., 0x0a) => Some(second),
            _ => None,
        }
        .filter(|value| *value < 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn table(signature: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let mut table = [
            &signature[..],
            &(36 + content.len() as u32).to_le_bytes(),
            &[0; 28],
        ]
        .concat();
        table.extend(content);
        seal(&mut table, 9);
        table
    }

    fn seal(bytes: &mut [u8], at: usize) {
        bytes[at] = 0;
        bytes[at] = bytes.iter().fold(0u8, |s, b| s.wrapping_sub(*b));
    }

    /// RSDP at 0, XSDT at 64, FADT at 128, DSDT at 512.
    fn machine(flags: u32, aml: &[u8]) -> Vec<u8> {
        let mut fadt = [0; 240];
        fadt[10..12].copy_from_slice(&[9, 0]);
        fadt[20..24].copy_from_slice(&0x600u32.to_le_bytes());
        fadt[28..32].copy_from_slice(&0x604u32.to_le_bytes());
        fadt[76..80].copy_from_slice(&flags.to_le_bytes());
        fadt[104..112].copy_from_slice(&512u64.to_le_bytes());
        let mut rsdp = [&b"RSD PTR "[..], &[0; 16], &64u64.to_le_bytes(), &[0; 4]].concat();
        seal(&mut rsdp, 32);
        let mut all = std::vec![0; 1024];
        for (at, part) in [
            (0, rsdp),
            (64, table(b"XSDT", &128u64.to_le_bytes())),
            (128, table(b"FACP", &fadt)),
            (512, table(b"DSDT", aml)),
        ] {
            all[at..at + part.len()].copy_from_slice(&part);
        }
        all
    }

    fn find(all: &[u8]) -> Option<Fixed> {
        Fixed::find(0, |at| all.get(usize::try_from(at).ok()?).copied())
    }

    const S5: &[u8] = b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00";

    #[test]
    fn the_button_is_found() {
        let found = find(&machine(0x1425, S5)).unwrap();
        let expected = Fixed {
            events: 0x600,
            control: 0x604,
            sci: 9,
            s5: 5,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn no_button_and_damaged_tables_are_none() {
        assert_eq!(find(&machine(1 << 4, S5)), None, "a control method button");
        assert_eq!(find(&machine(1 << 20, S5)), None, "hardware-reduced");
        assert_eq!(find(&machine(0, b"\x08_S4_\x12\x06\x04\0\0\0\0")), None);
        let good = machine(0, S5);
        let end = 512 + 36 + S5.len();
        let used = (0..36).chain(64..108).chain(128..128 + 276).chain(512..end);
        for at in used {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert_eq!(find(&bad), None, "byte {at}");
        }
        for len in 0..end {
            assert_eq!(find(&good[..len]), None, "cut at {len}");
        }
    }
}
