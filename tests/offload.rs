//! Checksums and large segments that guest and host leave to each other, on the way through epochs: what
//! clients see, and what passes the tap, before and after a failover.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{GUEST, PATIENCE, alone, at, eventually};
use probe_guest::port;
use testkit::net::{Capture, NetNs, addr};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

const IPV4: u16 = 0x0800;
/// Bytes echoed before the host dies, and after: a few windows of the guest's sockets.
const SOME: u64 = 1 << 17;

/// Bytes sent before others have come back: several windows of the guest's sockets.
const AHEAD: u64 = 64 << 10;

/// The `n`-th byte of what is sent.
fn byte(n: u64) -> u8 {
    let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

/// One connection that is never idle: what is sent comes back, every byte of it.
struct Bulk {
    back: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Result<u64, String>>,
    writer: JoinHandle<u64>,
}

impl Bulk {
    fn start(net: &NetNs) -> Bulk {
        let stream = net.run(|| TcpStream::connect(at(port::ECHO)));
        let stream = stream.unwrap().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let (back, stop) = <(Arc<AtomicU64>, Arc<AtomicBool>)>::default();
        let mut input = stream.try_clone().unwrap();
        let (seen, ending) = (Arc::clone(&back), Arc::clone(&stop));
        let so_far = Arc::clone(&back);
        let reader = thread::spawn(move || {
            let (mut at, mut room) = (0, vec![0; 64 << 10]);
            loop {
                let n = input.read(&mut room).map_err(|e| format!("at {at}: {e}"))?;
                if n == 0 {
                    return Ok(at);
                }
                if let Some(wrong) = (0..n).find(|i| room[*i] != byte(at + *i as u64)) {
                    return Err(format!("byte {} is wrong", at + wrong as u64));
                }
                at += n as u64;
                seen.store(at, Ordering::SeqCst);
            }
        });
        let writer = thread::spawn(move || {
            let (mut at, mut output) = (0u64, stream);
            while !ending.load(Ordering::SeqCst) {
                // What is sent at the end must come back yet: not all that the socket would buffer.
                if at > so_far.load(Ordering::SeqCst) + AHEAD {
                    thread::sleep(Duration::from_micros(200));
                    continue;
                }
                let piece: Vec<u8> = (at..at + (8 << 10)).map(byte).collect();
                output.write_all(&piece).unwrap();
                at += piece.len() as u64;
            }
            output.shutdown(Shutdown::Write).unwrap();
            at
        });
        Bulk {
            back,
            stop,
            reader,
            writer,
        }
    }

    fn go_on(&self, bytes: u64) {
        let from = self.back.load(Ordering::SeqCst);
        eventually("bytes come back", || {
            self.reader.is_finished() || self.back.load(Ordering::SeqCst) >= from + bytes
        });
    }

    fn all_came_back(self) {
        self.stop.store(true, Ordering::SeqCst);
        let sent = self.writer.join().unwrap();
        assert_eq!(self.reader.join().unwrap(), Ok(sent));
    }
}

/// Whether segments larger than any frame of the network reach the guest's tap on this host, while bytes go
/// through it.
fn uncut(site: &Site, side: Side, bulk: &Bulk) -> bool {
    let large = |frame: &[u8]| frame.len() > 1514;
    let capture = Capture::start(site.host(side).net(), "axtap0", &[IPV4], large).unwrap();
    bulk.go_on(SOME);
    !capture.stop().unwrap().is_empty()
}

fn host_dies_under(net: &str, words: &str, offload: bool) {
    let site = Site::new(SiteSpec::default()).unwrap();
    let cmdline = format!("ip={GUEST}/{} {words}", addr::LAN_PREFIX);
    let mut args = vec!["start", "vm", "--probe", "--memory", "128M"];
    args.extend(["--net", net, "--cmdline", &cmdline, "--verify-every", "50"]);
    site.run_axvm(Side::A, &args).unwrap();
    let shown = site.run_axvm(Side::A, &["show", "vm"]).unwrap();
    assert_eq!(shown.contains(", offload"), !net.contains("offload=off"));
    let bulk = Bulk::start(site.lab.client.net());
    assert_eq!(uncut(&site, Side::A, &bulk), offload);
    site.host(Side::A).kill_all().unwrap();
    // The heir's tap leaves to the guest what it has agreed to with the tap of the host that died.
    bulk.go_on(SOME);
    assert_eq!(uncut(&site, Side::B, &bulk), offload);
    bulk.all_came_back();
}

#[test]
fn a_host_dies_under_a_transfer_with_offloads_and_every_byte_is_right() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    host_dies_under("tap=axtap0", "", true);
}

/// Offered, but not taken by the guest's driver; and not offered.
#[test]
fn a_host_dies_under_a_transfer_without_offloads_and_every_byte_is_right() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    host_dies_under("tap=axtap0", "net=plain", false);
    host_dies_under("tap=axtap0,offload=off", "", false);
}
