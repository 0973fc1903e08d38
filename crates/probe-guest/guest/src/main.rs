//! The embedded guest's program: boots by PVH, runs in ring 3, serves.
//!
//! - `boot.s`: everything in ring 0; `percpu`: what it reports; `cpu`: interrupt
//!   controllers, timer, clock, further CPUs, all driven from ring 3
//! - `bootinfo`, `mem`: memory map, heap, arena
//! - `virtio`, `serial`: drivers
//! - `button`, `acpi`: the power button
//! - `stack`: the network; `services`, `ledger_service`, `control`: who is served
//! - `work`, `load`: what keeps memory, disks and CPUs busy
//!
//! Services live in one loop on the first CPU ([`run`]); others generate load.
#![no_std]
#![no_main]

extern crate alloc;

#[path = "../../src/acpi.rs"]
mod acpi;
mod bootinfo;
mod button;
#[path = "../../src/checksum.rs"]
mod checksum;
#[path = "../../src/cmdline.rs"]
mod cmdline;
#[path = "../../src/command.rs"]
#[allow(dead_code)]
mod command;
mod control;
mod cpu;
#[path = "../../src/digest.rs"]
mod digest;
#[path = "../../src/keyspace.rs"]
mod keyspace;
#[path = "../../src/ledger.rs"]
mod ledger;
mod ledger_service;
mod load;
mod mem;
mod percpu;
#[path = "../../src/port.rs"]
mod port;
#[path = "../../src/resp.rs"]
mod resp;
#[path = "../../src/sequence.rs"]
mod sequence;
mod serial;
mod services;
mod stack;
mod virtio;
mod work;

use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write as _;
use core::sync::atomic::Ordering;

use cmdline::Cmdline;
use command::Button;
use control::{Control, End};
use cpu::{Clock, Timer, outb, outw};
use ledger_service::Ledger;
use load::{DONE, ORDERS, STARTED, Worker};
use mem::Arena;
use serial::Serial;
use services::Services;
use smoltcp::iface::SocketHandle;
use stack::{Conn, Stack};
use virtio::Transport;
use virtio::blk::Blk;
use virtio::net::Net;

core::arch::global_asm!(include_str!("boot.s"), main = sym main, fault = sym fault);

const NET: u32 = 1;
const BLK: u32 = 2;
/// Arena pages that `WORK` writes and `HASH` reads unless told otherwise.
const WORK_PAGES: u64 = 1024;
const AP_STACK: usize = 32 * 1024;

/// What further CPUs need to know, written before they start.
struct Shared {
    clock: &'static Clock,
    arena: Arena,
    work_pages: u64,
}

static SHARED: core::sync::atomic::AtomicPtr<Shared> =
    core::sync::atomic::AtomicPtr::new(core::ptr::null_mut());

/// Ring 3 begins here, on every CPU.
extern "C" fn main(cpu: usize) -> ! {
    if cpu == 0 {
        boot()
    }
    let shared = SHARED.load(Ordering::Acquire);
    // SAFETY: set to a leaked box by CPU 0 before it starts another CPU.
    let Shared {
        clock,
        arena,
        work_pages,
    } = unsafe { &*shared };
    load::run(cpu, clock, Worker::new(cpu, cpu - 1, *arena, *work_pages))
}

/// Everything CPU 0 looks after.
struct Machine {
    clock: &'static Clock,
    timer: Timer,
    serial: Serial,
    stacks: Vec<Stack>,
    further_echo: Vec<SocketHandle>,
    services: Option<Services>,
    ledger: Option<Ledger>,
    ledger_conns: Vec<Conn>,
    control_conns: Vec<Conn>,
    control: Control,
    disks: Vec<Blk>,
    alone: Option<Worker>,
    /// The power button was pressed: what was asked for is finished, then the guest is off.
    closing: bool,
    out: Vec<u8>,
}

fn boot() -> ! {
    let Some(ram) = bootinfo::memory() else {
        serial::write_now("PANIC: no PVH memory map\r\n");
        cpu::triple_fault()
    };
    let (heap, arena) = bootinfo::divide(ram);
    // SAFETY: RAM behind the image that only the heap gets; boot structures lie below 1 MiB,
    // or are read before the heap is first used there.
    if !unsafe { mem::give_heap(heap.base as usize, heap.end as usize) } {
        serial::write_now("PANIC: no memory for the heap\r\n");
        cpu::triple_fault()
    }
    let cmdline = Cmdline::parse(&bootinfo::cmdline());
    cpu::init_lapic(0);
    let clock: &'static Clock = Box::leak(Box::new(Clock::new()));
    cpu::route_pin(serial::PIN);
    let mut serial = Serial::new();

    let work_pages = WORK_PAGES.min(arena.pages() / 4);
    let cpus = start_cpus(
        cmdline.cpus,
        Shared {
            clock,
            arena,
            work_pages,
        },
    );
    let (stacks, disks) = probe(&cmdline, clock, &mut serial);
    let mut it = Machine {
        control: Control::new(clock, cpus, arena, work_pages),
        alone: (cpus == 1).then(|| Worker::new(0, 0, arena, work_pages)),
        closing: false,
        clock,
        timer: Timer::default(),
        serial,
        stacks,
        further_echo: vec![],
        services: None,
        ledger: None,
        ledger_conns: vec![],
        control_conns: vec![],
        disks,
        out: Vec::with_capacity(4096),
    };
    if cmdline.button != Button::Unheard && !it.control.button.listen(cmdline.button) {
        it.serial.write("no power button\n");
    }
    if let Some(disk) = it.disks.first_mut() {
        match Ledger::open(disk) {
            Ok(ledger) => it.ledger = Some(ledger),
            Err(why) => it.serial.write(&format!("{why}\n")),
        }
    }
    let mut stacks = it.stacks.iter_mut();
    if let Some(first) = stacks.next() {
        let limit = (heap.end - heap.base) as usize / 2;
        it.services = Some(Services::new(first, limit));
        it.control_conns = first.tcp(port::CONTROL, services::CONTROL_CONNS, 2048, 4096);
        if it.ledger.is_some() {
            it.ledger_conns = first.tcp(port::LEDGER, services::LEDGER_CONNS, 2048, 2048);
        }
    }
    it.further_echo = stacks.map(|s| s.udp(port::ECHO, 16, 16 * 1024)).collect();
    let tail = it.ledger.as_ref().map_or(0, Ledger::tail);
    it.serial.write(&format!(
        "probe-guest ready cpus={cpus} nics={} disks={} arena_pages={} ledger_tail={tail} \
         clock={}\n",
        it.stacks.len(),
        it.disks.len(),
        arena.pages(),
        it.control_clock(),
    ));
    run(it)
}

/// Starts CPUs 1 to `wanted - 1` as far as there are any; gives how many run in all.
fn start_cpus(wanted: usize, shared: Shared) -> usize {
    let clock = shared.clock;
    SHARED.store(Box::leak(Box::new(shared)), Ordering::Release);
    ORDERS.set_workers((wanted - 1).max(1));
    for (cpu, started) in STARTED.iter().enumerate().take(wanted).skip(1) {
        let stack = Vec::leak(vec![0u128; AP_STACK / 16]).as_mut_ptr_range();
        // SAFETY: a stack of its own, leaked; the boot structures below 1 MiB have been read;
        // the CPU before this one has announced itself.
        unsafe { cpu::start(cpu, stack.end as usize) };
        let since = clock.raw();
        while !started.load(Ordering::Acquire) {
            if clock.raw().wrapping_sub(since) > 2_000_000_000 {
                ORDERS.set_workers((cpu - 1).max(1));
                return cpu;
            }
            core::hint::spin_loop();
        }
    }
    wanted
}

/// Takes over the devices behind the command line's windows, in their order.
fn probe(cmdline: &Cmdline, clock: &Clock, serial: &mut Serial) -> (Vec<Stack>, Vec<Blk>) {
    let (mut stacks, mut disks) = (Vec::new(), Vec::new());
    for window in &cmdline.windows {
        let Some((transport, kind)) = Transport::probe(*window) else {
            continue;
        };
        let taken = match kind {
            NET => Net::new(transport, cmdline.offload).map(|net| {
                let ([a, b, c, d, e, f], offload) = (net.mac, net.offload());
                let cidr = cmdline.ips.get(stacks.len()).copied();
                let gateway = cmdline.gateway.filter(|_| stacks.is_empty());
                stacks.push(Stack::new(net, cidr, gateway, clock.now()));
                let ip = cidr.map_or_else(
                    || "no address".into(),
                    |c| format!("{}/{}", c.addr, c.prefix),
                );
                format!(
                    "net mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} ip={ip} offload={offload}"
                )
            }),
            BLK => Blk::new(transport).map(|disk| {
                let text = format!("disk sectors={} ro={}", disk.sectors, disk.read_only);
                disks.push(disk);
                text
            }),
            _ => continue,
        };
        let text = taken.unwrap_or_else(|| format!("device of type {kind} cannot be used"));
        if !cmdline.quiet {
            serial.write(&format!("{:#x} irq {}: {text}\n", window.addr, window.irq));
        }
    }
    (stacks, disks)
}

/// The loop of CPU 0. Interrupts only wake it: everything is found by looking, and what comes
/// between the look and the sleep is seen by the event count ([`cpu::wait`]) or by
/// `before_sleep`, which asks for the interrupt first and looks once more after.
fn run(mut it: Machine) -> ! {
    loop {
        let seen = percpu::events(0);
        let now = it.clock.now();
        let mut busy = it.serve(now);
        let mut deadline = None;
        if let Some(worker) = &mut it.alone {
            deadline = worker.slice(now);
            if ORDERS.spinning() {
                load::spin(0);
                busy = true;
            }
        }
        if it.serial.flush() {
            busy |= it.control.is_counting();
        } else {
            // The console takes no more for now; it raises no interrupt when it does again.
            deadline = Some(deadline.unwrap_or(u64::MAX).min(now + 1_000_000));
        }
        it.closing |= it.control.pressed();
        busy |= it.closing;
        if it.closing && it.ledger.as_mut().is_none_or(Ledger::close) {
            it.control.end = Some(End::Poweroff);
        }
        if let Some(end) = it.control.end.take() {
            it.finish(end);
        }
        if busy {
            continue;
        }
        for stack in &mut it.stacks {
            deadline = match (deadline, stack.deadline(now)) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        if let Some(deadline) = deadline {
            if deadline <= now {
                continue;
            }
            it.timer.wake_by(0, now, deadline);
            it.control.armed = it.timer.armed();
            DONE[0].armed.store(it.timer.armed(), Ordering::Relaxed);
        }
        let mut more = false;
        for stack in &mut it.stacks {
            more |= stack.device.before_sleep();
        }
        for disk in &mut it.disks {
            more |= disk.before_sleep();
        }
        if !more {
            cpu::wait(0, seen);
        }
        for stack in &mut it.stacks {
            stack.device.after_sleep();
        }
    }
}

impl Machine {
    fn control_clock(&self) -> &'static str {
        self.clock.source()
    }

    /// One round over everything; true if another should follow at once.
    fn serve(&mut self, now: u64) -> bool {
        let mut active = false;
        for stack in &mut self.stacks {
            active |= stack.ingress(now);
        }
        for disk in &mut self.disks {
            disk.poll();
        }
        self.serial
            .poll(percpu::pin_count(serial::PIN), |serial, text| {
                self.control.console(text, &self.disks, serial);
            });
        if let (Some(first), Some(services)) = (self.stacks.first_mut(), &mut self.services) {
            active |= services.poll(&mut first.sockets);
            for (i, conn) in self.control_conns.iter_mut().enumerate() {
                let generation = conn.generation;
                active |= conn.pump(&mut first.sockets, &mut self.out, |input, out| {
                    self.control.serve(i, generation, &self.disks, input, out)
                });
            }
            if let Some(ledger) = &mut self.ledger {
                for (i, conn) in self.ledger_conns.iter_mut().enumerate() {
                    let generation = conn.generation;
                    active |= conn.pump(&mut first.sockets, &mut self.out, |input, out| {
                        ledger.serve(i, generation, input, out)
                    });
                }
            }
        }
        if let (Some(ledger), Some(disk)) = (&mut self.ledger, self.disks.first_mut()) {
            active |= ledger.poll(disk, &mut self.ledger_conns);
        }
        for (stack, echo) in self.stacks.iter_mut().skip(1).zip(&self.further_echo) {
            active |= services::udp_echo(&mut stack.sockets, *echo);
        }
        active |= self
            .control
            .poll(&mut self.control_conns, &mut self.disks, &mut self.serial);
        for disk in &mut self.disks {
            disk.poll();
        }
        for stack in &mut self.stacks {
            stack.egress(now);
        }
        active
    }

    /// Ends the machine's life; whatever was answered before is on its way out.
    fn finish(&mut self, end: End) {
        let until = self.clock.now() + 100_000_000;
        while !self.serial.flush() && self.clock.now() < until {}
        match end {
            End::Crash => {
                serial::write_now("PANIC: crash asked for\r\n");
                cpu::triple_fault()
            }
            End::Poweroff => {
                self.control.button.power_off();
                outw(0x604, 0x2000); // where no table says how
                // The machine may be let go only later: nothing more happens until then.
                loop {
                    cpu::wait(0, percpu::events(0));
                }
            }
            End::Reboot => {
                outb(0x64, 0xfe);
                let until = self.clock.now() + 1_000_000_000;
                while self.clock.now() < until {
                    core::hint::spin_loop();
                }
                cpu::triple_fault()
            }
        }
    }
}

struct Panic;

impl core::fmt::Write for Panic {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        serial::write_now(text);
        Ok(())
    }
}

/// Exceptions end here, in ring 3.
extern "C" fn fault() -> ! {
    let [vector, code, rip, address, cs] = percpu::fault_record();
    // Writing to the console does not fail.
    let _ = write!(
        Panic,
        "\r\nPANIC: exception {vector} code {code:#x} at {cs:#x}:{rip:#x}, address {address:#x}\r\n"
    );
    cpu::triple_fault()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    // As above.
    let _ = write!(Panic, "\r\nPANIC: {info}\r\n");
    cpu::triple_fault()
}

/// `core` comes compiled for unwinding and names this; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above: referred to, never called.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    cpu::triple_fault()
}
