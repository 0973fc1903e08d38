//! One life of a pair under the faults of one seed.

use std::sync::Arc;
use std::time::Duration;

use ax_sync::sim::{self, Here, World};
use ax_wire::Generation;
use ax_wire::record::{Copies, State};

use crate::guest;
use crate::net::Place;
use crate::process::{self, Begin, Input, Order};
use crate::universe::{ARBITER, Universe, Wish, place};

type Failed = Arc<dyn Fn(&str) + Send + Sync>;

/// What may befall a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// The primary's process is killed.
    KillPrimary,
    /// The shadow's process is killed.
    KillShadow,
    /// The primary's host loses power.
    PowerPrimary,
    /// The shadow's host loses power.
    PowerShadow,
    /// Both hosts lose power, one some moment after the other.
    PowerBoth,
    /// Nothing gets through between the hosts.
    Link,
    /// Nothing gets through in one direction.
    LinkOneWay,
    /// The primary's host reaches nobody.
    PrimaryCutOff,
    /// The arbiter dies; its store stays.
    Arbiter,
    /// The arbiter is out of reach in one direction.
    ArbiterOneWay,
    /// A host stands still for a while.
    StandsStill,
    /// A host's disk is slow.
    SlowDisk,
    /// A host's disk hangs for a while.
    HungDisk,
    /// A host's disk fails.
    FailingDisk,
    /// A planned failover.
    Failover,
    /// A planned failover, and a host stands still in the middle of it.
    FailoverStandsStill,
    /// Every connection is reset.
    Reset,
    /// Messages take long, and of different lengths.
    SlowNetwork,
}

const FAULTS: [Fault; 18] = [
    Fault::KillPrimary,
    Fault::KillShadow,
    Fault::PowerPrimary,
    Fault::PowerShadow,
    Fault::PowerBoth,
    Fault::Link,
    Fault::LinkOneWay,
    Fault::PrimaryCutOff,
    Fault::Arbiter,
    Fault::ArbiterOneWay,
    Fault::StandsStill,
    Fault::SlowDisk,
    Fault::HungDisk,
    Fault::FailingDisk,
    Fault::Failover,
    Fault::FailoverStandsStill,
    Fault::Reset,
    Fault::SlowNetwork,
];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::KillPrimary => "primary killed",
            Fault::KillShadow => "shadow killed",
            Fault::PowerPrimary => "power of the primary's host",
            Fault::PowerShadow => "power of the shadow's host",
            Fault::PowerBoth => "power of both hosts",
            Fault::Link => "link cut",
            Fault::LinkOneWay => "link cut one way",
            Fault::PrimaryCutOff => "primary's host cut off",
            Fault::Arbiter => "arbiter killed",
            Fault::ArbiterOneWay => "arbiter out of reach one way",
            Fault::StandsStill => "host stands still",
            Fault::SlowDisk => "slow disk",
            Fault::HungDisk => "hung disk",
            Fault::FailingDisk => "failing disk",
            Fault::Failover => "planned failover",
            Fault::FailoverStandsStill => "planned failover, a host stands still",
            Fault::Reset => "connections reset",
            Fault::SlowNetwork => "slow network",
        }
    }
}

/// What came of a seed in which nothing was wrong.
#[derive(Clone, Debug)]
pub struct Report {
    /// A hash of every turn of the scheduler: equal for equal seeds.
    pub trace: u64,
    /// Turns.
    pub turns: u64,
    /// Simulated time, ms.
    pub simulated_ms: u64,
    /// Answers that reached the outside.
    pub answers: u64,
    /// Faults struck.
    pub faults: Vec<&'static str>,
    /// How often the record changed.
    pub generations: u64,
    /// What happened, line by line.
    pub story: Vec<String>,
}

/// Lives through one seed. `failed` is told what must never be, with the story so far, and must not return.
pub fn live(
    seed: u64,
    wish: Wish,
    failed: impl Fn(&str, &[String]) + Send + Sync + 'static,
) -> Report {
    let universe = Universe::new(seed, wish);
    let of = Arc::clone(&universe);
    let failed: Failed = Arc::new(move |what: &str| failed(what, &of.story.lock()));
    let told = Arc::clone(&failed);
    World::run(seed, move |what| told(what), || main(&universe, &failed))
}

fn main(universe: &Arc<Universe>, failed: &Failed) -> Report {
    let Some(here) = sim::current() else {
        std::process::abort()
    };
    let me = Director {
        universe: Arc::clone(universe),
        failed: Arc::clone(failed),
        here,
        faults: Vec::new(),
    };
    me.live()
}

/// A host's daemon: sees to it that the VM runs, and is protected.
fn attend(universe: &Arc<Universe>, side: usize, failed: &Failed) {
    let Some(here) = sim::current() else { return };
    loop {
        here.sleep(Duration::from_nanos(5_000_000 + here.below(15_000_000)));
        let [mine, other] = [side, 1 - side].map(place);
        let seen = !universe.net.is_cut(mine, other) && !universe.net.is_cut(other, mine);
        let peer = universe.process(1 - side).filter(|_| seen);
        let own = universe.process(side);
        if !*universe.wanted.lock() || own.is_some() {
            continue;
        }
        match peer {
            Some(peer) if process::shown(&peer).wants_shadow => {
                if let Some(shadow) = process::start(universe, side, Begin::Shadow, failed) {
                    peer.inbox.send(mine, Input::ShadowAt(shadow));
                }
            }
            Some(peer) if process::shown(&peer).primary => {}
            // Nobody runs it as far as this host can see: the arbiter knows.
            _ => {
                here.sleep(Duration::from_nanos(here.below(30_000_000)));
                process::start(universe, side, Begin::Boot, failed);
            }
        }
    }
}

struct Director {
    universe: Arc<Universe>,
    failed: Failed,
    here: Here,
    faults: Vec<&'static str>,
}

impl Director {
    fn live(mut self) -> Report {
        self.arbiter();
        for side in [0, 1] {
            self.daemon(side);
        }
        // Some seeds strike before the first protection stands.
        if self.here.below(5) > 0 {
            self.until("the VM is protected at first", Self::is_protected);
        }
        for _ in 0..1 + self.here.below(4) {
            self.pause(120);
            let before = self.universe.record.lock().generation;
            self.strike();
            match self.here.below(4) {
                0 => {
                    self.pause(40);
                    self.strike();
                }
                1 => self.strike_at_the_grant(before),
                _ => {}
            }
            self.pause(250);
            if self.here.below(2) == 0 {
                self.mend();
            }
        }
        self.mend();
        self.until("the VM is protected again", Self::is_protected);
        let (_, before) = self.universe.oracle.answers();
        self.until("the guest answers again", |all| {
            all.oracle.answers().1 > before + 3
        });
        self.stop();
        if self.here.below(3) == 0 {
            // Whichever side starts it has every record that was answered for.
            self.say("started again");
            *self.universe.wanted.lock() = true;
            let (_, before) = self.universe.oracle.answers();
            self.until("the guest answers after a stop", |all| {
                all.oracle.answers().1 > before
            });
            self.stop();
        }
        let (trace, turns) = self.here.trace();
        let universe = &self.universe;
        let generations = universe.record.lock().generation.0;
        Report {
            trace,
            turns,
            simulated_ms: self.here.now() / 1_000_000 - 1_000,
            answers: universe.oracle.answers().0,
            faults: self.faults,
            generations,
            story: universe.story.lock().clone(),
        }
    }

    fn arbiter(&self) {
        let all = Arc::clone(&self.universe);
        let arbitrate = move || all.arbitrate();
        self.spawned(self.here.spawn_in(ARBITER, "arbiter", arbitrate));
    }

    fn daemon(&self, side: usize) {
        let (all, failed) = (Arc::clone(&self.universe), Arc::clone(&self.failed));
        let attend = move || attend(&all, side, &failed);
        let group = Universe::daemon(side);
        self.here.revive(group);
        self.spawned(self.here.spawn_in(group, "axd", attend));
    }

    fn spawned(&self, spawned: std::io::Result<()>) {
        if let Err(error) = spawned {
            (self.failed)(&format!("no thread: {error}"));
        }
    }

    fn is_protected(all: &Universe) -> bool {
        let sides = [0, 1].map(|side| all.process(side));
        let shown = |n: usize| sides[n].as_ref().map(process::shown);
        [0, 1].into_iter().any(|n| {
            shown(n).is_some_and(|s| s.protected) && shown(1 - n).is_some_and(|s| !s.primary)
        })
    }

    fn until(&self, what: &str, done: impl Fn(&Universe) -> bool) {
        let end = self.here.now() + 12_000_000_000;
        while !done(&self.universe) {
            if self.here.now() > end {
                (self.failed)(&format!("never: {what}"));
            }
            self.here.sleep(Duration::from_millis(5));
        }
    }

    fn pause(&self, most_ms: u64) {
        let time = self.here.below(most_ms * 1000);
        self.here.sleep(Duration::from_micros(time));
    }

    /// The side that has the guest, if one has; else any.
    fn holder(&self) -> usize {
        let has = |side: &usize| {
            let process = self.universe.process(*side);
            process.is_some_and(|p| process::shown(&p).primary)
        };
        let any = self.here.below(2) as usize;
        [any, 1 - any].into_iter().find(has).unwrap_or(any)
    }

    fn say(&self, what: &str) {
        self.universe.say(what);
    }

    /// Everything works again.
    fn mend(&self) {
        let all = &self.universe;
        all.net.mend();
        for side in [0, 1] {
            {
                let host = all.hosts[side].lock();
                host.image.slow(Duration::ZERO);
                host.facts.slow(Duration::ZERO);
                for file in [&host.image, &host.facts] {
                    file.hang(0);
                    file.fail(false);
                }
                if host.on {
                    continue;
                }
            }
            all.hosts[side].lock().on = true;
            self.daemon(side);
        }
        if self.here.is_dead(ARBITER) {
            self.here.revive(ARBITER);
            self.arbiter();
        }
    }

    /// Power is gone where the arbiter has just let something happen.
    fn strike_at_the_grant(&mut self, before: Generation) {
        for _ in 0..1_000 {
            let record = *self.universe.record.lock();
            if record.generation > before
                && let Some(holder) = record.holder()
            {
                self.pause(5);
                let side = holder.side as usize;
                self.universe.power_cut(side);
                self.universe
                    .say(&format!("FAULT power at the grant (side {side})"));
                return self.faults.push("power at the grant");
            }
            self.here.sleep(Duration::from_micros(200));
        }
    }

    fn strike(&mut self) {
        let drawn = self.here.below(FAULTS.len() as u64) as usize;
        let only = self.universe.setting.only;
        let fault = only.unwrap_or(FAULTS[drawn % FAULTS.len()]);
        let holder = self.holder();
        self.universe
            .say(&format!("FAULT {} (holder {holder})", fault.name()));
        self.faults.push(fault.name());
        self.befall(fault, holder);
    }

    fn fail_over(&self, holder: usize) {
        if let Some(process) = self.universe.process(holder) {
            process.inbox.tell(Input::Order(Order::Failover));
        }
    }

    /// Cuts both directions between two places.
    fn cut(&self, a: Place, b: Place) {
        self.universe.net.cut(a, b, true);
        self.universe.net.cut(b, a, true);
    }

    fn befall(&self, fault: Fault, holder: usize) {
        let (all, shadow) = (&self.universe, 1 - holder);
        let below = |n| self.here.below(n);
        let any = below(2) as usize;
        let milliseconds = |n| Duration::from_micros(n * 1000);
        let [h, s] = [holder, shadow].map(place);
        match fault {
            Fault::KillPrimary => all.kill(holder),
            Fault::KillShadow => all.kill(shadow),
            Fault::PowerPrimary => all.power_cut(holder),
            Fault::PowerShadow => all.power_cut(shadow),
            Fault::PowerBoth => {
                all.power_cut(any);
                self.pause(60);
                all.power_cut(1 - any);
            }
            Fault::Link => self.cut(h, s),
            Fault::LinkOneWay => {
                let (from, to) = if any == 0 { (h, s) } else { (s, h) };
                all.net.cut(from, to, true);
            }
            Fault::PrimaryCutOff => {
                self.cut(h, s);
                self.cut(h, Place::Arbiter);
            }
            Fault::Arbiter => self.here.kill(ARBITER),
            Fault::ArbiterOneWay => {
                let (from, to) = [(h, Place::Arbiter), (Place::Arbiter, s)][any];
                all.net.cut(from, to, true);
            }
            Fault::StandsStill => all.freeze(any, milliseconds(1 + below(200))),
            Fault::SlowDisk => {
                let host = all.hosts[any].lock();
                let by = milliseconds(1 + below(12));
                host.image.slow(by);
                host.facts.slow(by);
            }
            Fault::HungDisk => {
                let until = self.here.now() + 1_000_000 * (20 + below(600));
                let host = all.hosts[any].lock();
                host.image.hang(until);
                host.facts.hang(until);
            }
            Fault::FailingDisk => {
                let host = all.hosts[any].lock();
                host.image.fail(true);
                // The file of facts may lie on another one.
                host.facts.fail(below(2) == 0);
            }
            Fault::Failover => self.fail_over(holder),
            Fault::FailoverStandsStill => {
                self.fail_over(holder);
                self.pause(12);
                all.freeze(any, milliseconds(20 + below(250)));
            }
            Fault::Reset => {
                let connections = all.connections.lock().clone();
                for connection in &connections {
                    connection.close(0);
                    connection.close(1);
                }
            }
            Fault::SlowNetwork => all.net.delay(20_000 + below(3_000_000), below(8_000_000)),
        }
    }

    /// The VM is stopped in order; its disks are equal where the record says so.
    fn stop(&self) {
        let all = &self.universe;
        *all.wanted.lock() = false;
        let end = self.here.now() + 5_000_000_000;
        loop {
            for side in [0, 1] {
                if let Some(process) = all.process(side).filter(|p| process::shown(p).primary) {
                    process.inbox.tell(Input::Order(Order::Stop));
                }
            }
            self.here.sleep(Duration::from_millis(40));
            if [0, 1].iter().all(|side| all.process(*side).is_none()) {
                break;
            }
            if self.here.now() > end {
                (self.failed)("never: both processes have ended after a stop");
            }
        }
        let record = *all.record.lock();
        let State::Stopped { current, .. } = record.state else {
            return (self.failed)(&format!("stopped, but the record says: {record}"));
        };
        let [a, b] = [0, 1].map(|side| all.hosts[side].lock().image.content());
        let (_, answered) = all.oracle.answers();
        if current == Copies::Both
            && let Some(at) = guest::differ(&a, &b, answered)
        {
            (self.failed)(&format!("I4: both copies are current and differ at {at}"));
        }
    }
}
