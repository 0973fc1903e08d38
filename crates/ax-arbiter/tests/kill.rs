//! A witness killed at any moment: nothing it granted is lost, nothing is invented.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod common;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ax_arbiter::{Client, Witness};
use ax_link::{Acceptor, Security};
use ax_wire::record::{Change, Record, Request};
use common::*;

const DIR: &str = "AX_TEST_WITNESS_DIR";
const PAIRS: u64 = 4;
const ROUNDS: u64 = 60;

/// Not a test: the process that the test below kills.
#[test]
#[ignore = "the witness process that the test here starts and kills"]
fn witness_process() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let witness = Witness::open(Path::new(&dir)).unwrap();
    let acceptor = Acceptor::bind(&["127.0.0.1:0".parse().unwrap()], Security::Plain).unwrap();
    println!("\nLISTENING {}", acceptor.local_addrs()[0]);
    witness.serve(&acceptor).unwrap();
}

fn start(dir: &Path) -> (Child, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["witness_process", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("LISTENING ").map(|a| a.parse().unwrap()))
        .expect("the witness process ended before it listened");
    (child, address)
}

/// What one side of one pair knows: the last grant it was told, and what it has asked since.
struct Knows {
    told: Record,
    asked: Option<Request>,
}

impl Knows {
    fn next(&self, n: u64) -> Request {
        let change = if self.told.shadow().is_some() {
            Change::TakeSolo
        } else {
            enter_ft(B)
        };
        request(pair(n), A, self.told.generation, change)
    }

    /// I4, I5 of the records: after a kill the witness knows what it told, or that plus exactly
    /// the question it left unanswered.
    fn check(&mut self, client: &Client, n: u64, round: u64) {
        let found = client.look(pair(n), deadline()).unwrap();
        let found = found.unwrap_or_else(|| panic!("round {round}: pair {n} is lost"));
        if found == self.told {
            return;
        }
        let asked = self.asked.unwrap_or_else(|| {
            panic!(
                "round {round}: pair {n} was {}, is {found}: nobody asked",
                self.told
            )
        });
        // Told again, it is the same record: nothing was invented.
        let again = granted(client.ask(&asked, deadline()).unwrap());
        assert_eq!(again, found, "round {round}: pair {n}");
        assert_eq!(
            found.generation.0,
            self.told.generation.0 + 1,
            "round {round}: pair {n}"
        );
        self.told = found;
    }

    /// Asks for one change after the other until the witness is gone.
    fn ask_on(&mut self, client: &Client, n: u64, gone: &AtomicBool) -> u64 {
        let mut answered = 0;
        while !gone.load(Ordering::SeqCst) {
            let ask = self.next(n);
            self.asked = Some(ask);
            let Ok(decision) = client.ask(&ask, Instant::now() + Duration::from_millis(100)) else {
                continue;
            };
            self.told = granted(decision);
            self.asked = None;
            answered += 1;
        }
        answered
    }
}

#[test]
fn a_killed_witness_forgets_nothing_it_granted_and_invents_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut sides: Vec<Knows> = Vec::new();
    let (mut answered, mut unanswered) = (0, 0);
    for round in 0..ROUNDS {
        let (mut child, address) = start(dir.path());
        let client = client(address);
        if round == 0 {
            let knows = |n| Knows {
                told: start_on_a(&client, pair(n)),
                asked: None,
            };
            sides.extend((0..PAIRS).map(knows));
        }
        for (n, side) in (0..).zip(&mut sides) {
            side.check(&client, n, round);
        }
        // A spread of moments: from the first commits to well into the run.
        let moment = Duration::from_micros(500 + round * 7919 % 23_000);
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&mut sides)
                .map(|(n, side)| {
                    let (gone, client) = (&gone, &client);
                    scope.spawn(move || side.ask_on(client, n, gone))
                })
                .collect();
            std::thread::sleep(moment);
            child.kill().unwrap();
            child.wait().unwrap();
            gone.store(true, Ordering::SeqCst);
            answered += threads.into_iter().map(|t| t.join().unwrap()).sum::<u64>();
        });
        unanswered += sides.iter().filter(|side| side.asked.is_some()).count();
    }
    println!("{ROUNDS} kills, {answered} grants told, {unanswered} questions left unanswered");
    assert!(answered > 0 && unanswered > 0);
}
