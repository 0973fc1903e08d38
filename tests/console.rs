//! Rule 8: a reader of the console sees every byte of the guest once and in order, whatever dies.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use common::{PATIENCE, alone, patient, protected};
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// `axvm console`, typed into and read by a test.
struct Reader {
    axvm: Child,
    typed: ChildStdin,
    from: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Reader {
    fn start(site: &Site, side: Side) -> Reader {
        let mut command = site.axvm(side);
        command.args(["console", "vm"]).stdin(Stdio::piped());
        let mut axvm = command.stdout(Stdio::piped()).spawn().unwrap();
        let (typed, mut output) = (axvm.stdin.take().unwrap(), axvm.stdout.take().unwrap());
        let (to, from) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut bytes) {
                if to.send(bytes[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Reader {
            axvm,
            typed,
            from,
            seen: Vec::new(),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).replace('\r', "")
    }

    /// Reads on until `wanted` has been said.
    fn until(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.text().contains(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(e) => panic!("{e}: no {wanted:?} at the end of {}", self.text()),
            }
        }
    }

    /// The numbered lines so far.
    fn numbers(&self) -> Vec<u64> {
        let text = self.text();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.axvm.kill();
        let _ = self.axvm.wait();
    }
}

/// The guest counts on its console, its host dies in the middle, and nothing is missing.
fn counts_across(kill: impl FnOnce(&mut Site)) {
    let mut site = protected(patient(), &[]);
    // One on the host that lives on, one that comes late to the same bytes.
    let mut reader = Reader::start(&site, Side::B);
    reader.until("probe-guest ready");
    const LINES: u64 = 20_000;
    writeln!(reader.typed, "COUNT {LINES}").unwrap();
    reader.until("\n1000\n");
    kill(&mut site);
    reader.until(&format!("\n{}\n", LINES - 1));
    let all: Vec<u64> = (0..LINES).collect();
    let seen = reader.numbers();
    let odd = seen.iter().zip(&all).position(|(a, b)| a != b);
    assert!(
        seen == all,
        "{} lines, the first that is not in its place: {odd:?}, {:?}",
        seen.len(),
        odd.map(|at| &seen[at.saturating_sub(3)..(at + 3).min(seen.len())])
    );
    let mut late = Reader::start(&site, Side::B);
    late.until(&format!("\n{}\n", LINES - 1));
    let tail = late.numbers();
    assert_eq!(
        tail,
        all[all.len() - tail.len()..],
        "a reader who comes late"
    );
    // Typing reaches the guest where it is now.
    writeln!(reader.typed, "ECHO still-here").unwrap();
    reader.until("still-here\n");
}

#[test]
fn a_reader_sees_every_byte_once_when_the_guests_host_dies() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    counts_across(|site| {
        site.host(Side::A).kill_all().unwrap();
    });
}

#[test]
fn a_reader_sees_every_byte_once_in_a_planned_failover() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    counts_across(|site| {
        site.run_axvm(Side::B, &["failover", "vm"]).unwrap();
    });
}

#[test]
fn a_reader_sees_every_byte_once_when_the_daemons_die_and_come_back() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    counts_across(|site| {
        for side in [Side::A, Side::B] {
            site.axd(side).unwrap().kill().unwrap();
        }
        for side in [Side::A, Side::B] {
            site.start_axd(side).unwrap();
        }
    });
}
