//! Two sides and two real witnesses: the arbiter is changed between questions and while one stands.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panic")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use ax_arbiter::{Client, Witness};
use ax_link::accept::Stopper;
use ax_link::{Acceptor, Connector, Security};
use ax_wire::record::{Flush, State};
use ax_wire::{Incarnation, Side};
use parking_lot::Mutex;

use super::*;

const PAIR: PairId = PairId([5; 16]);
/// How long a change may take: longer than an arbiter must be silent to be lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// A witness in a thread of this process.
struct Served {
    place: Place,
    at: SocketAddr,
    stop: Stopper,
    thread: std::thread::JoinHandle<()>,
}

impl Served {
    fn start(name: &str, dir: &Path, at: SocketAddr) -> Served {
        let witness = Witness::open(dir).unwrap();
        let acceptor = Acceptor::bind(&[at], Security::Plain).unwrap();
        let (at, stop) = (acceptor.local_addrs()[0], acceptor.stopper());
        Served {
            place: Place::Witness {
                name: name.into(),
                addresses: vec![at],
            },
            at,
            stop,
            thread: std::thread::spawn(move || witness.serve(&acceptor).unwrap()),
        }
    }

    fn new(name: &str, dir: &Path) -> Served {
        Served::start(name, dir, ([127, 0, 0, 1], 0).into())
    }

    fn end(self) -> SocketAddr {
        self.stop.stop();
        self.thread.join().unwrap();
        self.at
    }
}

/// One side's keeper and what it has told.
struct Party {
    keeper: AtThird,
    me: Member,
    said: Arc<Mutex<Vec<String>>>,
    tell: Tell,
}

impl Party {
    fn new(
        side: Side,
        incarnation: u64,
        dir: &Path,
        arbiter: &Place,
        standby: Option<&Place>,
    ) -> Party {
        let me = Member {
            side,
            incarnation: Incarnation(incarnation),
        };
        let connect: Connect = Box::new(|place, expected| {
            let Place::Witness { addresses, .. } = place else {
                panic!("{place}");
            };
            let at = addresses.iter().map(|a| (*a).into()).collect();
            let connector = Connector::new(Security::Plain, at, None);
            Ok(Box::new(Client::new(connector, expected).unwrap()))
        });
        std::fs::create_dir_all(dir).unwrap();
        let course = Course::open(dir, arbiter.clone(), standby.cloned()).unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let saying = Arc::clone(&said);
        Party {
            keeper: AtThird::new(connect, course, PAIR, me, Copies::Both).unwrap(),
            me,
            said,
            tell: Arc::new(move |heard| saying.lock().push(format!("{heard:?}"))),
        }
    }

    fn ask(&mut self, from: u64, change: Change) -> Heard {
        self.keeper.ask(Generation(from), change, &self.tell)
    }

    fn granted(&mut self, from: u64, change: Change) -> Record {
        match self.ask(from, change) {
            Heard::Granted(record) => record,
            other => panic!("{other:?}"),
        }
    }

    fn decides(&self) -> String {
        self.keeper.course.now().to_string()
    }
}

/// Both sides, started on A and protected at generation 2.
struct Both {
    a: Party,
    b: Party,
}

impl Both {
    fn new(dir: &Path, arbiter: &Place, standby: Option<&Place>) -> Both {
        let party = |side, incarnation, name: &str| {
            Party::new(side, incarnation, &dir.join(name), arbiter, standby)
        };
        let (mut a, mut b) = (party(Side::A, 1, "a"), party(Side::B, 2, "b"));
        std::thread::scope(|scope| {
            scope.spawn(|| a.keeper.learn(&a.tell));
            scope.spawn(|| b.keeper.learn(&b.tell));
        });
        a.granted(0, Change::Start);
        let enter = Change::EnterFt {
            shadow: b.me.incarnation,
            flush: Flush::Local,
        };
        let record = a.granted(1, enter);
        assert!(matches!(record.state, State::Ft { .. }));
        Both { a, b }
    }

    /// Nothing is asked of either until both are there.
    fn idle_until(&mut self, what: &str, arrived: impl Fn(&Party) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !(arrived(&self.a) && arrived(&self.b)) {
            assert!(
                Instant::now() < until,
                "{what}: {:?} {:?}",
                self.a.said.lock(),
                self.b.said.lock()
            );
            for side in [&mut self.a, &mut self.b] {
                side.keeper.idle(&side.tell);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn both_sides_change_to_the_witness_configured_and_the_shadow_takes_over_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| Served::new(name, &dir.path().join(name)));
    let mut both = Both::new(&dir.path().join("hosts"), &one.place, None);
    // One side alone changes nothing.
    both.a
        .keeper
        .aim(two.place.clone(), None, &both.a.tell.clone())
        .unwrap();
    for _ in 0..5 {
        both.a.keeper.idle(&both.a.tell);
    }
    assert_eq!(both.a.decides(), "witness one");
    both.b
        .keeper
        .aim(two.place.clone(), None, &both.b.tell.clone())
        .unwrap();
    both.idle_until("the second witness", |side| side.decides() == "witness two");
    one.end();
    // It knows of generation 2 only: the change of arbiter was generation 3.
    let record = both.b.granted(2, Change::TakeSolo);
    assert_eq!(record.generation, Generation(4));
    assert!(matches!(both.a.ask(2, Change::TakeSolo), Heard::Refused(_)));
}

#[test]
fn what_the_old_witness_granted_to_one_side_counts_at_the_new_one_too() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| Served::new(name, &dir.path().join(name)));
    let mut both = Both::new(&dir.path().join("hosts"), &one.place, None);
    // The shadow's side has died, and knows no more than that it was one.
    let alone = both.a.granted(2, Change::TakeSolo);
    one.end();
    for side in [&mut both.a, &mut both.b] {
        side.keeper
            .aim(two.place.clone(), None, &side.tell.clone())
            .unwrap();
    }
    both.idle_until("the second witness", |side| side.decides() == "witness two");
    match both.b.ask(2, Change::TakeSolo) {
        Heard::Refused(refusal) => assert_eq!(refusal.record.unwrap().state, alone.state),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_question_that_nobody_answers_is_answered_by_the_one_that_stands_by() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| Served::new(name, &dir.path().join(name)));
    let Both { mut a, mut b } = Both::new(&dir.path().join("hosts"), &one.place, Some(&two.place));
    let at = one.end();
    // The shadow is lost, its host comes back, and both ask in vain of the first one.
    let record = std::thread::scope(|scope| {
        scope.spawn(|| b.keeper.learn(&b.tell));
        a.granted(2, Change::TakeSolo)
    });
    assert!(matches!(record.state, State::Alone { holder } if holder == a.me));
    // The first one is back with what it knew, and is asked nothing.
    let one = Served::start("one", &dir.path().join("one"), at);
    for side in [&mut a, &mut b] {
        side.keeper.idle(&side.tell);
        assert_eq!(side.decides(), "witness two");
    }
    one.end();
    two.end();
}

#[test]
fn a_wiped_witness_knows_the_pair_again_when_the_other_host_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let one = Served::new("one", &dir.path().join("one"));
    let Both { mut a, b } = Both::new(&dir.path().join("hosts"), &one.place, None);
    a.granted(2, Change::TakeSolo);
    drop(b);
    let at = one.end();
    let one = Served::start("one", &dir.path().join("wiped"), at);
    for _ in 0..20 {
        a.keeper.idle(&a.tell);
        std::thread::sleep(Duration::from_millis(20));
    }
    // What the other host knows is older.
    let mut b = Party::new(Side::B, 3, &dir.path().join("hosts/b"), &one.place, None);
    let enter = Change::EnterFt {
        shadow: b.me.incarnation,
        flush: Flush::Local,
    };
    let record = std::thread::scope(|scope| {
        scope.spawn(|| b.keeper.learn(&b.tell));
        a.granted(3, enter)
    });
    assert_eq!(record.shadow(), Some(b.me));
    one.end();
}
