//! One side's process: the pair's real state machine, and its actions performed on the simulated machine.
//!
//! What `ax-vmm`'s conductor does with KVM, taps and sockets is done here with what is simulated; the state
//! machine, the engines, the barrier and the disks are the product's own.

mod asker;
mod hear;
mod parts;
mod perform;

use std::sync::Arc;
use std::time::Duration;

use ax_sync::sim::{self, Group, Here};
use ax_wire::record::{Change, Member, Record, Refusal};
use ax_wire::{EpochId, Incarnation, Session, Side};
use statepoint::link::ShadowLink;
use statepoint::pair::{Event, Pair, Phase};
use statepoint::shadow::CommittedState;

use self::asker::Asker;
pub use self::parts::Parts;
use self::parts::{beat, parts};
use crate::following::{Following, Shadowing};
use crate::net::Mailbox;
use crate::protecting::{Protecting, Protection};
use crate::universe::{Broken, Running, Shown, Universe, place};

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
    /// The peer that is being lost has died.
    peer_died: bool,
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
        peer_died: false,
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
