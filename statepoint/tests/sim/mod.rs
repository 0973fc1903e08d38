//! A simulated pair: guests that are arrays of memory, cables with faults, and the oracle.
//!
//! The guest's workload writes random pages, a disk and a counter, and shows the counter with a
//! nonce made from its memory, so that an output tells which past it comes from. Every time a
//! capture reads the guest its whole memory is written down by counter: the oracle compares.

#![allow(dead_code, clippy::unwrap_used)]

pub mod cable;
mod guest;

pub use guest::*;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cable::{Fault, Meter, cable};

use ax_wire::record::{Arbiter, Flush, Member, Record as PairRecord, State};
use ax_wire::state::StateReader;
use ax_wire::{EpochId, Generation, Incarnation, PairId, Session, Side};
use io_barrier::{Barrier, BarrierConfig, Boottime, FtGrant, ShadowOutputs, SoloGrant};
use parking_lot::Mutex;
use statepoint::guest::Guest;
use statepoint::primary::{
    Ended, PrimaryConfig, PrimaryEngine, PrimaryError, PrimaryEvents, PrimaryHandle, Start,
};
use statepoint::shadow::{
    CommittedState, Inheritance, ShadowConfig, ShadowEngine, ShadowError, ShadowEvents,
    ShadowHandle,
};

pub const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(0xa),
};
pub const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(0xb),
};

pub fn session(incarnation: Incarnation, generation: u64) -> Session {
    Session {
        pair: PairId([3; 16]),
        generation: Generation(generation),
        incarnation,
    }
}

fn record(state: State) -> PairRecord {
    PairRecord {
        generation: Generation(1),
        arbiter: Arbiter::Operator,
        by: None,
        state,
        machines: Default::default(),
    }
}

pub fn solo(me: Member) -> SoloGrant {
    SoloGrant::of(&record(State::Alone { holder: me }), me).unwrap()
}

pub fn ft(me: Member, shadow: Member) -> FtGrant {
    let state = State::Ft {
        holder: me,
        shadow: shadow.incarnation,
        flush: Flush::Local,
    };
    FtGrant::of(&record(state), me).unwrap()
}

/// Opens the gate as the pair's state machine would once the shadow has confirmed.
pub struct Enter {
    pub barrier: Arc<Barrier>,
    pub handle: Mutex<Option<PrimaryHandle>>,
    pub confirmed: AtomicU64,
    pub failed_captures: AtomicU64,
    pub durable: AtomicU64,
    /// Bytes of the initial copy so far, and in all.
    pub copied: Mutex<(u64, u64)>,
}

impl PrimaryEvents for Enter {
    fn copying(&self, sent: u64, total: u64) {
        *self.copied.lock() = (sent, total);
    }

    fn confirmed(&self, epoch: EpochId) {
        self.confirmed.store(epoch.0, Ordering::SeqCst);
        self.barrier.protect(ft(A, B));
        if let Some(handle) = &*self.handle.lock() {
            handle.granted(Generation(2));
        }
    }

    fn durable(&self, epoch: EpochId) {
        let before = self.durable.swap(epoch.0, Ordering::SeqCst);
        assert!(before < epoch.0, "durable epochs only grow");
    }

    fn capture_failed(&self, _: &statepoint::primary::CaptureError) {
        self.failed_captures.fetch_add(1, Ordering::SeqCst);
    }
}

pub struct SeenByShadow {
    pub confirmed: AtomicU64,
    pub generation: AtomicU64,
}

impl ShadowEvents for SeenByShadow {
    fn confirmed(&self, epoch: EpochId, _: Generation) {
        self.confirmed.store(epoch.0, Ordering::SeqCst);
    }

    fn granted(&self, generation: Generation) {
        self.generation.store(generation.0, Ordering::SeqCst);
    }
}

/// Everything of one pair.
pub struct Pair {
    pub sim: Sim,
    pub barrier: Arc<Barrier>,
    pub net: Net,
    pub enter: Arc<Enter>,
    pub primary: PrimaryEngine<Sim, Source>,
    pub primary_handle: PrimaryHandle,
    pub copy: Copy,
    pub disk: Disk,
    pub seen: Arc<SeenByShadow>,
    pub shadow: ShadowEngine<Copy, Disk>,
    pub shadow_handle: ShadowHandle,
    pub stop: Arc<AtomicBool>,
}

pub fn quick() -> PrimaryConfig {
    let start = Start::FullCopy { after: EpochId(0) };
    let mut config = PrimaryConfig::new(session(A.incarnation, 1), B.incarnation, start);
    config.policy.min_gap_ns = 50_000;
    config.policy.max_interval_ns = 2_000_000;
    config.policy.poll_ns = 1_000_000;
    config.slot_bytes = 4 << 20;
    config.verify_every = 1;
    config
}

pub fn shadow_config() -> ShadowConfig {
    ShadowConfig::new(
        session(A.incarnation, 1),
        B.incarnation,
        std::env::temp_dir(),
    )
}

impl Pair {
    pub fn new(seed: u64) -> Pair {
        Pair::with(seed, quick(), shadow_config(), 1_000_000_000)
    }

    pub fn with(
        seed: u64,
        primary: PrimaryConfig,
        shadow: ShadowConfig,
        permission_ns: u64,
    ) -> Pair {
        let (sim, net) = (Sim::new(seed), Net::default());
        let config = BarrierConfig {
            epoch_bytes: 1 << 16,
            max_epochs: 4,
            permission_ns,
        };
        let barrier = Barrier::new(config, Box::new(net.clone()), Arc::new(Boottime));
        let barrier = Arc::new(barrier);
        barrier.pass(solo(A));
        let enter = Arc::new(Enter {
            barrier: barrier.clone(),
            handle: Mutex::new(None),
            confirmed: AtomicU64::new(0),
            failed_captures: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            copied: Mutex::default(),
        });
        let (engine, primary_handle) = PrimaryEngine::new(
            primary,
            sim.clone(),
            Source(sim.clone(), 0, Asked::default()),
            enter.clone(),
            barrier.clone(),
            Arc::new(Boottime),
        );
        *enter.handle.lock() = Some(primary_handle.clone());
        barrier.on_pending({
            let handle = primary_handle.clone();
            move || handle.wake()
        });
        let (copy, disk) = (Copy::new(), Disk::default());
        let seen = Arc::new(SeenByShadow {
            confirmed: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        });
        let (shadow, shadow_handle) = ShadowEngine::new(
            shadow,
            copy.clone(),
            disk.clone(),
            None,
            seen.clone(),
            Arc::new(Boottime),
        );
        Pair {
            sim,
            barrier,
            net,
            enter,
            primary: engine,
            primary_handle,
            copy,
            disk,
            seen,
            shadow,
            shadow_handle,
            stop: Arc::default(),
        }
    }

    /// B of `old` as primary, A of `old` as its shadow from the final epoch `from`.
    pub fn swapped(old: &Pair, from: CommittedState) -> Pair {
        let mut config = quick();
        config.start = Start::Synced { at: from.epoch };
        let mut pair = Pair::with(22, config.clone(), shadow_config(), 1_000_000_000);
        let (memory, disk) = (old.copy.memory.lock().clone(), old.disk.0.lock().0.clone());
        pair.sim = Sim::from(memory, disk, 23);
        pair.sim.track_dirty(true).unwrap();
        let (net, bounds) = (Net::default(), BarrierConfig::default());
        let bounds = BarrierConfig {
            permission_ns: 1_000_000_000,
            ..bounds
        };
        let barrier = Barrier::new(bounds, Box::new(net.clone()), Arc::new(Boottime));
        pair.barrier = Arc::new(barrier);
        pair.net = net;
        old.shadow_handle
            .with_outputs(|outputs| pair.barrier.promote(ft(A, B), outputs, from.epoch));
        (pair.primary, pair.primary_handle) = PrimaryEngine::new(
            config,
            pair.sim.clone(),
            Source(pair.sim.clone(), 0, Asked::default()),
            pair.enter.clone(),
            pair.barrier.clone(),
            Arc::new(Boottime),
        );
        let handle = pair.primary_handle.clone();
        pair.barrier.on_pending(move || handle.wake());
        *pair.copy.memory.lock() = old.sim.lock().memory.clone();
        *pair.disk.0.lock() = (old.sim.lock().disk.clone(), from.epoch.0, true);
        let mut outputs = ShadowOutputs::new(shadow_config().output_bytes);
        old.barrier.retire(&mut outputs).unwrap();
        let from = Inheritance {
            committed: from,
            outputs,
        };
        (pair.shadow, pair.shadow_handle) = ShadowEngine::new(
            shadow_config(),
            pair.copy.clone(),
            pair.disk.clone(),
            Some(from),
            pair.seen.clone(),
            Arc::new(Boottime),
        );
        pair
    }

    /// The guest's workload in a thread, until `stop`.
    pub fn workload(&self) -> std::thread::JoinHandle<()> {
        let (sim, barrier, stop) = (self.sim.clone(), self.barrier.clone(), self.stop.clone());
        std::thread::spawn(move || {
            let mut rng = Rng(7);
            while !stop.load(Ordering::SeqCst) {
                for _ in 0..rng.below(8) {
                    sim.step(&barrier);
                }
                std::thread::sleep(Duration::from_micros(rng.below(300)));
            }
        })
    }

    /// I1, I2, I5 and "nothing lost" at the moment of the primary's death: what has left is in the
    /// shadow's committed past, the shadow's memory and disk are exactly the primary's at that
    /// epoch, and what has left plus what the shadow sends again is everything, in order.
    pub fn check_failover(&self) {
        let Some(committed) = self.shadow_handle.committed() else {
            assert_eq!(self.enter.confirmed.load(Ordering::SeqCst), 0);
            return;
        };
        self.check_copy(&committed);
        let counter = saved_counter(&committed);
        let left = self.net.0.lock().clone();
        let promoted = Net::default();
        let barrier = Barrier::new(
            BarrierConfig::default(),
            Box::new(promoted.clone()),
            Arc::new(Boottime),
        );
        self.shadow_handle
            .with_outputs(|outputs| barrier.promote(solo(B), outputs, committed.epoch));
        let again = promoted.0.lock().clone();
        let last = left.last().map_or(0, |l| l.0);
        assert!(
            last <= counter,
            "I1: {last} has left, the shadow only knows {counter}"
        );
        let numbers: Vec<u64> = left.iter().map(|l| l.0).collect();
        assert_eq!(
            numbers,
            (1..=last).collect::<Vec<_>>(),
            "in order, exactly once"
        );
        let first = again.first().map_or(counter + 1, |f| f.0);
        assert!(
            first <= last + 1,
            "lost: {last} has left, {first} is sent again first"
        );
        let expected: Vec<u64> = (first..=counter).collect();
        let numbers: Vec<u64> = again.iter().map(|l| l.0).collect();
        assert_eq!(
            numbers, expected,
            "sent again in order, up to the committed"
        );
        for output in again {
            let same = left.iter().find(|l| l.0 == output.0);
            assert!(
                same.is_none_or(|l| l.1 == output.1),
                "two pasts under one counter"
            );
        }
    }

    /// What the pair's state machine does when the shadow is lost before FT was granted: the record
    /// still says alone, so outputs pass again and everything is copied anew.
    pub fn entering_failed(&self, error: &PrimaryError) -> bool {
        let failed = matches!(error, PrimaryError::OutOfStep { shadow: None, .. });
        if failed {
            assert_eq!(self.enter.confirmed.load(Ordering::SeqCst), 0);
            self.barrier.pass(solo(A));
        }
        failed
    }

    pub fn check_copy(&self, committed: &CommittedState) {
        let counter = saved_counter(committed);
        let inner = self.sim.lock();
        let (memory, disk) = &inner.history[&counter];
        assert!(
            *memory == *self.copy.memory.lock(),
            "I2: memory differs at {counter}"
        );
        assert!(
            *disk == self.disk.0.lock().0,
            "the disk differs at {counter}"
        );
        assert!(self.disk.0.lock().2, "in sync was never said");
    }
}

/// The counter in a saved state.
pub fn saved_counter(committed: &CommittedState) -> u64 {
    let mut blocks = StateReader::new(&committed.state);
    let block = blocks.next().unwrap().unwrap();
    let counter = u64::from_le_bytes(block.payload.try_into().unwrap());
    let rest = blocks.next().unwrap().unwrap();
    assert!(
        rest.payload == guest::registers(counter),
        "its state differs"
    );
    counter
}

/// Waits until `what`, at most a minute: longer is a hang.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        if start.elapsed() > Duration::from_secs(60) {
            // Not a panic: scoped threads that hang would have to be joined first.
            eprintln!("hangs: {what}");
            std::process::abort();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Both engines over one connection, in threads; `while_running` decides when it is over.
pub fn connect(
    pair: &mut Pair,
    forward: Fault,
    backward: Fault,
    meter: &Meter,
    while_running: impl FnOnce(&dyn Fn() -> bool),
) -> (Result<Ended, PrimaryError>, ShadowError) {
    let (a, b) = cable(forward, backward, meter);
    let close = a.close.clone();
    std::thread::scope(|scope| {
        let primary = scope.spawn(|| pair.primary.run(a));
        let shadow = scope.spawn(|| pair.shadow.run(b));
        while_running(&|| primary.is_finished() || shadow.is_finished());
        until("an engine does not end with its connection", || {
            if shadow.is_finished() || primary.is_finished() {
                close();
            }
            primary.is_finished() && shadow.is_finished()
        });
        (primary.join().unwrap(), shadow.join().unwrap())
    })
}
