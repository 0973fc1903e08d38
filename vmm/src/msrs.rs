//! Which model-specific registers are saved: those KVM lists, that this machine's CPUID gives a
//! guest reason to use, and that this KVM lets us read *and* write back.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::{Doing, Error, Result};

/// Restored last: an armed deadline is compared with the TSC, which must be right by then.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
const STAR: u32 = 0xc000_0081;

/// Registers that are not saved, as first..=last.
const LEFT_OUT: &[(u32, u32)] = &[
    (0x10, 0x10),               // TSC: by KVM_VCPU_TSC_OFFSET, never by MSR write (rule 11)
    (0x11, 0x12),               // kvmclock's old numbers, aliases of the new ones
    (0x3a, 0x3a),               // FEATURE_CONTROL: VMX and SGX, not offered
    (0xc1, 0xc8),               // performance counters: the guest has no PMU
    (0x186, 0x18d),             //
    (0x309, 0x30c),             //
    (0x345, 0x345),             //
    (0x38d, 0x391),             //
    (0x3f1, 0x3f2),             //
    (0x480, 0x492),             // VMX: not offered
    (0x4c1, 0x4c8),             // performance counters
    (0x560, 0x587),             // processor trace: not offered
    (0x6a0, 0x6a8),             // shadow stacks: not offered
    (0x14ce, 0x14cf),           // last branch records
    (0x1500, 0x151f),           //
    (0x1600, 0x161f),           //
    (0x4000_0000, 0x4000_ffff), // Hyper-V: not offered
    // Writing the wall clock's address makes KVM write the time there, into guest memory; a guest
    // that wants the time writes it itself, each time.
    (0x4b56_4d00, 0x4b56_4d00),
    (0x4b56_4d02, 0x4b56_4d04), // asynchronous page faults, steal time, EOI: not offered
    (0x4b56_4d06, 0x4b56_4d08), //
    (0xc001_0000, 0xc001_0007), // AMD performance counters
    (0xc001_0200, 0xc001_020b), //
    (0xc000_0300, 0xc000_0303), //
    (0xc001_0114, 0xc001_0114), // VM_CR: SVM, not offered
    (0xc001_0117, 0xc001_0117), // VM_HSAVE_PA
];

/// Finds the registers to save, ascending except that TSC_DEADLINE is last, by reading each
/// and writing it back on a throw-away vCPU that already has its CPUID.
///
/// # Errors
/// When KVM does not tell its list, or refuses what no guest can live without.
pub(crate) fn probe(kvm: &Kvm, scratch: &VcpuFd) -> Result<Vec<u32>> {
    let listed = kvm.get_msr_index_list().doing("KVM_GET_MSR_INDEX_LIST")?;
    let mut wanted: Vec<u32> = listed.as_slice().to_vec();
    wanted.sort_unstable();
    wanted.dedup();
    wanted.retain(|msr| {
        !LEFT_OUT
            .iter()
            .any(|(first, last)| (first..=last).contains(&msr))
    });
    let (works, refused): (Vec<u32>, Vec<u32>) = wanted
        .into_iter()
        .partition(|msr| reads_and_writes_back(scratch, *msr));
    tracing::debug!(saved = works.len(), refused = ?refused, "model-specific registers");
    if !works.contains(&STAR) {
        return Err(Error::Missing("reading and writing MSR STAR"));
    }
    let (last, mut msrs): (Vec<u32>, Vec<u32>) =
        works.into_iter().partition(|msr| *msr == TSC_DEADLINE);
    msrs.extend(last);
    Ok(msrs)
}

fn reads_and_writes_back(vcpu: &VcpuFd, index: u32) -> bool {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let Ok(mut one) = Msrs::from_entries(&[entry]) else {
        return false;
    };
    matches!(vcpu.get_msrs(&mut one), Ok(1)) && matches!(vcpu.set_msrs(&one), Ok(1))
}
