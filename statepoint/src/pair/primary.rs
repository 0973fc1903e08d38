//! The primary's half of the pair's state machine.

use ax_wire::record::{Change, Flush, Member, Record, Refusal, State};

use super::{Action, Ending, Event, Goal, Phase, current_copies, is_alone, is_ft};

/// What a refusal means to a process that thought itself holder: the record it may act on, if the
/// arbiter still names it as holder.
fn still_holder(refusal: &Refusal, me: Member) -> Option<Record> {
    refusal.record.filter(|record| record.holder() == Some(me))
}

fn fenced(ending: Ending) -> (Phase, Vec<Action>) {
    (
        Phase::Ended,
        vec![Action::FreezeOutputs, Action::EndFenced(ending)],
    )
}

/// Goes on with whatever the arbiter's record says this holder is.
fn as_recorded(record: Record) -> (Phase, Vec<Action>) {
    match record.state {
        State::Alone { .. } => (
            Phase::Alone {
                record,
                filling: None,
            },
            vec![
                Action::DropShadow,
                Action::ReleaseAlone(record),
                Action::Unpark,
            ],
        ),
        // The shadow that the record names is not there any more: it must be dropped there first.
        State::Ft { .. } => (
            Phase::AskingAlone { record },
            vec![
                Action::FreezeOutputs,
                Action::Ask(record.generation, Change::TakeSolo),
            ],
        ),
        State::Stopped { .. } => fenced(Ending::Superseded),
    }
}

/// Freezes and asks to run alone: rule 21's point of no return.
fn ask_alone(record: Record) -> (Phase, Vec<Action>) {
    (
        Phase::AskingAlone { record },
        vec![
            Action::FreezeOutputs,
            Action::Ask(record.generation, Change::TakeSolo),
        ],
    )
}

pub(super) fn step(me: Member, flush: Flush, phase: Phase, event: Event) -> (Phase, Vec<Action>) {
    match (phase, event) {
        (Phase::Starting { .. }, Event::Granted(record)) if is_alone(&record, me) => {
            let actions = vec![Action::Boot(record), Action::ReleaseAlone(record)];
            (
                Phase::Alone {
                    record,
                    filling: None,
                },
                actions,
            )
        }
        (Phase::Starting { .. }, Event::Granted(_) | Event::Refused(_)) => {
            (Phase::Ended, vec![Action::EndFenced(Ending::MayNotStart)])
        }

        (Phase::Joining { .. }, Event::Granted(record)) if is_alone(&record, me) => {
            let actions = vec![Action::Joined(record), Action::ReleaseAlone(record)];
            (
                Phase::Alone {
                    record,
                    filling: None,
                },
                actions,
            )
        }
        // Nothing has been asked of the guest yet that it could not go on without.
        (Phase::Joining { .. }, Event::Refused(refusal)) => {
            (Phase::Ended, vec![Action::StayLocal(refusal)])
        }

        (Phase::Alone { record, .. }, Event::CopyBegun(shadow)) => (
            Phase::Alone {
                record,
                filling: Some(shadow),
            },
            vec![],
        ),
        (
            Phase::Alone {
                record,
                filling: Some(shadow),
            },
            Event::CopyDone,
        ) => (
            Phase::Entering { record, shadow },
            vec![Action::HoldOutputs],
        ),
        (
            Phase::Alone {
                record,
                filling: Some(_),
            },
            Event::PeerLost | Event::Leave,
        ) => (
            Phase::Alone {
                record,
                filling: None,
            },
            not_filled(record),
        ),
        (Phase::Alone { record, filling }, Event::Stop) => {
            let dropped = filling.map_or(vec![], |_| not_filled(record));
            let actions = dropped.into_iter().chain([Action::ParkForGood]).collect();
            (
                Phase::Parking {
                    record,
                    goal: Goal::Stop,
                },
                actions,
            )
        }

        (Phase::Entering { record, shadow }, Event::Confirmed(_)) => {
            let change = Change::EnterFt { shadow, flush };
            let phase = Phase::AskingFt {
                record,
                shadow,
                lost: false,
            };
            (phase, vec![Action::Ask(record.generation, change)])
        }
        // FT has not been asked for: the record still says alone.
        (Phase::Entering { record, .. }, Event::PeerLost | Event::Leave) => (
            Phase::Alone {
                record,
                filling: None,
            },
            vec![Action::DropShadow, Action::ReleaseAlone(record)],
        ),
        (Phase::Entering { record, .. }, Event::Stop) => (
            Phase::Parking {
                record,
                goal: Goal::Stop,
            },
            vec![
                Action::DropShadow,
                Action::ReleaseAlone(record),
                Action::ParkForGood,
            ],
        ),

        (Phase::AskingFt { record, shadow, .. }, Event::PeerLost | Event::Leave) => (
            Phase::AskingFt {
                record,
                shadow,
                lost: true,
            },
            vec![Action::FreezeOutputs],
        ),
        (Phase::AskingFt { shadow, lost, .. }, Event::Granted(record))
            if is_ft(&record, me, shadow) =>
        {
            if lost {
                ask_alone(record)
            } else {
                (Phase::Ft { record }, vec![Action::ReleaseAcked(record)])
            }
        }
        // Out of FT, lost or left: the grant first (rule 22). A shadow that is left stays until then.
        (Phase::Ft { record }, Event::PeerLost | Event::Leave) => ask_alone(record),
        (Phase::Ft { record }, Event::Failover) => (
            Phase::Parking {
                record,
                goal: Goal::Handover,
            },
            vec![Action::ParkForGood],
        ),
        (Phase::Ft { record }, Event::Resign) => (
            Phase::Parking {
                record,
                goal: Goal::Resign,
            },
            vec![Action::ParkForGood],
        ),
        (Phase::Ft { record }, Event::Stop) => (
            Phase::Parking {
                record,
                goal: Goal::Stop,
            },
            vec![Action::ParkForGood],
        ),

        (Phase::AskingAlone { .. }, Event::Granted(record)) if is_alone(&record, me) => {
            as_recorded(record)
        }

        (
            Phase::Parking {
                record,
                goal: Goal::Handover,
            },
            Event::FinalDone { .. },
        ) => (
            Phase::AskingHandover {
                record,
                lost: false,
            },
            vec![
                Action::FreezeOutputs,
                Action::Ask(record.generation, Change::Handover),
            ],
        ),
        (
            Phase::Parking {
                record,
                goal: Goal::Stop,
            },
            Event::FinalDone { epoch, durable },
        ) => {
            let change = Change::Stop {
                epoch,
                current: current_copies(&record, me, durable),
            };
            let actions = vec![
                Action::FreezeOutputs,
                Action::Ask(record.generation, change),
            ];
            (Phase::AskingStop { record, epoch }, actions)
        }
        // Nothing has to be durable here, nor to be asked for: the record names the shadow in sync, and
        // what it says of this side's disks stays true (they have every FLUSH that was answered).
        (
            Phase::Parking {
                goal: Goal::Resign, ..
            },
            Event::FinalDone { .. },
        ) => fenced(Ending::Resigned),
        // What was asked for was a pair's to do: alone the guest goes on, and the operator is told.
        (Phase::Parking { record, .. }, Event::PeerLost) if record.shadow().is_some() => {
            ask_alone(record)
        }

        // A loss is told once: who is told to run by a side that has lost it may never answer.
        (Phase::AskingHandover { record, .. }, Event::PeerLost) => {
            (Phase::AskingHandover { record, lost: true }, vec![])
        }
        (Phase::AskingHandover { lost: true, .. }, Event::Granted(record)) => (
            Phase::AskingAlone { record },
            vec![Action::Ask(record.generation, Change::TakeSolo)],
        ),
        (Phase::AskingHandover { lost: false, .. }, Event::Granted(record)) => (
            Phase::HandedOver { record },
            vec![Action::TellShadow(record)],
        ),
        // Its memory and disks are those of the final epoch, from which the other side goes on: the
        // record names it in sync, and it is (rule 23).
        (Phase::HandedOver { record }, Event::Running) => (
            Phase::InSync {
                known: record.generation,
            },
            vec![Action::BecomeShadow(record)],
        ),
        // Rule 25: if the other side can't start, this one takes the next generation; it is named in
        // sync in the record, and has touched nothing since the final epoch.
        (Phase::HandedOver { record }, Event::PeerLost | Event::PromotionFailed) => (
            Phase::AskingAlone { record },
            vec![Action::Ask(record.generation, Change::TakeSolo)],
        ),

        (Phase::AskingStop { .. }, Event::Granted(record))
            if matches!(record.state, State::Stopped { .. }) =>
        {
            (
                Phase::Ended,
                vec![Action::TellShadow(record), Action::EndClean(record)],
            )
        }

        // Alone it was and alone the record says: whoever starts it next starts it from here.
        (Phase::AskingStop { record, .. }, Event::Unanswered) if record.shadow().is_none() => {
            (Phase::Ended, vec![Action::EndClean(record)])
        }

        (
            Phase::AskingFt { .. }
            | Phase::AskingAlone { .. }
            | Phase::AskingHandover { .. }
            | Phase::AskingStop { .. },
            Event::Refused(refusal),
        ) => match still_holder(&refusal, me) {
            Some(record) => as_recorded(record),
            None => fenced(Ending::Superseded),
        },
        // A grant that does not say what was asked for is no grant.
        (
            Phase::AskingFt { .. } | Phase::AskingAlone { .. } | Phase::AskingStop { .. },
            Event::Granted(_),
        ) => fenced(Ending::Superseded),

        (phase, _) => (phase, vec![]),
    }
}

/// A shadow is lost on the way. At the copy's end the engine holds outputs before this state machine hears of it:
/// they pass again, once there is no engine any more.
fn not_filled(record: Record) -> Vec<Action> {
    vec![Action::DropShadow, Action::ReleaseAlone(record)]
}
