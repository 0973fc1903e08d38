//! One vCPU: its thread, and the exits it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::Mutex;

use crate::devices::DeviceSet;
use crate::gate::Gate;
use crate::ports::{Outputs, Power};
use crate::power::PowerLatch;
use crate::state::{self, Scratch};

/// A vCPU and the buffers its state is saved through. The vCPU's thread holds the lock from the
/// moment it is let go until it is parked.
pub(crate) struct Vcpu {
    pub(crate) core: Mutex<Core>,
}

pub(crate) struct Core {
    pub(crate) fd: VcpuFd,
    pub(crate) scratch: Scratch,
    /// KVM_RUN leaves the registers in `kvm_run` (KVM_CAP_SYNC_REGS).
    pub(crate) syncs: bool,
}

/// Counts of what happened, since the process started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) io_exits: AtomicU64,
    pub(crate) mmio_exits: AtomicU64,
    pub(crate) ring_full_exits: AtomicU64,
    pub(crate) interrupted: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Called when a vCPU stops because its dirty ring is full: the epoch must end.
pub type RingFull = Arc<dyn Fn() + Send + Sync>;

/// Everything a vCPU thread works with.
pub(crate) struct Surroundings {
    pub(crate) gate: Arc<Gate>,
    pub(crate) devices: Arc<DeviceSet>,
    pub(crate) power: Arc<PowerLatch>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) ring_full: Arc<Mutex<Option<RingFull>>>,
    /// Length of the `kvm_run` mapping, bytes.
    pub(crate) run_size: usize,
}

/// Why KVM_RUN returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Io,
    Mmio,
    /// A signal, or `immediate_exit`: nothing is pending.
    Interrupted,
    /// A vCPU waiting for SIPI woke: call again.
    Again,
    RingFull,
    /// Nothing to do.
    Ignored,
    Power(Power),
}

/// The life of a vCPU's thread: parked, running, parked, …
pub(crate) fn run(index: usize, vcpu: &Vcpu, around: &Surroundings) {
    let _presence = around.gate.enter(index);
    if let Err(e) = vmm_sys_util::signal::unblock_signal(crate::gate::kick_signal()) {
        tracing::error!(vcpu = index, error = ?e, "the kick signal can't be unblocked");
        return;
    }
    while around.gate.wait(index) {
        let core = &mut *vcpu.core.lock();
        core.scratch.runs();
        run_until_parked(index, &mut core.fd, around);
        if around.gate.is_captured() {
            state::save_ahead(&core.fd, &mut core.scratch, index as u32, core.syncs);
        }
    }
}

/// Runs the guest until it shall park. KVM completes the exit answered last when KVM_RUN is called
/// again, and that may bring the next one (`rep outs`, an MMIO access split in two), so only EINTR
/// (or EAGAIN of a vCPU that never ran) means that nothing is pending (rule 3).
fn run_until_parked(index: usize, fd: &mut VcpuFd, around: &Surroundings) {
    loop {
        let freed = around.gate.freed();
        match exit_of(index, fd) {
            Exit::Io => {
                count(&around.counters.io_exits);
                answer_io(fd.get_kvm_run(), around);
            }
            Exit::Mmio => {
                count(&around.counters.mmio_exits);
                answer_mmio(fd.get_kvm_run(), &around.devices);
            }
            Exit::Interrupted => {
                count(&around.counters.interrupted);
                if around.gate.shall_park() {
                    return;
                }
            }
            Exit::Again => {
                if around.gate.shall_park() {
                    return;
                }
            }
            Exit::RingFull => {
                count(&around.counters.ring_full_exits);
                let trigger = around.ring_full.lock().clone();
                if let Some(trigger) = trigger {
                    trigger();
                }
                around.gate.wait_freed(freed);
            }
            Exit::Ignored => {}
            Exit::Power(what) => around.power.power(what),
        }
        if around.power.is_set() {
            // Perhaps by this very exit: it is completed, then this vCPU parks and the others too.
            around.gate.halt();
        }
    }
}

fn exit_of(index: usize, fd: &mut VcpuFd) -> Exit {
    match fd.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Exit::Io,
        Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Exit::Mmio,
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Exit::RingFull,
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => Exit::Ignored,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::Power(Power::Off),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Power(Power::Reset),
        Ok(VcpuExit::Shutdown) => {
            tracing::error!(vcpu = index, "guest crashed: triple fault");
            Exit::Power(Power::Crash)
        }
        Ok(VcpuExit::InternalError) => internal_error(index, fd),
        Ok(other) => {
            tracing::error!(vcpu = index, exit = ?other, "guest crashed: KVM can't run it on");
            Exit::Power(Power::Crash)
        }
        Err(e) if e.errno() == libc::EINTR => Exit::Interrupted,
        Err(e) if e.errno() == libc::EAGAIN => Exit::Again,
        Err(e) => {
            tracing::error!(vcpu = index, error = %e, "guest crashed: KVM_RUN failed");
            Exit::Power(Power::Crash)
        }
    }
}

/// Logs what KVM could not emulate.
fn internal_error(index: usize, fd: &mut VcpuFd) -> Exit {
    let rip = fd.get_regs().map(|r| r.rip).unwrap_or_default();
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is INTERNAL_ERROR, so KVM filled this member of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    // SAFETY: as above; the member has the same layout for every suberror, bytes by `ndata`.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    if internal.suberror == KVM_INTERNAL_ERROR_EMULATION && internal.ndata >= 3 {
        // SAFETY: ndata ≥ 3 says that size and bytes are there.
        let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(insn.insn_size).min(insn.insn_bytes.len());
        let bytes = insn.insn_bytes.get(..len).unwrap_or_default();
        tracing::error!(
            vcpu = index,
            rip = format_args!("{rip:#x}"),
            instruction = format_args!("{bytes:02x?}"),
            "guest crashed: KVM can't emulate an instruction"
        );
    } else {
        tracing::error!(
            vcpu = index,
            rip = format_args!("{rip:#x}"),
            suberror = internal.suberror,
            "guest crashed: internal error of KVM"
        );
    }
    Exit::Power(Power::Crash)
}

/// Answers a port access: each element of a string instruction on its own.
fn answer_io(run: &mut kvm_run, around: &Surroundings) {
    // SAFETY: the exit reason is IO, so KVM filled this member of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, all) = (
        usize::from(io.size),
        usize::from(io.size) * io.count as usize,
    );
    let end = (io.data_offset as usize).checked_add(all);
    if size == 0 || end.is_none_or(|end| end > around.run_size) {
        tracing::error!(port = io.port, "a port access of impossible size");
        return;
    }
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM put the data at this offset of the mapping, whose length was checked just above;
    // the vCPU is not in KVM_RUN and `run` is borrowed exclusively.
    let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), all) };
    for element in data.chunks_exact_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            around.devices.pio_write(io.port, element);
        } else {
            around.devices.pio_read(io.port, element);
        }
    }
}

fn answer_mmio(run: &mut kvm_run, devices: &DeviceSet) {
    // SAFETY: the exit reason is MMIO, so KVM filled this member of the union.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    if let Some(data) = mmio.data.get_mut(..len) {
        if mmio.is_write != 0 {
            devices.mmio_write(mmio.phys_addr, data);
        } else {
            devices.mmio_read(mmio.phys_addr, data);
        }
    }
}
