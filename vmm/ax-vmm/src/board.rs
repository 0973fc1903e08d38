//! What this process says of itself, whatever else it is doing.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::process::{
    DiskSync, PathReport, PathState, PauseParts, Phase, Reply, Request, Role, Spec, Status,
};
use ax_api::vm::Mode;
use ax_wire::{Generation, Incarnation};
use parking_lot::Mutex;
use statepoint::shadow::ShadowHandle;
use statepoint::stats::{Reading, Snapshot, Summary};

use crate::parts::EngineBell;
use crate::standby::Service;

/// What status tells of times and sizes is of so long a time.
const RECENT: Duration = Duration::from_secs(5);

/// How the paths serve the epoch stream, at the moment of asking.
pub type Services = Box<dyn Fn() -> Vec<Service> + Send>;

fn report(service: &Service) -> PathReport {
    PathReport {
        address: service.address,
        state: match service.state {
            ax_link::heartbeat::PathState::New => PathState::New,
            ax_link::heartbeat::PathState::Up => PathState::Up,
            ax_link::heartbeat::PathState::Lost => PathState::Lost,
        },
        carries: service.carries,
        ready: service.ready,
    }
}

struct Facts {
    role: Role,
    mode: Mode,
    /// Since when a copy is under way.
    syncing: Option<Instant>,
    phase: Phase,
    warning: Option<String>,
    disk_fails: Option<String>,
    disk_holds: bool,
    arbiter: String,
    generation: Generation,
    listen: Vec<SocketAddr>,
    shadow: Option<ShadowHandle>,
    paths: Services,
    sample: (Instant, u64),
    rate: f64,
    /// Readings of the present engine, the oldest at least [`RECENT`] ago if it has run for so long.
    readings: VecDeque<(Instant, Reading)>,
}

impl Facts {
    fn note(&mut self, now: Instant, reading: Reading) {
        let newer = |(_, before): &(Instant, Reading)| reading.bytes() >= before.bytes();
        if !self.readings.back().is_none_or(newer) {
            self.readings.clear(); // another engine: this process protects its guest by a new shadow
        }
        self.readings.push_back((now, reading));
        let old = |at: &(Instant, Reading)| now.saturating_duration_since(at.0) >= RECENT;
        while self.readings.get(1).is_some_and(old) {
            self.readings.pop_front();
        }
    }

    /// What is left of the copy under way, seconds, at its speed so far.
    fn sync_left(&self) -> Option<u64> {
        let (Phase::Syncing { done, total }, Some(since)) = (&self.phase, self.syncing) else {
            return None;
        };
        let left = total.saturating_sub(*done) as f64 / (*done).max(1) as f64;
        (*done > 0).then(|| (since.elapsed().as_secs_f64() * left).ceil() as u64)
    }

    /// What happened lately, and in what time. Of an engine younger than a tick: since it was made.
    fn recent(&self, reading: &Reading) -> (Snapshot, Option<Duration>) {
        let base = self.readings.front();
        let base = base.filter(|(_, before)| reading.bytes() >= before.bytes());
        let past = reading.since(base.map(|(_, before)| before));
        (past, base.map(|(at, _)| at.elapsed()))
    }
}

/// The board: written by the conductor, read by control connections.
pub struct Board {
    spec: Spec,
    incarnation: Incarnation,
    bell: EngineBell,
    facts: Mutex<Facts>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Board({:?})", self.facts.lock().phase)
    }
}

impl Board {
    /// A process that has just begun.
    pub fn new(spec: Spec, incarnation: Incarnation, role: Role, bell: EngineBell) -> Arc<Board> {
        let facts = Facts {
            role,
            mode: spec.vm.mode,
            syncing: None,
            phase: Phase::Starting,
            warning: None,
            disk_fails: None,
            disk_holds: false,
            arbiter: String::new(),
            generation: Generation(0),
            listen: Vec::new(),
            shadow: None,
            paths: Box::new(Vec::new),
            sample: (Instant::now(), 0),
            rate: 0.0,
            readings: VecDeque::new(),
        };
        Arc::new(Board {
            spec,
            incarnation,
            bell,
            facts: Mutex::new(facts),
        })
    }

    /// Where a primary can reach this process.
    pub fn listens(&self, at: Vec<SocketAddr>) {
        self.facts.lock().listen = at;
    }

    /// What protection it aims at from now on.
    pub fn aims_at(&self, mode: Mode) {
        self.facts.lock().mode = mode;
    }

    /// What an operator must hear of.
    pub fn warn(&self, of: String) {
        self.facts.lock().warning = Some(of);
    }

    /// Which disk of the guest fails here, and how; none when they work. Whether a request waits for it.
    pub fn disk_fails(&self, how: Option<String>, holds: bool) {
        let mut facts = self.facts.lock();
        (facts.disk_fails, facts.disk_holds) = (how, holds);
    }

    /// Who decides, in words.
    pub fn decides(&self, arbiter: String) {
        self.facts.lock().arbiter = arbiter;
    }

    /// The engine that follows a primary, if one does.
    pub fn follows(&self, engine: Option<ShadowHandle>) {
        self.facts.lock().shadow = engine;
    }

    /// Where it is read how the paths to the other side serve the epoch stream.
    pub fn goes_by(&self, paths: Services) {
        self.facts.lock().paths = paths;
    }

    /// A new phase; true if it differs from the one before in more than progress.
    pub fn now(&self, role: Role, phase: Phase, generation: Generation) -> bool {
        let mut facts = self.facts.lock();
        let same_kind = std::mem::discriminant(&facts.phase) == std::mem::discriminant(&phase);
        let changed = !same_kind || facts.role != role || facts.generation != generation;
        if !matches!(phase, Phase::Syncing { .. }) {
            facts.syncing = None;
        } else if facts.syncing.is_none() || changed {
            facts.syncing = Some(Instant::now());
        }
        (facts.role, facts.phase, facts.generation) = (role, phase, generation);
        changed
    }

    fn epoch(&self, facts: &Facts) -> u64 {
        let mut epoch = facts.shadow.as_ref().map_or(0, |s| s.progress().staged.0);
        self.bell.with(|engine| epoch = engine.progress().acked.0);
        epoch
    }

    /// Called about once a second: the rate of epochs, and what is recent.
    pub fn tick(&self) {
        let mut facts = self.facts.lock();
        let epoch = self.epoch(&facts);
        let (at, before) = facts.sample;
        let seconds = at.elapsed().as_secs_f64().max(0.001);
        facts.rate = epoch.saturating_sub(before) as f64 / seconds;
        facts.sample = (Instant::now(), epoch);
        match self.bell.engine() {
            Some(engine) => facts.note(Instant::now(), engine.reading()),
            None => facts.readings.clear(),
        }
    }

    /// The answer to a question about the epochs: there are some while a shadow follows this process.
    pub fn epochs(&self, request: &Request) -> Reply {
        if let Some(engine) = self.bell.engine() {
            return crate::epochs::answer(&engine, self.incarnation, request);
        }
        let (name, mode) = (&self.spec.vm.name, self.facts.lock().mode);
        let why = match mode {
            Mode::None => format!(
                "{name} has no epochs: it runs unprotected, as its mode says; `axvm set-mode {name} ft` protects it"
            ),
            _ => format!(
                "{name} has no epochs now: no shadow follows it; `axvm show {name}` tells why"
            ),
        };
        Reply::Refused { why }
    }

    /// How things are.
    pub fn status(&self) -> Status {
        let facts = self.facts.lock();
        let mut status = Status {
            name: self.spec.vm.name.clone(),
            pid: std::process::id(),
            wire: ax_wire::Versions::ours().newest().number(),
            incarnation: self.incarnation,
            role: facts.role,
            phase: facts.phase.clone(),
            warning: facts.warning.clone(),
            disk_fails: facts.disk_fails.clone(),
            disk_holds: facts.disk_holds,
            arbiter: facts.arbiter.clone(),
            sync_left_s: facts.sync_left(),
            mode: facts.mode,
            generation: facts.generation,
            listen: facts.listen.clone(),
            epoch: self.epoch(&facts),
            epochs_per_second: facts.rate,
            pause_us: [0; 2],
            pause_parts_us: Default::default(),
            disk_sync: Default::default(),
            commit_us: [0; 2],
            ship_us: [0; 2],
            pages: [0; 2],
            link_bytes_per_second: 0,
            oldest_held_us: 0,
            paths: (facts.paths)().iter().map(report).collect(),
        };
        if let Some(engine) = self.bell.engine() {
            let (past, span) = facts.recent(&engine.reading());
            let micros = |s: Summary| [s.p50 / 1000, s.p99 / 1000];
            status.pause_us = micros(past.pause_ns);
            let parts = &past.parts_ns;
            status.pause_parts_us = PauseParts {
                park: parts.park.p50 / 1000,
                save: parts.save.p50 / 1000,
                harvest: parts.harvest.p50 / 1000,
                copy: parts.copy.p50 / 1000,
                close: parts.close.p50 / 1000,
                resume: parts.resume.p50 / 1000,
            };
            let (compared, moved) = engine.disk_sync();
            status.disk_sync = DiskSync { compared, moved };
            status.commit_us = micros(past.commit_ns);
            status.ship_us = micros(past.ship_ns);
            status.pages = [past.pages.p50, past.pages.p99];
            let seconds = span.map_or(0.0, |span| span.as_secs_f64());
            if seconds > 0.0 {
                status.link_bytes_per_second = (past.bytes as f64 / seconds) as u64;
            }
            status.oldest_held_us = engine.progress().oldest_held_ns / 1000;
        }
        status
    }
}
