//! The conductor: one thread that feeds the pair's state machine and performs its actions.
//!
//! Everything that happens comes in through one queue as an [`Input`]; the state machine says what
//! to do; nothing is decided here. Whatever could wait long has a thread of its own.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_api::process::{Phase as Shown, Reply, Request, Role, Spec, Start, What};
use ax_api::vm::{Mode, Secondary};
use ax_arbiter::Client;
use ax_link::heartbeat::{LinkEvent, LinkEventKind, Timing as LinkTiming};
use ax_link::{Acceptor, Incoming};
use ax_wire::hello::Role as HelloRole;
use ax_wire::peer::PeerMessage;
use ax_wire::record::{Copies, Flush, Member, Record, State};
use ax_wire::{EpochId, Generation, Incarnation, Session, Side};
use io_barrier::{FtGrant, SoloGrant};
use statepoint::pair::{Action, Ending, Event, Pair, Phase};
use statepoint::primary::{PrimaryConfig, Start as EngineStart};
use statepoint::shadow::CommittedState;

use crate::asker::{self, Asker, Heard};
use crate::board::Board;
use crate::control::{self, Boards, Order};
use crate::error::Error;
use crate::events::Events;
use crate::hello::hello;
use crate::parts::Parts;
use crate::protect::{self, Parked, Protecting, Protection};
use crate::session::{self, Dialled, Gathered, Gathering, Took};
use crate::shadowing::{self, Following, Shadowing};

/// Added to the permission time (rule 24): drift of two clocks over it, and the tick.
const DRIFT_MARGIN: Duration = Duration::from_millis(1);

/// How the process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// In order, or on purpose.
    InOrder,
    /// The other side runs, or this side may not.
    Fenced,
}

impl Ended {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Ended::InOrder => 0,
            Ended::Fenced => 9,
        }
    }
}

/// Everything that can happen.
enum Input {
    Order(Order),
    Heard(Heard),
    Power(io_barrier::Power),
    Dialled(
        Box<Result<Dialled, String>>,
        Incarnation,
        ax_link::Connector,
        mpsc::Sender<Reply>,
    ),
    Protecting(Protecting),
    Gathered(Box<Gathered>),
    Heartbeat(Box<Incoming>),
    Following(Following),
}

/// Whose life this process leads.
enum Life {
    /// A VM of mode `none` that no arbiter knows.
    Local,
    /// One side of a pair.
    Paired(Pair),
}

struct Conductor {
    spec: Spec,
    me: Member,
    life: Life,
    parts: Parts,
    events: Arc<Events>,
    board: Arc<Board>,
    asker: Option<Asker>,
    queue: mpsc::Receiver<Input>,
    sender: mpsc::Sender<Input>,
    protection: Option<Protection>,
    shadowing: Option<Shadowing>,
    /// What a promotion starts from: finished, and restored into the machine.
    prepared: Option<CommittedState>,
    permission_over: Option<Instant>,
    lost_at: Option<Instant>,
    copied: (u64, u64),
    waits_for: Option<String>,
    /// Who waits for a stop or a planned failover.
    waiting: Vec<mpsc::Sender<Reply>>,
    why_stopping: Option<String>,
    last_epoch: EpochId,
    ended: Option<Ended>,
}

fn incarnation() -> Incarnation {
    let mut bytes = [0; 8];
    // Without randomness the clock and the pid make two runs differ.
    let random = std::fs::File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut bytes));
    if random.is_err() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = now.map_or(0, |n| n.as_nanos() as u64);
        bytes = (nanos ^ (u64::from(std::process::id()) << 40)).to_le_bytes();
    }
    Incarnation(u64::from_le_bytes(bytes).max(1))
}

/// Runs one VM's side until it ends.
///
/// # Errors
/// It could not begin, or could not go on.
pub fn run(spec: Spec) -> Result<Ended, Error> {
    let (sender, queue) = mpsc::channel();
    let power = sender.clone();
    let parts = Parts::build(&spec, move |what| {
        let _ = power.send(Input::Power(what));
    })?;
    let peer = spec.peer.clone().unwrap_or_default();
    let me = Member {
        side: Side::of(&spec.host, &peer),
        incarnation: incarnation(),
    };
    let (events, role) = match spec.start {
        Start::Boot => (Events::new(), Role::Primary),
        Start::Shadow => (Events::new(), Role::Shadow),
    };
    let board = Board::new(spec.clone(), me.incarnation, role, parts.bell.clone());
    let mut conductor = Conductor {
        me,
        life: Life::Local,
        parts,
        events,
        board,
        asker: None,
        queue,
        sender,
        protection: None,
        shadowing: None,
        prepared: None,
        permission_over: None,
        lost_at: None,
        copied: (0, 0),
        waits_for: None,
        waiting: Vec::new(),
        why_stopping: None,
        last_epoch: EpochId(0),
        ended: None,
        spec,
    };
    conductor.begin()?;
    conductor.conduct()
}

impl Conductor {
    fn flush(&self) -> Flush {
        let sync = |d: &ax_api::vm::Disk| d.secondary == Secondary::Sync;
        if !self.spec.vm.disks.is_empty() && self.spec.vm.disks.iter().all(sync) {
            Flush::Both
        } else {
            Flush::Local
        }
    }

    fn begin(&mut self) -> Result<(), Error> {
        self.serve_control()?;
        if self.spec.start == Start::Boot {
            // Whatever can be missing is found before anyone is asked.
            self.parts
                .images
                .iter()
                .try_for_each(|image| image.require_consistent())?;
            self.parts.taps.open()?;
            self.parts.machine.lock().boot()?;
        }
        if self.spec.peer.is_some() {
            self.listen()?;
        }
        let witness = self.parts.witness(&self.spec)?;
        let paired = self.spec.peer.is_some() && self.spec.vm.mode != Mode::None;
        match (witness, self.spec.start) {
            (Some(witness), start) if paired => {
                self.start_asker(witness, start)?;
                if start == Start::Shadow {
                    self.life = Life::Paired(Pair::shadow(self.me, self.flush()));
                    self.show();
                }
                Ok(())
            }
            (None, _) if paired => Err(Error::Arbiter(
                "this VM is to be protected but no witness is configured: two hosts alone can't \
                 tell a dead peer from a cut cable; set `witness` in axd.toml, or use mode none"
                    .into(),
            )),
            (_, Start::Shadow) => Err(Error::Arbiter("a VM of mode none has no shadow".into())),
            (_, Start::Boot) => {
                self.start_guest(None)?;
                self.parts.barrier.pass(SoloGrant::never_paired());
                self.show();
                Ok(())
            }
        }
    }

    fn start_asker(&mut self, witness: ax_link::Connector, start: Start) -> Result<(), Error> {
        let client = Client::new(witness, asker::known_witness(&self.spec.state_dir))
            .map_err(Error::Thread)?;
        // A pair that was never started has its images where it is started first.
        let home = match start {
            Start::Boot => self.me.side,
            Start::Shadow => self.me.side.other(),
        };
        let heard = self.sender.clone();
        let asker = Asker::start(
            client,
            self.spec.vm.pair,
            self.me,
            Copies::Only(home),
            &self.spec.state_dir,
            move |what| {
                let _ = heard.send(Input::Heard(what));
            },
        )?;
        asker.learn();
        self.asker = Some(asker);
        Ok(())
    }

    fn serve_control(&self) -> Result<(), Error> {
        let (board, orders, typed) = (
            Arc::clone(&self.board),
            self.sender.clone(),
            self.parts.handle.clone(),
        );
        let boards = Boards {
            status: Box::new(move || board.status()),
            events: Arc::clone(&self.events),
            console: Arc::clone(&self.parts.console),
            type_in: Box::new(move |bytes| {
                let mut rest = bytes;
                for _ in 0..200 {
                    let taken = typed.console_in(rest);
                    rest = rest.get(taken..).unwrap_or_default();
                    if rest.is_empty() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }),
            order: Box::new(move |order| {
                let _ = orders.send(Input::Order(order));
            }),
        };
        control::serve(&self.spec.control, Arc::new(boards))
    }

    /// Takes the connections of a primary, in a thread of its own.
    fn listen(&self) -> Result<(), Error> {
        let at: Vec<SocketAddr> = self
            .spec
            .link
            .iter()
            .map(|ip| SocketAddr::new(*ip, 0))
            .collect();
        let acceptor = Acceptor::bind(&at, self.parts.security.clone())
            .map_err(|e| Error::Link(e.to_string()))?;
        self.board.listens(acceptor.local_addrs().to_vec());
        let (spec, me, tell) = (self.spec.clone(), self.me, self.sender.clone());
        let caps = self.parts.machine.lock().caps().clone();
        let gather = move || {
            let mut gathering = Gathering::default();
            while let Some(incoming) = acceptor.accept() {
                let mine = |theirs: Session| {
                    let session = Session {
                        pair: spec.vm.pair,
                        generation: theirs.generation,
                        incarnation: me.incarnation,
                    };
                    hello(&spec, &caps, session, HelloRole::Shadow)
                };
                let told = match gathering.take(incoming, mine) {
                    Took::Nothing => Ok(()),
                    Took::Heartbeat(incoming) => tell.send(Input::Heartbeat(Box::new(incoming))),
                    Took::Whole(gathered) => tell.send(Input::Gathered(gathered)),
                };
                if told.is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("gather".into())
            .spawn(gather)
            .map_err(Error::Thread)?;
        Ok(())
    }

    fn conduct(&mut self) -> Result<Ended, Error> {
        let mut ticked = Instant::now();
        let mut later = VecDeque::new();
        loop {
            if let Some(ended) = self.ended {
                self.take_leave();
                return Ok(ended);
            }
            if ticked.elapsed() >= Duration::from_secs(1) {
                ticked = Instant::now();
                self.board.tick();
            }
            if self.permission_over.is_some_and(|at| Instant::now() >= at) {
                self.permission_over = None;
                self.step(Event::PermissionOver)?;
                continue;
            }
            let patience = self
                .permission_over
                .map_or(Duration::from_millis(500), |at| {
                    at.saturating_duration_since(Instant::now())
                });
            let input = match later.pop_front() {
                Some(input) => Ok(input),
                None => self.queue.recv_timeout(patience),
            };
            match input {
                Ok(input) => self.take(input, &mut later)?,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(Ended::Fenced),
            }
        }
    }

    /// The last words: whoever waits is answered, the peer is told, the disks are flushed.
    fn take_leave(&mut self) {
        let clean = self.ended == Some(Ended::InOrder);
        let reply = match clean {
            true => Reply::Done,
            false => Reply::Refused {
                why: "the other side runs the VM; this process ends".into(),
            },
        };
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(reply.clone());
        }
        if let Some(protection) = self.protection.take() {
            protection.end(&self.parts, clean, Parked::Stays);
        }
        if let Some(mut shadowing) = self.shadowing.take() {
            shadowing.leave(clean);
        }
        for image in &self.parts.images {
            if let Err(error) = image.flush() {
                tracing::error!(%error, path = %image.path().display(), "flush");
            }
        }
        self.parts.console.close();
        // Control connections send what is queued for them.
        std::thread::sleep(Duration::from_millis(50));
        let _ = std::fs::remove_file(&self.spec.control);
    }

    fn take(&mut self, input: Input, later: &mut VecDeque<Input>) -> Result<(), Error> {
        match input {
            Input::Order(order) => self.obey(order),
            Input::Heard(heard) => self.hear(heard),
            Input::Power(what) => self.power(what),
            Input::Dialled(dialled, shadow, connector, reply) => {
                self.dialled(*dialled, shadow, connector, &reply)
            }
            Input::Protecting(what) => self.protecting(what),
            Input::Gathered(gathered) => self.gathered(*gathered),
            Input::Heartbeat(incoming) => {
                match &self.shadowing {
                    Some(shadowing) => shadowing.heartbeat(*incoming),
                    // It overtook the connection that completes its session.
                    None if later.len() < 8 => later.push_back(Input::Heartbeat(incoming)),
                    None => incoming.refuse("no session"),
                }
                Ok(())
            }
            Input::Following(what) => self.following(what),
        }
    }

    /// Steps the pair's state machine and performs what it says.
    fn step(&mut self, event: Event) -> Result<(), Error> {
        let Life::Paired(pair) = &self.life else {
            return Ok(());
        };
        tracing::debug!(?event, phase = ?pair.phase, "pair");
        let (pair, actions) = pair.clone().step(event);
        self.life = Life::Paired(pair);
        for action in actions {
            tracing::debug!(?action, "pair");
            self.perform(action)?;
        }
        self.show();
        Ok(())
    }

    fn phase(&self) -> Option<&Phase> {
        match &self.life {
            Life::Local => None,
            Life::Paired(pair) => Some(&pair.phase),
        }
    }

    /// Puts the present phase on the board, and tells of a new one.
    fn show(&mut self) {
        let held = |why: &str| Shown::Held {
            waits_for: why.into(),
        };
        let asking = matches!(&self.life, Life::Paired(pair) if pair.is_asking());
        if !asking && self.spec.start == Start::Boot && self.phase().is_some() {
            self.waits_for = None;
        }
        let (role, shown, generation) = match self.phase() {
            None if self.asker.is_some() => (Role::Primary, Shown::Starting, Generation(0)),
            None => (Role::Primary, Shown::Unprotected, Generation(0)),
            Some(phase) => match phase {
                Phase::Starting { from } => (Role::Primary, Shown::Starting, *from),
                Phase::Alone {
                    record,
                    filling: None,
                } => (Role::Primary, Shown::Alone, record.generation),
                Phase::Alone {
                    record,
                    filling: Some(_),
                } => {
                    let (done, total) = self.copied;
                    (
                        Role::Primary,
                        Shown::Syncing { done, total },
                        record.generation,
                    )
                }
                Phase::Entering { record, .. } | Phase::AskingFt { record, .. } => {
                    (Role::Primary, Shown::Entering, record.generation)
                }
                Phase::Ft { record } => (Role::Primary, Shown::Protected, record.generation),
                Phase::AskingAlone { record } => {
                    (Role::Primary, held("the arbiter"), record.generation)
                }
                Phase::Parking { record, .. }
                | Phase::AskingHandover { record }
                | Phase::AskingStop { record, .. } => {
                    (Role::Primary, Shown::Ending, record.generation)
                }
                Phase::HandedOver { record } => (
                    Role::Primary,
                    held("the other side, to run"),
                    record.generation,
                ),
                Phase::Copying if self.shadowing.is_none() => {
                    (Role::Shadow, Shown::Waiting, Generation(0))
                }
                Phase::Copying => {
                    let (done, total) = self.copied;
                    (Role::Shadow, Shown::Syncing { done, total }, Generation(0))
                }
                Phase::InSync { known } => (Role::Shadow, Shown::Protected, *known),
                Phase::Waiting { known } | Phase::AskingTakeover { known } => {
                    (Role::Shadow, held("the arbiter"), *known)
                }
                Phase::Promoting { record } => (Role::Shadow, Shown::Starting, record.generation),
                Phase::Ended => (self.board.status().role, Shown::Ending, Generation(0)),
            },
        };
        let shown = match &self.waits_for {
            Some(why) if asking || matches!(shown, Shown::Starting) => held(why),
            _ if self.parts.machine.is_parked() && shown == Shown::Unprotected => Shown::Paused,
            _ => shown,
        };
        if self.board.now(role, shown.clone(), generation) {
            self.events.tell(What::Phase {
                role,
                phase: shown,
                generation,
            });
        }
    }

    fn perform(&mut self, action: Action) -> Result<(), Error> {
        match action {
            Action::Ask(from, change) => {
                if let Some(asker) = &self.asker {
                    asker.ask(from, change);
                }
                // Rule 24: the old permission is over. A bridge forwards for a tap a moment after it
                // has been opened; that moment passes while the arbiter is asked. Nothing is sent.
                if self.shadowing.is_some()
                    && let Err(error) = self.parts.taps.open()
                {
                    tracing::warn!(%error, "before the grant");
                }
            }
            Action::FreezeOutputs => self.parts.barrier.freeze(),
            Action::HoldOutputs => {
                self.parts.barrier.start_holding();
            }
            Action::ReleaseAlone(record) => self.release_alone(record),
            Action::ReleaseAcked(record) => match FtGrant::of(&record, self.me) {
                Some(grant) => {
                    self.parts.barrier.protect(grant);
                    if let Some(protection) = &self.protection {
                        protection.granted(record.generation);
                    }
                    self.answer(&Reply::Done);
                }
                None => tracing::error!(%record, "this record does not protect this process"),
            },
            Action::FreezeAcks => {
                if let Some(shadowing) = &self.shadowing {
                    shadowing.engine.freeze_acks();
                }
            }
            Action::AwaitPermissionOver => {
                let permission = Duration::from_millis(self.spec.timing.permission_ms);
                self.permission_over = Some(Instant::now() + permission + DRIFT_MARGIN);
                // Before anyone is asked: a record that names this side must never be ahead of what
                // this side holds (I4).
                if let Err(why) = self.prepare() {
                    self.permission_over = None;
                    self.events
                        .note(format!("this side can't take over: {why}"));
                    return self.step(Event::PromotionFailed);
                }
            }
            Action::Boot(record) => self.start_guest(Some(record))?,
            Action::Promote(record) => return self.promote(record),
            Action::DropShadow => {
                // Every record that drops a shadow lets this process run the guest.
                if let Some(protection) = self.protection.take() {
                    protection.end(&self.parts, false, Parked::GoesOn);
                }
            }
            Action::ParkForGood => return self.park_for_good(),
            Action::Unpark => self.unpark(),
            Action::TellShadow(record) => return self.tell_shadow(record),
            Action::BecomeShadow(_) => {
                // The guest lives on the other side now; this process has nothing more to give.
                self.ended = Some(Ended::InOrder);
            }
            Action::EndClean(_) => {
                let why = self.why_stopping.take();
                let why = why.unwrap_or_else(|| "stopped in order".into());
                self.events.tell(What::Ended { why, clean: true });
                self.ended = Some(Ended::InOrder);
            }
            Action::EndFenced(ending) => {
                let why = match ending {
                    Ending::Superseded => "the other side runs the VM by the arbiter's record",
                    Ending::Stale => "this copy was not in sync when its primary was lost",
                    Ending::MayNotStart => "the arbiter does not allow this side to start the VM",
                };
                self.events.tell(What::Ended {
                    why: why.into(),
                    clean: false,
                });
                if ending == Ending::MayNotStart {
                    let held = self.waits_for.take().unwrap_or_else(|| why.into());
                    return Err(Error::Arbiter(held));
                }
                self.ended = Some(Ended::Fenced);
            }
        }
        Ok(())
    }

    fn answer(&mut self, reply: &Reply) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(reply.clone());
        }
    }

    /// Lets the guest run from boot. The record that allows it is durable beside the images first.
    fn start_guest(&mut self, record: Option<Record>) -> Result<(), Error> {
        if let Some(record) = record {
            for image in self.parts.images.iter().filter(|i| !i.read_only()) {
                image
                    .meta()
                    .lock()
                    .set_generation(record.generation)
                    .map_err(ax_disk::OpenError::from)?;
            }
        }
        self.parts.machine.lock().start()?;
        self.parts.receive()
    }

    /// Outputs pass. After a promotion: announcements first, then what committed epochs had not
    /// released (rule 6), then the frames the guest has not seen (rule 7).
    fn release_alone(&mut self, record: Record) {
        let Some(grant) = SoloGrant::of(&record, self.me) else {
            return tracing::error!(%record, "this record does not let this process run alone");
        };
        let committed = self.last_epoch;
        match self.shadowing.take() {
            None => self.parts.barrier.pass(grant),
            Some(mut shadowing) => {
                self.parts.taps.announce();
                shadowing
                    .engine
                    .with_outputs(|o| self.parts.barrier.promote(grant, o, committed));
                let handle = &self.parts.handle;
                shadowing.engine.drain_received(|nic, frame| {
                    crate::parts::give(handle, nic, frame);
                });
                self.board.follows(None);
                let took = self
                    .lost_at
                    .take()
                    .map_or(0, |at| at.elapsed().as_micros() as u64);
                self.events.tell(What::Promoted {
                    epoch: self.last_epoch.0,
                    took_us: took,
                });
                shadowing.leave(false);
                self.keep_announcing();
                if let Err(error) = self.parts.receive() {
                    tracing::error!(%error, "frames can't be received");
                }
            }
        }
    }

    /// Announcements may be lost: they are repeated for a few seconds.
    fn keep_announcing(&self) {
        let taps = Arc::clone(&self.parts.taps);
        let again = move || {
            for pause in [1, 2, 4, 8, 15, 30, 60, 120, 250, 500, 1000, 2000] {
                std::thread::sleep(Duration::from_millis(pause));
                taps.announce();
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("announce".into())
            .spawn(again)
        {
            tracing::warn!(%error, "announcements are not repeated");
        }
    }

    /// Everything of a promotion that needs no grant: finish applying, make the disks durable, restore
    /// the machine.
    fn prepare(&mut self) -> Result<(), String> {
        let shadowing = self.shadowing.as_mut().ok_or("there was no session")?;
        let committed = shadowing
            .finish()
            .ok_or("no committed epoch is wholly applied")?;
        shadowing.replica.settle().map_err(|e| e.to_string())?;
        let now = ax_link::heartbeat::boottime_ns();
        let elapsed = Duration::from_nanos(now.saturating_sub(committed.arrived_ns));
        let mut machine = self.parts.machine.lock();
        machine
            .restore(&committed.state, elapsed)
            .and_then(|()| machine.promote_fixups())
            .map_err(|e| e.to_string())?;
        drop(machine);
        self.last_epoch = committed.epoch;
        self.prepared = Some(committed);
        Ok(())
    }

    fn promote(&mut self, record: Record) -> Result<(), Error> {
        let prepared = match self.prepared {
            Some(_) => Ok(()),
            None => self.prepare(),
        };
        let promoted = prepared.and_then(|()| self.try_promote(record));
        match promoted {
            Ok(()) => self.step(Event::Running),
            Err(why) => {
                self.events.note(format!("promotion failed: {why}"));
                self.step(Event::PromotionFailed)
            }
        }
    }

    fn try_promote(&mut self, record: Record) -> Result<(), String> {
        self.prepared
            .take()
            .ok_or("no committed epoch could be restored")?;
        let shadowing = self.shadowing.as_ref().ok_or("no session")?;
        shadowing
            .replica
            .promote(record.generation)
            .map_err(|e| e.to_string())?;
        self.parts.taps.open().map_err(|e| e.to_string())?;
        self.parts.machine.lock().start().map_err(|e| e.to_string())
    }

    fn park_for_good(&mut self) -> Result<(), Error> {
        match &self.protection {
            Some(protection) => {
                protection.engine.request_final_epoch();
                Ok(())
            }
            None => {
                self.parts.machine.park(true)?;
                self.final_done(self.last_epoch)
            }
        }
    }

    /// The guest is parked and its last epoch is on both sides: makes the disks durable there.
    fn final_done(&mut self, epoch: EpochId) -> Result<(), Error> {
        for image in &self.parts.images {
            if let Err(error) = image.flush() {
                self.events
                    .note(format!("{}: {error}", image.path().display()));
            }
        }
        if let Some(protection) = &mut self.protection {
            match protection.say(PeerMessage::Settle) {
                Ok(PeerMessage::Done) => {}
                Ok(other) => tracing::warn!(?other, "the shadow could not settle"),
                Err(error) => {
                    tracing::warn!(%error, "the shadow was lost while it settled");
                    return self.step(Event::PeerLost);
                }
            }
        }
        self.last_epoch = epoch;
        self.step(Event::FinalDone(epoch))
    }

    fn unpark(&mut self) {
        if let Some(protection) = &self.protection {
            protection.unpark();
        }
        if self.parts.machine.is_parked()
            && let Err(error) = self.parts.machine.park(false)
        {
            tracing::error!(%error, "the guest could not go on");
        }
        let why = "the other side was lost on the way; the VM runs on here".into();
        self.answer(&Reply::Refused { why });
    }

    fn tell_shadow(&mut self, record: Record) -> Result<(), Error> {
        let stopped = matches!(record.state, State::Stopped { .. });
        let message = match stopped {
            true => PeerMessage::Stopped(record),
            false => PeerMessage::HandOver(record),
        };
        let Some(protection) = &mut self.protection else {
            return Ok(());
        };
        match (protection.say(message), stopped) {
            (Ok(PeerMessage::Running), false) => self.step(Event::Running),
            (Ok(PeerMessage::Done), true) => Ok(()),
            (answer, false) => {
                tracing::warn!(?answer, "the other side could not run");
                self.step(Event::PromotionFailed)
            }
            (answer, true) => {
                tracing::warn!(?answer, "the shadow was not told of the stop");
                Ok(())
            }
        }
    }

    fn hear(&mut self, heard: Heard) -> Result<(), Error> {
        match heard {
            Heard::Known(record) => {
                let fresh = matches!(self.life, Life::Local);
                if fresh && self.spec.start == Start::Boot {
                    let (pair, actions) = Pair::starting(self.me, self.flush(), record.generation);
                    self.life = Life::Paired(pair);
                    for action in actions {
                        self.perform(action)?;
                    }
                    self.show();
                }
                Ok(())
            }
            Heard::Granted(record) => {
                self.waits_for = None;
                self.step(Event::Granted(record))
            }
            Heard::Refused(refusal) => {
                self.waits_for = Some(refusal.to_string());
                if matches!(self.life, Life::Local) {
                    return Err(Error::Arbiter(refusal.to_string()));
                }
                self.step(Event::Refused(refusal))
            }
            Heard::Silent(why) => {
                if self.waits_for.as_ref() != Some(&why) {
                    self.events.note(format!("waiting for the arbiter: {why}"));
                }
                self.waits_for = Some(why);
                self.show();
                Ok(())
            }
        }
    }

    fn power(&mut self, what: io_barrier::Power) -> Result<(), Error> {
        let why = match what {
            io_barrier::Power::Reset => {
                self.events.note("the guest resets");
                return self.reboot();
            }
            io_barrier::Power::Off => "the guest switched itself off",
            io_barrier::Power::Crash => "the guest crashed",
        };
        self.why_stopping = Some(why.into());
        self.stop()
    }

    fn reboot(&mut self) -> Result<(), Error> {
        let parked = self.parts.machine.is_parked();
        self.parts.machine.between_epochs(|machine| {
            machine.reset()?;
            if parked { Ok(()) } else { machine.resume() }
        })?;
        self.parts.bell.with(|engine| engine.trigger());
        Ok(())
    }

    /// Ends the VM in order (rule 26).
    fn stop(&mut self) -> Result<(), Error> {
        if matches!(self.life, Life::Local) {
            self.parts.machine.park(true)?;
            let why = self
                .why_stopping
                .take()
                .unwrap_or_else(|| "stopped in order".into());
            self.events.tell(What::Ended { why, clean: true });
            self.ended = Some(Ended::InOrder);
            return Ok(());
        }
        self.step(Event::Stop)
    }

    fn obey(&mut self, order: Order) -> Result<(), Error> {
        let Order { request, reply } = order;
        let done = |result: Result<(), String>| match result {
            Ok(()) => Reply::Done,
            Err(why) => Reply::Refused { why },
        };
        let primary = self.board.status().role == Role::Primary;
        let answer = match request {
            Request::Protect {
                addresses,
                incarnation,
            } => match self.protect(addresses, incarnation, reply.clone()) {
                Ok(()) => return Ok(()),
                Err(why) => Reply::Refused { why },
            },
            Request::Pause | Request::Resume if !primary => Reply::Refused {
                why: "a shadow has no running guest".into(),
            },
            Request::Pause => done(self.parts.machine.park(true).map_err(|e| e.to_string())),
            Request::Resume => done(self.parts.machine.park(false).map_err(|e| e.to_string())),
            Request::Reboot if primary => {
                self.reboot()?;
                Reply::Done
            }
            Request::Stop if primary => {
                self.waiting.push(reply);
                let before = self.phase().cloned();
                self.stop()?;
                if self.ended.is_none() && before.is_some() && self.phase() == before.as_ref() {
                    let why = "the VM is between two states; try again, or use --force".into();
                    self.answer(&Reply::Refused { why });
                }
                return Ok(());
            }
            Request::Failover if matches!(self.phase(), Some(Phase::Ft { .. })) => {
                self.waiting.push(reply);
                return self.step(Event::Failover);
            }
            Request::Failover => Reply::Refused {
                why: "the VM is not protected: there is nobody to take over".into(),
            },
            Request::Quit => {
                self.ended = Some(Ended::InOrder);
                self.events.tell(What::Ended {
                    why: "ended by force".into(),
                    clean: false,
                });
                Reply::Done
            }
            Request::PeerIsDead => Reply::Refused {
                why: "a witness decides for this VM; an operator's word is not needed".into(),
            },
            Request::PeerGone { incarnation } => {
                let primary = self.shadowing.as_ref().map(|s| s.primary.incarnation);
                if primary == Some(incarnation) && self.permission_over.is_some() {
                    self.permission_over = Some(Instant::now());
                }
                Reply::Done
            }
            _ => Reply::Refused {
                why: "this process is the shadow; ask the primary".into(),
            },
        };
        let _ = reply.send(answer);
        self.show();
        Ok(())
    }

    fn protect(
        &mut self,
        addresses: Vec<SocketAddr>,
        shadow: Incarnation,
        reply: mpsc::Sender<Reply>,
    ) -> Result<(), String> {
        let Some(Phase::Alone {
            record,
            filling: None,
        }) = self.phase()
        else {
            return Err("this VM does not run alone: it can't take a shadow now".into());
        };
        let session = Session {
            pair: self.spec.vm.pair,
            generation: record.generation,
            incarnation: self.me.incarnation,
        };
        let connector = self
            .parts
            .connector(&self.spec, &addresses)
            .map_err(|e| e.to_string())?;
        let mine = hello(
            &self.spec,
            self.parts.machine.lock().caps(),
            session,
            HelloRole::Primary,
        );
        let tell = self.sender.clone();
        let dial = move || {
            let dialled = session::dial(&connector, &mine, session).map_err(|e| e.to_string());
            let _ = tell.send(Input::Dialled(Box::new(dialled), shadow, connector, reply));
        };
        std::thread::Builder::new()
            .name("dial".into())
            .spawn(dial)
            .map(drop)
            .map_err(|e| e.to_string())
    }

    fn link_timing(&self) -> LinkTiming {
        LinkTiming {
            interval: Duration::from_millis(self.spec.timing.heartbeat_ms),
            detect: Duration::from_millis(self.spec.timing.detect_ms),
            stall: Duration::from_millis(self.spec.timing.stall_ms),
        }
    }

    fn dialled(
        &mut self,
        dialled: Result<Dialled, String>,
        shadow: Incarnation,
        connector: ax_link::Connector,
        reply: &mpsc::Sender<Reply>,
    ) -> Result<(), Error> {
        let refuse = |why: String| {
            let _ = reply.send(Reply::Refused { why });
        };
        let dialled = match dialled {
            Ok(dialled) => dialled,
            Err(why) => {
                refuse(why);
                return Ok(());
            }
        };
        let Some(Phase::Alone {
            record,
            filling: None,
        }) = self.phase()
        else {
            refuse("the VM left the state in which it can take a shadow".into());
            return Ok(());
        };
        let found = dialled
            .theirs
            .body
            .vm
            .as_ref()
            .map(|vm| vm.session.incarnation);
        if found != Some(shadow) {
            refuse("another run of the shadow's process answers there".into());
            return Ok(());
        }
        let session = Session {
            pair: self.spec.vm.pair,
            generation: record.generation,
            incarnation: self.me.incarnation,
        };
        let start = EngineStart::FullCopy {
            after: self.last_epoch,
        };
        let mut config = PrimaryConfig::new(session, shadow, start);
        config.verify_every = self.spec.vm.verify_every.unwrap_or(0).into();
        config.state_bytes = config
            .state_bytes
            .max(self.parts.machine.lock().state_capacity());
        let setting = protect::Setting {
            session,
            config,
            timing: self.link_timing(),
            nics: self.spec.vm.nics.len(),
        };
        let tell = self.sender.clone();
        let tell = Arc::new(move |what| {
            let _ = tell.send(Input::Protecting(what));
        });
        // The state machine knows of the shadow before its engine can say anything.
        self.copied = (0, self.spec.vm.memory);
        self.step(Event::CopyBegun(shadow))?;
        match Protection::begin(&self.parts, connector, dialled, setting, tell) {
            Ok(protection) => {
                self.protection = Some(protection);
                let _ = reply.send(Reply::Done);
                Ok(())
            }
            Err(error) => {
                refuse(error.to_string());
                self.step(Event::PeerLost)
            }
        }
    }

    fn protecting(&mut self, what: Protecting) -> Result<(), Error> {
        if self.protection.is_none() {
            return Ok(()); // a late word of one that has been ended
        }
        match what {
            Protecting::Copying(done, total) => {
                self.copied = (done, total);
                self.show();
                Ok(())
            }
            Protecting::CopyDone => self.step(Event::CopyDone),
            Protecting::Confirmed => {
                let generation = match self.phase() {
                    Some(Phase::Entering { record, .. }) => record.generation,
                    _ => Generation(0),
                };
                self.step(Event::Confirmed(generation))
            }
            Protecting::Final(epoch) => self.final_done(epoch),
            Protecting::Lost(why) => self.peer_lost(format!("link-error: {why}")),
            Protecting::Link(event) => self.link(event),
        }
    }

    fn link(&mut self, event: LinkEvent) -> Result<(), Error> {
        let how = match event.kind {
            LinkEventKind::DeathNotice => "death-notice",
            LinkEventKind::Silence { .. } => "silence",
            LinkEventKind::Stall { .. } => "stall",
            LinkEventKind::Goodbye => "goodbye",
            LinkEventKind::Failed { .. } => "link-error",
            LinkEventKind::Up { .. }
            | LinkEventKind::Missed { .. }
            | LinkEventKind::Heard { .. }
            | LinkEventKind::Broken { .. } => return Ok(()),
        };
        self.peer_lost(how.into())
    }

    fn peer_lost(&mut self, how: String) -> Result<(), Error> {
        if self.ended.is_some() || self.phase() == Some(&Phase::Ended) {
            return Ok(());
        }
        if self.lost_at.is_none() {
            self.lost_at = Some(Instant::now());
            self.events.tell(What::PeerLost { how });
        }
        if let Some(protection) = &self.protection {
            self.last_epoch = protection.engine.progress().captured;
        }
        self.step(Event::PeerLost)?;
        if self.protection.is_none() && self.shadowing.is_none() {
            self.lost_at = None;
        }
        Ok(())
    }

    fn gathered(&mut self, gathered: Gathered) -> Result<(), Error> {
        let tell = self.sender.clone();
        let tell = Arc::new(move |what| {
            let _ = tell.send(Input::Following(what));
        }) as Arc<dyn Fn(Following) + Send + Sync>;
        if let Some(shadowing) = &mut self.shadowing {
            return shadowing.join(gathered, &tell);
        }
        if self.phase() != Some(&Phase::Copying) || gathered.session.pair != self.spec.vm.pair {
            tracing::warn!("a session came that nobody waits for");
            return Ok(());
        }
        let setting = shadowing::Setting {
            me: self.me.incarnation,
            timing: self.link_timing(),
            spill_dir: self.spec.state_dir.clone(),
            from: None,
        };
        self.copied = (0, self.spec.vm.memory);
        let shadowing = Shadowing::begin(&self.parts, gathered, setting, tell)?;
        self.board.follows(Some(shadowing.engine.clone()));
        self.shadowing = Some(shadowing);
        self.show();
        Ok(())
    }

    fn following(&mut self, what: Following) -> Result<(), Error> {
        match what {
            Following::Copying(received) => {
                self.copied.0 = received;
                self.show();
                Ok(())
            }
            Following::Confirmed(generation) | Following::Known(generation) => {
                self.step(Event::Confirmed(generation))
            }
            Following::Spoiled(why) => {
                self.events
                    .note(format!("this shadow's copy is spoiled: {why}"));
                self.events.tell(What::Ended { why, clean: false });
                self.ended = Some(Ended::Fenced);
                Ok(())
            }
            Following::Link(event) => self.link(event),
            Following::Said(message, reply) => self.said(message, &reply),
        }
    }

    fn said(
        &mut self,
        message: PeerMessage,
        reply: &mpsc::Sender<PeerMessage>,
    ) -> Result<(), Error> {
        let answer = match message {
            PeerMessage::Settle => self.settle(),
            PeerMessage::Known(record) => {
                self.step(Event::Confirmed(record.generation))?;
                PeerMessage::Done
            }
            PeerMessage::HandOver(record) => {
                self.step(Event::HandedOver(record))?;
                match &self.life {
                    Life::Paired(pair) if pair.may_release().is_some() => PeerMessage::Running,
                    _ => PeerMessage::CouldNot,
                }
            }
            PeerMessage::Stopped(record) => {
                let _ = reply.send(PeerMessage::Done);
                return self.step(Event::PeerStopped(record));
            }
            PeerMessage::Begin
            | PeerMessage::Running
            | PeerMessage::CouldNot
            | PeerMessage::Done => PeerMessage::CouldNot,
        };
        let _ = reply.send(answer);
        Ok(())
    }

    /// Applies what is committed and makes the disks durable, without promoting anything.
    fn settle(&mut self) -> PeerMessage {
        let Some(shadowing) = &self.shadowing else {
            return PeerMessage::CouldNot;
        };
        match shadowing.replica.settle() {
            Ok(()) => PeerMessage::Done,
            Err(error) => {
                self.events
                    .note(format!("the disks could not be made durable: {error}"));
                PeerMessage::CouldNot
            }
        }
    }
}
