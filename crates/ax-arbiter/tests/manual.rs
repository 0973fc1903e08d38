//! Without a witness nothing changes but by somebody's word.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panic")]

use ax_arbiter::Manual;
use ax_arbiter::rules::Word;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Flush, Member, Record, Refusal, Request, State, Why,
};
use ax_wire::{Generation, Incarnation, PairId, Side};

const PAIR: PairId = PairId([3; 16]);
const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(1),
};
const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(2),
};

fn ask(caller: Member, from: u64, change: Change) -> Request {
    Request {
        pair: PAIR,
        caller,
        from: Generation(from),
        change,
    }
}

/// One host's records, the pair defined.
fn host() -> (tempfile::TempDir, Manual) {
    let dir = tempfile::tempdir().unwrap();
    let manual = Manual::open(dir.path()).unwrap();
    manual
        .define(PAIR, Record::defined(Copies::Both, Arbiter::Operator))
        .unwrap();
    (dir, manual)
}

#[test]
fn a_host_that_lost_its_peer_is_held_until_an_operator_speaks() {
    let (dir, host) = host();
    let started = host.ask(Word::Operator, &ask(A, 0, Change::Start)).unwrap();
    assert!(matches!(started, Decision::Granted(_)));
    let enter = Change::EnterFt {
        shadow: B.incarnation,
        flush: Flush::Local,
    };
    let ft = host
        .ask(Word::Peer, &ask(A, 1, enter))
        .unwrap()
        .granted()
        .unwrap();
    let solo = ask(A, 2, Change::TakeSolo);
    let held = Decision::Refused(Refusal {
        record: Some(ft),
        why: Why::NeedsOperator,
    });
    assert_eq!(host.ask(Word::Nobody, &solo).unwrap(), held);
    drop(host);
    let host = Manual::open(dir.path()).unwrap();
    assert_eq!(host.look(PAIR).unwrap(), Some(ft));
    let alone = host.ask(Word::Operator, &solo).unwrap().granted().unwrap();
    assert_eq!(alone.state, State::Alone { holder: A });
}

#[test]
fn hosts_that_meet_again_agree_on_the_later_record() {
    let ((_a, a), (_b, b)) = (host(), host());
    let later = a
        .ask(Word::Operator, &ask(A, 0, Change::Start))
        .unwrap()
        .granted()
        .unwrap();
    assert_eq!(b.adopt(PAIR, later).unwrap(), Ok(later));
    assert_eq!(b.look(PAIR).unwrap(), Some(later));
    // What is older is not taken over.
    let old = Record::defined(Copies::Both, Arbiter::Operator);
    assert_eq!(a.adopt(PAIR, old).unwrap(), Ok(later));
}

#[test]
fn two_operators_words_are_a_conflict_both_hosts_name() {
    let ((_a, a), (_b, b)) = (host(), host());
    let mine = a
        .ask(Word::Operator, &ask(A, 0, Change::Start))
        .unwrap()
        .granted()
        .unwrap();
    let theirs = b
        .ask(Word::Operator, &ask(B, 0, Change::Start))
        .unwrap()
        .granted()
        .unwrap();
    let conflict = a.adopt(PAIR, theirs).unwrap().unwrap_err();
    assert_eq!((conflict.mine, conflict.theirs), (mine, theirs));
    assert!(conflict.to_string().contains("generation 1"), "{conflict}");
    assert_eq!(a.look(PAIR).unwrap(), Some(mine));
}
