//! The gate seen from outside: what leaves, when, and in what order.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ax_wire::offload::{HEADER, NOTHING, Packet};
use ax_wire::record::{Arbiter, Member, Record as PairRecord, State};
use ax_wire::records::{Record, RecordKind, Records};
use ax_wire::{EpochId, Generation, Incarnation, Side};
use io_barrier::{
    Barrier, BarrierConfig, Clock, FtGrant, Full, Gate, OutputSink, Power, Release, SealError,
    Sealed, ShadowOutputs, SoloGrant,
};
use parking_lot::Mutex;
use proptest::prelude::*;

const ME: Member = Member {
    side: Side::A,
    incarnation: Incarnation(1),
};

fn record(state: State) -> PairRecord {
    PairRecord {
        generation: Generation(1),
        arbiter: Arbiter::Operator,
        by: None,
        state,
        machines: Default::default(),
    }
}

fn ft() -> FtGrant {
    let state = State::Ft {
        holder: ME,
        shadow: Incarnation(2),
        flush: ax_wire::record::Flush::Local,
    };
    FtGrant::of(&record(state), ME).unwrap()
}

fn solo() -> SoloGrant {
    SoloGrant::of(&record(State::Alone { holder: ME }), ME).unwrap()
}

#[derive(Clone, Default)]
struct Wire(Arc<Mutex<Vec<u64>>>);

impl Wire {
    fn seen(&self) -> Vec<u64> {
        self.0.lock().clone()
    }
}

impl OutputSink for Wire {
    fn frame(&mut self, _nic: u8, _header: &[u8; HEADER], frame: &[u8]) {
        let number = frame[..8].try_into().unwrap();
        self.0.lock().push(u64::from_le_bytes(number));
    }

    fn console(&mut self, offset: u64, _bytes: &[u8]) {
        self.0.lock().push(offset);
    }

    fn power(&mut self, _what: Power) {
        self.0.lock().push(u64::MAX);
    }
}

#[derive(Clone, Default)]
struct Hand(Arc<AtomicU64>);

impl Clock for Hand {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

fn barrier(config: BarrierConfig) -> (Barrier, Wire, Hand) {
    let (wire, hand) = (Wire::default(), Hand::default());
    let barrier = Barrier::new(config, Box::new(wire.clone()), Arc::new(hand.clone()));
    (barrier, wire, hand)
}

fn hold(barrier: &Barrier, number: u64) -> Result<(), Full> {
    let mut payload = [0; 60];
    payload[..8].copy_from_slice(&number.to_le_bytes());
    barrier.hold(Record {
        kind: RecordKind::Frame,
        unit: 0,
        at: 0,
        payload: &payload,
    })
}

fn power(barrier: &Barrier) {
    let record = Record {
        kind: RecordKind::PowerOff,
        unit: 0,
        at: 0,
        payload: &[],
    };
    barrier.hold(record).unwrap();
}

fn small() -> BarrierConfig {
    BarrierConfig {
        epoch_bytes: 1024,
        max_epochs: 3,
        permission_ns: 100,
    }
}

#[test]
fn i1_nothing_leaves_before_its_epoch_is_committed_and_a_grant_is_there() {
    let (barrier, wire, _) = barrier(small());
    assert_eq!(
        barrier.gate(),
        Gate::Frozen,
        "a process begins without permission"
    );
    barrier.pass(solo());
    hold(&barrier, 1).unwrap();
    assert_eq!(wire.seen(), [1]);
    assert_eq!(barrier.start_holding(), Gate::Entering);
    hold(&barrier, 2).unwrap();
    let mut copy = Vec::new();
    let sealed = barrier.seal(EpochId(1), &mut copy).unwrap();
    assert_eq!((sealed.outputs, sealed.bytes), (1, copy.len()));
    assert!(sealed.since_ns.is_some());
    let nothing = barrier.seal(EpochId(2), &mut Vec::new()).unwrap();
    assert_eq!(nothing, Sealed::default());
    hold(&barrier, 3).unwrap();
    assert_eq!(barrier.release(EpochId(1), 0), Release::Withheld);
    barrier.protect(ft());
    assert_eq!(wire.seen(), [1]);
    assert_eq!(barrier.release(EpochId(1), 0), Release::Done);
    assert_eq!(wire.seen(), [1, 2]);
    assert_eq!(barrier.released(), EpochId(1));
    let copied: Vec<_> = Records::new(&copy).map(|r| r.unwrap().kind).collect();
    assert_eq!(
        copied,
        [RecordKind::Frame],
        "held outputs travel with their epoch"
    );
}

#[test]
fn a_permission_expires_between_two_frames_and_a_newer_one_goes_on() {
    struct Slow(Wire, Hand);
    impl OutputSink for Slow {
        fn frame(&mut self, nic: u8, _header: &[u8; HEADER], frame: &[u8]) {
            self.0.frame(nic, &NOTHING, frame);
            self.1.0.fetch_add(60, Ordering::SeqCst);
        }
        fn console(&mut self, _: u64, _: &[u8]) {}
        fn power(&mut self, _: Power) {}
    }
    let (wire, hand) = (Wire::default(), Hand::default());
    let sink = Slow(wire.clone(), hand.clone());
    let barrier = Barrier::new(small(), Box::new(sink), Arc::new(hand.clone()));
    barrier.protect(ft());
    (1..=3).for_each(|n| hold(&barrier, n).unwrap());
    barrier.seal(EpochId(1), &mut Vec::new()).unwrap();
    assert_eq!(barrier.release(EpochId(1), 0), Release::Expired);
    assert_eq!(wire.seen(), [1, 2], "0 and 60 are within 100, 120 is not");
    assert_eq!(
        barrier.released(),
        EpochId(0),
        "an epoch released in part is not released"
    );
    assert!(barrier.oldest_held_ns() > 0);
    assert_eq!(barrier.release(EpochId(1), hand.now_ns()), Release::Done);
    assert_eq!(wire.seen(), [1, 2, 3]);
    assert_eq!(barrier.oldest_held_ns(), 0);
}

/// Rule 28: outputs leave at once, and only while a lease lasts that acknowledgements renew.
#[test]
fn with_a_lease_outputs_leave_at_once_until_it_is_over_and_again_when_it_is_renewed() {
    let (barrier, wire, hand) = barrier(small());
    let rung = Arc::new(AtomicBool::new(false));
    let ring = Arc::clone(&rung);
    barrier.on_room(move || ring.store(true, Ordering::SeqCst));
    assert_eq!(
        barrier.start_leasing(1000),
        Gate::Frozen,
        "not without a grant"
    );
    barrier.pass(solo());
    assert_eq!(barrier.start_leasing(1000), Gate::Leased);
    assert_eq!(barrier.start_holding(), Gate::Leased);
    hold(&barrier, 1).unwrap();
    hand.0.store(1000, Ordering::SeqCst);
    hold(&barrier, 2).unwrap();
    hand.0.store(1001, Ordering::SeqCst);
    assert_eq!(hold(&barrier, 3), Err(Full));
    power(&barrier);
    // An acknowledgement of what was sent too long ago renews nothing.
    assert_eq!(barrier.release(EpochId(1), 0), Release::Done);
    assert_eq!(hold(&barrier, 3), Err(Full));
    assert_eq!(wire.seen(), [1, 2]);
    rung.store(false, Ordering::SeqCst);
    assert_eq!(barrier.release(EpochId(2), 500), Release::Done);
    assert!(rung.load(Ordering::SeqCst), "who was refused is told");
    assert_eq!(wire.seen(), [1, 2, u64::MAX], "a poweroff is not lost");
    hold(&barrier, 3).unwrap();
    // Epochs close without outputs, in order.
    let mut copy = Vec::new();
    assert_eq!(barrier.seal(EpochId(3), &mut copy).unwrap().bytes, 0);
    assert!(barrier.seal(EpochId(3), &mut copy).is_err() && copy.is_empty());
    // A late stamp never shortens it; frozen, nothing leaves.
    assert_eq!(barrier.release(EpochId(3), 0), Release::Done);
    hand.0.store(1500, Ordering::SeqCst);
    hold(&barrier, 4).unwrap();
    barrier.freeze();
    hold(&barrier, 5).unwrap();
    assert_eq!(barrier.release(EpochId(4), 1500), Release::Withheld);
    assert_eq!(wire.seen(), [1, 2, u64::MAX, 3, 4]);
    barrier.pass(solo());
    assert_eq!(wire.seen(), [1, 2, u64::MAX, 3, 4, 5]);
}

#[test]
fn after_freezing_nothing_leaves_until_granted() {
    let (barrier, wire, _) = barrier(small());
    barrier.protect(ft());
    hold(&barrier, 1).unwrap();
    barrier.seal(EpochId(1), &mut Vec::new()).unwrap();
    barrier.freeze();
    assert_eq!(barrier.release(EpochId(1), 0), Release::Withheld);
    hold(&barrier, 2).unwrap();
    power(&barrier);
    assert!(wire.seen().is_empty());
    barrier.pass(solo());
    assert_eq!(wire.seen(), [1, 2, u64::MAX], "in order, poweroff too");
    hold(&barrier, 3).unwrap();
    assert_eq!(wire.seen().last(), Some(&3));
}

#[test]
fn a_full_epoch_refuses_frames_but_never_a_poweroff_and_tells_when_there_is_room() {
    let (barrier, wire, _) = barrier(small());
    let told = Arc::new(AtomicU64::new(0));
    let pending = Arc::new(AtomicU64::new(0));
    barrier.on_room({
        let told = told.clone();
        move || {
            told.fetch_add(1, Ordering::SeqCst);
        }
    });
    barrier.on_pending({
        let pending = pending.clone();
        move || {
            pending.fetch_add(1, Ordering::SeqCst);
        }
    });
    barrier.protect(ft());
    let fitting = (1..).find(|n| hold(&barrier, *n).is_err()).unwrap() - 1;
    assert!(fitting > 5);
    power(&barrier);
    power(&barrier);
    assert_eq!(
        pending.load(Ordering::SeqCst),
        2,
        "the first output, and no room"
    );
    barrier.resumed();
    assert_eq!(
        told.load(Ordering::SeqCst),
        1,
        "refused before: told at the next resume"
    );
    barrier.seal(EpochId(1), &mut Vec::new()).unwrap();
    hold(&barrier, 100).unwrap();
    assert_eq!(barrier.release(EpochId(1), 0), Release::Done);
    let seen = wire.seen();
    assert_eq!(seen.len() as u64, fitting + 1);
    assert_eq!(
        seen.last(),
        Some(&u64::MAX),
        "one poweroff, however often it was asked for"
    );
}

#[test]
fn sealing_is_bounded_and_ordered() {
    let (barrier, _, _) = barrier(small());
    barrier.protect(ft());
    let mut out = Vec::new();
    for epoch in 1..=3 {
        barrier.seal(EpochId(epoch), &mut out).unwrap();
    }
    assert!(!barrier.can_seal());
    assert_eq!(
        barrier.seal(EpochId(4), &mut out),
        Err(SealError::TooMany(3))
    );
    assert_eq!(barrier.release(EpochId(3), 0), Release::Done);
    assert!(matches!(
        barrier.seal(EpochId(3), &mut out),
        Err(SealError::Order { .. })
    ));
    barrier.pass(solo());
    assert_eq!(barrier.seal(EpochId(4), &mut out), Err(SealError::Passing));
}

#[test]
fn a_promoted_side_sends_what_is_not_known_released_first() {
    let (primary, _, _) = barrier(small());
    primary.protect(ft());
    let mut kept = ShadowOutputs::new(1 << 16);
    for epoch in 1..=3 {
        hold(&primary, epoch).unwrap();
        let mut out = Vec::new();
        primary.seal(EpochId(epoch), &mut out).unwrap();
        kept.push(EpochId(epoch), &out).unwrap();
        let _ = primary.release(EpochId(epoch), 0);
    }
    kept.released(EpochId(1));
    let (promoted, wire, _) = barrier(small());
    hold(&promoted, 4).unwrap();
    promoted.promote(solo(), &kept, EpochId(3));
    assert_eq!(wire.seen(), [2, 3, 4]);
    let (swapped, wire, hand) = barrier(small());
    hand.0.store(1000, Ordering::SeqCst);
    swapped.promote(ft(), &kept, EpochId(3));
    hold(&swapped, 4).unwrap();
    assert_eq!(wire.seen(), [], "after a planned failover all outputs wait");
    assert_eq!(swapped.released(), EpochId(1), "the next shadow is told so");
    assert!(swapped.seal(EpochId(3), &mut Vec::new()).is_err(), "I5");
    swapped.seal(EpochId(4), &mut Vec::new()).unwrap();
    assert!(
        !swapped.if_permitted(|| {}),
        "nobody has permitted anything"
    );
    assert_eq!(swapped.release(EpochId(3), 899), Release::Expired);
    assert_eq!(wire.seen(), []);
    assert_eq!(swapped.release(EpochId(3), 900), Release::Done);
    assert_eq!(wire.seen(), [2, 3]);
    assert!(swapped.if_permitted(|| {}));
    assert_eq!(swapped.release(EpochId(4), 950), Release::Done);
    assert_eq!(wire.seen(), [2, 3, 4]);
    // Alone in the end, before any permission: everything leaves, in order.
    let (alone, wire, _) = barrier(small());
    alone.promote(ft(), &kept, EpochId(3));
    hold(&alone, 4).unwrap();
    alone.freeze();
    alone.pass(solo());
    assert_eq!(wire.seen(), [2, 3, 4]);
}

#[test]
fn a_grant_is_for_exactly_its_holder() {
    let other = Member {
        incarnation: Incarnation(9),
        ..ME
    };
    assert!(SoloGrant::of(&record(State::Alone { holder: other }), ME).is_none());
    let state = State::Ft {
        holder: other,
        shadow: ME.incarnation,
        flush: ax_wire::record::Flush::Local,
    };
    assert!(FtGrant::of(&record(state), ME).is_none());
    assert!(SoloGrant::of(&record(state), ME).is_none());
}

/// Devices hold, an engine seals and releases, and the gate is opened and frozen over and over, all at
/// once: order is kept, each leaves once, and nothing leaves while frozen.
#[test]
fn races_of_every_transition_lose_double_or_reorder_nothing() {
    let (barrier, wire, _) = barrier(BarrierConfig {
        epoch_bytes: 1 << 14,
        max_epochs: 4,
        permission_ns: 100,
    });
    let barrier = Arc::new(barrier);
    let done = AtomicBool::new(false);
    const COUNT: u64 = 40_000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..COUNT {
                while hold(&barrier, number).is_err() {
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::SeqCst);
        });
        scope.spawn(|| {
            let mut epoch = 0;
            let mut out = Vec::new();
            while !done.load(Ordering::SeqCst) {
                out.clear();
                if barrier.seal(EpochId(epoch + 1), &mut out).is_ok() {
                    epoch += 1;
                }
                let _ = barrier.release(EpochId(epoch), 0);
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                barrier.start_holding();
                barrier.protect(ft());
                barrier.freeze();
                let before = wire.seen().len();
                std::thread::yield_now();
                assert_eq!(wire.seen().len(), before, "something left while frozen");
                barrier.pass(solo());
                std::thread::yield_now();
            }
        });
    });
    barrier.pass(solo());
    assert_eq!(wire.seen(), (0..COUNT).collect::<Vec<_>>());
}

#[derive(Clone, Debug)]
enum Op {
    Hold,
    Power,
    Seal,
    Release { back: u64, age: u64 },
    Tick(u64),
    StartHolding,
    Protect,
    Freeze,
    Pass,
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Hold),
        1 => Just(Op::Power),
        4 => Just(Op::Seal),
        4 => (0u64..3, 0u64..200).prop_map(|(back, age)| Op::Release { back, age }),
        2 => (1u64..150).prop_map(Op::Tick),
        1 => Just(Op::StartHolding),
        2 => Just(Op::Protect),
        1 => Just(Op::Freeze),
        1 => Just(Op::Pass),
    ]
}

proptest! {
    /// Against a naive model: a list of (epoch or open, output) and a gate.
    #[test]
    fn any_interleaving_is_as_the_naive_model(ops in prop::collection::vec(ops(), 0..120)) {
        let (barrier, wire, hand) = barrier(small());
        let mut gate = Gate::Frozen;
        let mut held: VecDeque<(Option<u64>, u64)> = VecDeque::new();
        let mut sealed: VecDeque<u64> = VecDeque::new();
        let mut left = vec![];
        let (mut next, mut epoch) = (0, 0);
        for op in ops {
            match op {
                Op::Hold => {
                    next += 1;
                    match hold(&barrier, next) {
                        Ok(()) if gate == Gate::Passing => left.push(next),
                        Ok(()) => held.push_back((None, next)),
                        Err(Full) => {
                            prop_assert!(gate != Gate::Passing);
                            prop_assert!(held.iter().filter(|h| h.0.is_none()).count() > 8);
                        }
                    }
                }
                Op::Power => {
                    power(&barrier);
                    if gate == Gate::Passing {
                        left.push(u64::MAX);
                    } else if !held.contains(&(None, u64::MAX)) {
                        held.push_back((None, u64::MAX));
                    }
                }
                Op::Seal => {
                    let mut out = Vec::new();
                    let result = barrier.seal(EpochId(epoch + 1), &mut out);
                    let can = gate != Gate::Passing && sealed.len() < 3;
                    prop_assert_eq!(result.is_ok(), can);
                    if can {
                        epoch += 1;
                        sealed.push_back(epoch);
                        let open = held.iter_mut().filter(|h| h.0.is_none());
                        let count = open.map(|h| h.0 = Some(epoch)).count();
                        prop_assert_eq!(Records::new(&out).count(), count);
                    }
                }
                Op::Release { back, age } => {
                    let up_to = epoch.saturating_sub(back);
                    let stamp = hand.now_ns().saturating_sub(age);
                    let fresh = hand.now_ns() - stamp <= 100;
                    let any = held.iter().any(|h| h.0.is_some_and(|e| e <= up_to));
                    let expected = match gate {
                        Gate::Frozen | Gate::Entering => Release::Withheld,
                        Gate::Protected if any && !fresh => Release::Expired,
                        Gate::Protected | Gate::Passing | Gate::Leased => Release::Done,
                    };
                    prop_assert_eq!(barrier.release(EpochId(up_to), stamp), expected);
                    if gate == Gate::Protected {
                        while let Some(first) = sealed.front().copied().filter(|e| *e <= up_to) {
                            let mine = held.iter().filter(|h| h.0 == Some(first)).count();
                            if mine > 0 && !fresh {
                                break;
                            }
                            left.extend(held.drain(..mine).map(|h| h.1));
                            sealed.pop_front();
                        }
                    }
                }
                Op::Tick(by) => {
                    hand.0.fetch_add(by, Ordering::SeqCst);
                }
                Op::StartHolding => {
                    if gate == Gate::Passing {
                        gate = Gate::Entering;
                    }
                    prop_assert_eq!(barrier.start_holding(), gate);
                }
                Op::Protect => {
                    barrier.protect(ft());
                    gate = Gate::Protected;
                }
                Op::Freeze => {
                    barrier.freeze();
                    gate = Gate::Frozen;
                }
                Op::Pass => {
                    barrier.pass(solo());
                    gate = Gate::Passing;
                    left.extend(held.drain(..).map(|h| h.1));
                    sealed.clear();
                }
            }
            prop_assert_eq!(barrier.gate(), gate);
            prop_assert_eq!(wire.seen(), left.clone());
        }
    }
}

/// What left, with its header.
#[derive(Clone, Default)]
struct Whole(Arc<Mutex<Vec<Vec<u8>>>>);

impl OutputSink for Whole {
    fn frame(&mut self, _nic: u8, header: &[u8; HEADER], frame: &[u8]) {
        self.0.lock().push([&header[..], frame].concat());
    }

    fn console(&mut self, _: u64, _: &[u8]) {}

    fn power(&mut self, _: Power) {}
}

#[test]
fn the_header_of_a_frame_goes_where_the_frame_goes() {
    let packet = |number: u8| {
        let mut bytes = vec![0; HEADER + 60];
        // Every other one leaves nothing to be done.
        bytes[0] = number % 2;
        bytes[HEADER] = number;
        bytes
    };
    let left = |by: &Whole| std::mem::take(&mut *by.0.lock());
    let whole = Whole::default();
    let hand = Arc::new(Hand::default());
    let barrier = Barrier::new(small(), Box::new(whole.clone()), hand.clone());
    let hold = |number| {
        let bytes = packet(number);
        barrier.hold(Packet::new(&bytes).unwrap().sent(0)).unwrap();
    };
    barrier.pass(solo());
    (1..=2).for_each(hold);
    assert_eq!(left(&whole), [packet(1), packet(2)]);
    barrier.start_holding();
    (3..=6).for_each(hold);
    let mut copy = Vec::new();
    barrier.seal(EpochId(1), &mut copy).unwrap();
    barrier.protect(ft());
    assert_eq!(barrier.release(EpochId(1), 0), Release::Done);
    let sent: Vec<_> = (3..=6).map(packet).collect();
    assert_eq!(left(&whole), sent);
    // The heir, which does not know that they have left.
    let mut kept = ShadowOutputs::new(1 << 16);
    kept.push(EpochId(1), &copy).unwrap();
    let again = Whole::default();
    let heir = Barrier::new(small(), Box::new(again.clone()), hand);
    heir.promote(solo(), &kept, EpochId(1));
    assert_eq!(left(&again), sent);
}
