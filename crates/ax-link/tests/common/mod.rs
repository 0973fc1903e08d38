//! Two hosts that trust each other, on 127.0.0.1.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod watch;

use std::net::SocketAddr;
use std::time::Duration;

use ax_link::{Acceptor, Connector, Identity, Incoming, Preamble, Security, Stream, TrustStore};
use ax_wire::channel::Channel;
use ax_wire::{Generation, Incarnation, PairId, Session};

pub const SOON: Duration = Duration::from_secs(20);

pub fn local() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub fn identity(name: &str) -> Identity {
    Identity::generate(&name.parse().unwrap()).unwrap()
}

pub fn session(incarnation: u64) -> Session {
    Session {
        pair: PairId([9; 16]),
        generation: Generation(1),
        incarnation: Incarnation(incarnation),
    }
}

pub fn trusting(peers: &[&Identity]) -> TrustStore {
    TrustStore::of(peers.iter().map(|p| (p.name().clone(), p.certificate())))
}

/// Anna's and Bert's security, each trusting the other.
pub fn paired() -> (Security, Security) {
    let (anna, bert) = (identity("anna"), identity("bert"));
    let (of_anna, of_bert) = (trusting(&[&bert]), trusting(&[&anna]));
    (Security::Mtls(anna, of_anna), Security::Mtls(bert, of_bert))
}

pub fn connector(security: &Security, to: &Acceptor) -> Connector {
    Connector::new(
        security.clone(),
        to.local_addrs().iter().map(|a| (*a).into()).collect(),
        None,
    )
    .timeout(SOON)
}

pub fn take(acceptor: &Acceptor) -> Incoming {
    acceptor
        .accept_timeout(SOON)
        .unwrap()
        .expect("somebody connects")
}

/// An open channel's two ends: the dialled, the accepted.
pub fn channel(from: &Connector, to: &Acceptor, preamble: Preamble) -> (Stream, Stream) {
    std::thread::scope(|scope| {
        let dialled = scope.spawn(|| from.open(preamble).unwrap());
        let accepted = take(to).accept().unwrap();
        (dialled.join().unwrap(), accepted)
    })
}

pub fn heartbeat(incarnation: u64) -> Preamble {
    Preamble::of(Channel::Heartbeat, session(incarnation))
}
