//! One side's process: the pair's real state machine, and its actions performed on the simulated machine.
//!
//! What `ax-vmm`'s conductor does with KVM, taps and sockets is done here with what is simulated; the state
//! machine, the engines, the barrier and the disks are the product's own.

use std::sync::Arc;
use std::time::Duration;

use ax_disk::{Image, Medium, WriteLog};
use ax_sync::sim::{self, Group, Here};
use ax_sync::{Condvar, Mutex};
use ax_wire::record::{Change, Member, Record, Refusal, Request, State};
use ax_wire::{EpochId, Generation, Incarnation, Session, Side};
use io_barrier::{
    Barrier, BarrierConfig, Clock, FtGrant, Grant, OutputSink, Power, ShadowOutputs, SoloGrant,
};
use statepoint::link::ShadowLink;
use statepoint::pair::{Action, Event, Pair, Phase};
use statepoint::primary::{PrimaryHandle, Start};
use statepoint::shadow::{CommittedState, Inheritance};

use crate::disk::Handle;
use crate::following::{Following, Shadowing};
use crate::guest::{self, DISK, Machine, Ports};
use crate::net::Mailbox;
use crate::oracle::Sender;
use crate::protecting::{Protecting, Protection};
use crate::universe::{Broken, HostClock, PAIR, Question, Running, Shown, Universe, place};

/// Silence for so long is a loss.
pub const DETECT: Duration = Duration::from_millis(60);
const BEAT: Duration = Duration::from_millis(6);
const STALL: u64 = 400_000_000;
/// W of rule 24.
const PERMISSION: u64 = 5_000_000;
/// As long outputs leave after an acknowledgement in mode `ha` (rule 28).
pub const LEASE: u64 = 90_000_000;
const MARGIN: u64 = 1_000_000;
/// How long the arbiter may take before it is asked again.
const AGAIN: u64 = 15_000_000;
/// How long roles may take to turn.
const TURN: u64 = 600_000_000;

/// What may be ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A planned failover.
    Failover,
    /// An orderly stop.
    Stop,
}

/// What the two processes of a pair say to each other.
#[derive(Clone, Debug)]
pub enum Word {
    /// Make your disks durable.
    Settle,
    /// It is done, or not.
    Settled(bool),
    /// Run the guest by this record.
    HandOver(Record),
    /// It runs.
    Running,
    /// It does not.
    CouldNot,
    /// I wait as a shadow does from here on: you may show outputs.
    Show,
    /// I am your shadow now.
    Follow(Running2),
    /// The pair has stopped by this record.
    Stopped(Record),
}

/// A process as it names itself in a message.
#[derive(Clone)]
pub struct Running2(pub Running);

impl std::fmt::Debug for Running2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.me)
    }
}

/// Everything that can happen to a process.
pub enum Input {
    /// The arbiter's answer.
    Heard(Option<Change>, Result<Record, Refusal>),
    /// The protection's word.
    Protecting(u64, Protecting),
    /// The following's.
    Following(u64, Following),
    /// A shadow waits on the other host.
    ShadowAt(Running),
    /// A primary has dialled.
    Session {
        /// What it carries.
        session: Session,
        /// Who.
        primary: Running,
        /// The connections.
        links: ShadowLink,
    },
    /// It has dialled again.
    Rejoin(Member, ShadowLink),
    /// The other process lives; how far it has come, and whether it waits.
    Beat(Incarnation, [u64; 2], bool),
    /// It has died.
    Died(Incarnation),
    /// It says something.
    Said(Running2, Word),
    /// The guest's disk could not do a request; true of a FLUSH.
    DiskFails(bool),
    /// An operator's.
    Order(Order),
}

/// What lives as long as the process.
pub struct Parts {
    /// Everything else.
    pub universe: Arc<Universe>,
    /// Who this is.
    pub mine: Running,
    /// The machine.
    pub machine: Machine,
    /// Its disk.
    pub image: Arc<Image>,
    /// Its disk's writes.
    pub log: Arc<WriteLog>,
    /// The gate.
    pub barrier: Arc<Barrier>,
    /// This host's clock.
    pub clock: Arc<HostClock>,
    /// Who captures epochs now.
    pub bell: Arc<Mutex<Option<PrimaryHandle>>>,
    /// Under which generation outputs leave.
    releases: Arc<parking_lot::Mutex<u64>>,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
}

/// The tap: what comes here is seen by the outside.
struct Tap {
    universe: Arc<Universe>,
    side: usize,
    releases: Arc<parking_lot::Mutex<u64>>,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
}

impl OutputSink for Tap {
    fn frame(&mut self, _: u8, frame: &[u8]) {
        let sender = Sender {
            generation: *self.releases.lock(),
            side: self.side,
        };
        let answer = guest::answer_of(frame).ok_or_else(|| "a frame is torn".to_owned());
        let judged = answer.and_then(|(n, nonce)| self.universe.oracle.answer(sender, n, nonce));
        if let Err(why) = judged {
            (self.failed)(&why);
        }
    }

    fn console(&mut self, _: u64, _: &[u8]) {}

    fn power(&mut self, _: Power) {}
}

#[derive(Default)]
struct Asking {
    question: Option<(u64, Option<Request>)>,
    number: u64,
}

/// Asks the arbiter until answered, in a thread of its own.
#[derive(Default)]
struct Asker {
    asking: Mutex<Asking>,
    news: Condvar,
}

impl Asker {
    fn ask(&self, request: Option<Request>) {
        let mut asking = self.asking.lock();
        asking.number += 1;
        asking.question = Some((asking.number, request));
        self.news.notify_all();
    }

    fn run(&self, universe: &Universe, mine: &Running) {
        let at = place(mine.me.side as usize);
        let reply = Mailbox::new(&universe.net, at);
        let Some(here) = sim::current() else { return };
        loop {
            let mut asking = self.asking.lock();
            let (number, request) = match asking.question {
                Some(question) => question,
                None => {
                    self.news.wait(&mut asking);
                    continue;
                }
            };
            drop(asking);
            let question = Question {
                from: at,
                request,
                number,
                reply: reply.clone(),
            };
            let late = here.below(4) / 3 * here.below(20_000_000);
            universe.questions.send_late(at, question, late);
            let until = here.now() + AGAIN;
            while let Some((of, answer)) = reply.receive(until) {
                if of == number {
                    self.asking.lock().question = None;
                    let change = request.map(|request| request.change);
                    mine.inbox.tell(Input::Heard(change, answer));
                    break;
                }
            }
        }
    }
}

/// How a process begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// As the primary of a guest that is to boot.
    Boot,
    /// As a shadow.
    Shadow,
}

/// The process watched.
struct Watch {
    who: Running,
    heard: u64,
    moved: u64,
    mine: [u64; 2],
    theirs: [u64; 2],
    pending: bool,
}

struct Process {
    here: Here,
    parts: Parts,
    pair: Option<Pair>,
    asker: Arc<Asker>,
    stint: u64,
    protection: Option<Protection>,
    shadowing: Option<Shadowing>,
    /// What this process was before the roles turned.
    parting: Option<Shadowing>,
    turning: Option<u64>,
    /// When this side said that the guest runs here after a turn, by its host's clock.
    turned: Option<u64>,
    watch: Option<Watch>,
    /// Whom heartbeats go to.
    beats: Arc<parking_lot::Mutex<Option<Running>>>,
    prepared: Option<CommittedState>,
    permission_over: Option<u64>,
    last_epoch: EpochId,
    durable: bool,
    ended: bool,
}

/// Starts a process on a side, if its host is on and has none.
pub fn start(
    universe: &Arc<Universe>,
    side: usize,
    begin: Begin,
    failed: &Arc<dyn Fn(&str) + Send + Sync>,
) -> Option<Running> {
    let here = sim::current()?;
    let group = universe.new_group();
    let me = Member {
        side: if side == 0 { Side::A } else { Side::B },
        incarnation: Incarnation(u64::from(group.0)),
    };
    let running = Running {
        group,
        me,
        inbox: Mailbox::new(&universe.net, place(side)),
        shown: Arc::default(),
    };
    running.shown.lock().primary = begin == Begin::Boot;
    {
        let mut host = universe.hosts[side].lock();
        if !host.on || host.process.is_some() {
            return None;
        }
        host.process = Some(running.clone());
    }
    let (all, mine, told) = (Arc::clone(universe), running.clone(), Arc::clone(failed));
    let life = move || {
        run(&all, &mine, begin, told);
        all.gone(side, mine.group);
        end(mine.group);
    };
    here.spawn_in(group, "main", life).ok()?;
    Some(running)
}

/// The calling process's end: all its threads are gone at once.
fn end(group: Group) {
    if let Some(here) = sim::current() {
        here.kill(group);
    }
}

fn run(
    universe: &Arc<Universe>,
    mine: &Running,
    begin: Begin,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
) {
    let Some(here) = sim::current() else { return };
    let side = mine.me.side as usize;
    let Ok(parts) = parts(universe, mine, failed) else {
        return universe.say(&format!("{}: its image can't be opened", mine.me));
    };
    if begin == Begin::Boot && parts.image.require_consistent().is_err() {
        return universe.say(&format!("{}: its image is inconsistent", mine.me));
    }
    universe.say(&format!("{} begins: {begin:?}", mine.me));
    let asker = Arc::new(Asker::default());
    let (asks, all, me) = (Arc::clone(&asker), Arc::clone(universe), mine.clone());
    let _ = ax_sync::thread::spawn("asker", move || asks.run(&all, &me));
    let beats = Arc::new(parking_lot::Mutex::new(None));
    beat(&parts, Arc::clone(&beats), side);
    let mut process = Process {
        here,
        parts,
        pair: None,
        asker,
        stint: 0,
        protection: None,
        shadowing: None,
        parting: None,
        turning: None,
        turned: None,
        watch: None,
        beats,
        prepared: None,
        permission_over: None,
        last_epoch: EpochId(0),
        durable: true,
        ended: false,
    };
    match begin {
        Begin::Boot => process.asker.ask(None),
        Begin::Shadow => process.pair = Some(Pair::shadow(mine.me, universe.flush())),
    }
    process.conduct();
}

fn parts(
    universe: &Arc<Universe>,
    mine: &Running,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Parts, ax_disk::OpenError> {
    let side = mine.me.side as usize;
    let (image, facts) = {
        let host = universe.hosts[side].lock();
        (Arc::clone(&host.image), Arc::clone(&host.facts))
    };
    let media = [(); 2].map(|()| Box::new(Handle(Arc::clone(&image))) as Box<dyn Medium>);
    let facts: Box<dyn Medium> = Box::new(Handle(facts));
    let path = std::path::Path::new("image");
    let image = Image::on(path, media, (facts, path), PAIR, DISK, false)?;
    let bell: Arc<Mutex<Option<PrimaryHandle>>> = Arc::default();
    let ring = |bell: &Arc<Mutex<Option<PrimaryHandle>>>, how: fn(&PrimaryHandle)| {
        let bell = Arc::clone(bell);
        move || {
            if let Some(engine) = &*bell.lock() {
                how(engine);
            }
        }
    };
    let log = WriteLog::new(64 << 10, ring(&bell, PrimaryHandle::trigger));
    let clock = universe.clock(side);
    let releases = Arc::new(parking_lot::Mutex::new(0));
    let tap = Tap {
        universe: Arc::clone(universe),
        side,
        releases: Arc::clone(&releases),
        failed: Arc::clone(&failed),
    };
    let config = BarrierConfig {
        epoch_bytes: 1 << 12,
        max_epochs: 4,
        permission_ns: match universe.breaks(Broken::Permission) {
            true => 500_000_000,
            false => PERMISSION,
        },
    };
    let barrier = Barrier::new(config, Box::new(tap), clock.clone());
    barrier.on_pending(ring(&bell, PrimaryHandle::wake));
    Ok(Parts {
        universe: Arc::clone(universe),
        mine: mine.clone(),
        machine: Machine::new(universe.setting.ha),
        image: Arc::new(image),
        log: Arc::new(log),
        barrier: Arc::new(barrier),
        clock,
        bell,
        releases,
        failed,
    })
}

/// Heartbeats, from a thread of their own.
fn beat(parts: &Parts, to: Arc<parking_lot::Mutex<Option<Running>>>, side: usize) {
    let (bell, mine) = (Arc::clone(&parts.bell), parts.mine.clone());
    let send = move || {
        loop {
            ax_sync::thread::sleep(BEAT);
            let Some(peer) = to.lock().clone() else {
                continue;
            };
            let engine = bell.lock().clone();
            let (at, pending) = engine.map_or(([0; 2], false), |engine| {
                let progress = engine.progress();
                let epochs = [progress.captured.0, progress.acked.0];
                (epochs, progress.acked.0 > 0 && engine.work_pending())
            });
            let beat = Input::Beat(mine.me.incarnation, at, pending);
            peer.inbox.send(place(side), beat);
        }
    };
    let _ = ax_sync::thread::spawn("beats", send);
}

impl Process {
    fn say(&self, what: &str) {
        let me = self.parts.mine.me;
        self.parts.universe.say(&format!("{me} {what}"));
    }

    fn breaks(&self, rule: Broken) -> bool {
        self.parts.universe.breaks(rule)
    }

    fn conduct(&mut self) {
        let begun = self.here.now();
        while !self.ended {
            let now = self.here.now();
            let mut until = now + 20_000_000;
            if let Some(at) = self.permission_over {
                until = until.min(at);
            }
            if let Some(watch) = &self.watch {
                until = until.min(watch.heard + DETECT.as_nanos() as u64);
            }
            match self.parts.mine.inbox.receive(until) {
                Some(input) => self.take(input),
                None => self.look_at_the_clock(begun),
            }
            self.show();
        }
    }

    fn look_at_the_clock(&mut self, begun: u64) {
        let now = self.here.now();
        if self.permission_over.is_some_and(|at| now >= at) {
            self.permission_over = None;
            return self.step(Event::PermissionOver);
        }
        if self.turning.is_some_and(|by| now >= by) {
            return self.peer_lost("no session formed after the turn");
        }
        if let Some(watch) = &mut self.watch {
            let engine = self.parts.bell.lock().clone();
            let (mine, pending) = engine.map_or((watch.mine, false), |e| {
                let at = e.progress();
                let pending = at.acked.0 > 0 && e.work_pending();
                ([at.captured.0, at.acked.0], pending)
            });
            if watch.mine != mine || !(pending || watch.pending) {
                (watch.mine, watch.moved) = (mine, now);
            }
            if now.saturating_sub(watch.heard) >= DETECT.as_nanos() as u64 {
                return self.peer_lost("silence");
            }
            if now.saturating_sub(watch.moved) >= STALL {
                return self.peer_lost("stall");
            }
        }
        let waits = matches!(self.phase(), Some(Phase::Copying)) && self.shadowing.is_none();
        if waits && now > begun + 500_000_000 {
            self.say("no primary came");
            self.ended = true;
        }
    }

    fn phase(&self) -> Option<&Phase> {
        self.pair.as_ref().map(|pair| &pair.phase)
    }

    fn show(&self) {
        let phase = self.phase();
        let mut shown = self.parts.mine.shown.lock();
        let alone = matches!(phase, Some(Phase::Alone { filling: None, .. }));
        shown.wants_shadow = alone && self.protection.is_none();
        shown.protected = matches!(phase, Some(Phase::Ft { .. })) && self.protection.is_some();
        shown.primary = !matches!(
            phase,
            Some(
                Phase::Copying
                    | Phase::InSync { .. }
                    | Phase::Waiting { .. }
                    | Phase::AskingTakeover { .. }
            )
        );
    }

    fn watch(&mut self, who: Option<Running>) {
        *self.beats.lock() = who.clone();
        let now = self.here.now();
        self.watch = who.map(|who| Watch {
            who,
            heard: now,
            moved: now,
            mine: [0; 2],
            theirs: [0; 2],
            pending: false,
        });
    }

    fn watches(&self, who: Incarnation) -> bool {
        let watched = self.watch.as_ref();
        watched.is_some_and(|watch| watch.who.me.incarnation == who)
    }

    fn step(&mut self, event: Event) {
        let Some(pair) = self.pair.clone() else {
            return;
        };
        let before = pair.phase.clone();
        let said = brief(&format!("{event:?}"));
        let (pair, actions) = pair.step(event);
        if pair.phase != before {
            self.say(&format!("{said}: {}", brief(&format!("{:?}", pair.phase))));
        }
        self.pair = Some(pair);
        for action in actions {
            if self.ended {
                return;
            }
            self.perform(action);
        }
    }

    fn peer_lost(&mut self, how: &str) {
        self.say(&format!("lost its peer: {how}"));
        self.watch(None);
        if self.turning.take().is_some() {
            self.parting_lost();
        }
        if let Some(protection) = &self.protection {
            self.last_epoch = protection.engine.progress().captured;
        }
        self.step(Event::PeerLost);
    }

    /// The old primary was lost before it could follow: [`Action::DropShadow`] does the rest.
    fn parting_lost(&mut self) {
        self.parting = None;
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Heard(change, answer) => self.hear(change, answer),
            Input::Protecting(stint, what) if stint == self.stint => self.protecting(what),
            Input::Following(stint, what) if stint == self.stint => match what {
                Following::Known(generation) => self.step(Event::Confirmed(generation)),
                Following::Spoiled(why) => {
                    self.say(&format!("is spoiled: {why}"));
                    self.ended = true;
                }
            },
            Input::Protecting(..) | Input::Following(..) => {}
            Input::ShadowAt(shadow) => {
                if let Some(Phase::Alone {
                    record,
                    filling: None,
                }) = self.phase()
                    && self.protection.is_none()
                {
                    let after = self.last_epoch.max(self.parts.barrier.sealed());
                    let generation = record.generation;
                    self.dial(shadow, generation, Start::FullCopy { after });
                }
            }
            Input::Session {
                session,
                primary,
                links,
            } => self.session(session, primary, links),
            Input::Rejoin(of, links) => match &self.shadowing {
                Some(shadowing) if shadowing.primary.me == of => shadowing.join(links),
                _ => (links.close)(),
            },
            Input::Beat(who, at, pending) => {
                let now = self.here.now();
                if let Some(watch) = self.watch.as_mut().filter(|w| w.who.me.incarnation == who) {
                    watch.heard = now;
                    if watch.theirs != at {
                        (watch.theirs, watch.moved) = (at, now);
                    }
                    watch.pending = pending;
                }
            }
            Input::Died(who) => {
                if self.watches(who) {
                    self.peer_lost("its death");
                }
            }
            Input::Said(who, word) => self.said(who.0, word),
            Input::DiskFails(flush) => self.disk_fails(flush),
            Input::Order(Order::Failover) => {
                let settled = self.turning.is_none() && self.protection.is_some();
                let settled = settled && !self.parts.universe.setting.ha;
                if settled && matches!(self.phase(), Some(Phase::Ft { .. })) {
                    self.step(Event::Failover);
                }
            }
            Input::Order(Order::Stop) => {
                if self.turning.is_none() {
                    self.step(Event::Stop);
                }
            }
        }
    }

    /// How long after its last acknowledgement the other side may still show outputs.
    fn permission(&self) -> u64 {
        match self.parts.universe.setting.ha {
            true => LEASE + LEASE / 50 + MARGIN,
            false => PERMISSION + MARGIN,
        }
    }

    /// Rule 19: the guest goes on from the other copy. Without one a request is tried again, but for a FLUSH: what
    /// it was to make durable may be gone, so the guest is told, and crashes.
    fn disk_fails(&mut self, flush: bool) {
        let settled = self.turning.is_none() && self.protection.is_some();
        match self.phase() {
            Some(Phase::Ft { .. }) if settled => self.step(Event::Resign),
            Some(Phase::Alone { .. }) if flush => {
                self.say("its guest was told of a FLUSH that failed, and crashed");
                self.ended = true;
            }
            _ => {}
        }
    }

    fn hear(&mut self, change: Option<Change>, answer: Result<Record, Refusal>) {
        match (change, answer) {
            (None, Ok(record)) => {
                let me = self.parts.mine.me;
                let other = record.holder().is_some_and(|m| m.side != me.side);
                if other && record.shadow().is_some() {
                    // Its permission of some moment ago is over first (rules 24, 28).
                    self.here.sleep(Duration::from_nanos(self.permission()));
                }
                let flush = self.parts.universe.flush();
                let (pair, actions) = Pair::starting(me, flush, record.generation);
                self.pair = Some(pair);
                for action in actions {
                    self.perform(action);
                }
            }
            (None, Err(_)) => self.ended = true,
            (Some(_), Ok(record)) => self.step(Event::Granted(record)),
            (Some(_), Err(refusal)) => self.step(Event::Refused(refusal)),
        }
    }

    fn protecting(&mut self, what: Protecting) {
        if self.protection.is_none() {
            return;
        }
        match what {
            Protecting::CopyDone => self.step(Event::CopyDone),
            Protecting::Confirmed => {
                let generation = match self.phase() {
                    Some(Phase::Entering { record, .. }) => record.generation,
                    _ => Generation(0),
                };
                self.step(Event::Confirmed(generation));
            }
            Protecting::Final(epoch) => self.final_epoch(epoch),
            Protecting::Lost(why) => self.peer_lost(&why),
        }
    }

    fn final_epoch(&mut self, epoch: EpochId) {
        self.durable = self.parts.image.flush().is_ok();
        self.last_epoch = epoch;
        match &self.protection {
            Some(protection) => self.tell(&protection.shadow, Word::Settle),
            None => self.step(Event::FinalDone {
                epoch,
                durable: self.durable,
            }),
        }
    }

    fn tell(&self, to: &Running, word: Word) {
        let at = place(self.parts.mine.me.side as usize);
        let mine = Running2(self.parts.mine.clone());
        to.inbox.send(at, Input::Said(mine, word));
    }

    fn said(&mut self, who: Running, word: Word) {
        if !self.watches(who.me.incarnation) {
            return;
        }
        match word {
            Word::Settle => {
                let done = self.shadowing.as_ref().map(|s| s.replica.settle().is_ok());
                self.tell(&who, Word::Settled(done == Some(true)));
            }
            Word::Settled(true) => self.step(Event::FinalDone {
                epoch: self.last_epoch,
                durable: self.durable,
            }),
            Word::Settled(false) => self.peer_lost("it could not settle"),
            Word::HandOver(record) => {
                self.turning = Some(self.here.now() + TURN);
                self.step(Event::HandedOver(record));
                let runs = self.pair.as_ref().and_then(Pair::may_release).is_some();
                let answer = match runs {
                    true => {
                        self.turned = Some(self.parts.clock.now_ns());
                        Word::Running
                    }
                    false => {
                        self.turning = None;
                        Word::CouldNot
                    }
                };
                self.tell(&who, answer);
            }
            Word::Running => self.step(Event::Running),
            Word::CouldNot => self.step(Event::PromotionFailed),
            Word::Show => {
                if let (Some(stamp), Some(Phase::Ft { .. })) = (self.turned, self.phase()) {
                    let _ = self.parts.barrier.release(self.last_epoch, stamp);
                }
            }
            Word::Follow(shadow) => {
                if let (Some(Phase::Ft { record }), true) = (self.phase(), self.turning.is_some()) {
                    let (at, generation) = (self.last_epoch, record.generation);
                    if !self.dial(shadow.0, generation, Start::Synced { at }) {
                        return self.peer_lost("it could not be dialled");
                    }
                    (self.turning, self.parting) = (None, None);
                }
            }
            Word::Stopped(record) => self.step(Event::PeerStopped(record)),
        }
    }

    fn dial(&mut self, shadow: Running, generation: Generation, start: Start) -> bool {
        self.stint += 1;
        let session = Session {
            pair: PAIR,
            generation,
            incarnation: self.parts.mine.me.incarnation,
        };
        let incarnation = shadow.me.incarnation;
        let begun = Protection::begin(&self.parts, shadow.clone(), session, start, self.stint);
        let Some(protection) = begun else {
            return false;
        };
        self.protection = Some(protection);
        self.watch(Some(shadow));
        if matches!(start, Start::FullCopy { .. }) {
            self.step(Event::CopyBegun(incarnation));
        }
        true
    }

    fn session(&mut self, session: Session, primary: Running, links: ShadowLink) {
        if let Some(shadowing) = &self.shadowing {
            match shadowing.primary.me == primary.me {
                true => {
                    shadowing.join(links);
                    self.turning = None;
                }
                false => (links.close)(),
            }
            return;
        }
        if self.phase() != Some(&Phase::Copying) {
            return (links.close)();
        }
        self.stint += 1;
        self.shadowing = Shadowing::begin(&self.parts, session, primary.clone(), None, self.stint);
        if let Some(shadowing) = &self.shadowing {
            shadowing.join(links);
            self.watch(Some(primary));
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Ask(from, change) => self.asker.ask(Some(Request {
                pair: PAIR,
                caller: self.parts.mine.me,
                machine: None,
                from,
                change,
            })),
            Action::FreezeOutputs => self.parts.barrier.freeze(),
            Action::HoldOutputs => {
                match self.parts.universe.setting.ha {
                    true => self.parts.barrier.start_leasing(LEASE),
                    false => self.parts.barrier.start_holding(),
                };
            }
            Action::ReleaseAlone(record) => self.release_alone(&record),
            Action::ReleaseAcked(record) => self.release_acked(&record),
            Action::FreezeAcks => {
                if let Some(shadowing) = &self.shadowing {
                    shadowing.engine.freeze_acks();
                }
            }
            Action::AwaitPermissionOver => {
                self.permission_over = Some(self.here.now() + self.permission());
                if self.breaks(Broken::Permission) {
                    self.permission_over = Some(self.here.now());
                }
                if let Err(why) = self.prepare(false) {
                    self.say(&format!("can't take over: {why}"));
                    self.permission_over = None;
                    self.step(Event::PromotionFailed);
                }
            }
            Action::Boot(record) => {
                let durable = self.parts.image.meta().lock();
                let mut durable = durable;
                let _ = durable.set_generation(record.generation);
                drop(durable);
                self.run_guest();
            }
            Action::Promote(record) => self.promote(&record),
            Action::DropShadow => {
                match self.protection.take() {
                    Some(protection) => protection.end(&self.parts, true),
                    None => self.parts.log.record(false),
                }
                self.watch(None);
                self.parts.log.release_flushes();
            }
            Action::ParkForGood => match &self.protection {
                Some(protection) => {
                    if self.parts.universe.setting.ha {
                        self.parts.machine.park(true);
                    }
                    protection.engine.request_final_epoch();
                }
                None => {
                    self.parts.machine.park(true);
                    self.final_epoch(self.last_epoch);
                }
            },
            Action::Unpark => {
                if let Some(protection) = &self.protection {
                    protection.unpark();
                }
                self.parts.machine.park(false);
            }
            Action::TellShadow(record) => {
                if let Some(protection) = &self.protection {
                    let word = match record.state {
                        State::Stopped { .. } => Word::Stopped(record),
                        _ => Word::HandOver(record),
                    };
                    self.tell(&protection.shadow, word);
                }
            }
            Action::BecomeShadow(record) => self.become_shadow(&record),
            Action::EndClean(record) => {
                self.say(&format!("ends in order: {record}"));
                self.parts.image.close();
                // The other side hears of it first.
                self.here.sleep(Duration::from_millis(2));
                self.ended = true;
            }
            Action::EndFenced(ending) => {
                self.say(&format!("ends: {ending:?}"));
                self.ended = true;
            }
            Action::Joined(_) | Action::StayLocal(_) => {}
        }
    }

    fn run_guest(&self) {
        let parts = &self.parts;
        let (universe, failed) = (Arc::clone(&parts.universe), Arc::clone(&parts.failed));
        let me = parts.mine.me;
        let ports = Ports {
            barrier: Arc::clone(&parts.barrier),
            image: Arc::clone(&parts.image),
            log: Arc::clone(&parts.log),
            sync: universe.setting.sync,
            booted: Box::new(move |last, found| {
                universe.say(&format!("{me} booted; its ledger ends with {last}"));
                if let Err(why) = universe.oracle.booted(last, found) {
                    failed(&why);
                }
            }),
            trouble: {
                let inbox = parts.mine.inbox.clone();
                Box::new(move |flush| inbox.tell(Input::DiskFails(flush)))
            },
            failed: Arc::clone(&parts.failed),
        };
        if let Err(error) = parts.machine.start(ports) {
            (parts.failed)(&error.to_string());
        }
    }

    fn release_alone(&mut self, record: &Record) {
        let Some(grant) = SoloGrant::of(record, self.parts.mine.me) else {
            return (self.parts.failed)("released alone without a record that says so");
        };
        *self.parts.releases.lock() = record.generation.0;
        match self.shadowing.take() {
            None => self.parts.barrier.pass(grant),
            Some(shadowing) => self.release_promoted(grant.into(), &shadowing),
        }
    }

    fn release_promoted(&self, grant: Grant, shadowing: &Shadowing) {
        if self.breaks(Broken::Resend) {
            let none = ShadowOutputs::new(0);
            return self.parts.barrier.promote(grant, &none, self.last_epoch);
        }
        let (barrier, committed) = (&self.parts.barrier, self.last_epoch);
        shadowing
            .engine
            .with_outputs(|outputs| barrier.promote(grant, outputs, committed));
    }

    fn release_acked(&mut self, record: &Record) {
        let Some(grant) = FtGrant::of(record, self.parts.mine.me) else {
            return (self.parts.failed)("released under FT without a record that says so");
        };
        *self.parts.releases.lock() = record.generation.0;
        match &self.protection {
            Some(protection) => {
                if !self.parts.universe.setting.ha {
                    self.parts.barrier.protect(grant);
                }
                protection.engine.granted(record.generation);
            }
            None => {
                let Some(shadowing) = self.shadowing.take() else {
                    return;
                };
                self.release_promoted(grant.into(), &shadowing);
                self.parting = Some(shadowing);
            }
        }
    }

    fn prepare(&mut self, protected: bool) -> Result<(), String> {
        let shadowing = self.shadowing.as_mut().ok_or("no session")?;
        let committed = shadowing.finish().ok_or("nothing is committed")?;
        shadowing.replica.settle().map_err(|e| e.to_string())?;
        if self.parts.universe.setting.ha {
            // The guest boots.
            self.last_epoch = committed.epoch;
            self.prepared = Some(committed);
            return Ok(());
        }
        let mut machine = self.parts.machine.clone();
        if protected {
            use statepoint::guest::Guest;
            machine.track_dirty(true).map_err(|e| e.to_string())?;
        }
        if let Err(why) = machine.restore(&committed.state) {
            (self.parts.failed)(&why);
        }
        self.parts.log.record(protected);
        self.last_epoch = committed.epoch;
        self.prepared = Some(committed);
        Ok(())
    }

    fn promote(&mut self, record: &Record) {
        let prepared = match self.prepared {
            Some(_) => Ok(()),
            None => self.prepare(matches!(record.state, State::Ft { .. })),
        };
        let promoted = prepared.and_then(|()| {
            self.prepared.take();
            let shadowing = self.shadowing.as_ref().ok_or("no session")?;
            let promoted = shadowing.replica.promote(record.generation);
            promoted.map_err(|e| e.to_string())
        });
        match promoted {
            Ok(()) => {
                self.run_guest();
                self.step(Event::Running);
            }
            Err(why) => {
                self.say(&format!("can't be promoted: {why}"));
                self.step(Event::PromotionFailed);
            }
        }
    }

    fn become_shadow(&mut self, record: &Record) {
        let lost = |why: &str| (self.parts.failed)(&format!("after a planned failover: {why}"));
        let Some(protection) = self.protection.take() else {
            return lost("no protection");
        };
        let primary = protection.shadow.clone();
        self.tell(&primary, Word::Show);
        let Some(committed) = protection.hand_over(&self.parts) else {
            return lost("the final epoch is gone");
        };
        let mut outputs = ShadowOutputs::new(1 << 20);
        if self.parts.barrier.retire(&mut outputs).is_err() {
            return lost("its outputs do not fit");
        }
        self.parts.machine.vacate();
        self.last_epoch = committed.epoch;
        let session = Session {
            pair: PAIR,
            generation: record.generation,
            incarnation: primary.me.incarnation,
        };
        self.stint += 1;
        let from = Some(Inheritance { committed, outputs });
        self.shadowing = Shadowing::begin(&self.parts, session, primary.clone(), from, self.stint);
        self.turning = Some(self.here.now() + TURN);
        let mine = Running2(self.parts.mine.clone());
        self.tell(&primary, Word::Follow(mine));
    }
}

/// The name of an event or a phase, without what it carries.
fn brief(whole: &str) -> String {
    let end = whole.find([' ', '{', '(']).unwrap_or(whole.len());
    whole.get(..end).unwrap_or_default().to_owned()
}

/// What a process shows, for the daemons.
pub fn shown(running: &Running) -> Shown {
    running.shown.lock().clone()
}
