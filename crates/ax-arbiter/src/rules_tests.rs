use super::*;
use ax_wire::record::{Machines, WitnessId};
use ax_wire::{EpochId, Incarnation};

const ME: Arbiter = Arbiter::Witness(WitnessId {
    identity: [1; 16],
    store: [1; 16],
});
const OTHER: Arbiter = Arbiter::Witness(WitnessId {
    identity: [2; 16],
    store: [2; 16],
});
const PAIR: PairId = PairId([9; 16]);
const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(0xa),
};
const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(0xb),
};
/// The same sides after a restart of their processes.
const A2: Member = Member {
    side: Side::A,
    incarnation: Incarnation(0xa2),
};
const B2: Member = Member {
    side: Side::B,
    incarnation: Incarnation(0xb2),
};

const FT: State = State::Ft {
    holder: A,
    shadow: B.incarnation,
    flush: Flush::Local,
};
const ALONE: State = State::Alone { holder: A };
const STOPPED: State = State::Stopped {
    epoch: EpochId(5),
    current: Copies::Both,
};
const STOPPED_A: State = State::Stopped {
    epoch: EpochId(5),
    current: Copies::Only(Side::A),
};
const ENTER: Change = Change::EnterFt {
    shadow: B.incarnation,
    flush: Flush::Local,
};
const STOP: Change = Change::Stop {
    epoch: EpochId(6),
    current: Copies::Both,
};
const STOP_A: Change = Change::Stop {
    epoch: EpochId(6),
    current: Copies::Only(Side::A),
};
const STOP_B: Change = Change::Stop {
    epoch: EpochId(6),
    current: Copies::Only(Side::B),
};

fn record(state: State) -> Record {
    Record {
        generation: Generation(7),
        arbiter: ME,
        by: Some(A),
        state,
        machines: Default::default(),
    }
}

fn request(caller: Member, from: u64, change: Change) -> Request {
    Request {
        pair: PAIR,
        caller,
        machine: None,
        from: Generation(from),
        change,
    }
}

/// What the arbiter says to a current caller: the next state, or why not.
fn outcome(state: State, caller: Member, change: Change) -> Result<State, Why> {
    let before = record(state);
    match decide(ME, Some(&before), &request(caller, 7, change)) {
        Decision::Granted(after) => {
            assert_eq!((after.generation, after.by), (Generation(8), Some(caller)));
            Ok(after.state)
        }
        Decision::Already(_) => unreachable!("generation 7 asks for 8"),
        Decision::Refused(Refusal { record, why }) => {
            assert_eq!(record, Some(before));
            Err(why)
        }
    }
}

fn loses(side: Side) -> Why {
    Why::NotCurrent(Loss {
        side,
        since: Generation(7),
    })
}

#[test]
fn out_of_ft_goes_to_either_member_named_and_to_nobody_else() {
    for member in [A, B] {
        assert_eq!(
            outcome(FT, member, Change::TakeSolo),
            Ok(State::Alone { holder: member })
        );
    }
    for stale in [A2, B2] {
        assert_eq!(outcome(FT, stale, Change::TakeSolo), Err(Why::NotInSync));
    }
    for caller in [A, B] {
        assert_eq!(
            outcome(ALONE, caller, Change::TakeSolo),
            Err(Why::NotProtected)
        );
        assert_eq!(
            outcome(STOPPED, caller, Change::TakeSolo),
            Err(Why::NotRunning)
        );
    }
}

#[test]
fn into_ft_only_the_lone_holder_leads() {
    assert_eq!(outcome(ALONE, A, ENTER), Ok(FT));
    assert_eq!(outcome(ALONE, A2, ENTER), Err(Why::NotHolder));
    assert_eq!(outcome(ALONE, B, ENTER), Err(Why::NotHolder));
    assert_eq!(outcome(FT, A, ENTER), Err(Why::Protected));
    assert_eq!(outcome(STOPPED, A, ENTER), Err(Why::NotRunning));
}

#[test]
fn a_handover_swaps_the_members_and_the_old_holder_can_take_it_back() {
    let swapped = State::Ft {
        holder: B,
        shadow: A.incarnation,
        flush: Flush::Local,
    };
    assert_eq!(outcome(FT, A, Change::Handover), Ok(swapped));
    assert_eq!(outcome(swapped, A, Change::TakeSolo), Ok(ALONE));
    assert_eq!(outcome(FT, B, Change::Handover), Err(Why::NotHolder));
    assert_eq!(outcome(ALONE, A, Change::Handover), Err(Why::NotProtected));
    assert_eq!(outcome(STOPPED, A, Change::Handover), Err(Why::NotRunning));
}

#[test]
fn only_the_holder_stops_and_claims_no_more_copies_than_follow() {
    let stopped = |current| {
        Ok(State::Stopped {
            epoch: EpochId(6),
            current,
        })
    };
    assert_eq!(outcome(FT, A, STOP), stopped(Copies::Both));
    assert_eq!(outcome(FT, A, STOP_A), stopped(Copies::Only(Side::A)));
    assert_eq!(outcome(FT, A, STOP_B), stopped(Copies::Only(Side::B)));
    assert_eq!(outcome(ALONE, A, STOP_B), Err(Why::Copies));
    assert_eq!(outcome(FT, B, STOP), Err(Why::NotHolder));
    assert_eq!(outcome(ALONE, A, STOP), Err(Why::Copies));
    assert_eq!(outcome(ALONE, A, STOP_A), stopped(Copies::Only(Side::A)));
    assert_eq!(outcome(STOPPED, A, STOP), Err(Why::NotRunning));
}

#[test]
fn a_cold_start_needs_the_current_copy_or_an_operator() {
    let runs = |holder| Ok(State::Alone { holder });
    // Cleanly stopped: either side. Stopped alone: that side.
    assert_eq!(outcome(STOPPED, A2, Change::Start), runs(A2));
    assert_eq!(outcome(STOPPED, B2, Change::Start), runs(B2));
    assert_eq!(outcome(STOPPED_A, A2, Change::Start), runs(A2));
    assert_eq!(outcome(STOPPED_A, B2, Change::Start), Err(loses(Side::A)));
    // Crashed with (g, ft, A, B) or alone: only A; B by the operator's word.
    for crashed in [FT, ALONE] {
        assert_eq!(outcome(crashed, A2, Change::Start), runs(A2));
        assert_eq!(outcome(crashed, B2, Change::Start), Err(loses(Side::A)));
        assert_eq!(outcome(crashed, B2, Change::StartByOperator), runs(B2));
    }
    // With FLUSH durable on both sides, either.
    let sync = State::Ft {
        holder: A,
        shadow: B.incarnation,
        flush: Flush::Both,
    };
    assert_eq!(outcome(sync, B2, Change::Start), runs(B2));
}

#[test]
fn the_loss_is_named_in_words() {
    let refusal = Refusal {
        record: Some(record(ALONE)),
        why: loses(Side::A),
    };
    let text = refusal.to_string();
    assert!(text.contains("waits for side A"), "{text}");
    assert!(
        text.contains("what side A has done since generation 7"),
        "{text}"
    );
}

#[test]
fn the_same_caller_asking_again_is_told_again_and_nothing_changes() {
    let changes = [
        (FT, A, Change::TakeSolo),
        (FT, B, Change::TakeSolo),
        (ALONE, A, ENTER),
        (FT, A, Change::Handover),
        (FT, A, STOP),
        (STOPPED, B, Change::Start),
        (FT, B2, Change::StartByOperator),
        (FT, A, Change::MoveArbiter { to: OTHER }),
    ];
    for (state, caller, change) in changes {
        let ask = request(caller, 7, change);
        let Decision::Granted(granted) = decide(ME, Some(&record(state)), &ask) else {
            panic!("{change:?} not granted");
        };
        assert_eq!(decide(ME, Some(&granted), &ask), Decision::Already(granted));
        // Another process asking the same from the same generation has lost the race.
        let rival = if caller.side == Side::A { B } else { A };
        let rival = decide(
            ME,
            Some(&granted),
            &Request {
                caller: rival,
                ..ask
            },
        );
        assert!(
            matches!(rival, Decision::Refused(_)),
            "{change:?}: {rival:?}"
        );
    }
}

#[test]
fn a_generation_that_is_not_the_records_is_refused() {
    let says = |from| decide(ME, Some(&record(FT)), &request(A, from, Change::TakeSolo));
    let why = |d| match d {
        Decision::Refused(refusal) => refusal.why,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(says(5)), Why::Stale);
    assert_eq!(why(says(6)), Why::Stale);
    assert_eq!(why(says(8)), Why::StoreBehind);
    assert_eq!(why(says(u64::MAX)), Why::Exhausted);
}

#[test]
fn a_moved_or_unknown_pair_is_granted_nothing() {
    let moved = outcome_of_move();
    let ask = request(A, moved.generation.0, Change::TakeSolo);
    let refused = |record: Option<Record>, why| Decision::Refused(Refusal { record, why });
    assert_eq!(
        decide(ME, Some(&moved), &ask),
        refused(Some(moved), Why::OtherArbiter)
    );
    assert_eq!(decide(ME, None, &ask), refused(None, Why::UnknownPair));
}

fn outcome_of_move() -> Record {
    match decide(
        ME,
        Some(&record(FT)),
        &request(A, 7, Change::MoveArbiter { to: OTHER }),
    ) {
        Decision::Granted(moved) => moved,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_side_alone_cannot_move_the_arbiter() {
    assert_eq!(
        outcome(ALONE, A, Change::MoveArbiter { to: OTHER }),
        Err(Why::NotProtected)
    );
    assert_eq!(
        outcome(FT, B, Change::MoveArbiter { to: OTHER }),
        Err(Why::NotHolder)
    );
}

#[test]
fn an_unknown_pair_becomes_known_when_both_sides_agree_or_an_operator_says_so() {
    let mine = Record {
        arbiter: OTHER,
        ..record(FT)
    };
    let known = Registered::Known(record(FT));
    let mine = registers(mine);
    assert_eq!(register(ME, None, None, &mine, false), Registered::Waiting);
    assert_eq!(register(ME, None, Some(&mine), &mine, false), known);
    assert_eq!(register(ME, None, None, &mine, true), known);
    let older = Record {
        generation: Generation(6),
        ..mine.record
    };
    let disagrees = Registered::Disagrees { other: older };
    let older = registers(older);
    assert_eq!(register(ME, None, Some(&older), &mine, false), disagrees);
}

#[test]
fn registering_never_changes_what_is_known() {
    let known = record(ALONE);
    let claim = registers(Record {
        generation: Generation(99),
        ..record(STOPPED)
    });
    let answer = register(ME, Some(&known), Some(&claim), &claim, true);
    assert_eq!(answer, Registered::Known(known));
}

#[test]
fn a_pair_that_moved_away_comes_back_only_with_a_later_record() {
    let moved = outcome_of_move();
    let old = registers(record(FT));
    let answer = register(ME, Some(&moved), Some(&old), &old, true);
    assert_eq!(answer, Registered::Behind { known: moved });
    let later = Record {
        generation: Generation(12),
        ..moved
    };
    let told = registers(later);
    let answer = register(ME, Some(&moved), Some(&told), &told, false);
    assert_eq!(
        answer,
        Registered::Known(Record {
            arbiter: ME,
            ..later
        })
    );
}

fn registers(record: Record) -> Told {
    Told {
        record,
        standing: Standing::Registers,
    }
}

/// Whatever one side says of itself, the new arbiter grants nothing before the other one says that it is
/// done with the old one, too.
#[test]
fn a_pair_that_comes_without_the_old_arbiter_is_known_when_both_are_done_with_it() {
    let mine = Record {
        arbiter: OTHER,
        ..record(FT)
    };
    let says = |standing| Told {
        record: mine,
        standing,
    };
    let (proposes, moves) = (says(Standing::Proposes), says(Standing::Moves));
    let one = |other, me| register(ME, None, Some(&other), &me, false);
    assert_eq!(one(proposes, proposes), Registered::Agreed { firm: false });
    assert_eq!(one(moves, proposes), Registered::Agreed { firm: true });
    assert_eq!(one(proposes, moves), Registered::Waiting);
    // One later than what anybody knew: what the old arbiter still has is known for what it is.
    let known = Record {
        generation: Generation(8),
        ..record(FT)
    };
    assert_eq!(one(moves, moves), Registered::Known(known));
    let again = |standing| register(ME, Some(&known), None, &says(standing), false);
    assert_eq!(again(Standing::Moves), Registered::Known(known));
    assert_eq!(again(Standing::Proposes), Registered::Known(known));
}

#[test]
fn what_an_arbiter_has_of_a_pair_that_left_it_is_no_answer_when_it_comes_back() {
    let left = record(FT);
    let mine = |standing| Told {
        record: Record {
            arbiter: OTHER,
            ..record(FT)
        },
        standing,
    };
    for standing in [Standing::Proposes, Standing::Moves] {
        let said = register(ME, Some(&left), None, &mine(standing), false);
        assert_eq!(said, Registered::Waiting);
    }
    let moves = mine(Standing::Moves);
    let said = register(ME, Some(&left), Some(&moves), &moves, false);
    assert!(matches!(said, Registered::Known(r) if r.generation == Generation(8)));
}

#[test]
fn a_record_that_names_its_next_arbiter_is_taken_over_from_one_side() {
    let moved = outcome_of_move();
    let shows = Told {
        record: moved,
        standing: Standing::TakesOver,
    };
    let taken = Registered::Known(moved);
    assert_eq!(register(OTHER, None, None, &shows, false), taken);
    // Again, and late: the pair has gone on there.
    let later = Record {
        generation: Generation(11),
        ..moved
    };
    let said = register(OTHER, Some(&later), None, &shows, false);
    assert_eq!(said, Registered::Known(later));
    // Nobody else's.
    assert_eq!(register(ME, None, None, &shows, false), Registered::Waiting);
}

#[test]
fn without_a_witness_nothing_is_decided_alone() {
    let known = Record {
        arbiter: Arbiter::Operator,
        ..record(FT)
    };
    let says = |word, change| decide_by_word(word, Some(&known), &request(A, 7, change));
    let held = Decision::Refused(Refusal {
        record: Some(known),
        why: Why::NeedsOperator,
    });
    for change in [
        Change::TakeSolo,
        STOP,
        Change::Handover,
        Change::StartByOperator,
    ] {
        assert_eq!(says(Word::Nobody, change), held);
        assert!(matches!(says(Word::Operator, change), Decision::Granted(_)));
    }
    assert!(matches!(
        says(Word::Peer, Change::Handover),
        Decision::Granted(_)
    ));
    assert_eq!(says(Word::Peer, Change::StartByOperator), held);
}

const OLD: MachineId = MachineId([0xa; 16]);
const NEW: MachineId = MachineId([0xc; 16]);

/// What is left of a pair on B when A's machine is gone for good, and what the new one's Start there is told.
fn replaced(state: State, caller: Member, word: bool) -> Result<(Record, Decision), Why> {
    let record = Record {
        machines: Machines::default().with(Side::A, OLD),
        ..record(state)
    };
    let change = Change::Replace { machine: NEW, word };
    match decide(ME, Some(&record), &request(caller, 7, change)) {
        Decision::Granted(after) => {
            let again = decide(ME, Some(&after), &request(caller, 7, change));
            assert_eq!(again.granted(), Ok(after), "idempotent");
            let start = Request {
                machine: Some(NEW),
                ..request(A, after.generation.0, Change::Start)
            };
            Ok((after, decide(ME, Some(&after), &start)))
        }
        Decision::Already(record) => panic!("{record}"),
        Decision::Refused(refusal) => Err(refusal.why),
    }
}

/// I4: whatever the record said of the old machine's copy, the new one has none.
#[test]
fn a_new_machine_has_no_copy_and_what_only_the_old_one_had_is_lost() {
    let nobody = Member {
        side: Side::B,
        incarnation: Incarnation(0),
    };
    let stopped = |current| State::Stopped {
        epoch: EpochId(3),
        current,
    };
    let ft = |holder: Member, shadow: Member, flush| State::Ft {
        holder,
        shadow: shadow.incarnation,
        flush,
    };
    let (a, b) = (State::Alone { holder: A }, State::Alone { holder: B });
    let only = |current| State::Stopped {
        epoch: EpochId(0),
        current,
    };
    // (what was, what is after an operator's word, whether it takes that word)
    let cases = [
        (stopped(Copies::Both), stopped(Copies::Only(Side::B)), false),
        (
            stopped(Copies::Only(Side::B)),
            stopped(Copies::Only(Side::B)),
            false,
        ),
        (stopped(Copies::Only(Side::A)), stopped(Copies::Lost), true),
        (stopped(Copies::Lost), stopped(Copies::Lost), true),
        (b, b, false),
        (a, only(Copies::Lost), true),
        (ft(B, A, Flush::Local), b, false),
        (ft(B, A, Flush::Both), b, false),
        (ft(A, B, Flush::Local), only(Copies::Lost), true),
        (ft(A, B, Flush::Both), only(Copies::Only(Side::B)), true),
    ];
    for (before, after, needs_word) in cases {
        assert_eq!(
            replaced(before, nobody, false).is_err(),
            needs_word,
            "{before:?}"
        );
        let (record, start) = replaced(before, nobody, true).unwrap();
        assert_eq!((record.state, record.generation), (after, Generation(8)));
        assert!(
            matches!(
                start,
                Decision::Refused(Refusal {
                    why: Why::NotCurrent(_),
                    ..
                })
            ),
            "{before:?}: {start:?}"
        );
    }
}

/// Whoever runs alone goes on by the generation it knows.
#[test]
fn a_guest_that_runs_alone_does_not_notice_that_the_other_machine_is_replaced() {
    let (record, _) = replaced(State::Alone { holder: B }, B, false).unwrap();
    assert_eq!((record.generation, record.by), (Generation(7), Some(A)));
    let protected = State::Ft {
        holder: B,
        shadow: A.incarnation,
        flush: Flush::Local,
    };
    assert_eq!(replaced(protected, B, true).err(), Some(Why::Protected));
}

#[test]
fn a_machine_that_was_replaced_neither_asks_nor_registers() {
    let (record, _) = replaced(State::Alone { holder: A }, B, true).unwrap();
    for machine in [Some(OLD), None] {
        let start = Request {
            machine,
            ..request(A, 8, Change::StartByOperator)
        };
        let decision = decide(ME, Some(&record), &start);
        assert!(
            matches!(
                decision,
                Decision::Refused(Refusal {
                    why: Why::Replaced,
                    ..
                })
            ),
            "{decision:?}"
        );
        // A store that was wiped knows of no machines: what it says it knows does.
        let registration = Registration {
            pair: PAIR,
            side: Side::A,
            machine,
            record,
        };
        assert!(registration.is_replaced(None));
    }
}
