//! Pairing as two hosts see it: data directories, sockets, and a token carried by hand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ax_link::pairing::{Before, Offer, PairError, Paired, Token, join, join_as};
use ax_link::{Acceptor, Identity, Preamble, Security, TrustStore};
use ax_wire::{MachineId, Side};
use common::*;

const TEN_MINUTES: Duration = Duration::from_secs(600);

/// A host with a data directory.
struct Host {
    dir: tempfile::TempDir,
    identity: Identity,
    trust: TrustStore,
}

impl Host {
    fn new(name: &str) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(dir.path(), &name.parse().unwrap()).unwrap();
        let trust = TrustStore::open(dir.path()).unwrap();
        Host {
            dir,
            identity,
            trust,
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn offer(&self, valid_for: Duration) -> Offer {
        Offer::open(&self.identity, &self.trust, &[local()], valid_for).unwrap()
    }

    fn join(&self, token: &str) -> Result<String, PairError> {
        let token: Token = token.parse()?;
        join(&self.identity, &self.trust, &token, SOON).map(|p| p.name.to_string())
    }

    fn trusts(&self) -> Vec<String> {
        // As another process would see it.
        let store = TrustStore::open(self.path()).unwrap();
        store.names().iter().map(ToString::to_string).collect()
    }

    /// What a restarted daemon would use.
    fn security(&self) -> Security {
        Security::Mtls(
            Identity::load(self.path()).unwrap(),
            TrustStore::open(self.path()).unwrap(),
        )
    }
}

/// A token with one character of its secret changed, its checksum made right again.
fn wrong_secret(token: &str) -> String {
    use data_encoding::BASE32_NOPAD;
    use sha2::{Digest, Sha256};
    let mut bytes = BASE32_NOPAD
        .decode(token["axpair-".len()..].to_uppercase().as_bytes())
        .unwrap();
    let end = bytes.len() - 4;
    bytes[end - 1] ^= 1;
    let check = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&check[..4]);
    format!("axpair-{}", BASE32_NOPAD.encode(&bytes).to_lowercase())
}

#[test]
fn after_pairing_each_trusts_the_other_and_channels_open() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    assert_eq!(bert.join(&token).unwrap(), "anna");
    let paired = waiting.join().unwrap().unwrap();
    assert_eq!(paired.name.as_str(), "bert");
    assert_eq!(paired.fingerprint, bert.identity.fingerprint());
    assert_eq!(
        (anna.trusts(), bert.trusts()),
        (vec!["bert".into()], vec!["anna".into()])
    );

    let acceptor = Acceptor::bind(&[local()], anna.security()).unwrap();
    let (dialled, accepted) = channel(
        &connector(&bert.security(), &acceptor),
        &acceptor,
        Preamble::rpc(),
    );
    assert_eq!(dialled.peer_name().unwrap().as_str(), "anna");
    assert_eq!(accepted.peer_name().unwrap().as_str(), "bert");
}

#[test]
fn a_token_works_once() {
    let (anna, bert, carl) = (Host::new("anna"), Host::new("bert"), Host::new("carl"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    bert.join(&token).unwrap();
    waiting.join().unwrap().unwrap();
    let error = carl.join(&token).unwrap_err();
    assert!(matches!(error, PairError::NobodyOffers { .. }), "{error}");
    assert!(error.to_string().contains("make a new one"), "{error}");
    assert_eq!(
        (anna.trusts(), carl.trusts()),
        (vec!["bert".into()], vec![])
    );
}

#[test]
fn of_two_who_use_a_token_at_once_one_is_paired() {
    let anna = Host::new("anna");
    let others = [Host::new("bert"), Host::new("carl")];
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    let results: Vec<_> = std::thread::scope(|scope| {
        let joins: Vec<_> = others
            .iter()
            .map(|h| scope.spawn(|| h.join(&token)))
            .collect();
        joins.into_iter().map(|j| j.join().unwrap()).collect()
    });
    let paired = waiting.join().unwrap().unwrap();
    assert_eq!(
        results.iter().filter(|r| r.is_ok()).count(),
        1,
        "{results:?}"
    );
    assert_eq!(anna.trusts(), [paired.name.to_string()]);
}

#[test]
fn an_expired_token_is_refused_and_says_what_to_do() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let offer = anna.offer(Duration::ZERO);
    let token = offer.token().to_string();
    let error = offer.wait().unwrap_err();
    assert!(matches!(error, PairError::Expired), "{error}");
    assert!(
        bert.join(&token)
            .unwrap_err()
            .to_string()
            .contains("expired")
    );
    assert_eq!((anna.trusts(), bert.trusts()), (vec![], vec![]));
}

#[test]
fn wrong_secrets_are_refused_and_three_void_the_token() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    for _ in 0..3 {
        let error = bert.join(&wrong_secret(&token)).unwrap_err();
        assert!(error.to_string().contains("wrong secret"), "{error}");
    }
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, PairError::TooManyTries(3)), "{error}");
    assert!(bert.join(&token).is_err(), "the right one comes too late");
    assert_eq!((anna.trusts(), bert.trusts()), (vec![], vec![]));
}

#[test]
fn a_wrong_secret_does_not_spoil_the_right_one() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    assert!(bert.join(&wrong_secret(&token)).is_err());
    bert.join(&token).unwrap();
    waiting.join().unwrap().unwrap();
}

#[test]
fn who_stalls_or_babbles_at_the_pairing_port_holds_up_nobody() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().clone();
    let waiting = std::thread::spawn(move || offer.wait());
    let stalled = TcpStream::connect(token.addrs()[0]).unwrap();
    let mut babbling = TcpStream::connect(token.addrs()[0]).unwrap();
    std::io::Write::write_all(&mut babbling, b"GET / HTTP/1.0\r\n\r\n").unwrap();
    bert.join(&token.to_string()).unwrap();
    waiting.join().unwrap().unwrap();
    drop((stalled, babbling));
}

#[test]
fn an_impostor_at_the_address_gets_no_secret() {
    let (anna, bert, mallory) = (Host::new("anna"), Host::new("bert"), Host::new("mallory"));
    // Anna's token, but Mallory listens at the address in it.
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let addr = offer.token().addrs()[0];
    drop(offer);
    let theirs = Offer::open(
        &mallory.identity,
        &mallory.trust,
        &[addr],
        Duration::from_secs(3),
    )
    .unwrap();
    let waiting = std::thread::spawn(move || theirs.wait());
    let error = bert.join(&token).unwrap_err().to_string();
    assert!(error.contains("not trusted"), "{error}");
    assert!(matches!(
        waiting.join().unwrap().unwrap_err(),
        PairError::Expired
    ));
    assert_eq!((mallory.trusts(), bert.trusts()), (vec![], vec![]));
}

#[test]
fn equal_names_are_refused_on_both_sides() {
    let (anna, other) = (Host::new("anna"), Host::new("anna"));
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    let error = other.join(&token).unwrap_err().to_string();
    assert!(error.contains("same name"), "{error}");
    assert!(matches!(
        waiting.join().unwrap().unwrap_err(),
        PairError::SameName(_)
    ));
    assert_eq!((anna.trusts(), other.trusts()), (vec![], vec![]));
}

#[test]
fn when_one_side_cannot_store_neither_does() {
    let (anna, bert, old) = (Host::new("anna"), Host::new("bert"), Host::new("anna"));
    bert.trust
        .add(old.identity.name(), old.identity.certificate())
        .unwrap();
    let offer = anna.offer(TEN_MINUTES);
    let token = offer.token().to_string();
    let waiting = std::thread::spawn(move || offer.wait());
    let error = bert.join(&token).unwrap_err().to_string();
    assert!(error.contains("already trusted"), "{error}");
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, PairError::Unfinished { .. }), "{error}");
    assert_eq!(anna.trusts(), [""; 0]);
}

#[test]
fn an_address_nobody_can_dial_is_refused() {
    let anna = Host::new("anna");
    let any = "0.0.0.0:0".parse().unwrap();
    let error = Offer::open(&anna.identity, &anna.trust, &[any], TEN_MINUTES)
        .err()
        .unwrap();
    assert!(error.to_string().contains("0.0.0.0"), "{error}");
}

/// Each does what it has to when it knows who the other is, and before it trusts it.
#[test]
fn what_is_to_be_done_before_a_peer_is_trusted_comes_first_or_nobody_is_trusted() {
    let (anna, bert) = (Host::new("anna"), Host::new("bert"));
    let machine = MachineId([7; 16]);
    for fails in [true, false] {
        let trust = anna.trust.clone();
        let first: Before = Arc::new(move |new: &Paired| {
            assert_eq!((new.name.as_str(), new.machine), ("bert", Some(machine)));
            assert!(trust.names().is_empty(), "not trusted yet");
            match fails {
                true => Err("the arbiter is away".to_owned()),
                false => Ok(Some(Side::B)),
            }
        });
        let offer = anna.offer(TEN_MINUTES).doing(None, first);
        let token: Token = offer.token().to_string().parse().unwrap();
        let waiting = std::thread::spawn(move || offer.wait());
        let trust = bert.trust.clone();
        let second: Before = Arc::new(move |other: &Paired| {
            assert_eq!(other.side, Some(Side::B));
            assert!(trust.names().is_empty(), "not trusted yet");
            Ok(None)
        });
        let joined = join_as(
            &bert.identity,
            &bert.trust,
            &token,
            SOON,
            Some(machine),
            &second,
        );
        let offered = waiting.join().unwrap();
        if fails {
            let why = joined.unwrap_err().to_string();
            assert!(why.contains("the arbiter is away"), "{why}");
            offered.unwrap_err();
            assert_eq!((anna.trusts(), bert.trusts()), (vec![], vec![]));
        } else {
            offered.unwrap();
            assert_eq!(joined.unwrap().side, Some(Side::B));
            assert_eq!((anna.trusts().len(), bert.trusts().len()), (1, 1));
        }
    }
}
