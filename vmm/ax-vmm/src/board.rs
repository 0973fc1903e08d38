//! What this process says of itself, whatever else it is doing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ax_api::process::{Phase, Role, Spec, Status};
use ax_wire::{Generation, Incarnation};
use parking_lot::Mutex;
use statepoint::primary::PrimaryHandle;
use statepoint::shadow::ShadowHandle;

use crate::parts::EngineBell;

struct Facts {
    role: Role,
    phase: Phase,
    generation: Generation,
    listen: Vec<SocketAddr>,
    shadow: Option<ShadowHandle>,
    sample: (Instant, u64),
    rate: f64,
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
            phase: Phase::Starting,
            generation: Generation(0),
            listen: Vec::new(),
            shadow: None,
            sample: (Instant::now(), 0),
            rate: 0.0,
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

    /// The engine that follows a primary, if one does.
    pub fn follows(&self, engine: Option<ShadowHandle>) {
        self.facts.lock().shadow = engine;
    }

    /// A new phase; true if it differs from the one before in more than progress.
    pub fn now(&self, role: Role, phase: Phase, generation: Generation) -> bool {
        let mut facts = self.facts.lock();
        let same_kind = std::mem::discriminant(&facts.phase) == std::mem::discriminant(&phase);
        let changed = !same_kind || facts.role != role || facts.generation != generation;
        (facts.role, facts.phase, facts.generation) = (role, phase, generation);
        changed
    }

    fn epoch(&self, facts: &Facts) -> u64 {
        let mut epoch = facts.shadow.as_ref().map_or(0, |s| s.progress().staged.0);
        self.bell.with(|engine| epoch = engine.progress().acked.0);
        epoch
    }

    /// Called about once a second: the rate of epochs.
    pub fn tick(&self) {
        let mut facts = self.facts.lock();
        let epoch = self.epoch(&facts);
        let (at, before) = facts.sample;
        let seconds = at.elapsed().as_secs_f64().max(0.001);
        facts.rate = epoch.saturating_sub(before) as f64 / seconds;
        facts.sample = (Instant::now(), epoch);
    }

    /// How things are.
    pub fn status(&self) -> Status {
        let facts = self.facts.lock();
        let mut status = Status {
            name: self.spec.vm.name.clone(),
            pid: std::process::id(),
            incarnation: self.incarnation,
            role: facts.role,
            phase: facts.phase.clone(),
            mode: self.spec.vm.mode,
            generation: facts.generation,
            listen: facts.listen.clone(),
            epoch: self.epoch(&facts),
            epochs_per_second: facts.rate,
            pause_us: [0; 2],
            commit_us: [0; 2],
            pages: [0; 2],
            oldest_held_us: 0,
        };
        drop(facts);
        self.bell.with(|engine: &PrimaryHandle| {
            let stats = engine.stats();
            let micros = |s: statepoint::stats::Summary| [s.p50 / 1000, s.p99 / 1000];
            status.pause_us = micros(stats.pause_ns);
            status.commit_us = micros(stats.commit_ns);
            status.pages = [stats.pages.p50, stats.pages.p99];
            status.oldest_held_us = engine.progress().oldest_held_ns / 1000;
        });
        status
    }
}
