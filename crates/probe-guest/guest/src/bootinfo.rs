//! What the boot loader left: command line and memory map of the PVH start info.

use alloc::string::String;

use crate::mem::{Arena, PAGE, Ram};

unsafe extern "C" {
    static start_info: u32;
    static image_end: u8;
}

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const LOW_END: u64 = 3 << 30;
/// boot.s maps this much.
const MAPPED_END: u64 = 32 << 30;
const MAX_CMDLINE: usize = 4096;

fn word(at: u64) -> u32 {
    // SAFETY: the loader put these structures in RAM below 4 GiB, which is mapped.
    unsafe { (at as *const u32).read_unaligned() }
}

fn long(at: u64) -> u64 {
    u64::from(word(at)) | u64::from(word(at + 4)) << 32
}

/// RAM as the loader tells: what lies from the image's end to 3 GiB, and from 4 GiB on.
pub fn memory() -> Option<[Ram; 2]> {
    // SAFETY: written once by the first instructions of boot.s.
    let info = u64::from(unsafe { (&raw const start_info).read_volatile() });
    if word(info) != MAGIC || word(info + 4) < 1 {
        return None;
    }
    let (map, entries) = (long(info + 40), u64::from(word(info + 48)).min(128));
    let behind = &raw const image_end as u64;
    let mut ram = [Ram::default(); 2];
    for i in 0..entries {
        let at = map + 24 * i;
        let (base, size, kind) = (long(at), long(at + 8), word(at + 16));
        let end = base.saturating_add(size) & !(PAGE - 1);
        if kind != RAM {
            continue;
        }
        if base <= behind && behind < end {
            ram[0] = Ram {
                base: behind,
                end: end.min(LOW_END),
            };
        } else if base >= 4 << 30 && ram[1].end == 0 && base < MAPPED_END {
            ram[1] = Ram {
                base: base.next_multiple_of(PAGE),
                end: end.min(MAPPED_END),
            };
        }
    }
    (ram[0].end > ram[0].base).then_some(ram)
}

/// Where the ACPI tables begin, if the loader has put some there.
pub fn rsdp() -> Option<u64> {
    // SAFETY: as in `memory`.
    let info = u64::from(unsafe { (&raw const start_info).read_volatile() });
    Some(long(info + 32)).filter(|at| *at != 0)
}

/// The command line. Needs the heap.
pub fn cmdline() -> String {
    // SAFETY: as in `memory`.
    let info = u64::from(unsafe { (&raw const start_info).read_volatile() });
    let at = long(info + 24);
    let mut text = String::new();
    if at != 0 && at < LOW_END {
        for i in 0..MAX_CMDLINE {
            // SAFETY: a string in RAM below 3 GiB, ended by NUL; bounded.
            match unsafe { (at as *const u8).add(i).read() } {
                0 => break,
                b => text.push(char::from(b)),
            }
        }
    }
    text
}

/// Divides memory: a quarter of low RAM (at most 512 MiB) is heap, the rest arena.
pub fn divide(ram: [Ram; 2]) -> (Ram, Arena) {
    let [low, high] = ram;
    let size = ((low.end - low.base) / 4).min(512 << 20) & !(PAGE - 1);
    let heap = Ram {
        base: low.base,
        end: low.base + size,
    };
    (
        heap,
        Arena::new([
            Ram {
                base: heap.end,
                end: low.end,
            },
            high,
        ]),
    )
}
