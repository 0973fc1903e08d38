//! One machine: memory, KVM objects, devices and dirty tracking together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ax_wire::state::{StateReader, StateWriter};

use crate::boot;
use crate::caps::{self, HostCaps};
use crate::config::{DirtyTracking, MAX_VCPUS, MachineConfig};
use crate::devices::{DeviceSet, DeviceSpec, Ports};
use crate::dirty::{RING_ENTRY_BYTES, Tracker};
use crate::error::{Doing, Error, Result};
use crate::gate::{Gate, boottime_ns};
use crate::handle::MachineHandle;
use crate::memory::{GuestMemory, Ram, RamRegion};
use crate::ports::{Outputs, Power};
use crate::power::PowerLatch;
use crate::state::{self, Elapsed, MachineBlock, Saved};
use crate::vcpu::RingFull;
use crate::vm::{Parts, Vm};

/// Smallest and largest dirty ring, entries. KVM keeps some of the smallest for itself.
const RING_ENTRIES: std::ops::RangeInclusive<u32> = 256..=65536;

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Neither booted nor restored.
    New,
    /// Every vCPU parked, every device quiet.
    Paused,
    Running,
}

/// What came of a press of the power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Press {
    /// The guest listens and is told.
    Pressed,
    /// The guest has not enabled the button's event: it would not notice.
    NobodyListens,
    /// The machine is paused or was not started: it can't answer.
    StandsStill,
}

/// A virtual machine. Owned by one thread, which captures or restores it; see the crate's
/// documentation for the order of calls.
pub struct Machine {
    /// `None` only when a reset failed half-way. Dropped first: its threads use the rest.
    vm: Option<Vm>,
    tracker: Tracker,
    phase: Phase,
    devices_started: bool,
    parked_ns: u64,
    promoted: bool,
    /// See [`Machine::was_idle`].
    idle: AtomicBool,
    config: MachineConfig,
    parts: Parts,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let power = self.power();
        f.debug_struct("Machine")
            .field("phase", &self.phase)
            .field("power", &power)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes RAM, KVM objects, vCPU threads (parked) and devices (quiet). Probes this host first.
    ///
    /// # Errors
    /// A configuration that can't be run, KVM not usable, or no memory.
    pub fn new(config: MachineConfig, ports: Ports) -> Result<Machine> {
        Machine::with_caps(config, ports, HostCaps::probe()?)
    }

    /// As [`Machine::new`], on a host whose abilities are already known.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn with_caps(config: MachineConfig, ports: Ports, caps: HostCaps) -> Result<Machine> {
        check(&config, &ports, &caps)?;
        let ram = Ram::new(config.memory)?;
        let power = Arc::new(PowerLatch::new(ports.outputs));
        let spec = DeviceSpec {
            nics: config.nics.clone(),
            disks: ports.disks.len(),
            rng: config.rng,
        };
        let outputs: Arc<dyn Outputs> = Arc::clone(&power) as _;
        let ports = Ports {
            outputs,
            disks: ports.disks,
        };
        let devices = DeviceSet::new(ram.memory().clone(), spec, ports).map_err(devices)?;
        devices.quiesce();
        let parts = Parts {
            ram,
            devices: Arc::new(devices),
            power,
            counters: Arc::default(),
            ring_full: Arc::default(),
            caps,
            vcpus: config.vcpus,
            dirty: config.dirty,
        };
        let vm = Vm::new(&parts)?;
        let tracker = Tracker::new(config.dirty, &vm, &parts.ram)?;
        let phase = Phase::New;
        Ok(Machine {
            vm: Some(vm),
            tracker,
            phase,
            devices_started: false,
            parked_ns: 0,
            promoted: false,
            idle: AtomicBool::new(false),
            config,
            parts,
        })
    }

    fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().ok_or(Error::Order(
            "this machine's last reset failed; it can't go on",
        ))
    }

    /// What this host can give, as found when the machine was made.
    pub fn caps(&self) -> &HostCaps {
        &self.parts.caps
    }

    /// Guest RAM, as devices see it.
    pub fn memory(&self) -> &GuestMemory {
        self.parts.ram.memory()
    }

    /// RAM, ascending and disjoint; fixed for the machine's life.
    pub fn ram(&self) -> &[RamRegion] {
        self.parts.ram.regions()
    }

    /// For other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            devices: Arc::clone(&self.parts.devices),
            counters: Arc::clone(&self.parts.counters),
        }
    }

    /// Why the guest has stopped as a whole, if it has.
    pub fn power(&self) -> Option<Power> {
        self.parts.power.get()
    }

    /// Sets what a vCPU calls, on its own thread, when its dirty ring is full: the epoch must end.
    /// The vCPU then waits for the next harvest or resume.
    pub fn on_ring_full(&self, trigger: RingFull) {
        *self.parts.ring_full.lock() = Some(trigger);
    }

    /// Bytes that saved state takes at most; reserve them in its buffer.
    pub fn state_capacity(&self) -> usize {
        let per_vcpu = self.parts.caps.xsave_size as usize + self.parts.caps.msrs.len() * 16 + 8192;
        let devices = self.config.nics.len() + self.parts.devices.wires().len();
        usize::from(self.config.vcpus) * per_vcpu + devices * 65536 + (256 << 10)
    }

    /// Loads the kernel and sets the first registers. For a new machine; it is then paused.
    ///
    /// # Errors
    /// No kernel, or one that can't be loaded.
    pub fn boot(&mut self) -> Result<()> {
        if self.phase != Phase::New {
            return Err(Error::Order(
                "boot: this machine has been booted or restored already",
            ));
        }
        self.load_kernel()?;
        self.phase = Phase::Paused;
        Ok(())
    }

    fn load_kernel(&self) -> Result<()> {
        let devices = &self.parts.devices;
        let windows = devices.wires().iter().map(|wire| boot::Window {
            base: wire.base,
            size: wire.size,
            gsi: wire.gsi,
        });
        let windows: Vec<_> = windows.collect();
        let (memory, config) = (self.parts.ram.memory(), &self.config);
        let entry = boot::load(
            memory,
            config.memory,
            &config.boot,
            &devices.cmdline(),
            &windows,
            config.vcpus,
        )?;
        match self.vm()?.vcpus.first() {
            Some(vcpu) => boot::set_registers(&vcpu.core.lock().fd, entry),
            None => Err(Error::VcpuGone),
        }
    }

    /// Puts saved state into a new machine whose RAM has been written already: vCPUs, clock, chips,
    /// then devices (rule 11). It is then paused. `elapsed` is the time since the capture, by which
    /// the guest's clocks advance.
    ///
    /// # Errors
    /// State that is damaged, of another machine, or refused by this KVM. The machine is then of
    /// no further use: some of it may be set.
    pub fn restore(&mut self, state: &[u8], elapsed: Duration) -> Result<()> {
        if self.phase != Phase::New {
            return Err(Error::Order(
                "restore: this machine has been booted or restored already",
            ));
        }
        // Those of a vacated machine are stopped, not quiet.
        self.parts.devices.quiesce();
        let elapsed = Elapsed::from_now(elapsed);
        let saved = Saved::read(state)?;
        let of = saved.machine()?;
        if (of.memory, of.vcpus) != (self.config.memory, u32::from(self.config.vcpus)) {
            return Err(Error::State(format!(
                "it is of a machine with {} bytes of memory and {} vCPUs, this one has {} and {}",
                of.memory, of.vcpus, self.config.memory, self.config.vcpus
            )));
        }
        let power = state::power_of(of.power)?;
        let vm = self.vm()?;
        for (index, vcpu) in vm.vcpus.iter().enumerate() {
            let core = &mut *vcpu.core.lock();
            let khz = self.parts.caps.tsc_khz;
            state::restore_vcpu(
                &core.fd,
                &mut core.scratch,
                index as u32,
                &saved,
                khz,
                elapsed,
            )?;
        }
        state::restore_vm(&vm.fd, &saved, elapsed)?;
        self.parts
            .devices
            .restore(StateReader::new(state))
            .map_err(devices)?;
        self.parts.power.put(power);
        vm.gate.set_halted(power.is_some());
        self.phase = Phase::Paused;
        Ok(())
    }

    /// What a promotion adds to a restore (rules 11 and 12): interrupt routing made anew, the guest
    /// told that it was stopped, and, when it starts, every queue looked at and every device's
    /// interrupt raised once. Between [`Machine::restore`] and [`Machine::start`].
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn promote_fixups(&mut self) -> Result<()> {
        if self.phase != Phase::Paused {
            return Err(Error::Order(
                "promote: restore the machine first, and start it afterwards",
            ));
        }
        let vm = self.vm()?;
        vm.route_interrupts()?;
        for vcpu in &vm.vcpus {
            match vcpu.core.lock().fd.kvmclock_ctrl() {
                Err(e) if e.errno() != libc::EINVAL => return Err(e).doing("KVM_KVMCLOCK_CTRL"),
                _ => {} // EINVAL: the guest does not use kvmclock
            }
        }
        self.promoted = true;
        Ok(())
    }

    /// Starts the devices and lets the vCPUs run.
    ///
    /// # Errors
    /// When it was neither booted nor restored, or a thread can't be started.
    pub fn start(&mut self) -> Result<()> {
        if self.phase != Phase::Paused {
            return Err(Error::Order(
                "start: boot or restore the machine first, and start it once",
            ));
        }
        if !self.devices_started {
            self.parts.devices.start().map_err(devices)?;
            self.devices_started = true;
        }
        self.resume()
    }

    /// Parks every vCPU with its pending exit complete, then quiets the devices: from here on nobody
    /// writes guest memory or raises interrupts (rule 3). Pausing a paused machine does nothing.
    ///
    /// # Errors
    /// When a vCPU thread has died, or the machine was never started.
    pub fn pause(&mut self) -> Result<()> {
        match self.phase {
            Phase::New => Err(Error::Order("pause: the machine was not started")),
            Phase::Paused => Ok(()),
            Phase::Running => {
                // As a capture does it: what vCPUs save ahead is as good later.
                self.vm()?.gate.park_and(&mut || ())?;
                self.parked_ns = boottime_ns();
                self.parts.devices.quiesce();
                self.phase = Phase::Paused;
                Ok(())
            }
        }
    }

    /// How to pause a machine that is shared behind a lock, and do something with it meanwhile on the
    /// best thread for it; `None` when it is paused already. What is done begins with
    /// [`Machine::parked`].
    ///
    /// # Errors
    /// The machine was never started.
    pub fn parking(&self) -> Result<Option<Parking>> {
        match self.phase {
            Phase::New => Err(Error::Order("pause: the machine was not started")),
            Phase::Paused => Ok(None),
            Phase::Running => Ok(Some(Parking(Arc::clone(&self.vm()?.gate)))),
        }
    }

    /// Every vCPU is parked: quiets the devices. The second half of [`Machine::pause`].
    ///
    /// # Errors
    /// The machine was never started.
    pub fn parked(&mut self) -> Result<()> {
        self.pause()
    }

    /// Lets devices and vCPUs go on. The vCPUs of a guest that is powered off, crashed or waiting for
    /// its reset stay parked. Resuming a running machine does nothing.
    ///
    /// # Errors
    /// When it was never started.
    pub fn resume(&mut self) -> Result<()> {
        match self.phase {
            Phase::New => Err(Error::Order("resume: the machine was not started")),
            Phase::Running => Ok(()),
            Phase::Paused if !self.devices_started => {
                Err(Error::Order("resume: the machine was not started"))
            }
            Phase::Paused => {
                let promoted = std::mem::take(&mut self.promoted);
                let vm = self.vm()?;
                self.parts.devices.release();
                if promoted {
                    self.parts.devices.kick_all();
                }
                vm.gate.go();
                self.phase = Phase::Running;
                Ok(())
            }
        }
    }

    /// Presses the guest's power button. Pressed again before the guest has seen it, it is one press; a
    /// press that is in no committed epoch is lost when the guest goes on elsewhere.
    pub fn press_power_button(&self) -> Press {
        match self.phase {
            Phase::New | Phase::Paused => Press::StandsStill,
            Phase::Running if self.parts.devices.press_power_button() => Press::Pressed,
            Phase::Running => Press::NobodyListens,
        }
    }

    /// When the last vCPU was parked by the last [`Machine::pause`], before the devices were quieted,
    /// nanoseconds of CLOCK_BOOTTIME; 0 before the first.
    pub fn parked_ns(&self) -> u64 {
        self.parked_ns
    }

    /// When the last vCPU called KVM_RUN after the last [`Machine::resume`], nanoseconds of
    /// CLOCK_BOOTTIME; `None` if none has run. Exact while paused.
    pub fn resumed_ns(&self) -> Option<u64> {
        self.vm.as_ref().and_then(|vm| vm.gate.entered_ns())
    }

    /// Whether every vCPU waited for an interrupt when its state was last saved: the pause cost the guest nothing.
    pub fn was_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }

    /// Appends all state: devices, then each vCPU, then clock and chips (rule 3). Only while paused,
    /// and before [`Machine::harvest`]: reading vCPU state may dirty guest memory. Allocates nothing.
    ///
    /// # Errors
    /// When the machine runs, the buffer is too small, or KVM refuses.
    pub fn save(&self, out: &mut StateWriter<'_>) -> Result<()> {
        if self.phase != Phase::Paused {
            return Err(Error::Order("save: pause the machine first"));
        }
        let vm = self.vm()?;
        let of = MachineBlock {
            memory: self.config.memory,
            vcpus: self.config.vcpus.into(),
            power: state::power_number(self.power()),
        };
        state::save_machine(&of, out)?;
        self.parts.devices.save(out).map_err(devices)?;
        let alone = vm.vcpus.len() == 1;
        let mut idle = true;
        for (index, vcpu) in vm.vcpus.iter().enumerate() {
            let core = &mut *vcpu.core.lock();
            idle &= state::save_vcpu(&core.fd, &mut core.scratch, index as u32, alone, out)?;
        }
        self.idle.store(idle, Ordering::Relaxed);
        state::save_vm(&vm.fd, self.parts.caps.tsc_khz, out)
    }

    /// Starts (true) or stops dirty tracking. On start every page counts as clean.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn track_dirty(&mut self, on: bool) -> Result<()> {
        let vm = self
            .vm
            .as_ref()
            .ok_or(Error::Order("this machine's last reset failed"))?;
        self.tracker.switch(on, vm, &self.parts.ram)?;
        vm.gate.rings_freed();
        Ok(())
    }

    /// Replaces `dirty` by the pages (unique, ascending) written since the last harvest, by vCPUs or
    /// devices, and counts them clean from here on. Exact while paused; of a running guest a page written
    /// meanwhile is in this harvest or the next.
    ///
    /// # Errors
    /// When dirty pages are not tracked or KVM refuses; the pages are then in the next harvest.
    pub fn harvest(&mut self, dirty: &mut Vec<u64>) -> Result<()> {
        let vm = self
            .vm
            .as_ref()
            .ok_or(Error::Order("this machine's last reset failed"))?;
        let paused = self.phase != Phase::Running;
        let harvested = self.tracker.harvest(&vm.fd, &self.parts.ram, paused, dirty);
        if !paused {
            vm.gate.rings_freed();
        }
        harvested
    }

    /// Counts `pages` dirty again: their capture failed (I6).
    pub fn give_back(&mut self, pages: &[u64]) {
        self.tracker.give_back(&self.parts.ram, pages);
    }

    /// About how many pages are dirty since the last harvest; also while the guest runs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn dirty_estimate(&mut self) -> Result<usize> {
        let vm = self
            .vm
            .as_ref()
            .ok_or(Error::Order("this machine's last reset failed"))?;
        self.tracker.estimate(&vm.fd, &self.parts.ram)
    }

    /// Copies consecutive pages starting at `first` into `out` (a multiple of 4096 bytes).
    ///
    /// # Errors
    /// Pages that are not within one region of RAM.
    pub fn read_pages(&self, first: u64, out: &mut [u8]) -> Result<()> {
        self.parts.ram.read_pages(first, out)
    }

    /// Overwrites consecutive pages starting at `first`, of a machine that is to be restored. They
    /// are not marked dirty.
    ///
    /// # Errors
    /// Pages that are not within one region of RAM, or the machine has begun its life.
    pub fn write_pages(&mut self, first: u64, data: &[u8]) -> Result<()> {
        if self.phase != Phase::New {
            return Err(Error::Order(
                "write_pages: this machine has been booted or restored already",
            ));
        }
        self.parts.ram.write_pages(first, data)
    }

    /// Resets the guest in place: new KVM objects (a vCPU that crashed can't be revived), devices as
    /// at power-on, the kernel loaded again. RAM keeps what the kernel does not overwrite, as on real
    /// machines. What was dirty stays dirty and what this writes is dirty. The machine is then paused.
    ///
    /// # Errors
    /// When the kernel can't be loaded or KVM refuses; the machine can't go on then.
    pub fn reset(&mut self) -> Result<()> {
        self.pause()?;
        let old = self
            .vm
            .take()
            .ok_or(Error::Order("this machine's last reset failed"))?;
        self.tracker.collect_last(&old, &self.parts.ram)?;
        drop(old); // before the new one: an eventfd can raise interrupts in one VM only
        self.parts.devices.reset().map_err(devices)?;
        self.parts.power.put(None);
        let vm = Vm::new(&self.parts)?;
        self.tracker
            .adopt(self.config.dirty, &vm, &self.parts.ram)?;
        self.vm = Some(vm);
        self.promoted = false;
        self.load_kernel()
    }

    /// Gives the guest up to another machine and becomes one that follows it (rule 25): new KVM
    /// objects, devices as at power-on and not started, RAM as it is. Waits for disk I/O that has begun.
    /// It then takes [`Machine::write_pages`] and [`Machine::restore`], as a new machine does. Dirty
    /// pages are not tracked any more.
    ///
    /// # Errors
    /// Unless paused, or when KVM refuses; the machine can't go on in the latter case.
    pub fn vacate(&mut self) -> Result<()> {
        if self.phase != Phase::Paused {
            return Err(Error::Order("vacate: pause the machine first"));
        }
        self.track_dirty(false)?;
        self.parts.devices.stop();
        self.devices_started = false;
        drop(self.vm.take()); // before the new one: an eventfd can raise interrupts in one VM only
        self.parts.devices.reset().map_err(devices)?;
        self.parts.power.put(None);
        let vm = Vm::new(&self.parts)?;
        self.tracker
            .adopt(self.config.dirty, &vm, &self.parts.ram)?;
        self.vm = Some(vm);
        self.promoted = false;
        self.phase = Phase::New;
        Ok(())
    }
}

/// Parks the vCPUs of a machine that nobody has locked.
#[derive(Debug)]
pub struct Parking(Arc<Gate>);

impl Parking {
    /// Parks every vCPU with its pending exit complete and calls `act` once, on the thread of the vCPU
    /// that parks last: what the guest wrote is in the caches of its core, and nobody has to be woken
    /// first. Returns when `act` has; it may have resumed the machine.
    ///
    /// # Errors
    /// When a vCPU thread has died; `act` was not called then.
    pub fn run(self, act: &mut (dyn FnMut() + Send)) -> Result<()> {
        self.0.park_and(act)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Devices first, while they are still quiet if they are: what a device did after the last
        // capture would be an output or a write of no epoch. A vCPU inside one is let go by the stop.
        self.parts.devices.stop();
        self.vm = None;
    }
}

fn devices(e: crate::devices::Error) -> Error {
    Error::Devices(Box::new(e))
}

fn check(config: &MachineConfig, ports: &Ports, caps: &HostCaps) -> Result<()> {
    let bad = |why: String| Err(Error::Config(why));
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return bad(format!("{} vCPUs: give 1 to {MAX_VCPUS}", config.vcpus));
    }
    if let Some(nic) = config
        .nics
        .iter()
        .find(|n| n.mac[0] & 1 == 1 || n.mac == [0; 6])
    {
        return bad(format!(
            "MAC address {:02x?} is not a unicast address",
            nic.mac
        ));
    }
    if config.nics.len() + ports.disks.len() > 16 {
        return bad("more than 16 network devices and disks".into());
    }
    if !caps.tsc_offset {
        return Err(Error::Missing(caps::TSC_OFFSETS));
    }
    match config.dirty {
        DirtyTracking::Ring { entries } => {
            if !entries.is_power_of_two() || !RING_ENTRIES.contains(&entries) {
                return bad(format!(
                    "dirty ring of {entries} entries: give a power of two, 256 to 65536"
                ));
            }
            let bytes = u64::from(entries) * RING_ENTRY_BYTES as u64;
            if bytes > u64::from(caps.dirty_ring_bytes) {
                return bad(format!(
                    "dirty ring of {bytes} bytes, but this KVM allows {}: use the bitmap or a smaller ring",
                    caps.dirty_ring_bytes
                ));
            }
        }
        DirtyTracking::Bitmap { hot_pages } => {
            if !caps.manual_protect {
                return Err(Error::Missing(caps::MANUAL_PROTECT));
            }
            if hot_pages > 4096 {
                return bad(format!("{hot_pages} hot pages: give at most 4096"));
            }
        }
    }
    Ok(())
}
