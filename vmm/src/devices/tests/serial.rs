use std::sync::atomic::Ordering::SeqCst;

use super::rig::*;
use crate::ports::Power;

const THR: u16 = 0x3f8;
const IER: u16 = 0x3f9;
const LSR: u16 = 0x3fd;

fn lsr(rig: &Rig) -> u8 {
    let mut byte = [0];
    rig.set.pio_read(LSR, &mut byte);
    byte[0]
}

fn irqs(rig: &Rig) -> u64 {
    rig.set.serial_irq().1.read().unwrap_or(0)
}

#[test]
fn every_byte_written_comes_out_once_in_order_also_by_string_output() {
    let rig = Rig::new();
    let bytes: Vec<u8> = (0..=255).collect();
    for part in bytes.chunks(7) {
        rig.set.pio_write(THR, part);
    }
    assert_eq!(*rig.outputs.console.lock(), bytes);
}

#[test]
fn output_that_nobody_takes_waits_and_the_port_says_so() {
    let rig = Rig::started();
    rig.set.pio_write(IER, &[2]);
    rig.outputs.full.store(true, SeqCst);
    let mut want = Vec::new();
    for n in 0..100u8 {
        rig.set.pio_write(THR, &[n; 10]);
        want.extend([n; 10]);
        assert_eq!(lsr(&rig) & 0x60, 0, "transmitter busy");
    }
    irqs(&rig);
    rig.outputs.full.store(false, SeqCst);
    rig.set.retry_outputs();
    wait_for("all out", || *rig.outputs.console.lock() == want);
    wait_for("the driver is told", || irqs(&rig) > 0);
    assert_eq!(lsr(&rig) & 0x60, 0x60);
}

#[test]
fn input_is_taken_as_far_as_it_fits_and_more_is_asked_for() {
    let rig = Rig::new();
    rig.set.pio_write(IER, &[1]);
    irqs(&rig);
    let input: Vec<u8> = (0..200).collect();
    let (mut given, mut got) = (0, Vec::new());
    while got.len() < input.len() {
        given += rig.set.console_in(&input[given..]);
        assert!(irqs(&rig) > 0);
        while lsr(&rig) & 1 != 0 {
            let mut byte = [0];
            rig.set.pio_read(THR, &mut byte);
            got.extend(byte);
        }
        assert_eq!(rig.set.console_wakeup().read().is_ok(), given < input.len());
        irqs(&rig);
    }
    assert_eq!(got, input);
}

#[test]
fn power_and_reset_are_outputs() {
    let rig = Rig::new();
    rig.set.pio_write(0x64, &[0xfe]);
    rig.set.pio_write(0x604, &[0, 0x20]);
    rig.set.pio_write(0x80, &[1]);
    assert_eq!(*rig.outputs.power.lock(), [Power::Reset, Power::Off]);
}

#[test]
fn absent_ports_read_as_all_ones() {
    let rig = Rig::new();
    for port in [0, 0x80, 0x2f8, 0xcf8, 0xcfc, 0xffff] {
        let mut out = [0; 4];
        rig.set.pio_read(port, &mut out);
        assert_eq!(out, [0xff; 4], "port {port:#x}");
        rig.set.pio_write(port, &[0; 4]);
    }
}
