//! What this side says of itself when a pair is formed.

use ax_api::process::Spec;
use ax_wire::Session;
use ax_wire::hello::{CpuidLeaf, Hello, HostCaps, KvmCap, Machine, Role, VmHello};
use sha2::{Digest, Sha256};

/// What the machine can use of this host, in the handshake's words.
fn caps(of: &vmm::HostCaps) -> HostCaps {
    HostCaps {
        cpuid: of
            .cpuid
            .iter()
            .map(|leaf| {
                let [eax, ebx, ecx, edx] = leaf.registers;
                CpuidLeaf {
                    function: leaf.function,
                    index: leaf.index,
                    eax,
                    ebx,
                    ecx,
                    edx,
                }
            })
            .collect(),
        msrs: of.msrs.clone(),
        tsc_khz: of.tsc_khz,
        kvm_caps: of
            .extensions
            .iter()
            .map(|(name, value)| KvmCap {
                name: name.clone(),
                value: u64::try_from(*value).unwrap_or(0),
            })
            .collect(),
        page_size: u32::try_from(of.page_size).unwrap_or(u32::MAX),
        xsave_size: of.xsave_size,
    }
}

/// A digest of everything about the guest's devices that both sides must have alike.
fn devices(spec: &Spec) -> [u8; 32] {
    let mut hash = Sha256::new();
    for nic in &spec.vm.nics {
        hash.update(b"nic");
        hash.update(nic.mac);
        // Said only where it says something: a build from before it has devices without.
        if nic.offload {
            hash.update(b"offload");
        }
    }
    for disk in &spec.vm.disks {
        hash.update(b"disk");
        hash.update(disk.size.to_le_bytes());
        hash.update([u8::from(disk.read_only)]);
    }
    hash.finalize().into()
}

/// This side's hello.
pub fn hello(spec: &Spec, of: &vmm::HostCaps, session: Session, role: Role) -> Hello {
    let machine = Machine {
        memory_bytes: spec.vm.memory,
        vcpus: spec.vm.cpus.into(),
        devices: devices(spec),
    };
    Hello::ours(
        spec.host.clone(),
        caps(of),
        Some(VmHello {
            session,
            role,
            machine,
        }),
    )
}
