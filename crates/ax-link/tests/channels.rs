//! Opening channels over real sockets: who gets in, who does not, and what they are told.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_link::handshake::exchange;
use ax_link::{Acceptor, AddressPair, Channel, Connector, LinkError, Preamble, Security};
use ax_wire::hello::{CpuidLeaf, Hello, HostCaps, Machine, Role, VmHello};
use ax_wire::{Version, Versions, WIRE_VERSION};
use common::*;

fn bound(security: Security) -> Acceptor {
    Acceptor::bind(&[local()], security).unwrap()
}

#[test]
fn bytes_cross_both_ways_on_every_channel_and_protection() {
    let (anna, bert) = paired();
    for (mine, theirs) in [(anna, bert), (Security::Plain, Security::Plain)] {
        let acceptor = bound(theirs);
        let connector = connector(&mine, &acceptor);
        for kind in [Channel::Forward, Channel::Backward, Channel::Disk] {
            let preamble = Preamble::of(kind, session(5));
            let (mut a, mut b) = std::thread::scope(|scope| {
                let a = scope.spawn(|| connector.open(preamble).unwrap());
                let incoming = take(&acceptor);
                assert_eq!(*incoming.preamble(), preamble);
                let b = incoming.accept().unwrap();
                (a.join().unwrap(), b)
            });
            // More than any buffer on the way holds.
            let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    a.write_all(&sent).unwrap();
                    a.flush().unwrap();
                });
                let mut got = vec![0; sent.len()];
                b.read_exact(&mut got).unwrap();
                assert!(got == sent);
            });
            b.write_all(b"ack").unwrap();
            b.finish();
            let mut got = Vec::new();
            a.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"ack");
        }
    }
}

/// What a connection speaks when the dialling side's build speaks `theirs`.
fn spoken(theirs: Versions) -> Result<Version, String> {
    let acceptor = bound(Security::Plain);
    let connector = connector(&Security::Plain, &acceptor);
    let preamble = Preamble::rpc().speaking(theirs);
    let dialled = std::thread::spawn(move || connector.open(preamble));
    let accepted = loop {
        if dialled.is_finished() {
            break None;
        }
        if let Some(incoming) = acceptor.accept_timeout(Duration::from_millis(5)).unwrap() {
            break Some(incoming.accept().unwrap());
        }
    };
    let dialled = dialled.join().unwrap().map_err(|e| e.to_string())?;
    assert_eq!(accepted.unwrap().version(), dialled.version());
    Ok(dialled.version())
}

#[test]
fn both_ends_of_a_connection_speak_the_newest_version_that_both_know() {
    let ours = WIRE_VERSION.number();
    let speaks = |oldest, newest| spoken(Versions::new(oldest, newest).unwrap());
    assert_eq!(speaks(ours - 1, ours), Ok(WIRE_VERSION));
    assert_eq!(speaks(ours, ours + 1), Ok(WIRE_VERSION));
    let before = Version::new(ours - 1).unwrap();
    assert_eq!(spoken(Versions::only(before)), Ok(before));
    let why = speaks(ours + 1, ours + 2).unwrap_err();
    let theirs = format!("wire versions {} to {}", ours + 1, ours + 2);
    assert!(why.contains(&theirs), "{why}");
    assert!(why.contains("upgrade the older host"), "{why}");
}

/// What a build of version 1 answers is all that such a listener says.
#[test]
fn a_listener_of_version_1_is_spoken_to_in_version_1_or_not_at_all() {
    let listener = TcpListener::bind(local()).unwrap();
    let to = AddressPair::from(listener.local_addr().unwrap());
    let connector = Connector::new(Security::Plain, vec![to], None);
    let accepting = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut sock, _) = listener.accept().unwrap();
            sock.read_exact(&mut [0; ax_wire::channel::PREAMBLE])
                .unwrap();
            let kind = ax_wire::frame::FrameKind::ChannelAnswer;
            let yes = ax_wire::frame::frame(kind, &[0]).unwrap();
            sock.write_all(&yes).unwrap();
            let _ = sock.read(&mut [0; 1]);
        }
    });
    let opened = |oldest, newest| {
        let versions = Versions::new(oldest, newest).unwrap();
        connector.open(Preamble::rpc().speaking(versions))
    };
    assert_eq!(opened(1, 2).unwrap().version(), Version::FIRST);
    let why = opened(2, 3).unwrap_err().to_string();
    assert!(why.contains("the peer speaks wire version 1"), "{why}");
    accepting.join().unwrap();
}

#[test]
fn a_closer_ends_a_blocked_read() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let (mut a, _b) = channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
    let closer = a.closer().unwrap();
    let reading = std::thread::spawn(move || a.read(&mut [0; 1]).map_err(|e| e.kind()));
    closer.close();
    assert_eq!(
        reading.join().unwrap(),
        Err(std::io::ErrorKind::UnexpectedEof)
    );
}

#[test]
fn a_refusal_tells_why() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let connector = connector(&anna, &acceptor);
    let opening = std::thread::spawn(move || connector.open(Preamble::witness()).unwrap_err());
    take(&acceptor).refuse("this host is no witness");
    let error = opening.join().unwrap();
    assert!(
        matches!(&error, LinkError::Refused { channel: Channel::Witness, reason, .. }
        if reason == "this host is no witness"),
        "{error}"
    );
}

/// Dials `acceptor` as `who`, and says what came of it.
fn fails(who: &Security, acceptor: &Acceptor) -> String {
    connector(who, acceptor)
        .open(Preamble::rpc())
        .unwrap_err()
        .to_string()
}

#[test]
fn an_unpinned_client_is_refused_and_told_to_pair() {
    let (anna, bert) = paired();
    let Security::Mtls(bert_id, _) = &bert else {
        unreachable!()
    };
    let mallory = Security::Mtls(identity("anna"), trusting(&[bert_id]));
    let acceptor = bound(bert.clone());
    let error = fails(&mallory, &acceptor);
    assert!(
        error.contains("does not trust this host") && error.contains("axd pair"),
        "{error}"
    );
    // The real one still gets in.
    channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
}

#[test]
fn an_unpinned_server_is_refused_by_the_client() {
    let (anna, _) = paired();
    let Security::Mtls(anna_id, _) = &anna else {
        unreachable!()
    };
    let impostor = Security::Mtls(identity("bert"), trusting(&[anna_id]));
    let error = fails(&anna, &bound(impostor));
    assert!(error.contains("not trusted here"), "{error}");
}

#[test]
fn a_trusted_peer_at_anothers_address_is_not_taken_for_it() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let paths = acceptor.local_addrs().iter().map(|a| (*a).into()).collect();
    let expecting = Connector::new(anna, paths, Some("carl".parse().unwrap())).timeout(SOON);
    let error = expecting.open(Preamble::rpc()).unwrap_err().to_string();
    assert!(
        error.contains("cannot reach carl") && error.contains("bert answers"),
        "{error}"
    );
}

#[test]
fn trust_withdrawn_ends_with_the_next_connection() {
    let dir = tempfile::tempdir().unwrap();
    let store = ax_link::TrustStore::open(dir.path()).unwrap();
    let (anna, bert) = (identity("anna"), identity("bert"));
    store.add(anna.name(), anna.certificate()).unwrap();
    let acceptor = bound(Security::Mtls(bert.clone(), store));
    let anna = Security::Mtls(anna, trusting(&[&bert]));
    channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
    std::fs::remove_file(dir.path().join("trusted/anna.pem")).unwrap();
    assert!(fails(&anna, &acceptor).contains("does not trust this host"));
}

#[test]
fn plain_and_tls_do_not_mix() {
    let (anna, bert) = paired();
    let error = fails(&Security::Plain, &bound(bert));
    assert!(
        error.contains("closed the connection")
            || error.contains("does not speak")
            || error.contains("not a control message"),
        "{error}"
    );
    let error = fails(&anna, &bound(Security::Plain));
    assert!(error.contains("closed the connection"), "{error}");
}

/// A client that speaks no newer TLS than 1.2 and does not care who answers.
mod tls12 {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub struct Anybody;

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![
                SignatureScheme::ECDSA_NISTP256_SHA256,
                SignatureScheme::RSA_PSS_SHA256,
            ]
        }
    }
}

/// The client's TLS handshake at `version`, without a certificate.
fn foreign_handshake(
    to: SocketAddr,
    version: &'static rustls::SupportedProtocolVersion,
) -> std::io::Result<(usize, usize)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(tls12::Anybody))
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("ax").unwrap();
    let mut conn = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut sock = TcpStream::connect(to).unwrap();
    sock.set_read_timeout(Some(SOON)).unwrap();
    conn.complete_io(&mut sock)?;
    // In TLS 1.3 the server judges the client after the client's last message.
    conn.complete_io(&mut sock)
}

#[test]
fn tls_1_2_and_clients_without_a_certificate_are_refused() {
    let (_, bert) = paired();
    let acceptor = bound(bert);
    let to = acceptor.local_addrs()[0];
    let error = foreign_handshake(to, &rustls::version::TLS12)
        .unwrap_err()
        .to_string();
    assert!(error.contains("ProtocolVersion"), "{error}");
    let error = foreign_handshake(to, &rustls::version::TLS13)
        .unwrap_err()
        .to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
}

#[test]
fn stalled_and_babbling_connections_hold_up_nobody() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let to = acceptor.local_addrs()[0];
    let stalled: Vec<_> = (0..8).map(|_| TcpStream::connect(to).unwrap()).collect();
    let mut babbling = TcpStream::connect(to).unwrap();
    babbling.write_all(&[0xff; 4096]).unwrap();
    channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
    drop(stalled);
}

#[test]
fn a_connection_that_says_nothing_is_closed_at_its_deadline() {
    let listener = TcpListener::bind(local()).unwrap();
    let acceptor =
        Acceptor::new(vec![listener], Security::Plain, Duration::from_millis(50)).unwrap();
    let mut silent = TcpStream::connect(acceptor.local_addrs()[0]).unwrap();
    silent.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_dead_path_does_not_keep_the_live_one_from_being_used() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    // One that refuses, and one that takes connections and never answers.
    let refusing = TcpListener::bind(local()).unwrap().local_addr().unwrap();
    let mute = TcpListener::bind(local()).unwrap();
    let paths: Vec<AddressPair> = [
        refusing,
        mute.local_addr().unwrap(),
        acceptor.local_addrs()[0],
    ]
    .map(AddressPair::from)
    .to_vec();
    let connector = Connector::new(anna, paths, None).timeout(Duration::from_secs(8));
    channel(&connector, &acceptor, Preamble::rpc());
}

#[test]
fn a_local_address_is_used_and_a_foreign_one_is_an_error() {
    let acceptor = bound(Security::Plain);
    let peer = acceptor.local_addrs()[0];
    let from = |local: &str| {
        let path = AddressPair {
            local: Some(local.parse().unwrap()),
            peer,
        };
        Connector::new(Security::Plain, vec![path], None).timeout(SOON)
    };
    let (_dialled, accepted) = channel(&from("127.0.0.7"), &acceptor, Preamble::rpc());
    assert_eq!(accepted.peer_addr().ip().to_string(), "127.0.0.7");
    let error = from("192.0.2.1")
        .open(Preamble::rpc())
        .unwrap_err()
        .to_string();
    assert!(error.contains("assign requested address"), "{error}");
}

#[test]
fn an_unreachable_peer_is_an_error_naming_every_address() {
    let paths: Vec<_> = (0..2)
        .map(|_| TcpListener::bind(local()).unwrap().local_addr().unwrap())
        .collect();
    let connector = Connector::new(
        Security::Plain,
        paths.iter().map(|a| (*a).into()).collect(),
        None,
    );
    let error = connector.open(Preamble::rpc()).unwrap_err().to_string();
    for path in paths {
        assert!(error.contains(&path.to_string()), "{error}");
    }
}

#[test]
fn a_port_in_use_is_an_error_naming_it() {
    let taken = TcpListener::bind(local()).unwrap().local_addr().unwrap();
    let listener = TcpListener::bind(taken).unwrap();
    let error = Acceptor::bind(&[taken], Security::Plain)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&taken.to_string()) && error.contains("in use"),
        "{error}"
    );
    drop(listener);
}

#[test]
fn a_stopped_acceptor_says_so_and_frees_its_port() {
    let acceptor = bound(Security::Plain);
    let addr = acceptor.local_addrs()[0];
    acceptor.stopper().stop();
    assert!(acceptor.accept().is_none());
    drop(acceptor);
    TcpListener::bind(addr).unwrap();
}

fn hello(host: &str, role: Role, versions: Versions) -> Hello {
    let caps = HostCaps {
        cpuid: vec![CpuidLeaf {
            function: 7,
            index: 0,
            eax: 0,
            ebx: 1 << 5,
            ecx: 0,
            edx: 0,
        }],
        msrs: vec![0x10],
        tsc_khz: 1_000_000,
        kvm_caps: Vec::new(),
        page_size: 4096,
        xsave_size: 4096,
    };
    let vm = VmHello {
        session: session(3),
        role,
        machine: Machine {
            memory_bytes: 1 << 28,
            vcpus: 2,
            devices: [1; 32],
        },
    };
    Hello {
        versions,
        ..Hello::ours(host.into(), caps, Some(vm))
    }
}

/// Both ends' outcome of a handshake between anna and bert.
fn shake(mine: &Hello, theirs: &Hello) -> [Result<Version, String>; 2] {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let (mut a, mut b) = channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
    std::thread::scope(|scope| {
        let a = scope.spawn(move || exchange(&mut a, mine, SOON));
        let b = scope.spawn(move || exchange(&mut b, theirs, SOON));
        [a, b].map(|side| {
            side.join()
                .unwrap()
                .map(|(_, n)| n.version)
                .map_err(|e| e.to_string())
        })
    })
}

#[test]
fn a_handshake_of_equal_hosts_agrees() {
    let a = hello("anna", Role::Primary, Versions::ours());
    let b = hello("bert", Role::Shadow, Versions::ours());
    assert_eq!(
        shake(&a, &b),
        [Ok(ax_wire::WIRE_VERSION), Ok(ax_wire::WIRE_VERSION)]
    );
}

#[test]
fn a_version_gap_is_named_on_both_sides() {
    let a = hello("anna", Role::Primary, Versions::new(4, 5).unwrap());
    let b = hello("bert", Role::Shadow, Versions::new(6, 7).unwrap());
    for outcome in shake(&a, &b) {
        let why = outcome.unwrap_err();
        assert!(why.contains("4 to 5") && why.contains("6 to 7"), "{why}");
    }
    let b = hello("bert", Role::Shadow, Versions::new(5, 6).unwrap());
    let five = Version::new(5).unwrap();
    assert_eq!(shake(&a, &b), [Ok(five), Ok(five)]);
}

#[test]
fn a_missing_feature_is_named_on_both_sides() {
    let a = hello("anna", Role::Primary, Versions::ours());
    let mut b = hello("bert", Role::Shadow, Versions::ours());
    b.body.caps.cpuid[0].ebx = 0;
    for outcome in shake(&a, &b) {
        assert!(outcome.unwrap_err().contains("bert lacks CPU feature"));
    }
}

#[test]
fn a_name_the_certificate_does_not_prove_is_refused() {
    let a = hello("anna", Role::Primary, Versions::ours());
    let b = hello("zoe", Role::Shadow, Versions::ours());
    for outcome in shake(&a, &b) {
        assert!(outcome.unwrap_err().contains("certificate"));
    }
}

#[test]
fn a_peer_that_never_says_hello_is_given_up_at_the_deadline() {
    let (anna, bert) = paired();
    let acceptor = bound(bert);
    let (mut a, _b) = channel(&connector(&anna, &acceptor), &acceptor, Preamble::rpc());
    let mine = hello("anna", Role::Primary, Versions::ours());
    let begun = Instant::now();
    let error = exchange(&mut a, &mine, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, LinkError::Deadline { .. }), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(50));
}
