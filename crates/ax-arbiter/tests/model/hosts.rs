//! Two hosts that have no arbiter but each other and an operator.

use ax_wire::record::{Flush, State};
use stateright::{Checker, Model, Property};

use crate::pair::{Budget, SIDES, Step, World};
use crate::{GENERATIONS, NOTHING};

struct Histories(Budget, Flush);

impl Model for Histories {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::of_hosts(self.0, self.1)]
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
        SIDES
            .iter()
            .all(|side| world.record_on(*side).generation <= GENERATIONS)
    }

    fn properties(&self) -> Vec<Property<Self>> {
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
            Property::always("hosts that see each other go on", |_, w: &World| {
                w.goes_on_together()
            }),
            // The model must reach what it is about.
            Property::sometimes("fault tolerant", |_, w: &World| {
                SIDES
                    .iter()
                    .any(|side| matches!(w.record_on(*side).state, State::Ft { .. }))
            }),
            Property::sometimes("hosts differ and one of them runs", |_, w: &World| {
                let [a, b] = SIDES.map(|side| w.record_on(side));
                !a.agrees_with(&b)
                    && a.generation.0 > 2
                    && SIDES.iter().any(|side| w.runs_alone(*side))
            }),
        ]
    }
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

#[test]
fn two_hosts_and_an_operator_through_crashes_and_cuts() {
    let budget = Budget {
        crashes: 2,
        cuts: 2,
        restarts: 1,
        ..NOTHING
    };
    check("hosts", budget, Flush::Local);
}

#[test]
fn two_hosts_with_disks_durable_on_both_sides() {
    let budget = Budget {
        crashes: 2,
        suspicions: 1,
        cuts: 1,
        restarts: 1,
        ..NOTHING
    };
    check("hosts with both disks", budget, Flush::Both);
}

#[test]
fn two_hosts_and_an_operator_through_planned_failovers_and_stops() {
    let budget = Budget {
        crashes: 1,
        cuts: 1,
        restarts: 1,
        failovers: 1,
        stops: 1,
        failures: 1,
        ..NOTHING
    };
    check("hosts that turn and stop", budget, Flush::Local);
}
