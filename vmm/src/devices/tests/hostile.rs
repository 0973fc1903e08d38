use proptest::prelude::*;

use super::super::disk::Job;
use super::rig::*;

const REGION: u64 = 0x1_0000;

/// A descriptor a malicious driver might write: plausible and wild values mixed.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        4 => 0..RAM as u64,
        1 => (RAM as u64 - 64)..(RAM as u64 + 64),
        1 => any::<u64>(),
        1 => u64::MAX - 100..=u64::MAX,
    ];
    let len = prop_oneof![4 => 0u32..3000, 1 => 16u32..=16, 1 => 1u32..=1, 1 => any::<u32>()];
    let flags = prop_oneof![4 => 0u16..4, 1 => any::<u16>()].prop_map(|f| f & !4);
    let next = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    (addr, len, flags, next)
}

#[derive(Debug, Clone)]
struct Attack {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    avail: u16,
    headers: Vec<(u32, u64)>,
    event_idx: bool,
}

fn attack() -> impl Strategy<Value = Attack> {
    let head = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    let avail = prop_oneof![6 => 0u16..=16, 1 => any::<u16>()];
    let kind = prop_oneof![4 => prop::sample::select(vec![0u32, 1, 4, 8]), 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0u64..2100, 1 => any::<u64>()];
    (
        prop::collection::vec(descriptor(), 16),
        prop::collection::vec(head, 16),
        avail,
        prop::collection::vec((kind, sector), 16),
        any::<bool>(),
    )
        .prop_map(|(descriptors, heads, avail, headers, event_idx)| Attack {
            descriptors,
            heads,
            avail,
            headers,
            event_idx,
        })
}

impl Attack {
    /// Writes the rings, and headers where readable descriptors point.
    fn mount(&self, rig: &Rig, queue: &Queue) {
        for ((addr, ..), (kind, sector)) in self.descriptors.iter().zip(&self.headers) {
            if *addr < (RAM - 16) as u64 {
                rig.put(*addr, &header(*kind, *sector));
            }
        }
        for (i, (addr, len, flags, next)) in (0u64..).zip(&self.descriptors) {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            rig.put(queue.desc_at() + 16 * i, &bytes);
        }
        for (i, head) in (0u64..).zip(&self.heads) {
            rig.put(queue.avail_at() + 4 + 2 * i, &head.to_le_bytes());
        }
        rig.put(queue.avail_at() + 2, &self.avail.to_le_bytes());
    }

    /// Pages the device may write: the used ring, and what writable descriptors name.
    fn writable(&self, queue: &Queue) -> Vec<(u64, u64)> {
        let named = self
            .descriptors
            .iter()
            .filter(|(_, _, flags, _)| flags & 2 != 0);
        let mut ranges: Vec<_> = named
            .map(|(addr, len, ..)| (*addr, addr.saturating_add((*len).into())))
            .collect();
        ranges.push((queue.used_at(), queue.used_at() + 0x1000));
        ranges
    }

    fn check(&self, rig: &Rig, queue: &Queue) -> Result<(), TestCaseError> {
        let allowed = self.writable(queue);
        for page in rig.drain() {
            let (start, end) = (page as u64 * 4096, page as u64 * 4096 + 4096);
            let named = allowed.iter().any(|(from, to)| *from < end && *to > start);
            prop_assert!(
                named,
                "page {:#x} was written, no descriptor names it",
                page
            );
        }
        Ok(())
    }

    fn features(&self) -> u64 {
        if self.event_idx { EVENT_IDX } else { 0 }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_ring_makes_net_panic_or_write_elsewhere(attack in attack(), len in 0usize..3000) {
        let rig = Rig::new();
        let queues = drive(&rig, NET, attack.features(), REGION, &[16, 16]);
        for queue in &queues {
            attack.mount(&rig, queue);
        }
        let mut rounds = 0;
        while rig.set.devices.nets[0].transmit() {
            rounds += 1;
            prop_assert!(rounds <= 10_000, "it goes round in circles");
        }
        attack.check(&rig, &queues[1])?;
        for _ in 0..20 {
            rig.net_rx(0, &vec![0x5a; len]);
        }
        attack.check(&rig, &queues[0])?;
    }

    #[test]
    fn no_ring_makes_a_disk_panic_or_write_elsewhere(attack in attack()) {
        let rig = Rig::new();
        let queue = drive(&rig, BLK, BLK_FLUSH | attack.features(), REGION, &[16]).remove(0);
        attack.mount(&rig, &queue);
        let devices = &rig.set.devices;
        let mut job = Job::new();
        let mut rounds = 0;
        while devices.disks[0].step(&devices.gate, &mut job) == Some(true) {
            rounds += 1;
            prop_assert!(rounds <= 10_000, "it goes round in circles");
        }
        attack.check(&rig, &queue)?;
    }

    #[test]
    fn no_ring_makes_the_entropy_device_panic_or_write_elsewhere(attack in attack()) {
        let rig = Rig::new();
        let queue = drive(&rig, RNG, attack.features(), REGION, &[16]).remove(0);
        attack.mount(&rig, &queue);
        let mut rounds = 0;
        while rig.set.devices.rng.as_ref().unwrap().fill() {
            rounds += 1;
            prop_assert!(rounds <= 10_000, "it goes round in circles");
        }
        attack.check(&rig, &queue)?;
    }

    #[test]
    fn no_register_access_panics(
        accesses in prop::collection::vec(
            (0u64..0x3200, prop_oneof![any::<u32>(), 0u32..20, 0x1_0000u32..0x2_0000], 0usize..9),
            1..100,
        ),
    ) {
        let rig = Rig::new();
        let base = rig.set.wires()[0].base;
        for (offset, value, width) in accesses {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&value.to_le_bytes());
            rig.set.mmio_write(base + (offset & !3), &value.to_le_bytes());
            rig.set.mmio_write(base + offset, &bytes[..width]);
            rig.set.mmio_read(base + offset, &mut bytes[..width]);
            rig.set.pio_write(offset as u16, &bytes[..width]);
            rig.set.pio_read(offset as u16, &mut bytes[..width]);
        }
    }
}

#[test]
fn a_broken_device_says_so_and_recovers_by_reset_and_no_other_suffers() {
    let rig = Rig::started();
    let mut blk = drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[64]).remove(0);
    let mut tx = drive(&rig, NET, 0, REGION, &[16, 16]).remove(1);
    tx.publish(&rig, 999);
    tx.kick(&rig);
    wait_for("NEEDS_RESET", || rig.read(NET, 0x70) == 0x4f);
    assert_eq!(
        rig.read(NET, 0x60),
        2,
        "a configuration interrupt tells the driver"
    );
    tx.add(&rig, &[(0x10_0000, 100)], &[]);
    tx.kick(&rig);
    rig.put(0x12_0000, &header(4, 0));
    blk.add(&rig, &[(0x12_0000, 16)], &[(0x12_0100, 1)]);
    blk.kick(&rig);
    assert_eq!(blk.wait_used(&rig).len(), 1, "the disk works on");
    assert!(rig.outputs.frames.lock().is_empty());
    let mut tx = drive(&rig, NET, 0, REGION, &[16, 16]).remove(1);
    tx.add(&rig, &[(0x10_0000, 100)], &[]);
    tx.kick(&rig);
    assert_eq!(tx.wait_used(&rig).len(), 1);
}

#[test]
fn a_loop_of_descriptors_breaks_the_device() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, 0, REGION, &[16, 16]).remove(1);
    let mut looped = 0x10_0000u64.to_le_bytes().to_vec();
    looped.extend(100u32.to_le_bytes());
    looped.extend([1, 0, 0, 0]);
    rig.put(tx.desc_at(), &looped);
    tx.publish(&rig, 0);
    tx.kick(&rig);
    wait_for("NEEDS_RESET", || rig.read(NET, 0x70) & 0x40 != 0);
}
