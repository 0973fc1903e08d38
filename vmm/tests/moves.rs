//! Save and restore: a guest moved again and again into fresh machines, and processes, ends as one
//! that never moved.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::process::Command;
use std::sync::Arc;

use common::payload::{ARENA, COUNTERS, Mode, TICKS};
use common::{
    BITMAP, Collected, RING, Random, booted, config, eventually, moved, ram, revived, state, word,
};
use vmm::HostCaps;
use vmm::selfcheck::{Fault, moves};

#[test]
fn two_hundred_moves_at_random_moments_leave_the_work_as_if_undisturbed() {
    let caps = require_kvm!();
    moves::work_survives(&caps, 200, |_, _| {}).unwrap();
}

#[test]
fn a_move_that_changes_one_bit_is_found_out() {
    let caps = require_kvm!();
    let fault = moves::work_survives(&caps, 5, |number, ram| {
        if number == 2 {
            ram[ARENA as usize + 12_345] ^= 4;
        }
    });
    assert!(
        matches!(fault, Err(Fault::Differs { moves: 5 })),
        "{fault:?}"
    );
}

/// The other end of the next test: restores from a file, runs a little, saves into the file.
#[test]
#[ignore = "started by moves_between_processes_leave_the_work_as_if_undisturbed"]
fn child_of_the_process_test() {
    let dir = std::path::PathBuf::from(std::env::var_os("AX_TEST_MOVE").expect("AX_TEST_MOVE"));
    let caps = HostCaps::probe().unwrap();
    let outputs: Arc<Collected> = Arc::default();
    let (saved, ram_before) = (
        std::fs::read(dir.join("state")).unwrap(),
        std::fs::read(dir.join("ram")).unwrap(),
    );
    let config = moves::worker();
    let mut machine = revived(&caps, &config, &outputs, &saved, &ram_before);
    machine.start().unwrap();
    let before = word(&machine, COUNTERS);
    eventually("it goes on", || word(&machine, COUNTERS) > before);
    machine.pause().unwrap();
    std::fs::write(dir.join("state"), state(&machine)).unwrap();
    std::fs::write(dir.join("ram"), ram(&machine)).unwrap();
}

#[test]
fn moves_between_processes_leave_the_work_as_if_undisturbed() {
    let caps = require_kvm!();
    let config = moves::worker();
    let outputs: Arc<Collected> = Arc::default();
    let mut random = Random(23);
    let mut machine = booted(&caps, &config, &outputs);
    machine.start().unwrap();
    random.nap(3000);
    machine.pause().unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("state"), state(&machine)).unwrap();
    std::fs::write(dir.path().join("ram"), ram(&machine)).unwrap();
    let began = word(&machine, COUNTERS);
    drop(machine);
    for _ in 0..20 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_of_the_process_test", "--ignored"])
            .env("AX_TEST_MOVE", dir.path())
            .output()
            .unwrap();
        assert!(
            child.status.success(),
            "{}",
            String::from_utf8_lossy(&child.stderr)
        );
    }
    let read = |name| std::fs::read(dir.path().join(name)).unwrap();
    let machine = revived(&caps, &config, &outputs, &read("state"), &read("ram"));
    assert!(word(&machine, COUNTERS) > began, "the children did nothing");
    let (all, limit) = moves::ending(&machine, 1_000_000).unwrap();
    let mut last = revived(&caps, &config, &outputs, &read("state"), &all);
    drop(machine);
    last.start().unwrap();
    assert!(
        moves::outcome(&mut last).unwrap() == moves::undisturbed(&caps, limit).unwrap(),
        "memory differs"
    );
}

#[test]
fn each_byte_of_rep_outsb_arrives_exactly_once_over_ten_thousand_kicks() {
    let caps = require_kvm!();
    let config = config(Mode::Outsb, 1, 0, BITMAP);
    let outputs: Arc<Collected> = Arc::default();
    let mut random = Random(5);
    let mut machine = booted(&caps, &config, &outputs);
    machine.start().unwrap();
    for kick in 0..10_000 {
        random.nap(60);
        machine.pause().unwrap();
        if kick % 50 == 0 {
            let mut next = moved(&caps, &config, &outputs, &machine);
            drop(machine);
            next.start().unwrap();
            machine = next;
        } else {
            machine.resume().unwrap();
        }
    }
    machine.pause().unwrap();
    let console = outputs.console.lock();
    assert!(console.len() > 10_000, "only {} bytes came", console.len());
    for (at, byte) in console.iter().enumerate() {
        assert_eq!(*byte, at as u8, "byte {at} of {}", console.len());
    }
    let made = word(&machine, COUNTERS);
    let came = console.len() as u64;
    assert!(
        made >= came && made - came <= 64,
        "{made} bytes made, {came} came"
    );
}

/// Captures from the first instruction on: INIT and SIPI under way, vCPUs halted with armed timers.
#[test]
fn four_vcpus_captured_while_starting_and_halting_all_go_on_with_their_timers() {
    let caps = require_kvm!();
    let mut random = Random(77);
    for round in 0..10u64 {
        let config = config(Mode::Halt, 4, 0, if round % 2 == 0 { BITMAP } else { RING });
        let outputs: Arc<Collected> = Arc::default();
        let mut machine = booted(&caps, &config, &outputs);
        machine.start().unwrap();
        for _ in 0..50 {
            random.nap(400 + 200 * round);
            machine.pause().unwrap();
            let mut next = moved(&caps, &config, &outputs, &machine);
            drop(machine);
            next.start().unwrap();
            machine = next;
        }
        for vcpu in 0..4 {
            for place in [COUNTERS, TICKS] {
                let before = word(&machine, place + 64 * vcpu);
                eventually("every vCPU wakes and ticks", || {
                    word(&machine, place + 64 * vcpu) > before + 3
                });
            }
        }
        assert_eq!(machine.power(), None);
        assert!(
            outputs.console.lock().is_empty(),
            "an exception in the guest"
        );
    }
}

#[test]
fn state_that_does_not_fit_is_refused_and_says_why() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let two = config(Mode::Count, 2, 0, BITMAP);
    let mut machine = booted(&caps, &two, &outputs);
    machine.start().unwrap();
    machine.pause().unwrap();
    let good = state(&machine);
    let refused = |config: &vmm::MachineConfig, bytes: &[u8]| {
        let mut fresh = common::machine(&caps, config, &outputs);
        fresh
            .restore(bytes, std::time::Duration::ZERO)
            .unwrap_err()
            .to_string()
    };
    let one = config(Mode::Count, 1, 0, BITMAP);
    assert!(refused(&one, &good).contains("2 vCPUs"));
    assert!(refused(&two, &good[..good.len() - 40]).contains("truncated"));
    let mut torn = good.clone();
    torn[100] ^= 1;
    assert!(refused(&two, &torn).contains("CRC"));
    assert!(refused(&two, &[]).contains("missing"));
    // blocks left out, one at a time: never accepted, never a panic
    let blocks: Vec<_> = ax_wire::state::StateReader::new(&good)
        .map(|b| b.unwrap())
        .collect();
    for left_out in 0..blocks.len() {
        let mut buf = Vec::with_capacity(good.len() + 64);
        let mut writer = ax_wire::state::StateWriter::new(&mut buf);
        for (i, b) in blocks.iter().enumerate() {
            if i != left_out {
                writer.block(b.kind, b.version, b.index, b.payload).unwrap();
            }
        }
        refused(&two, &buf);
    }
}

#[test]
fn calls_out_of_order_are_errors() {
    let caps = require_kvm!();
    let outputs: Arc<Collected> = Arc::default();
    let config = config(Mode::Count, 1, 0, BITMAP);
    let mut machine = common::machine(&caps, &config, &outputs);
    assert!(machine.start().is_err() && machine.pause().is_err() && machine.resume().is_err());
    assert!(machine.promote_fixups().is_err());
    machine.boot().unwrap();
    assert!(machine.boot().is_err() && machine.resume().is_err());
    assert!(machine.write_pages(0, &[0; 4096]).is_err());
    machine.start().unwrap();
    let mut buf = Vec::with_capacity(machine.state_capacity());
    assert!(
        machine
            .save(&mut ax_wire::state::StateWriter::new(&mut buf))
            .is_err()
    );
    machine.pause().unwrap();
    let mut small = Vec::with_capacity(100);
    assert!(
        machine
            .save(&mut ax_wire::state::StateWriter::new(&mut small))
            .is_err()
    );
    assert!(
        machine
            .save(&mut ax_wire::state::StateWriter::new(&mut buf))
            .is_ok()
    );
}
