//! What the scenes share: one VM after the other on one site, and chance that can be played again.

use std::time::Duration;

use testkit::client::{Oracle, Origin, nonce};
use testkit::fault::Order;
use testkit::net::addr;
use testkit::site::{Side, Site};

use crate::common::{Clients, GUEST, at, eventually};

/// Long enough for everything that was on its way to have arrived.
pub const SETTLE: Duration = Duration::from_millis(250);

/// Answers that every client must get for the guest to count as going on.
pub const ANSWERS: u64 = 60;

/// SplitMix64: scenes need variety that can be repeated, nothing more.
pub struct Chance(u64);

impl Chance {
    /// Of the round's seed, which is printed.
    fn new(seed: u64) -> Chance {
        println!("AX_SEED={seed}");
        Chance(seed)
    }

    /// Somewhere in `range`.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        range.start + (z ^ (z >> 31)) % (range.end - range.start)
    }
}

/// Plays `round` as often as `AX_ROUNDS` says, each time with another seed.
pub fn rounds(first_seed: u64, mut round: impl FnMut(&mut Chance)) {
    let number = |name: &str, otherwise| {
        let text = std::env::var(name);
        text.map_or(otherwise, |t| t.parse::<u64>().unwrap())
    };
    let seed = number("AX_SEED", first_seed);
    for n in 0..number("AX_ROUNDS", 1) {
        round(&mut Chance::new(seed + n));
    }
}

/// The arguments of `axvm start` for the guest that clients talk to.
fn start_args(vm: &str, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["start", vm, "--mode", "ft", "--probe"]
        .map(Into::into)
        .into();
    if !more.contains(&"--memory") {
        args.extend(["--memory".into(), "64M".into()]);
    }
    args.extend(["--disk".into(), format!("{vm}.img,size=64M")]);
    args.extend(["--net".into(), "tap=axtap0".into()]);
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    args.extend(["--cmdline".into(), cmdline]);
    args.extend(more.iter().map(|arg| (*arg).to_string()));
    args
}

/// One VM's life on a site.
pub struct Scene<'a> {
    pub site: &'a mut Site,
    pub vm: String,
}

impl<'a> Scene<'a> {
    /// A VM that is not started yet.
    pub fn new(site: &'a mut Site, vm: impl Into<String>) -> Scene<'a> {
        let vm = vm.into();
        println!("scene {vm}");
        Scene { site, vm }
    }

    /// `axvm start` on host a, to be waited for by the caller.
    pub fn starting(&self, more: &[&str]) -> std::process::Child {
        let mut command = self.site.axvm(Side::A);
        command
            .args(start_args(&self.vm, more))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    }

    /// Starts it on a side and waits until it is protected.
    pub fn start_on(&self, side: Side, more: &[&str]) {
        let args = start_args(&self.vm, more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.site.run_axvm(side, &args).unwrap();
    }

    /// Starts it on host a with clients at work.
    pub fn with_clients(&self, more: &[&str]) -> Clients {
        self.start_on(Side::A, more);
        Clients::start(self.site)
    }

    /// As [`Site::order`].
    pub fn order(&self, side: Side, order: Order) {
        self.site.order(side, &[order]).unwrap();
    }

    /// Nobody is answered for so long.
    pub fn is_silent(&self, clients: &Clients, long: Duration) {
        let before = clients.answers();
        std::thread::sleep(long);
        assert_eq!(clients.answers(), before, "an output without permission");
    }

    /// Processes of the VM on a side.
    pub fn processes(&self, side: Side) -> usize {
        let spec = format!("/vms/{}/", self.vm);
        let of_vm = |line: &&String| line.contains("ax-vmm") && line.contains(&spec);
        let all = self.site.host(side).processes();
        all.values().filter(of_vm).count()
    }

    /// One process is left of the pair, on `side` if that is told, and runs the guest.
    pub fn one_is_left(&self, side: Option<Side>) -> Side {
        let left = || [Side::A, Side::B].map(|side| self.processes(side));
        eventually("one of the two processes ends", || {
            left().iter().sum::<usize>() == 1
        });
        let winner = if left()[0] == 1 { Side::A } else { Side::B };
        assert!(side.is_none_or(|side| side == winner), "{winner:?} goes on");
        eventually("the one that is left says that it runs the guest", || {
            self.site
                .primary(winner, &self.vm)
                .is_ok_and(|p| p == Some(winner))
        });
        winner
    }

    /// What the VM's report says under `field`, as text.
    pub fn report(&self, side: Side, field: &str) -> String {
        let report = self.site.show(side, &self.vm).unwrap();
        report[field].as_str().unwrap_or_default().to_string()
    }

    /// Last epoch that the process on a side says is committed.
    pub fn epoch(&self, side: Side) -> u64 {
        let report = self.site.show(side, &self.vm).unwrap();
        let all = report["processes"].as_array().unwrap();
        let here = all.iter().find(|p| p["host"] == side.name());
        here.map_or(0, |p| p["status"]["epoch"].as_u64().unwrap_or(0))
    }

    /// The primary's host loses its power and gets it back: another VM may then be started there.
    pub fn power_cycle(&mut self, side: Side) {
        self.site.host(side).power_on().unwrap();
        self.site.start_axd(side).unwrap();
    }

    /// Ends the VM everywhere, so that nothing is left but its images.
    pub fn end(self) {
        for side in [Side::A, Side::B] {
            self.site.order(side, &[]).unwrap();
        }
        let stop = || self.site.run_axvm(Side::A, &["stop", "--force", &self.vm]);
        let gone = || {
            [Side::A, Side::B]
                .iter()
                .all(|side| self.processes(*side) == 0)
        };
        eventually("the VM can be ended", || gone() || stop().is_ok());
        eventually("its processes end", gone);
        eventually("it can be forgotten", || {
            self.site.run_axvm(Side::A, &["undefine", &self.vm]).is_ok()
        });
        self.forget_addresses();
    }

    /// The client's host asks anew where the guest is: pulling its cable empties its ARP table. (A
    /// guest that starts says nothing by itself, so nobody would learn that it is elsewhere now.)
    pub fn forget_addresses(&self) {
        let cable = &self.site.lab.uplinks.client;
        cable.unplug().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        cable.plug_in().unwrap();
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for side in [Side::A, Side::B] {
                let log = self.site.vm_log(side, &self.vm);
                eprintln!("--- {} on {} ---\n{log}--- end ---", self.vm, side.name());
            }
        }
    }
}

/// A nonce client alone: for guests that other clients cannot reach yet, or not for long.
pub fn watcher(site: &Site) -> Oracle<nonce::NonceReport> {
    let origin = Origin::In(site.lab.client.net().clone());
    nonce::start(&origin, nonce::NonceSpec::new(at(probe_guest::port::NONCE))).unwrap()
}
