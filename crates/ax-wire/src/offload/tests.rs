use super::*;
use crate::records::{Records, push};
use proptest::prelude::*;

/// A TCP segment over IPv4 with `payload` bytes; its TCP header begins at byte 34.
fn v4(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; 14];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0; 12]);
    frame.extend([0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    frame.extend(vec![7; payload]);
    frame
}

/// As above, over IPv6 behind a hop-by-hop header and a tag; its TCP header begins at byte 66.
fn v6(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x81, 0, 0, 5, 0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0, 0, 0, 0, 64]);
    frame.extend([1; 32]);
    frame.extend([6, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend([0; 12]);
    frame.extend([0x60, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend(vec![7; payload]);
    frame
}

fn header(flags: u8, gso: u8, size: u16, start: u16, offset: u16) -> [u8; HEADER] {
    let mut header = NOTHING;
    (header[0], header[1]) = (flags, gso);
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8..10].copy_from_slice(&offset.to_le_bytes());
    header
}

fn parse(header: [u8; HEADER], frame: &[u8]) -> Result<Work, Malformed> {
    Work::parse(&header, frame, Offloads::ALL)
}

#[test]
fn what_a_right_header_asks_for_is_understood_and_said_again() {
    let nothing = parse(NOTHING, &[0; 60]).unwrap();
    assert_eq!(nothing, Work::default());
    let sum = parse(header(1, 0, 0, 34, 6), &v4(100)).unwrap();
    assert_eq!((sum.cut, sum.verified), (None, false));
    let verified = parse(header(2, 0, 0, 0, 0), &v4(100)).unwrap();
    assert!(verified.verified);
    let four = parse(header(1, 1, 1460, 34, 16), &v4(60_000)).unwrap();
    let cut = Cut {
        ip: Ip::V4,
        ecn: false,
        size: 1460,
        headers: 54,
    };
    assert_eq!(four.cut, Some(cut));
    let six = parse(header(3, 0x84, 1000, 66, 16), &v6(60_000)).unwrap();
    let cut = Cut {
        ip: Ip::V6,
        ecn: true,
        size: 1000,
        headers: 90,
    };
    assert_eq!(six.cut, Some(cut));
    for (work, frame) in [
        (nothing, vec![0; 60]),
        (sum, v4(100)),
        (verified, v4(100)),
        (four, v4(60_000)),
        (six, v6(60_000)),
    ] {
        assert_eq!(parse(work.header(), &frame), Ok(work));
    }
}

#[test]
fn the_bytes_are_those_of_the_standard() {
    let work = parse(header(1, 0x81, 1460, 34, 16), &v4(3000)).unwrap();
    let bytes = [1, 0x81, 54, 0, 0xb4, 0x05, 34, 0, 16, 0, 0, 0];
    assert_eq!(work.header(), bytes);
}

#[test]
fn what_is_not_agreed_is_refused() {
    let frame = v4(3000);
    let ask = |header: [u8; HEADER], agreed| Work::parse(&header, &frame, agreed);
    let (sum, cut) = (header(1, 0, 0, 34, 16), header(1, 1, 1460, 34, 16));
    assert_eq!(ask(sum, Offloads::NONE), Err(Malformed::Unagreed));
    let checksum = Offloads {
        checksum: true,
        ..Offloads::NONE
    };
    assert!(ask(sum, checksum).is_ok());
    assert_eq!(ask(cut, checksum), Err(Malformed::Unagreed));
    let six = Offloads {
        tso4: false,
        ..Offloads::ALL
    };
    assert_eq!(ask(cut, six), Err(Malformed::Unagreed));
    let calm = Offloads {
        ecn: false,
        ..Offloads::ALL
    };
    assert!(ask(cut, calm).is_ok());
    assert_eq!(
        ask(header(1, 0x81, 1460, 34, 16), calm),
        Err(Malformed::Unagreed)
    );
    // Congestion without a segment; UDP, which is offered to nobody.
    for gso in [0x80, 3, 5, 2, 0x7f] {
        let header = header(1, gso, 1460, 34, 16);
        assert_eq!(ask(header, Offloads::ALL), Err(Malformed::Unagreed));
    }
    // That the checksums are right is told only to who wants to know.
    let told = ask(header(2, 0, 0, 0, 0), Offloads::NONE).unwrap();
    assert_eq!(told, Work::default());
    let odd = Offloads {
        checksum: false,
        ..Offloads::ALL
    };
    assert_eq!(odd.usable(), Offloads::NONE);
    assert_eq!(Offloads::ALL.usable(), Offloads::ALL);
}

#[test]
fn a_checksum_lies_within_the_frame() {
    let frame = v4(6);
    for (start, offset) in [(13, 0), (34, 25), (59, 0), (60, 0), (u16::MAX, u16::MAX)] {
        let refused = parse(header(1, 0, 0, start, offset), &frame);
        assert_eq!(refused, Err(Malformed::Checksum), "{start} + {offset}");
    }
    assert!(parse(header(1, 0, 0, 14, 0), &frame).is_ok());
    assert!(parse(header(1, 0, 0, 58, 0), &frame).is_ok());
}

#[test]
fn only_a_whole_tcp_segment_is_cut() {
    let right = header(1, 1, 1460, 34, 16);
    let changed = |at: usize, value: u8| {
        let mut frame = v4(3000);
        frame[at] = value;
        parse(right, &frame)
    };
    assert!(changed(0, 0).is_ok());
    for (at, value) in [
        (12, 9),    // another ethertype
        (14, 0x65), // IP version 6
        (14, 0x44), // an IP header too short
        (14, 0x46), // longer than the checksum's place says
        (20, 0x20), // a fragment
        (21, 1),    // another one
        (23, 17),   // UDP
        (46, 0x40), // a TCP header too short
    ] {
        assert_eq!(changed(at, value), Err(Malformed::Segment), "byte {at}");
    }
    let refused = [
        header(0, 1, 1460, 34, 16),
        header(1, 1, 0, 34, 16),
        header(1, 1, 1460, 38, 16),
        header(1, 1, 1460, 34, 6),
        header(1, 4, 1460, 34, 16),
    ];
    for header in refused {
        assert_eq!(parse(header, &v4(3000)), Err(Malformed::Segment));
    }
    // Its TCP header is longer than the frame.
    let mut short = v4(3);
    short[46] = 0x60;
    assert_eq!(parse(right, &short), Err(Malformed::Segment));
}

#[test]
fn a_frame_that_is_not_cut_is_no_longer_than_a_network_carries() {
    let lengths = |len: usize| parse(NOTHING, &vec![0; len]).map(drop);
    assert_eq!(lengths(MIN_FRAME - 1), Err(Malformed::Length));
    assert_eq!(lengths(MIN_FRAME), Ok(()));
    assert_eq!(lengths(MAX_FRAME), Ok(()));
    assert_eq!(lengths(MAX_FRAME + 1), Err(Malformed::Length));
    let cut = |len: usize| parse(header(1, 1, 1460, 34, 16), &v4(len - 54)).map(drop);
    assert_eq!(cut(MAX_SEGMENT), Ok(()));
    assert_eq!(cut(MAX_SEGMENT + 1), Err(Malformed::Length));
}

#[test]
fn a_record_carries_a_header_that_says_something_and_no_other() {
    let mut buf = Vec::with_capacity(4096);
    let mut plain = NOTHING.to_vec();
    plain.extend([5; 60]);
    let mut cut = header(1, 1, 1460, 34, 16).to_vec();
    cut.extend(v4(200));
    for bytes in [&plain, &cut] {
        let packet = Packet::new(bytes).unwrap();
        assert!(push(&mut buf, packet.sent(1)));
        assert!(push(&mut buf, packet.received(2, 9)));
    }
    let records: Vec<_> = Records::new(&buf).collect::<Result<_, _>>().unwrap();
    let kinds: Vec<_> = records.iter().map(|r| (r.kind, r.unit, r.at)).collect();
    assert_eq!(
        kinds,
        [
            (RecordKind::Frame, 1, 0),
            (RecordKind::Received, 2, 9),
            (RecordKind::FrameWithHeader, 1, 0),
            (RecordKind::ReceivedWithHeader, 2, 9),
        ]
    );
    for (record, bytes) in records.iter().zip([&plain, &plain, &cut, &cut]) {
        let (header, frame) = carried(record).unwrap();
        assert_eq!([&header[..], frame].concat(), **bytes);
    }
    let short = Record {
        kind: RecordKind::FrameWithHeader,
        unit: 0,
        at: 0,
        payload: &[1; HEADER - 1],
    };
    assert_eq!(carried(&short), None);
    assert_eq!(Packet::new(&[0; HEADER - 1]), None);
}

fn bits(bits: u8) -> Offloads {
    Offloads {
        checksum: bits & 1 != 0,
        tso4: bits & 2 != 0,
        tso6: bits & 4 != 0,
        ecn: bits & 8 != 0,
    }
}

proptest! {
    /// Whatever is let through is within the frame, agreed, and means the same when it is read again.
    #[test]
    fn hostile_headers_never_panic_and_what_passes_is_sound(
        random in any::<[u8; HEADER]>(),
        likely in (0u8..4, prop::sample::select(vec![0u8, 1, 4, 0x81, 0x84]), any::<u16>(), 14u16..120, 0u16..20),
        take in any::<bool>(),
        agreed in 0u8..16,
        changes in prop::collection::vec((0usize..120, any::<u8>()), 0..3),
        six in any::<bool>(),
        len in 0usize..3000,
    ) {
        let header = if take {
            let (flags, gso, size, start, offset) = likely;
            // Often the very place of the checksum.
            let (start, offset) = match (start % 3, six) {
                (0, false) => (34, 16),
                (0, true) => (66, 16),
                _ => (start, offset),
            };
            header(flags, gso, size, start, offset)
        } else {
            random
        };
        let mut frame = if six { v6(len) } else { v4(len) };
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(len.max(MIN_FRAME));
        let agreed = bits(agreed);
        if let Ok(work) = Work::parse(&header, &frame, agreed) {
            if let Some(sum) = work.checksum {
                prop_assert!(agreed.checksum && sum.start >= 14);
                prop_assert!(usize::from(sum.start) + usize::from(sum.offset) + 2 <= frame.len());
            }
            if let Some(cut) = work.cut {
                prop_assert!(work.checksum.is_some() && cut.size > 0);
                prop_assert!(usize::from(cut.headers) <= frame.len());
                let may = match cut.ip {
                    Ip::V4 => agreed.tso4,
                    Ip::V6 => agreed.tso6,
                };
                prop_assert!(may);
                prop_assert!(agreed.ecn || !cut.ecn);
            }
            prop_assert_eq!(Work::parse(&work.header(), &frame, agreed), Ok(work));
        }
    }
}
