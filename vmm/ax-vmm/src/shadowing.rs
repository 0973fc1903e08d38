//! The shadow's side of a session: sentinel, epoch engine, replica of the disks.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ax_disk::Replica;
use ax_link::heartbeat::{
    Line, LinkEvent, PathViews, ProgressSource, Sentinel, Timing as LinkTiming,
};
use ax_link::{Incoming, Stream};
use ax_wire::heartbeat::Progress;
use ax_wire::offload::carried;
use ax_wire::peer::PeerMessage;
use ax_wire::records::Records;
use ax_wire::resync::Ask;
use ax_wire::{EpochId, Generation, Incarnation, Session};
use io_barrier::Boottime;
use statepoint::guest::GuestError;
use statepoint::link::ShadowLink;
use statepoint::shadow::{
    CommittedState, Inheritance, ShadowConfig, ShadowEngine, ShadowEvents, ShadowHandle, ShadowSink,
};

use crate::board::Services;
use crate::error::Error;
use crate::guest::{EpochGuest, Part};
use crate::outside::Taps;
use crate::parts::Parts;
use crate::session::{self, Gathered};
use crate::standby::Service;
use crate::waiting::Waiting;

/// Committed epochs whose disk writes may wait to be applied, whatever they hold.
const DISK_BACKLOG: usize = 2;

/// What the shadow's threads tell the conductor.
#[derive(Debug)]
pub enum Following {
    /// Bytes of the initial copy received.
    Copying(u64),
    /// The first epoch was acknowledged under this generation.
    Confirmed(Generation),
    /// The primary was granted this generation.
    Known(Generation),
    /// This copy cannot be promoted any more.
    Spoiled(String),
    /// The sentinel's word.
    Link(LinkEvent),
    /// The primary says something and waits for the answer.
    Said(PeerMessage, mpsc::Sender<PeerMessage>),
}

type Tell = Arc<dyn Fn(Following) + Send + Sync>;

struct Events {
    tell: Tell,
    taps: Arc<Taps>,
}

impl ShadowEvents for Events {
    /// What is announced first after a promotion must be known by then (rule 14).
    fn applied(&self, _epoch: EpochId, outputs: &[u8]) {
        Records::new(outputs)
            .map_while(Result::ok)
            .filter_map(|output| Some((output.unit, carried(&output)?)))
            .for_each(|(nic, (_, frame))| self.taps.learn(nic, frame));
    }

    fn copying(&self, received: u64) {
        (self.tell)(Following::Copying(received));
    }

    fn confirmed(&self, _epoch: EpochId, generation: Generation) {
        (self.tell)(Following::Confirmed(generation));
    }

    fn granted(&self, generation: Generation) {
        (self.tell)(Following::Known(generation));
    }
}

/// The disks of a committed epoch.
struct Disks(Arc<Replica>);

fn failed(doing: &'static str) -> impl Fn(ax_disk::replica::ApplyError) -> GuestError {
    move |source| GuestError {
        doing,
        source: Box::new(source),
    }
}

impl ShadowSink for Disks {
    fn begin_sync(&mut self) -> Result<(), GuestError> {
        self.0
            .begin_sync()
            .map_err(failed("prepare the disk images for the initial copy"))
    }

    fn asked(&mut self, ask: &Ask, answer: &mut Vec<u8>) -> Result<bool, GuestError> {
        self.0
            .answer(ask, answer)
            .map_err(failed("read a disk image for a resync"))
    }

    fn bulk(&mut self, records: &[u8]) -> Result<(), GuestError> {
        self.0
            .bulk(records)
            .map_err(failed("write the disks' initial copy"))
    }

    fn nearly_in_sync(&mut self) -> Result<(), GuestError> {
        self.0
            .settle()
            .map_err(failed("make the disks' initial copy durable"))
    }

    fn committed(&mut self, epoch: EpochId, records: &mut Vec<u8>) -> Result<(), GuestError> {
        self.0
            .committed(epoch, records)
            .map_err(|source| GuestError {
                doing: "apply disk writes",
                source: source.to_string().into(),
            })
    }

    fn in_sync(&mut self, _epoch: EpochId, generation: Generation) -> Result<(), GuestError> {
        self.0
            .mark_in_sync(generation)
            .map_err(failed("make the disks' initial copy durable"))
    }

    fn applied(&self) -> EpochId {
        self.0.progress().0
    }

    fn durable(&self) -> EpochId {
        self.0.progress().1
    }
}

/// What the sentinel tells the primary of this shadow.
struct Beats(ShadowHandle);

impl ProgressSource for Beats {
    fn generation(&self) -> Generation {
        self.0.generation()
    }

    fn progress(&self, _now_ns: u64) -> Progress {
        let at = self.0.progress();
        Progress {
            captured: at.staged,
            staged: at.staged,
            applied: at.applied,
            acked: at.staged,
            oldest_held_ns: 0,
            pending: self.0.work_pending(),
        }
    }
}

/// A shadow that follows a primary.
pub struct Shadowing {
    /// The primary's session when it began.
    pub primary: Session,
    /// The engine.
    pub engine: ShadowHandle,
    /// The disks.
    pub replica: Arc<Replica>,
    sentinel: Option<Sentinel>,
    waiting: Waiting,
    paths: PathViews,
    thread: Option<JoinHandle<()>>,
    tell: Tell,
}

impl std::fmt::Debug for Shadowing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shadowing({:?})", self.primary)
    }
}

/// How following begins.
#[derive(Debug)]
pub struct Setting {
    /// This process.
    pub me: Incarnation,
    /// The sentinel's times.
    pub timing: LinkTiming,
    /// Folder for the part of an epoch that does not fit in memory.
    pub spill_dir: PathBuf,
    /// What this process has already when it was the primary until now (rule 25).
    pub from: Option<Inheritance>,
    /// What of the guest it shares.
    pub part: Part,
}

/// Hands the primary's messages to the conductor and its answers back, until the conversation ends.
fn converse(mut peer: Stream, tell: &Tell) {
    while let Ok(message) = session::receive(&mut peer) {
        let (reply, answer) = mpsc::channel();
        tell(Following::Said(message, reply));
        let Ok(answer) = answer.recv() else { return };
        if session::send(&mut peer, answer).is_err() {
            return;
        }
    }
}

impl Shadowing {
    /// Begins to follow the primary with this session; its connections come by
    /// [`Shadowing::join`].
    ///
    /// # Errors
    /// A thread, the sentinel or the replica could not be started.
    pub fn begin(
        parts: &Parts,
        primary: Session,
        setting: Setting,
        tell: Tell,
    ) -> Result<Shadowing, Error> {
        let disk = |e: ax_disk::replica::ApplyError| Error::Link(e.to_string());
        let replica = Replica::new(parts.images.clone(), DISK_BACKLOG).map_err(disk)?;
        let replica = Arc::new(replica);
        let config = ShadowConfig::new(primary, setting.me, setting.spill_dir);
        let (mut engine, handle) = ShadowEngine::new(
            config,
            EpochGuest::new(&parts.machine, setting.part),
            Disks(Arc::clone(&replica)),
            setting.from,
            Arc::new(Events {
                tell: Arc::clone(&tell),
                taps: Arc::clone(&parts.taps),
            }),
            Arc::new(Boottime),
        );
        let durable = handle.clone();
        replica.on_durable(move |epoch| durable.tell_durable(epoch));
        let me = Session {
            incarnation: setting.me,
            ..primary
        };
        let told = Arc::clone(&tell);
        let sentinel = Sentinel::start(
            me,
            setting.timing,
            Line::Await,
            Arc::new(Beats(handle.clone())),
            move |event: LinkEvent| told(Following::Link(event)),
        )
        .map_err(|e| Error::Link(e.to_string()))?;
        let (links, come) = mpsc::channel::<ShadowLink>();
        let (ended, told) = (handle.clone(), Arc::clone(&tell));
        let run = move || {
            for link in come {
                let error = engine.run(link);
                tracing::info!(%error, "the epoch stream ended");
                if ended.is_spoiled() {
                    told(Following::Spoiled(error.to_string()));
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("epochs".into())
            .spawn(run)
            .map_err(Error::Thread)?;
        Ok(Shadowing {
            primary,
            engine: handle,
            replica,
            paths: sentinel.paths(),
            sentinel: Some(sentinel),
            waiting: Waiting::new(links),
            thread: Some(thread),
            tell,
        })
    }

    /// Takes the connections of this session: the first, or a pair that is to wait until the stream goes
    /// over it.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn join(&mut self, gathered: Gathered) -> Result<(), Error> {
        let Gathered {
            peer,
            at,
            forward,
            backward,
            ..
        } = gathered;
        let joined = match peer {
            Some(peer) => {
                self.converse(peer)?;
                self.waiting.take_up(at, forward, backward)
            }
            None => self.waiting.keep(at, forward, backward),
        };
        if let Err(error) = joined {
            tracing::warn!(%error, "a connection could not be used");
        }
        Ok(())
    }

    /// Answers what the primary says on this connection.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn converse(&self, peer: Stream) -> Result<(), Error> {
        let tell = Arc::clone(&self.tell);
        std::thread::Builder::new()
            .name("peer-talk".into())
            .spawn(move || converse(peer, &tell))
            .map(drop)
            .map_err(Error::Thread)
    }

    /// How each path serves the stream.
    pub fn service(&self) -> Vec<Service> {
        self.waiting.service(&self.paths)
    }

    /// The same, to be asked for at any time.
    pub fn services(&self) -> Services {
        let (waiting, paths) = (self.waiting.clone(), self.paths.clone());
        Box::new(move || waiting.service(&paths))
    }

    /// Gives the sentinel the heartbeat connection; true when it has it.
    pub fn heartbeat(&self, incoming: Incoming) -> bool {
        let taken = incoming.accept().and_then(|stream| match &self.sentinel {
            Some(sentinel) => sentinel.attach(stream).map(|()| true),
            None => Ok(false),
        });
        taken.unwrap_or_else(|error| {
            tracing::warn!(%error, "a heartbeat connection was not taken");
            false
        })
    }

    /// Ends the stream, waits until every acknowledged epoch is applied, and returns what may be
    /// promoted (I2); none if nothing may. Acknowledgements must have been frozen.
    pub fn finish(&mut self) -> Option<CommittedState> {
        self.waiting.end();
        self.engine.disconnect();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.engine.committed()
    }

    /// Ends the sentinel: with a goodbye, or as a cut.
    pub fn leave(mut self, goodbye: bool) {
        self.waiting.end();
        if let Some(sentinel) = self.sentinel.take()
            && goodbye
        {
            sentinel.goodbye();
        }
    }
}
