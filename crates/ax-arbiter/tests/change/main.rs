//! Model check of a change of arbiter (rule 27): two sides with the pair's real state machine, two arbiters
//! with the real rules, and the real steps of a change, through crashes, silence, and messages that are
//! lost or late.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod take;
mod world;

use ax_arbiter::change::Aim;
use stateright::{Checker, Model, Property};
use world::{Budget, SIDES, Step, World};

struct Histories(Budget, Aim);

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
        SIDES
            .iter()
            .all(|s| world.hosts[*s as usize].record.generation.0 <= 9)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("I3: at most one side may show output", |_, w: &World| {
                !SIDES.iter().all(|side| w.may_show(*side))
            }),
            Property::always("I4: no guest starts from a stale disk", |_, w: &World| {
                !w.stale_start
            }),
            Property::always("with both hosts up it runs in the end", |_, w: &World| {
                w.runs_in_the_end(false)
            }),
            Property::always(
                "with both hosts up it runs in the end without the old arbiter",
                |_, w: &World| w.runs_in_the_end(true),
            ),
            Property::sometimes("changed, and both know", |_, w: &World| {
                w.hosts.iter().all(|host| host.now == world::NEW) && w.processes_live()
            }),
            Property::sometimes("the shadow took over by the new one", |_, w: &World| {
                w.may_show(ax_wire::Side::B) && w.hosts[1].now == world::NEW
            }),
            Property::sometimes("one side is done with the old one alone", |_, w: &World| {
                w.hosts[0].void != w.hosts[1].void
            }),
        ]
    }
}

fn check(name: &str, budget: Budget, aim: Aim) {
    let checker = Histories(budget, aim)
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
fn a_change_of_arbiter_through_crashes() {
    let budget = Budget {
        crashes: 2,
        restarts: 1,
        silences: 1,
        ..Budget::default()
    };
    check("crashes", budget, Aim::Always);
}

#[test]
fn a_change_of_arbiter_through_lost_and_late_messages() {
    let budget = Budget {
        crashes: 1,
        silences: 1,
        suspicions: 1,
        losses: 1,
        delays: 1,
        ..Budget::default()
    };
    check("messages", budget, Aim::Always);
}

#[test]
fn a_change_to_the_arbiter_that_stands_by() {
    let budget = Budget {
        crashes: 1,
        silences: 2,
        suspicions: 1,
        delays: 1,
        ..Budget::default()
    };
    check("standby", budget, Aim::WhenLost);
}
