//! `ax-vmm --selfcheck`: does this host's KVM keep what a protected VM builds on?
//!
//! Each check is said as soon as it is done. The first that fails decides the exit code; the later
//! ones are tried all the same, but none without a usable KVM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::check::Check;
use ax_api::host::Code;
use vmm::selfcheck::payload::Mode;
use vmm::selfcheck::rig::{self, BITMAP, RING, Silence};
use vmm::selfcheck::{Fault, dirty, moves};
use vmm::{DirtyTracking, HostCaps, Machine};

use crate::error::Error;

/// Times the guest is moved to a fresh machine.
const MOVES: usize = 10;

/// Epochs after which all memory is compared.
const EPOCHS: usize = 60;

const VCPUS: u8 = 2;

/// Runs every check and prints each; the exit code.
pub fn run(json: bool) -> u8 {
    let mut worst = 0;
    let mut say = |check: Check| {
        check.print(json);
        if worst == 0 {
            worst = u8::try_from(check.code).unwrap_or(1);
        }
        check.ok
    };
    match HostCaps::probe() {
        Err(error) => {
            say(Check::bad("kvm", Code::NotHere, error.to_string()));
        }
        Ok(caps) => {
            if say(kvm(&caps)) {
                say(save_and_restore(&caps));
                say(exact("dirty bitmap", BITMAP, &caps));
                say(match caps.dirty_ring_bytes {
                    0 => Check::ok("dirty ring", "this KVM has none; VMs use the bitmap"),
                    _ => exact("dirty ring", RING, &caps),
                });
            }
        }
    }
    worst
}

/// Whether KVM has what a VM needs.
fn kvm(caps: &HostCaps) -> Check {
    match caps.lacking() {
        Some(what) => Check::bad(
            "kvm",
            Code::NotHere,
            format!("this KVM lacks {what}; use a current Linux kernel"),
        ),
        None => {
            let (mhz, leaves, msrs) = (caps.tsc_khz / 1000, caps.cpuid.len(), caps.msrs.len());
            let found = format!("usable: TSC {mhz} MHz, {leaves} CPUID leaves, {msrs} MSRs saved");
            Check::ok("kvm", found)
        }
    }
}

fn save_and_restore(caps: &HostCaps) -> Check {
    let begun = Instant::now();
    let moved = moves::work_survives(caps, MOVES, |_, _| {});
    verdict("save and restore", moved, begun, |done| {
        format!(
            "a guest moved {MOVES} times into fresh machines did its {} steps as if undisturbed",
            done.steps
        )
    })
}

fn exact(name: &str, how: DirtyTracking, caps: &HostCaps) -> Check {
    let begun = Instant::now();
    let config = rig::config(Mode::Dirty, VCPUS, 0, how);
    let silence: Arc<Silence> = Arc::default();
    let found = rig::booted(caps, &config, silence)
        .map_err(Fault::from)
        .and_then(|mut machine| dirty::exactness(&mut machine, VCPUS, EPOCHS, Machine::harvest));
    verdict(name, found, begun, |found| {
        format!(
            "exact: {} dirty pages in {} epochs, all memory compared after each",
            found.pages, found.epochs
        )
    })
}

fn verdict<T>(
    name: &str,
    found: Result<T, Fault>,
    begun: Instant,
    say: impl FnOnce(T) -> String,
) -> Check {
    match found {
        Ok(found) => {
            let took = Duration::from_millis(begun.elapsed().as_millis() as u64);
            Check::ok(name, format!("{} ({took:?})", say(found)))
        }
        Err(Fault::Machine(error)) => {
            let error = Error::Machine(error);
            let code = Code::of_process(error.code().into());
            Check::bad(name, code, error.to_string())
        }
        Err(fault) => Check::bad(
            name,
            Code::NotHere,
            format!("{fault}; this host's KVM can't be relied on: use another kernel or host"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_says_what_to_do_and_asks_for_its_exit_code() {
        let verdict = |fault| verdict("x", Err::<(), _>(fault), Instant::now(), |()| String::new());
        let missed = verdict(Fault::Missed {
            epoch: 7,
            pages: vec![0x801],
        });
        assert_eq!((missed.ok, missed.code), (false, 3));
        assert!(missed.detail.contains("0x801000"), "{}", missed.detail);
        assert!(
            missed.detail.contains("another kernel"),
            "{}",
            missed.detail
        );
        let memory = verdict(Fault::Machine(vmm::Error::Ram {
            bytes: 16 << 20,
            source: std::io::ErrorKind::OutOfMemory.into(),
        }));
        assert_eq!(memory.code, i32::from(Code::Memory.exit()));
    }
}
