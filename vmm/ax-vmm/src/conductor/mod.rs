//! The conductor: one thread that feeds the pair's state machine and performs its actions.
//!
//! Everything that happens comes in through one queue as an [`Input`]; the state machine says what
//! to do; nothing is decided here. Whatever could wait long has a thread of its own.

mod begin;
mod handover;
mod mode;
mod orders;
mod perform;
mod primary;
mod promotion;
mod shadow;
mod show;
mod storage;
mod word;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_api::process::{Reply, Role, Spec, Start};
use ax_api::vm::Mode;
use ax_link::{Incoming, Stream};
use ax_wire::record::{Flush, Member, Record, State};
use ax_wire::{EpochId, Incarnation, Session, Side};
use statepoint::pair::{Event, Pair, Phase};
use statepoint::shadow::CommittedState;

use crate::asker::manual::Desk;
use crate::asker::{Asker, Heard};
use crate::board::Board;
use crate::control::Order;
use crate::error::Error;
use crate::events::Events;
use crate::parts::Parts;
use crate::protect::{Parked, Protecting, Protection};
use crate::session::{Dialled, Door, Gathered};
use crate::shadowing::{Following, Shadowing};

use handover::{Parting, Turning};
use mode::Change;
use primary::Dial;

/// Added to the permission time (rule 24): drift of two clocks over it, and the tick.
const DRIFT_MARGIN: Duration = Duration::from_millis(1);

/// How long the arbiter may say nothing before what can wait no longer is given up.
const ARBITER_PATIENCE: Duration = Duration::from_secs(5);

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
    Dialled(Box<Result<Dialled, String>>, Box<Dial>),
    Protecting(Stint, Protecting),
    Gathered(Box<Gathered>),
    Talk(Session, Box<Stream>),
    Heartbeat(Box<Incoming>),
    Following(Stint, Following),
    /// A disk has begun to fail, or works again.
    Disks,
}

/// Counts the protections and followings of this process, so that a late word of one that is over is
/// known for what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stint(u64);

/// Whose life this process leads.
enum Life {
    /// A guest that is to boot as one side of a pair, by the arbiter's leave.
    Unborn,
    /// A guest that no arbiter knows: it runs, in mode `none`.
    Local,
    /// One side of a pair.
    Paired(Pair),
}

struct Conductor {
    spec: Spec,
    me: Member,
    life: Life,
    /// An arbiter knew this VM, and this host as one side of it, before this process.
    was_paired: bool,
    parts: Parts,
    events: Arc<Events>,
    board: Arc<Board>,
    asker: Option<Asker>,
    /// What this host knows of the pair, where no third party keeps the record.
    desk: Option<Arc<Desk>>,
    queue: mpsc::Receiver<Input>,
    sender: mpsc::Sender<Input>,
    stint: Stint,
    door: Door,
    protection: Option<Protection>,
    shadowing: Option<Shadowing>,
    /// A planned failover whose new session is not formed yet.
    turning: Option<Turning>,
    /// When this side said that the guest runs here after a planned failover, CLOCK_BOOTTIME ns.
    turned_ns: Option<u64>,
    /// What this process was before the turn, still watching the other side.
    parting: Option<Parting>,
    /// What a promotion starts from: finished, and restored into the machine.
    prepared: Option<CommittedState>,
    /// When this process began.
    born: Instant,
    permission_over: Option<Instant>,
    lost_at: Option<Instant>,
    /// The peer that is being lost has died, by the sentinel's word.
    peer_died: bool,
    /// How far a promotion has come.
    promotion: promotion::Steps,
    copied: (u64, u64),
    waits_for: Option<String>,
    /// The last line told of the arbiter.
    noted: Option<String>,
    /// The last alarm told.
    alarmed: Option<String>,
    /// Who waits for a stop or a planned failover.
    waiting: Vec<mpsc::Sender<Reply>>,
    /// Who waits for the arbiter to be found within reach, before a planned failover begins.
    probing: Vec<mpsc::Sender<Reply>>,
    /// A change of mode under way.
    changing: Option<Change>,
    /// A shadow dropped now is one that is not wanted any more.
    dismissing: bool,
    why_stopping: Option<String>,
    /// The guest is parked, or about to be, to run on elsewhere or not at all: nothing may touch it.
    leaving: bool,
    /// Why the disks here could not be made durable at the guest's end here.
    not_durable: Option<String>,
    last_epoch: EpochId,
    /// What has been told of the disks that fail here.
    disks: storage::Told,
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
    let disks = sender.clone();
    let parts = Parts::build(
        &spec,
        move |what| {
            let _ = power.send(Input::Power(what));
        },
        move || {
            let _ = disks.send(Input::Disks);
        },
    )?;
    let peer = spec.peer.clone().unwrap_or_default();
    let me = Member {
        side: spec.side.unwrap_or(Side::of(&spec.host, &peer)),
        incarnation: incarnation(),
    };
    let (events, role) = match spec.start {
        Start::Boot => (Events::new(), Role::Primary),
        Start::Shadow => (Events::new(), Role::Shadow),
    };
    let board = Board::new(spec.clone(), me.incarnation, role, parts.bell.clone());
    let mut conductor = Conductor {
        me,
        life: Life::Unborn,
        was_paired: false,
        parts,
        events,
        board,
        asker: None,
        desk: None,
        queue,
        sender,
        stint: Stint::default(),
        door: Door::new(spec.start == Start::Shadow),
        protection: None,
        shadowing: None,
        turning: None,
        turned_ns: None,
        parting: None,
        prepared: None,
        born: Instant::now(),
        permission_over: None,
        lost_at: None,
        peer_died: false,
        promotion: promotion::Steps::default(),
        copied: (0, 0),
        waits_for: None,
        noted: None,
        alarmed: None,
        waiting: Vec::new(),
        probing: Vec::new(),
        changing: None,
        dismissing: false,
        why_stopping: None,
        leaving: false,
        not_durable: None,
        last_epoch: EpochId(0),
        disks: storage::Told::default(),
        ended: None,
        spec,
    };
    conductor.watch_disks()?;
    conductor.begin()?;
    conductor.conduct()
}

impl Conductor {
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
                self.look_at_disks()?;
            }
            if self.permission_over.is_some_and(|at| Instant::now() >= at) {
                self.permission_over = None;
                self.step(Event::PermissionOver)?;
                continue;
            }
            if self.turning.as_ref().is_some_and(Turning::is_overdue) {
                self.peer_lost("no session formed after the planned failover".into())?;
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
        self.mode_reached();
        let clean = self.ended == Some(Ended::InOrder);
        let reply = match clean {
            true => Reply::Done,
            false => Reply::Refused {
                why: "the other side runs the VM; this process ends".into(),
            },
        };
        self.answer(&reply);
        if let Some(protection) = self.protection.take() {
            protection.end(&self.parts, clean, Parked::Stays);
        }
        if let Some(shadowing) = self.shadowing.take() {
            shadowing.leave(clean);
        }
        if !self.ends_for_its_disks()
            && let Err(error) = self.flush_in_time()
        {
            tracing::error!(%error, "flush");
        }
        self.parts.console.close();
        // Control connections send what is queued for them.
        std::thread::sleep(Duration::from_millis(50));
        let _ = std::fs::remove_file(&self.spec.control);
        self.last_words();
    }

    fn take(&mut self, input: Input, later: &mut VecDeque<Input>) -> Result<(), Error> {
        match input {
            Input::Order(order) => self.obey(order),
            Input::Heard(heard) => self.hear(heard),
            // It is acted on where the guest goes on, by that machine's state.
            Input::Power(_) if self.leaving => Ok(()),
            Input::Power(what) => self.power(what),
            Input::Dialled(dialled, dial) => self.dialled(*dialled, *dial),
            Input::Protecting(stint, what) => self.protecting(stint, what),
            Input::Gathered(gathered) => self.gathered(*gathered),
            Input::Talk(session, peer) => self.talk_goes_on(session, *peer),
            Input::Heartbeat(incoming) => {
                let expected = matches!(self.phase(), Some(Phase::Copying));
                match &self.shadowing {
                    Some(shadowing) => {
                        if shadowing.heartbeat(*incoming) {
                            self.turned();
                        }
                    }
                    // It overtook the connection that completes its session.
                    None if expected && later.len() < 8 => {
                        later.push_back(Input::Heartbeat(incoming));
                    }
                    None => incoming.refuse("no session"),
                }
                Ok(())
            }
            Input::Following(stint, what) => self.following(stint, what),
            Input::Disks => self.look_at_disks(),
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
        self.mode_reached();
        self.show();
        Ok(())
    }

    fn phase(&self) -> Option<&Phase> {
        match &self.life {
            Life::Unborn | Life::Local => None,
            Life::Paired(pair) => Some(&pair.phase),
        }
    }

    fn hear(&mut self, heard: Heard) -> Result<(), Error> {
        match heard {
            Heard::Known(record) => {
                if matches!(self.life, Life::Unborn) && self.spec.start == Start::Boot {
                    self.require_part(&record)?;
                }
                self.remember_pair()?;
                if matches!(self.life, Life::Local) {
                    return self.pair_known(record);
                }
                let fresh = matches!(self.life, Life::Unborn);
                if fresh && self.spec.start == Start::Boot {
                    if let Some(wait) = self.lease_left(&record) {
                        return self.hear_later(heard, wait);
                    }
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
                self.promotion.reached(promotion::Step::Granted);
                self.step(Event::Granted(record))
            }
            Heard::Refused(refusal) => {
                self.waits_for = Some(refusal.to_string());
                if matches!(self.life, Life::Local) {
                    self.stay_local(&refusal);
                    return Ok(());
                }
                if matches!(self.life, Life::Unborn) {
                    return Err(Error::Arbiter(refusal.to_string()));
                }
                self.step(Event::Refused(refusal))
            }
            Heard::Reachable(found) => self.arbiter_found(found),
            Heard::Superseded(record) => self.superseded(record),
            Heard::Note(text) => {
                if self.noted.as_ref() != Some(&text) {
                    self.events.note(text.clone());
                    self.noted = Some(text);
                }
                Ok(())
            }
            Heard::Decides(arbiter) => {
                self.board.decides(arbiter);
                Ok(())
            }
            Heard::Alarm(why) => {
                self.alarm(why);
                Ok(())
            }
            Heard::Silent(why) => {
                if self.waits_for.as_ref() != Some(&why) {
                    self.events.note(format!("waiting for the arbiter: {why}"));
                }
                self.change_unanswered(&why);
                self.waits_for = Some(why);
                if self.spec.vm.mode == Mode::None
                    && matches!(self.phase(), Some(Phase::AskingStop { .. }))
                {
                    return self.step(Event::Unanswered);
                }
                self.show();
                Ok(())
            }
        }
    }

    /// What is left of a lease that the other side may have from an earlier process of this one, which began
    /// and ended before this one began (rule 28).
    fn lease_left(&self, record: &Record) -> Option<Duration> {
        let State::Ft {
            holder,
            flush: Flush::Both,
            ..
        } = record.state
        else {
            return None;
        };
        let lease = Duration::from_millis(self.spec.timing.lease_ms);
        let lease = lease + lease / 50 + DRIFT_MARGIN;
        let left = lease.saturating_sub(self.born.elapsed());
        (holder.side != self.me.side && !left.is_zero()).then_some(left)
    }

    /// Hears it again after a while.
    fn hear_later(&self, heard: Heard, wait: Duration) -> Result<(), Error> {
        let tell = self.sender.clone();
        let wake = move || {
            std::thread::sleep(wait);
            let _ = tell.send(Input::Heard(heard));
        };
        let spawned = std::thread::Builder::new().name("later".into()).spawn(wake);
        spawned.map(drop).map_err(Error::Thread)
    }

    /// Begins a new stint.
    fn next_stint(&mut self) -> Stint {
        self.stint.0 += 1;
        self.stint
    }

    fn answer(&mut self, reply: &Reply) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(reply.clone());
        }
    }
}
