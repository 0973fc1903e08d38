use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ax_wire::state::{StateReader, StateWriter};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::super::kinds::Kind;
use super::super::{Error, RxOutcome};
use super::rig::*;

const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
const DATA: u64 = 0x20_0000;

/// State of a rig that is quiet.
fn save(rig: &Rig) -> Vec<u8> {
    let mut state = Vec::with_capacity(1 << 16);
    rig.set.save(&mut StateWriter::new(&mut state)).unwrap();
    state
}

/// What a failover does: a quiet rig's RAM, state and image go to a fresh one, which starts.
fn take_over(rig: &Rig) -> Rig {
    let next = Rig::with(FakeDisk::new(rig.disk.image.lock().clone(), false));
    next.put(0, &rig.all_ram());
    let state = save(rig);
    next.set.restore(StateReader::new(&state)).unwrap();
    assert!(next.drain().is_empty(), "a restore writes no guest memory");
    next.set.quiesce();
    assert!(
        save(&next) == state,
        "what was saved is what the next machine has"
    );
    next.set.release();
    next.outputs
        .console
        .lock()
        .clone_from(&rig.outputs.console.lock());
    next.set.start().unwrap();
    next.set.kick_all();
    next
}

#[test]
fn what_was_saved_is_what_a_fresh_machine_then_has() {
    let rig = Rig::started();
    let mut net = drive(&rig, NET, EVENT_IDX, 0x1_0000, &[64, 64]);
    drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[128]);
    for _ in 0..5 {
        net[0].add(&rig, &[], &[(DATA, 2000)]);
        assert_eq!(rig.net_rx(0, &[3; 99]), RxOutcome::Delivered);
    }
    rig.set.pio_write(0x3f9, &[1]);
    rig.set.pio_write(0x3f8, b"hello");
    rig.set.console_in(b"typed");
    rig.set.pio_write(0x70, &[0x40]);
    rig.set.pio_write(0x71, &[0x99]);
    rig.set.quiesce();
    let state = save(&rig);
    assert_eq!(state, save(&rig), "saving changes nothing");
    let next = take_over(&rig);
    assert_eq!(next.set.rx_delivered(0), 5);
    net[0].add(&next, &[], &[(DATA, 2000)]);
    assert_eq!(next.net_rx(0, &[4; 99]), RxOutcome::Delivered);
    assert_eq!(net[0].used(&next).len(), 6);
    next.set.pio_write(0x3f8, b" again");
    assert_eq!(*next.outputs.console.lock(), b"hello again");
    let mut typed = [0; 5];
    next.set.pio_read(0x3f8, &mut typed);
    assert_eq!(typed, *b"typed");
}

/// The system control interrupt of a rig, as its chips would see it: every change, the first one from low.
fn sci(rig: &Rig) -> Arc<Mutex<Vec<bool>>> {
    let seen = Arc::<Mutex<Vec<bool>>>::default();
    let line = Arc::clone(&seen);
    rig.set
        .connect_sci(Box::new(move |level| line.lock().push(level)));
    seen
}

#[test]
fn a_press_that_the_guest_has_not_seen_yet_goes_along_and_raises_the_line_there() {
    let rig = Rig::started();
    let line = sci(&rig);
    assert!(!rig.set.press_power_button(), "nobody listens");
    rig.set.pio_write(0x602, &[0, 1]);
    assert!(rig.set.press_power_button() && rig.set.press_power_button());
    assert_eq!(*line.lock(), [true]);
    rig.set.quiesce();
    let next = take_over(&rig);
    let line = sci(&next);
    assert_eq!(*line.lock(), [true], "a line made anew gets the level due");
    let mut status = [0; 2];
    next.set.pio_read(0x600, &mut status);
    assert_eq!(status, [0, 1]);
    next.set.pio_write(0x600, &[0, 1]);
    assert_eq!(*line.lock(), [true, false]);
    // The machine that has its line already when it is restored, as every shadow has.
    let third = Rig::new();
    let line = sci(&third);
    third.set.restore(StateReader::new(&save(&rig))).unwrap();
    assert_eq!(*line.lock(), [true]);
    third.set.reset().unwrap();
    assert_eq!(*line.lock(), [true, false], "a reset forgets a press");
    third.set.start().unwrap();
    assert!(!third.set.press_power_button(), "and who listened");
}

#[test]
fn a_request_in_flight_is_issued_again_where_the_guest_goes_on() {
    for kind in [0, 1, 4] {
        let rig = Rig::started();
        let mut queue = drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[128]).remove(0);
        let image = rig.disk.image.lock().clone();
        rig.put(HEADERS, &header(kind, 8));
        rig.put(DATA, &[5; 1024]);
        rig.put(STATUS, &[0xee]);
        rig.disk.hold(true);
        let (h, d, s) = ((HEADERS, 16), (DATA, 1024), (STATUS, 1));
        match kind {
            0 => queue.add(&rig, &[h], &[d, s]),
            1 => queue.add(&rig, &[h, d], &[s]),
            _ => queue.add(&rig, &[h], &[s]),
        };
        queue.kick(&rig);
        wait_for("the request has begun", || {
            rig.disk.inside.load(SeqCst) == 1
        });
        rig.set.quiesce(); // does not wait for the disk
        rig.disk.hold(false);
        wait_for("the I/O has ended", || rig.disk.inside.load(SeqCst) == 0);
        assert_eq!(
            rig.disk.seen.load(SeqCst),
            0,
            "the worker waits at the gate"
        );
        let mut at_failover = queue.clone();
        let next = take_over(&rig);
        assert_eq!(at_failover.wait_used(&next).len(), 1);
        assert_eq!(next.get(STATUS, 1), [0]);
        let data = vec![5; 1024];
        match kind {
            0 => assert!(next.get(DATA, 1024) == image[4096..5120]),
            1 => assert_eq!(
                *next.disk.log.lock(),
                [
                    Logged::Wrote(4096, data.clone()),
                    Logged::WriteSeen(4096, data)
                ]
            ),
            _ => assert_eq!(*next.disk.log.lock(), [Logged::Flushed, Logged::FlushSeen]),
        }
        rig.set.release();
        assert_eq!(
            queue.wait_used(&rig).len(),
            1,
            "here it completes too, if nobody takes over"
        );
    }
}

#[test]
fn a_chain_of_failovers_at_any_moment_completes_every_request_once() {
    let mut rig = Rig::started();
    let mut queue = drive(&rig, BLK, BLK_FLUSH | EVENT_IDX, 0x2_0000, &[64]).remove(0);
    let (mut issued, mut done) = (0u64, 0u64);
    for round in 0..40u64 {
        for _ in 0..5 {
            let n = issued;
            let slot = n % 16;
            let (h, d, s) = (HEADERS + slot * 512, DATA + slot * 4096, STATUS + slot);
            rig.put(h, &header(1, n));
            rig.put(d, &[n as u8; 512]);
            rig.put(s, &[0xee]);
            queue.add(&rig, &[(h, 16), (d, 512)], &[(s, 1)]);
            issued += 1;
        }
        queue.kick(&rig);
        // Somewhere among the five, differently each time.
        let until = done + round % 4;
        wait_for("some done", || {
            done += queue.used(&rig).len() as u64;
            done >= until
        });
        rig.set.quiesce();
        rig = take_over(&rig);
        wait_for("all done after the failover", || {
            done += queue.used(&rig).len() as u64;
            done >= issued
        });
        assert_eq!(done, issued);
    }
    let image = rig.disk.image.lock();
    for n in 0..issued as usize {
        assert!(
            image[n * 512..(n + 1) * 512].iter().all(|b| *b == n as u8),
            "sector {n}"
        );
    }
}

#[test]
fn frames_held_back_leave_the_next_machine() {
    let rig = Rig::started();
    let mut tx = drive(&rig, NET, EVENT_IDX, 0x1_0000, &[64, 64]).remove(1);
    rig.outputs.full.store(true, SeqCst);
    rig.set.pio_write(0x3f8, b"waiting");
    for n in 0..10u8 {
        rig.put(DATA + u64::from(n) * 4096 + 12, &[n; 100]);
        tx.add(&rig, &[(DATA + u64::from(n) * 4096, 112)], &[]);
    }
    tx.kick(&rig);
    wait_for("a refusal", || rig.outputs.calls.load(SeqCst) > 2);
    rig.set.quiesce();
    let next = take_over(&rig);
    wait_for("all sent", || next.outputs.frames.lock().len() == 10);
    let frames = next.outputs.frames.lock();
    assert!(
        frames
            .iter()
            .zip(0u8..)
            .all(|(frame, n)| *frame == [n; 100])
    );
    wait_for("console", || *next.outputs.console.lock() == b"waiting");
}

#[test]
fn promotion_kicks_every_running_device_and_no_other() {
    let rig = Rig::new();
    drive(&rig, NET, 0, 0x1_0000, &[64, 64]);
    for (_, _, doorbell) in &rig.set.wires()[NET].doorbells {
        assert_eq!(doorbell.read().unwrap(), 1, "rung by the driver's start");
    }
    rig.set.kick_all();
    assert_eq!((rig.irqs(NET), rig.irqs(BLK), rig.irqs(RNG)), (1, 0, 0));
    assert_eq!(rig.read(NET, 0x60), 1);
    for (_, _, doorbell) in &rig.set.wires()[NET].doorbells {
        assert_eq!(doorbell.read().unwrap(), 1);
    }
}

#[test]
fn reset_is_power_on_but_the_streams_go_on() {
    let rig = Rig::started();
    let mut rx = drive(&rig, NET, 0, 0x1_0000, &[64, 64]).remove(0);
    rx.add(&rig, &[], &[(DATA, 2000)]);
    rig.net_rx(0, &[0; 60]);
    rig.set.pio_write(0x3fb, &[0x83]);
    rig.set.pio_write(0x3fb, &[0x03]);
    rig.set.pio_write(0x3f8, b"before");
    assert!(matches!(rig.set.reset(), Err(Error::NotQuiet(_))));
    rig.set.quiesce();
    rig.set.reset().unwrap();
    rig.set.release();
    assert_eq!(rig.read(NET, 0x70), 0);
    assert_eq!(rig.net_rx(0, &[0; 60]), RxOutcome::NotReady);
    assert_eq!(rig.set.rx_delivered(0), 1);
    rig.set.pio_write(0x3f8, b" after");
    assert_eq!(*rig.outputs.console.lock(), b"before after");
    drive(&rig, NET, 0, 0x1_0000, &[64, 64]);
}

#[test]
fn saving_and_restoring_ask_for_quiet() {
    let rig = Rig::started();
    let mut buffer = Vec::with_capacity(1 << 16);
    assert!(matches!(
        rig.set.save(&mut StateWriter::new(&mut buffer)),
        Err(Error::NotQuiet("saved"))
    ));
    assert!(matches!(
        rig.set.restore(StateReader::new(&[])),
        Err(Error::NotQuiet("restored"))
    ));
    rig.set.quiesce();
    let mut small = Vec::with_capacity(256);
    assert!(matches!(
        rig.set.save(&mut StateWriter::new(&mut small)),
        Err(Error::Full(_))
    ));
}

/// One saved block, to be tampered with.
type Raw = (u16, u16, u32, Vec<u8>);

fn blocks(state: &[u8]) -> Vec<Raw> {
    let block = |b: ax_wire::state::Block<'_>| (b.kind, b.version, b.index, b.payload.to_vec());
    StateReader::new(state).map(|b| block(b.unwrap())).collect()
}

fn joined(blocks: &[Raw]) -> Vec<u8> {
    let mut state = Vec::with_capacity(1 << 16);
    let mut writer = StateWriter::new(&mut state);
    for (kind, version, index, payload) in blocks {
        writer.block(*kind, *version, *index, payload).unwrap();
    }
    state
}

#[test]
fn state_that_does_not_fit_is_refused_and_changes_nothing() {
    let rig = Rig::new();
    drive(&rig, NET, 0, 0x1_0000, &[64, 64]);
    rig.set.quiesce();
    let good = blocks(&save(&rig));
    assert_eq!(good.len(), 5);
    let mut bad: Vec<(&str, Vec<Raw>)> = Vec::new();
    let mut with = |what, change: &dyn Fn(&mut Vec<Raw>)| {
        let mut blocks = good.clone();
        change(&mut blocks);
        bad.push((what, blocks));
    };
    for i in 0..good.len() {
        with("missing", &|b| drop(b.remove(i)));
        with("doubled", &|b| b.push(b[i].clone()));
        with("newer", &|b| b[i].1 = 2);
        with("longer", &|b| b[i].3.push(0));
        with("shorter", &|b| {
            b[i].3.pop();
        });
    }
    with("another number", &|b| b[0].2 = 1);
    with("unknown kind", &|b| b[0].0 = 0x1ff);
    with("another MAC", &|b| {
        let at = b[0].3.len() - 16;
        b[0].3[at] ^= 1;
    });
    with("another disk size", &|b| {
        let at = b[1].3.len() - 16;
        b[1].3[at] ^= 1;
    });
    with("a FIFO too long", &|b| b[3].3[8 + 11] = 65);
    with("a backlog too long", &|b| b[3].3[9] = 0xff);
    with("a ring outside RAM", &|b| b[0].3[32 + 7] = 0xff);
    let fresh = Rig::new();
    fresh.set.quiesce();
    let before = save(&fresh);
    for (what, blocks) in bad {
        let result = fresh.set.restore(StateReader::new(&joined(&blocks)));
        assert!(
            matches!(result, Err(Error::State { .. })),
            "{what}: {result:?}"
        );
        assert_eq!(save(&fresh), before, "{what}");
    }
    let mut torn = joined(&good);
    torn.pop();
    torn.truncate(torn.len() - 8);
    assert!(matches!(
        fresh.set.restore(StateReader::new(&torn)),
        Err(Error::Damaged(_))
    ));
    let mut more = good.clone();
    more.insert(0, (Kind::Net.number() - 1, 9, 0, vec![1, 2, 3]));
    fresh.set.restore(StateReader::new(&joined(&more))).unwrap();
    assert_eq!(
        save(&fresh),
        joined(&good),
        "other owners' blocks are skipped"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A peer's state is hostile: whatever is accepted must then be harmless to run.
    #[test]
    fn tampered_state_never_panics(
        changes in prop::collection::vec((0usize..5, any::<prop::sample::Index>(), any::<u8>()), 1..8),
        frame in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let rig = Rig::new();
        drive(&rig, NET, EVENT_IDX, 0x1_0000, &[64, 64])[0].add(&rig, &[], &[(DATA, 2000)]);
        drive(&rig, BLK, BLK_FLUSH, 0x2_0000, &[64])[0].add(&rig, &[(HEADERS, 16)], &[(STATUS, 1)]);
        rig.set.quiesce();
        let mut blocks = blocks(&save(&rig));
        for (block, at, value) in changes {
            let payload = &mut blocks[block].3;
            let at = at.index(payload.len());
            payload[at] = value;
        }
        let next = Rig::new();
        next.put(0, &rig.all_ram());
        next.outputs.lax.store(true, SeqCst);
        if next.set.restore(StateReader::new(&joined(&blocks))).is_ok() {
            next.set.start().unwrap();
            next.set.kick_all();
            next.net_rx(0, &frame);
            next.set.console_in(&frame);
            next.set.pio_write(0x3f8, &frame);
            next.set.quiesce();
            save(&next);
        }
    }
}
