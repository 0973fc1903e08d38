//! Without a third party nothing changes but by somebody's word.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

use ax_arbiter::Manual;
use ax_arbiter::manual::ManualError;
use ax_arbiter::rules::{self, Word};
use ax_arbiter::word::Stance;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Flush, Member, Record, Request, State, Why,
};
use ax_wire::word::{Answer, Known, Letter, Said, Unwilling};
use ax_wire::{EpochId, Generation, Incarnation, PairId, Side};

const PAIR: PairId = PairId([3; 16]);
const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(1),
};
const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(2),
};

fn request(caller: Member, from: u64, change: Change) -> Request {
    Request {
        pair: PAIR,
        caller,
        machine: None,
        from: Generation(from),
        change,
    }
}

const ENTER: Change = Change::EnterFt {
    shadow: B.incarnation,
    flush: Flush::Local,
};

/// One host: what it knows, and what lives there.
struct Host {
    dir: tempfile::TempDir,
    manual: Option<Manual>,
    side: Side,
    stance: Stance,
}

fn first() -> Known {
    Known::shared(Record::defined(Copies::Only(Side::A), Arbiter::Operator))
}

fn process(me: Member) -> Stance {
    Stance::Process {
        me,
        fresh: false,
        asking: false,
    }
}

impl Host {
    fn new(side: Side) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let manual = Some(Manual::open(dir.path()).unwrap());
        let stance = Stance::Empty;
        Host {
            dir,
            manual,
            side,
            stance,
        }
    }

    fn manual(&self) -> &Manual {
        self.manual.as_ref().unwrap()
    }

    fn known(&self) -> Known {
        self.manual().known().unwrap_or_else(first)
    }

    /// It is killed, and what is there afterwards knows what it knew.
    fn crash(&mut self) {
        let before = self.manual().known();
        self.manual = None;
        self.manual = Some(Manual::open(self.dir.path()).unwrap());
        assert_eq!(self.manual().known(), before);
        self.stance = Stance::Empty;
    }

    /// Writes to the other host, which answers; the answer is not read.
    fn write(&self, other: &Host, request: Option<Request>) -> (Known, Answer) {
        let known = self.known();
        let letter = Letter {
            pair: PAIR,
            known,
            request,
        };
        let (answer, _) = other
            .manual()
            .answer(other.side, || other.stance, &letter)
            .unwrap();
        (known, answer)
    }

    /// Writes to the other host and reads the answer.
    fn ask(&self, other: &Host, request: Option<Request>) -> Said {
        let (told, answer) = self.write(other, request);
        let _ = self
            .manual()
            .heard(&told, request.as_ref(), &answer)
            .unwrap();
        answer.said
    }

    fn told(&self, request: Request) -> Known {
        let told = self.manual().alone(&self.known(), Word::Operator, &request);
        told.unwrap().unwrap()
    }

    fn state(&self) -> State {
        self.known().record.state
    }
}

/// Both hosts, the pair in FT at generation 2.
fn protected() -> (Host, Host) {
    let (mut a, mut b) = (Host::new(Side::A), Host::new(Side::B));
    a.stance = process(A);
    assert_eq!(a.ask(&b, Some(request(A, 0, Change::Start))), Said::Agreed);
    b.stance = process(B);
    assert_eq!(a.ask(&b, Some(request(A, 1, ENTER))), Said::Agreed);
    assert_eq!(a.known(), b.known());
    (a, b)
}

#[test]
fn a_host_that_lost_its_peer_is_held_until_an_operator_speaks() {
    let (mut a, _b) = protected();
    let solo = request(A, 2, Change::TakeSolo);
    let nobody = a.manual().alone(&a.known(), Word::Nobody, &solo).unwrap();
    assert_eq!(nobody.unwrap_err().why, Why::NeedsOperator);
    a.crash();
    assert_eq!(a.known().record.generation, Generation(2));
    let alone = a.told(solo);
    assert_eq!(alone.record.state, State::Alone { holder: A });
    assert_eq!(alone.alone_since.unwrap().generation, Generation(2));
}

/// What is agreed to is on the other host before it is on this one: whatever crashes in between, nobody
/// has acted, and the hosts go on from either record.
#[test]
fn an_agreement_cut_short_leaves_nobody_free_to_act_and_is_taken_up_again() {
    let (a, mut b) = protected();
    let solo = request(A, 2, Change::TakeSolo);
    let (_, answer) = a.write(&b, Some(solo));
    assert_eq!(answer.said, Said::Agreed);
    assert_eq!(b.state(), State::Alone { holder: A });
    assert!(matches!(a.state(), State::Ft { .. }), "the answer was lost");
    b.crash();
    // What the other host answers now is a later record, and it is the one that was asked for.
    assert_eq!(a.ask(&b, Some(solo)), Said::Met);
    assert_eq!(a.known(), b.known());
    let again = rules::decide(Arbiter::Operator, Some(&a.known().record), &solo);
    assert!(matches!(again, Decision::Already(_)), "{again:?}");
}

#[test]
fn a_process_that_holds_the_guest_does_not_give_it_away_and_an_empty_host_does() {
    let (mut a, b) = protected();
    let take = request(B, 2, Change::TakeSolo);
    assert_eq!(b.ask(&a, Some(take)), Said::NotNow(Unwilling::Holds));
    a.crash();
    assert_eq!(b.ask(&a, Some(take)), Said::Agreed);
    assert_eq!(a.known(), b.known());
    assert_eq!(a.state(), State::Alone { holder: B });
}

/// Rule 23: a cold start of the side that holds, if the other host agrees; not while a shadow lives
/// there which has the guest's memory; never of the other side.
#[test]
fn a_cold_start_is_agreed_to_by_a_host_where_no_shadow_lives() {
    let (mut a, mut b) = protected();
    a.crash();
    let again = Member {
        incarnation: Incarnation(7),
        ..A
    };
    let start = request(again, 2, Change::Start);
    assert_eq!(a.ask(&b, Some(start)), Said::NotNow(Unwilling::Lives));
    b.crash();
    let theirs = b.ask(&a, Some(request(B, 2, Change::Start)));
    assert!(
        matches!(theirs, Said::Refused(refusal) if matches!(refusal.why, Why::NotCurrent(_))),
        "{theirs:?}"
    );
    assert_eq!(a.ask(&b, Some(start)), Said::Agreed);
    assert_eq!(b.state(), State::Alone { holder: again });
}

#[test]
fn protection_by_a_process_that_is_gone_is_not_agreed_to() {
    let (mut a, b) = (Host::new(Side::A), Host::new(Side::B));
    a.stance = process(A);
    a.ask(&b, Some(request(A, 0, Change::Start)));
    let entered = a.ask(&b, Some(request(A, 1, ENTER)));
    assert!(
        matches!(entered, Said::Refused(refusal) if refusal.record == Some(a.known().record)),
        "{entered:?}"
    );
}

#[test]
fn a_host_that_waits_for_an_answer_agrees_to_nothing() {
    let (mut a, b) = protected();
    a.stance = Stance::Process {
        me: Member {
            incarnation: Incarnation(9),
            ..A
        },
        fresh: true,
        asking: true,
    };
    let take = request(B, 2, Change::TakeSolo);
    assert_eq!(b.ask(&a, Some(take)), Said::NotNow(Unwilling::Busy));
}

#[test]
fn hosts_that_meet_again_adopt_what_one_of_them_was_told() {
    for (told, change) in [(A, Change::TakeSolo), (B, Change::TakeSolo)] {
        let (a, b) = protected();
        let (one, other) = if told == A { (&a, &b) } else { (&b, &a) };
        one.told(request(told, 2, change));
        assert!(one.known().alone_since.is_some());
        // Whoever writes first.
        for writer in [one, other] {
            writer.ask(
                if std::ptr::eq(writer, one) {
                    other
                } else {
                    one
                },
                None,
            );
        }
        assert_eq!(other.state(), State::Alone { holder: told });
        one.ask(other, None);
        assert_eq!(one.known(), other.known());
        assert_eq!(one.known().alone_since, None);
    }
}

/// B recorded what A asked for, and A was told to go on before it heard of it.
#[test]
fn a_word_outweighs_an_agreement_that_was_cut_short() {
    let (a, b) = protected();
    let stop = Change::Stop {
        epoch: EpochId(5),
        current: Copies::Both,
    };
    a.write(&b, Some(request(A, 2, stop)));
    a.told(request(A, 2, Change::TakeSolo));
    a.ask(&b, None);
    assert_eq!(b.state(), State::Alone { holder: A });
}

#[test]
fn two_words_are_a_conflict_that_changes_nothing_though_the_generations_differ() {
    let (a, b) = protected();
    a.told(request(A, 2, Change::TakeSolo));
    b.told(request(B, 2, Change::TakeSolo));
    b.told(request(
        B,
        3,
        Change::Stop {
            epoch: EpochId(5),
            current: Copies::Only(Side::B),
        },
    ));
    let before = (a.known(), b.known());
    for (writer, reader) in [(&a, &b), (&b, &a)] {
        let (told, answer) = writer.write(reader, None);
        assert_eq!(answer.said, Said::Conflict);
        let conflict = writer.manual().heard(&told, None, &answer).unwrap();
        let conflict = conflict.unwrap_err();
        assert_eq!(conflict.mine, writer.known().record);
        assert!(conflict.to_string().contains("generation 4"), "{conflict}");
    }
    assert_eq!((a.known(), b.known()), before);
}

/// The model check found this: the letter was on its way when its writer died, and both hosts have
/// heard of the word and gone on since.
#[test]
fn a_late_letter_that_speaks_of_a_word_rolls_nothing_back() {
    let (mut a, b) = protected();
    a.told(request(A, 2, Change::TakeSolo));
    let late = Letter {
        pair: PAIR,
        known: a.known(),
        request: None,
    };
    a.ask(&b, None);
    a.crash();
    let again = Member {
        incarnation: Incarnation(7),
        ..A
    };
    let (a_known, mut b) = (a.known(), b);
    b.crash();
    assert_eq!(a_known, b.known());
    assert_eq!(
        a.ask(&b, Some(request(again, 3, Change::Start))),
        Said::Agreed
    );
    let before = b.known();
    let answer = b.manual().answer(Side::B, || Stance::Empty, &late).unwrap();
    assert_eq!(answer.0.said, Said::Met);
    assert_eq!(b.known(), before);
}

/// The word on B was given later, knowing of A's: no conflict.
#[test]
fn a_second_word_that_knew_of_the_first_goes_before_it() {
    let (a, b) = protected();
    a.told(request(A, 2, Change::TakeSolo));
    // B adopts, its answer is lost.
    a.write(&b, None);
    b.told(request(B, 3, Change::StartByOperator));
    b.ask(&a, None);
    assert_eq!(a.state(), State::Alone { holder: B });
}

#[test]
fn two_starts_that_crossed_end_in_one_record_nobody_has_acted_on() {
    let (a, b) = (Host::new(Side::A), Host::new(Side::B));
    let know = |host: &Host| {
        let both = Known::shared(Record::defined(Copies::Both, Arbiter::Operator));
        let letter = Letter {
            pair: PAIR,
            known: both,
            request: None,
        };
        host.manual()
            .answer(host.side, || Stance::Empty, &letter)
            .unwrap();
    };
    know(&a);
    know(&b);
    // Each host records the other's before it hears the answer to its own.
    let (of_a, of_b) = (request(A, 0, Change::Start), request(B, 0, Change::Start));
    let letter = |request| Letter {
        pair: PAIR,
        known: Known::shared(Record::defined(Copies::Both, Arbiter::Operator)),
        request: Some(request),
    };
    b.manual()
        .answer(Side::B, || Stance::Empty, &letter(of_a))
        .unwrap();
    a.manual()
        .answer(Side::A, || Stance::Empty, &letter(of_b))
        .unwrap();
    b.ask(&a, None);
    assert_eq!(a.known(), b.known());
    assert_eq!(a.state(), State::Alone { holder: A });
}

#[test]
fn who_runs_alone_may_stop_by_itself_and_nobody_else_may_do_anything() {
    let (a, b) = protected();
    let stop = Change::Stop {
        epoch: EpochId(5),
        current: Copies::Only(Side::A),
    };
    let stop = |from| request(A, from, stop);
    let protected = a
        .manual()
        .alone(&a.known(), Word::Nobody, &stop(2))
        .unwrap();
    assert!(protected.is_err(), "its shadow may be about to take over");
    a.told(request(A, 2, Change::TakeSolo));
    let stopped = a
        .manual()
        .alone(&a.known(), Word::Nobody, &stop(3))
        .unwrap();
    assert!(matches!(
        stopped.unwrap().record.state,
        State::Stopped { .. }
    ));
    b.ask(&a, None);
    assert_eq!(a.state(), b.state());
}

#[test]
fn a_hosts_knowledge_has_one_owner_and_a_damaged_one_is_named() {
    let (a, _b) = protected();
    let second = Manual::open(a.dir.path());
    assert!(matches!(second, Err(ManualError::InUse(_))), "{second:?}");
    let dir = a.dir;
    drop(a.manual);
    std::fs::write(dir.path().join("record.json"), b"{").unwrap();
    let damaged = Manual::open(dir.path()).unwrap_err();
    assert!(damaged.to_string().contains("record.json"), "{damaged}");
}

/// A record that a witness kept before is what the hosts go on from.
#[test]
fn what_a_witness_knew_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Arbiter::Witness(ax_wire::record::WitnessId {
        identity: [1; 16],
        store: [2; 16],
    });
    let record = Record {
        generation: Generation(4),
        ..Record::defined(Copies::Both, witness)
    };
    let json = serde_json::to_vec(&record).unwrap();
    std::fs::write(dir.path().join("record.json"), json).unwrap();
    let known = Manual::open(dir.path()).unwrap().known().unwrap();
    assert_eq!(known.record.generation, Generation(4));
    assert_eq!(known.record.arbiter, Arbiter::Operator);
}
