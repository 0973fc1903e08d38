//! A witness over real TCP, seen from the hosts that ask it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use ax_arbiter::message::{Ask, Call, Fault};
use ax_arbiter::rules::Registered;
use ax_arbiter::{AskError, Client};
use ax_link::{Connector, HostName, Identity, Preamble, Security, TrustStore};
use ax_wire::frame::{FrameKind, frame};
use ax_wire::record::{Arbiter, Change, Copies, Decision, Record, Refusal, State, Why};
use ax_wire::{Generation, Side};
use common::*;
use proptest::prelude::*;

#[test]
fn a_pair_lives_its_life() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let (client, pair) = (client(witness.address), pair(1));
    let alone = start_on_a(&client, pair);
    assert_eq!(alone.arbiter, Arbiter::Witness(witness.id));
    let ft = protect(&client, pair, alone);
    let ask = |caller, from: Record, change| {
        granted(
            client
                .ask(&request(pair, caller, from.generation, change), deadline())
                .unwrap(),
        )
    };
    let swapped = ask(A, ft, Change::Handover);
    assert_eq!((swapped.holder(), swapped.shadow()), (Some(B), Some(A)));
    let taken = ask(A, swapped, Change::TakeSolo);
    assert_eq!(taken.state, State::Alone { holder: A });
    let stop = Change::Stop {
        epoch: ax_wire::EpochId(9),
        current: Copies::Only(Side::A),
    };
    let stopped = ask(A, taken, stop);
    let refused = client.ask(
        &request(pair, B, stopped.generation, Change::Start),
        deadline(),
    );
    assert!(matches!(
        refused.unwrap(),
        Decision::Refused(Refusal {
            why: Why::NotCurrent(_),
            ..
        })
    ));
    assert_eq!(client.look(pair, deadline()).unwrap(), Some(stopped));
    assert!(client.forget(pair, stopped.generation, deadline()).unwrap());
    assert_eq!(client.look(pair, deadline()).unwrap(), None);
}

#[test]
fn a_running_pair_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let (client, pair) = (client(witness.address), pair(1));
    let alone = start_on_a(&client, pair);
    assert!(!client.forget(pair, alone.generation, deadline()).unwrap());
    assert_eq!(client.look(pair, deadline()).unwrap(), Some(alone));
}

/// I3: both sides ask to run alone at the same time.
#[test]
fn of_two_racers_exactly_one_wins_a_thousand_times() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let clients = [client(witness.address), client(witness.address)];
    let pair = pair(1);
    let mut record = start_on_a(&clients[0], pair);
    let barrier = Barrier::new(2);
    for round in 0..1000 {
        let ft = protect(&clients[0], pair, record);
        let race = |client: &Client, me| {
            barrier.wait();
            client
                .ask(
                    &request(pair, me, ft.generation, Change::TakeSolo),
                    deadline(),
                )
                .unwrap()
        };
        let answers = std::thread::scope(|scope| {
            let b = scope.spawn(|| race(&clients[1], B));
            [race(&clients[0], A), b.join().unwrap()]
        });
        let (winner, loser) = match answers {
            [Decision::Granted(won), Decision::Refused(lost)] => (won, lost),
            [Decision::Refused(lost), Decision::Granted(won)] => (won, lost),
            other => panic!("round {round}: {other:?}"),
        };
        assert_eq!(
            loser,
            Refusal {
                record: Some(winner),
                why: Why::Stale
            }
        );
        record = winner;
    }
    assert_eq!(record.generation, Generation(1 + 2 * 1000));
}

#[test]
fn many_pairs_asking_at_once_are_all_answered() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let setup = client(witness.address);
    let pairs = 64;
    let barrier = Barrier::new(pairs as usize);
    let records: Vec<_> = (0..pairs)
        .map(|n| protect(&setup, pair(n), start_on_a(&setup, pair(n))))
        .collect();
    std::thread::scope(|scope| {
        for (n, ft) in (0..).zip(&records) {
            let (barrier, client) = (&barrier, client(witness.address));
            scope.spawn(move || {
                barrier.wait();
                let ask = request(pair(n), B, ft.generation, Change::TakeSolo);
                let record = granted(client.ask(&ask, deadline()).unwrap());
                assert_eq!(record.state, State::Alone { holder: B });
            });
        }
    });
}

/// Rule 27: a store wiped while a side runs grants nothing until both have registered anew.
#[test]
fn a_wiped_store_grants_nothing_until_both_sides_register_with_equal_generation() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("witness");
    let first = Served::plain(&data);
    let (address, first_id) = (first.address, first.id);
    let (a, b, pair) = (client(address), client(address), pair(1));
    let alone = start_on_a(&a, pair);
    assert_eq!(register(&b, pair, Side::B, alone), Registered::Known(alone));
    let ft = protect(&a, pair, alone);

    first.stop();
    std::fs::remove_file(data.join("records.redb")).unwrap();
    let second = Served::start(&data, address, Security::Plain);
    assert_eq!(second.id.identity, first_id.identity);
    assert_ne!(second.id.store, first_id.store);

    let solo = |me| request(pair, me, ft.generation, Change::TakeSolo);
    let refused = |client: &Client, me| match client.ask(&solo(me), deadline()) {
        Err(AskError::OtherWitness { expected, found }) => {
            assert_eq!((expected, found), (first_id, second.id));
        }
        other => panic!("{other:?}"),
    };
    refused(&a, A);
    refused(&b, B);
    // Nor does one that does not know whom to expect get anything.
    let unknown = Decision::Refused(Refusal {
        record: None,
        why: Why::UnknownPair,
    });
    assert_eq!(client(address).ask(&solo(A), deadline()).unwrap(), unknown);

    assert_eq!(register(&a, pair, Side::A, ft), Registered::Waiting);
    refused(&a, A);
    // B missed the step into FT: it must learn it from A first.
    assert_eq!(
        register(&b, pair, Side::B, alone),
        Registered::Disagrees { other: ft }
    );
    refused(&b, B);
    let known = Record {
        arbiter: Arbiter::Witness(second.id),
        ..ft
    };
    assert_eq!(register(&b, pair, Side::B, ft), Registered::Known(known));
    assert_eq!(register(&a, pair, Side::A, ft), Registered::Known(known));
    assert_eq!(
        granted(b.ask(&solo(B), deadline()).unwrap()).state,
        State::Alone { holder: B }
    );
}

#[test]
fn a_restarted_witness_is_the_same_and_knows_what_it_answered() {
    let dir = tempfile::tempdir().unwrap();
    let first = Served::plain(dir.path());
    let (address, id) = (first.address, first.id);
    let (client, pair) = (client(address), pair(1));
    let alone = start_on_a(&client, pair);
    first.stop();
    let ask = request(pair, A, alone.generation, enter_ft(B));
    let soon = std::time::Instant::now() + std::time::Duration::from_millis(300);
    assert!(matches!(
        client.ask(&ask, soon),
        Err(AskError::Unreachable { .. })
    ));
    let second = Served::start(dir.path(), address, Security::Plain);
    assert_eq!(second.id, id);
    assert_eq!(client.look(pair, deadline()).unwrap(), Some(alone));
    protect(&client, pair, alone);
}

#[test]
fn two_witnesses_cannot_open_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let _open = Served::plain(dir.path());
    let error = ax_arbiter::Witness::open(dir.path())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("in use by another witness"), "{error}");
}

/// Forwards connections; on demand loses the next answer together with its connection, or lets
/// the open connections fall silent.
struct Cable {
    address: SocketAddr,
    lose_answer: Arc<AtomicBool>,
    silence: Arc<AtomicBool>,
}

impl Cable {
    fn to(witness: SocketAddr) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let lose_answer = Arc::new(AtomicBool::new(false));
        let silence = Arc::new(AtomicBool::new(false));
        let (lose, silent) = (lose_answer.clone(), silence.clone());
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let far = TcpStream::connect(witness).unwrap();
                silent.store(false, Ordering::SeqCst);
                let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                std::thread::spawn(move || forward(near, far, || true));
                let (lose, silent) = (lose.clone(), silent.clone());
                let mine = Arc::new(AtomicBool::new(false));
                std::thread::spawn(move || {
                    forward(far2, near2, move || {
                        if silent.load(Ordering::SeqCst) {
                            mine.store(true, Ordering::SeqCst);
                        }
                        if mine.load(Ordering::SeqCst) {
                            // A silent connection stays open and says nothing more.
                            std::thread::park();
                        }
                        !lose.swap(false, Ordering::SeqCst)
                    });
                });
            }
        });
        Cable {
            address,
            lose_answer,
            silence,
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, mut pass: impl FnMut() -> bool) {
    let mut buf = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        if !pass() || to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// Rule 20: a lost answer is asked for again, and nothing happens twice.
#[test]
fn a_lost_answer_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let cable = Cable::to(witness.address);
    let (client, pair) = (client(cable.address), pair(1));
    let mut record = start_on_a(&client, pair);
    let mut told_again = 0;
    for n in 0..40 {
        let change = if n % 2 == 0 {
            enter_ft(B)
        } else {
            Change::TakeSolo
        };
        cable.lose_answer.store(true, Ordering::SeqCst);
        let ask = request(pair, A, record.generation, change);
        let decision = client.ask(&ask, deadline()).unwrap();
        told_again += usize::from(matches!(decision, Decision::Already(_)));
        let next = granted(decision);
        assert_eq!(next.generation.0, record.generation.0 + 1);
        record = next;
    }
    // A ping's answer may be lost instead of the question's, now and then.
    assert!(
        told_again > 20,
        "{told_again} of 40 answers were lost and told again"
    );
}

#[test]
fn a_connection_that_falls_silent_is_replaced_within_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let cable = Cable::to(witness.address);
    let (client, pair) = (client(cable.address), pair(1));
    let alone = start_on_a(&client, pair);
    cable.silence.store(true, Ordering::SeqCst);
    let soon = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let ask = request(pair, A, alone.generation, enter_ft(B));
    granted(client.ask(&ask, soon).unwrap());
}

fn identity(name: &str) -> (HostName, Identity) {
    let name: HostName = name.parse().unwrap();
    let identity = Identity::generate(&name).unwrap();
    (name, identity)
}

/// With mutual TLS a paired host cannot speak for a side another host has registered.
#[test]
fn a_host_cannot_speak_for_anothers_side() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = [identity("a"), identity("b"), identity("c")];
    let (witness_name, witness_identity) = identity("w");
    let trust = |whom: &[&(HostName, Identity)]| {
        TrustStore::of(
            whom.iter()
                .map(|(name, id)| (name.clone(), id.certificate())),
        )
    };
    let security = Security::Mtls(
        witness_identity.clone(),
        trust(&hosts.iter().collect::<Vec<_>>()),
    );
    let witness = Served::start(dir.path(), "127.0.0.1:0".parse().unwrap(), security);
    let whom = (witness_name.clone(), witness_identity);
    let [a, b, c] = [0, 1, 2].map(|n| {
        let security = Security::Mtls(hosts[n].1.clone(), trust(&[&whom]));
        let to = vec![witness.address.into()];
        Client::new(
            Connector::new(security, to, Some(witness_name.clone())),
            None,
        )
        .unwrap()
    });
    let defined = Record::defined(Copies::Both, Arbiter::Operator);
    let pair = pair(1);
    register(&a, pair, Side::A, defined);
    assert!(matches!(
        register(&b, pair, Side::B, defined),
        Registered::Known(_)
    ));
    assert!(matches!(
        register(&a, pair, Side::A, defined),
        Registered::Known(_)
    ));
    let start = request(pair, A, Generation(0), Change::Start);
    for stranger in [&b, &c] {
        let got = stranger.ask(&start, deadline());
        assert!(
            matches!(got, Err(AskError::Fault(Fault::WrongHost))),
            "{got:?}"
        );
    }
    granted(a.ask(&start, deadline()).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever one connection sends, the witness lives, and knows what it knew.
    #[test]
    fn hostile_bytes_change_nothing(
        garbage in prop::collection::vec(any::<u8>(), 0..400),
        preamble in any::<bool>(),
        framed in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let witness = Served::plain(dir.path());
        let (client, pair) = (client(witness.address), pair(1));
        let alone = start_on_a(&client, pair);
        let mut hostile = TcpStream::connect(witness.address).unwrap();
        let mut bytes = Vec::new();
        if preamble {
            bytes.extend(Preamble::witness().encode());
        }
        bytes.extend(if framed { frame(FrameKind::ArbiterCall, &garbage).unwrap() } else { garbage });
        // The witness may have hung up already.
        let _ = hostile.write_all(&bytes);
        let _ = hostile.shutdown(std::net::Shutdown::Write);
        let _ = hostile.read_to_end(&mut Vec::new());
        prop_assert_eq!(client.look(pair, deadline()).unwrap(), Some(alone));
    }
}

#[test]
fn a_question_before_hello_is_not_considered() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Served::plain(dir.path());
    let connector = Connector::new(Security::Plain, vec![witness.address.into()], None);
    let mut stream = connector.open(Preamble::witness()).unwrap();
    let call = Call {
        id: 3,
        ask: Ask::Look(pair(1)),
    };
    ax_arbiter::message::write(&mut stream, FrameKind::ArbiterCall, &call).unwrap();
    let answer: ax_arbiter::message::Answer =
        ax_arbiter::message::read(&mut stream, FrameKind::ArbiterAnswer).unwrap();
    assert_eq!(answer.said, ax_arbiter::message::Said::Fault(Fault::Order));
}
