//! What is saved ahead, against what becomes of the vCPU before all are parked.

use kvm_bindings::{KVM_MP_STATE_INIT_RECEIVED, KVM_VCPUEVENT_VALID_SMM};
use kvm_ioctls::VmFd;

use super::*;
use crate::caps::{self, HostCaps};

const RIP: u64 = 0x1234;

/// A vCPU in protected mode that does not run, of a machine of two; and its machine. None without KVM.
fn vcpu() -> Option<(VmFd, VcpuFd, Scratch)> {
    let host = match HostCaps::probe() {
        Ok(host) => host,
        Err(e) => {
            // Anything else is a finding, not a reason to skip.
            assert!(matches!(e, Error::NoKvm(_)), "{e}");
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            eprintln!("SKIPPED (no usable KVM): {name}: {e}");
            return None;
        }
    };
    let vm = caps::open().unwrap().create_vm().unwrap();
    vm.set_tss_address(crate::vm::TSS_ADDRESS).unwrap();
    vm.create_irq_chip().unwrap();
    let _other = vm.create_vcpu(0).unwrap();
    let fd = vm.create_vcpu(1).unwrap();
    fd.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
    .unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    sregs.cr0 |= CR0_PE;
    fd.set_sregs(&sregs).unwrap();
    goes_to(&fd, RIP);
    let scratch = Scratch::new(&host.msrs, caps::xsave_size(&vm)).unwrap();
    Some((vm, fd, scratch))
}

fn goes_to(fd: &VcpuFd, rip: u64) {
    let mut regs = fd.get_regs().unwrap();
    regs.rip = rip;
    fd.set_regs(&regs).unwrap();
}

/// An INIT arrives, as another vCPU or a device may send it.
fn init(fd: &VcpuFd) {
    let mut events = fd.get_vcpu_events().unwrap();
    events.flags = KVM_VCPUEVENT_VALID_SMM;
    events.smi.latched_init = 1;
    fd.set_vcpu_events(&events).unwrap();
}

/// Saved instruction pointer, whether in protected mode, and run state.
fn saved(fd: &VcpuFd, scratch: &mut Scratch, alone: bool) -> (u64, bool, u32) {
    let mut bytes = Vec::with_capacity(1 << 16);
    save_vcpu(fd, scratch, 1, alone, &mut StateWriter::new(&mut bytes)).unwrap();
    let saved = Saved::read(&bytes).unwrap();
    let regs: kvm_regs = saved.get(Kind::Regs, 1).unwrap();
    let sregs: kvm_sregs = saved.get(Kind::Sregs, 1).unwrap();
    let mp: kvm_mp_state = saved.get(Kind::MpState, 1).unwrap();
    (regs.rip, sregs.cr0 & CR0_PE != 0, mp.mp_state)
}

#[test]
fn an_init_that_comes_after_a_vcpu_has_parked_undoes_what_it_saved_ahead() {
    let Some((_vm, fd, mut scratch)) = vcpu() else {
        return;
    };
    save_ahead(&fd, &mut scratch, 1, false);
    assert!(scratch.early.is_some());
    init(&fd);
    let after_init = (0xfff0, false, KVM_MP_STATE_INIT_RECEIVED);
    assert_eq!(saved(&fd, &mut scratch, false), after_init);
}

#[test]
fn what_is_saved_ahead_stands_once_and_until_the_vcpu_runs() {
    let Some((_vm, fd, mut scratch)) = vcpu() else {
        return;
    };
    let here = |rip| (rip, true, KVM_MP_STATE_RUNNABLE);
    save_ahead(&fd, &mut scratch, 1, false);
    assert_eq!(saved(&fd, &mut scratch, false), here(RIP));
    assert!(scratch.early.is_none(), "a second capture saves anew");
    // Alone nothing else changes it, and nothing is looked at twice: this test does what nobody does.
    save_ahead(&fd, &mut scratch, 1, false);
    goes_to(&fd, RIP + 1);
    assert_eq!(saved(&fd, &mut scratch, true), here(RIP));
    save_ahead(&fd, &mut scratch, 1, false);
    scratch.runs();
    goes_to(&fd, RIP + 2);
    assert_eq!(saved(&fd, &mut scratch, true), here(RIP + 2));
}

#[test]
fn a_vcpu_in_real_mode_is_always_saved_anew() {
    let Some((_vm, fd, mut scratch)) = vcpu() else {
        return;
    };
    let mut sregs = fd.get_sregs().unwrap();
    sregs.cr0 &= !CR0_PE;
    fd.set_sregs(&sregs).unwrap();
    save_ahead(&fd, &mut scratch, 1, false);
    // A start elsewhere: the general registers, the instruction pointer too, are what they were.
    sregs.cs.base = 0x8000;
    fd.set_sregs(&sregs).unwrap();
    let mut bytes = Vec::with_capacity(1 << 16);
    save_vcpu(
        &fd,
        &mut scratch,
        1,
        false,
        &mut StateWriter::new(&mut bytes),
    )
    .unwrap();
    let now: kvm_sregs = Saved::read(&bytes).unwrap().get(Kind::Sregs, 1).unwrap();
    assert_eq!(now.cs.base, 0x8000);
}
