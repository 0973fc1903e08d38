//! QEMU's COLO (docs/COLO-FT.txt, docs/block-replication.txt of QEMU 7.2): a primary on host a, a secondary
//! on host b that runs the same guest, and checkpoints from one to the other.
//!
//! Two ways to hold the primary's output: colo-compare lets out what both guests say alike and asks for a
//! checkpoint where they differ; filter-buffer holds all of it until the next checkpoint is committed.
//! COLO has no heartbeat and filter-buffer nobody who lets go at a checkpoint: QEMU leaves both to a manager.
//! That is the [`Agent`] here, and it is as quick as one can be.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::net::addr::{link_a, link_b};
use testkit::product::Daemon;

use super::qemu::{PROGRAM, Place, card, machine};
use super::qmp::{Message, Qmp};
use super::ram::RamFolder;
use super::{Guest, PATIENCE};
use crate::Error;

/// How the primary's output is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// By colo-compare.
    Compare,
    /// By filter-buffer.
    Buffer,
}

/// What a pair is to be like.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Who holds the output.
    pub held: Held,
    /// x-checkpoint-delay, milliseconds.
    pub delay: u32,
}

/// While the pair settles: the first checkpoint copies all memory and takes seconds.
const SETTLING_DELAY: u32 = 100;
/// Longest a packet waits for its twin, and how often that is looked at, in milliseconds. By default both are
/// 3000, and a packet that only one of the guests got stops a connection for up to 6 s.
const COMPARE: &str = "compare_timeout=200,expired_scan_cycle=100";

/// A pair under checkpoints.
pub struct Pair {
    agent: Agent,
    _primary: Daemon,
    _secondary: Daemon,
    /// Where it runs.
    pub place: Place,
    _ram: RamFolder,
}

impl Pair {
    /// Starts both sides, and returns once checkpoints are made.
    pub fn start(guest: &Guest, setting: Setting) -> Result<Pair, Error> {
        let ram = RamFolder::new(&std::env::temp_dir().join("ram"))?;
        let place = Place::new()?;
        let disks = Disks {
            primary: place.raw_disk("primary.img")?,
            secondary: place.raw_disk("secondary.img")?,
            active: ram_file("active.qcow2"),
            hidden: ram_file("hidden.qcow2"),
        };
        place.qcow2_disks(&[disks.active.clone(), disks.hidden.clone()])?;
        let sockets = place.file("compare").display().to_string();
        let words = primary(setting, &disks, &sockets);
        let first = place.start(&place.lab.a, guest, &words)?;
        let mut a = place.qmp("a")?;
        let second = place.start(&place.lab.b, guest, &secondary(setting, &disks))?;
        let mut b = place.qmp("b")?;
        let begun = begin(&place, setting, &mut a, &mut b);
        let agent = begun.map_err(|e| place.with_log("a", place.with_log("b", e)))?;
        Ok(Pair {
            agent,
            _primary: first,
            _secondary: second,
            place,
            _ram: ram,
        })
    }

    /// From now on the secondary takes over as soon as the primary's monitor is gone.
    pub fn expect_failover(&self) {
        self.agent.armed.store(true, Ordering::Release);
    }

    /// How long the primary's guest stood still at each checkpoint since the last time this was asked,
    /// milliseconds.
    pub fn stops(&self) -> Vec<f64> {
        std::mem::take(
            &mut *self
                .agent
                .stops
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Why the failover did not work, once the agent has ended.
    pub fn failover_error(&mut self) -> Option<Error> {
        let thread = self.agent.thread.take_if(|thread| thread.is_finished())?;
        match thread.join() {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(self.place.with_log("b", e)),
            Err(_) => Some(Error::Failed("the agent of the failover panicked".into())),
        }
    }

    /// How a pair is set, for the reader.
    pub fn settings(guest: &Guest, setting: Setting) -> Vec<String> {
        let disks = Disks {
            primary: "primary.img".into(),
            secondary: "secondary.img".into(),
            active: "active.qcow2".into(),
            hidden: "hidden.qcow2".into(),
        };
        let line = |role: &str, words: Vec<String>| {
            format!(
                "{role}: {PROGRAM} {} {}",
                machine(guest).join(" "),
                words.join(" ")
            )
        };
        let delay = setting.delay;
        let mut lines = vec![
            line("primary", primary(setting, &disks, "compare")),
            line("secondary", secondary(setting, &disks)),
            format!(
                "x-colo on, x-checkpoint-delay {delay} ms (set once the first, long checkpoint is over), \
                 max-bandwidth unlimited; raw images, the secondary's active and hidden disks in memory; no TLS"
            ),
            "failover: nbd-server-stop, x-colo-lost-heartbeat, filters removed, announce-self, by an agent \
             that sees the primary's socket close at once"
                .into(),
        ];
        if setting.held == Held::Buffer {
            lines.push(
                "QEMU 7.2 has checkpoints only with COLO: the secondary runs, but its output goes nowhere. \
                 filter-buffer's timer knows of no checkpoint, so the interval is an hour and the agent moves the \
                 output: at STOP from the filter of the epoch to the one that holds it, at RESUME, when the \
                 checkpoint is committed, out (status off, on)"
                    .into(),
            );
        }
        lines
    }
}

fn ram_file(name: &str) -> PathBuf {
    std::env::temp_dir().join("ram").join(name)
}

struct Disks {
    primary: PathBuf,
    secondary: PathBuf,
    active: PathBuf,
    hidden: PathBuf,
}

fn words(list: Vec<[String; 2]>) -> Vec<String> {
    list.into_iter().flatten().collect()
}

fn chardev(text: String) -> [String; 2] {
    ["-chardev".into(), text]
}

fn object(text: impl Into<String>) -> [String; 2] {
    ["-object".into(), text.into()]
}

fn primary(setting: Setting, disks: &Disks, sockets: &str) -> Vec<String> {
    let ip = link_a(0);
    let server = "server=on,wait=off";
    let mut all = card();
    all.extend(words(match setting.held {
        Held::Compare => vec![
            chardev(format!("socket,id=mirror0,host={ip},port=9003,{server}")),
            chardev(format!("socket,id=compare1,host={ip},port=9004,{server}")),
            chardev(format!("socket,id=compare0,path={sockets}.in,{server}")),
            chardev(format!("socket,id=compare0-0,path={sockets}.in")),
            chardev(format!("socket,id=compare_out,path={sockets}.out,{server}")),
            chardev(format!("socket,id=compare_out0,path={sockets}.out")),
            object("filter-mirror,id=m0,netdev=hn0,queue=tx,outdev=mirror0"),
            object("filter-redirector,netdev=hn0,id=redire0,queue=rx,indev=compare_out"),
            object("filter-redirector,netdev=hn0,id=redire1,queue=rx,outdev=compare0"),
            object("iothread,id=iothread1"),
            object(format!(
                "colo-compare,id=comp0,primary_in=compare0-0,secondary_in=compare1,\
                 outdev=compare_out0,iothread=iothread1,{COMPARE}"
            )),
        ],
        // The guest's output comes to the last one first.
        Held::Buffer => vec![
            object("filter-buffer,id=held,netdev=hn0,queue=rx,interval=3600000000"),
            object("filter-buffer,id=epoch,netdev=hn0,queue=rx,interval=3600000000"),
        ],
    }));
    let image = disks.primary.display();
    all.extend(words(vec![
        [
            "-drive".into(),
            format!(
                "if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,\
                 children.0.file.filename={image},children.0.driver=raw"
            ),
        ],
        [
            "-device".into(),
            "virtio-blk-device,drive=colo-disk0".into(),
        ],
    ]));
    all.push("-S".into());
    all
}

fn secondary(setting: Setting, disks: &Disks) -> Vec<String> {
    let (ip, own) = (link_a(0), link_b(0));
    let mut all = card();
    all.extend(words(match setting.held {
        Held::Compare => vec![
            chardev(format!("socket,id=red0,host={ip},port=9003,reconnect=1")),
            chardev(format!("socket,id=red1,host={ip},port=9004,reconnect=1")),
            object("filter-redirector,id=f1,netdev=hn0,queue=tx,indev=red0"),
            object("filter-redirector,id=f2,netdev=hn0,queue=rx,outdev=red1"),
            object("filter-rewriter,id=rew0,netdev=hn0,queue=all"),
        ],
        Held::Buffer => vec![
            chardev("null,id=red1".into()),
            object("filter-redirector,id=f2,netdev=hn0,queue=rx,outdev=red1"),
        ],
    }));
    let (image, active, hidden) = (
        disks.secondary.display(),
        disks.active.display(),
        disks.hidden.display(),
    );
    all.extend(words(vec![
        [
            "-drive".into(),
            format!("if=none,id=parent0,file.filename={image},driver=raw"),
        ],
        [
            "-drive".into(),
            format!(
                "if=none,id=childs0,driver=replication,mode=secondary,file.driver=qcow2,\
                 top-id=colo-disk0,file.file.filename={active},file.backing.driver=qcow2,\
                 file.backing.file.filename={hidden},file.backing.backing=parent0"
            ),
        ],
        [
            "-drive".into(),
            "if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,\
             children.0=childs0"
                .into(),
        ],
        [
            "-device".into(),
            "virtio-blk-device,drive=colo-disk0".into(),
        ],
        ["-incoming".into(), format!("tcp:{own}:9998")],
    ]));
    all
}

/// From two started programs to a pair whose first checkpoint is over.
fn begin(place: &Place, setting: Setting, a: &mut Qmp, b: &mut Qmp) -> Result<Agent, Error> {
    let b_link = link_b(0);
    let colo = json!({"capabilities": [{"capability": "x-colo", "state": true}]});
    for side in [&mut *a, &mut *b] {
        side.run("migrate-set-capabilities", colo.clone())?;
    }
    let nbd = json!({"type": "inet", "data": {"host": b_link, "port": "9999"}});
    b.run("nbd-server-start", json!({"addr": nbd}))?;
    b.run(
        "nbd-server-add",
        json!({"device": "parent0", "writable": true}),
    )?;
    let replication = format!(
        "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host={b_link},\
         file.port=9999,file.export=parent0,node-name=replication0"
    );
    a.run(
        "human-monitor-command",
        json!({"command-line": replication}),
    )?;
    let child = json!({"parent": "colo-disk0", "node": "replication0"});
    a.run("x-blockdev-change", child)?;
    let agent = Agent::start(place, setting.held)?;
    a.run("cont", Value::Null)?;
    place.wait_for_guest("a")?;
    let parameters = json!({"x-checkpoint-delay": SETTLING_DELAY, "max-bandwidth": 1u64 << 40});
    a.run("migrate-set-parameters", parameters)?;
    a.run("migrate", json!({"uri": format!("tcp:{b_link}:9998")}))?;
    let deadline = Instant::now() + PATIENCE;
    // The first stop ends the migration, the second is the first checkpoint, of all memory.
    while agent
        .stops
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .len()
        < 4
    {
        let state = a.run("query-migrate", Value::Null)?;
        if state["status"] == "failed" || Instant::now() > deadline {
            return Err(Error::Failed(format!("COLO does not begin: {state}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    a.run(
        "migrate-set-parameters",
        json!({"x-checkpoint-delay": setting.delay}),
    )?;
    std::thread::sleep(Duration::from_millis(500));
    agent
        .stops
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
    Ok(agent)
}

/// The manager of a pair: reads what the primary says happened.
struct Agent {
    armed: Arc<AtomicBool>,
    stops: Arc<Mutex<Vec<f64>>>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Agent {
    fn start(place: &Place, held: Held) -> Result<Agent, Error> {
        let (primary, secondary) = (place.listen("a")?, place.listen("b")?);
        let armed = Arc::new(AtomicBool::new(false));
        let stops = Arc::default();
        let work = Work {
            held,
            armed: armed.clone(),
            stops: Arc::clone(&stops),
        };
        let thread = std::thread::Builder::new()
            .name("agent".into())
            .spawn(move || work.run(primary, secondary))
            .map_err(|e| Error::Failed(format!("start the agent: {e}")))?;
        Ok(Agent {
            armed,
            stops,
            thread: Some(thread),
        })
    }
}

struct Work {
    held: Held,
    armed: Arc<AtomicBool>,
    stops: Arc<Mutex<Vec<f64>>>,
}

impl Work {
    fn run(&self, mut primary: Qmp, secondary: Qmp) -> Result<(), Error> {
        let mut stopped = None;
        while let Some(message) = primary.next()? {
            match message {
                Message::Event { name, at } if name == "STOP" => {
                    self.pass_on(&mut primary, "epoch")?;
                    stopped = Some(at);
                }
                Message::Event { name, at } if name == "RESUME" => {
                    self.pass_on(&mut primary, "held")?;
                    if let Some(since) = stopped.take() {
                        let ms = at.saturating_sub(since).as_secs_f64() * 1e3;
                        self.stops
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(ms);
                    }
                }
                Message::Refused(why) => {
                    return Err(Error::Failed(format!("filter-buffer: {why}")));
                }
                Message::Greeting | Message::Event { .. } | Message::Return(_) => {}
            }
        }
        match self.armed.load(Ordering::Acquire) {
            true => self.take_over(secondary),
            false => Ok(()),
        }
    }

    /// What is in this filter-buffer goes on to the next filter, or out.
    fn pass_on(&self, primary: &mut Qmp, filter: &str) -> Result<(), Error> {
        if self.held == Held::Compare {
            return Ok(());
        }
        let path = format!("/objects/{filter}");
        for status in ["off", "on"] {
            let property = json!({"path": path, "property": "status", "value": status});
            primary.send("qom-set", &property)?;
        }
        Ok(())
    }

    fn take_over(&self, mut secondary: Qmp) -> Result<(), Error> {
        secondary.run("nbd-server-stop", Value::Null)?;
        secondary.run("x-colo-lost-heartbeat", Value::Null)?;
        secondary.run("object-del", json!({"id": "f2"}))?;
        if self.held == Held::Compare {
            secondary.run("object-del", json!({"id": "f1"}))?;
        }
        let announce = json!({"initial": 5, "max": 50, "rounds": 5, "step": 10});
        secondary.run("announce-self", announce).map(drop)
    }
}
