//! What there is besides the processes: two hosts with their disks, the networks, the arbiter, the oracle.

use std::sync::Arc;
use std::time::Duration;

use ax_arbiter::rules;
use ax_sync::sim::{self, Group, Rng};
use ax_wire::PairId;
use ax_wire::record::{
    Arbiter, Change, Copies, Flush, Member, Record, Refusal, Request, WitnessId,
};
use io_barrier::Clock;
use parking_lot::Mutex;

use crate::disk::SimFile;
use crate::guest::DISK;
use crate::net::{Connection, Mailbox, Net, Place};
use crate::oracle::Oracle;
use crate::process::Input;
use crate::seed::Fault;

/// The pair.
pub const PAIR: PairId = PairId([9; 16]);
/// The arbiter's group; hosts' daemons and processes come after it.
pub const ARBITER: Group = Group(1);
const DAEMONS: u32 = 2;
const PROCESSES: u32 = 10;

/// The arbiter, by its identity.
pub fn arbiter() -> Arbiter {
    Arbiter::Witness(WitnessId {
        identity: [7; 16],
        store: [8; 16],
    })
}

/// A running process.
#[derive(Clone)]
pub struct Running {
    /// Its threads.
    pub group: Group,
    /// Who it is.
    pub me: Member,
    /// Where it hears.
    pub inbox: Mailbox<Input>,
    /// What it shows of itself.
    pub shown: Arc<Mutex<Shown>>,
}

/// What a process shows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// It runs the guest alone and has no shadow, nor is one being filled.
    pub wants_shadow: bool,
    /// It runs the guest, fault tolerant.
    pub protected: bool,
    /// It has, or had, the guest: it is no shadow.
    pub primary: bool,
}

/// A host.
pub struct Host {
    /// Its disk's image.
    pub image: Arc<SimFile>,
    /// The file of facts beside it.
    pub facts: Arc<SimFile>,
    /// It has power.
    pub on: bool,
    /// The process on it.
    pub process: Option<Running>,
    /// How much its clock is ahead, and its rate, parts per million.
    ahead: u64,
    ppm: i64,
}

/// A question to the arbiter.
pub struct Question {
    /// From where.
    pub from: Place,
    /// What; none to look only.
    pub request: Option<Request>,
    /// Which one of the asker's.
    pub number: u64,
    /// Where the answer goes.
    pub reply: Mailbox<(u64, Result<Record, Refusal>)>,
}

/// A rule that a process breaks on purpose, so that it is seen that breaking it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Broken {
    /// Rule 24: a shadow does not wait for old permissions to be over, and the primary's never are.
    Permission,
    /// Rule 15: what a FLUSH has answered for is not durable.
    Flush,
    /// Rule 23: a side starts whatever the record says.
    ColdStart,
    /// Rule 6: a promoted side sends nothing again.
    Resend,
}

/// What whoever runs a seed wants of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// A rule to break.
    pub broken: Option<Broken>,
    /// The only fault to strike.
    pub only: Option<Fault>,
}

/// How the VM of one seed is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Every FLUSH is durable on both sides.
    pub sync: bool,
    /// Mode `ha`: the two sides share the disk alone, and outputs leave by a lease.
    pub ha: bool,
    /// What is broken, if anything.
    pub broken: Option<Broken>,
    /// The only fault to strike.
    pub only: Option<Fault>,
}

/// Everything that is shared. Nothing in it is locked across a turn of the scheduler.
pub struct Universe {
    /// How the VM is set up.
    pub setting: Setting,
    /// The networks.
    pub net: Net,
    /// The hosts.
    pub hosts: [Mutex<Host>; 2],
    /// Every connection.
    pub connections: Mutex<Vec<Connection>>,
    /// The judge.
    pub oracle: Oracle,
    /// Where the arbiter is asked.
    pub questions: Mailbox<Question>,
    /// Its store.
    pub record: Mutex<Record>,
    /// The VM is to run.
    pub wanted: Mutex<bool>,
    /// What happened, for whoever looks at a seed.
    pub story: Mutex<Vec<String>>,
    /// Randomness that is no thread's: of the disks.
    rng: Mutex<Rng>,
    born: Mutex<u32>,
}

/// One host's CLOCK_BOOTTIME.
pub struct HostClock {
    ahead: u64,
    ppm: i64,
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        let now = sim::current().map_or(0, |here| here.now());
        let drift = now as i128 * i128::from(self.ppm) / 1_000_000;
        (now as i128 + drift) as u64 + self.ahead
    }
}

/// The place of a side's host.
pub fn place(side: usize) -> Place {
    match side {
        0 => Place::A,
        _ => Place::B,
    }
}

impl Universe {
    /// Two equal hosts, a stopped VM that either may start.
    pub fn new(seed: u64, wish: Wish) -> Arc<Universe> {
        let mut rng = Rng(seed ^ 0xd15c);
        let ha = rng.below(4) == 0;
        let setting = Setting {
            sync: ha || rng.below(3) == 0,
            ha,
            broken: wish.broken,
            only: wish.only,
        };
        let net = Net::new([20_000, 100_000, 400_000][rng.below(3) as usize]);
        let mut host = |n: u64| {
            Mutex::new(Host {
                image: SimFile::new(10 + n, DISK as usize, setting.broken == Some(Broken::Flush)),
                facts: SimFile::new(20 + n, 0, false),
                on: true,
                process: None,
                ahead: rng.below(1 << 40),
                ppm: rng.below(401) as i64 - 200,
            })
        };
        let hosts = [host(0), host(1)];
        Arc::new(Universe {
            setting,
            questions: Mailbox::new(&net, Place::Arbiter),
            net,
            hosts,
            connections: Mutex::default(),
            oracle: Oracle::default(),
            record: Mutex::new(Record::defined(Copies::Both, arbiter())),
            wanted: Mutex::new(true),
            story: Mutex::default(),
            rng: Mutex::new(rng),
            born: Mutex::new(PROCESSES),
        })
    }

    /// True when this rule is broken on purpose.
    pub fn breaks(&self, rule: Broken) -> bool {
        self.setting.broken == Some(rule)
    }

    /// Where FLUSHes are durable.
    pub fn flush(&self) -> Flush {
        match self.setting.sync {
            true => Flush::Both,
            false => Flush::Local,
        }
    }

    /// A line of the story.
    pub fn say(&self, what: &str) {
        let now = sim::current().map_or(0, |here| here.now());
        let line = format!("{:>10.3} ms {what}", (now - 1_000_000_000) as f64 / 1e6);
        self.story.lock().push(line);
    }

    /// The daemon's group of a host.
    pub fn daemon(side: usize) -> Group {
        Group(DAEMONS + side as u32)
    }

    /// A group nobody had.
    pub fn new_group(&self) -> Group {
        let mut born = self.born.lock();
        *born += 1;
        Group(*born)
    }

    /// A side's clock.
    pub fn clock(&self, side: usize) -> Arc<HostClock> {
        let host = self.hosts[side].lock();
        Arc::new(HostClock {
            ahead: host.ahead,
            ppm: host.ppm,
        })
    }

    /// The process of a side.
    pub fn process(&self, side: usize) -> Option<Running> {
        self.hosts[side].lock().process.clone()
    }

    /// A process is gone: by its own end, or killed. Its host closes what it had open.
    pub fn gone(&self, side: usize, group: Group) {
        let process = {
            let mut host = self.hosts[side].lock();
            host.process.take_if(|p| p.group == group)
        };
        let Some(process) = process else { return };
        let mine = self.connections.lock().clone();
        for connection in &mine {
            for end in [0, 1] {
                if connection.owners[end] == group {
                    connection.close(end);
                }
            }
        }
        if let Some(peer) = self.process(1 - side) {
            peer.inbox
                .send(place(side), Input::Died(process.me.incarnation));
        }
    }

    /// SIGKILL.
    pub fn kill(&self, side: usize) {
        let Some(here) = sim::current() else { return };
        if let Some(process) = self.process(side) {
            here.kill(process.group);
            self.gone(side, process.group);
        }
    }

    /// A host loses power. Nobody is told.
    pub fn power_cut(&self, side: usize) {
        let Some(here) = sim::current() else { return };
        here.kill(Self::daemon(side));
        let process = {
            let mut host = self.hosts[side].lock();
            host.on = false;
            host.process.take()
        };
        if let Some(process) = process {
            here.kill(process.group);
        }
        let host = self.hosts[side].lock();
        let mut rng = self.rng.lock();
        host.image.cut(&mut rng);
        host.facts.cut(&mut rng);
    }

    /// Everything on a host stands still.
    pub fn freeze(&self, side: usize, time: Duration) {
        let Some(here) = sim::current() else { return };
        if let Some(process) = self.process(side) {
            here.freeze(process.group, time);
        }
        here.freeze(Self::daemon(side), time);
    }

    /// The arbiter's life: it decides, its decision is durable, it answers.
    pub fn arbitrate(&self) {
        let Some(here) = sim::current() else { return };
        loop {
            let Some(question) = self.questions.receive(u64::MAX) else {
                continue;
            };
            here.sleep(Duration::from_nanos(here.below(1_500_000)));
            let known = *self.record.lock();
            let answer = match &question.request {
                None => Ok(known),
                Some(request) => {
                    let mut request = *request;
                    if self.breaks(Broken::ColdStart) && request.change == Change::Start {
                        request.change = Change::StartByOperator;
                    }
                    rules::decide(arbiter(), Some(&known), &request).granted()
                }
            };
            if let Ok(record) = answer
                && record != known
            {
                here.sleep(Duration::from_nanos(here.below(1_500_000)));
                self.say(&format!("arbiter: {record}"));
                *self.record.lock() = record;
            }
            // It may die between its decision and the answer.
            here.may_yield();
            let late = here.below(3_000_000);
            let reply = (question.number, answer);
            question.reply.send_late(Place::Arbiter, reply, late);
        }
    }
}
