//! How a pair changes its arbiter: what one side does next. Pure (rule 27).
//!
//! There are two ways, and both end with exactly one arbiter that grants:
//!
//! - **By the old one.** Both sides are found at the new arbiter, each proposing it and knowing the same.
//!   The holder asks the old one for [`Change::MoveArbiter`]: a change of the record, after which the
//!   old one grants nothing. Whoever sees that record shows it to the new one, which takes it over.
//! - **Without it.** The old one has been silent for long. Both sides are found at the new one; each
//!   then writes down that the old one is void and never asks it again ([`Step::Void`]), and the new one
//!   knows the pair once both have done so. A crash or a cut in between leaves one side that asks the
//!   old one and one that waits for it at the new one; when they are found there together the change is
//!   completed, whatever the old one says by then.
//!
//! [`Change::MoveArbiter`]: ax_wire::record::Change::MoveArbiter

use ax_wire::record::{Arbiter, Record};

use crate::rules::{Registered, Standing};

/// When to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aim {
    /// The other one is configured: as soon as both sides are ready.
    Always,
    /// It stands by: only when the present one is lost.
    WhenLost,
}

/// What the old arbiter has said in this round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Old {
    /// Its record of the pair.
    Knows(Record),
    /// It does not know the pair, or did not answer, but has not been silent for long.
    Nothing,
    /// It has been silent for long.
    Lost,
}

/// What one side knows, and has heard in this round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The latest record it knows, durable.
    pub mine: Record,
    /// It has written down that the old arbiter is void, durable.
    pub void: bool,
    /// The new arbiter as it names itself.
    pub to: Arbiter,
    /// When to change.
    pub aim: Aim,
    /// This process holds the guest, with a shadow in sync.
    pub protected: bool,
    /// What the old one has said.
    pub old: Option<Old>,
    /// What the new one has said.
    pub new: Option<Registered>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Nothing in this round.
    Rest,
    /// Ask the old one for its record.
    Look,
    /// Tell the new one.
    Tell(Standing),
    /// Ask the old one to make the new one its successor.
    AskMove,
    /// Write down that the old one is void: it is asked nothing from then on, and an answer that is
    /// still on its way is dropped.
    Void,
    /// Write down this record, which is later.
    Adopt(Record),
    /// The new one decides from now on, by this record: write down both.
    Settle(Record),
}

/// What a side with this view does next.
pub fn next(view: &View) -> Step {
    let later = |record: &Record| record.generation > view.mine.generation;
    // The old one has said so, now or before a crash.
    if view.mine.arbiter == view.to {
        return match view.new {
            Some(Registered::Known(record)) => Step::Settle(record),
            Some(_) => Step::Rest,
            None if view.void => Step::Tell(Standing::Moves),
            None => Step::Tell(Standing::TakesOver),
        };
    }
    if !view.void {
        match view.old {
            None => return Step::Look,
            Some(Old::Knows(record)) if later(&record) => return Step::Adopt(record),
            Some(_) => {}
        }
    }
    match view.new {
        None if view.void => Step::Tell(Standing::Moves),
        None => Step::Tell(Standing::Proposes),
        Some(Registered::Known(record)) => Step::Settle(record),
        // What it does not know itself it has from the other side, which lives and says so now.
        Some(Registered::Disagrees { other }) if later(&other) => Step::Adopt(other),
        Some(Registered::Agreed { firm: true }) => Step::Void,
        Some(Registered::Agreed { firm: false }) => match (view.old, view.aim) {
            (Some(Old::Lost), _) => Step::Void,
            (Some(Old::Knows(_)), Aim::Always) if view.protected => Step::AskMove,
            _ => Step::Rest,
        },
        Some(_) => Step::Rest,
    }
}
