//! The oracles notice what they are for: each meets an honest service and one that cheats.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use testkit::client::incr::{self, IncrReport, IncrSpec};
use testkit::client::ledger::{self, LedgerReport, LedgerSpec};
use testkit::client::nonce::{self, NonceSpec, Violation};
use testkit::client::udp::{self, UdpSpec};
use testkit::client::{Origin, Verdict};

const PATIENCE: Duration = Duration::from_secs(20);

/// What a service does with the next line: its answer, or `None` to hang up.
type Service = Box<dyn FnMut(&str) -> Option<String> + Send>;

/// A service that speaks in lines; connections are served one after the other.
fn line_service(mut service: Service) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            serve(stream.unwrap(), &mut service);
        }
    });
    address
}

fn serve(mut stream: TcpStream, service: &mut Service) {
    stream.set_nodelay(true).unwrap();
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let Ok(line) = line else { return };
        let Some(answer) = service(line.trim_end()) else {
            return;
        };
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Cheat {
    No,
    /// Acknowledged, not kept.
    Lose,
    /// Kept twice.
    Double,
    /// Kept before its predecessor.
    Swap,
    /// Hangs up instead of an answer, the work done.
    HangUp,
}

/// The work on which the service cheats.
const AT: usize = 40;

fn fake_ledger(cheat: Cheat) -> SocketAddr {
    let mut records: Vec<String> = vec!["someone else's".into()];
    let mut appended = 0;
    line_service(Box::new(move |line| {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "APPEND" => {
                appended += 1;
                records.push(rest.into());
                let number = records.len() - 1;
                if appended == AT {
                    match cheat {
                        Cheat::No => {}
                        Cheat::Lose => records[number] = "someone else's".into(),
                        Cheat::Double => records.push(rest.into()),
                        Cheat::Swap => records.swap(number, number - 1),
                        Cheat::HangUp => return None,
                    }
                }
                Some(format!("{number}\n"))
            }
            "READ" => Some(match records.get(rest.parse::<usize>().unwrap()) {
                Some(payload) => format!("{payload}\n"),
                None => "ERR no such record\n".into(),
            }),
            "TAIL" => Some(format!("{}\n", records.len())),
            _ => Some("ERR unknown\n".into()),
        }
    }))
}

fn run_ledger(cheat: Cheat) -> LedgerReport {
    let spec = LedgerSpec::new(fake_ledger(cheat), "run");
    let oracle = ledger::start(&Origin::Here, spec).unwrap();
    oracle.wait_for_answers(2 * AT as u64, PATIENCE).unwrap();
    oracle.stop().unwrap()
}

#[test]
fn an_honest_ledger_is_clean() {
    let report = run_ledger(Cheat::No);
    assert!(report.verdict.is_clean(), "{report:?}");
    assert_eq!(report.records, report.verdict.requests);
    assert_eq!(report.samples.len() as u64, report.verdict.requests);
}

#[test]
fn a_lost_record_is_noticed() {
    let v = run_ledger(Cheat::Lose).verdict;
    assert_eq!(
        (v.lost, v.duplicated, v.reordered, v.connections_broken),
        (1, 0, 0, 0)
    );
}

#[test]
fn a_doubled_record_is_noticed() {
    let v = run_ledger(Cheat::Double).verdict;
    assert_eq!(
        (v.lost, v.duplicated, v.reordered, v.connections_broken),
        (0, 1, 0, 0)
    );
}

#[test]
fn reordered_records_are_noticed() {
    let v = run_ledger(Cheat::Swap).verdict;
    assert_eq!(v.reordered, 1);
    // Neither is under the number it was acknowledged with.
    assert_eq!((v.lost, v.duplicated), (2, 0));
}

#[test]
fn a_broken_ledger_connection_is_counted_and_survived() {
    let report = run_ledger(Cheat::HangUp);
    let v = report.verdict;
    assert_eq!(
        (v.lost, v.duplicated, v.reordered, v.connections_broken),
        (0, 0, 0, 1)
    );
    assert_eq!(
        report.records,
        v.requests + 1,
        "the unanswered one was kept"
    );
}

fn fake_counter(cheat: Cheat) -> SocketAddr {
    let (mut value, mut asked) = (0u64, 0);
    line_service(Box::new(move |line| match line {
        "DEL" => {
            value = 0;
            Some(":1\r\n".into())
        }
        "INCR" => {
            asked += 1;
            value += 1;
            if asked == AT {
                match cheat {
                    Cheat::No | Cheat::Swap => {}
                    Cheat::Lose => value -= 5,
                    Cheat::Double => value += 1,
                    Cheat::HangUp => return None,
                }
            }
            Some(format!(":{value}\r\n"))
        }
        _ => Some(String::new()),
    }))
}

fn run_incr(cheat: Cheat) -> IncrReport {
    let oracle = incr::start(&Origin::Here, IncrSpec::new(fake_counter(cheat), "key")).unwrap();
    oracle.wait_for_answers(2 * AT as u64, PATIENCE).unwrap();
    oracle.stop().unwrap()
}

#[test]
fn an_honest_counter_is_clean() {
    let report = run_incr(Cheat::No);
    assert!(report.verdict.is_clean(), "{report:?}");
    assert_eq!(report.samples.len() as u64, report.verdict.requests);
}

#[test]
fn forgotten_and_repeated_increments_are_noticed() {
    let lost = Verdict {
        requests: 0,
        lost: 5,
        ..Verdict::default()
    };
    assert_eq!(
        Verdict {
            requests: 0,
            ..run_incr(Cheat::Lose).verdict
        },
        lost
    );
    let doubled = Verdict {
        requests: 0,
        duplicated: 1,
        ..Verdict::default()
    };
    assert_eq!(
        Verdict {
            requests: 0,
            ..run_incr(Cheat::Double).verdict
        },
        doubled
    );
}

#[test]
fn a_broken_counter_connection_is_counted_and_the_open_increment_forgiven() {
    let report = run_incr(Cheat::HangUp);
    let broken = Verdict {
        requests: 0,
        connections_broken: 1,
        ..Verdict::default()
    };
    assert_eq!(
        Verdict {
            requests: 0,
            ..report.verdict
        },
        broken
    );
    assert_eq!(report.breaks.len(), 1);
}

#[test]
fn a_service_that_is_not_there_is_a_broken_connection() {
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let oracle = incr::start(&Origin::Here, IncrSpec::new(nobody, "key")).unwrap();
    assert!(
        oracle
            .wait_for_answers(1, Duration::from_millis(100))
            .is_err()
    );
    assert!(oracle.stop().unwrap().verdict.connections_broken > 0);
}

/// Answers each datagram with what `answers` makes of it.
fn udp_service(mut answers: impl FnMut(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            for answer in answers(&buffer[..len]) {
                socket.send_to(&answer, from).unwrap();
            }
        }
    });
    address
}

#[test]
fn udp_echo_counts_what_happens_to_datagrams() {
    let mut n = 0;
    let mut held = Vec::new();
    let target = udp_service(move |request| {
        assert_eq!(request.len(), 64);
        n += 1;
        let whole = request.to_vec();
        match n {
            10 => vec![],
            20 => vec![whole.clone(), whole],
            30 => {
                held = whole;
                vec![]
            }
            31 => vec![whole, std::mem::take(&mut held)],
            40 => vec![whole.iter().map(|b| b ^ 1).collect()],
            50 => vec![whole[..30].to_vec()],
            _ => vec![whole],
        }
    });
    let oracle = udp::start(&Origin::Here, UdpSpec::new(target)).unwrap();
    oracle.wait_for_answers(100, PATIENCE).unwrap();
    let report = oracle.stop().unwrap();
    assert_eq!(
        (report.duplicates, report.out_of_order, report.corrupt),
        (1, 1, 2)
    );
    assert_eq!(report.sent - report.answered, 3);
    assert_eq!(report.samples.len() as u64, report.answered);
}

#[test]
fn a_silence_is_measured() {
    let silence = Duration::from_millis(80);
    let mut n = 0;
    let target = udp_service(move |request| {
        n += 1;
        if n == 50 {
            thread::sleep(silence);
        }
        vec![request.to_vec()]
    });
    let oracle = udp::start(&Origin::Here, UdpSpec::new(target)).unwrap();
    oracle.wait_for_answers(200, PATIENCE).unwrap();
    let report = oracle.stop().unwrap();
    assert!(report.samples.longest_gap(None).length >= silence / 2);
    assert!(
        report.samples.latency().max >= 70_000.0,
        "{:?}",
        report.samples.latency()
    );
}

#[test]
fn an_escaped_uncommitted_reply_is_noticed() {
    let mut counter = 0u64;
    let mut nonce = 1_000u64;
    let mut rolled_back = false;
    let target = udp_service(move |_| {
        counter += 1;
        nonce += 17;
        if counter == 50 && !rolled_back {
            rolled_back = true;
            counter = 48;
        }
        let reply = [counter.to_le_bytes(), nonce.to_le_bytes()].concat();
        // A whole repetition is harmless.
        if counter == 20 {
            vec![reply.clone(), reply]
        } else {
            vec![reply]
        }
    });
    let oracle = nonce::start(&Origin::Here, NonceSpec::new(target)).unwrap();
    oracle.wait_for_answers(100, PATIENCE).unwrap();
    let report = oracle.stop().unwrap();
    assert_eq!((report.repeated, report.malformed), (1, 0));
    let (first, second) = (1_000 + 17 * 48, 1_000 + 17 * 50);
    assert_eq!(
        report.violations,
        [
            Violation {
                counter: 48,
                first,
                second
            },
            Violation {
                counter: 49,
                first: first + 17,
                second: second + 17
            }
        ]
    );
}
