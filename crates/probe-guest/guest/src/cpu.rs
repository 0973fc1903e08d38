//! Processors and their interrupt controllers, driven from ring 3: the local APIC and the
//! I/O APIC are mapped for it, ports are open (IOPL 3), and HLT is a fault into boot.s.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::percpu;

const LAPIC: usize = 0xfee0_0000;
const IOAPIC: usize = 0xfec0_0000;
const VECTOR_PIN: u32 = 0x30;
const VECTOR_TIMER: u32 = 0x50;
const VECTOR_WAKE: u32 = 0x58;

const SVR: usize = 0xf0;
const ICR: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT_TIMER: usize = 0x320;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const TIMER_COUNT: usize = 0x380;
const TIMER_LEFT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;

/// The local APIC timer counts nanoseconds (1 GHz, divided by 1), on KVM and on QEMU.
const TIMER_MAX_NS: u64 = 0xffff_0000;
/// Arming closer than this only costs another interrupt.
const TIMER_MIN_NS: u64 = 20_000;

unsafe extern "C" {
    fn wait_event(events: *const u64, seen: u64);
    /// Ends the machine by a triple fault.
    pub safe fn triple_fault() -> !;
    static kvmclock_offered: u32;
    static mut starting_cpu: u32;
    static mut starting_stack: u64;
    static ap_start: u8;
    static ap_start_end: u8;
}

fn lapic_read(reg: usize) -> u32 {
    // SAFETY: the local APIC's page is mapped uncached at its architectural address.
    unsafe { ((LAPIC + reg) as *const u32).read_volatile() }
}

fn lapic_write(reg: usize, value: u32) {
    // SAFETY: as above.
    unsafe { ((LAPIC + reg) as *mut u32).write_volatile(value) }
}

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: port I/O touches no memory of the program's.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes 16 bits to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Reads 16 bits from an I/O port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) }
    value
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Writes all of `bytes` to a port with one `rep outsb`.
pub fn outsb(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly the slice.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rcx") bytes.len() => _,
             inout("rsi") bytes.as_ptr() => _, options(readonly, nostack));
    }
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Sleeps until `cpu`'s event count differs from `seen`; returns at once if it does already, so
/// no wake-up is lost between looking for work and sleeping. May return early.
pub fn wait(cpu: usize, seen: u64) {
    // SAFETY: the stub in boot.s reads one u64 through the pointer and changes no register.
    unsafe { wait_event(percpu::events_ptr(cpu), seen) }
}

/// Readies this CPU's local APIC: enabled, nothing pending, timer one-shot on its own vector.
pub fn init_lapic(cpu: usize) {
    lapic_write(LVT_LINT0, MASKED);
    lapic_write(LVT_LINT1, MASKED);
    lapic_write(SVR, 0x1ff);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(LVT_TIMER, VECTOR_TIMER + cpu as u32);
}

/// Lets a pin of the I/O APIC interrupt CPU 0, edge-triggered: the ring-0 stub ends the interrupt
/// before ring 3 has quieted the device, which level-triggering would answer with a storm.
pub fn route_pin(pin: u8) {
    let entry = 0x10 + 2 * u32::from(pin);
    ioapic_write(entry + 1, 0);
    ioapic_write(entry, VECTOR_PIN + u32::from(pin));
}

fn ioapic_write(reg: u32, value: u32) {
    // SAFETY: the I/O APIC's select and window registers, mapped uncached.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(reg);
        ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// This CPU's one-shot timer, armed only when it must fire earlier than it already will.
#[derive(Default)]
pub struct Timer {
    armed_until: u64,
    armed: u64,
    seen: u64,
}

impl Timer {
    /// Sees to it that the CPU is woken by `deadline` (nanoseconds of [`Clock`]).
    pub fn wake_by(&mut self, cpu: usize, now: u64, deadline: u64) {
        let ticks = percpu::timer_ticks(cpu);
        if ticks != self.seen {
            self.seen = ticks;
            self.armed_until = 0;
        }
        // A timer that should have fired long ago is armed anew: its interrupt may be lost.
        let pending = self.armed_until != 0 && now < self.armed_until + 10_000_000;
        if pending && self.armed_until <= deadline {
            return;
        }
        let delay = deadline
            .saturating_sub(now)
            .clamp(TIMER_MIN_NS, TIMER_MAX_NS);
        self.armed_until = now + delay;
        self.armed += 1;
        lapic_write(TIMER_COUNT, delay as u32);
    }

    /// How often it was armed.
    pub fn armed(&self) -> u64 {
        self.armed
    }
}

/// Guest time in nanoseconds, never backwards: kvmclock where offered and plausible, the
/// time stamp counter otherwise.
pub struct Clock {
    kvmclock: bool,
    tsc_base: u64,
    /// Nanoseconds per TSC tick, 32.32 fixed point.
    tsc_scale: u64,
    last: AtomicU64,
    backward: AtomicU64,
}

impl Clock {
    /// Chooses the source.
    pub fn new() -> Self {
        let mut it = Self {
            kvmclock: false,
            tsc_base: rdtsc(),
            tsc_scale: 0,
            last: AtomicU64::new(0),
            backward: AtomicU64::new(0),
        };
        // SAFETY: written once, in ring 0, before ring 3 began.
        let offered = unsafe { (&raw const kvmclock_offered).read_volatile() } != 0;
        // Where the guest reads the host's TSC but KVM believes in another one, its record
        // is useless: its time stamp must lie in the last minute or so (3 GHz).
        if offered && let Some((stamp, ..)) = kvmclock_record() {
            let age = rdtsc().wrapping_sub(stamp);
            it.kvmclock = age < 180_000_000_000;
        }
        if !it.kvmclock {
            it.tsc_scale = calibrate_tsc();
        }
        it
    }

    /// Nanoseconds since some moment before boot.
    pub fn now(&self) -> u64 {
        let now = self.raw();
        let last = self.last.load(Ordering::Relaxed);
        if now < last {
            self.backward
                .store(self.backward.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            return last;
        }
        self.last.store(now, Ordering::Relaxed);
        now
    }

    /// Nanoseconds as the source gives them.
    pub fn raw(&self) -> u64 {
        if self.kvmclock
            && let Some((stamp, time, scale, shift)) = kvmclock_record()
        {
            let delta = rdtsc().saturating_sub(stamp);
            let delta = if shift < 0 {
                delta >> -shift
            } else {
                delta << shift
            };
            return time.wrapping_add(((u128::from(delta) * u128::from(scale)) >> 32) as u64);
        }
        let delta = rdtsc().wrapping_sub(self.tsc_base);
        ((u128::from(delta) * u128::from(self.tsc_scale)) >> 32) as u64
    }

    /// `kvmclock` or `tsc`.
    pub fn source(&self) -> &'static str {
        if self.kvmclock { "kvmclock" } else { "tsc" }
    }

    /// How often the source was seen to run backwards (invariant I7 says never).
    pub fn backward_steps(&self) -> u64 {
        self.backward.load(Ordering::Relaxed)
    }
}

/// TSC stamp, nanoseconds, scale (0.32 fixed point) and shift; `None` while there is none.
fn kvmclock_record() -> Option<(u64, u64, u32, i8)> {
    let at = percpu::kvmclock();
    for _ in 0..1000 {
        // SAFETY: the record's 32 bytes lie in CPU 0's page; KVM writes them with an odd
        // version while it does.
        let (a, stamp, time, scale, b) = unsafe {
            let a = at.read_volatile() as u32;
            let (stamp, time) = (at.add(1).read_volatile(), at.add(2).read_volatile());
            let scale = at.add(3).read_volatile();
            (a, stamp, time, scale, at.read_volatile() as u32)
        };
        if a == b && a & 1 == 0 {
            return (a != 0).then_some((stamp, time, scale as u32, (scale >> 32) as i8));
        }
    }
    None
}

/// Nanoseconds per TSC tick (32.32), measured against the local APIC timer for 5 ms.
fn calibrate_tsc() -> u64 {
    const SPAN: u32 = 5_000_000;
    lapic_write(LVT_TIMER, MASKED);
    lapic_write(TIMER_COUNT, u32::MAX);
    let (c0, t0) = (lapic_read(TIMER_LEFT), rdtsc());
    let (ns, ticks) = loop {
        let (c, t) = (lapic_read(TIMER_LEFT), rdtsc());
        if c0 - c >= SPAN || t - t0 > 1 << 34 {
            break (u64::from(c0 - c), t - t0);
        }
    };
    lapic_write(TIMER_COUNT, 0);
    lapic_write(LVT_TIMER, VECTOR_TIMER);
    ((ns.max(1)) << 32) / ticks.max(1)
}

/// Wakes another CPU from [`wait`].
pub fn wake(cpu: usize) {
    lapic_write(ICR_HIGH, (cpu as u32) << 24);
    lapic_write(ICR, 0x4000 | (VECTOR_WAKE + cpu as u32));
}

/// Page below 1 MiB where application processors start.
const AP_PAGE: usize = 0x8000;

/// Starts CPU `cpu` on `stack` (its top); it announces itself by its first event or flag.
/// One at a time: the next only after this one has announced itself.
///
/// # Safety
/// `stack` is the top of memory only that CPU uses; 0x8000 holds nothing still needed.
pub unsafe fn start(cpu: usize, stack: usize) {
    let from = &raw const ap_start;
    let len = (&raw const ap_start_end as usize) - (from as usize);
    // SAFETY: the trampoline is position-independent and shorter than a page; the statics
    // are read by the CPU that starts, which has not started yet.
    unsafe {
        core::ptr::copy_nonoverlapping(from, AP_PAGE as *mut u8, len);
        (&raw mut starting_cpu).write_volatile(cpu as u32);
        (&raw mut starting_stack).write_volatile(stack as u64);
    }
    core::sync::atomic::fence(Ordering::SeqCst);
    lapic_write(ICR_HIGH, (cpu as u32) << 24);
    lapic_write(ICR, 0x4500);
    for _ in 0..2 {
        let t = rdtsc();
        while rdtsc().wrapping_sub(t) < 1_000_000 {
            core::hint::spin_loop();
        }
        lapic_write(ICR_HIGH, (cpu as u32) << 24);
        lapic_write(ICR, 0x4600 | (AP_PAGE >> 12) as u32);
    }
}
