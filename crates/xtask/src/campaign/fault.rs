//! The faults of a campaign: what breaks, and how it is mended.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::net::Toward;
use testkit::site::{Side, Site};

use testkit::Chance;
use testkit::fuse::{Disk, Harm, Op};
use testkit::thread_stop::StoppedThread;

use super::{VM, cables, silent};
use crate::Error;

/// What a fault may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Nothing but a moment.
    Hidden,
    /// The time it lasts: nobody may answer meanwhile.
    Time,
    /// What the guest had in memory.
    Memory,
}

macro_rules! faults {
    ($($name:ident $text:literal $cost:ident,)*) => {
        /// A fault.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Fault { $(#[doc = $text] $name,)* }

        impl Fault {
            /// All there are.
            pub const ALL: [Fault; [$($text),*].len()] = [$(Fault::$name),*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Fault::$name => $text,)* }
            }

            /// What it may cost.
            pub fn cost(self) -> Cost {
                match self { $(Fault::$name => Cost::$cost,)* }
            }
        }
    };
}

faults! {
    KillPrimary "kill-primary" Hidden,
    KillShadow "kill-shadow" Hidden,
    HostOfPrimary "host-of-primary" Hidden,
    HostOfShadow "host-of-shadow" Hidden,
    SilentPrimary "silent-host-of-primary" Hidden,
    SilentShadow "silent-host-of-shadow" Hidden,
    KillDaemon "kill-axd" Hidden,
    KillDaemonThenPrimary "kill-both-axd-then-primary" Hidden,
    FailoverAndKill "failover-and-kill" Hidden,
    KillTwice "kill-primary-and-its-heir-later" Hidden,
    KillShadowInResync "kill-shadow-in-resync" Hidden,
    StopPrimary "stop-primary-a-while" Hidden,
    StopShadow "stop-shadow-a-while" Hidden,
    LinkUnplugged "link-unplugged" Hidden,
    LinkSilent "link-silent" Hidden,
    LinkForward "link-silent-one-way" Hidden,
    LinkBackward "link-silent-the-other-way" Hidden,
    CableUnplugged "one-cable-unplugged" Hidden,
    CableSilent "one-cable-silent" Hidden,
    CableOneWay "one-cable-silent-one-way" Hidden,
    LinkDelay "link-delay" Hidden,
    LinkJitter "link-jitter" Hidden,
    LinkReorder "link-reorder" Hidden,
    WitnessAway "witness-away" Hidden,
    WitnessAwayHostDies "witness-away-and-host-dies" Time,
    WitnessAwayLinkCut "witness-away-and-link-cut" Time,
    BusinessNetwork "business-network-down" Time,
    ModeThereAndBack "mode-none-and-back" Hidden,
    BothHosts "power-cut-of-both-hosts" Memory,
    PowerOfPrimary "power-cut-of-primary" Hidden,
    PowerOfShadow "power-cut-of-shadow" Hidden,
    PowerOfWitness "power-cut-of-witness" Hidden,
    ShadowSlow "disk-of-shadow-slow" Hidden,
    ShadowHangs "disk-of-shadow-hangs" Hidden,
    WitnessSlow "disk-of-witness-slow-and-primary-dies" Time,
    WitnessWiped "witness-wiped" Hidden,
    StuckEpochs "epoch-thread-stuck" Time,
    PrimaryFails "failing-disk-of-primary" Hidden,
    ShadowFails "failing-disk-of-shadow" Hidden,
    PrimaryFull "full-disk-of-primary" Hidden,
    ShadowFull "full-disk-of-shadow" Hidden,
    SourceInResync "source-dies-in-resync" Memory,
}

impl Fault {
    /// True when it is one of disks that fail by order.
    pub fn needs_disks(self) -> bool {
        ["disk", "power-cut-of-witness"]
            .iter()
            .any(|word| self.name().contains(word))
    }

    /// True when it is one host's silence and nothing else: of these the recovery is told.
    pub fn is_silence_of_a_host(self) -> bool {
        matches!(self, Fault::SilentPrimary | Fault::SilentShadow)
    }

    /// Strikes the guest that runs on `home`, and mends what it broke outside the product.
    ///
    /// # Errors
    /// The equipment's, or that the VM was not to be found.
    pub fn strike(self, home: Side, site: &mut Site, chance: &mut Chance) -> Result<(), Error> {
        let heir = home.other();
        let ms = Duration::from_millis;
        match self {
            Fault::SilentPrimary => silent::a_while(site, home, chance),
            Fault::SilentShadow => silent::a_while(site, heir, chance),
            Fault::KillPrimary => kill_on(site, home),
            Fault::KillShadow => kill_on(site, heir),
            Fault::HostOfPrimary => power_cycle(site, home, ms(chance.below(1500))),
            Fault::HostOfShadow => power_cycle(site, heir, ms(chance.below(1500))),
            Fault::KillDaemon => {
                let side = if chance.below(2) == 0 { home } else { heir };
                kill_axd(site, side)?;
                std::thread::sleep(ms(chance.below(500)));
                Ok(site.start_axd(side)?)
            }
            Fault::KillDaemonThenPrimary => {
                kill_axd(site, home)?;
                kill_axd(site, heir)?;
                signal(site, home, Signal::SIGKILL)?;
                std::thread::sleep(ms(chance.below(500)));
                site.start_axd(home)?;
                Ok(site.start_axd(heir)?)
            }
            Fault::FailoverAndKill => {
                let mut command = site.axvm(heir);
                let asked = command.args(["failover", VM]).spawn();
                let mut asked = asked.map_err(|e| Error::Failed(format!("axvm: {e}")))?;
                std::thread::sleep(ms(chance.below(60)));
                let side = if chance.below(2) == 0 { home } else { heir };
                // It may be over, or the VM between two states: then nothing is killed.
                let _ = signal(site, side, Signal::SIGKILL);
                let _ = asked.wait();
                Ok(())
            }
            Fault::KillTwice => {
                kill_on(site, home)?;
                until(site, heir, &["protected"])?;
                kill_on(site, heir)
            }
            Fault::KillShadowInResync => {
                kill_on(site, heir)?;
                until(site, home, &["syncing", "protected"])?;
                std::thread::sleep(ms(chance.below(100)));
                let _ = signal(site, heir, Signal::SIGKILL);
                Ok(())
            }
            Fault::StopPrimary => stop_a_while(site, home, chance),
            Fault::StopShadow => stop_a_while(site, heir, chance),
            Fault::LinkUnplugged => {
                site.lab.links[0].unplug()?;
                cables::silence(site, &cables::BOTH_WAYS);
                mend_later(site, chance)
            }
            Fault::LinkSilent => {
                cables::cut(site)?;
                mend_later(site, chance)
            }
            Fault::LinkForward => {
                site.lab.links[0].silence(Toward::Second)?;
                cables::silence(site, &[Toward::Second]);
                mend_later(site, chance)
            }
            Fault::LinkBackward => {
                site.lab.links[0].silence(Toward::First)?;
                cables::silence(site, &[Toward::First]);
                mend_later(site, chance)
            }
            Fault::CableUnplugged => {
                site.lab.links[0].unplug()?;
                mend_later(site, chance)
            }
            Fault::CableSilent | Fault::CableOneWay => {
                let ways = match (self, chance.below(2)) {
                    (Fault::CableSilent, _) => &cables::BOTH_WAYS[..],
                    (_, 0) => &cables::BOTH_WAYS[..1],
                    _ => &cables::BOTH_WAYS[1..],
                };
                cables::one_silent(site, ways, chance)?;
                mend_later(site, chance)
            }
            Fault::LinkDelay | Fault::LinkJitter | Fault::LinkReorder => {
                let (delay, jitter) = match self {
                    Fault::LinkDelay => (chance.below(20_000), 0),
                    Fault::LinkJitter => (chance.below(2000), chance.below(20_000)),
                    _ => (0, 100 + chance.below(2000)),
                };
                let micros = Duration::from_micros;
                cables::late(site, micros(delay), micros(jitter))?;
                mend_later(site, chance)
            }
            Fault::WitnessAway => {
                kill_witness(site)?;
                std::thread::sleep(ms(500 + chance.below(1500)));
                Ok(site.start_witness()?)
            }
            Fault::WitnessAwayHostDies => {
                kill_witness(site)?;
                site.host(home).kill_all()?;
                std::thread::sleep(ms(300 + chance.below(1000)));
                site.start_witness()?;
                until(site, heir, &["degraded"])?;
                site.host(home).power_on()?;
                Ok(site.start_axd(home)?)
            }
            Fault::WitnessAwayLinkCut => {
                kill_witness(site)?;
                cables::cut(site)?;
                std::thread::sleep(ms(300 + chance.below(1000)));
                site.start_witness()?;
                mend_later(site, chance)
            }
            Fault::BusinessNetwork => {
                let cable = match home {
                    Side::A => &site.lab.uplinks.a,
                    Side::B => &site.lab.uplinks.b,
                };
                cable.unplug()?;
                std::thread::sleep(ms(200 + chance.below(800)));
                Ok(cable.mend()?)
            }
            Fault::ModeThereAndBack => {
                site.run_axvm(home, &["set-mode", VM, "none"])?;
                std::thread::sleep(ms(chance.below(300)));
                site.run_axvm(heir, &["set-mode", VM, "ft"])?;
                Ok(())
            }
            Fault::BothHosts => {
                let (first, second) = if chance.below(2) == 0 {
                    (home, heir)
                } else {
                    (heir, home)
                };
                site.cut_power(first, chance.below(u64::MAX))?;
                std::thread::sleep(ms(chance.below(500)));
                site.cut_power(second, chance.below(u64::MAX))?;
                for side in [first, second] {
                    site.power_on(side)?;
                    site.start_axd(side)?;
                }
                Ok(())
            }
            Fault::PowerOfPrimary => power_cut(site, home, chance),
            Fault::PowerOfShadow => power_cut(site, heir, chance),
            Fault::PowerOfWitness => {
                site.cut_witness_power(chance.below(u64::MAX))?;
                std::thread::sleep(ms(chance.below(1500)));
                site.power_on_witness()?;
                Ok(site.start_witness()?)
            }
            Fault::ShadowSlow => {
                let late = Harm::Slow(ms(20 + chance.below(180)));
                disk_a_while(site, heir, &[Op::Write, Op::Sync], late, chance)
            }
            Fault::ShadowHangs => {
                disk_a_while(site, heir, &[Op::Write, Op::Sync], Harm::Hang, chance)
            }
            Fault::WitnessSlow => {
                let late = Harm::Slow(ms(50 + chance.below(450)));
                witness_disk(site)?.harm("", &[Op::Sync], late);
                kill_on(site, home)?;
                std::thread::sleep(ms(2000));
                witness_disk(site)?.lift();
                Ok(())
            }
            Fault::WitnessWiped => {
                kill_witness(site)?;
                site.wipe_witness()?;
                let before = registrations(site);
                site.start_witness()?;
                // A host that is lost before both have registered anew leaves the VM held (rule 27).
                let deadline = Instant::now() + super::PATIENCE;
                while registrations(site) == before && Instant::now() < deadline {
                    std::thread::sleep(ms(5));
                }
                Ok(())
            }
            Fault::StuckEpochs => {
                let side = if chance.below(2) == 0 { home } else { heir };
                let dir = site.data_dir(side).join("vms").join(VM);
                let stuck = StoppedThread::anywhere(&dir, "epochs")?;
                std::thread::sleep(ms(100 + chance.below(3000)));
                drop(stuck);
                Ok(())
            }
            Fault::PrimaryFails => disk_a_while(site, home, &Op::ALL, Harm::Error, chance),
            Fault::ShadowFails => disk_a_while(site, heir, &Op::ALL, Harm::Error, chance),
            Fault::PrimaryFull => disk_a_while(site, home, &Op::ALL, Harm::Full, chance),
            Fault::ShadowFull => disk_a_while(site, heir, &Op::ALL, Harm::Full, chance),
            Fault::SourceInResync => {
                kill_on(site, heir)?;
                until(site, home, &["syncing", "protected"])?;
                std::thread::sleep(ms(chance.below(60)));
                site.cut_power(home, chance.below(u64::MAX))?;
                std::thread::sleep(ms(chance.below(500)));
                site.power_on(home)?;
                Ok(site.start_axd(home)?)
            }
        }
    }
}

/// The side that runs the VM.
///
/// # Errors
/// None says so.
pub fn home(site: &Site) -> Result<Side, Error> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        for side in [Side::A, Side::B] {
            if let Ok(Some(home)) = site.primary(side, VM) {
                return Ok(home);
            }
        }
        if Instant::now() > deadline {
            return Err(Error::Failed("no host says that it runs the VM".into()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a host says that the VM is in one of these states.
fn until(site: &Site, ask: Side, wanted: &[&str]) -> Result<(), Error> {
    let deadline = Instant::now() + super::PATIENCE;
    loop {
        let shown = site.show(ask, VM).unwrap_or_default();
        let state = shown["state"].as_str().unwrap_or("");
        if wanted.contains(&state) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::Failed(format!(
                "the VM is not {wanted:?} but {state}\n{}",
                site.logs()
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How often the VM has been registered with the witness.
fn registrations(site: &mut Site) -> usize {
    let log = site
        .witness()
        .map_or(String::new(), |witness| witness.log());
    log.matches("pair registered").count()
}

/// The VM's process on a side, by this machine's process id.
fn process(site: &Site, side: Side) -> Result<Pid, Error> {
    let all = site.host(side).processes();
    let its = all.iter().find(|(_, line)| line.contains(" --spec "));
    its.map(|(pid, _)| Pid::from_raw(*pid as i32))
        .ok_or_else(|| Error::Failed(format!("no process of the VM on host {}", side.name())))
}

fn signal(site: &Site, side: Side, what: Signal) -> Result<Pid, Error> {
    let pid = process(site, side)?;
    kill(pid, what).map_err(|e| Error::Failed(format!("{what} to {pid}: {e}")))?;
    Ok(pid)
}

fn kill_on(site: &Site, side: Side) -> Result<(), Error> {
    signal(site, side, Signal::SIGKILL).map(drop)
}

fn kill_axd(site: &mut Site, side: Side) -> Result<(), Error> {
    match site.axd(side) {
        Some(axd) => Ok(axd.kill()?),
        None => Ok(()),
    }
}

fn kill_witness(site: &mut Site) -> Result<(), Error> {
    match site.witness() {
        Some(witness) => Ok(witness.kill()?),
        None => Ok(()),
    }
}

fn power_cycle(site: &mut Site, side: Side, off: Duration) -> Result<(), Error> {
    site.host(side).kill_all()?;
    std::thread::sleep(off);
    site.host(side).power_on()?;
    Ok(site.start_axd(side)?)
}

/// As [`power_cycle`], and what was not flushed is gone.
fn power_cut(site: &mut Site, side: Side, chance: &mut Chance) -> Result<(), Error> {
    site.cut_power(side, chance.below(u64::MAX))?;
    std::thread::sleep(Duration::from_millis(chance.below(1500)));
    site.power_on(side)?;
    Ok(site.start_axd(side)?)
}

fn witness_disk(site: &Site) -> Result<&Disk, Error> {
    let none = || Error::Failed("the witness's store is on no disk of its own".into());
    site.witness_disk().ok_or_else(none)
}

/// The images of a side are out of order for a while.
fn disk_a_while(
    site: &Site,
    side: Side,
    ops: &[Op],
    harm: Harm,
    chance: &mut Chance,
) -> Result<(), Error> {
    let none = || Error::Failed("the images are on no disk of their own".into());
    let disk = site.disk(side).ok_or_else(none)?;
    disk.harm("images", ops, harm);
    std::thread::sleep(Duration::from_millis(100 + chance.below(3000)));
    disk.lift();
    Ok(())
}

fn stop_a_while(site: &Site, side: Side, chance: &mut Chance) -> Result<(), Error> {
    let pid = signal(site, side, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_millis(20 + chance.below(1500)));
    // It may have been ended meanwhile.
    let _ = kill(pid, Signal::SIGCONT);
    Ok(())
}

fn mend_later(site: &Site, chance: &mut Chance) -> Result<(), Error> {
    std::thread::sleep(Duration::from_millis(50 + chance.below(1500)));
    cables::mend(site)
}
