use super::super::RxOutcome;
use super::rig::*;

/// Pages that differ.
fn changed(before: &[u8], after: &[u8]) -> Vec<usize> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
        .collect()
}

/// Whole RAM compared: what devices wrote is marked, and nothing else is (rule 4).
#[test]
fn exactly_the_pages_written_are_marked_at_completion() {
    let rig = Rig::started();
    let mut net = drive(&rig, NET, EVENT_IDX, 0x1_0000, &[64, 64]);
    let mut blk = drive(&rig, BLK, BLK_FLUSH | EVENT_IDX, 0x2_0000, &[64]).remove(0);
    let mut rng = drive(&rig, RNG, 0, 0x3_0000, &[64]).remove(0);
    // Idle queues are looked at once and armed before the count starts.
    rig.net_rx(0, &[0; 60]);
    for n in 0..200u64 {
        let page = 0x100 + (n * 7 % 0x80) as usize;
        let at = page as u64 * 4096 + 4000; // spans two pages, or three
        net[0].add(&rig, &[], &[(at, 2000)]);
        rig.put(0x8_0000, &header(0, n * 8));
        let to = 0x20_0000 + (n % 64) * 0x1000 + 512;
        rig.put(0x8_1000, &[0xee]);
        blk.add(&rig, &[(0x8_0000, 16)], &[(to, 8192), (0x8_1000, 1)]);
        rng.add(&rig, &[], &[(0x3c_0000, 64)]);
        rig.set.quiesce();
        rig.drain();
        let before = rig.all_ram();
        rig.set.release();
        let frame: Vec<u8> = (0..500)
            .map(|i| (i as u64 * n + i as u64 + 1) as u8 | 1)
            .collect();
        assert_eq!(rig.net_rx(0, &frame), RxOutcome::Delivered);
        blk.kick(&rig);
        rng.kick(&rig);
        wait_for("all back", || blk.unseen(&rig) + rng.unseen(&rig) == 2);
        rig.set.quiesce();
        let marked = rig.drain();
        let after = rig.all_ram();
        rig.set.release();
        let mut may = vec![page, page + 1];
        may.extend([
            to as usize / 4096,
            to as usize / 4096 + 1,
            to as usize / 4096 + 2,
        ]);
        may.extend([0x81, 0x3c0]);
        may.extend([net[0].used_at(), blk.used_at(), rng.used_at()].map(|a| a as usize / 4096));
        for page in changed(&before, &after) {
            assert!(
                marked.contains(&page),
                "round {n}: page {page:#x} changed, not marked"
            );
        }
        for page in &marked {
            assert!(
                may.contains(page),
                "round {n}: page {page:#x} marked, not written"
            );
        }
        for queue in [&mut net[0], &mut blk, &mut rng] {
            assert_eq!(queue.used(&rig).len(), 1);
        }
    }
}

#[test]
fn looking_at_idle_queues_dirties_nothing() {
    for features in [0, EVENT_IDX] {
        let rig = Rig::started();
        let net = drive(&rig, NET, features, 0x1_0000, &[64, 64]);
        let blk = drive(&rig, BLK, BLK_FLUSH | features, 0x2_0000, &[64]);
        for round in 0..20 {
            net[1].kick(&rig);
            blk[0].kick(&rig);
            rig.set.kick_all();
            std::thread::sleep(std::time::Duration::from_millis(1));
            rig.set.quiesce();
            assert_eq!(rig.drain(), [0usize; 0], "round {round}");
            rig.set.release();
        }
    }
}
