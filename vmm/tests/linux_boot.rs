//! The 64-bit Linux boot protocol, with a "kernel" that says what it was given.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::arch::global_asm;
use std::sync::Arc;

use common::payload::Mode;
use common::{BITMAP, Collected, booted, config, eventually};
use vmm::ports::Power;
use vmm::{BootConfig, Image};

// Entered in long mode with RSI = zero page: prints "L", the number of memory map entries, the command
// line and the initrd, then powers off.
global_asm!(
    ".pushsection .rodata.linux, \"a\"",
    ".global ax_linux_start, ax_linux_end",
    "ax_linux_start:",
    "mov edx, 0x3f8",
    "mov al, 0x4c",
    "out dx, al",
    "mov al, byte ptr [rsi + 0x1e8]",
    "add al, 0x30",
    "out dx, al",
    "mov ebx, dword ptr [rsi + 0x228]",
    "2:",
    "mov al, byte ptr [rbx]",
    "test al, al",
    "jz 3f",
    "out dx, al",
    "inc rbx",
    "jmp 2b",
    "3:",
    "mov ebx, dword ptr [rsi + 0x218]",
    "mov ecx, dword ptr [rsi + 0x21c]",
    "4:",
    "test ecx, ecx",
    "jz 5f",
    "mov al, byte ptr [rbx]",
    "out dx, al",
    "inc rbx",
    "dec ecx",
    "jmp 4b",
    "5:",
    "mov edx, 0x604",
    "mov eax, 0x2000",
    "out dx, ax",
    "6:",
    "hlt",
    "jmp 6b",
    "ax_linux_end:",
    ".popsection",
);

unsafe extern "C" {
    static ax_linux_start: u8;
    static ax_linux_end: u8;
}

fn bzimage() -> &'static [u8] {
    let start = &raw const ax_linux_start;
    let len = (&raw const ax_linux_end).addr() - start.addr();
    // SAFETY: both symbols bound the assembly above, which lies in read-only data.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    let mut file = vec![0u8; 1024 + 0x200];
    file[0x1f1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x211] = 1;
    file[0x22c..0x230].copy_from_slice(&0x37ff_ffffu32.to_le_bytes());
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file.extend(code);
    file.leak()
}

#[test]
fn a_bzimage_is_entered_in_long_mode_with_its_command_line_and_initrd() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let mut config = config(Mode::Count, 1, 0, BITMAP);
    config.rng = true;
    config.boot = BootConfig {
        kernel: Some(Image::Embedded(bzimage())),
        initrd: Some(Image::Embedded(b"(initrd)")),
        cmdline: "console=ttyS0".into(),
    };
    let mut machine = booted(&caps, &config, &outputs);
    machine.start().unwrap();
    eventually("power off", || machine.power() == Some(Power::Off));
    let console = String::from_utf8(outputs.console.lock().clone()).unwrap();
    assert!(
        console.starts_with("L3console=ttyS0 virtio_mmio.device="),
        "{console}"
    );
    assert!(console.ends_with(" cpus=1(initrd)"), "{console}");
}
