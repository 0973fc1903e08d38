//! Load generators: page writers (`DIRTY`) and busy loops (`SPIN`), on every CPU but the first,
//! or on the first where it is alone.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::cmdline::MAX_CPUS;
use crate::cpu::{self, Clock, Timer};
use crate::mem::{Arena, PAGE};
use crate::percpu;

const SECOND: u64 = 1_000_000_000;
/// Due writes are done together this often.
const SLICE: u64 = 1_000_000;

/// What is asked of the generators.
pub struct Orders {
    version: AtomicU64,
    pages: AtomicU64,
    per_second: AtomicU64,
    bytes: AtomicU64,
    spin: AtomicBool,
    workers: AtomicUsize,
}

/// The orders in force.
pub static ORDERS: Orders = Orders {
    version: AtomicU64::new(0),
    pages: AtomicU64::new(0),
    per_second: AtomicU64::new(0),
    bytes: AtomicU64::new(8),
    spin: AtomicBool::new(false),
    workers: AtomicUsize::new(1),
};

/// What one CPU has done.
#[repr(align(64))]
pub struct Done {
    /// Page writes.
    pub writes: AtomicU64,
    /// Turns of the busy loop.
    pub spins: AtomicU64,
    /// Times its timer was armed.
    pub armed: AtomicU64,
}

/// Per CPU.
pub static DONE: [Done; MAX_CPUS] = [const {
    Done {
        writes: AtomicU64::new(0),
        spins: AtomicU64::new(0),
        armed: AtomicU64::new(0),
    }
}; MAX_CPUS];

impl Orders {
    /// `DIRTY`: over `pages` pages, `per_second` page writes of `bytes` bytes.
    pub fn dirty(&self, pages: u64, per_second: u64, bytes: u64) {
        self.pages.store(pages, Ordering::Relaxed);
        self.per_second.store(per_second, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.changed();
    }

    /// `SPIN`.
    pub fn spin(&self, on: bool) {
        self.spin.store(on, Ordering::Relaxed);
        self.changed();
    }

    /// Whether `SPIN` is on.
    pub fn spinning(&self) -> bool {
        self.spin.load(Ordering::Relaxed)
    }

    /// How many CPUs generate load.
    pub fn set_workers(&self, n: usize) {
        self.workers.store(n, Ordering::Relaxed);
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::Release);
        // Halted generators look again.
        for (cpu, started) in STARTED.iter().enumerate() {
            if started.load(Ordering::Relaxed) {
                cpu::wake(cpu);
            }
        }
    }
}

/// One CPU's share of the load.
pub struct Worker {
    cpu: usize,
    index: u64,
    arena: Arena,
    first_page: u64,
    version: u64,
    pages: u64,
    rate: u64,
    bytes: usize,
    since: u64,
    done: u64,
    page: u64,
}

impl Worker {
    /// The share of `cpu`, the `index`-th worker, in arena pages from `first_page` on.
    pub fn new(cpu: usize, index: usize, arena: Arena, first_page: u64) -> Self {
        let index = index as u64;
        let (version, pages, rate, bytes) = (0, 0, 0, 8);
        Self {
            cpu,
            index,
            arena,
            first_page,
            version,
            pages,
            rate,
            bytes,
            since: 0,
            done: 0,
            page: index,
        }
    }

    fn look(&mut self, now: u64) {
        let version = ORDERS.version.load(Ordering::Acquire);
        if version == self.version {
            return;
        }
        let workers = ORDERS.workers.load(Ordering::Relaxed) as u64;
        let total = ORDERS.per_second.load(Ordering::Relaxed);
        let share = |w: u64| (u128::from(total) * u128::from(w) / u128::from(workers)) as u64;
        let room = self.arena.pages().saturating_sub(self.first_page);
        self.version = version;
        self.pages = ORDERS.pages.load(Ordering::Relaxed).min(room);
        self.rate = share(self.index + 1) - share(self.index);
        self.bytes = (ORDERS.bytes.load(Ordering::Relaxed) as usize).clamp(1, PAGE as usize);
        (self.since, self.done, self.page) = (now, 0, self.index);
    }

    /// Does what is due; gives the time when more will be.
    pub fn slice(&mut self, now: u64) -> Option<u64> {
        self.look(now);
        if self.pages == 0 || self.rate == 0 {
            return None;
        }
        let due =
            u128::from(now.saturating_sub(self.since)) * u128::from(self.rate) / u128::from(SECOND);
        let due = due as u64;
        // What a stall of more than a second kept from being done is not made up for.
        if due.saturating_sub(self.done) > self.rate {
            self.done = due - self.rate;
        }
        let n = due.saturating_sub(self.done).min(16 * 1024);
        for _ in 0..n {
            self.write_page();
        }
        self.done += n;
        DONE[self.cpu].writes.fetch_add(n, Ordering::Relaxed);
        let next = u128::from(self.done + 1) * u128::from(SECOND) / u128::from(self.rate);
        Some((self.since + next as u64 + 1).max(now + if n == 16 * 1024 { 0 } else { SLICE }))
    }

    fn write_page(&mut self) {
        let workers = ORDERS.workers.load(Ordering::Relaxed) as u64;
        let page = self.page;
        self.page += workers;
        if self.page >= self.pages {
            self.page = self.index;
        }
        if page >= self.pages {
            return;
        }
        let Some((at, _)) = self.arena.run(self.first_page + page) else {
            return;
        };
        let value = self
            .done
            .wrapping_add(page)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            | 1;
        let room = PAGE as usize - self.bytes;
        let offset = (self.done as usize).wrapping_mul(64) % (room + 1);
        for i in 0..self.bytes {
            // SAFETY: offset + i < PAGE, within an arena page, which only load is written to.
            unsafe {
                at.add(offset + i)
                    .write_volatile((value >> (8 * (i % 8))) as u8)
            };
        }
    }
}

/// A turn of the busy loop.
pub fn spin(cpu: usize) {
    for _ in 0..20_000 {
        core::hint::black_box(());
    }
    DONE[cpu].spins.fetch_add(1, Ordering::Relaxed);
}

/// CPUs that run.
pub static STARTED: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

/// The life of every CPU but the first.
pub fn run(cpu: usize, clock: &Clock, mut worker: Worker) -> ! {
    cpu::init_lapic(cpu);
    let mut timer = Timer::default();
    STARTED[cpu].store(true, Ordering::Release);
    loop {
        let seen = percpu::events(cpu);
        let deadline = worker.slice(clock.raw());
        if ORDERS.spinning() {
            spin(cpu);
            continue;
        }
        if let Some(deadline) = deadline {
            let now = clock.raw();
            if deadline <= now {
                continue;
            }
            timer.wake_by(cpu, now, deadline);
            DONE[cpu].armed.store(timer.armed(), Ordering::Relaxed);
        }
        cpu::wait(cpu, seen);
    }
}
