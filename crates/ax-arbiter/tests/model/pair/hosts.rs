//! Two hosts without an arbiter: each with its own record, letters between them that are lost or late,
//! and an honest operator, who gives one word for each loss, to a side that is silent like the other.

use ax_arbiter::rules::{Word, decide};
use ax_arbiter::word::{self, Stance};
use ax_wire::PairId;
use ax_wire::Side;
use ax_wire::record::{Copies, Decision, Record, Request};
use ax_wire::word::{Answer, Known, Letter};
use statepoint::pair::Phase;

use super::{ME, SIDES, Step, World, at};

/// What both hosts know, and what is on its way between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hosts {
    pub known: [Known; 2],
    /// The other host's answer on its way to this side, with the request it is for.
    answers: [Option<(Request, u64)>; 2],
    /// Answers as they were given; the index is above.
    given: Vec<(Option<Known>, bool)>,
    /// The last letter of a process of this side that is gone, on its way to the other host.
    late: [Option<(Known, Request)>; 2],
    pub apart: bool,
    /// The operator has spoken since the hosts last knew the same.
    pub spoken: bool,
}

impl Hosts {
    pub fn new() -> Hosts {
        let first = Known::shared(Record::defined(Copies::Both, ME));
        Hosts {
            known: [first; 2],
            answers: [None, None],
            given: Vec::new(),
            late: [None, None],
            apart: false,
            spoken: false,
        }
    }

    pub fn forget(&mut self, side: Side) {
        self.answers[at(side)] = None;
    }

    /// The process is gone; what it asked may still arrive.
    pub fn orphan(&mut self, side: Side, asking: Option<Request>) {
        self.forget(side);
        if let Some(request) = asking {
            self.late[at(side)] = Some((self.known[at(side)], request));
        }
    }

    pub fn agree(&self) -> bool {
        self.known[0].record.agrees_with(&self.known[1].record)
    }
}
