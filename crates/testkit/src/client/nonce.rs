//! The oracle of I1 (no output of an epoch leaves before it is committed).
//!
//! Every reply of the nonce service carries a counter from guest memory and a fresh nonce. A
//! guest rolled back to a committed epoch counts again from there, with new nonces: a counter
//! value seen with two different nonces was sent once from an epoch that no longer exists.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Control, Oracle, Origin, Samples};
use crate::{Error, Result, panic_text};

/// What to do.
#[derive(Debug, Clone)]
pub struct NonceSpec {
    /// The nonce service.
    pub target: SocketAddr,
    /// Time between two requests.
    pub interval: Duration,
}

impl NonceSpec {
    /// A request every millisecond.
    pub fn new(target: SocketAddr) -> NonceSpec {
        NonceSpec {
            target,
            interval: Duration::from_millis(1),
        }
    }
}

/// What it saw.
#[derive(Debug, Clone, Serialize)]
pub struct NonceReport {
    /// Replies.
    pub replies: u64,
    /// Replies seen again, whole: harmless.
    pub repeated: u64,
    /// Counters seen with two nonces, with both: each violates I1.
    pub violations: Vec<Violation>,
    /// Replies of the wrong size.
    pub malformed: u64,
    /// The highest counter seen.
    pub highest: u64,
    /// Reply times; a reply does not say which request it answers, so `sent` is when it came.
    #[serde(skip)]
    pub samples: Samples,
}

/// A counter that was sent twice with different nonces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The counter.
    pub counter: u64,
    /// The nonce that came with it first.
    pub first: u64,
    /// The other nonce.
    pub second: u64,
}

/// Starts the oracle.
///
/// # Errors
/// When no thread can be started.
pub fn start(origin: &Origin, spec: NonceSpec) -> Result<Oracle<NonceReport>> {
    Oracle::start("nonce", origin, move |control| run(control, &spec))
}

fn run(control: &Control, spec: &NonceSpec) -> Result<NonceReport> {
    let fail = |what: &str| Error::os(format!("nonce service at {}: {what}", spec.target));
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(fail("bind"))?;
    socket.connect(spec.target).map_err(fail("connect"))?;
    socket
        .set_read_timeout(Some(Duration::from_millis(20)))
        .map_err(fail("set a timeout"))?;
    let asking = socket.try_clone().map_err(fail("clone the socket"))?;
    thread::scope(|s| {
        let receiver = s.spawn(|| receive(&socket, control));
        let mut next = Instant::now();
        while !control.stopping() {
            // Refused while nobody listens: then there is no reply.
            let _ = asking.send(b"nonce?");
            next += spec.interval;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        receiver
            .join()
            .map_err(|p| Error::Panicked(panic_text(&*p)))
    })
}

fn receive(socket: &UdpSocket, control: &Control) -> NonceReport {
    let mut report = NonceReport {
        replies: 0,
        repeated: 0,
        violations: Vec::new(),
        malformed: 0,
        highest: 0,
        samples: Samples::begin(),
    };
    let mut nonces = HashMap::new();
    let mut buffer = [0; 64];
    loop {
        match socket.recv(&mut buffer) {
            Ok(len) => {
                let now = Instant::now();
                report.samples.record(now, now);
                report.note(&buffer[..len], &mut nonces);
                control.answered();
            }
            // Nothing for a while, after the last request: that was all.
            Err(_) if control.stopping() => break,
            Err(_) => {}
        }
    }
    report.samples.end();
    report
}

impl NonceReport {
    fn note(&mut self, reply: &[u8], nonces: &mut HashMap<u64, u64>) {
        self.replies += 1;
        let Ok(reply) = <&[u8; 16]>::try_from(reply) else {
            self.malformed += 1;
            return;
        };
        let value = u128::from_le_bytes(*reply);
        let (counter, nonce) = (value as u64, (value >> 64) as u64);
        self.highest = self.highest.max(counter);
        match nonces.insert(counter, nonce) {
            None => {}
            Some(first) if first == nonce => self.repeated += 1,
            Some(first) => self.violations.push(Violation {
                counter,
                first,
                second: nonce,
            }),
        }
    }
}
