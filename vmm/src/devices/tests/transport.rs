use super::super::transport::COMMON_FEATURES;
use super::super::{DeviceSet, DeviceSpec, Error, Ports};
use super::rig::*;
use std::sync::Arc;

#[test]
fn every_window_identifies_itself() {
    let rig = Rig::new();
    for (window, id) in [(NET, 1), (BLK, 2), (RNG, 4)] {
        assert_eq!(rig.read(window, 0), 0x7472_6976);
        assert_eq!(rig.read(window, 4), 2);
        assert_eq!(rig.read(window, 8), id);
        rig.write(window, 0x14, 1);
        assert_eq!(rig.read(window, 0x10), 1, "VERSION_1");
        rig.write(window, 0x14, 2);
        assert_eq!(rig.read(window, 0x10), 0);
    }
    let mut mac = [0; 6];
    rig.set
        .mmio_read(rig.set.wires()[NET].base + 0x100, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn the_command_line_names_what_the_wires_are() {
    let rig = Rig::new();
    let words: Vec<_> = rig
        .set
        .wires()
        .iter()
        .map(|w| format!("virtio_mmio.device=4K@{:#x}:{}", w.base, w.gsi))
        .collect();
    assert_eq!(rig.set.cmdline(), words.join(" "));
    assert_eq!(words[0], "virtio_mmio.device=4K@0xd0000000:5");
    let mut lines: Vec<_> = rig.set.wires().iter().map(|w| w.gsi).collect();
    lines.push(rig.set.serial_irq().0);
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 4, "no interrupt line is shared");
    for wire in rig.set.wires() {
        assert!(
            wire.doorbells
                .iter()
                .all(|(at, ..)| *at == wire.base + 0x50)
        );
        assert!(
            wire.doorbells
                .iter()
                .map(|(_, q, _)| *q)
                .eq(0..wire.doorbells.len() as u32)
        );
    }
}

#[test]
fn what_is_not_there_reads_as_ones_and_swallows_writes() {
    let rig = Rig::new();
    let past = rig.set.wires()[RNG].base + 0x1000;
    for addr in [0, 0xcfff_f000, past, u64::MAX - 3] {
        let mut out = [0; 8];
        rig.set.mmio_read(addr, &mut out);
        assert_eq!(out, [0xff; 8]);
        rig.set.mmio_write(addr, &[0; 4]);
    }
    let base = rig.set.wires()[NET].base;
    rig.set.mmio_write(base + 0x70, &[15]);
    rig.set.mmio_write(base + 0x71, &[15; 4]);
    rig.set.mmio_write(base + 0x100, &[15; 4]);
    assert_eq!(rig.read(NET, 0x70), 0, "only whole registers are written");
}

#[test]
fn features_not_offered_or_not_modern_are_refused() {
    let rig = Rig::new();
    for features in [0, COMMON_FEATURES | 1 << 10, COMMON_FEATURES | 1 << 34] {
        rig.write(NET, 0x70, 0);
        rig.write(NET, 0x70, 3);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            rig.write(NET, 0x24, select);
            rig.write(NET, 0x20, half);
        }
        rig.write(NET, 0x70, 11);
        assert_eq!(rig.read(NET, 0x70), 3, "{features:#x}");
        rig.write(NET, 0x70, 15);
        assert_eq!(rig.read(NET, 0x70) & 4, 0, "nor does it run");
    }
}

#[test]
fn an_impossible_queue_breaks_the_device_until_reset() {
    let rig = Rig::new();
    let end = RAM as u64;
    for (size, desc, avail, used) in [
        (0, 0x1_0000, 0x1_1000, 0x1_2000),
        (3, 0x1_0000, 0x1_1000, 0x1_2000),
        (512, 0x1_0000, 0x1_1000, 0x1_2000),
        (65_536 + 64, 0x1_0000, 0x1_1000, 0x1_2000),
        (64, 0x1_0008, 0x1_1000, 0x1_2000),
        (64, 0x1_0000, 0x1_1001, 0x1_2000),
        (64, 0x1_0000, 0x1_1000, 0x1_2002),
        (64, end - 64 * 16 + 16, 0x1_1000, 0x1_2000),
        (64, 0x1_0000, end - 128, 0x1_2000),
        (64, 0x1_0000, 0x1_1000, end - 4),
        (64, 0x1_0000, 0x1_1000, !3),
        (64, 0x1_0000, 0, 0x1_2000),
    ] {
        rig.write(NET, 0x70, 0);
        rig.write(NET, 0x70, 3);
        rig.write(NET, 0x24, 1);
        rig.write(NET, 0x20, 1);
        rig.write(NET, 0x70, 11);
        rig.write(NET, 0x38, size);
        for (register, at) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            rig.write(NET, register, at as u32);
            rig.write(NET, register + 4, (at >> 32) as u32);
        }
        rig.write(NET, 0x44, 1);
        let what = format!("size {size} at {desc:#x} {avail:#x} {used:#x}");
        assert_eq!(rig.read(NET, 0x44), 0, "{what}");
        assert_eq!(rig.read(NET, 0x70), 11 | 0x40, "{what}");
    }
    drive(&rig, NET, 0, 0x1_0000, &[64, 64]);
    assert_eq!(rig.read(NET, 0x70), 15);
}

#[test]
fn interrupt_status_is_set_and_acknowledged() {
    let rig = Rig::new();
    let mut rx = drive(&rig, NET, 0, 0x1_0000, &[64, 64]).remove(0);
    rx.add(&rig, &[], &[(0x10_0000, 2000)]);
    rig.net_rx(0, &[0; 60]);
    assert_eq!(rig.read(NET, 0x60), 1);
    rig.write(NET, 0x64, 1);
    assert_eq!(rig.read(NET, 0x60), 0);
}

#[test]
fn impossible_specifications_are_refused() {
    let rig = Rig::new();
    let make = |nics: usize, disks: usize, given: Vec<Arc<FakeDisk>>| {
        let disks_given = given
            .into_iter()
            .map(|d| d as Arc<dyn crate::ports::Disk>)
            .collect();
        let ports = Ports {
            outputs: Arc::clone(&rig.outputs) as _,
            disks: disks_given,
        };
        let spec = DeviceSpec {
            nics: vec![NIC; nics],
            disks,
            rng: true,
        };
        DeviceSet::new(rig.ram.clone(), spec, ports).map(|_| ())
    };
    assert!(make(16, 0, vec![]).is_ok());
    assert!(matches!(
        make(17, 0, vec![]),
        Err(Error::TooMany {
            asked: 18,
            most: 17
        })
    ));
    assert!(matches!(
        make(0, 1, vec![]),
        Err(Error::Disks { spec: 1, given: 0 })
    ));
    for size in [0, 100, 513] {
        let disk = FakeDisk::new(vec![0; size], false);
        assert!(matches!(
            make(0, 1, vec![disk]),
            Err(Error::DiskSize { disk: 0, .. })
        ));
    }
}
