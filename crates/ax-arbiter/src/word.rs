//! Two hosts and no third party: how they agree, and what holds when they meet again.
//!
//! Pure. What a host knows is a [`Known`]: its record, and since when it has changed it without the
//! other host. Two rules keep at most one side running:
//!
//! - **Agreed.** The host that is asked records the change first, then the one that asked records it
//!   and acts. A crash or a cut in between leaves a record nobody has acted on.
//! - **Told.** By an operator's word a host changes its record alone and remembers the record both had.
//!   When the hosts meet, one that was not told adopts; two that were told is a [`Meeting::Conflict`].

use std::cmp::Ordering;

use ax_wire::Side;
use ax_wire::record::{Arbiter, Change, Decision, Member, Record, Refusal, Request, Why};
use ax_wire::word::{Answer, Known, Letter, Said, Unwilling};

use crate::rules::{self, Word};

/// What two hosts that meet make of what they know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// They know the same.
    Same,
    /// The other one adopts what this one knows.
    Mine,
    /// This one adopts what the other knows.
    Theirs,
    /// Both were told to go on alone.
    Conflict,
}

/// Compares what both hosts know.
pub fn meet(mine: Option<&Known>, theirs: Option<&Known>) -> Meeting {
    let (mine, theirs) = match (mine, theirs) {
        (None, None) => return Meeting::Same,
        (Some(_), None) => return Meeting::Mine,
        (None, Some(_)) => return Meeting::Theirs,
        (Some(mine), Some(theirs)) => (mine, theirs),
    };
    if mine.record.agrees_with(&theirs.record) {
        return Meeting::Same;
    }
    let began_at = |known: &Known, record: &Record| {
        known
            .alone_since
            .is_some_and(|since| since.agrees_with(record))
    };
    if began_at(mine, &theirs.record) {
        return Meeting::Mine;
    }
    if began_at(theirs, &mine.record) {
        return Meeting::Theirs;
    }
    if mine.alone_since.is_some() && theirs.alone_since.is_some() {
        return Meeting::Conflict;
    }
    match mine.record.generation.cmp(&theirs.record.generation) {
        // Also when the other one speaks of a change that this host has long heard of: a letter may be
        // late, and its writer gone.
        Ordering::Greater => Meeting::Mine,
        Ordering::Less => Meeting::Theirs,
        Ordering::Equal => of_one_generation(mine, theirs),
    }
}

/// Two records of one generation. One changed by a word stands: the other one was agreed to and nobody
/// has acted on it. Of two that were agreed to nobody has acted on either (who asks records last, and
/// acts after that): any will do as long as both hosts choose the same.
fn of_one_generation(mine: &Known, theirs: &Known) -> Meeting {
    let by = |known: &Known| known.record.by.map(|by| by.side);
    match (mine.alone_since, theirs.alone_since) {
        (Some(_), _) => Meeting::Mine,
        (_, Some(_)) => Meeting::Theirs,
        _ => match (by(mine), by(theirs)) {
            (Some(Side::A), Some(Side::B)) => Meeting::Mine,
            (Some(Side::B), Some(Side::A)) => Meeting::Theirs,
            _ => Meeting::Conflict,
        },
    }
}

/// What a host is, when it is asked to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stance {
    /// No process of the pair lives here, and none can start while this is decided.
    Empty,
    /// This process lives here.
    Process {
        /// It.
        me: Member,
        /// It was started to follow a primary and has seen none yet; or it waits to be allowed to boot
        /// the guest itself, and gives way to the other side's process that does ([`yields`]).
        fresh: bool,
        /// It has asked the other host for a change and waits for the answer.
        asking: bool,
    },
}

/// Why a host in this stance does not agree to a change that the rules allow, if it does not.
fn objection(stance: Stance, record: &Record, request: &Request) -> Option<Unwilling> {
    let (me, fresh, asking) = match stance {
        Stance::Empty => (None, true, false),
        Stance::Process { me, fresh, asking } => (Some(me), fresh, asking),
    };
    if asking {
        return Some(Unwilling::Busy);
    }
    match request.change {
        Change::StartByOperator | Change::MoveArbiter { .. } | Change::Replace { .. } => {
            Some(Unwilling::NotByAgreement)
        }
        Change::Start if !fresh => Some(Unwilling::Lives),
        Change::TakeSolo if me.is_some() && record.holder() == me => Some(Unwilling::Holds),
        _ => None,
    }
}

/// True for a change that counts on a process of this host which is gone, and so for good.
fn counts_on_the_dead(stance: Stance, record: &Record, request: &Request) -> bool {
    let me = match stance {
        Stance::Empty => None,
        Stance::Process { me, .. } => Some(me),
    };
    match request.change {
        Change::EnterFt { shadow, .. } => me.map(|me| me.incarnation) != Some(shadow),
        Change::Handover => me.is_none() || record.shadow() != me,
        _ => false,
    }
}

/// Answers a letter: what to say, and what this host knows from then on. That must be durable before the
/// answer leaves. `side` is this host's.
pub fn answer(
    side: Side,
    stance: Stance,
    mine: Option<&Known>,
    letter: &Letter,
) -> (Answer, Option<Known>) {
    let say = |known: Option<Known>, said| (Answer { known, said }, known);
    let busy = matches!(stance, Stance::Process { asking: true, .. });
    let theirs = normal(letter.known);
    let known = match meet(mine, Some(&theirs)) {
        Meeting::Conflict => return say(mine.copied(), Said::Conflict),
        Meeting::Mine => return say(mine.copied(), Said::Met),
        // What it waits for may be about to change its record.
        Meeting::Theirs if busy && theirs.alone_since.is_none() => {
            return say(mine.copied(), Said::NotNow(Unwilling::Busy));
        }
        Meeting::Same | Meeting::Theirs => Known::shared(theirs.record),
    };
    let Some(request) = &letter.request else {
        return say(Some(known), Said::Met);
    };
    if request.caller.side == side || request.pair != letter.pair {
        return say(Some(known), Said::NotNow(Unwilling::NotByAgreement));
    }
    match rules::decide(Arbiter::Operator, Some(&known.record), request) {
        Decision::Refused(refusal) => say(Some(known), Said::Refused(refusal)),
        Decision::Already(_) => say(Some(known), Said::Agreed),
        Decision::Granted(_) if counts_on_the_dead(stance, &known.record, request) => {
            let refusal = Refusal {
                record: Some(known.record),
                why: Why::NotInSync,
            };
            say(Some(known), Said::Refused(refusal))
        }
        Decision::Granted(record) => match objection(stance, &known.record, request) {
            Some(why) => say(Some(known), Said::NotNow(why)),
            None => say(Some(Known::shared(record)), Said::Agreed),
        },
    }
}

/// What this host knows after it was answered, to be durable before it acts; none where nothing changes.
/// With `request`, agreed to, this host records it too.
///
/// # Errors
/// Both hosts were told to go on alone.
pub fn heard(
    mine: &Known,
    request: Option<&Request>,
    answer: &Answer,
) -> Result<Option<Known>, Box<Conflict>> {
    let Some(theirs) = answer.known.map(normal) else {
        return Ok(None);
    };
    if let (Some(request), Said::Agreed) = (request, answer.said)
        && let Decision::Granted(record) =
            rules::decide_by_word(Word::Peer, Some(&mine.record), request)
        && record.agrees_with(&theirs.record)
    {
        return Ok(Some(Known::shared(record)));
    }
    match meet(Some(mine), Some(&theirs)) {
        Meeting::Same if mine.alone_since.is_some() => Ok(Some(Known::shared(mine.record))),
        // It has not adopted this yet: it will when it is asked again.
        Meeting::Same | Meeting::Mine => Ok(None),
        Meeting::Theirs => Ok(Some(Known::shared(theirs.record))),
        Meeting::Conflict => Err(Box::new(Conflict {
            mine: mine.record,
            theirs: theirs.record,
        })),
    }
}

/// A change of this host's record without the other host: by an operator's word, or by nobody's where
/// that is enough ([`rules::decide_by_word`]).
pub fn alone(mine: &Known, word: Word, request: &Request) -> Result<Known, Refusal> {
    match rules::decide_by_word(word, Some(&mine.record), request) {
        Decision::Granted(record) => Ok(Known {
            record,
            alone_since: Some(mine.alone_since.unwrap_or(mine.record)),
        }),
        Decision::Already(_) => Ok(*mine),
        Decision::Refused(refusal) => Err(refusal),
    }
}

/// The same, decided here: whoever else decided for the pair before, both hosts do now.
pub(crate) fn normal(known: Known) -> Known {
    let normal = |record| Record {
        arbiter: Arbiter::Operator,
        ..record
    };
    Known {
        record: normal(known.record),
        alone_since: known.alone_since.map(normal),
    }
}

/// Two hosts changed the record of a pair each without the other: two operators gave their word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "both hosts were told to go on without the other: this one has {mine}, the other one {theirs}; \
     nothing is touched: end the one whose work may be lost (`axvm stop --force` there), undefine \
     nothing, and remove the file record.json of that VM there"
)]
pub struct Conflict {
    /// What this host knows.
    pub mine: Record,
    /// What the other host knows.
    pub theirs: Record,
}

/// True when a record that lets `me` run has been replaced by one that does not.
pub fn supersedes(before: Option<&Known>, now: &Known, me: Member) -> bool {
    let held = before.is_some_and(|known| known.record.holder() == Some(me));
    held && now.record.holder() != Some(me)
}

/// Of two sides whose processes both ask to boot the guest this one lets the other go first, so that one of
/// them does.
pub fn yields(side: Side) -> bool {
    side == Side::B
}
