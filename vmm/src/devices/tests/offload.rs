use std::sync::atomic::Ordering::SeqCst;

use ax_wire::offload::{HEADER, MAX_FRAME, MAX_SEGMENT, NOTHING, Offloads, Packet};
use ax_wire::state::{StateReader, StateWriter};
use proptest::prelude::*;

use super::super::RxOutcome;
use super::rig::*;

const BUFFERS: u64 = 0x10_0000;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;
const ALL: u64 = CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF;

/// A TCP segment over IPv4 behind a header that wants it cut into pieces of 1460 bytes.
fn segment(payload: usize) -> Vec<u8> {
    let mut bytes = cut(34);
    bytes.extend([0; 12]);
    bytes.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0; 12]);
    bytes.extend([0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    bytes.extend((0..payload).map(|i| (i * 7 % 251) as u8));
    bytes
}

fn cut(start: u8) -> Vec<u8> {
    vec![1, 1, 54, 0, 0xb4, 0x05, start, 0, 16, 0, 0, 0]
}

/// The same frame, to be given its checksum alone.
fn summed(payload: usize) -> Vec<u8> {
    let mut bytes = segment(payload);
    bytes[..HEADER].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    bytes
}

fn packet(bytes: &[u8]) -> Packet<'_> {
    Packet::new(bytes).unwrap()
}

fn put(rig: &Rig, tx: &mut Queue, at: u64, bytes: &[u8]) {
    rig.put(at, bytes);
    // In pieces, as a driver's are.
    let pieces: Vec<_> = (0..bytes.len())
        .step_by(30_000)
        .map(|from| (at + from as u64, (bytes.len() - from).min(30_000) as u32))
        .collect();
    tx.add(rig, &pieces, &[]);
}

fn until_sent(rig: &Rig, tx: &mut Queue, count: usize) {
    tx.kick(rig);
    let mut back = 0;
    wait_for("all back", || {
        back += tx.used(rig).len();
        back == count
    });
}

#[test]
fn what_a_driver_accepts_is_what_its_frames_may_leave_to_be_done() {
    let rig = Rig::started();
    let (sum, cut) = (summed(3000), segment(40_000));
    for (features, left) in [
        (0, vec![]),
        (CSUM, vec![&sum]),
        (HOST_TSO4, vec![]), // without the feature it needs
        (CSUM | HOST_TSO6, vec![&sum]),
        (CSUM | HOST_TSO4, vec![&sum, &cut]),
        (ALL | EVENT_IDX, vec![&sum, &cut]),
    ] {
        rig.outputs.packets.lock().clear();
        let before = rig.set.malformed(0);
        let mut tx = drive(&rig, NET, features, 0x1_0000, &[64, 64]).remove(1);
        put(&rig, &mut tx, BUFFERS, &sum);
        put(&rig, &mut tx, BUFFERS + 0x1_0000, &cut);
        until_sent(&rig, &mut tx, 2);
        let sent = rig.outputs.packets.lock().clone();
        assert!(sent.iter().eq(left.iter().copied()), "{features:#x}");
        assert_eq!(rig.set.malformed(0) - before, 2 - left.len() as u64);
    }
    assert!(rig.outputs.frames.lock().is_empty());
}

#[test]
fn malformed_headers_are_dropped_and_counted_and_the_rest_goes_on() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, ALL, 0x1_0000, &[64, 64]).remove(1);
    let mut at = BUFFERS;
    let mut send = |bytes: &[u8]| {
        put(&rig, &mut tx, at, bytes);
        at += 0x1_4000;
    };
    let with = |at: usize, value: u8| {
        let mut bytes = segment(2000);
        bytes[at] = value;
        bytes
    };
    let bad = [
        with(0, 0),                    // cut without its checksum
        with(1, 3),                    // UDP
        with(1, 4),                    // IPv6
        with(7, 0xff),                 // a checksum beyond the end
        with(HEADER + 23, 17),         // no TCP
        segment(MAX_SEGMENT - 54 + 1), // too long
        summed(MAX_FRAME - 54 + 1),
    ];
    bad.iter().for_each(|bytes| send(bytes));
    let longest = segment(MAX_SEGMENT - 54);
    send(&longest);
    until_sent(&rig, &mut tx, bad.len() + 1);
    assert!(*rig.outputs.packets.lock() == [longest]);
    assert_eq!(rig.set.malformed(0), bad.len() as u64);
    // What the driver should not say is not passed on: DATA_VALID, the number of buffers.
    let mut told = summed(100);
    (told[0], told[10], told[11]) = (3, 9, 9);
    let mut plain = [&NOTHING[..], &[5; 60]].concat();
    (plain[0], plain[2], plain[10]) = (2, 54, 1);
    put(&rig, &mut tx, BUFFERS, &told);
    put(&rig, &mut tx, BUFFERS + 0x1_4000, &plain);
    until_sent(&rig, &mut tx, 2);
    assert_eq!(rig.outputs.packets.lock()[1], summed(100));
    assert_eq!(*rig.outputs.frames.lock(), [[5; 60]]);
}

#[test]
fn large_segments_wait_for_room_and_leave_in_order() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, ALL, 0x1_0000, &[64, 64]).remove(1);
    rig.outputs.full.store(true, SeqCst);
    let sent: Vec<_> = (0..12).map(|n| segment(60_000 + n)).collect();
    for (n, bytes) in (0..).zip(&sent) {
        put(&rig, &mut tx, BUFFERS + n * 0x1_0000, bytes);
    }
    tx.kick(&rig);
    wait_for("a refusal", || rig.outputs.calls.load(SeqCst) > 0);
    rig.outputs.full.store(false, SeqCst);
    rig.set.retry_outputs();
    wait_for("all sent", || {
        rig.outputs.packets.lock().len() == sent.len()
    });
    assert!(*rig.outputs.packets.lock() == sent);
}

/// Offers `count` buffers of `len` bytes from `first` on.
fn offer(rig: &Rig, rx: &mut Queue, first: u64, count: u64, len: u32) {
    for n in first..first + count {
        rx.add(rig, &[], &[(BUFFERS + n * 0x1000, len)]);
    }
}

/// The frames that the driver finds: header and frame, as many buffers as the header says.
fn found(rig: &Rig, rx: &mut Queue, heads: &mut u64) -> Vec<Vec<u8>> {
    let used = rx.used(rig);
    let mut rest = used.as_slice();
    let mut all = Vec::new();
    while let Some((_, first)) = rest.first() {
        let at = BUFFERS + *heads * 0x1000;
        let count = rig.get(at + 10, 2);
        let count = usize::from(u16::from_le_bytes([count[0], count[1]]));
        assert!((1..=rest.len()).contains(&count), "all of it is there");
        let mut bytes = rig.get(at, *first as usize);
        for (n, (_, len)) in (1..).zip(&rest[1..count]) {
            bytes.extend(rig.get(at + n * 0x1000, *len as usize));
        }
        bytes[10..12].fill(0);
        all.push(bytes);
        *heads += count as u64;
        rest = &rest[count..];
    }
    all
}

#[test]
fn a_received_segment_takes_as_many_buffers_as_it_needs_or_none() {
    for features in [ALL, ALL | EVENT_IDX] {
        let rig = Rig::started();
        let mut rx = drive(&rig, NET, features, 0x1_0000, &[128, 64]).remove(0);
        assert_eq!(rig.set.offloads(0), Offloads::ALL);
        let mut heads = 0;
        let big = segment(60_000);
        let small = [&NOTHING[..], &[9; 60]].concat();
        offer(&rig, &mut rx, 0, 41, 1500);
        // 61,500 bytes of the 60,066 needed; then none are left for the next one.
        assert_eq!(rig.set.net_rx(0, packet(&big)), RxOutcome::Delivered);
        assert_eq!(rig.irqs(NET), 1);
        assert!(found(&rig, &mut rx, &mut heads) == [big.clone()]);
        assert_eq!(heads, 41);
        offer(&rig, &mut rx, 41, 40, 1500);
        assert_eq!(rig.set.net_rx(0, packet(&big)), RxOutcome::NoBuffers);
        assert_eq!(rx.unseen(&rig), 0, "nothing is given in part");
        assert_eq!(rig.set.rx_delivered(0), 1);
        let woken = || rig.set.rx_wakeup(0).unwrap().read().is_ok();
        while woken() {}
        offer(&rig, &mut rx, 81, 1, 1500);
        rx.kick(&rig);
        wait_for("woken by one more buffer", woken);
        assert_eq!(rig.set.net_rx(0, packet(&big)), RxOutcome::Delivered);
        assert!(found(&rig, &mut rx, &mut heads) == [big.clone()]);
        offer(&rig, &mut rx, 82, 3, 1500);
        for _ in 0..3 {
            assert_eq!(rig.set.net_rx(0, packet(&small)), RxOutcome::Delivered);
        }
        assert!(found(&rig, &mut rx, &mut heads) == vec![small; 3]);
        assert_eq!(rig.set.rx_delivered(0), 5);
    }
}

#[test]
fn a_frame_that_no_buffers_could_ever_hold_is_dropped() {
    let rig = Rig::started();
    let mut rx = drive(&rig, NET, ALL, 0x1_0000, &[8, 16]).remove(0);
    offer(&rig, &mut rx, 0, 8, 1500);
    assert_eq!(
        rig.set.net_rx(0, packet(&segment(20_000))),
        RxOutcome::Dropped
    );
    let fits = segment(8 * 1500 - 66);
    assert_eq!(rig.set.net_rx(0, packet(&fits)), RxOutcome::Delivered);
    assert!(found(&rig, &mut rx, &mut 0) == [fits]);
    // Without merging a frame has one chain.
    let mut rx = drive(&rig, NET, ALL & !MRG_RXBUF, 0x1_0000, &[8, 16]).remove(0);
    offer(&rig, &mut rx, 0, 4, 1500);
    assert_eq!(
        rig.set.net_rx(0, packet(&segment(3000))),
        RxOutcome::Dropped
    );
    // Chains of more buffers than any frame needs.
    let mut rx = drive(&rig, NET, ALL, 0x1_0000, &[256, 16]).remove(0);
    for _ in 0..2 {
        let many: Vec<_> = (0..128).map(|n| (BUFFERS + n * 64, 64)).collect();
        rx.add(&rig, &[], &many);
    }
    assert_eq!(
        rig.set.net_rx(0, packet(&segment(60_000))),
        RxOutcome::NoBuffers
    );
    let half = segment(128 * 64 - 66 + 1);
    assert_eq!(rig.set.net_rx(0, packet(&half)), RxOutcome::Delivered);
    assert_eq!(rx.used(&rig), [(0, 128 * 64), (128, 1)]);
}

#[test]
fn a_guest_is_left_only_what_it_has_agreed_to() {
    let rig = Rig::started();
    let changed = || rig.set.renegotiated(0).unwrap().read().is_ok();
    let none = Offloads::NONE;
    let checksum = Offloads {
        checksum: true,
        ..none
    };
    let four = Offloads {
        tso4: true,
        ..checksum
    };
    for (features, agreed) in [
        (0, none),
        (GUEST_CSUM, checksum),
        (GUEST_TSO4 | GUEST_ECN, none),
        (GUEST_CSUM | GUEST_ECN, checksum),
        (GUEST_CSUM | GUEST_TSO4, four),
    ] {
        let mut rx = drive(&rig, NET, features | MRG_RXBUF, 0x1_0000, &[64, 16]).remove(0);
        assert!(changed());
        assert_eq!(rig.set.offloads(0), agreed);
        offer(&rig, &mut rx, 0, 64, 1500);
        let outcome = |taken| match taken {
            true => RxOutcome::Delivered,
            false => RxOutcome::Dropped,
        };
        let mut valid = [&NOTHING[..], &[7; 60]].concat();
        valid[0] = 2;
        let got = rig.set.net_rx(0, packet(&summed(1000)));
        assert_eq!(got, outcome(agreed.checksum));
        let got = rig.set.net_rx(0, packet(&segment(9000)));
        assert_eq!(got, outcome(agreed.tso4));
        assert_eq!(rig.set.net_rx(0, packet(&valid)), RxOutcome::Delivered);
        let last = found(&rig, &mut rx, &mut 0).pop().unwrap();
        assert_eq!(last[0], if agreed.checksum { 2 } else { 0 });
    }
    rig.write(NET, 0x70, 0);
    assert!(changed());
    assert_eq!(rig.set.offloads(0), none);
}

#[test]
fn a_device_without_offloads_offers_what_it_always_did() {
    let rig = Rig::with_nic(crate::config::NicConfig {
        offload: false,
        ..NIC
    });
    rig.write(NET, 0x14, 0);
    assert_eq!(rig.read(NET, 0x10), (1 << 5 | EVENT_IDX) as u32);
    // A peer's state of a guest that uses them is refused.
    let other = Rig::new();
    drive(&other, NET, ALL, 0x1_0000, &[64, 64]);
    other.set.quiesce();
    let state = save(&other);
    assert!(rig.set.restore(StateReader::new(&state)).is_err());
    // The other way round a guest that does not know of them goes on without.
    let old = Rig::with_nic(crate::config::NicConfig {
        offload: false,
        ..NIC
    });
    drive(&old, NET, 0, 0x1_0000, &[64, 64]);
    old.set.quiesce();
    let next = Rig::new();
    next.set.restore(StateReader::new(&save(&old))).unwrap();
    assert_eq!(next.set.offloads(0), Offloads::NONE);
}

fn save(rig: &Rig) -> Vec<u8> {
    let mut state = Vec::with_capacity(1 << 16);
    rig.set.save(&mut StateWriter::new(&mut state)).unwrap();
    state
}

#[test]
fn what_is_agreed_and_half_a_segments_buffers_go_along_to_the_next_machine() {
    let rig = Rig::started();
    let mut rx = drive(&rig, NET, ALL | EVENT_IDX, 0x1_0000, &[128, 64]).remove(0);
    let (mut heads, big) = (0, segment(30_000));
    offer(&rig, &mut rx, 0, 30, 1500);
    assert_eq!(rig.set.net_rx(0, packet(&big)), RxOutcome::Delivered);
    // Nine buffers are left of which a second one would take all and more.
    assert_eq!(rig.set.net_rx(0, packet(&big)), RxOutcome::NoBuffers);
    rig.set.quiesce();
    let state = save(&rig);
    let next = Rig::new();
    next.put(0, &rig.all_ram());
    next.set.restore(StateReader::new(&state)).unwrap();
    assert!(next.set.renegotiated(0).unwrap().read().is_ok());
    assert_eq!(next.set.offloads(0), Offloads::ALL);
    next.set.quiesce();
    assert!(save(&next) == state);
    next.set.release();
    next.set.start().unwrap();
    next.set.kick_all();
    assert_eq!(next.set.net_rx(0, packet(&big)), RxOutcome::NoBuffers);
    offer(&next, &mut rx, 30, 12, 1500);
    assert_eq!(next.set.net_rx(0, packet(&big)), RxOutcome::Delivered);
    assert!(found(&next, &mut rx, &mut heads) == [big.clone(), big]);
    assert_eq!(heads, 42);
    assert_eq!(next.set.rx_delivered(0), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever a guest writes before its frames, nothing but sound headers leave.
    #[test]
    fn no_header_of_a_guest_leaves_unread(
        headers in prop::collection::vec(any::<[u8; HEADER]>(), 1..20),
        payload in 0usize..4000,
        features in any::<u64>(),
    ) {
        let rig = Rig::new();
        let features = features & ALL;
        let mut tx = drive(&rig, NET, features, 0x1_0000, &[64, 64]).remove(1);
        for (n, header) in (0..).zip(&headers) {
            let mut bytes = segment(payload);
            bytes[..HEADER].copy_from_slice(header);
            // The likely places more often.
            (bytes[0], bytes[1]) = (bytes[0] & 3, bytes[1] & 0x85);
            if n % 2 == 0 {
                bytes[6..10].copy_from_slice(&[34, 0, 16, 0]);
            }
            put(&rig, &mut tx, BUFFERS + n * 0x2000, &bytes);
        }
        while rig.set.devices.nets[0].transmit() {}
        let sent = rig.outputs.packets.lock();
        let plain = rig.outputs.frames.lock().len();
        prop_assert_eq!(tx.used(&rig).len(), headers.len());
        prop_assert_eq!(sent.len() + plain + rig.set.malformed(0) as usize, headers.len());
        for bytes in sent.iter() {
            prop_assert!(features & CSUM != 0 && bytes[0] == 1);
            prop_assert!(bytes[1] == 0 || bytes[1] & 1 != 0 && features & HOST_TSO4 != 0);
            prop_assert_eq!(&bytes[10..12], [0, 0]);
        }
    }
}
