//! The primary's protection by one shadow process: session, sentinel, epoch engine.
//!
//! [`Protection`] is the conductor's handle; its thread runs the engine over one connection after
//! the other until it is told to stop, the peer is given up, or the final epoch is acknowledged.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ax_disk::{Stepped, SyncCursor, WriteLog};
use ax_link::heartbeat::{Line, LinkEvent, ProgressSource, Sentinel, Timing as LinkTiming};
use ax_link::{Channel, Connector, Preamble};
use ax_wire::heartbeat::Progress;
use ax_wire::peer::PeerMessage;
use ax_wire::record::Record;
use ax_wire::resync::Ask;
use ax_wire::{EpochId, Generation, Incarnation, Session};
use io_barrier::{Boottime, MAX_NICS, RxCounts};
use parking_lot::Mutex;
use statepoint::guest::GuestError;
use statepoint::primary::{
    DiskSync, Ended, EpochSource, PrimaryConfig, PrimaryEngine, PrimaryError, PrimaryEvents,
    PrimaryHandle, Start,
};
use statepoint::shadow::CommittedState;
use vmm::MachineHandle;

use crate::board::Services;
use crate::error::Error;
use crate::faults::Standing;
use crate::guest::{EpochGuest, Part};
use crate::maps::MapKeeper;
use crate::parts::Parts;
use crate::session::{self, SessionError, Talk};
use crate::standby::{Keeping, Service, Standbys};

/// How long the shadow may take to hear of an orderly stop.
const STOPPED_PATIENCE: Duration = Duration::from_secs(2);

/// How long the guest's outputs may wait for a shadow to hear that it is not wanted any more.
const DISMISSED_PATIENCE: Duration = Duration::from_millis(100);

/// What the protection tells the conductor.
#[derive(Debug)]
pub enum Protecting {
    /// Bytes of memory and disks copied, and known to be copied in all.
    Copying(u64, u64),
    /// The rest goes with one epoch.
    CopyDone,
    /// The shadow acknowledged its first whole epoch.
    Confirmed,
    /// The final epoch is acknowledged; the guest is parked.
    Final(EpochId),
    /// The shadow is given up; says why.
    Lost(String),
    /// The sentinel's word.
    Link(LinkEvent),
    /// What the shadow answered to being told to make its disks durable.
    Settled(Result<PeerMessage, SessionError>),
    /// What it answered to being told to run.
    HandedOver(Result<PeerMessage, SessionError>),
}

type Tell = Arc<dyn Fn(Protecting) + Send + Sync>;

struct Events {
    tell: Tell,
    log: Arc<WriteLog>,
    maps: Arc<MapKeeper>,
}

impl PrimaryEvents for Events {
    fn copying(&self, sent: u64, total: u64) {
        (self.tell)(Protecting::Copying(sent, total));
    }

    fn copy_done(&self) {
        (self.tell)(Protecting::CopyDone);
    }

    fn confirmed(&self, _epoch: EpochId) {
        self.maps.in_sync();
        (self.tell)(Protecting::Confirmed);
    }

    fn applied(&self, epoch: EpochId) {
        self.log.applied_on_shadow(epoch);
    }

    fn durable(&self, epoch: EpochId) {
        self.log.durable_on_shadow(epoch);
    }
}

/// Disk records and counts of received frames.
pub struct Source {
    log: Arc<WriteLog>,
    disks: Vec<Arc<ax_disk::Image>>,
    cursor: Option<SyncCursor>,
    /// The last of the copy is in the log.
    copied: bool,
    handle: MachineHandle,
    nics: usize,
}

impl Source {
    /// What the machine made of `parts` has besides memory.
    pub fn of(parts: &Parts, nics: usize) -> Source {
        Source {
            log: Arc::clone(&parts.log),
            disks: parts.images.clone(),
            cursor: None,
            copied: false,
            handle: parts.handle.clone(),
            nics: nics.min(MAX_NICS),
        }
    }
}

impl EpochSource for Source {
    fn restart_sync(&mut self) -> Result<(), GuestError> {
        // Recording begins before the map is read and the first block compared: decisions/0003.
        self.log.record(true);
        let cursor = SyncCursor::new(self.disks.clone()).map_err(|source| GuestError {
            doing: "begin the resync of the disks",
            source: Box::new(source),
        })?;
        (self.cursor, self.copied) = (Some(cursor), false);
        Ok(())
    }

    fn sync_ask(&mut self) -> Option<Ask> {
        self.cursor.as_mut()?.ask()
    }

    fn sync_answered(&mut self, payload: &[u8]) -> bool {
        let cursor = self.cursor.as_mut();
        cursor.is_some_and(|cursor| cursor.answered(payload))
    }

    fn sync_progress(&self) -> DiskSync {
        let at = self.cursor.as_ref().map(SyncCursor::progress);
        at.map_or(DiskSync::default(), |at| DiskSync {
            done: at.done,
            total: at.total,
            compared: at.compared,
            moved: at.moved,
        })
    }

    fn sync_step(&mut self, records: &mut Vec<u8>) -> Result<bool, GuestError> {
        // What the last step put in the log goes now, so that this one finds it empty: a guest that fills
        // it as soon as there is room would keep the copy out for ever.
        self.log.seal(records);
        let Some(cursor) = &mut self.cursor else {
            return Ok(true);
        };
        if self.copied {
            return Ok(true);
        }
        let stepped = cursor.step(&self.log).map_err(|source| GuestError {
            doing: "compare a disk image with the shadow's",
            source: Box::new(source),
        })?;
        self.copied = stepped == Stepped::Done;
        Ok(false)
    }

    fn disk_bytes(&self) -> usize {
        self.log.len()
    }

    fn seal(&mut self, epoch: EpochId, records: &mut Vec<u8>) {
        self.log.seal_epoch(epoch, records);
    }

    fn rx_given(&self) -> RxCounts {
        let mut counts = RxCounts::default();
        for (nic, count) in counts.iter_mut().enumerate().take(self.nics) {
            *count = self.handle.rx_delivered(nic);
        }
        counts
    }
}

/// What the sentinel tells the shadow of this primary.
struct Beats {
    engine: PrimaryHandle,
    generation: Mutex<Generation>,
    /// The last epoch before this protection began.
    copied_after: EpochId,
}

impl ProgressSource for Beats {
    fn generation(&self) -> Generation {
        *self.generation.lock()
    }

    fn progress(&self, _now_ns: u64) -> Progress {
        let at = self.engine.progress();
        Progress {
            captured: at.captured,
            staged: at.shipped,
            applied: at.applied,
            acked: at.acked,
            oldest_held_ns: at.oldest_held_ns,
            // The first epoch is acknowledged only when memory and disks are in sync, which takes as
            // long as it takes; a dead or silent shadow is noticed all the same.
            pending: at.acked > self.copied_after && self.engine.work_pending(),
        }
    }
}

/// Orders to the engine's thread.
enum Order {
    /// Lets a guest that the final epoch left parked go on, protected as before.
    Unpark,
    /// Ends the thread. A guest that the final epoch left parked goes as told.
    End(Parked),
    /// Ends the thread of a guest that runs on the other side now: it stays parked, and the state it
    /// was left in comes back.
    HandOver(mpsc::Sender<Option<CommittedState>>),
}

/// What becomes of a guest that the final epoch left parked when its protection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// It goes on: the record lets this process run it alone.
    GoesOn,
    /// It stays parked: this process ends, or the guest runs on the other side (I3).
    Stays,
}

/// A shadow being filled, or in step.
pub struct Protection {
    /// The shadow's process.
    pub shadow: Incarnation,
    /// The engine.
    pub engine: PrimaryHandle,
    beats: Arc<Beats>,
    sentinel: Option<Sentinel>,
    standbys: Keeping,
    talk: Talk,
    tell: Tell,
    orders: mpsc::Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

/// What is left of a protection whose guest runs on the other side now.
#[derive(Debug)]
pub struct HandedOver {
    /// Where the guest was left.
    pub committed: CommittedState,
    /// Still watches the other side's process.
    pub sentinel: Sentinel,
    /// Still speaks to it.
    pub talk: Talk,
}

impl std::fmt::Debug for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Protection({:?})", self.shadow)
    }
}

/// How a protection is begun.
#[derive(Debug)]
pub struct Setting {
    /// What frames carry.
    pub session: Session,
    /// Which shadow.
    pub config: PrimaryConfig,
    /// The sentinel's times.
    pub timing: LinkTiming,
    /// Number of network devices.
    pub nics: usize,
    /// What of the guest the shadow shares.
    pub part: Part,
}

impl Protection {
    /// Begins to protect the guest over a session just dialled.
    ///
    /// # Errors
    /// A thread or the sentinel could not be started.
    pub fn begin(
        parts: &Parts,
        connector: Connector,
        dialled: session::Dialled,
        setting: Setting,
        tell: Tell,
    ) -> Result<Protection, Error> {
        let Setting {
            session,
            config,
            timing,
            nics,
            part,
        } = setting;
        let shadow = config.shadow;
        let maps = MapKeeper::start(parts.images.clone(), Arc::clone(&parts.log));
        let maps = Arc::new(maps.map_err(Error::Thread)?);
        if matches!(config.start, Start::Synced { .. }) {
            maps.in_sync();
        }
        let events = Arc::new(Events {
            tell: Arc::clone(&tell),
            log: Arc::clone(&parts.log),
            maps,
        });
        let (mut engine, handle) = PrimaryEngine::new(
            config,
            EpochGuest::new(&parts.machine, part),
            Source::of(parts, nics),
            events,
            Arc::clone(&parts.barrier),
            Arc::new(Boottime),
        );
        let beats = Arc::new(Beats {
            engine: handle.clone(),
            generation: Mutex::new(session.generation),
            copied_after: handle.progress().acked,
        });
        let link = |e: ax_link::LinkError| Error::Link(e.to_string());
        let told = Arc::clone(&tell);
        let first = Arc::new(OnceLock::<(Arc<Standbys>, Arc<session::Line>)>::new());
        let moves = Arc::clone(&first);
        let sentinel = Sentinel::start(
            session,
            timing,
            Line::Dial(connector.clone()),
            Arc::clone(&beats) as Arc<dyn ProgressSource>,
            move |event: LinkEvent| {
                // The stream and the conversation leave a lost path at once, whatever the conductor does.
                if let Some((standbys, line)) = moves.get() {
                    standbys.heard(&event);
                    line.leave(|at| standbys.is_lost(at));
                }
                told(Protecting::Link(event));
            },
        )
        .map_err(link)?;
        let (orders, todo) = mpsc::channel();
        let standbys = Standbys::start(&connector, session, sentinel.paths());
        let standbys = standbys.map_err(Error::Thread)?;
        let reopen = move || Ok(connector.open(Preamble::of(Channel::Peer, session))?);
        let talk = Talk::start(dialled.peer, Box::new(reopen)).map_err(Error::Thread)?;
        let _ = first.set((Arc::clone(&standbys), Arc::clone(talk.line())));
        let pairs = Arc::clone(&standbys);
        let said = Arc::clone(&tell);
        let patience = timing.detect;
        let run = move || {
            let mut next = pairs.first(dialled.pair).map_err(|e| e.to_string());
            loop {
                let ended = match next {
                    Ok(link) => engine.run(link).map_err(|e| match e {
                        PrimaryError::Link(_) => (true, e.to_string()),
                        other => (false, other.to_string()),
                    }),
                    Err(why) => Err((false, why)),
                };
                match ended {
                    Ok(Ended::Stopped) => break,
                    Ok(Ended::Final { epoch }) => {
                        tell(Protecting::Final(epoch));
                        match todo.recv() {
                            Ok(Order::Unpark) => {
                                if let Err(error) = engine.unpark() {
                                    tell(Protecting::Lost(error.to_string()));
                                    break;
                                }
                                let until = Instant::now() + patience;
                                next = pairs.next(until).map_err(|e| e.to_string());
                            }
                            Ok(Order::End(Parked::GoesOn)) => break,
                            Ok(Order::HandOver(reply)) => {
                                let _ = reply.send(engine.last_committed());
                                return;
                            }
                            Ok(Order::End(Parked::Stays)) | Err(_) => return,
                        }
                    }
                    Err((again, why)) => {
                        tracing::warn!(%why, "the epoch stream ended");
                        let until = Instant::now() + patience.max(Duration::from_millis(20));
                        next = match again {
                            true => pairs.next(until).map_err(|e| e.to_string()),
                            false => Err(why.clone()),
                        };
                        if next.is_err() {
                            tell(Protecting::Lost(why));
                            break;
                        }
                    }
                }
            }
            // A guest that is parked for an epoch larger than its slot goes on: its outputs are the
            // barrier's business.
            if let Err(error) = engine.unpark() {
                tracing::error!(%error, "the guest could not go on after its protection ended");
            }
            let (_, source, stopped) = engine.into_parts();
            source.log.record(false);
            if let Err(error) = stopped {
                tracing::warn!(%error, "dirty tracking could not be stopped");
            }
        };
        let thread = std::thread::Builder::new()
            .name("epochs".into())
            .spawn(run)
            .map_err(Error::Thread)?;
        parts.mirrored.store(part == Part::Disks, Ordering::Release);
        parts.bell.set(Some(handle.clone()));
        Ok(Protection {
            shadow,
            engine: handle,
            beats,
            sentinel: Some(sentinel),
            standbys,
            talk,
            tell: said,
            orders,
            thread: Some(thread),
        })
    }

    /// How each path serves the stream.
    pub fn service(&self) -> Vec<Service> {
        self.standbys.service()
    }

    /// The same, to be asked for at any time.
    pub fn services(&self) -> Services {
        let standbys = Arc::clone(&self.standbys);
        Box::new(move || standbys.service())
    }

    /// The arbiter granted a new generation: heartbeats and frames carry it.
    pub fn granted(&self, generation: Generation) {
        *self.beats.generation.lock() = generation;
        self.engine.granted(generation);
    }

    /// The shadow is to apply every committed epoch and make its disks durable; ends in
    /// [`Protecting::Settled`].
    pub fn settle(&self) {
        let tell = Arc::clone(&self.tell);
        let answer = move |heard| tell(Protecting::Settled(heard));
        self.talk.say(PeerMessage::Settle, Box::new(answer));
    }

    /// The shadow is to run the guest by this record; ends in [`Protecting::HandedOver`].
    pub fn tell_to_run(&self, record: Record) {
        let tell = Arc::clone(&self.tell);
        let answer = move |heard| tell(Protecting::HandedOver(heard));
        self.talk
            .say(PeerMessage::HandOver(record), Box::new(answer));
    }

    /// The shadow, which runs the guest now, may show outputs: this side waits as a shadow does from here on
    /// before it asks for the VM.
    pub fn let_show(&self) {
        let heard = |answer| tracing::debug!(?answer, "the other side may show outputs");
        self.talk.say(PeerMessage::Show, Box::new(heard));
    }

    /// The pair has stopped by this record: says so, and waits a moment for the answer.
    pub fn tell_stopped(&self, record: Record) {
        let heard = self
            .talk
            .ask(PeerMessage::Stopped(record), STOPPED_PATIENCE);
        if !matches!(heard, Ok(PeerMessage::Done)) {
            tracing::warn!(?heard, "the shadow was not told of the stop");
        }
    }

    /// The guest runs alone by this record, and the shadow is to end: says so, and waits a moment for
    /// the answer. A shadow that is not told asks the arbiter, is refused and ends as well.
    pub fn dismiss(&self, record: Record) {
        let heard = self
            .talk
            .ask(PeerMessage::Dismissed(record), DISMISSED_PATIENCE);
        tracing::debug!(?heard, "the shadow was dismissed");
    }

    /// The guest runs on the other side now: ends the epoch thread, with the guest parked as the final
    /// epoch left it and dirty pages still tracked. None if that is not how it is.
    pub fn hand_over(mut self, parts: &Parts) -> Option<HandedOver> {
        parts.bell.set(None);
        self.standbys.stop();
        let (reply, committed) = mpsc::channel();
        let _ = self.orders.send(Order::HandOver(reply));
        // Without a final epoch the thread does not look at its orders: it ends by this.
        self.engine.stop();
        let committed = committed.recv().ok().flatten();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        parts.log.record(false);
        // Whoever runs the guest now issues them again (rule 13).
        parts.log.release_flushes();
        parts.faults.stand(Standing::Elsewhere);
        Some(HandedOver {
            committed: committed?,
            sentinel: self.sentinel.take()?,
            talk: self.talk,
        })
    }

    /// Lets a guest parked by the final epoch go on.
    pub fn unpark(&self) {
        let _ = self.orders.send(Order::Unpark);
    }

    /// Ends the protection: with a goodbye, or as a cut. The guest runs on; one parked by a final
    /// epoch does as `parked` says.
    pub fn end(mut self, parts: &Parts, goodbye: bool, parked: Parked) {
        parts.bell.set(None);
        self.standbys.stop();
        self.engine.stop();
        let _ = self.orders.send(Order::End(parked));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(sentinel) = self.sentinel.take()
            && goodbye
        {
            sentinel.goodbye();
        }
    }
}
