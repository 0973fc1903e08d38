//! A primary's protection by one shadow: the real engine, its connections, the rotation of the maps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ax_disk::{Image, Stepped, SyncCursor, WriteLog, rotate};
use ax_sync::sim;
use ax_sync::thread::JoinHandle;
use ax_sync::{Condvar, Mutex};
use ax_wire::resync::Ask;
use ax_wire::{EpochId, Session};
use io_barrier::RxCounts;
use statepoint::guest::GuestError;
use statepoint::link::PrimaryLink;
use statepoint::primary::{
    DiskSync, Ended, EpochSource, PrimaryConfig, PrimaryEngine, PrimaryError, PrimaryEvents,
    PrimaryHandle, Start,
};
use statepoint::shadow::CommittedState;

use crate::guest::Machine;
use crate::net::{Connection, Mailbox};
use crate::process::{DETECT, Input, LEASE, Parts};
use crate::universe::{Running, Universe, place};

/// What it tells the process's main thread.
#[derive(Debug)]
pub enum Protecting {
    /// The rest goes with one epoch.
    CopyDone,
    /// The first whole epoch is acknowledged.
    Confirmed,
    /// The final epoch is.
    Final(EpochId),
    /// The shadow is given up.
    Lost(String),
}

struct Events {
    inbox: Mailbox<Input>,
    stint: u64,
    log: Arc<WriteLog>,
    in_sync: Arc<AtomicBool>,
}

impl PrimaryEvents for Events {
    fn copy_done(&self) {
        self.inbox
            .tell(Input::Protecting(self.stint, Protecting::CopyDone));
    }

    fn confirmed(&self, _: EpochId) {
        self.in_sync.store(true, Ordering::SeqCst);
        self.inbox
            .tell(Input::Protecting(self.stint, Protecting::Confirmed));
    }

    fn applied(&self, epoch: EpochId) {
        self.log.applied_on_shadow(epoch);
    }

    fn durable(&self, epoch: EpochId) {
        self.log.durable_on_shadow(epoch);
    }
}

struct Source {
    log: Arc<WriteLog>,
    image: Arc<Image>,
    cursor: Option<SyncCursor>,
    copied: bool,
}

fn trouble(source: impl std::error::Error + Send + Sync + 'static) -> GuestError {
    GuestError {
        doing: "compare the disks",
        source: Box::new(source),
    }
}

impl EpochSource for Source {
    fn restart_sync(&mut self) -> Result<(), GuestError> {
        self.log.record(true);
        let cursor = SyncCursor::new(vec![Arc::clone(&self.image)]).map_err(trouble)?;
        (self.cursor, self.copied) = (Some(cursor), false);
        Ok(())
    }

    fn sync_ask(&mut self) -> Option<Ask> {
        self.cursor.as_mut()?.ask()
    }

    fn sync_answered(&mut self, payload: &[u8]) -> bool {
        self.cursor.as_mut().is_some_and(|c| c.answered(payload))
    }

    fn sync_progress(&self) -> DiskSync {
        DiskSync::default()
    }

    fn sync_step(&mut self, records: &mut Vec<u8>) -> Result<bool, GuestError> {
        self.log.seal(records);
        let Some(cursor) = self.cursor.as_mut().filter(|_| !self.copied) else {
            return Ok(true);
        };
        self.copied = cursor.step(&self.log).map_err(trouble)? == Stepped::Done;
        Ok(false)
    }

    fn disk_bytes(&self) -> usize {
        self.log.len()
    }

    fn seal(&mut self, epoch: EpochId, records: &mut Vec<u8>) {
        self.log.seal_epoch(epoch, records);
    }

    fn rx_given(&self) -> RxCounts {
        RxCounts::default()
    }
}

/// Orders to the engine's thread after a final epoch.
enum Order {
    Unpark,
    /// Ends it; the guest goes on, or stays parked.
    End(bool),
    HandOver,
}

#[derive(Default)]
struct Desk {
    order: Mutex<Option<Order>>,
    given: Condvar,
    left: Mutex<Option<CommittedState>>,
}

/// A shadow being filled, or in step.
pub struct Protection {
    /// The shadow.
    pub shadow: Running,
    /// The engine.
    pub engine: PrimaryHandle,
    desk: Arc<Desk>,
    thread: JoinHandle<()>,
    over: Arc<AtomicBool>,
}

/// Dials a process: both connections, or none when the path is cut.
fn dial(universe: &Universe, mine: &Running, to: &Running) -> Option<[Connection; 2]> {
    let sides = [mine.me.side as usize, to.me.side as usize];
    let places = sides.map(place);
    let [a, b] = places;
    if universe.net.is_cut(a, b) || universe.net.is_cut(b, a) {
        return None;
    }
    if universe.process(sides[1]).is_none_or(|p| p.me != to.me) {
        return None;
    }
    let groups = [mine.group, to.group];
    let both = [(); 2].map(|()| Connection::new(&universe.net, places, groups));
    universe.connections.lock().extend(both.iter().cloned());
    Some(both)
}

fn config(session: Session, shadow: &Running, start: Start, ha: bool) -> PrimaryConfig {
    let mut config = PrimaryConfig::new(session, shadow.me.incarnation, start);
    config.slot_bytes = 12 * 4096;
    config.state_bytes = 4096;
    config.output_bytes = 1 << 14;
    config.policy.max_interval_ns = 8_000_000;
    config.verify_every = 5;
    config.copy_rest = 6;
    config.copy_rounds = 6;
    config.lease_ns = ha.then_some(LEASE);
    config
}

impl Protection {
    /// Begins to protect the guest by this shadow; none when it can't be dialled.
    pub fn begin(
        parts: &Parts,
        shadow: Running,
        session: Session,
        start: Start,
        stint: u64,
    ) -> Option<Protection> {
        let (universe, mine) = (Arc::clone(&parts.universe), parts.mine.clone());
        let [forward, backward] = dial(&universe, &mine, &shadow)?;
        let over = Arc::new(AtomicBool::new(false));
        let in_sync = Arc::new(AtomicBool::new(matches!(start, Start::Synced { .. })));
        keep_maps(parts, Arc::clone(&over), Arc::clone(&in_sync));
        let events = Events {
            inbox: mine.inbox.clone(),
            stint,
            log: Arc::clone(&parts.log),
            in_sync,
        };
        let source = Source {
            log: Arc::clone(&parts.log),
            image: Arc::clone(&parts.image),
            cursor: None,
            copied: false,
        };
        let (engine, handle) = PrimaryEngine::new(
            config(session, &shadow, start, universe.setting.ha),
            parts.machine.clone(),
            source,
            Arc::new(events),
            Arc::clone(&parts.barrier),
            parts.clock.clone(),
        );
        let at = place(mine.me.side as usize);
        let first = Input::Session {
            session,
            primary: mine.clone(),
            links: Connection::shadow(&forward, &backward),
        };
        shadow.inbox.send(at, first);
        let desk = Arc::new(Desk::default());
        let link = Connection::primary(&forward, &backward);
        let (to, doing) = (shadow.clone(), Arc::clone(&desk));
        let run = move || run(engine, link, &doing, &universe, &mine, &to, stint);
        let thread = ax_sync::thread::spawn("epochs", run).ok()?;
        *parts.bell.lock() = Some(handle.clone());
        Some(Protection {
            shadow,
            engine: handle,
            desk,
            thread,
            over,
        })
    }

    fn order(&self, order: Order) {
        *self.desk.order.lock() = Some(order);
        self.desk.given.notify_all();
    }

    /// Lets a guest parked by the final epoch go on.
    pub fn unpark(&self) {
        self.order(Order::Unpark);
    }

    /// Ends the protection.
    pub fn end(self, parts: &Parts, goes_on: bool) {
        *parts.bell.lock() = None;
        self.over.store(true, Ordering::SeqCst);
        self.engine.stop();
        self.order(Order::End(goes_on));
        let _ = self.thread.join();
    }

    /// The guest runs on the other side now.
    pub fn hand_over(self, parts: &Parts) -> Option<CommittedState> {
        *parts.bell.lock() = None;
        self.over.store(true, Ordering::SeqCst);
        self.order(Order::HandOver);
        self.engine.stop();
        let _ = self.thread.join();
        parts.log.record(false);
        parts.log.release_flushes();
        self.desk.left.lock().take()
    }
}

fn run(
    mut engine: PrimaryEngine<Machine, Source>,
    link: PrimaryLink,
    desk: &Desk,
    universe: &Universe,
    mine: &Running,
    shadow: &Running,
    stint: u64,
) {
    let tell = |what| mine.inbox.tell(Input::Protecting(stint, what));
    let redial = || {
        let here = sim::current()?;
        let until = here.now() + DETECT.as_nanos() as u64;
        loop {
            here.sleep(Duration::from_micros(200 + here.below(2_000)));
            if let Some([forward, backward]) = dial(universe, mine, shadow) {
                let links = Connection::shadow(&forward, &backward);
                let at = place(mine.me.side as usize);
                shadow.inbox.send(at, Input::Rejoin(mine.me, links));
                return Some(Connection::primary(&forward, &backward));
            }
            if here.now() > until {
                return None;
            }
        }
    };
    let mut next = Some(link);
    while let Some(link) = next.take() {
        match engine.run(link) {
            Ok(Ended::Stopped) => break,
            Ok(Ended::Final { epoch }) => {
                tell(Protecting::Final(epoch));
                let mut order = desk.order.lock();
                let order = loop {
                    match order.take() {
                        Some(order) => break order,
                        None => desk.given.wait(&mut order),
                    }
                };
                match order {
                    Order::Unpark => {
                        let _ = engine.unpark();
                        next = redial();
                        if next.is_none() {
                            tell(Protecting::Lost("after an unparking".into()));
                        }
                    }
                    Order::End(true) => break,
                    Order::HandOver => {
                        *desk.left.lock() = engine.last_committed();
                        return;
                    }
                    Order::End(false) => return,
                }
            }
            Err(error) => {
                universe.say(&format!("{} epoch stream: {error}", mine.me));
                if matches!(error, PrimaryError::Link(_)) {
                    next = redial();
                }
                if next.is_none() {
                    tell(Protecting::Lost(error.to_string()));
                }
            }
        }
    }
    let _ = engine.unpark();
    let (_, source, _) = engine.into_parts();
    source.log.record(false);
}

/// Rotates the maps now and then while in sync.
fn keep_maps(parts: &Parts, over: Arc<AtomicBool>, in_sync: Arc<AtomicBool>) {
    let (image, log) = (Arc::clone(&parts.image), Arc::clone(&parts.log));
    let keep = move || {
        let mut anyway = true;
        while !over.load(Ordering::SeqCst) {
            if in_sync.load(Ordering::SeqCst) {
                let go_on = || !over.load(Ordering::SeqCst);
                match rotate::rotate(&[Arc::clone(&image)], &log, anyway, go_on) {
                    Ok(rotated) => anyway = !rotated.done,
                    Err(_) => return,
                }
            }
            ax_sync::thread::sleep(Duration::from_millis(60));
        }
    };
    let _ = ax_sync::thread::spawn("disk-maps", keep);
}
