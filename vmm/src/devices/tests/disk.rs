use std::sync::atomic::Ordering::SeqCst;

use super::super::MAX_REQUEST;
use super::rig::*;

const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
const DATA: u64 = 0x20_0000;

/// Issues one request and waits for it. Returns its status byte and length used.
fn request(rig: &Rig, queue: &mut Queue, kind: u32, sector: u64, data: u64, len: u32) -> (u8, u32) {
    rig.put(HEADERS, &header(kind, sector));
    rig.put(STATUS, &[0xee]);
    let (h, s, d) = ((HEADERS, 16), (STATUS, 1), (data, len));
    let head = match (kind, len) {
        (_, 0) => queue.add(rig, &[h], &[s]),
        (1, _) => queue.add(rig, &[h, d], &[s]),
        _ => queue.add(rig, &[h], &[d, s]),
    };
    queue.kick(rig);
    let used = queue.wait_used(rig);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].0, u32::from(head));
    (rig.get(STATUS, 1)[0], used[0].1)
}

fn disk(rig: &Rig, features: u64) -> Queue {
    drive(rig, BLK, features, 0x2_0000, &[128]).remove(0)
}

#[test]
fn what_is_written_and_flushed_reads_back_and_the_stream_has_it() {
    for features in [BLK_FLUSH, BLK_FLUSH | EVENT_IDX] {
        let rig = Rig::started();
        let mut queue = disk(&rig, features);
        let mut want = rig.disk.image.lock().clone();
        let mut log = Vec::new();
        for n in 0..60u64 {
            let (sector, len) = (n * 37 % 1000, 512 * (1 + n as usize % 40));
            let data: Vec<u8> = (0..len).map(|i| (i as u64 * 3 + n) as u8).collect();
            rig.put(DATA, &data);
            assert_eq!(
                request(&rig, &mut queue, 1, sector, DATA, len as u32),
                (0, 1)
            );
            let at = sector as usize * 512;
            want[at..at + len].copy_from_slice(&data);
            log.push(Logged::Wrote(sector * 512, data.clone()));
            log.push(Logged::WriteSeen(sector * 512, data));
            if n % 5 == 0 {
                assert_eq!(request(&rig, &mut queue, 4, 0, 0, 0), (0, 1));
                log.push(Logged::Flushed);
                log.push(Logged::FlushSeen);
            }
        }
        assert_eq!(*rig.disk.log.lock(), log);
        for at in (0..DISK).step_by(MAX_REQUEST) {
            let sector = at as u64 / 512;
            let len = MAX_REQUEST as u32;
            assert_eq!(
                request(&rig, &mut queue, 0, sector, DATA, len),
                (0, len + 1)
            );
            assert!(
                rig.get(DATA, MAX_REQUEST) == want[at..at + MAX_REQUEST],
                "at {at}"
            );
        }
    }
}

#[test]
fn the_capacity_and_limits_are_announced() {
    let rig = Rig::new();
    let mut config = [0; 24];
    rig.set
        .mmio_read(rig.set.wires()[BLK].base + 0x100, &mut config);
    let word = |i: usize| u32::from_le_bytes(config[i..i + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (DISK as u32 / 512, 0));
    assert_eq!((word(8) * word(12)) as usize, MAX_REQUEST);
    assert_eq!(word(20), 512);
}

#[test]
fn without_the_flush_feature_every_write_is_durable_when_it_completes() {
    let rig = Rig::started();
    let mut queue = disk(&rig, 0);
    rig.put(DATA, &[7; 512]);
    assert_eq!(request(&rig, &mut queue, 1, 3, DATA, 512), (0, 1));
    use Logged::*;
    let data = vec![7; 512];
    let want = [
        Wrote(1536, data.clone()),
        Flushed,
        WriteSeen(1536, data),
        FlushSeen,
    ];
    assert_eq!(*rig.disk.log.lock(), want);
}

#[test]
fn the_disk_has_a_stable_name() {
    let rig = Rig::started();
    let mut queue = disk(&rig, BLK_FLUSH);
    assert_eq!(request(&rig, &mut queue, 8, 0, DATA, 20), (0, 21));
    assert_eq!(rig.get(DATA, 20), *b"ax-disk0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn requests_out_of_bounds_fail_and_touch_nothing() {
    let rig = Rig::started();
    let mut queue = disk(&rig, BLK_FLUSH);
    let before = rig.disk.image.lock().clone();
    let last = DISK as u64 / 512;
    for kind in [0, 1] {
        for (sector, len) in [
            (last, 512),
            (last - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, 511),
            (0, MAX_REQUEST as u32 + 512),
        ] {
            let (status, _) = request(&rig, &mut queue, kind, sector, DATA, len);
            assert_eq!(status, 1, "type {kind} sector {sector} length {len}");
        }
    }
    for kind in [2, 11, 13, 99] {
        assert_eq!(
            request(&rig, &mut queue, kind, 0, DATA, 512).0,
            2,
            "type {kind}"
        );
    }
    assert!(*rig.disk.image.lock() == before);
    assert!(rig.disk.log.lock().is_empty());
    assert_eq!(
        request(&rig, &mut queue, 0, last - 1, DATA, 512).0,
        0,
        "the disk goes on"
    );
}

#[test]
fn an_io_error_reaches_the_guest_and_not_the_stream() {
    let rig = Rig::started();
    let mut queue = disk(&rig, BLK_FLUSH);
    rig.disk.fail.store(true, SeqCst);
    for kind in [0, 1] {
        assert_eq!(request(&rig, &mut queue, kind, 1, DATA, 512).0, 1);
    }
    assert_eq!(request(&rig, &mut queue, 4, 0, 0, 0).0, 1);
    assert_eq!(rig.disk.seen.load(SeqCst), 0);
    rig.disk.fail.store(false, SeqCst);
    assert_eq!(request(&rig, &mut queue, 1, 1, DATA, 512).0, 0);
}

/// Rule 13: who can't do a request shows the guest nothing of it, and leaves it for whoever can.
#[test]
fn a_request_given_back_is_seen_by_nobody_and_done_later() {
    for (kind, len) in [(0, 512), (1, 512), (4, 0)] {
        let rig = Rig::started();
        let mut queue = disk(&rig, BLK_FLUSH);
        rig.disk.gives_back.store(true, SeqCst);
        rig.put(DATA, &[9; 512]);
        rig.put(HEADERS, &header(kind, 1));
        rig.put(STATUS, &[0xee]);
        let (h, s, d) = ((HEADERS, 16), (STATUS, 1), (DATA, len));
        match kind {
            0 => queue.add(&rig, &[h], &[d, s]),
            1 => queue.add(&rig, &[h, d], &[s]),
            _ => queue.add(&rig, &[h], &[s]),
        };
        queue.kick(&rig);
        wait_for("it is tried", || rig.disk.inside_ever.load(SeqCst) > 0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(queue.used(&rig).is_empty() && rig.get(STATUS, 1) == [0xee]);
        assert_eq!(
            rig.disk.seen.load(SeqCst),
            0,
            "the stream has nothing of it"
        );
        rig.disk.gives_back.store(false, SeqCst);
        rig.set.kick_all();
        assert_eq!(queue.wait_used(&rig).len(), 1);
        assert_eq!(rig.get(STATUS, 1), [0]);
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let rig = Rig::with(FakeDisk::new(vec![1; DISK], true));
    rig.set.start().unwrap();
    let mut queue = disk(&rig, BLK_FLUSH | 1 << 5);
    rig.put(DATA, &[2; 512]);
    assert_eq!(request(&rig, &mut queue, 1, 0, DATA, 512).0, 1);
    assert_eq!(request(&rig, &mut queue, 0, 0, DATA, 512).0, 0);
    assert_eq!(rig.get(DATA, 512), [1; 512]);
}

#[test]
fn image_and_stream_get_the_same_bytes_whatever_the_guest_does_meanwhile() {
    let rig = Rig::started();
    let mut queue = disk(&rig, BLK_FLUSH);
    rig.put(DATA, &[1; 4096]);
    rig.put(HEADERS, &header(1, 8));
    rig.disk.hold(true);
    queue.add(&rig, &[(HEADERS, 16), (DATA, 4096)], &[(STATUS, 1)]);
    queue.kick(&rig);
    wait_for("the write has begun", || rig.disk.inside.load(SeqCst) == 1);
    rig.put(DATA, &[2; 4096]);
    assert!(queue.used(&rig).is_empty());
    rig.disk.hold(false);
    queue.wait_used(&rig);
    let data = vec![1; 4096];
    assert_eq!(
        *rig.disk.log.lock(),
        [
            Logged::Wrote(4096, data.clone()),
            Logged::WriteSeen(4096, data)
        ]
    );
}

#[test]
fn a_write_overtaken_by_a_reset_is_recorded_but_not_answered() {
    let rig = Rig::started();
    let mut queue = disk(&rig, BLK_FLUSH);
    rig.put(DATA, &[1; 512]);
    rig.put(HEADERS, &header(1, 8));
    rig.put(STATUS, &[0xee]);
    rig.disk.hold(true);
    queue.add(&rig, &[(HEADERS, 16), (DATA, 512)], &[(STATUS, 1)]);
    queue.kick(&rig);
    wait_for("the write has begun", || rig.disk.inside.load(SeqCst) == 1);
    rig.write(BLK, 0x70, 0);
    let mut queue = disk(&rig, BLK_FLUSH);
    rig.disk.hold(false);
    assert_eq!(request(&rig, &mut queue, 0, 8, DATA + 0x1000, 512).0, 0);
    assert_eq!(rig.get(DATA + 0x1000, 512), [1; 512]);
    let data = vec![1; 512];
    assert_eq!(
        *rig.disk.log.lock(),
        [
            Logged::Wrote(4096, data.clone()),
            Logged::WriteSeen(4096, data)
        ]
    );
    assert!(
        queue.used(&rig).is_empty(),
        "the old request is answered nowhere"
    );
}

#[test]
fn entropy_fills_what_it_says() {
    let rig = Rig::started();
    let mut queue = drive(&rig, RNG, EVENT_IDX, 0x3_0000, &[8]).remove(0);
    for _ in 0..20 {
        rig.put(DATA, &[0; 512]);
        queue.add(&rig, &[], &[(DATA, 100), (DATA + 200, 100)]);
        queue.kick(&rig);
        assert_eq!(queue.wait_used(&rig)[0].1, 200);
        let got = rig.get(DATA, 512);
        assert!(got[..100].iter().any(|b| *b != 0) && got[200..300].iter().any(|b| *b != 0));
        assert!(got[100..200].iter().chain(&got[300..]).all(|b| *b == 0));
    }
}
