//! Kicking, parking, and what stops a guest as a whole.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::sync::Arc;

use common::payload::{COUNTERS, DONE, Mode, TICKS};
use common::{BITMAP, Collected, Random, booted, config, eventually, ram, word};
use vmm::ports::Power;
use vmm::{DirtyTracking, Machine, MachineConfig, NicConfig};

#[test]
fn a_paused_guest_stands_still_and_a_resumed_one_goes_on() {
    let caps = require_kvm!();
    let outputs = Arc::default();
    let mut machine = booted(&caps, &config(Mode::Count, 4, 0, BITMAP), &outputs);
    machine.start().unwrap();
    let mut random = Random(7);
    for vcpu in 0..4 {
        eventually("every vCPU counts", || {
            word(&machine, COUNTERS + 64 * vcpu) > 0
        });
    }
    for _ in 0..300 {
        random.nap(300);
        machine.pause().unwrap();
        let before = ram(&machine);
        std::thread::yield_now();
        assert!(before == ram(&machine), "guest memory changed while paused");
        machine.resume().unwrap();
    }
    for vcpu in 0..4 {
        let before = word(&machine, COUNTERS + 64 * vcpu);
        eventually("every vCPU goes on", || {
            word(&machine, COUNTERS + 64 * vcpu) > before
        });
    }
}

/// As the epochs do it: nobody has the machine locked while the vCPUs are parked.
#[test]
fn what_is_done_while_parked_sees_a_guest_that_stands_still_whatever_thread_does_it() {
    let caps = require_kvm!();
    for vcpus in [1, 4] {
        let outputs = Arc::default();
        let mut machine = booted(&caps, &config(Mode::Count, vcpus, 0, BITMAP), &outputs);
        machine.start().unwrap();
        let machine = parking_lot::Mutex::new(machine);
        let mut random = Random(11);
        let mut rounds = 0;
        for _ in 0..200 {
            random.nap(300);
            let parking = machine.lock().parking().unwrap().expect("it runs");
            parking
                .run(&mut || {
                    let mut machine = machine.lock();
                    machine.parked().unwrap();
                    let before = ram(&machine);
                    assert!(before == ram(&machine), "guest memory changed while parked");
                    assert!(machine.parking().unwrap().is_none(), "it is paused");
                    machine.resume().unwrap();
                    rounds += 1;
                })
                .unwrap();
        }
        assert_eq!(rounds, 200);
        for vcpu in 0..u64::from(vcpus) {
            let before = word(&machine.lock(), COUNTERS + 64 * vcpu);
            eventually("every vCPU goes on", || {
                word(&machine.lock(), COUNTERS + 64 * vcpu) > before
            });
        }
    }
}

#[test]
fn halted_vcpus_are_kicked_and_woken_by_their_timers() {
    let caps = require_kvm!();
    let outputs = Arc::default();
    let mut machine = booted(&caps, &config(Mode::Halt, 2, 0, BITMAP), &outputs);
    machine.start().unwrap();
    for _ in 0..100 {
        machine.pause().unwrap();
        machine.resume().unwrap();
    }
    for vcpu in 0..2 {
        eventually("ticks go on", || word(&machine, TICKS + 64 * vcpu) > 20);
        eventually("wake-ups go on", || {
            word(&machine, COUNTERS + 64 * vcpu) > 20
        });
    }
    assert!(outputs_quiet(&outputs));
    usable_from_other_threads(&machine);
    usable_from_other_threads(&machine.handle());
}

#[test]
fn this_host_tells_the_same_each_time_and_can_fail_over_to_itself() {
    let caps = require_kvm!();
    for _ in 0..20 {
        let again = vmm::HostCaps::probe().unwrap();
        assert_eq!(caps, again);
        assert!(caps.differences(&again).is_empty());
    }
}

#[test]
fn configurations_that_cannot_run_are_refused_by_name() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let good = || config(Mode::Count, 1, 0, BITMAP);
    let refused = |config: vmm::MachineConfig| {
        let ports = vmm::Ports {
            outputs: Arc::clone(&outputs) as _,
            disks: Vec::new(),
        };
        Machine::with_caps(config, ports, caps.clone())
            .unwrap_err()
            .to_string()
    };
    assert!(refused(MachineConfig { vcpus: 0, ..good() }).contains("0 vCPUs"));
    assert!(refused(MachineConfig { vcpus: 9, ..good() }).contains("9 vCPUs"));
    assert!(
        refused(MachineConfig {
            memory: 12345,
            ..good()
        })
        .contains("12345")
    );
    assert!(
        refused(MachineConfig {
            memory: 1 << 50,
            ..good()
        })
        .contains("memory")
    );
    let ring = |entries| MachineConfig {
        dirty: DirtyTracking::Ring { entries },
        ..good()
    };
    assert!(refused(ring(1000)).contains("power of two"));
    assert!(refused(ring(1 << 20)).contains("power of two"));
    let mac = NicConfig {
        mac: [1, 0, 0, 0, 0, 0],
        offload: false,
    };
    assert!(
        refused(MachineConfig {
            nics: vec![mac],
            ..good()
        })
        .contains("unicast")
    );
}

fn usable_from_other_threads<T: Send>(_: &T) {}

fn outputs_quiet(outputs: &Arc<Collected>) -> bool {
    outputs.console.lock().is_empty() && outputs.power.lock().is_empty()
}

#[test]
fn power_off_stops_every_vcpu_once_and_survives_pauses() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(Mode::PowerOff, 1, 0, BITMAP), &outputs);
    machine.start().unwrap();
    eventually("power off", || machine.power() == Some(Power::Off));
    for _ in 0..3 {
        machine.pause().unwrap();
        machine.resume().unwrap();
    }
    machine.pause().unwrap();
    assert_eq!(*outputs.power.lock(), [Power::Off]);
    assert_eq!(
        word(&machine, DONE),
        0,
        "the guest ran on after switching itself off"
    );
    // ... and so does a machine restored from there
    let mut other = common::moved(
        &caps,
        &config(Mode::PowerOff, 1, 0, BITMAP),
        &outputs,
        &machine,
    );
    drop(machine);
    other.start().unwrap();
    other.pause().unwrap();
    assert_eq!(other.power(), Some(Power::Off));
    assert_eq!(word(&other, DONE), 0);
}

#[test]
fn a_triple_fault_is_a_crash() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(Mode::Crash, 1, 0, BITMAP), &outputs);
    machine.start().unwrap();
    eventually("a crash", || machine.power() == Some(Power::Crash));
    machine.pause().unwrap();
    assert_eq!(*outputs.power.lock(), [Power::Crash]);
    // a crashed guest can be reset, and crashes again
    machine.reset().unwrap();
    assert_eq!(machine.power(), None);
    machine.resume().unwrap();
    eventually("another crash", || machine.power() == Some(Power::Crash));
}

#[test]
fn a_reset_guest_begins_anew_in_place() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let mut machine = booted(&caps, &config(Mode::Reset, 2, 0, BITMAP), &outputs);
    machine.start().unwrap();
    for round in 1..=3 {
        eventually("a reset", || machine.power() == Some(Power::Reset));
        machine.pause().unwrap();
        assert!(word(&machine, COUNTERS) >= 1000);
        assert_eq!(word(&machine, DONE), 0);
        assert_eq!(outputs.power.lock().len(), round);
        machine.reset().unwrap();
        machine.resume().unwrap();
    }
}
