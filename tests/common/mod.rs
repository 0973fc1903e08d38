//! What the tests of the whole product share: a site with one protected guest, and its clients.

#![allow(dead_code, reason = "every test file uses another part of it")]

pub mod talk;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use probe_guest::port;
use testkit::client::{Oracle, Origin, incr, ledger, nonce, udp};
use testkit::net::addr;
use testkit::site::{Side, Site, SiteSpec};

/// The guest of these tests on the business network.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// How long anything may take before it counts as never: these machines are small and busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for an output that was not held to be seen.
pub const QUIET: Duration = Duration::from_millis(1500);

/// One site at a time: these machines have two cores. (Cargo runs test programs one by one.)
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A site that takes a machine busy with other things for what it is: nobody is declared dead for
/// having been slow. For tests in which processes die, which is noticed at once all the same.
pub fn patient() -> SiteSpec {
    SiteSpec {
        extra: "detect_ms = 2000\nstall_ms = 10000\n".into(),
        ..SiteSpec::default()
    }
}

/// A site on whose host a the VM `vm` has been started and is protected.
pub fn protected(spec: SiteSpec, more: &[&str]) -> Site {
    protected_with_disk("vm.img,size=64M", spec, more)
}

/// The same with another disk.
pub fn protected_with_disk(disk: &str, spec: SiteSpec, more: &[&str]) -> Site {
    let site = Site::new(spec).unwrap();
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let mut args = vec!["start", "vm", "--mode", "ft", "--probe"];
    if !more.contains(&"--memory") {
        args.extend(["--memory", "128M"]);
    }
    args.extend(["--disk", disk, "--net", "tap=axtap0", "--cmdline", &cmdline]);
    args.extend(more);
    site.run_axvm(Side::A, &args).unwrap();
    site
}

/// A port of [`GUEST`].
pub fn at(port: u16) -> SocketAddr {
    (GUEST, port).into()
}

/// One of each client, all at work on one guest.
pub struct Clients {
    pub udp: Oracle<udp::UdpReport>,
    pub incr: Oracle<incr::IncrReport>,
    pub ledger: Oracle<ledger::LedgerReport>,
    pub nonce: Oracle<nonce::NonceReport>,
}

impl Clients {
    /// Starts them and waits until each has been answered.
    pub fn start(site: &Site) -> Clients {
        Clients::of(site, GUEST)
    }

    /// [`Clients::start`] for another guest than [`GUEST`].
    pub fn of(site: &Site, guest: Ipv4Addr) -> Clients {
        let at = |port: u16| SocketAddr::from((guest, port));
        let origin = Origin::In(site.lab.client.net().clone());
        // It sends whether it is answered or not: faster than a busy machine's guest can answer, it
        // would fill the tap's queue and push out what the others ask.
        let echo = udp::UdpSpec {
            interval: Duration::from_millis(3),
            ..udp::UdpSpec::new(at(port::ECHO))
        };
        // A ledger outlives its guest's run: the records of these clients are not those of earlier ones.
        static RUN: AtomicU64 = AtomicU64::new(0);
        let run = format!("n{}", RUN.fetch_add(1, Ordering::Relaxed));
        let ledger = ledger::LedgerSpec::new(at(port::LEDGER), run);
        let clients = Clients {
            udp: udp::start(&origin, echo).unwrap(),
            incr: incr::start(&origin, incr::IncrSpec::new(at(port::RESP), "n")).unwrap(),
            ledger: ledger::start(&origin, ledger).unwrap(),
            nonce: nonce::start(&origin, nonce::NonceSpec::new(at(port::NONCE))).unwrap(),
        };
        clients.go_on(200);
        clients
    }

    /// Every client is answered again.
    pub fn go_on(&self, answers: u64) {
        let now = self.answers();
        self.udp
            .wait_for_answers(now[0] + answers, PATIENCE)
            .unwrap();
        self.incr
            .wait_for_answers(now[1] + answers, PATIENCE)
            .unwrap();
        self.ledger
            .wait_for_answers(now[2] + answers / 10, PATIENCE)
            .unwrap();
        // I1 shows only in replies from both sides of a failover: this one must not be idle.
        self.nonce
            .wait_for_answers(now[3] + answers, PATIENCE)
            .unwrap();
    }

    /// Answers of all kinds so far.
    pub fn answers(&self) -> [u64; 4] {
        [
            self.udp.answers(),
            self.incr.answers(),
            self.ledger.answers(),
            self.nonce.answers(),
        ]
    }

    /// Nothing was lost, doubled, reordered or broken, and no uncommitted output escaped (I1).
    pub fn are_content(self) {
        let ledger = self.ledger.stop().unwrap();
        let incr = self.incr.stop().unwrap();
        let nonce = self.nonce.stop().unwrap();
        self.udp.stop().unwrap();
        let verdict = incr.verdict + ledger.verdict;
        assert!(
            verdict.is_clean(),
            "{verdict:?} {:?} {:?}",
            incr.breaks,
            ledger.breaks
        );
        assert!(nonce.violations.is_empty(), "I1: {:?}", nonce.violations);
        assert_eq!(nonce.malformed, 0);
    }
}

/// Waits until `check` holds.
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
