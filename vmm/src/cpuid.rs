//! The CPUID a guest sees: what KVM supports, less what can't be saved, plus the topology. Nothing
//! in it depends on the process or on the CPU that happened to answer.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::error::{Doing, Error, Result};

/// Which features the probe found unusable on this KVM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unusable {
    /// SET_SREGS refuses CR4.PCIDE, so a guest that set it could not be restored.
    pub(crate) pcid: bool,
    /// MSR ARCH_CAPABILITIES can't be written back.
    pub(crate) arch_capabilities: bool,
}

/// kvmclock (old and new registers, stable), no I/O delay, PV unhalt, PV IPIs, yield. Not:
/// asynchronous page faults, steal time and what needs it, EOI in memory: their state hides in
/// places that are not saved, or dirties pages in every epoch.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 7 | 1 << 11 | 1 << 13 | 1 << 24;

/// What KVM supports, filtered; the same for every vCPU.
pub(crate) fn common(
    kvm: &Kvm,
    unusable: Unusable,
    deadline_timer: bool,
) -> Result<Vec<kvm_cpuid_entry2>> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .doing("KVM_GET_SUPPORTED_CPUID")?;
    let mut leaves: Vec<_> = supported.as_slice().to_vec();
    leaves.retain_mut(|leaf| keep(leaf, unusable, deadline_timer));
    leaves.sort_by_key(|l| (l.function, l.index));
    if !leaves.iter().any(|l| l.function == 1) {
        return Err(Error::Missing("CPUID leaf 1"));
    }
    Ok(leaves)
}

/// Masks a leaf; false drops it.
fn keep(leaf: &mut kvm_cpuid_entry2, unusable: Unusable, deadline_timer: bool) -> bool {
    let clear = |register: &mut u32, bits: &[u32]| bits.iter().for_each(|b| *register &= !(1 << b));
    match leaf.function {
        1 => {
            // VMX and SMX, PDCM; OSXSAVE is KVM's to set; APIC id and count are set per vCPU.
            clear(&mut leaf.ecx, &[5, 6, 15, 27]);
            if unusable.pcid {
                clear(&mut leaf.ecx, &[17]);
            }
            leaf.ecx |= 1 << 31; // hypervisor present
            if deadline_timer {
                leaf.ecx |= 1 << 24;
            }
            clear(&mut leaf.edx, &[21]); // debug store
            leaf.ebx &= 0x0000_ffff;
        }
        // Topology is set per vCPU; what KVM says here is of the host's CPU that answered.
        4 | 0x8000_001d => leaf.eax &= 0x3fff,
        0x8000_0008 => leaf.ecx &= !0xf0ff,
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        7 if leaf.index == 0 => {
            clear(&mut leaf.ebx, &[2, 25]); // SGX, processor trace
            clear(&mut leaf.ecx, &[7, 30]); // shadow stacks, SGX launch control
            clear(&mut leaf.edx, &[19, 20, 22, 24, 25]); // arch LBR, IBT, AMX
            if unusable.pcid {
                clear(&mut leaf.ebx, &[10]); // INVPCID
            }
            if unusable.arch_capabilities {
                clear(&mut leaf.edx, &[29]);
            }
        }
        0xd if leaf.index == 1 => {
            clear(&mut leaf.ecx, &[8, 11, 12, 15]); // trace, shadow stack and LBR state
        }
        // PMU; processor trace, SGX, LBR, AMX tiles; newer topology (0xb says it); TSC and bus
        // rates of this very host.
        0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0xb | 0x12 | 0x14 | 0x15 | 0x16 | 0x1c | 0x1d | 0x1e | 0x1f | 0x23 | 0x24 => return false,
        0x4000_0000 => leaf.eax = 0x4000_0001,
        0x4000_0001 => {
            leaf.eax &= KVM_FEATURES;
            leaf.edx = 0;
        }
        0x4000_0002..=0x4fff_ffff => return false,
        0x8000_0001 => clear(&mut leaf.ecx, &[2, 10, 23, 24, 28]), // SVM, IBS, counters
        // SVM, IBS, memory encryption, AMD's newer PMU and topology
        0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022 | 0x8000_0026 => return false,
        _ => {}
    }
    true
}

/// The leaves of vCPU `index` of `vcpus`: the common ones with its APIC id and the topology: one
/// socket, one thread per core.
pub(crate) fn of_vcpu(common: &[kvm_cpuid_entry2], index: u8, vcpus: u8) -> Result<CpuId> {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    let shift = count.next_power_of_two().trailing_zeros();
    let mut leaves: Vec<_> = common.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            1 => {
                leaf.ebx = (leaf.ebx & 0xffff) | count << 16 | id << 24;
                leaf.edx = if count > 1 {
                    leaf.edx | 1 << 28
                } else {
                    leaf.edx & !(1 << 28)
                };
            }
            4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
                // caches up to level 2 belong to one vCPU, the last level to all
                let level = (leaf.eax >> 5) & 7;
                let sharing = if level >= 3 { (1 << shift) - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | sharing << 14;
                if leaf.function == 4 {
                    leaf.eax |= ((1 << shift) - 1) << 26; // cores of the package
                }
            }
            0x8000_0008 => leaf.ecx = (leaf.ecx & !0xf0ff) | shift << 12 | (count - 1),
            0x8000_001e => {
                (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0);
            }
            _ => {}
        }
    }
    let significant = 1; // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    let level = |index: u32, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: significant,
        eax,
        ebx,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    leaves.extend([level(0, 0, 1, 1), level(1, shift, count, 2)]);
    CpuId::from_entries(&leaves)
        .map_err(|_| Error::Missing("room for the CPUID leaves of a vCPU (too many)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        let (eax, ebx, ecx, edx) = (value, value, value, value);
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn what_cannot_be_saved_is_not_offered() {
        let all = Unusable {
            pcid: true,
            arch_capabilities: true,
        };
        let mut one = leaf(1, 0, u32::MAX);
        assert!(keep(&mut one, all, false));
        for bit in [5, 6, 15, 17] {
            assert_eq!(one.ecx >> bit & 1, 0, "leaf 1 ECX bit {bit}");
        }
        let mut seven = leaf(7, 0, u32::MAX);
        assert!(keep(&mut seven, all, false));
        assert_eq!(
            (seven.ebx >> 10 & 1, seven.ecx >> 7 & 1, seven.edx >> 29 & 1),
            (0, 0, 0)
        );
        let mut kvm = leaf(0x4000_0001, 0, u32::MAX);
        assert!(keep(&mut kvm, all, false));
        assert_eq!(kvm.eax, KVM_FEATURES);
        assert!(!keep(&mut leaf(0x1f, 0, 1), all, false));
    }

    #[test]
    fn nothing_tells_the_host_cpu_that_answered() {
        let mut here = leaf(1, 0, 0x0123_4567);
        let mut there = leaf(1, 0, 0x0123_4567);
        there.ebx ^= 0x0700_0000; // another APIC id
        for leaf in [&mut here, &mut there] {
            assert!(keep(leaf, Unusable::default(), true));
        }
        assert_eq!(here, there);
        assert!(!keep(&mut leaf(0xb, 0, 5), Unusable::default(), true));
    }

    #[test]
    fn every_vcpu_has_its_own_id_everywhere_and_the_same_features() {
        let common = [
            leaf(1, 0, 0xabcd),
            leaf(4, 3, 0x7c),
            leaf(4, 4, 0),
            leaf(0x8000_001e, 0, 0),
        ];
        for vcpus in 1..=8u8 {
            for index in 0..vcpus {
                let leaves = of_vcpu(&common, index, vcpus).unwrap();
                let find = |function, index| {
                    *leaves
                        .as_slice()
                        .iter()
                        .find(|l| (l.function, l.index) == (function, index))
                        .unwrap()
                };
                let id = u32::from(index);
                assert_eq!(find(1, 0).ebx, 0xabcd | u32::from(vcpus) << 16 | id << 24);
                assert_eq!((find(0xb, 0).edx, find(0xb, 1).edx), (id, id));
                assert_eq!(find(0xb, 1).ebx, u32::from(vcpus));
                assert!(1u32 << find(0xb, 1).eax >= u32::from(vcpus));
                assert_eq!(find(0x8000_001e, 0).eax, id);
                assert_eq!(
                    find(4, 4).eax,
                    0,
                    "the end of the list of caches stays the end"
                );
                assert_eq!(find(1, 0).ecx, 0xabcd);
            }
        }
    }
}
