//! The devices a guest sees: virtio net, disk and entropy over virtio-mmio, a serial console, and
//! the few fixed ports of a PC.
//!
//! ```text
//!   vCPU threads ── mmio/pio ──┐                       ┌── Outputs (frames, console, power)
//!   tap reader ──── net_rx ────┤                       │
//!   console ─────── console_in ┼──▶ gate ──▶ device ───┤
//!   device thread ─ doorbells ─┤             (mutex)   ├── guest memory, marked dirty
//!   disk workers ── completion ┘                       └── interrupts (irqfd)
//! ```
//!
//! Whoever acts on the guest's behalf passes the gate first, then takes the device's
//! mutex. A capture closes the gate ([`DeviceSet::quiesce`]): from its return to
//! [`DeviceSet::release`] no device writes guest memory, raises an interrupt or calls a port, so
//! state, memory and outputs belong to one epoch (rule 3). Work that arrives meanwhile waits:
//! doorbells in their events, frames and completed disk requests with their threads.
//!
//! Nothing in flight is lost by a restore elsewhere: what a queue has not finished is still in
//! its ring, in guest memory, and [`DeviceSet::kick_all`] makes every queue look again (rules 12,
//! 13). Doorbells and frames turned away are not state.
//!
//! - `gate`: who may act when; `ring`: a guest's queue, with nothing in it believed;
//! - `transport`: the virtio-mmio registers; `net`, `disk`, `rng`: the devices behind them;
//! - `serial`, `platform`, `pm1`: the I/O ports; `threads`: who serves the doorbells;
//! - [`kinds`], `records`: the saved state's blocks and their layout; `persist`: to and from them.

mod disk;
mod error;
mod gate;
pub mod kinds;
mod net;
mod persist;
mod platform;
pub(crate) mod pm1;
mod records;
mod ring;
mod rng;
mod serial;
mod threads;
mod transport;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ax_wire::offload::{Offloads, Packet};
use parking_lot::{MappedMutexGuard, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use disk::MAX_REQUEST;
pub use error::Error;

use crate::config::NicConfig;
use crate::memory::GuestMemory;
use crate::ports::{Disk, Outputs};
use disk::DiskDevice;
use gate::Gate;
use net::{Net, NetEvents};
use platform::Platform;
use rng::Rng;
use serial::SerialPort;
use transport::{Effect, Transport};

/// Guest-physical address of the first virtio-mmio window.
const WINDOWS: u64 = 0xd000_0000;
/// Bytes per window.
const WINDOW: u64 = 0x1000;
/// Offset of QueueNotify in a window.
const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of the device's configuration in a window.
const CONFIG: u64 = 0x100;
/// Interrupt lines for virtio devices: those of a PC with no owner of their own here (timer 0,
/// cascade 2, serial 4, RTC 8, ACPI 9 and FPU 13 have one), then the I/O APIC's others.
const LINES: [u32; 17] = [
    5, 6, 7, 10, 11, 12, 14, 15, 3, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// Sets the level of the system control interrupt, [`DeviceSet::sci`].
pub type SciLine = Box<dyn Fn(bool) + Send>;

/// Which devices a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The network devices.
    pub nics: Vec<NicConfig>,
    /// Number of disks.
    pub disks: usize,
    /// Whether there is an entropy device.
    pub rng: bool,
}

/// What the devices need from outside.
#[derive(Clone)]
pub struct Ports {
    /// Where frames, console bytes and power events go. Called with a device's mutex held: must
    /// not call the [`DeviceSet`] back, except for [`DeviceSet::retry_outputs`].
    pub outputs: Arc<dyn Outputs>,
    /// The disks, in order; as many as [`DeviceSpec::disks`].
    pub disks: Vec<Arc<dyn Disk>>,
}

/// How one virtio-mmio device is connected to the machine.
#[derive(Debug)]
pub struct Wire {
    /// Guest-physical address of its register window.
    pub base: u64,
    /// Size of the window, bytes.
    pub size: u64,
    /// Global system interrupt: register `irq` for it as irqfd (edge, no resample).
    pub gsi: u32,
    /// Written to raise the interrupt.
    pub irq: EventFd,
    /// Doorbells: (address of QueueNotify, queue number to match as a 32-bit datum, event).
    /// Without an ioeventfd the register works too, through [`DeviceSet::mmio_write`].
    pub doorbells: Vec<(u64, u32, EventFd)>,
}

/// What became of a received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxOutcome {
    /// In the guest's memory; counted.
    Delivered,
    /// The device is done with it without the guest seeing it: longer than the guest's buffers, of an
    /// impossible length, or leaving work that the guest has not agreed to do. Counted.
    Dropped,
    /// The guest has given no buffer: try again after [`DeviceSet::rx_wakeup`].
    NoBuffers,
    /// The guest's driver is not running: try again after [`DeviceSet::rx_wakeup`].
    NotReady,
}

/// What all virtio devices have in common.
trait Virtio: Send + Sync {
    /// The registers, locked. Inside the gate, or by whoever closed it.
    fn transport(&self) -> MappedMutexGuard<'_, Transport>;
    /// The configuration space. Never changes.
    fn config(&self) -> &[u8];
    /// The doorbell of each queue.
    fn doorbells(&self) -> &[EventFd];
    /// The driver has started or reset the device.
    fn renegotiated(&self) {}
}

/// What the threads share.
struct Devices {
    gate: Gate,
    /// The virtio devices by window: nets, disks, then the entropy device.
    slots: Vec<Arc<dyn Virtio>>,
    nets: Vec<Arc<Net>>,
    disks: Vec<Arc<DiskDevice>>,
    rng: Option<Arc<Rng>>,
    serial: Mutex<SerialPort>,
    /// The console was full: bytes wait in the serial port.
    console_blocked: AtomicBool,
    platform: Mutex<Platform>,
    outputs: Arc<dyn Outputs>,
    /// Wakes the device thread: outputs have room again, or it shall end.
    attention: EventFd,
}

/// All devices of one machine. Shared by reference among all threads.
pub struct DeviceSet {
    devices: Arc<Devices>,
    wires: Vec<Wire>,
    serial_irq: EventFd,
    console_wakeup: EventFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

fn event(flags: i32) -> Result<EventFd, Error> {
    EventFd::new(flags | EFD_CLOEXEC).map_err(|source| Error::Os {
        doing: "make an event",
        source,
    })
}

fn clone(event: &EventFd) -> Result<EventFd, Error> {
    event.try_clone().map_err(|source| Error::Os {
        doing: "duplicate an event",
        source,
    })
}

impl DeviceSet {
    /// Makes the devices, as after power-on. No thread runs yet ([`DeviceSet::start`]).
    ///
    /// `mem` is the guest's RAM; device writes mark its bitmap.
    ///
    /// # Errors
    /// Too many devices, as many disks as the specification says not given, a disk of unusable
    /// size, no file descriptors left.
    pub fn new(mem: GuestMemory, spec: DeviceSpec, ports: Ports) -> Result<Self, Error> {
        let asked = spec.nics.len() + spec.disks + usize::from(spec.rng);
        if asked > LINES.len() {
            return Err(Error::TooMany {
                asked,
                most: LINES.len(),
            });
        }
        if spec.disks != ports.disks.len() {
            return Err(Error::Disks {
                spec: spec.disks,
                given: ports.disks.len(),
            });
        }
        let mut irqs = (0..asked)
            .map(|_| event(EFD_NONBLOCK))
            .collect::<Result<Vec<_>, _>>()?;
        let mut wire_irqs = irqs
            .iter()
            .map(clone)
            .collect::<Result<Vec<_>, _>>()?
            .into_iter();
        let mut irqs = irqs.drain(..);
        let mut irq = || irqs.next().map_or_else(|| event(EFD_NONBLOCK), Ok);
        let mut slots: Vec<Arc<dyn Virtio>> = Vec::with_capacity(asked);
        let (mut nets, mut disks, mut rng) = (Vec::new(), Vec::new(), None);
        for (nic, config) in spec.nics.iter().enumerate() {
            let outputs = Arc::clone(&ports.outputs);
            let events = NetEvents {
                doorbells: [event(EFD_NONBLOCK)?, event(EFD_NONBLOCK)?],
                wakeup: event(EFD_NONBLOCK)?,
                renegotiated: event(EFD_NONBLOCK)?,
            };
            let net = Net::new(nic as u8, *config, outputs, mem.clone(), irq()?, events);
            let net = Arc::new(net);
            slots.push(Arc::clone(&net) as Arc<dyn Virtio>);
            nets.push(net);
        }
        for (number, disk) in ports.disks.iter().enumerate() {
            // Blocking: the disk's worker sleeps in its read.
            let doorbell = event(0)?;
            let disk = DiskDevice::new(number, Arc::clone(disk), mem.clone(), irq()?, doorbell)?;
            let disk = Arc::new(disk);
            slots.push(Arc::clone(&disk) as Arc<dyn Virtio>);
            disks.push(disk);
        }
        if spec.rng {
            let device = Arc::new(Rng::new(mem, irq()?, event(EFD_NONBLOCK)?));
            slots.push(Arc::clone(&device) as Arc<dyn Virtio>);
            rng = Some(device);
        }
        let mut wires = Vec::with_capacity(asked);
        for ((slot, device), gsi) in slots.iter().enumerate().zip(LINES) {
            let base = WINDOWS + slot as u64 * WINDOW;
            let mut doorbells = Vec::with_capacity(device.doorbells().len());
            for (queue, doorbell) in device.doorbells().iter().enumerate() {
                doorbells.push((base + QUEUE_NOTIFY, queue as u32, clone(doorbell)?));
            }
            let irq = wire_irqs.next().map_or_else(|| event(EFD_NONBLOCK), Ok)?;
            wires.push(Wire {
                base,
                size: WINDOW,
                gsi,
                irq,
                doorbells,
            });
        }
        let (serial_irq, console_wakeup) = (event(EFD_NONBLOCK)?, event(EFD_NONBLOCK)?);
        let outputs = Arc::clone(&ports.outputs);
        let serial = SerialPort::new(outputs, clone(&serial_irq)?, clone(&console_wakeup)?);
        let devices = Devices {
            gate: Gate::default(),
            slots,
            nets,
            disks,
            rng,
            serial: Mutex::new(serial),
            console_blocked: AtomicBool::new(false),
            platform: Mutex::new(Platform::new()),
            outputs: ports.outputs,
            attention: event(EFD_NONBLOCK)?,
        };
        Ok(DeviceSet {
            devices: Arc::new(devices),
            wires,
            serial_irq,
            console_wakeup,
            threads: Mutex::new(Vec::new()),
        })
    }

    /// The virtio-mmio devices' connections, to be made by the machine.
    pub fn wires(&self) -> &[Wire] {
        &self.wires
    }

    /// The serial port's interrupt: register the event for the GSI as irqfd (edge, no resample).
    pub fn serial_irq(&self) -> (u32, &EventFd) {
        (serial::GSI, &self.serial_irq)
    }

    /// The system control interrupt: a level, active high.
    pub fn sci(&self) -> u32 {
        pm1::SCI
    }

    /// Connects the system control interrupt to `line`, which is low and gets the level that is due at
    /// once. For a machine whose interrupt chips are new; no vCPU runs.
    pub fn connect_sci(&self, line: SciLine) {
        self.devices.platform.lock().connect(line);
    }

    /// Presses the power button (ACPI 6.5, 4.8.2.2.1); whether the guest listens to it. Pressed again before
    /// the guest has seen it, it is one press. Waits at a closed gate.
    pub fn press_power_button(&self) -> bool {
        match self.devices.gate.enter() {
            Some(_inside) => self.devices.platform.lock().press(),
            None => false,
        }
    }

    /// Kernel command line words that announce the virtio-mmio devices, separated by blanks.
    pub fn cmdline(&self) -> String {
        let words = self.wires.iter().map(|w| {
            format!(
                "virtio_mmio.device={}K@{:#x}:{}",
                w.size >> 10,
                w.base,
                w.gsi
            )
        });
        words.collect::<Vec<_>>().join(" ")
    }

    /// A vCPU reads `out.len()` bytes at guest-physical `addr`. What is not there reads as all ones.
    pub fn mmio_read(&self, addr: u64, out: &mut [u8]) {
        out.fill(0xff);
        let Some((device, offset)) = self.devices.find(addr) else {
            return;
        };
        let Some(_inside) = self.devices.gate.enter() else {
            return;
        };
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = device.config().get(at as usize..).unwrap_or_default();
            out.fill(0);
            out.iter_mut()
                .zip(config)
                .for_each(|(to, from)| *to = *from);
        } else if out.len() == 4 && offset % 4 == 0 {
            out.copy_from_slice(&device.transport().read(offset).to_le_bytes());
        }
    }

    /// A vCPU writes `data` at guest-physical `addr`. What is not there is ignored.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) {
        let Some((device, offset)) = self.devices.find(addr) else {
            return;
        };
        let Ok(value) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset >= CONFIG || offset % 4 != 0 {
            return;
        }
        let Some(_inside) = self.devices.gate.enter() else {
            return;
        };
        let effect = device.transport().write(offset, u32::from_le_bytes(value));
        // An event's counter cannot overflow by ones; a disk's worker reads all of it at once.
        match effect {
            Effect::None => {}
            Effect::Notify(queue) => {
                device.doorbells().get(queue).map(|d| d.write(1));
            }
            Effect::Started => {
                device.renegotiated();
                device.doorbells().iter().for_each(|d| {
                    let _ = d.write(1);
                });
            }
            Effect::Reset => device.renegotiated(),
        }
    }

    /// A vCPU reads I/O port `port`: once, or once per byte for string input from the serial port.
    pub fn pio_read(&self, port: u16, out: &mut [u8]) {
        let Some(_inside) = self.devices.gate.enter() else {
            return out.fill(0xff);
        };
        match port {
            serial::BASE..=serial::LAST => self.devices.serial.lock().read(port, out),
            _ => self.devices.platform.lock().read(port, out),
        }
    }

    /// A vCPU writes I/O port `port`: once, or once per byte for string output to the serial port.
    ///
    /// Power and reset are outputs too (I1): they go to [`Outputs::power`], and the machine
    /// decides what stops.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        let Some(_inside) = self.devices.gate.enter() else {
            return;
        };
        match port {
            serial::BASE..=serial::LAST => {
                if self.devices.serial.lock().write(port, data) {
                    self.devices.drain_console();
                }
            }
            _ => {
                let power = self.devices.platform.lock().write(port, data);
                if let Some(power) = power {
                    self.devices.outputs.power(power);
                }
            }
        }
    }

    /// Starts the device threads. Does nothing when they run.
    ///
    /// # Errors
    /// No thread or file descriptor to be had; then none runs.
    pub fn start(&self) -> Result<(), Error> {
        let mut threads = self.threads.lock();
        if threads.is_empty() {
            self.devices.gate.restart();
            *threads = threads::start(&self.devices)?;
        }
        Ok(())
    }

    /// Ends the device threads, also when quiet; waits for disk I/O that has begun. From here on no
    /// device touches guest memory or calls [`Outputs`], and a disk request not yet completed
    /// never will be: it is still in its ring (rule 25).
    pub fn stop(&self) {
        let mut threads = self.threads.lock();
        self.devices.stop(std::mem::take(&mut *threads));
    }

    /// Closes the gate: from return to [`DeviceSet::release`] no device writes guest memory, raises
    /// an interrupt or calls a port.
    ///
    /// Waits for actions that have begun (a batch of frames, a chunk of a disk read), never for disk
    /// I/O. Called after every vCPU is parked with its pending exit complete (rule 3), by one
    /// thread, which until the release must not call what waits at the gate: the mmio, pio,
    /// `net_rx` and `console_in` functions.
    pub fn quiesce(&self) {
        self.devices.gate.close();
    }

    /// Opens the gate: devices go on with what arrived meanwhile.
    pub fn release(&self) {
        self.devices.gate.open();
    }

    /// Puts all devices back to power-on. Disk requests not completed are dropped; a write among
    /// them that still reaches the image is recorded all the same. The console stream and the
    /// counts of received frames go on.
    ///
    /// # Errors
    /// Unless quiet or not started.
    pub fn reset(&self) -> Result<(), Error> {
        self.check_quiet("reset")?;
        self.devices.slots.iter().for_each(|d| {
            d.transport().reset();
            d.renegotiated();
        });
        self.devices.serial.lock().reset();
        self.devices.platform.lock().reset();
        Ok(())
    }

    /// After a restore or promotion: makes every queue look for work, which issues unfinished disk
    /// requests again, and raises every running device's used-buffer interrupt once (rules 12,
    /// 13). Spurious is harmless, lost is not. Called by the gate's owner, with the gate open or
    /// closed.
    pub fn kick_all(&self) {
        for device in &self.devices.slots {
            device.transport().signal_anyway();
            for doorbell in device.doorbells() {
                let _ = doorbell.write(1);
            }
        }
        self.devices.serial.lock().signal_anyway();
        self.devices.console_blocked.store(true, Ordering::SeqCst);
        let _ = self.devices.attention.write(1);
        for net in &self.devices.nets {
            let _ = net.events.wakeup.write(1);
        }
    }

    /// A frame (Ethernet, without FCS) received for network device `nic`, behind its header, of which
    /// nothing is believed. Waits at a closed gate.
    ///
    /// No such device: [`RxOutcome::NotReady`].
    pub fn net_rx(&self, nic: usize, packet: Packet<'_>) -> RxOutcome {
        let Some(net) = self.devices.nets.get(nic) else {
            return RxOutcome::NotReady;
        };
        let Some(_inside) = self.devices.gate.enter() else {
            return RxOutcome::NotReady;
        };
        net.receive(packet)
    }

    /// How many received frames device `nic` is done with (delivered or dropped) in the guest's
    /// whole life: part of the saved state, so exact for the epoch while quiet (rule 7).
    pub fn rx_delivered(&self, nic: usize) -> u64 {
        self.devices.nets.get(nic).map_or(0, |n| n.received())
    }

    /// Becomes readable when device `nic`, having answered [`RxOutcome::NoBuffers`] or
    /// [`RxOutcome::NotReady`], may take frames again. Read it (non-blocking) before trying again.
    pub fn rx_wakeup(&self, nic: usize) -> Option<&EventFd> {
        self.devices.nets.get(nic).map(|n| &n.events.wakeup)
    }

    /// What received frames may leave to the guest of device `nic`, as its driver and the device have agreed:
    /// part of the saved state.
    pub fn offloads(&self, nic: usize) -> Offloads {
        let net = self.devices.nets.get(nic);
        net.map_or(Offloads::NONE, |n| n.offloads())
    }

    /// Becomes readable when [`DeviceSet::offloads`] of device `nic` may have changed: its driver has started
    /// or reset it, or it was restored. Read it (non-blocking) before asking.
    pub fn renegotiated(&self, nic: usize) -> Option<&EventFd> {
        self.devices.nets.get(nic).map(|n| &n.events.renegotiated)
    }

    /// Frames of device `nic` that were dropped because of their headers, the guest's or received ones,
    /// since this process began.
    pub fn malformed(&self, nic: usize) -> u64 {
        self.devices.nets.get(nic).map_or(0, |n| n.malformed())
    }

    /// Console input. Returns how many bytes the serial port had room for. Waits at a closed gate.
    pub fn console_in(&self, bytes: &[u8]) -> usize {
        match self.devices.gate.enter() {
            Some(_inside) => self.devices.serial.lock().input(bytes),
            None => 0,
        }
    }

    /// Becomes readable when the guest has read all console input, after [`DeviceSet::console_in`]
    /// took less than all. Read it (non-blocking) before trying again.
    pub fn console_wakeup(&self) -> &EventFd {
        &self.console_wakeup
    }

    /// Outputs that said [`crate::ports::Full`] have room again: queues that wait for it are tried
    /// again, by the device thread. Cheap, never waits; may be called at any time by anyone.
    pub fn retry_outputs(&self) {
        let waiting = |n: &Arc<Net>| n.is_blocked();
        if self.devices.console_blocked.load(Ordering::SeqCst)
            || self.devices.nets.iter().any(waiting)
        {
            let _ = self.devices.attention.write(1);
        }
    }

    fn check_quiet(&self, what: &'static str) -> Result<(), Error> {
        let gate = &self.devices.gate;
        if gate.is_closed() || gate.is_stopped() || self.threads.lock().is_empty() {
            Ok(())
        } else {
            Err(Error::NotQuiet(what))
        }
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Devices {
    fn find(&self, addr: u64) -> Option<(&dyn Virtio, u64)> {
        let at = addr.checked_sub(WINDOWS)?;
        let device = self.slots.get(usize::try_from(at / WINDOW).ok()?)?;
        Some((device.as_ref(), at % WINDOW))
    }

    /// Hands waiting console bytes on, as far as there is room. Inside the gate.
    ///
    /// "Blocked" is said before the last try: room made after that try failed is then announced
    /// to a port that is seen to wait, so no wakeup is lost.
    fn drain_console(&self) {
        let mut serial = self.serial.lock();
        self.console_blocked.store(true, Ordering::SeqCst);
        if !serial.retry() {
            self.console_blocked.store(false, Ordering::SeqCst);
        }
    }

    /// Ends `threads`, which serve these devices.
    fn stop(&self, threads: Vec<JoinHandle<()>>) {
        self.gate.stop();
        let _ = self.attention.write(1);
        for disk in &self.disks {
            disk.doorbells().iter().for_each(|d| {
                let _ = d.write(1);
            });
        }
        for thread in threads {
            // A panic there has been reported where it happened.
            let _ = thread.join();
        }
    }
}
