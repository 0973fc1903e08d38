//! A guest of a few hundred bytes: enters long mode by PVH, starts the other vCPUs by INIT and SIPI,
//! takes a LAPIC timer interrupt every millisecond, and runs one of a few workloads in ring 3.

use std::arch::global_asm;

/// Guest-physical address of what each vCPU has counted, one cache line per vCPU.
pub const COUNTERS: u64 = 0x30_0000;
/// Where each vCPU's timer ticks are counted, one cache line per vCPU.
pub const TICKS: u64 = 0x30_1000;
/// Not zero when the work is done, or when the guest ran on after it should have stopped.
pub const DONE: u64 = 0x30_2000;
/// Where the guest's parameters are: mode, vCPUs, step limit.
const PARAMS: u64 = 0x30_4000;
/// Where the step limit of [`Mode::Work`] is.
pub const LIMIT: u64 = PARAMS + 16;
/// What [`Mode::Work`] and [`Mode::Dirty`] write to.
pub const ARENA: u64 = 0x80_0000;
/// Bytes of it.
pub const ARENA_LEN: u64 = 0x20_0000;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Every vCPU counts.
    Count = 1,
    /// vCPU 0 writes numbered bytes to the console by `rep outsb`, 64 at a time; the others count.
    Outsb = 2,
    /// Every vCPU writes random words all over the arena and another 2 MiB, and halts now and then.
    Dirty = 3,
    /// vCPU 0 does as many deterministic steps on the arena as the limit says, then sets DONE.
    Work = 4,
    /// Every vCPU counts its wake-ups from HLT.
    Halt = 5,
    /// Switches the machine off.
    PowerOff = 6,
    /// Triple fault.
    Crash = 7,
    /// Counts to 1000, then asks for a reset.
    Reset = 8,
}

global_asm!(
    ".pushsection .rodata.payload, \"a\"",
    ".global ax_payload_start, ax_payload_end",
    "ax_payload_start:",
    ".code32",
    // 32-bit protected mode, no paging
    "mov eax, 0x18",
    "mov ds, ax",
    "lgdt [0x205800]",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x200000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "mov eax, 0x100",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80000011",
    "mov cr0, eax",
    ".byte 0xea",
    ".long 0x100000 + (40f - ax_payload_start)",
    ".word 0x10",
    ".code64",
    "40:",
    "mov ebx, 0xfee00000",
    "mov r15d, dword ptr [rbx + 0x20]",
    "shr r15d, 24",
    "lidt [0x205810]",
    "mov eax, r15d",
    "shl eax, 4",
    "add eax, 0x40",
    "ltr ax",
    "cmp qword ptr [0x304000], 7",
    "jne 41f",
    "lidt [0x205820]",
    "ud2",
    "41:",
    "mov eax, r15d",
    "inc eax",
    "shl eax, 12",
    "lea rsp, [rax + 0x210000]",
    "lea rcx, [rax + 0x220000]",
    "mov eax, 0x2b",
    "push rax",
    "push rcx",
    "mov eax, 0x3202",
    "push rax",
    "mov eax, 0x33",
    "push rax",
    ".byte 0xb8", // mov eax, …
    ".long 0x100000 + (42f - ax_payload_start)",
    "push rax",
    "iretq",
    // ring 3; r15 = vCPU, rbx = LAPIC
    "42:",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",
    "mov dword ptr [rbx + 0x320], 0x20040",
    "mov dword ptr [rbx + 0x380], 1000000",
    "mov r14, r15",
    "shl r14, 6",
    "test r15, r15",
    "jnz 45f",
    // start the others: the trampoline to 0x8000, then INIT and SIPI to each
    ".byte 0xbe", // mov esi, …
    ".long 0x100000 + (60f - ax_payload_start)",
    "mov edi, 0x8000",
    ".byte 0xb9", // mov ecx, …
    ".long 61f - 60f",
    "rep movsb",
    "mov ecx, 1",
    "43:",
    "cmp rcx, qword ptr [0x304008]",
    "jae 45f",
    "mov eax, ecx",
    "shl eax, 24",
    "mov dword ptr [rbx + 0x310], eax",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x310], eax",
    "mov dword ptr [rbx + 0x300], 0x4608",
    "inc ecx",
    "jmp 43b",
    "45:",
    "xor r8d, r8d",
    "mov r9, 0x79b97f4a7c15",
    "add r9, r15",
    "mov rax, qword ptr [0x304000]",
    "cmp eax, 2",
    "je 46f",
    "cmp eax, 3",
    "je 48f",
    "cmp eax, 4",
    "je 51f",
    "cmp eax, 5",
    "je 54f",
    "cmp eax, 6",
    "je 55f",
    "cmp eax, 8",
    "je 57f",
    // Count
    "44:",
    "inc qword ptr [r14 + 0x300000]",
    "jmp 44b",
    // Outsb: 64 numbered bytes to the buffer, out, again
    "46:",
    "test r15, r15",
    "jnz 44b",
    "47:",
    "mov ecx, 64",
    "mov edi, 0x303000",
    "62:",
    "mov byte ptr [rdi], r8b",
    "inc r8",
    "inc rdi",
    "dec ecx",
    "jnz 62b",
    "mov qword ptr [0x300000], r8",
    "mov esi, 0x303000",
    "mov ecx, 64",
    "mov edx, 0x3f8",
    "rep outsb",
    "jmp 47b",
    // Dirty
    "48:",
    "mov rax, r9",
    "shl rax, 13",
    "xor r9, rax",
    "mov rax, r9",
    "shr rax, 7",
    "xor r9, rax",
    "mov rax, r9",
    "shl rax, 17",
    "xor r9, rax",
    "mov eax, r9d",
    "and eax, 0x1ffff8",
    "mov qword ptr [rax + 0x800000], r9",
    "mov rax, r9",
    "shr rax, 20",
    "and eax, 0x1ffff8",
    "mov qword ptr [rax + 0x600000], r9",
    "inc r8",
    "mov qword ptr [r14 + 0x300000], r8",
    "test r8b, 0x1f",
    "jnz 48b",
    "hlt",
    "jmp 48b",
    // Work
    "51:",
    "test r15, r15",
    "jnz 54f",
    "52:",
    "cmp r8, qword ptr [0x304010]",
    "jae 53f",
    "mov rax, r9",
    "shl rax, 13",
    "xor r9, rax",
    "mov rax, r9",
    "shr rax, 7",
    "xor r9, rax",
    "mov rax, r9",
    "shl rax, 17",
    "xor r9, rax",
    "mov eax, r9d",
    "and eax, 0x1ffff8",
    "mov rcx, qword ptr [rax + 0x800000]",
    "lea rcx, [rcx + 2*rcx]",
    "add rcx, r9",
    "mov qword ptr [rax + 0x800000], rcx",
    "inc r8",
    "mov qword ptr [0x300000], r8",
    "jmp 52b",
    "53:",
    "mov qword ptr [0x302000], 1",
    "hlt",
    "jmp 53b",
    // Halt
    "54:",
    "inc qword ptr [r14 + 0x300000]",
    "hlt",
    "jmp 54b",
    // PowerOff
    "55:",
    "mov edx, 0x604",
    "mov eax, 0x2000",
    "out dx, ax",
    "inc qword ptr [0x302000]",
    "jmp 55b",
    // Reset
    "57:",
    "inc qword ptr [0x300000]",
    "cmp qword ptr [0x300000], 1000",
    "jb 57b",
    "mov eax, 0xfe",
    "out 0x64, al",
    "inc qword ptr [0x302000]",
    "58:",
    "jmp 58b",
    // other exceptions: say so, stop
    ".global ax_payload_trap, ax_payload_gp, ax_payload_timer",
    "ax_payload_trap:",
    "mov al, 0x21",
    "mov edx, 0x3f8",
    "out dx, al",
    "63:",
    "hlt",
    "jmp 63b",
    // HLT in ring 3 faults: halt here with interrupts on, step over it
    "ax_payload_gp:",
    "add qword ptr [rsp + 8], 1",
    "sti",
    "hlt",
    "add rsp, 8",
    "iretq",
    "ax_payload_timer:",
    "push rax",
    "mov rax, r15",
    "shl rax, 6",
    "inc qword ptr [rax + 0x301000]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    // real mode at 0x800:0
    ".code16",
    "60:",
    "cli",
    ".byte 0x2e, 0x66, 0x0f, 0x01, 0x16", // lgdt dword cs:[GDT pointer]
    ".word 64f - 60b",
    "mov eax, 0x11",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long 0x100000",
    ".word 0x08",
    "64:",
    ".word 0xff",
    ".long 0x205000",
    "61:",
    ".code64",
    "ax_payload_end:",
    ".popsection",
);

unsafe extern "C" {
    static ax_payload_start: u8;
    static ax_payload_end: u8;
    static ax_payload_trap: u8;
    static ax_payload_gp: u8;
    static ax_payload_timer: u8;
}

const CODE: u64 = 0x10_0000;
const TABLES: usize = 0x20_0000;

fn code() -> Vec<u8> {
    let start = &raw const ax_payload_start;
    let len = (&raw const ax_payload_end).addr() - start.addr();
    // SAFETY: both symbols bound the assembly above, which lies in read-only data.
    unsafe { std::slice::from_raw_parts(start, len) }.to_vec()
}

fn address_of(label: *const u8) -> u64 {
    CODE + (label.addr() - (&raw const ax_payload_start).addr()) as u64
}

/// Page tables, IDT, GDT and TSSs, for TABLES onwards.
fn tables() -> Vec<u8> {
    let mut bytes = vec![0u8; 0xb000];
    let mut put = |at: usize, word: u64| {
        bytes[at - TABLES..at - TABLES + 8].copy_from_slice(&word.to_le_bytes());
    };
    // present, writable, user, accessed; large pages dirty too
    put(0x20_0000, 0x20_1027);
    put(0x20_1000, 0x20_2027);
    put(0x20_1000 + 3 * 8, 0x20_3027);
    (0..512).for_each(|i| put(0x20_2000 + 8 * i, (i as u64) << 21 | 0xe7));
    put(0x20_3000 + 8 * 0x1f7, 0xfee0_00ff);
    for vector in 0..256usize {
        let handler = match vector {
            13 => address_of(&raw const ax_payload_gp),
            0..32 => address_of(&raw const ax_payload_trap),
            _ => address_of(&raw const ax_payload_timer),
        };
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
        put(0x20_4000 + 16 * vector, low);
    }
    put(0x20_5008, 0x00cf_9b00_0000_ffff);
    put(0x20_5010, 0x00af_9b00_0000_ffff);
    put(0x20_5018, 0x00cf_9300_0000_ffff);
    put(0x20_5028, 0x00cf_f300_0000_ffff);
    put(0x20_5030, 0x00af_fb00_0000_ffff);
    for cpu in 0..8usize {
        let tss = 0x20_6000 + 0x80 * cpu as u64;
        // I/O permission bitmap, all allowed: 0x208000 to 0x20a000
        let bitmap = 0x20_8000 - tss;
        put(tss as usize + 0x60, bitmap << 48);
        let low = (bitmap + 0x2000) | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24) << 56;
        put(0x20_5040 + 16 * cpu, low);
        let stack = 0x21_0000 + 0x1000 * (cpu as u64 + 1);
        put(tss as usize + 4, stack); // RSP0
    }
    // pointers: GDT, IDT, an empty IDT
    put(0x20_5800, 0xff | 0x20_5000 << 16);
    put(0x20_5810, 0xfff | 0x20_4000 << 16);
    put(0x20_5820, 0);
    bytes
}

/// The guest as an ELF with a PVH entry note. It stays in memory (70 KB) until the process ends, as
/// an embedded kernel does.
pub fn elf(mode: Mode, vcpus: u8, limit: u64) -> &'static [u8] {
    let params: Vec<u8> = [mode as u64, vcpus.into(), limit]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    let note: Vec<u8> = [
        &4u32.to_le_bytes()[..],
        &4u32.to_le_bytes(),
        &18u32.to_le_bytes(),
        b"Xen\0",
        &(CODE as u32).to_le_bytes(),
    ]
    .concat();
    let parts = [
        (1u32, CODE, code()),
        (1, TABLES as u64, tables()),
        (1, PARAMS, params),
        (4, 0, note),
    ];
    let mut file = Vec::new();
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(CODE.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 12]);
    file.extend([64, 0, 56, 0, parts.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
    let mut offset = 64 + 56 * parts.len() as u64;
    for (kind, address, bytes) in &parts {
        let len = bytes.len() as u64;
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [offset, *address, *address, len, len, 8] {
            file.extend(word.to_le_bytes());
        }
        offset += len;
    }
    parts.iter().for_each(|(_, _, bytes)| file.extend(bytes));
    file.leak()
}
