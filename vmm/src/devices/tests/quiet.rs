use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use super::rig::*;

/// What a device must not do while quiet, counted.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    calls: usize,
    disk: u64,
    pages: Vec<usize>,
    interrupts: u64,
}

fn look(rig: &Rig) -> Seen {
    Seen {
        calls: rig.outputs.calls.load(SeqCst),
        disk: rig.disk.seen.load(SeqCst),
        pages: rig.drain(),
        interrupts: rig.irqs(NET) + rig.irqs(BLK) + rig.irqs(RNG),
    }
}

#[test]
fn between_quiesce_and_release_nothing_is_written_signalled_or_sent() {
    let rig = Rig::started();
    let mut net = drive(&rig, NET, 0, 0x1_0000, &[64, 64]);
    let mut blk = drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[64]).remove(0);
    let mut rng = drive(&rig, RNG, 0, 0x3_0000, &[64]).remove(0);
    let (mut tx, mut rx) = (net.remove(1), net.remove(0));
    let stop = AtomicBool::new(false);
    let going = || !stop.load(SeqCst);
    let (mut frames, mut received, mut requests) = (0u64, 0u64, 0u64);
    let (mut noisy, mut quiet) = (0, Vec::new());
    thread::scope(|s| {
        s.spawn(|| {
            while going() {
                for _ in 0..32 {
                    tx.add(&rig, &[(0x10_0000, 1000)], &[]);
                }
                tx.kick(&rig);
                let mut back = 0;
                while back < 32 {
                    back += tx.used(&rig).len();
                }
                frames += 32;
            }
        });
        s.spawn(|| {
            while going() {
                for _ in 0..16 {
                    rx.add(&rig, &[], &[(0x11_0000, 2000)]);
                }
                for _ in 0..16 {
                    rig.net_rx(0, &[1; 1500]);
                }
                received += rx.used(&rig).len() as u64;
            }
        });
        s.spawn(|| {
            rig.put(0x12_0000, &header(0, 0));
            rig.put(0x12_1000, &header(1, 100));
            while going() {
                blk.add(
                    &rig,
                    &[(0x12_0000, 16)],
                    &[(0x20_0000, 200 << 10), (0x12_0100, 1)],
                );
                blk.add(
                    &rig,
                    &[(0x12_1000, 16), (0x20_0000, 4096)],
                    &[(0x12_0100, 1)],
                );
                rng.add(&rig, &[], &[(0x13_0000, 4096)]);
                blk.kick(&rig);
                rng.kick(&rig);
                let mut back = 0;
                while back < 3 {
                    back += blk.used(&rig).len() + rng.used(&rig).len();
                }
                requests += 3;
            }
        });
        for _ in 0..300 {
            rig.set.quiesce();
            let done = look(&rig);
            noisy += usize::from(!done.pages.is_empty());
            thread::sleep(Duration::from_micros(300));
            let after = look(&rig);
            let want = Seen {
                calls: done.calls,
                disk: done.disk,
                pages: vec![],
                interrupts: 0,
            };
            // Judged after the threads have ended: a panic here would wait for them for ever.
            quiet.push((after, want));
            rig.set.release();
            thread::sleep(Duration::from_micros(300));
        }
        stop.store(true, SeqCst);
    });
    for (seen, want) in quiet {
        assert_eq!(seen, want);
    }
    assert!(
        noisy > 50 && frames > 0 && received > 0 && requests > 0,
        "the test was not idle"
    );
    assert_eq!(rig.outputs.frames.lock().len() as u64, frames);
}

#[test]
fn quiescing_does_not_wait_for_a_disk_that_hangs() {
    let rig = Rig::started();
    let mut queue = drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[64]).remove(0);
    rig.put(0x12_0000, &header(4, 0));
    rig.disk.hold(true);
    queue.add(&rig, &[(0x12_0000, 16)], &[(0x12_0100, 1)]);
    queue.kick(&rig);
    wait_for("the flush has begun", || rig.disk.inside.load(SeqCst) == 1);
    rig.set.quiesce(); // would never return
    rig.set.release();
    rig.disk.hold(false);
    queue.wait_used(&rig);
}

#[test]
fn stopping_while_quiet_leaves_the_unfinished_request_in_its_ring() {
    let rig = Rig::started();
    let mut queue = drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[64]).remove(0);
    rig.put(0x12_0000, &header(1, 0));
    rig.disk.hold(true);
    queue.add(
        &rig,
        &[(0x12_0000, 16), (0x20_0000, 512)],
        &[(0x12_0100, 1)],
    );
    queue.kick(&rig);
    wait_for("the write has begun", || rig.disk.inside.load(SeqCst) == 1);
    rig.set.quiesce();
    let before = rig.all_ram();
    rig.disk.hold(false);
    rig.set.stop();
    assert_eq!(
        rig.disk.inside.load(SeqCst),
        0,
        "local I/O has ended (rule 25)"
    );
    assert!(rig.all_ram() == before && rig.disk.seen.load(SeqCst) == 0);
    rig.set.pio_write(0x3f8, b"late");
    rig.net_rx(0, &[0; 60]);
    assert_eq!(
        rig.outputs.calls.load(SeqCst),
        0,
        "a stopped machine says nothing"
    );
    rig.set.start().unwrap();
    rig.set.kick_all();
    assert_eq!(queue.wait_used(&rig).len(), 1);
}

#[test]
fn doorbells_rung_while_quiet_are_answered_after() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, EVENT_IDX, 0x1_0000, &[64, 64]).remove(1);
    for n in 0..200 {
        rig.set.quiesce();
        tx.add(&rig, &[(0x10_0000, 100)], &[]);
        rig.set.wires()[NET].doorbells[1].2.write(1).unwrap(); // as an ioeventfd does
        rig.set.release();
        assert_eq!(tx.wait_used(&rig).len(), 1, "round {n}");
    }
}
