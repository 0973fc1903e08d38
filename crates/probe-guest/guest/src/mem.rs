//! Memory functions the compiler calls, the heap, and guest memory as the boot loader tells.

use core::arch::asm;

use talc::locking::AssumeUnlockable;
use talc::{ErrOnOom, Span, Talc, Talck};

/// The heap. Only CPU 0 allocates, and interrupt stubs do not, so it needs no lock.
#[global_allocator]
// SAFETY: `AssumeUnlockable` asks that the lock is never contended; see above.
static HEAP: Talck<AssumeUnlockable, ErrOnOom> = Talc::new(ErrOnOom).lock();

/// Gives `[base, end)` to the heap.
///
/// # Safety
/// The range is RAM that nothing else uses, now or later.
pub unsafe fn give_heap(base: usize, end: usize) -> bool {
    // SAFETY: passed on from the caller.
    unsafe {
        HEAP.lock()
            .claim(Span::new(base as *mut u8, end as *mut u8))
            .is_ok()
    }
}

/// C `memcpy`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's contract is that of `rep movsb`.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C `memmove`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: copying upwards never reads a byte already overwritten here.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the ranges overlap with `to` above `from`: downwards, from the last bytes.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
             inout("rdi") to.wrapping_add(n).wrapping_sub(1) => _,
             inout("rsi") from.wrapping_add(n).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// C `memset`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller's contract is that of `rep stosb`.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

/// C `memcmp`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut i = 0;
    while i < n {
        // SAFETY: i < n; volatile keeps the compiler from turning this into a call of itself.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// C `bcmp`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: same contract.
    unsafe { memcmp(a, b, n) }
}

/// A range of RAM, page-aligned.
#[derive(Clone, Copy, Default)]
pub struct Ram {
    /// First byte.
    pub base: u64,
    /// One past the last byte.
    pub end: u64,
}

/// Guest pages that hold no code or services: the load generators write here, `HASH` reads.
/// Page numbers run through the ranges one after the other.
#[derive(Clone, Copy, Default)]
pub struct Arena {
    ranges: [Ram; 2],
}

/// Bytes in a page.
pub const PAGE: u64 = 4096;

impl Arena {
    /// An arena of up to two ranges.
    pub const fn new(ranges: [Ram; 2]) -> Self {
        Self { ranges }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|r| (r.end - r.base) / PAGE).sum()
    }

    /// The contiguous run of pages that starts at page `n`: address and number of pages.
    pub fn run(&self, n: u64) -> Option<(*mut u8, u64)> {
        let mut n = n;
        for r in &self.ranges {
            let here = (r.end - r.base) / PAGE;
            if n < here {
                return Some(((r.base + n * PAGE) as *mut u8, here - n));
            }
            n -= here;
        }
        None
    }
}
