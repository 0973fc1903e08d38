use super::*;
use crate::memory::Ram;

const RAM: u64 = 16 << 20;

fn leak(bytes: Vec<u8>) -> Image {
    Image::Embedded(bytes.leak())
}

/// A bzImage with `len` bytes of kernel.
pub(super) fn bzimage(len: usize) -> Vec<u8> {
    let mut file = vec![0u8; 1024 + len];
    file[0x1f1] = 1; // setup sectors
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x211] = 1; // loaded high
    file[0x22c..0x230].copy_from_slice(&0x37ff_ffffu32.to_le_bytes());
    file[0x236] = 1; // 64-bit entry
    file[0x238..0x23c].copy_from_slice(&100u32.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes()); // init_size
    file
}

/// An ELF with one segment and, if asked, a PVH note.
fn elf(at: u64, filesz: u64, memsz: u64, note: bool) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    [at, 64].iter().for_each(|w| file.extend(w.to_le_bytes()));
    file.extend([0; 12]);
    file.extend([64, 0, 56, 0, 1 + u8::from(note), 0, 0, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, words: [u64; 6]| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        words.iter().for_each(|w| file.extend(w.to_le_bytes()));
    };
    header(1, [0x200, at, at, filesz, memsz, 8]);
    if note {
        header(4, [0x100, 0, 0, 20, 20, 4]);
    }
    file.resize(0x100, 0);
    file.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    file.extend(b"Xen\0");
    file.extend((at as u32).to_le_bytes());
    file.resize(0x200, 0);
    file.resize(0x200 + filesz.min(1 << 24) as usize, 0xab);
    file
}

fn try_boot(
    ram: &Ram,
    kernel: Option<Image>,
    initrd: Option<Image>,
    cmdline: &str,
) -> std::result::Result<Entry, BootError> {
    let config = BootConfig {
        kernel,
        initrd,
        cmdline: cmdline.into(),
    };
    load(
        ram.memory(),
        RAM,
        &config,
        "virtio_mmio.device=4K@0xd0000000:5",
        &[],
        2,
    )
}

fn error(kernel: Option<Image>, initrd: Option<Image>, cmdline: &str) -> String {
    let ram = Ram::new(RAM).unwrap();
    try_boot(&ram, kernel, initrd, cmdline)
        .unwrap_err()
        .to_string()
}

fn at(ram: &Ram, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

#[test]
fn pvh_kernels_get_start_info_command_line_memory_map_and_initrd() {
    let ram = Ram::new(RAM).unwrap();
    // what an earlier kernel left where this one expects zeros
    ram.memory()
        .write_slice(&[0x55; 64], GuestAddress(0x20_0400))
        .unwrap();
    let kernel = leak(elf(0x20_0000, 1024, 8192, true));
    let initrd = leak(b"initial files".to_vec());
    let entry = try_boot(&ram, Some(kernel), Some(initrd), "quiet ").unwrap();
    assert_eq!(entry, Entry::Pvh { at: 0x20_0000 });
    assert_eq!(at(&ram, 0x20_0000, 1024), [0xab; 1024]);
    assert_eq!(at(&ram, 0x20_0400, 64), [0; 64]);
    let info = at(&ram, pvh::START_INFO, 56);
    let word = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
    assert_eq!(info[..4], 0x336e_c578u32.to_le_bytes());
    let line = b"quiet virtio_mmio.device=4K@0xd0000000:5 cpus=2\0";
    assert_eq!(at(&ram, word(24), line.len()), line);
    assert_eq!(info[12..16], 1u32.to_le_bytes());
    let module = at(&ram, word(16), 16);
    let start = u64::from_le_bytes(module[..8].try_into().unwrap());
    assert_eq!(at(&ram, start, 13), b"initial files");
    assert_eq!(start % 4096, 0);
    assert_eq!(info[48..52], 3u32.to_le_bytes());
    assert_eq!(at(&ram, word(32), 8), b"RSD PTR ");
    let map = at(&ram, word(40), 72);
    let ranges: Vec<(u64, u64, u32)> = map
        .chunks(24)
        .map(|e| {
            let word = |at: usize| u64::from_le_bytes(e[at..at + 8].try_into().unwrap());
            (word(0), word(8), word(16) as u32)
        })
        .collect();
    assert_eq!(
        ranges,
        [
            (0, EBDA, 1),
            (EBDA, HIMEM - EBDA, 2),
            (HIMEM, RAM - HIMEM, 1)
        ]
    );
}

#[test]
fn bzimages_get_a_zero_page() {
    let ram = Ram::new(RAM).unwrap();
    let initrd = leak(vec![7; 5000]);
    let entry = try_boot(&ram, Some(leak(bzimage(4096))), Some(initrd), "").unwrap();
    assert_eq!(entry, Entry::Linux { at: HIMEM + 0x200 });
    let page = at(&ram, linux::ZERO_PAGE, 4096);
    let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    assert_eq!(page[0x1e8], 3);
    let rsdp = u64::from_le_bytes(page[0x70..0x78].try_into().unwrap());
    assert_eq!(at(&ram, rsdp, 8), b"RSD PTR ");
    assert_eq!(page[0x202..0x206], *b"HdrS");
    assert_eq!(page[0x210], 0xff);
    assert_eq!((word(0x218), word(0x21c)), ((RAM as u32) - 8192, 5000));
    assert!(at(&ram, word(0x228).into(), 20).starts_with(b"virtio_mmio.device="));
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    assert!(error(None, None, "").contains("no kernel"));
    let missing = Image::File("/nonexistent/vmlinux".into());
    assert!(error(Some(missing), None, "").contains("/nonexistent/vmlinux"));
    assert!(error(Some(Image::File("/tmp".into())), None, "").contains("regular file"));
    assert!(error(Some(leak(b"#!/bin/sh\n".to_vec())), None, "").contains("not a kernel"));
    assert!(error(Some(leak(b"\x7fELF".to_vec())), None, "").contains("truncated"));
    assert!(error(Some(leak(Vec::new())), None, "").contains("kernel"));
    let no_note = elf(0x20_0000, 16, 16, false);
    assert!(error(Some(leak(no_note)), None, "").contains("PVH entry note"));
    let mut old = bzimage(4096);
    old[0x236] = 0;
    assert!(error(Some(leak(old)), None, "").contains("64-bit entry"));
}

#[test]
fn what_does_not_fit_is_refused() {
    for (place, size) in [
        (0x20_0000, 1 << 30),
        (RAM, 16),
        (u64::MAX - 8, 16),
        (0x1000, 16),
    ] {
        let message = error(Some(leak(elf(place, 16, size, true))), None, "");
        assert!(
            message.contains("more memory") || message.contains("impossible"),
            "{message}"
        );
    }
    assert!(error(Some(leak(bzimage(20 << 20))), None, "").contains("more memory"));
    let kernel = || Some(leak(bzimage(4096)));
    let initrd = leak(vec![0; 14 << 20]);
    assert!(error(kernel(), Some(initrd), "").contains("initrd of 14680064 bytes"));
    assert!(error(kernel(), None, &"x".repeat(90)).contains("longer than the 100"));
    let kernel = leak(elf(0x20_0000, 16, 16, true));
    assert!(error(Some(kernel), None, "a\0b").contains("NUL"));
}
