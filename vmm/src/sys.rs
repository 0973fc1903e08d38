//! KVM calls that kvm-ioctls does not wrap.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Fetches a slot's dirty bitmap. With manual protect it clears nothing.
///
/// `bitmap` must have a bit for every page of the slot, rounded up to whole words.
pub(crate) fn get_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if (bitmap.len() as u64) < pages.div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: KVM writes one bit per page of the slot, in whole 64-bit words: it fits (checked).
    match unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Counts the pages set in `mask` clean and protects them again. `mask` stands for the pages from
/// `first`, a multiple of 64; `pages` is a multiple of 64 or reaches the end of the slot.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first: u64,
    pages: u32,
    mask: &mut [u64],
) -> io::Result<()> {
    if mask.len() < (pages as usize).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = mask.as_mut_ptr().cast();
    // SAFETY: KVM reads one bit per page asked for, in whole words: `mask` has them (checked).
    match unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Protects again the pages of every harvested ring entry and frees the entries; their number.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: takes no argument.
    match unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) } {
        n if n >= 0 => Ok(n.unsigned_abs()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// What is added to the host's TSC to give the guest's.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: KVM writes 8 bytes to `addr`, which is `offset`.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) } {
        0 => Ok(offset),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets what is added to the host's TSC to give the guest's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: KVM reads 8 bytes from `addr`, which is `offset`.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and has no effects on memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A memory mapping that ends with this value.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: std::ptr::NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; synchronising access is up to its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of `fd`, shared, readable and writable.
    pub(crate) fn shared(fd: &impl AsRawFd, len: usize, offset: i64) -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses; the result is checked.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = std::ptr::NonNull::new(at.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapping { at, len })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.at.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `shared` mapped exactly this range and nothing else unmaps it.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}
