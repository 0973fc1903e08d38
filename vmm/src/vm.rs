//! The KVM objects of one virtual machine, from creation to the last thread joined.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, SyncReg, VmFd};
use parking_lot::Mutex;

use ax_wire::PAGE_SIZE;

use crate::caps::{self, HostCaps};
use crate::config::DirtyTracking;
use crate::cpuid;
use crate::devices::DeviceSet;
use crate::error::{Doing, Error, Result};
use crate::gate::{Gate, Kick, kick_signal};
use crate::memory::Ram;
use crate::power::PowerLatch;
use crate::state::Scratch;
use crate::vcpu::{self, Core, Counters, RingFull, Surroundings, Vcpu};

/// Three pages KVM needs for itself on some CPUs, in the device gap, clear of everything else.
pub(crate) const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Interrupt lines of the IOAPIC.
const IOAPIC_PINS: u32 = 24;

extern "C" fn ignore_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What is the same for every incarnation of the KVM objects (a reset makes new ones).
pub(crate) struct Parts {
    pub(crate) ram: Ram,
    pub(crate) devices: Arc<DeviceSet>,
    pub(crate) power: Arc<PowerLatch>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) ring_full: Arc<Mutex<Option<RingFull>>>,
    pub(crate) caps: HostCaps,
    pub(crate) vcpus: u8,
    pub(crate) dirty: DirtyTracking,
}

/// A KVM virtual machine with its vCPU threads, all parked at first.
pub(crate) struct Vm {
    /// The interrupt line of the devices refers to it, without keeping it.
    pub(crate) fd: Arc<VmFd>,
    pub(crate) vcpus: Vec<Arc<Vcpu>>,
    pub(crate) gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vm {
    /// Makes VM, memory slots, chips, vCPUs and their threads; returns when all are parked.
    pub(crate) fn new(parts: &Parts) -> Result<Self> {
        let kvm = caps::open()?;
        let fd = kvm.create_vm().doing("KVM_CREATE_VM")?;
        enable_extensions(&fd, parts.dirty)?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .doing("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.set_tss_address(TSS_ADDRESS).doing("KVM_SET_TSS_ADDR")?;
        fd.create_irq_chip().doing("KVM_CREATE_IRQCHIP")?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).doing("KVM_CREATE_PIT2")?;
        set_memory(&fd, &parts.ram, false)?;
        route_interrupts(&fd)?;
        let fd = Arc::new(fd);
        connect_devices(&fd, &parts.devices)?;
        vmm_sys_util::signal::register_signal_handler(kick_signal(), ignore_kick)
            .doing("registering the kick signal")?;
        let run_size = kvm.get_vcpu_mmap_size().doing("KVM_GET_VCPU_MMAP_SIZE")?;
        let (vcpus, kicks) = make_vcpus(&fd, parts)?;
        let mut vm = Vm {
            fd,
            vcpus,
            gate: Arc::new(Gate::new(kicks)),
            threads: Vec::new(),
        };
        vm.spawn(parts, run_size)?;
        vm.gate.park()?;
        Ok(vm)
    }

    fn spawn(&mut self, parts: &Parts, run_size: usize) -> Result<()> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let around = Surroundings {
                gate: Arc::clone(&self.gate),
                devices: Arc::clone(&parts.devices),
                power: Arc::clone(&parts.power),
                counters: Arc::clone(&parts.counters),
                ring_full: Arc::clone(&parts.ring_full),
                run_size,
            };
            let vcpu = Arc::clone(vcpu);
            let name = format!("vcpu{index}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || vcpu::run(index, &vcpu, &around))
                .map_err(|source| Error::Thread { name, source })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Starts or stops KVM's dirty log in every slot.
    pub(crate) fn log_dirty(&self, ram: &Ram, on: bool) -> Result<()> {
        set_memory(&self.fd, ram, on)
    }

    /// Makes the interrupt routing anew (rule 12).
    pub(crate) fn route_interrupts(&self) -> Result<()> {
        route_interrupts(&self.fd)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.gate.end();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread had panicked");
            }
        }
        self.gate.forget();
    }
}

fn make_vcpus(fd: &VmFd, parts: &Parts) -> Result<(Vec<Arc<Vcpu>>, Vec<Kick>)> {
    let leaves = parts.caps.leaves()?;
    let xsave_size = caps::xsave_size(fd);
    let syncs = caps::syncs_registers(fd);
    let (mut vcpus, mut kicks) = (Vec::new(), Vec::new());
    for index in 0..parts.vcpus {
        let mut vcpu = fd.create_vcpu(index.into()).doing("KVM_CREATE_VCPU")?;
        let leaves = cpuid::of_vcpu(&leaves, index, parts.vcpus)?;
        vcpu.set_cpuid2(&leaves).doing("KVM_SET_CPUID2")?;
        let flag = std::ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        // SAFETY: the flag lies in the vCPU's mapping; `Vm::drop` has the gate forget it before
        // the vCPUs, which `Vm` keeps alive, are closed.
        kicks.push(unsafe { Kick::new(flag) });
        if syncs {
            vcpu.set_sync_valid_reg(SyncReg::Register);
            vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        let scratch = Scratch::new(&parts.caps.msrs, xsave_size)?;
        vcpus.push(Arc::new(Vcpu {
            core: Mutex::new(Core {
                fd: vcpu,
                scratch,
                syncs,
            }),
        }));
    }
    Ok((vcpus, kicks))
}

fn enable(fd: &VmFd, cap: u32, arg: u64) -> std::result::Result<(), kvm_ioctls::Error> {
    let mut enable = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    enable.args[0] = arg;
    fd.enable_cap(&enable)
}

fn enable_extensions(fd: &VmFd, dirty: DirtyTracking) -> Result<()> {
    // Both make VCPU_EVENTS tell more. Where they are missing there is nothing more to tell.
    for (cap, name) in [
        (KVM_CAP_EXCEPTION_PAYLOAD, "exception payload"),
        (KVM_CAP_X86_TRIPLE_FAULT_EVENT, "triple fault event"),
    ] {
        if enable(fd, cap, 1).is_err() {
            tracing::debug!(name, "KVM extension not available");
        }
    }
    match dirty {
        DirtyTracking::Ring { entries } => {
            let bytes = u64::from(entries) * crate::dirty::RING_ENTRY_BYTES as u64;
            enable(fd, KVM_CAP_DIRTY_LOG_RING, bytes).doing("KVM_CAP_DIRTY_LOG_RING")
        }
        DirtyTracking::Bitmap { .. } => {
            let manual = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
            enable(fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual)
                .doing("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        }
    }
}

fn set_memory(fd: &VmFd, ram: &Ram, log_dirty: bool) -> Result<()> {
    for (slot, region) in ram.regions().iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if log_dirty {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
            guest_phys_addr: region.start * PAGE_SIZE as u64,
            memory_size: region.pages * PAGE_SIZE as u64,
            userspace_addr: ram.host_address(slot).unwrap_or_default(),
        };
        // SAFETY: the region is a mapping of exactly this size, and `Machine` keeps it for longer
        // than the VM.
        unsafe { fd.set_user_memory_region(region) }.doing("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

/// Line n goes to IOAPIC pin n and, below 16, to the PICs, as on a PC with its timer on pin 0.
fn route_interrupts(fd: &VmFd) -> Result<()> {
    let mut entries = Vec::new();
    for gsi in 0..IOAPIC_PINS {
        let mut route = |irqchip, pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = irqchip;
            entry.u.irqchip.pin = pin;
            entries.push(entry);
        };
        route(KVM_IRQCHIP_IOAPIC, gsi);
        match gsi {
            0..8 => route(KVM_IRQCHIP_PIC_MASTER, gsi),
            8..16 => route(KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
            _ => {}
        }
    }
    let routing = KvmIrqRouting::from_entries(&entries)
        .map_err(|_| Error::Missing("room for the interrupt routing"))?;
    fd.set_gsi_routing(&routing).doing("KVM_SET_GSI_ROUTING")
}

fn connect_devices(fd: &Arc<VmFd>, devices: &DeviceSet) -> Result<()> {
    let (gsi, irq) = devices.serial_irq();
    fd.register_irqfd(irq, gsi).doing("KVM_IRQFD")?;
    let (sci, of) = (devices.sci(), Arc::downgrade(fd));
    // A level, so no irqfd: the chips show it to a guest that unmasks the line later, too.
    devices.connect_sci(Box::new(move |level| {
        if let Some(fd) = of.upgrade()
            && let Err(error) = fd.set_irq_line(sci, level)
        {
            tracing::error!(%error, level, "KVM_IRQ_LINE: the guest may miss its power button");
        }
    }));
    for wire in devices.wires() {
        fd.register_irqfd(&wire.irq, wire.gsi).doing("KVM_IRQFD")?;
        for (address, queue, doorbell) in &wire.doorbells {
            let address = IoEventAddress::Mmio(*address);
            fd.register_ioevent(doorbell, &address, *queue)
                .doing("KVM_IOEVENTFD")?;
        }
    }
    Ok(())
}
