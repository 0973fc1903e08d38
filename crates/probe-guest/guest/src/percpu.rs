//! The per-CPU pages, as boot.s lays them out: what ring 0 tells ring 3.
//!
//! Only the CPU that owns a page has it written (by its interrupt stubs), so plain volatile
//! reads are enough.

const PERCPU: usize = 0x10_0000;

fn field(cpu: usize, offset: usize) -> *mut u64 {
    (PERCPU + cpu * 0x1000 + offset) as *mut u64
}

fn read(cpu: usize, offset: usize) -> u64 {
    // SAFETY: a per-CPU page of the image (boot.s), 8-byte aligned, plain data.
    unsafe { field(cpu, offset).read_volatile() }
}

/// Where `cpu` counts its interrupts of every kind.
pub fn events_ptr(cpu: usize) -> *const u64 {
    field(cpu, 0x80)
}

/// Interrupts of every kind seen by `cpu`.
pub fn events(cpu: usize) -> u64 {
    read(cpu, 0x80)
}

/// Timer interrupts seen by `cpu`.
pub fn timer_ticks(cpu: usize) -> u64 {
    read(cpu, 0x88)
}

/// Interrupts seen on a pin of the I/O APIC (all go to CPU 0).
pub fn pin_count(pin: u8) -> u32 {
    let at = (PERCPU + 0x90 + 4 * usize::from(pin)) as *const u32;
    // SAFETY: inside CPU 0's page for every pin the command line admits (below 24).
    unsafe { at.read_volatile() }
}

/// What an exception left behind: vector, error code, rip, cr2, cs.
pub fn fault_record() -> [u64; 5] {
    core::array::from_fn(|i| read(0, 0x100 + 8 * i))
}

/// kvmclock's record for CPU 0.
pub fn kvmclock() -> *const u64 {
    field(0, 0x140)
}
