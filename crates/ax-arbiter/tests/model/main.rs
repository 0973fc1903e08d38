//! Model check of a pair and its arbiter: every history within a budget of crashes, lost
//! connections, restarts and operator's commands, with the very rules and state machine that run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod hosts;
mod pair;

use ax_wire::Generation;
use ax_wire::record::{Flush, State};
use pair::{Budget, SIDES, Step, World};
use stateright::{Checker, Model, Property};

/// Longest chain of changes followed.
const GENERATIONS: Generation = Generation(7);

struct Histories(Budget, Flush);

impl Model for Histories {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.0, self.1)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step);
        Some(next)
    }

    fn within_boundary(&self, world: &World) -> bool {
        world.record.generation <= GENERATIONS
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let protected = |_: &Self, w: &World| matches!(w.record.state, State::Ft { .. });
        vec![
            Property::always("I3: at most one side may show output", |_, w: &World| {
                !SIDES.iter().all(|side| w.may_show(*side))
            }),
            Property::always("I4: who may show has all that was shown", |_, w: &World| {
                SIDES
                    .iter()
                    .all(|side| !w.may_show(*side) || w.is_current(*side))
            }),
            Property::always("I4: no guest starts from a stale disk", |_, w: &World| {
                !w.stale_start
            }),
            Property::always("a healthy current side ends running", |_, w: &World| {
                SIDES
                    .iter()
                    .all(|side| !w.is_entitled(*side) || w.settle(*side).runs_alone(*side))
            }),
            Property::always(
                "I3, I4: a replaced machine is granted nothing",
                |_, w: &World| !w.replaced_is_granted_something(),
            ),
            // The model must reach what it is about.
            Property::sometimes("a new machine runs the guest", |h: &Self, w: &World| {
                let new = |side: ax_wire::Side| w.machines[side as usize] > 0;
                h.0.replacements == 0 || SIDES.iter().any(|s| new(*s) && w.runs_alone(*s))
            }),
            Property::sometimes("fault tolerant", protected),
            Property::sometimes("the shadow took over", |_, w: &World| {
                w.record.generation.0 >= 3
                    && SIDES.iter().any(|s| w.runs_alone(*s) && *s != first(w))
            }),
        ]
    }
}

/// The side whose process was started first.
fn first(world: &World) -> ax_wire::Side {
    let of = |n: u64| {
        world
            .processes
            .iter()
            .flatten()
            .find(|p| p.pair.me.incarnation.0 == n)
            .map(|p| p.pair.me.side)
    };
    of(1).unwrap_or_else(|| of(2).map_or(ax_wire::Side::A, |side| side.other()))
}

fn check(name: &str, budget: Budget, flush: Flush) {
    let checker = Histories(budget, flush)
        .checker()
        .threads(2)
        .spawn_bfs()
        .join();
    println!(
        "{name}: {} histories' states, depth {}",
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

const NOTHING: Budget = Budget {
    crashes: 0,
    suspicions: 0,
    restarts: 0,
    failovers: 0,
    stops: 0,
    failures: 0,
    leaves: 0,
    cuts: 0,
    replacements: 0,
};

#[test]
fn crashes_and_suspicions() {
    let budget = Budget {
        crashes: 3,
        suspicions: 2,
        restarts: 2,
        ..NOTHING
    };
    check("crashes", budget, Flush::Local);
}

#[test]
fn crashes_with_disks_durable_on_both_sides() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 2,
        ..NOTHING
    };
    check("both disks", budget, Flush::Both);
}

#[test]
fn planned_failovers() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 1,
        failovers: 2,
        failures: 1,
        ..NOTHING
    };
    check("failovers", budget, Flush::Local);
}

#[test]
fn failing_disks() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 1,
        failures: 2,
        ..NOTHING
    };
    check("failing disks", budget, Flush::Local);
}

#[test]
fn leaving_ft() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 1,
        leaves: 1,
        ..NOTHING
    };
    check("leaving", budget, Flush::Local);
}

#[test]
fn replaced_hosts() {
    let budget = Budget {
        crashes: 2,
        restarts: 2,
        stops: 1,
        replacements: 1,
        ..NOTHING
    };
    check("replaced", budget, Flush::Local);
}

#[test]
fn replaced_hosts_with_disks_durable_on_both_sides() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 2,
        replacements: 1,
        ..NOTHING
    };
    check("replaced, both disks", budget, Flush::Both);
}

#[test]
fn orderly_stops() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        restarts: 1,
        stops: 1,
        failures: 1,
        ..NOTHING
    };
    check("stops", budget, Flush::Local);
}
