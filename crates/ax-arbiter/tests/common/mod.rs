//! A witness on a real socket, and the two sides that ask it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ax_arbiter::rules::{Registered, Registration};
use ax_arbiter::witness::WitnessError;
use ax_arbiter::{Client, Witness};
use ax_link::accept::Stopper;
use ax_link::{Acceptor, Connector, Security};
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Flush, Member, Record, Request, State, WitnessId,
};
use ax_wire::{Generation, Incarnation, PairId, Side};

pub const A: Member = Member {
    side: Side::A,
    incarnation: Incarnation(0xa),
};
pub const B: Member = Member {
    side: Side::B,
    incarnation: Incarnation(0xb),
};

/// Far longer than any question takes: a test that needs it all has failed.
pub fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub fn pair(n: u64) -> PairId {
    let mut id = [0x70; 16];
    id[..8].copy_from_slice(&n.to_le_bytes());
    PairId(id)
}

/// A witness served by a thread of this process.
pub struct Served {
    pub address: SocketAddr,
    pub id: WitnessId,
    stop: Stopper,
    thread: Option<JoinHandle<Result<(), WitnessError>>>,
}

impl Served {
    pub fn start(dir: &Path, address: SocketAddr, security: Security) -> Served {
        let witness = Witness::open(dir).unwrap();
        let id = witness.id();
        let acceptor = Acceptor::bind(&[address], security).unwrap();
        let (address, stop) = (acceptor.local_addrs()[0], acceptor.stopper());
        let thread = Some(std::thread::spawn(move || witness.serve(&acceptor)));
        Served {
            address,
            id,
            stop,
            thread,
        }
    }

    pub fn plain(dir: &Path) -> Served {
        Served::start(dir, "127.0.0.1:0".parse().unwrap(), Security::Plain)
    }

    /// Ends it; the store is closed and the port free.
    pub fn stop(mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

pub fn client(address: SocketAddr) -> Client {
    Client::new(
        Connector::new(Security::Plain, vec![address.into()], None),
        None,
    )
    .unwrap()
}

pub fn request(pair: PairId, caller: Member, from: Generation, change: Change) -> Request {
    Request {
        pair,
        caller,
        machine: None,
        from,
        change,
    }
}

pub fn enter_ft(shadow: Member) -> Change {
    Change::EnterFt {
        shadow: shadow.incarnation,
        flush: Flush::Local,
    }
}

/// The granted record, or the test fails.
#[track_caller]
pub fn granted(decision: Decision) -> Record {
    decision.granted().unwrap()
}

pub fn register(client: &Client, pair: PairId, side: Side, record: Record) -> Registered {
    client
        .register(
            Registration {
                pair,
                side,
                machine: None,
                record,
            },
            false,
            deadline(),
        )
        .unwrap()
}

/// Defines a pair, both sides registering, and starts it on A.
pub fn start_on_a(client: &Client, pair: PairId) -> Record {
    let defined = Record::defined(Copies::Both, Arbiter::Operator);
    assert_eq!(
        register(client, pair, Side::A, defined),
        Registered::Waiting
    );
    let Registered::Known(known) = register(client, pair, Side::B, defined) else {
        panic!("both sides have registered");
    };
    granted(
        client
            .ask(
                &request(pair, A, known.generation, Change::Start),
                deadline(),
            )
            .unwrap(),
    )
}

/// The holder of `record` in FT with the other of [`A`] and [`B`].
pub fn protect(client: &Client, pair: PairId, record: Record) -> Record {
    let holder = record.holder().unwrap();
    let shadow = if holder == A { B } else { A };
    let ask = request(pair, holder, record.generation, enter_ft(shadow));
    let record = granted(client.ask(&ask, deadline()).unwrap());
    assert!(matches!(record.state, State::Ft { .. }));
    record
}
