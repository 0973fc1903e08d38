//! Kernels into guest memory, and the first registers: PVH for ELF kernels, the 64-bit boot protocol
//! for Linux bzImages.
//!
//! Low memory, fixed for both (guest-physical):
//!
//! | from | what |
//! |---|---|
//! | 0x500 | GDT |
//! | 0x6000 | PVH start info, module list, memory map |
//! | 0x7000 | Linux zero page |
//! | 0x9000–0xbfff | page tables of the first GiB (Linux) |
//! | 0x20000 | command line |
//! | 0x9fc00 | MP table (processors and interrupt lines, for kernels without ACPI) |
//! | 0xe0000 | ACPI tables, the RSDP first |

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use ax_wire::PAGE_SIZE;

use crate::config::{BootConfig, Image};
use crate::error::Result;
use crate::memory::{GuestMemory, HIGH_START, MMIO_START};

mod acpi;
mod linux;
mod mptable;
mod pvh;
mod registers;

/// Where low memory ends and the MP table is; reserved to 1 MiB.
const EBDA: u64 = 0x9fc00;
const HIMEM: u64 = 0x10_0000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line of a PVH kernel, bytes; a bzImage tells its own.
const PVH_CMDLINE_MAX: usize = 4095;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No kernel is configured.
    #[error("no kernel is configured, so this machine can't boot: name one")]
    NoKernel,
    /// A file could not be read.
    #[error("{what} {path}: {source}")]
    File {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path, or "(embedded)".
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is neither of the kinds of kernel known here.
    #[error(
        "{path} is not a kernel: neither an x86-64 ELF with a PVH entry note nor a Linux bzImage"
    )]
    NotAKernel {
        /// Its path.
        path: String,
    },
    /// A kernel of a known kind that can't be booted.
    #[error("kernel {path}: {why}")]
    Kernel {
        /// Its path.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel does not fit into RAM.
    #[error(
        "kernel {path} needs guest RAM up to {end:#x}, but the low part ends at {ram_end:#x}: give the guest more memory"
    )]
    TooLittleMemory {
        /// The kernel's path.
        path: String,
        /// Where it would end.
        end: u64,
        /// Where RAM below 3 GiB ends.
        ram_end: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "initrd of {size} bytes does not fit into guest RAM between {from:#x} and {to:#x}: give the guest more memory"
    )]
    InitrdTooLarge {
        /// Its size.
        size: u64,
        /// End of the kernel.
        from: u64,
        /// Highest address it may end at.
        to: u64,
    },
    /// The command line is too long.
    #[error(
        "kernel command line of {len} bytes (with the devices' part) is longer than the {max} this kernel takes"
    )]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// The longest allowed.
        max: usize,
    },
    /// The command line has a NUL in it.
    #[error("kernel command line contains a NUL character")]
    CmdlineNul,
    /// Guest memory could not be written where it must be.
    #[error("writing {what} into guest memory: {source}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// How vCPU 0 enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, EBX = start info.
    Pvh {
        /// Entry point.
        at: u64,
    },
    /// Long mode, RSI = zero page.
    Linux {
        /// Entry point.
        at: u64,
    },
}

/// Where a virtio-mmio device is, as a kernel is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Guest-physical address of its registers.
    pub(crate) base: u64,
    /// Their size, bytes.
    pub(crate) size: u64,
    /// Global system interrupt, edge-triggered.
    pub(crate) gsi: u32,
}

/// RAM as the kernel is told, (start, length), and the reserved piece below 1 MiB.
struct MemoryMap {
    ram: Vec<(u64, u64)>,
    reserved: (u64, u64),
    /// End of RAM below the device gap.
    low_end: u64,
}

impl MemoryMap {
    fn new(bytes: u64) -> Self {
        let low_end = bytes.min(MMIO_START);
        let mut ram = vec![(0, EBDA), (HIMEM, low_end - HIMEM)];
        if bytes > low_end {
            ram.push((HIGH_START, bytes - low_end));
        }
        MemoryMap {
            ram,
            reserved: (EBDA, HIMEM - EBDA),
            low_end,
        }
    }
}

/// Loads kernel, initrd, command line and tables; tells how to enter.
///
/// `device_words` is what the devices add to the command line, `windows` where the virtio ones are.
///
/// # Errors
/// A [`BootError`] that says what is missing, malformed or too large.
pub(crate) fn load(
    memory: &GuestMemory,
    bytes: u64,
    config: &BootConfig,
    device_words: &str,
    windows: &[Window],
    vcpus: u8,
) -> std::result::Result<Entry, BootError> {
    let kernel = config.kernel.as_ref().ok_or(BootError::NoKernel)?;
    let map = MemoryMap::new(bytes);
    let words = [
        config.cmdline.trim(),
        device_words,
        &format!("cpus={vcpus}"),
    ];
    let cmdline = words
        .iter()
        .filter(|w| !w.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join(" ");
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    mptable::write(memory, vcpus)?;
    let mut image = Reader::open("kernel", kernel)?;
    let mut magic = [0u8; 4];
    let read = image.read_exact(&mut magic).and_then(|()| image.rewind());
    read.map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => BootError::NotAKernel { path: image.path() },
        _ => image.error("kernel", source),
    })?;
    let load = Load {
        memory,
        map: &map,
        initrd: config.initrd.as_ref(),
        cmdline: &cmdline,
    };
    acpi::write(&load, vcpus, windows)?;
    let elf = magic == *b"\x7fELF";
    let entry = if elf {
        pvh::load(&load, &mut image)?
    } else {
        linux::load(&load, &mut image)?
    };
    registers::write_tables(&load, entry)?;
    Ok(entry)
}

/// Sets the first registers of vCPU 0. The others wait for INIT and SIPI, as KVM makes them.
pub(crate) fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    registers::set(vcpu, entry)
}

/// What both kinds of kernel need.
struct Load<'a> {
    memory: &'a GuestMemory,
    map: &'a MemoryMap,
    initrd: Option<&'a Image>,
    cmdline: &'a str,
}

impl Load<'_> {
    /// Writes the command line, NUL-terminated.
    fn put_cmdline(&self, max: usize) -> std::result::Result<(), BootError> {
        let len = self.cmdline.len();
        if len > max {
            return Err(BootError::CmdlineTooLong { len, max });
        }
        self.put("the command line", CMDLINE, self.cmdline.as_bytes())?;
        self.put("the command line", CMDLINE + len as u64, &[0])
    }

    /// Puts the initrd as high as allowed, below `limit` and the end of low RAM and above
    /// `kernel_end`; its address and size.
    fn put_initrd(
        &self,
        kernel_end: u64,
        limit: u64,
    ) -> std::result::Result<Option<(u64, u64)>, BootError> {
        let Some(initrd) = self.initrd else {
            return Ok(None);
        };
        let mut image = Reader::open("initrd", initrd)?;
        let size = image
            .seek(SeekFrom::End(0))
            .and_then(|size| image.rewind().map(|()| size));
        let size = size.map_err(|source| image.error("initrd", source))?;
        let to = limit.min(self.map.low_end);
        let start = to.checked_sub(size).map(|s| s & !(PAGE_SIZE as u64 - 1));
        let start = start
            .filter(|s| *s >= kernel_end)
            .ok_or(BootError::InitrdTooLarge {
                size,
                from: kernel_end,
                to,
            })?;
        let mut chunk = vec![0; 1 << 20];
        let mut at = start;
        while at < start + size {
            let len = usize::try_from(start + size - at)
                .unwrap_or(usize::MAX)
                .min(chunk.len());
            let part = chunk.get_mut(..len).unwrap_or_default();
            image
                .read_exact(part)
                .map_err(|source| image.error("initrd", source))?;
            self.put("the initrd", at, part)?;
            at += len as u64;
        }
        Ok(Some((start, size)))
    }

    fn put(&self, what: &'static str, at: u64, bytes: &[u8]) -> std::result::Result<(), BootError> {
        let put = self.memory.write_slice(bytes, GuestAddress(at));
        put.map_err(|source| BootError::Memory { what, source })
    }

    /// Refuses a kernel that ends outside low RAM.
    fn check_end(&self, image: &Reader, end: u64) -> std::result::Result<(), BootError> {
        let ram_end = self.map.low_end;
        if end > ram_end {
            return Err(BootError::TooLittleMemory {
                path: image.path(),
                end,
                ram_end,
            });
        }
        Ok(())
    }
}

/// An image being read.
enum Reader {
    File(File, PathBuf),
    Embedded(Cursor<&'static [u8]>),
}

impl Reader {
    fn open(what: &'static str, image: &Image) -> std::result::Result<Self, BootError> {
        match image {
            Image::File(path) => File::open(path)
                .and_then(|f| {
                    if f.metadata()?.is_file() {
                        Ok(f)
                    } else {
                        Err(io::Error::other("not a regular file"))
                    }
                })
                .map(|f| Reader::File(f, path.clone()))
                .map_err(|source| BootError::File {
                    what,
                    path: path.display().to_string(),
                    source,
                }),
            Image::Embedded(bytes) => Ok(Reader::Embedded(Cursor::new(bytes))),
        }
    }

    fn path(&self) -> String {
        match self {
            Reader::File(_, path) => path.display().to_string(),
            Reader::Embedded(_) => "(embedded)".into(),
        }
    }

    fn error(&self, what: &'static str, source: io::Error) -> BootError {
        BootError::File {
            what,
            path: self.path(),
            source,
        }
    }

    fn bad_kernel(&self, why: impl ToString) -> BootError {
        BootError::Kernel {
            path: self.path(),
            why: why.to_string(),
        }
    }

    /// Loads by linux-loader, which wants the concrete reader.
    fn load_by<L: linux_loader::loader::KernelLoader>(
        &mut self,
        memory: &GuestMemory,
        himem: Option<GuestAddress>,
        at: Option<GuestAddress>,
    ) -> linux_loader::loader::Result<linux_loader::loader::KernelLoaderResult> {
        match self {
            Reader::File(file, _) => L::load(memory, at, file, himem),
            Reader::Embedded(bytes) => L::load(memory, at, bytes, himem),
        }
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Reader::File(file, _) => file.read(buf),
            Reader::Embedded(bytes) => bytes.read(buf),
        }
    }
}

impl Seek for Reader {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        match self {
            Reader::File(file, _) => file.seek(pos),
            Reader::Embedded(bytes) => bytes.seek(pos),
        }
    }
}

#[cfg(test)]
mod tests;
