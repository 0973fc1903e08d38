//! What a machine consists of.

use std::path::PathBuf;

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 8;

/// A machine's fixed hardware. Both hosts of a pair use equal ones.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// RAM, bytes: a multiple of 4096.
    pub memory: u64,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Network devices, in the order the guest sees them.
    pub nics: Vec<NicConfig>,
    /// Whether there is a virtio random number device.
    pub rng: bool,
    /// Where dirty pages are learnt from.
    pub dirty: DirtyTracking,
    /// What is loaded at a cold start and at each reset of the guest.
    pub boot: BootConfig,
}

/// One network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicConfig {
    /// Its MAC address; a unicast one.
    pub mac: [u8; 6],
    /// Whether its driver is offered to leave checksums and the cutting of segments to the host, to take
    /// frames of which the host leaves that to it, and to take a frame in several buffers.
    pub offload: bool,
}

/// Where dirty pages are learnt from (rule 4). Chosen per VM by measured cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyTracking {
    /// KVM's dirty bitmap with manual protect. Up to `hot_pages` pages that are dirty in nearly every
    /// epoch stay writable and are compared with a copy instead (memory: 4 KiB each).
    Bitmap {
        /// Size of the hot set; 0 turns it off.
        hot_pages: usize,
    },
    /// KVM's dirty rings, one per vCPU.
    Ring {
        /// Entries per ring: a power of two, 256 to 65536. A full ring ends the epoch.
        entries: u32,
    },
}

/// What to boot. The kind of kernel is told by its first bytes: an ELF with a PVH entry note, or
/// a Linux bzImage with 64-bit entry.
#[derive(Debug, Clone, Default)]
pub struct BootConfig {
    /// The kernel; `None` for a machine that is only ever restored (it can't reset either).
    pub kernel: Option<Image>,
    /// The initial RAM disk.
    pub initrd: Option<Image>,
    /// Kernel command line; the devices' `virtio_mmio.device=` words and `cpus=N` are appended.
    pub cmdline: String,
}

/// Bytes to load into a guest.
#[derive(Debug, Clone)]
pub enum Image {
    /// A file, read at each boot.
    File(PathBuf),
    /// Bytes within this program.
    Embedded(&'static [u8]),
}
