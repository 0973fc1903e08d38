//! The shadow's half of the pair's state machine.

use ax_wire::record::{Change, Member, Record};

use super::{Action, Ending, Event, Phase, is_alone};

fn ended(ending: Ending) -> (Phase, Vec<Action>) {
    (
        Phase::Ended,
        vec![Action::FreezeAcks, Action::EndFenced(ending)],
    )
}

/// True when the record names exactly this process as in-sync shadow (rule 23).
fn names_me(record: &Record, me: Member) -> bool {
    record.shadow() == Some(me)
}

pub(super) fn step(me: Member, phase: Phase, event: Event) -> (Phase, Vec<Action>) {
    match (phase, event) {
        (Phase::Copying | Phase::InSync { .. }, Event::Confirmed(known)) => {
            (Phase::InSync { known }, vec![])
        }
        // Not in sync: this copy is stale, whatever it holds (I4).
        (Phase::Copying, Event::PeerLost) => ended(Ending::Stale),

        // Rule 21: acknowledging stops before anyone is asked; rule 24: W passes first.
        (Phase::InSync { known }, Event::PeerLost) => (
            Phase::Waiting { known },
            vec![Action::FreezeAcks, Action::AwaitPermissionOver],
        ),
        (Phase::Waiting { known }, Event::PermissionOver) => (
            Phase::AskingTakeover { known },
            vec![Action::Ask(known, Change::TakeSolo)],
        ),
        (Phase::AskingTakeover { .. }, Event::Granted(record)) if is_alone(&record, me) => {
            (Phase::Promoting { record }, vec![Action::Promote(record)])
        }
        // What was acknowledged could not be made durable and restored here: asking would fence a
        // holder that is well, for a copy that can't run (I4).
        (Phase::Waiting { .. }, Event::PromotionFailed) => ended(Ending::Stale),
        // The primary had been granted FT, or a hand-over to this side, and died before it could tell:
        // ask from there.
        (Phase::AskingTakeover { known }, Event::Refused(refusal)) => match refusal.record {
            Some(record)
                if (names_me(&record, me) || record.holder() == Some(me))
                    && record.generation > known =>
            {
                (
                    Phase::AskingTakeover {
                        known: record.generation,
                    },
                    vec![Action::Ask(record.generation, Change::TakeSolo)],
                )
            }
            _ => ended(Ending::Superseded),
        },
        (Phase::AskingTakeover { .. }, Event::Granted(_)) => ended(Ending::Superseded),

        (Phase::InSync { .. }, Event::HandedOver(record)) if record.holder() == Some(me) => (
            Phase::Promoting { record },
            vec![Action::FreezeAcks, Action::Promote(record)],
        ),
        (Phase::Copying | Phase::InSync { .. }, Event::Dismissed(record))
            if record.shadow().is_none() && record.holder().is_some_and(|m| m.side != me.side) =>
        {
            ended(Ending::Dismissed)
        }
        (Phase::Copying | Phase::InSync { .. }, Event::PeerStopped(record)) => (
            Phase::Ended,
            vec![Action::FreezeAcks, Action::EndClean(record)],
        ),

        (Phase::Promoting { record }, Event::Running) if is_alone(&record, me) => (
            Phase::Alone {
                record,
                filling: None,
            },
            vec![Action::ReleaseAlone(record)],
        ),
        (Phase::Promoting { record }, Event::Running) => {
            (Phase::Ft { record }, vec![Action::ReleaseAcked(record)])
        }
        (Phase::Promoting { .. }, Event::PromotionFailed) => ended(Ending::Stale),

        (phase, _) => (phase, vec![]),
    }
}
