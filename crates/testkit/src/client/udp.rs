//! UDP echo in an open loop: one datagram every interval whether the last was answered or not,
//! so that a pause is seen by every request it delays.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Control, Oracle, Origin, Samples};
use crate::{Error, Result, panic_text};

/// Sequence number and send time, both u64.
const HEADER: usize = 16;
/// How long after the last datagram answers are still waited for.
const LINGER: Duration = Duration::from_millis(300);

/// What to do.
#[derive(Debug, Clone)]
pub struct UdpSpec {
    /// The echo service.
    pub target: SocketAddr,
    /// Time between two datagrams.
    pub interval: Duration,
    /// Size of a datagram, at least 16.
    pub bytes: usize,
}

impl UdpSpec {
    /// 64 bytes every millisecond.
    pub fn new(target: SocketAddr) -> UdpSpec {
        UdpSpec {
            target,
            interval: Duration::from_millis(1),
            bytes: 64,
        }
    }
}

/// What it saw. A lost, doubled or overtaken datagram is no fault: that is UDP.
#[derive(Debug, Clone, Serialize)]
pub struct UdpReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams answered, each counted once.
    pub answered: u64,
    /// Answers seen again.
    pub duplicates: u64,
    /// Answers that came after a later one's.
    pub out_of_order: u64,
    /// Answers that are not what was sent: a fault.
    pub corrupt: u64,
    /// Answer times.
    #[serde(skip)]
    pub samples: Samples,
}

/// Starts the oracle.
///
/// # Errors
/// When no thread can be started.
pub fn start(origin: &Origin, spec: UdpSpec) -> Result<Oracle<UdpReport>> {
    Oracle::start("udp-echo", origin, move |control| run(control, &spec))
}

fn run(control: &Arc<Control>, spec: &UdpSpec) -> Result<UdpReport> {
    let fail = |what: &str| Error::os(format!("UDP echo to {}: {what}", spec.target));
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(fail("bind"))?;
    socket.connect(spec.target).map_err(fail("connect"))?;
    socket
        .set_read_timeout(Some(Duration::from_millis(20)))
        .map_err(fail("set a timeout"))?;
    let receiving = socket.try_clone().map_err(fail("clone the socket"))?;
    let samples = Samples::begin();
    let started = samples.started();
    let done = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let bytes = spec.bytes.max(HEADER);
    thread::scope(|s| {
        let receiver = s.spawn(|| receive(&receiving, control, bytes, samples, &done, &sent));
        send(&socket, control, spec.interval, bytes, started, &sent);
        let stopped = Instant::now();
        let end = stopped + LINGER;
        while Instant::now() < end
            && control.answers.load(Ordering::Relaxed) < sent.load(Ordering::Relaxed)
        {
            thread::sleep(Duration::from_millis(1));
        }
        done.store(true, Ordering::Relaxed);
        let mut report: UdpReport = receiver
            .join()
            .map_err(|p| Error::Panicked(panic_text(&*p)))?;
        // Waiting for answers that were lost is no silence of the service.
        report.samples.end_at(stopped);
        Ok(report)
    })
}

fn datagram(bytes: usize, seq: u64, at: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    out.extend(seq.to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend((HEADER..bytes).map(|i| (i as u64).wrapping_add(seq) as u8));
    out
}

fn send(
    socket: &UdpSocket,
    control: &Control,
    interval: Duration,
    bytes: usize,
    started: Instant,
    sent: &AtomicU64,
) {
    let mut next = Instant::now();
    while !control.stopping() {
        let seq = sent.fetch_add(1, Ordering::Relaxed);
        let at = started.elapsed().as_nanos() as u64;
        // Refused while the service's port or the neighbour is gone: then it is not answered.
        let _ = socket.send(&datagram(bytes, seq, at));
        next += interval;
        let now = Instant::now();
        if next > now {
            thread::sleep(next - now);
        }
    }
}

fn receive(
    socket: &UdpSocket,
    control: &Control,
    bytes: usize,
    samples: Samples,
    done: &AtomicBool,
    sent: &AtomicU64,
) -> UdpReport {
    let mut report = UdpReport {
        sent: 0,
        answered: 0,
        duplicates: 0,
        out_of_order: 0,
        corrupt: 0,
        samples,
    };
    let mut seen: Vec<bool> = Vec::new();
    let mut highest = 0;
    let mut buffer = vec![0; bytes + 1];
    while !done.load(Ordering::Relaxed) {
        // Errors: a timeout, or a refusal the kernel noted for an earlier datagram.
        let Ok(len) = socket.recv(&mut buffer) else {
            continue;
        };
        let now = Instant::now();
        let Some((seq, at)) = parse(&buffer[..len], bytes, sent.load(Ordering::Relaxed)) else {
            report.corrupt += 1;
            continue;
        };
        let index = seq as usize;
        if seen.len() <= index {
            seen.resize(index + 1, false);
        }
        if std::mem::replace(&mut seen[index], true) {
            report.duplicates += 1;
            continue;
        }
        if seq < highest {
            report.out_of_order += 1;
        }
        highest = highest.max(seq);
        report.answered += 1;
        let sent_at = report.samples.started() + Duration::from_nanos(at);
        report.samples.record(sent_at, now);
        control.answered();
    }
    report.sent = sent.load(Ordering::Relaxed);
    report
}

/// Sequence number and send time of an answer that is what was sent; `None` otherwise.
fn parse(answer: &[u8], bytes: usize, sent: u64) -> Option<(u64, u64)> {
    let (seq, rest) = answer.split_first_chunk::<8>()?;
    let (at, _) = rest.split_first_chunk::<8>()?;
    let (seq, at) = (u64::from_le_bytes(*seq), u64::from_le_bytes(*at));
    (seq < sent && answer == datagram(bytes, seq, at)).then_some((seq, at))
}
