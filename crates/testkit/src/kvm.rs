//! Is KVM usable here? Tests ask through [`require_kvm!`](crate::require_kvm), the demo asks
//! [`usable`] and tells the user how to get it.

use kvm_ioctls::Kvm;

/// The only KVM API version there has ever been since 2007 (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;

/// Why KVM cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct NoKvm {
    /// What was tried and what the kernel answered.
    pub why: String,
    /// What the user can do.
    pub remedy: String,
}

/// Opens `/dev/kvm`, checks the API version and creates (and drops) a VM.
///
/// # Errors
/// What failed and how to get a usable KVM.
pub fn usable() -> Result<(), NoKvm> {
    let kvm = Kvm::new().map_err(|e| {
        let remedy = match e.errno() {
            libc::ENOENT => {
                "load the module (modprobe kvm_intel, or kvm_amd), enable VT-x or AMD-V in the \
                 firmware, or inside a VM enable nested virtualisation on its host"
            }
            libc::EACCES | libc::EPERM => {
                "give this user access: usermod -aG kvm $USER and log in again, or run as root"
            }
            libc::EBUSY => "another hypervisor holds the CPU's virtualisation; stop it",
            _ => "see dmesg for why the kernel refuses /dev/kvm",
        };
        NoKvm {
            why: format!("cannot open /dev/kvm: {e}"),
            remedy: remedy.into(),
        }
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(NoKvm {
            why: format!("/dev/kvm speaks API version {version}, not {KVM_API_VERSION}"),
            remedy: "use the KVM of a current Linux kernel".into(),
        });
    }
    // Creating a VM may be interrupted by a signal without any fault of its own.
    for _ in 0..10 {
        match kvm.create_vm() {
            Ok(_) => return Ok(()),
            Err(e) if e.errno() == libc::EINTR => continue,
            Err(e) => {
                return Err(NoKvm {
                    why: format!("/dev/kvm opens but creates no VM: {e}"),
                    remedy: "see dmesg; memory or a limit (RLIMIT_MEMLOCK, cgroup) may be short"
                        .into(),
                });
            }
        }
    }
    Err(NoKvm {
        why: "creating a VM was interrupted ten times".into(),
        remedy: "try again".into(),
    })
}

/// Returns from the calling test, listed as skipped, when KVM cannot be used here.
#[macro_export]
macro_rules! require_kvm {
    () => {
        if let Err(no) = $crate::kvm::usable() {
            $crate::skip::report("no usable KVM", &no.why, &$crate::skip::test_name());
            return;
        }
    };
}
