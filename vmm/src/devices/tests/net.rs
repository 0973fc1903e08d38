use std::sync::atomic::Ordering::SeqCst;

use ax_wire::offload::MAX_FRAME;

use super::super::RxOutcome;
use super::rig::*;

const BUFFERS: u64 = 0x10_0000;

fn frame(n: u32, len: usize) -> Vec<u8> {
    (0..len).map(|i| (n as usize * 31 + i) as u8).collect()
}

/// Queues a frame behind its header, split over two buffers. Returns what should come out.
fn send(rig: &Rig, tx: &mut Queue, n: u32, len: usize) -> Vec<u8> {
    let at = BUFFERS + u64::from(n % 32) * 0x4000;
    let sent = frame(n, len);
    rig.put(at, &[0; 12]);
    rig.put(at + 12, &sent[..4]);
    rig.put(at + 0x1000, &sent[4..]);
    tx.add(rig, &[(at, 16), (at + 0x1000, len as u32 - 4)], &[]);
    sent
}

fn both(features: impl Fn(u64)) {
    [0, EVENT_IDX].into_iter().for_each(features);
}

#[test]
fn frames_leave_whole_and_in_order_and_their_buffers_come_back_with_an_interrupt() {
    both(|features| {
        let rig = Rig::started();
        let mut tx = drive(&rig, NET, features, 0x1_0000, &[64, 64]).remove(1);
        let mut want = Vec::new();
        for round in 0..100 {
            for n in 0..=round % 20 {
                want.push(send(
                    &rig,
                    &mut tx,
                    round + n,
                    60 + (round * 13 % 1400) as usize,
                ));
            }
            tx.kick(&rig);
            let mut back = 0;
            wait_for("all sent", || {
                back += tx.used(&rig).len() as u32;
                back == round % 20 + 1
            });
            wait_for("an interrupt", || rig.irqs(NET) > 0);
        }
        assert_eq!(*rig.outputs.frames.lock(), want);
    });
}

#[test]
fn a_frame_of_impossible_length_is_lost_alone() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, 0, 0x1_0000, &[64, 64]).remove(1);
    tx.add(&rig, &[(BUFFERS, 12 + 13)], &[]);
    tx.add(&rig, &[(BUFFERS, 12 + MAX_FRAME as u32 + 1)], &[]);
    let good = send(&rig, &mut tx, 1, 60);
    tx.kick(&rig);
    let mut back = 0;
    wait_for("all three back", || {
        back += tx.used(&rig).len();
        back == 3
    });
    assert_eq!(*rig.outputs.frames.lock(), [good]);
}

#[test]
fn full_outputs_hold_frames_back_without_loss_or_reordering() {
    both(|features| {
        let rig = Rig::started();
        let mut tx = drive(&rig, NET, features, 0x1_0000, &[64, 64]).remove(1);
        let mut want = Vec::new();
        for round in 0..50 {
            rig.outputs.full.store(true, SeqCst);
            let calls = rig.outputs.calls.load(SeqCst);
            for n in 0..10 {
                want.push(send(&rig, &mut tx, round * 10 + n, 100));
            }
            tx.kick(&rig);
            // Room comes at any moment: before the first try, between the two, after.
            if round % 2 == 0 {
                wait_for("a refusal", || rig.outputs.calls.load(SeqCst) > calls);
                assert!(tx.used(&rig).is_empty());
            }
            rig.outputs.full.store(false, SeqCst);
            rig.set.retry_outputs();
            wait_for("all sent", || rig.outputs.frames.lock().len() == want.len());
            let mut back = 0;
            wait_for("buffers back", || {
                back += tx.used(&rig).len();
                back == 10
            });
        }
        assert_eq!(*rig.outputs.frames.lock(), want);
    });
}

#[test]
fn received_frames_reach_the_guest_in_order_with_their_header() {
    both(|features| {
        let rig = Rig::started();
        let mut rx = drive(&rig, NET, features, 0x1_0000, &[16, 16]).remove(0);
        for n in 0..200u32 {
            let at = BUFFERS + u64::from(n % 8) * 0x4000;
            let head = rx.add(&rig, &[], &[(at, 100), (at + 0x1000, 1500)]);
            let got = frame(n, 14 + (n as usize * 7) % 1500);
            assert_eq!(rig.net_rx(0, &got), RxOutcome::Delivered);
            assert_eq!(rx.used(&rig), [(head.into(), got.len() as u32 + 12)]);
            assert_eq!(rig.irqs(NET), 1);
            let mut seen = rig.get(at, 100);
            seen.extend(rig.get(at + 0x1000, 1500));
            assert_eq!(seen[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(seen[12..12 + got.len()], got);
            assert_eq!(rig.set.rx_delivered(0), u64::from(n) + 1);
        }
    });
}

#[test]
fn a_receiver_turned_away_is_woken_when_there_is_room() {
    both(|features| {
        let rig = Rig::started();
        let woken = || rig.set.rx_wakeup(0).unwrap().read().is_ok();
        assert_eq!(rig.net_rx(0, &[0; 60]), RxOutcome::NotReady);
        let mut rx = drive(&rig, NET, features, 0x1_0000, &[16, 16]).remove(0);
        wait_for("woken by the driver's start", woken);
        for _ in 0..50 {
            assert_eq!(rig.net_rx(0, &[0; 60]), RxOutcome::NoBuffers);
            rx.add(&rig, &[], &[(BUFFERS, 2000)]);
            rx.kick(&rig);
            wait_for("woken by a buffer", woken);
            assert_eq!(rig.net_rx(0, &[0; 60]), RxOutcome::Delivered);
        }
        assert_eq!(rig.set.rx_delivered(0), 50);
        assert_eq!(
            rig.net_rx(1, &[0; 60]),
            RxOutcome::NotReady,
            "there is no second device"
        );
    });
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_its_buffer_kept() {
    let rig = Rig::started();
    let mut rx = drive(&rig, NET, 0, 0x1_0000, &[16, 16]).remove(0);
    rx.add(&rig, &[], &[(BUFFERS, 112)]);
    assert_eq!(rig.net_rx(0, &[1; 101]), RxOutcome::Dropped);
    assert_eq!(rig.net_rx(0, &[1; 13]), RxOutcome::Dropped);
    assert_eq!(rig.net_rx(0, &[1; 100]), RxOutcome::Delivered);
    assert_eq!(rx.used(&rig).len(), 1);
    assert_eq!(
        rig.set.rx_delivered(0),
        3,
        "rule 7 counts what the device is done with"
    );
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let rig = Rig::started();
    let mut rx = drive(&rig, NET, 0, 0x1_0000, &[16, 16]).remove(0);
    rig.put(rx.avail_at(), &1u16.to_le_bytes());
    rx.add(&rig, &[], &[(BUFFERS, 2000)]);
    assert_eq!(rig.net_rx(0, &[1; 100]), RxOutcome::Delivered);
    assert_eq!(rig.irqs(NET), 0);
    rig.set.kick_all();
    assert_eq!(rig.irqs(NET), 1, "rule 12 raises it all the same");
}
