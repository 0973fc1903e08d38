//! What a boot loader relies on, read from the image itself: no KVM needed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use probe_guest::ELF;

fn u16_at(at: usize) -> u16 {
    u16::from_le_bytes(ELF[at..at + 2].try_into().unwrap())
}

fn u32_at(at: usize) -> u32 {
    u32::from_le_bytes(ELF[at..at + 4].try_into().unwrap())
}

fn u64_at(at: usize) -> u64 {
    u64::from_le_bytes(ELF[at..at + 8].try_into().unwrap())
}

struct Segment {
    kind: u32,
    offset: usize,
    physical: u64,
    in_file: u64,
    in_memory: u64,
}

fn segments() -> Vec<Segment> {
    let (table, size, count) = (u64_at(32) as usize, u16_at(54), u16_at(56));
    (0..usize::from(count))
        .map(|i| table + i * usize::from(size))
        .map(|at| Segment {
            kind: u32_at(at),
            offset: u64_at(at + 8) as usize,
            physical: u64_at(at + 24),
            in_file: u64_at(at + 32),
            in_memory: u64_at(at + 40),
        })
        .collect()
}

const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERP: u32 = 3;
const NOTE: u32 = 4;

fn loaded(address: u64) -> Option<usize> {
    let holds =
        |s: &&Segment| s.kind == LOAD && (s.physical..s.physical + s.in_file).contains(&address);
    let all = segments();
    let s = all.iter().find(holds)?;
    Some(s.offset + (address - s.physical) as usize)
}

#[test]
fn is_a_static_64_bit_x86_executable() {
    assert_eq!(ELF[..6], *b"\x7fELF\x02\x01");
    assert_eq!((u16_at(16), u16_at(18)), (2, 62), "ET_EXEC, EM_X86_64");
    assert!(
        segments()
            .iter()
            .all(|s| s.kind != DYNAMIC && s.kind != INTERP)
    );
}

#[test]
fn loads_at_1_mib_inside_the_smallest_machine() {
    let load: Vec<Segment> = segments().into_iter().filter(|s| s.kind == LOAD).collect();
    assert!(!load.is_empty());
    for s in load {
        assert!(s.physical >= 1 << 20 && s.physical + s.in_memory <= 8 << 20);
        assert!(s.in_file <= s.in_memory && s.offset + s.in_file as usize <= ELF.len());
    }
}

#[test]
fn has_a_pvh_entry_note_that_points_to_code() {
    let note = segments()
        .into_iter()
        .find(|s| s.kind == NOTE)
        .expect("a note segment");
    let at = note.offset;
    assert_eq!((u32_at(at), u32_at(at + 4), u32_at(at + 8)), (4, 8, 18));
    assert_eq!(ELF[at + 12..at + 16], *b"Xen\0");
    let entry = u64_at(at + 16);
    assert!(entry < 1 << 32, "entered in 32-bit mode");
    let code = loaded(entry).expect("the entry is loaded");
    // cli; cld
    assert_eq!(ELF[code..code + 2], [0xfa, 0xfc]);
}

#[test]
fn ring_0_finds_its_constants() {
    // Task state segment 0's RSP0 and vector 13's gate, as boot.s lays them out.
    let tss = loaded(0x10_0000).unwrap();
    assert_eq!(u64_at(tss + 4), 0x10_0400);
    let general_protection = loaded(0x10_8000 + 13 * 64).unwrap();
    // cmp qword ptr [rsp + 8], imm32
    assert_eq!(
        ELF[general_protection..general_protection + 5],
        [0x48, 0x81, 0x7c, 0x24, 0x08]
    );
}
