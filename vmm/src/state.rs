//! A machine's saved state: which blocks, and in which order they are taken and put back.
//!
//! KVM's structures are stored as they are (their layout is kernel ABI), one block each, tagged
//! (kind, version) and numbered by vCPU or chip. CPUID, the MSR list and the configuration are not
//! part of it: both sides agreed on them at pairing.

use ax_wire::state::{Block, StateReader, StateWriter};
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    Msrs, Xsave, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_sync_regs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::time::{Duration, Instant};
use vmm_sys_util::fam::FamStruct;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::clock::{CapturedTime, clock_after, rates_compatible, tsc_offset_after};
use crate::error::{Doing, Error, Result};
use crate::ports::Power;
use crate::sys;

/// Kinds of the machine's own blocks; the devices' begin at [`crate::devices::kinds::FIRST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    /// [`MachineBlock`].
    Machine = 1,
    MpState = 2,
    Regs = 3,
    Sregs = 4,
    Xsave = 5,
    Xcrs = 6,
    DebugRegs = 7,
    Lapic = 8,
    Msrs = 9,
    Events = 10,
    TscOffset = 11,
    /// [`TimeBlock`].
    Time = 12,
    Pit = 13,
    Irqchip = 14,
}

/// Version of every block above.
const VERSION: u16 = 1;

/// What the state is of: checked before anything is set.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MachineBlock {
    /// RAM, bytes.
    pub(crate) memory: u64,
    pub(crate) vcpus: u32,
    /// 0 running, else [`Power`] as a number.
    pub(crate) power: u32,
}

/// kvmclock and the host's TSC at one moment.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct TimeBlock {
    clock_ns: u64,
    host_tsc: u64,
    tsc_khz: u32,
    zero: u32,
}

pub(crate) fn power_number(power: Option<Power>) -> u32 {
    match power {
        None => 0,
        Some(Power::Off) => 1,
        Some(Power::Reset) => 2,
        Some(Power::Crash) => 3,
    }
}

pub(crate) fn power_of(number: u32) -> Result<Option<Power>> {
    match number {
        0 => Ok(None),
        1 => Ok(Some(Power::Off)),
        2 => Ok(Some(Power::Reset)),
        3 => Ok(Some(Power::Crash)),
        other => Err(Error::State(format!("unknown power state {other}"))),
    }
}

/// Buffers a vCPU's state passes through, made once.
pub(crate) struct Scratch {
    msrs: Msrs,
    xsave: Xsave,
    xsave_size: usize,
    /// Blocks of what only the vCPU's own running changes.
    own: Vec<u8>,
    /// They were saved when the vCPU parked, and it has not run since.
    early: Option<Early>,
}

/// By what an INIT since is found out: it leaves protected mode, and these registers as they are at power-on.
#[derive(Clone, Copy)]
struct Early {
    regs: kvm_regs,
    is_protected: bool,
}

const CR0_PE: u64 = 1;

impl Scratch {
    /// For a vCPU whose saved registers are `msrs` and whose XSAVE area has `xsave_size` bytes.
    pub(crate) fn new(msrs: &[u32], xsave_size: usize) -> Result<Self> {
        let entries: Vec<_> = msrs
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let too_many = |_| Error::Missing("room for the MSRs of a vCPU (too many)");
        let extra = xsave_size.saturating_sub(4096).div_ceil(size_of::<u32>());
        Ok(Scratch {
            msrs: Msrs::from_entries(&entries).map_err(too_many)?,
            xsave: Xsave::new(extra)
                .map_err(|_| Error::Missing("an XSAVE area of bearable size"))?,
            xsave_size,
            own: Vec::with_capacity(xsave_size.max(4096) + size_of_val(entries.as_slice()) + 4096),
            early: None,
        })
    }

    /// The vCPU is about to run, or its state to be set: what was saved ahead is over.
    pub(crate) fn runs(&mut self) {
        self.early = None;
    }
}

fn put<T: IntoBytes + Immutable>(
    out: &mut StateWriter<'_>,
    kind: Kind,
    index: u32,
    value: &T,
) -> Result<()> {
    Ok(out.block(kind as u16, VERSION, index, value.as_bytes())?)
}

/// Saves one vCPU, whose thread and all others are parked: GET_MP_STATE first, for it may deliver a pending INIT or
/// SIPI and so change everything else; then what only its own running changes, as it was saved when it parked, unless
/// that is not there or not true any more; GET_LAPIC and GET_VCPU_EVENTS last. Allocates nothing.
///
/// `alone`: the machine has no other vCPU, which could have sent it an INIT since. Returns whether it was idle: it waits
/// for an interrupt, or to be started.
pub(crate) fn save_vcpu(
    fd: &VcpuFd,
    scratch: &mut Scratch,
    index: u32,
    alone: bool,
    out: &mut StateWriter<'_>,
) -> Result<bool> {
    let mp_state = fd.get_mp_state().doing("KVM_GET_MP_STATE")?;
    put(out, Kind::MpState, index, &mp_state)?;
    let early = scratch.early.take();
    let stands = match early {
        None => false,
        Some(_) if alone => true,
        Some(early) => early.is_protected && fd.get_regs().doing("KVM_GET_REGS")? == early.regs,
    };
    if !stands {
        save_own(fd, scratch, index, None)?;
    }
    out.append(&scratch.own)?;
    put(
        out,
        Kind::Lapic,
        index,
        &fd.get_lapic().doing("KVM_GET_LAPIC")?,
    )?;
    put(
        out,
        Kind::Events,
        index,
        &fd.get_vcpu_events().doing("KVM_GET_VCPU_EVENTS")?,
    )?;
    Ok(mp_state.mp_state != KVM_MP_STATE_RUNNABLE)
}

/// Saves ahead what only the vCPU's own running changes, on its thread as it parks, while the others do the same: each
/// KVM_GET_* costs as much as ten copies of what it returns. `synced`: KVM_RUN, which has just returned, left the registers
/// in `kvm_run`.
///
/// What else could change it is an INIT that another vCPU has sent, which KVM_GET_MP_STATE delivers: [`save_vcpu`] finds that
/// out. A failure it finds out again.
pub(crate) fn save_ahead(fd: &VcpuFd, scratch: &mut Scratch, index: u32, synced: bool) {
    let run = synced.then(|| fd.sync_regs());
    scratch.early = save_own(fd, scratch, index, run).ok();
}

/// Replaces `scratch.own` by the blocks of what only the vCPU's own running changes.
fn save_own(
    fd: &VcpuFd,
    scratch: &mut Scratch,
    index: u32,
    synced: Option<kvm_sync_regs>,
) -> Result<Early> {
    let mut own = std::mem::take(&mut scratch.own);
    let saved = write_own(fd, scratch, index, synced, &mut StateWriter::new(&mut own));
    scratch.own = own;
    saved
}

fn write_own(
    fd: &VcpuFd,
    scratch: &mut Scratch,
    index: u32,
    synced: Option<kvm_sync_regs>,
    out: &mut StateWriter<'_>,
) -> Result<Early> {
    let (regs, sregs) = match synced {
        Some(run) => (run.regs, run.sregs),
        None => (
            fd.get_regs().doing("KVM_GET_REGS")?,
            fd.get_sregs().doing("KVM_GET_SREGS")?,
        ),
    };
    put(out, Kind::Regs, index, &regs)?;
    put(out, Kind::Sregs, index, &sregs)?;
    save_xsave(fd, scratch, index, out)?;
    put(
        out,
        Kind::Xcrs,
        index,
        &fd.get_xcrs().doing("KVM_GET_XCRS")?,
    )?;
    put(
        out,
        Kind::DebugRegs,
        index,
        &fd.get_debug_regs().doing("KVM_GET_DEBUGREGS")?,
    )?;
    let got = fd.get_msrs(&mut scratch.msrs).doing("KVM_GET_MSRS")?;
    let entries = scratch.msrs.as_slice();
    if let Some(refused) = entries.get(got) {
        return Err(Error::State(format!(
            "MSR {:#x} can't be read any more",
            refused.index
        )));
    }
    out.block(Kind::Msrs as u16, VERSION, index, entries.as_bytes())?;
    let offset = sys::tsc_offset(fd).doing("KVM_VCPU_TSC_OFFSET")?;
    put(out, Kind::TscOffset, index, &offset)?;
    Ok(Early {
        regs,
        is_protected: sregs.cr0 & CR0_PE != 0,
    })
}

fn save_xsave(
    fd: &VcpuFd,
    scratch: &mut Scratch,
    index: u32,
    out: &mut StateWriter<'_>,
) -> Result<()> {
    if scratch.xsave_size <= 4096 {
        let area = fd.get_xsave().doing("KVM_GET_XSAVE")?;
        return put(out, Kind::Xsave, index, &area.region);
    }
    // SAFETY: `scratch.xsave` was made with room for the whole area KVM told.
    unsafe { fd.get_xsave2(&mut scratch.xsave) }.doing("KVM_GET_XSAVE2")?;
    Ok(out.block(
        Kind::Xsave as u16,
        VERSION,
        index,
        xsave_bytes(&scratch.xsave),
    )?)
}

/// The whole area: the first 4096 bytes and what follows.
fn xsave_bytes(xsave: &Xsave) -> &[u8] {
    let whole: &kvm_xsave2 = xsave.as_fam_struct_ref();
    let len = 4096 + size_of_val(whole.as_slice());
    // SAFETY: the wrapper holds the 4096-byte area and, contiguous with it, its `extra` words.
    unsafe { std::slice::from_raw_parts(whole.xsave.region.as_ptr().cast(), len) }
}

fn xsave_bytes_mut(xsave: &mut Xsave) -> &mut [u8] {
    let len = xsave_bytes(xsave).len();
    // SAFETY: as in `xsave_bytes`, borrowed exclusively; words are only overwritten with words.
    unsafe {
        std::slice::from_raw_parts_mut(
            xsave.as_mut_fam_struct().xsave.region.as_mut_ptr().cast(),
            len,
        )
    }
}

/// Saves clock and interrupt chips: after every vCPU, CLOCK first.
pub(crate) fn save_vm(vm: &VmFd, tsc_khz: u32, out: &mut StateWriter<'_>) -> Result<()> {
    let clock = vm.get_clock().doing("KVM_GET_CLOCK")?;
    let paired = clock.flags & KVM_CLOCK_HOST_TSC != 0;
    let host_tsc = if paired {
        clock.host_tsc
    } else {
        sys::host_tsc()
    };
    let time = TimeBlock {
        clock_ns: clock.clock,
        host_tsc,
        tsc_khz,
        zero: 0,
    };
    put(out, Kind::Time, 0, &time)?;
    put(out, Kind::Pit, 0, &vm.get_pit2().doing("KVM_GET_PIT2")?)?;
    for chip_id in 0..=KVM_IRQCHIP_IOAPIC {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).doing("KVM_GET_IRQCHIP")?;
        // SAFETY: the union was zeroed and `dummy` spans all of it, so every byte is initialised.
        let bytes = unsafe { chip.chip.dummy };
        put(out, Kind::Irqchip, chip_id, &bytes)?;
    }
    Ok(())
}

/// Saved state, its CRCs checked, ready to be put back.
pub(crate) struct Saved<'a> {
    blocks: Vec<Block<'a>>,
}

impl<'a> Saved<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self> {
        let blocks = StateReader::new(bytes).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Saved { blocks })
    }

    fn bytes(&self, kind: Kind, index: u32) -> Result<&'a [u8]> {
        let mut found = self
            .blocks
            .iter()
            .filter(|b| b.kind == kind as u16 && b.index == index);
        match (found.next(), found.next()) {
            (Some(b), None) if b.version == VERSION => Ok(b.payload),
            (Some(b), None) => Err(Error::State(format!(
                "{kind:?} {index} has version {}, not {VERSION}",
                b.version
            ))),
            (None, _) => Err(Error::State(format!("{kind:?} {index} is missing"))),
            (Some(_), Some(_)) => Err(Error::State(format!("{kind:?} {index} comes twice"))),
        }
    }

    fn get<T: FromBytes>(&self, kind: Kind, index: u32) -> Result<T> {
        let bytes = self.bytes(kind, index)?;
        T::read_from_bytes(bytes).map_err(|_| {
            let (got, want) = (bytes.len(), size_of::<T>());
            Error::State(format!("{kind:?} {index} has {got} bytes, not {want}"))
        })
    }

    /// What the state is of.
    pub(crate) fn machine(&self) -> Result<MachineBlock> {
        self.get(Kind::Machine, 0)
    }

    fn time(&self) -> Result<CapturedTime> {
        let t: TimeBlock = self.get(Kind::Time, 0)?;
        Ok(CapturedTime {
            clock_ns: t.clock_ns,
            host_tsc: t.host_tsc,
            tsc_khz: t.tsc_khz,
        })
    }
}

pub(crate) fn save_machine(block: &MachineBlock, out: &mut StateWriter<'_>) -> Result<()> {
    put(out, Kind::Machine, 0, block)
}

/// The time since the capture, going on while the restore itself takes its time, so that TSCs and
/// clock, set one after the other, end up at the same guest time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elapsed {
    base: Duration,
    since: Instant,
}

impl Elapsed {
    pub(crate) fn from_now(base: Duration) -> Self {
        Elapsed {
            base,
            since: Instant::now(),
        }
    }

    fn now(&self) -> Duration {
        self.base.saturating_add(self.since.elapsed())
    }
}

/// Puts one vCPU's state back, in the order of rule 11. CPUID was set when the vCPU was made. REGS come
/// before EVENTS because SET_REGS clears pending exceptions; SREGS (APIC base) before LAPIC before
/// MSRS; TSC before MSRS, whose last is TSC_DEADLINE.
pub(crate) fn restore_vcpu(
    fd: &VcpuFd,
    scratch: &mut Scratch,
    index: u32,
    saved: &Saved<'_>,
    tsc_khz: u32,
    elapsed: Elapsed,
) -> Result<()> {
    scratch.early = None;
    let mp_state: kvm_mp_state = saved.get(Kind::MpState, index)?;
    fd.set_mp_state(mp_state).doing("KVM_SET_MP_STATE")?;
    let regs: kvm_regs = saved.get(Kind::Regs, index)?;
    fd.set_regs(&regs).doing("KVM_SET_REGS")?;
    let sregs: kvm_sregs = saved.get(Kind::Sregs, index)?;
    fd.set_sregs(&sregs).doing("KVM_SET_SREGS")?;
    restore_xsave(fd, scratch, index, saved)?;
    let xcrs: kvm_xcrs = saved.get(Kind::Xcrs, index)?;
    fd.set_xcrs(&xcrs).doing("KVM_SET_XCRS")?;
    let debug: kvm_debugregs = saved.get(Kind::DebugRegs, index)?;
    fd.set_debug_regs(&debug).doing("KVM_SET_DEBUGREGS")?;
    let lapic: kvm_lapic_state = saved.get(Kind::Lapic, index)?;
    fd.set_lapic(&lapic).doing("KVM_SET_LAPIC")?;
    restore_tsc(fd, index, saved, tsc_khz, elapsed)?;
    restore_msrs(fd, scratch, index, saved)?;
    let mut events: kvm_vcpu_events = saved.get(Kind::Events, index)?;
    events.flags &= !KVM_VCPUEVENT_VALID_SIPI_VECTOR; // never valid in what GET returns
    fd.set_vcpu_events(&events).doing("KVM_SET_VCPU_EVENTS")
}

fn restore_xsave(fd: &VcpuFd, scratch: &mut Scratch, index: u32, saved: &Saved<'_>) -> Result<()> {
    let bytes = saved.bytes(Kind::Xsave, index)?;
    let area = xsave_bytes_mut(&mut scratch.xsave);
    if bytes.len() != area.len() {
        let (got, want) = (bytes.len(), area.len());
        return Err(Error::State(format!(
            "Xsave {index} has {got} bytes, not {want}"
        )));
    }
    area.copy_from_slice(bytes);
    // SAFETY: `scratch.xsave` has as many bytes as this KVM said its area has.
    unsafe { fd.set_xsave2(&scratch.xsave) }.doing("KVM_SET_XSAVE")
}

fn restore_tsc(
    fd: &VcpuFd,
    index: u32,
    saved: &Saved<'_>,
    tsc_khz: u32,
    elapsed: Elapsed,
) -> Result<()> {
    let captured = saved.time()?;
    if !rates_compatible(captured.tsc_khz, tsc_khz) {
        fd.set_tsc_khz(captured.tsc_khz).map_err(|_| {
            let there = captured.tsc_khz;
            Error::State(format!(
                "its TSC ran at {there} kHz, this host's at {tsc_khz} kHz, and this CPU can't scale it"
            ))
        })?;
    }
    let offset: u64 = saved.get(Kind::TscOffset, index)?;
    // The two clocks are read close together, the TSC last: what passes between them is lost, never gained.
    let gone = elapsed.now();
    let offset = tsc_offset_after(&captured, offset, gone, sys::host_tsc());
    sys::set_tsc_offset(fd, offset).doing("KVM_VCPU_TSC_OFFSET")
}

fn restore_msrs(fd: &VcpuFd, scratch: &mut Scratch, index: u32, saved: &Saved<'_>) -> Result<()> {
    let bytes = saved.bytes(Kind::Msrs, index)?;
    let entries = scratch.msrs.as_mut_slice();
    let size = size_of::<kvm_msr_entry>();
    if bytes.len() != size_of_val(&*entries) {
        let (got, want) = (bytes.len() / size, entries.len());
        return Err(Error::State(format!(
            "vCPU {index} has {got} MSRs, not {want}"
        )));
    }
    for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(size)) {
        let read = kvm_msr_entry::read_from_bytes(bytes)
            .map_err(|_| Error::State(format!("MSRs of vCPU {index} are malformed")))?;
        if read.index != entry.index {
            let (got, want) = (read.index, entry.index);
            return Err(Error::State(format!(
                "vCPU {index} has MSR {got:#x} in place of {want:#x}"
            )));
        }
        entry.data = read.data;
    }
    let set = fd.set_msrs(&scratch.msrs).doing("KVM_SET_MSRS")?;
    match scratch.msrs.as_slice().get(set) {
        Some(e) => Err(Error::State(format!(
            "MSR {:#x} = {:#x} is refused here",
            e.index, e.data
        ))),
        None => Ok(()),
    }
}

/// Puts clock and interrupt chips back: after every vCPU, before the devices.
pub(crate) fn restore_vm(vm: &VmFd, saved: &Saved<'_>, elapsed: Elapsed) -> Result<()> {
    let pit: kvm_pit_state2 = saved.get(Kind::Pit, 0)?;
    vm.set_pit2(&pit).doing("KVM_SET_PIT2")?;
    // Flags stay clear: with KVM_CLOCK_REALTIME KVM would advance the clock once more, by wall time.
    let clock = clock_after(&saved.time()?, elapsed.now());
    vm.set_clock(&kvm_clock_data {
        clock,
        ..Default::default()
    })
    .doing("KVM_SET_CLOCK")?;
    for chip_id in 0..=KVM_IRQCHIP_IOAPIC {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        chip.chip.dummy = saved.get(Kind::Irqchip, chip_id)?;
        vm.set_irqchip(&chip).doing("KVM_SET_IRQCHIP")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
