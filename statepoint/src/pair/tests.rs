//! Scenes of a pair's life, played through the state machine with a record kept by hand.

use ax_wire::record::{Arbiter, Change, Copies, Flush, Member, Record, Refusal, State, Why};
use ax_wire::{EpochId, Generation, Incarnation, Side};

use super::*;

const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(0xa),
};
const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(0xb),
};

fn record(generation: u64, state: State) -> Record {
    Record {
        generation: Generation(generation),
        arbiter: Arbiter::Operator,
        by: None,
        state,
        machines: Default::default(),
    }
}

fn alone(generation: u64, holder: Member) -> Record {
    record(generation, State::Alone { holder })
}

fn ft(generation: u64, holder: Member, shadow: Member) -> Record {
    let shadow = shadow.incarnation;
    record(
        generation,
        State::Ft {
            holder,
            shadow,
            flush: Flush::Local,
        },
    )
}

fn refused(record: Record) -> Event {
    Event::Refused(Refusal {
        record: Some(record),
        why: Why::Stale,
    })
}

fn play(pair: Pair, events: impl IntoIterator<Item = Event>) -> (Pair, Vec<Action>) {
    events
        .into_iter()
        .fold((pair, vec![]), |(pair, _), event| pair.step(event))
}

fn primary_in_ft() -> Pair {
    let (pair, actions) = Pair::starting(A, Flush::Local, Generation(0));
    assert_eq!(actions, [Action::Ask(Generation(0), Change::Start)]);
    let (pair, actions) = play(
        pair,
        [
            Event::Granted(alone(1, A)),
            Event::CopyBegun(B.incarnation),
            Event::CopyDone,
            Event::Confirmed(Generation(1)),
            Event::Granted(ft(2, A, B)),
        ],
    );
    assert_eq!(actions, [Action::ReleaseAcked(ft(2, A, B))]);
    pair
}

fn shadow_in_sync() -> Pair {
    play(
        Pair::shadow(B, Flush::Local),
        [Event::Confirmed(Generation(2))],
    )
    .0
}

#[test]
fn outputs_are_held_from_before_the_question_until_the_grant_into_ft() {
    let (pair, _) = Pair::starting(A, Flush::Local, Generation(0));
    let (pair, actions) = play(pair, [Event::Granted(alone(1, A))]);
    assert_eq!(
        actions,
        [Action::Boot(alone(1, A)), Action::ReleaseAlone(alone(1, A))]
    );
    let (pair, actions) = play(pair, [Event::CopyBegun(B.incarnation), Event::CopyDone]);
    assert_eq!(actions, [Action::HoldOutputs]);
    assert_eq!(pair.may_release(), None);
    let (pair, actions) = pair.step(Event::Confirmed(Generation(1)));
    assert!(matches!(
        actions[..],
        [Action::Ask(Generation(1), Change::EnterFt { .. })]
    ));
    assert_eq!(pair.may_release(), None);
}

#[test]
fn a_shadow_lost_before_ft_was_asked_for_costs_nothing() {
    let (pair, _) = Pair::starting(A, Flush::Local, Generation(0));
    let (pair, actions) = play(
        pair,
        [
            Event::Granted(alone(1, A)),
            Event::CopyBegun(B.incarnation),
            Event::CopyDone,
            Event::PeerLost,
        ],
    );
    assert_eq!(
        actions,
        [Action::DropShadow, Action::ReleaseAlone(alone(1, A))]
    );
    assert_eq!(pair.may_release(), Some(alone(1, A)));
}

/// The engine holds outputs at the copy's end, and the loss may be heard of before that end is.
#[test]
fn a_shadow_lost_or_dropped_while_it_is_filled_leaves_no_output_held() {
    for event in [Event::PeerLost, Event::Leave, Event::Stop] {
        let (pair, _) = Pair::starting(A, Flush::Local, Generation(0));
        let (_, actions) = play(
            pair,
            [
                Event::Granted(alone(1, A)),
                Event::CopyBegun(B.incarnation),
                event,
            ],
        );
        assert_eq!(
            actions.get(..2),
            Some(&[Action::DropShadow, Action::ReleaseAlone(alone(1, A))][..])
        );
    }
}

#[test]
fn a_shadow_lost_while_ft_is_being_asked_for_is_dropped_at_the_arbiter_first() {
    let (pair, _) = Pair::starting(A, Flush::Local, Generation(0));
    let (pair, _) = play(
        pair,
        [
            Event::Granted(alone(1, A)),
            Event::CopyBegun(B.incarnation),
            Event::CopyDone,
            Event::Confirmed(Generation(1)),
            Event::PeerLost,
        ],
    );
    assert_eq!(pair.may_release(), None);
    let (pair, actions) = pair.step(Event::Granted(ft(2, A, B)));
    assert_eq!(
        actions,
        [
            Action::FreezeOutputs,
            Action::Ask(Generation(2), Change::TakeSolo)
        ]
    );
    assert_eq!(pair.may_release(), None);
    let (pair, _) = pair.step(Event::Granted(alone(3, A)));
    assert_eq!(pair.may_release(), Some(alone(3, A)));
}

#[test]
fn a_primary_that_lost_its_shadow_is_silent_until_granted_and_fenced_if_refused() {
    let (pair, actions) = primary_in_ft().step(Event::PeerLost);
    assert_eq!(
        actions,
        [
            Action::FreezeOutputs,
            Action::Ask(Generation(2), Change::TakeSolo)
        ]
    );
    assert_eq!(pair.may_release(), None);
    let (granted, _) = pair.clone().step(Event::Granted(alone(3, A)));
    assert_eq!(granted.may_release(), Some(alone(3, A)));
    let (lost, actions) = pair.step(refused(alone(3, B)));
    assert_eq!(lost.phase, Phase::Ended);
    assert_eq!(actions[1], Action::EndFenced(Ending::Superseded));
}

#[test]
fn a_shadow_stops_acknowledging_then_waits_then_asks_then_promotes() {
    let (pair, actions) = shadow_in_sync().step(Event::PeerLost);
    assert_eq!(actions, [Action::FreezeAcks, Action::AwaitPermissionOver]);
    let (pair, actions) = pair.step(Event::PermissionOver);
    assert_eq!(actions, [Action::Ask(Generation(2), Change::TakeSolo)]);
    let (pair, actions) = pair.step(Event::Granted(alone(3, B)));
    assert_eq!(actions, [Action::Promote(alone(3, B))]);
    assert_eq!(pair.may_release(), None);
    let (pair, actions) = pair.step(Event::Running);
    assert_eq!(actions, [Action::ReleaseAlone(alone(3, B))]);
    assert_eq!(pair.may_release(), Some(alone(3, B)));
}

#[test]
fn a_shadow_asks_again_when_ft_was_granted_and_its_primary_died_before_telling() {
    let pair = play(
        Pair::shadow(B, Flush::Local),
        [Event::Confirmed(Generation(1))],
    )
    .0;
    let (pair, _) = play(pair, [Event::PeerLost, Event::PermissionOver]);
    let (pair, actions) = pair.step(refused(ft(2, A, B)));
    assert_eq!(actions, [Action::Ask(Generation(2), Change::TakeSolo)]);
    let stale = Member {
        incarnation: Incarnation(0xbad),
        ..B
    };
    let (pair, _) = pair.step(refused(ft(9, A, stale)));
    assert_eq!(
        pair.phase,
        Phase::Ended,
        "a record that names another run of this side"
    );
}

#[test]
fn a_shadow_takes_over_when_its_primary_died_between_the_grant_of_a_hand_over_and_telling_it() {
    let (pair, _) = play(shadow_in_sync(), [Event::PeerLost, Event::PermissionOver]);
    let (pair, actions) = pair.step(refused(ft(3, B, A)));
    assert_eq!(actions, [Action::Ask(Generation(3), Change::TakeSolo)]);
    let (_, actions) = pair.step(Event::Granted(alone(4, B)));
    assert_eq!(actions, [Action::Promote(alone(4, B))]);
}

#[test]
fn a_shadow_that_is_not_in_sync_never_asks() {
    let (pair, actions) = Pair::shadow(B, Flush::Local).step(Event::PeerLost);
    assert_eq!(pair.phase, Phase::Ended);
    assert_eq!(
        actions,
        [Action::FreezeAcks, Action::EndFenced(Ending::Stale)]
    );
}

#[test]
fn a_shadow_that_cannot_restore_what_it_acknowledged_never_asks() {
    let (pair, actions) = play(shadow_in_sync(), [Event::PeerLost, Event::PromotionFailed]);
    assert_eq!(pair.phase, Phase::Ended);
    assert_eq!(
        actions,
        [Action::FreezeAcks, Action::EndFenced(Ending::Stale)]
    );
}

#[test]
fn a_shadow_lost_while_a_hand_over_is_being_asked_for_is_not_told_and_the_guest_taken_back() {
    let (pair, _) = play(primary_in_ft(), [Event::Failover, parked(40, true)]);
    let (pair, actions) = play(pair, [Event::PeerLost, Event::Granted(ft(3, B, A))]);
    assert_eq!(actions, [Action::Ask(Generation(3), Change::TakeSolo)]);
    let (pair, actions) = pair.step(Event::Granted(alone(4, A)));
    assert!(actions.contains(&Action::Unpark));
    assert_eq!(pair.may_release(), Some(alone(4, A)));
}

#[test]
fn a_planned_failover_parks_drains_asks_tells_and_swaps_the_roles() {
    let (pair, actions) = primary_in_ft().step(Event::Failover);
    assert_eq!(actions, [Action::ParkForGood]);
    let (pair, actions) = pair.step(parked(40, true));
    assert_eq!(
        actions,
        [
            Action::FreezeOutputs,
            Action::Ask(Generation(2), Change::Handover)
        ]
    );
    let (pair, actions) = pair.step(Event::Granted(ft(3, B, A)));
    assert_eq!(actions, [Action::TellShadow(ft(3, B, A))]);
    let (shadow, actions) = shadow_in_sync().step(Event::HandedOver(ft(3, B, A)));
    assert_eq!(actions, [Action::FreezeAcks, Action::Promote(ft(3, B, A))]);
    let (shadow, actions) = shadow.step(Event::Running);
    assert_eq!(actions, [Action::ReleaseAcked(ft(3, B, A))]);
    assert_eq!(shadow.may_release(), Some(ft(3, B, A)));
    let (swapped, actions) = pair.clone().step(Event::Running);
    assert_eq!(
        swapped.phase,
        Phase::InSync {
            known: Generation(3)
        }
    );
    assert_eq!(actions, [Action::BecomeShadow(ft(3, B, A))]);
    let (taken, _) = play(swapped, [Event::PeerLost, Event::PermissionOver]);
    let (taken, _) = play(taken, [Event::Granted(alone(4, A)), Event::Running]);
    assert_eq!(taken.may_release(), Some(alone(4, A)));
    let (back, actions) = pair.step(Event::PeerLost);
    assert_eq!(actions, [Action::Ask(Generation(3), Change::TakeSolo)]);
    let (back, _) = back.step(Event::Granted(alone(4, A)));
    assert_eq!(back.may_release(), Some(alone(4, A)));
}

fn parked(epoch: u64, durable: bool) -> Event {
    Event::FinalDone {
        epoch: EpochId(epoch),
        durable,
    }
}

/// The disks that could not be made durable are not called current (rule 26).
#[test]
fn a_stop_names_the_shadows_disks_alone_when_those_here_are_not_durable() {
    let stop = |side| Change::Stop {
        epoch: EpochId(7),
        current: Copies::Only(side),
    };
    let (_, actions) = play(primary_in_ft(), [Event::Stop, parked(7, false)]);
    assert!(actions.contains(&Action::Ask(Generation(2), stop(B.side))));
}

#[test]
fn an_orderly_stop_is_a_record_first() {
    let (pair, _) = play(primary_in_ft(), [Event::Stop]);
    let (pair, actions) = pair.step(parked(7, true));
    let stop = Change::Stop {
        epoch: EpochId(7),
        current: Copies::Both,
    };
    assert_eq!(
        actions,
        [Action::FreezeOutputs, Action::Ask(Generation(2), stop)]
    );
    let stopped = record(
        3,
        State::Stopped {
            epoch: EpochId(7),
            current: Copies::Both,
        },
    );
    let (pair, actions) = pair.step(Event::Granted(stopped));
    assert_eq!(pair.phase, Phase::Ended);
    assert_eq!(
        actions,
        [Action::TellShadow(stopped), Action::EndClean(stopped)]
    );
}

#[test]
fn losing_the_peer_while_parking_leaves_the_guest_running_alone() {
    for goal in [Event::Stop, Event::Failover] {
        let (pair, _) = play(primary_in_ft(), [goal, Event::PeerLost]);
        let (pair, actions) = pair.step(Event::Granted(alone(3, A)));
        assert!(actions.contains(&Action::Unpark));
        assert_eq!(pair.may_release(), Some(alone(3, A)));
    }
}

/// Rule 19: a primary whose disks fail parks, has the shadow confirm the last epoch, and is gone. It asks
/// for nothing, as it could record nothing; with the shadow lost on the way it goes on.
#[test]
fn a_primary_whose_disks_fail_leaves_the_guest_to_its_shadow() {
    let (parking, actions) = play(primary_in_ft(), [Event::Resign]);
    assert_eq!(actions, [Action::ParkForGood]);
    let last = Event::FinalDone {
        epoch: EpochId(9),
        durable: false,
    };
    let (gone, actions) = play(parking.clone(), [last]);
    assert_eq!(gone.phase, Phase::Ended);
    let fenced = Action::EndFenced(Ending::Resigned);
    assert_eq!(actions, [Action::FreezeOutputs, fenced]);
    assert_eq!(gone.may_release(), None);

    let (alone, _) = play(parking, [Event::PeerLost]);
    assert!(matches!(alone.phase, Phase::AskingAlone { .. }));

    // Alone there is nobody to leave it to.
    let (starting, _) = Pair::starting(A, Flush::Local, Generation(0));
    let (alone, _) = play(starting, [Event::Granted(alone_record())]);
    let (still, actions) = play(alone.clone(), [Event::Resign]);
    assert_eq!((still, actions), (alone, vec![]));
}

fn alone_record() -> Record {
    alone(1, A)
}
