//! What a host can give a guest, told to the peer at pairing: a pair that could not fail over is
//! refused there, by name, and not found out when it matters.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_XSAVE2,
    KVM_MAX_CPUID_ENTRIES, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::clock::rates_compatible;
use crate::cpuid::{self, Unusable};
use crate::error::{Doing, Error, Result};
use crate::{msrs, sys};

/// One CPUID leaf, as a guest sees it (apart from what differs per vCPU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, where it matters.
    pub index: u32,
    /// KVM's flags (bit 0: the index matters).
    pub flags: u32,
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

/// What this host's KVM gives a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCaps {
    /// CPUID leaves offered.
    pub cpuid: Vec<CpuidLeaf>,
    /// Model-specific registers saved, in order of restore.
    pub msrs: Vec<u32>,
    /// TSC rate, kHz.
    pub tsc_khz: u32,
    /// KVM extensions used, by name; values as KVM tells them where both sides must agree.
    pub extensions: Vec<(String, i32)>,
    /// Bytes of a page.
    pub page_size: u64,
    /// Bytes of a vCPU's XSAVE area.
    pub xsave_size: u32,
    /// Most bytes of a dirty ring here, 0 without. The hosts may differ.
    pub dirty_ring_bytes: u32,
    /// Whether the dirty bitmap can be cleared page by page. The hosts may differ.
    pub manual_protect: bool,
    /// Whether TSC offsets can be set per vCPU.
    pub tsc_offset: bool,
}

/// Extensions a machine can't do without, and how to name them.
const REQUIRED: &[(Cap, &str)] = &[
    (
        Cap::Irqchip,
        "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
    ),
    (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "interrupts by file descriptor (KVM_CAP_IRQFD)"),
    (
        Cap::Ioeventfd,
        "doorbells by file descriptor (KVM_CAP_IOEVENTFD)",
    ),
    (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::AdjustClock, "setting the clock (KVM_CAP_ADJUST_CLOCK)"),
    (Cap::MpState, "vCPU run state (KVM_CAP_MP_STATE)"),
    (Cap::VcpuEvents, "pending events (KVM_CAP_VCPU_EVENTS)"),
    (Cap::Xsave, "the XSAVE area (KVM_CAP_XSAVE)"),
    (Cap::Xcrs, "extended control registers (KVM_CAP_XCRS)"),
    (Cap::Debugregs, "debug registers (KVM_CAP_DEBUGREGS)"),
    (Cap::GetTscKhz, "the TSC rate (KVM_CAP_GET_TSC_KHZ)"),
    (
        Cap::ImmediateExit,
        "leaving KVM_RUN at once (KVM_CAP_IMMEDIATE_EXIT)",
    ),
];

/// What rules 11 and 4 need beyond that, as a machine's configuration asks for it.
pub(crate) const TSC_OFFSETS: &str = "setting TSC offsets (KVM_VCPU_TSC_OFFSET)";
pub(crate) const MANUAL_PROTECT: &str = "manual protect (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)";

/// Opens KVM and checks that it has everything a machine needs.
pub(crate) fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| Error::NoKvm(std::io::Error::from_raw_os_error(e.errno())))?;
    if kvm.get_api_version() != 12 {
        return Err(Error::Missing("API version 12"));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Missing(name)),
        None => Ok(kvm),
    }
}

impl HostCaps {
    /// Asks KVM, on a throw-away virtual machine. Takes some milliseconds.
    ///
    /// # Errors
    /// When KVM can't be used or lacks something indispensable; the error names it.
    pub fn probe() -> Result<HostCaps> {
        let kvm = open()?;
        let vm = kvm.create_vm().doing("KVM_CREATE_VM")?;
        vm.set_tss_address(crate::vm::TSS_ADDRESS)
            .doing("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().doing("KVM_CREATE_IRQCHIP")?;
        let vcpu = vm.create_vcpu(0).doing("KVM_CREATE_VCPU")?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let everything = cpuid::common(&kvm, Unusable::default(), deadline)?;
        vcpu.set_cpuid2(&cpuid::of_vcpu(&everything, 0, 1)?)
            .doing("KVM_SET_CPUID2")?;
        let msrs = msrs::probe(&kvm, &vcpu)?;
        let unusable = Unusable {
            pcid: !accepts_pcid(&vcpu),
            arch_capabilities: !msrs.contains(&0x10a),
        };
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let mut extensions: Vec<_> = REQUIRED
            .iter()
            .map(|(cap, _)| (format!("{cap:?}"), 1))
            .collect();
        extensions.push(("TscDeadlineTimer".into(), deadline.into()));
        Ok(HostCaps {
            cpuid: cpuid::common(&kvm, unusable, deadline)?
                .iter()
                .map(CpuidLeaf::from)
                .collect(),
            msrs,
            tsc_khz: vcpu.get_tsc_khz().doing("KVM_GET_TSC_KHZ")?,
            extensions,
            // SAFETY: sysconf with a valid name.
            page_size: unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs(),
            xsave_size: u32::try_from(xsave2.max(4096)).unwrap_or(4096),
            dirty_ring_bytes: raw_extension(&kvm, KVM_CAP_DIRTY_LOG_RING),
            manual_protect: raw_extension(&kvm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & 1 == 1,
            tsc_offset: sys::tsc_offset(&vcpu).is_ok(),
        })
    }

    /// What a VM with the default dirty tracking needs and this KVM lacks, by name.
    pub fn lacking(&self) -> Option<&'static str> {
        match self {
            HostCaps {
                tsc_offset: false, ..
            } => Some(TSC_OFFSETS),
            HostCaps {
                manual_protect: false,
                ..
            } => Some(MANUAL_PROTECT),
            _ => None,
        }
    }

    /// What would keep a guest from moving between this host and `peer`, one line each; empty
    /// when nothing does. Dirty tracking is each host's own affair.
    pub fn differences(&self, peer: &HostCaps) -> Vec<String> {
        let mut found = Vec::new();
        let mut differ = |what: &str, here: String, there: String| {
            if here != there {
                found.push(format!("{what}: {here} here, {there} on the peer"));
            }
        };
        differ(
            "page size",
            self.page_size.to_string(),
            peer.page_size.to_string(),
        );
        differ(
            "XSAVE area, bytes",
            self.xsave_size.to_string(),
            peer.xsave_size.to_string(),
        );
        differ(
            "TSC offsets settable",
            self.tsc_offset.to_string(),
            peer.tsc_offset.to_string(),
        );
        for (name, value) in &self.extensions {
            let there = peer
                .extensions
                .iter()
                .find(|(n, _)| n == name)
                .map_or(0, |(_, v)| *v);
            differ(
                &format!("KVM extension {name}"),
                value.to_string(),
                there.to_string(),
            );
        }
        if !rates_compatible(self.tsc_khz, peer.tsc_khz) {
            found.push(format!(
                "TSC rate: {} kHz here, {} kHz on the peer (more than 250 ppm apart)",
                self.tsc_khz, peer.tsc_khz
            ));
        }
        let missing = |a: &[u32], b: &[u32]| -> Vec<String> {
            a.iter()
                .filter(|m| !b.contains(m))
                .map(|m| format!("{m:#x}"))
                .collect()
        };
        let (lacks, extra) = (
            missing(&self.msrs, &peer.msrs),
            missing(&peer.msrs, &self.msrs),
        );
        if !lacks.is_empty() {
            found.push(format!("MSRs only here: {}", lacks.join(" ")));
        }
        if !extra.is_empty() {
            found.push(format!("MSRs only on the peer: {}", extra.join(" ")));
        }
        self.compare_cpuid(peer, &mut found);
        found
    }

    fn compare_cpuid(&self, peer: &HostCaps, found: &mut Vec<String>) {
        let name = |l: &CpuidLeaf| format!("CPUID leaf {:#x} index {:#x}", l.function, l.index);
        let key = |l: &CpuidLeaf| (l.function, l.index);
        for here in &self.cpuid {
            match peer.cpuid.iter().find(|l| key(l) == key(here)) {
                None => found.push(format!("{}: only here", name(here))),
                Some(there) if there.registers != here.registers => found.push(format!(
                    "{}: {:08x?} here, {:08x?} on the peer",
                    name(here),
                    here.registers,
                    there.registers
                )),
                Some(_) => {}
            }
        }
        let only_there = |l: &&CpuidLeaf| !self.cpuid.iter().any(|here| key(here) == key(l));
        peer.cpuid.iter().filter(only_there).for_each(|l| {
            found.push(format!("{}: only on the peer", name(l)));
        });
    }

    /// The leaves as KVM takes them.
    pub(crate) fn leaves(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        if self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(Error::Missing(
                "room for the CPUID leaves of a vCPU (too many)",
            ));
        }
        Ok(self.cpuid.iter().map(CpuidLeaf::entry).collect())
    }
}

impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        let registers = [e.eax, e.ebx, e.ecx, e.edx];
        CpuidLeaf {
            function: e.function,
            index: e.index,
            flags: e.flags,
            registers,
        }
    }
}

impl CpuidLeaf {
    fn entry(&self) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = self.registers;
        let (function, index, flags) = (self.function, self.index, self.flags);
        kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }
}

fn raw_extension(kvm: &Kvm, cap: u32) -> u32 {
    kvm.check_extension_raw(cap.into()).max(0).unsigned_abs()
}

/// Whether SET_SREGS takes CR4.PCIDE in long mode, as a restore would.
fn accepts_pcid(vcpu: &VcpuFd) -> bool {
    let Ok(before) = vcpu.get_sregs() else {
        return false;
    };
    let mut with = before;
    with.cr0 |= 0x8000_0001;
    with.efer |= 0x500;
    with.cr4 |= 0x20 | 1 << 17;
    with.cs.l = 1;
    with.cs.db = 0;
    let accepted =
        vcpu.set_sregs(&with).is_ok() && vcpu.get_sregs().is_ok_and(|s| s.cr4 == with.cr4);
    accepted && vcpu.set_sregs(&before).is_ok()
}

/// Bytes of a vCPU's saved XSAVE area on this KVM.
pub(crate) fn xsave_size(vm: &kvm_ioctls::VmFd) -> usize {
    let size = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
    usize::try_from(size).unwrap_or(0).max(4096)
}

/// Whether KVM_RUN can leave general and system registers where no call is needed to read them.
pub(crate) fn syncs_registers(vm: &kvm_ioctls::VmFd) -> bool {
    let wanted = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as i32;
    vm.check_extension_int(Cap::SyncRegs) & wanted == wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps() -> HostCaps {
        let leaf = |function, eax| CpuidLeaf {
            function,
            index: 0,
            flags: 0,
            registers: [eax; 4],
        };
        HostCaps {
            cpuid: vec![leaf(0, 1), leaf(1, 2)],
            msrs: vec![0x174, 0xc000_0080],
            tsc_khz: 2_000_000,
            extensions: vec![("Irqfd".into(), 1)],
            page_size: 4096,
            xsave_size: 4096,
            dirty_ring_bytes: 65536,
            manual_protect: true,
            tsc_offset: true,
        }
    }

    #[test]
    fn what_is_lacking_is_named() {
        assert_eq!(caps().lacking(), None);
        let mut without_rings = caps();
        without_rings.dirty_ring_bytes = 0; // the bitmap does
        assert_eq!(without_rings.lacking(), None);
        let mut other = caps();
        other.manual_protect = false;
        assert!(
            other
                .lacking()
                .unwrap()
                .contains("MANUAL_DIRTY_LOG_PROTECT2")
        );
        other.tsc_offset = false;
        assert!(other.lacking().unwrap().contains("TSC_OFFSET"));
    }

    #[test]
    fn equal_hosts_have_no_differences() {
        let mut peer = caps();
        peer.dirty_ring_bytes = 0; // each host's own affair
        peer.tsc_khz += 100;
        assert_eq!(caps().differences(&peer), Vec::<String>::new());
    }

    #[test]
    fn each_difference_is_named_from_both_sides() {
        let mut peer = caps();
        peer.cpuid[1].registers[2] ^= 1;
        peer.cpuid.push(CpuidLeaf {
            function: 7,
            index: 0,
            flags: 1,
            registers: [0; 4],
        });
        peer.msrs.remove(0);
        peer.tsc_khz = 3_000_000;
        peer.xsave_size = 8192;
        peer.extensions.clear();
        for found in [caps().differences(&peer), peer.differences(&caps())] {
            let all = found.join("\n");
            for word in ["leaf 0x1 ", "leaf 0x7 ", "0x174", "TSC rate", "XSAVE"] {
                assert!(all.contains(word), "{word} not named in:\n{all}");
            }
        }
        assert!(
            caps()
                .differences(&peer)
                .iter()
                .any(|d| d.contains("Irqfd"))
        );
    }
}
