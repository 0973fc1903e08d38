//! `axd pair --replace`: a host is gone for good, another machine takes its place.
//!
//! ```text
//!   axd pair --replace, on the host that is left          axd pair --token, on the new machine
//!    | the other host does not answer; what each VM loses
//!    | token                                     ------->  | uses it: name, certificate, machine
//!    | the old certificate is trusted no more
//!    | every VM's record: the old machine's copy is not
//!    |   current, and the new machine is that side
//!    | partner.json
//!    | "you are side X"                          ------->  | partner.json
//!    | trusts the new one                        <-------  | trusts this one
//! ```
//! Each step may be done again, so whatever cuts this short is mended by the same command. The new machine has
//! no definition of any VM before it is trusted, and so nothing to ask any arbiter for.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ax_api::host::Code;
use ax_api::process::{self, Arbiter, Phase, Role, Status};
use ax_api::vm::Vm;
use ax_arbiter::manual::{self, Manual};
use ax_arbiter::rules::{self, Word};
use ax_arbiter::{Client, Etcd, ThirdParty};
use ax_link::pairing::Paired;
use ax_link::{AddressPair, Connector, HostName, Security};
use ax_wire::record::Request;
use ax_wire::record::{Arbiter as Decides, Change, Copies, Decision, Member, Record, State, Why};
use ax_wire::{Incarnation, MachineId, Side};
use serde::Deserialize;

use crate::config::Config;
use crate::control;
use crate::failure::{Failure, chain};
use crate::partner::{self, Partner};
use crate::peer::PeerLink;
use crate::process::Places;
use crate::store::Store;

/// How long an arbiter may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a VM that goes on by the operator's word may take to do so.
const GOING_ON: Duration = Duration::from_secs(15);
/// Times a record that changes meanwhile is looked at again.
const TRIES: usize = 8;
/// The file that says which third party decides, in the folder of a VM's state.
const DECIDES: &str = "arbiter.json";

/// What is needed to replace a host.
pub struct Replacing {
    config: Config,
    security: Security,
    partner: Partner,
    old: String,
    machine: MachineId,
    /// The operator says that it is dead.
    word: bool,
    vms: Vec<Vm>,
}

/// What a VM's files say of who decides.
#[derive(Deserialize)]
struct Course {
    now: Arbiter,
    void_for: Option<Arbiter>,
    record: Option<Record>,
}

/// The latest record that is written down in a VM's state.
pub fn recorded(state_dir: &Path) -> Option<Record> {
    let read = |file: &str| std::fs::read(state_dir.join(file)).ok();
    let acted_on = read(manual::FILE).and_then(|b| serde_json::from_slice::<Record>(&b).ok());
    let course = read(DECIDES).and_then(|b| serde_json::from_slice::<Course>(&b).ok());
    let known = [acted_on, course.and_then(|course| course.record)];
    known.into_iter().flatten().max_by_key(|r| r.generation)
}

/// True when the only current copy of a VM was lost with a replaced host.
pub fn is_lost(record: &Record) -> bool {
    matches!(
        record.state,
        State::Stopped {
            current: Copies::Lost,
            ..
        }
    )
}

impl Replacing {
    /// Checks that `old` may be replaced: it does not answer, and what is lost with it the operator accepts.
    ///
    /// # Errors
    /// Why it may not, and what to do.
    pub fn prepare(config: &Config, old: &str, word: bool) -> Result<Replacing, Failure> {
        let refuse = |code, why: String| Err(Failure::new(code, why));
        let security = crate::run::security(config)?;
        let Some(partner) = partner::present(config)? else {
            return refuse(
                Code::Usage,
                "this host has no [peer] that could be replaced".to_owned(),
            );
        };
        if partner.name != old && !partner.replaced.iter().any(|name| name == old) {
            return refuse(
                Code::Usage,
                format!("--replace {old}: the other host is {}", partner.name),
            );
        }
        let (store, unreadable) = Store::open(&config.name, config.data_dir.join("vms"))?;
        if let Some(what) = unreadable.first() {
            return refuse(
                Code::Failed,
                format!("a definition can't be read, so its record can't be put right: {what}"),
            );
        }
        let replacing = Replacing {
            security,
            machine: partner::machine(&config.data_dir)?,
            vms: store.vms(),
            config: config.clone(),
            partner,
            old: old.to_owned(),
            word,
        };
        replacing.does_not_answer()?;
        replacing.ready()?;
        Ok(replacing)
    }

    /// The side that the new machine is.
    fn side(&self) -> Side {
        self.partner.side.other()
    }

    fn does_not_answer(&self) -> Result<(), Failure> {
        let Some(peer) = &self.config.peer else {
            return Ok(());
        };
        let peer = crate::config::Peer {
            name: self.old.clone(),
            addresses: peer.addresses.clone(),
        };
        let link = PeerLink::new(&self.config, &peer, self.security.clone())?;
        let answers = (0..peer.addresses.len()).find(|path| link.try_path(*path).is_ok());
        match answers.and_then(|path| peer.addresses.get(path)) {
            None => Ok(()),
            Some(at) => Err(Failure::new(
                Code::State,
                format!(
                    "host {} answers at {at}: it is not gone. To put another machine in its place switch it \
                     off for good first (`axvm host maintenance on {}` moves its VMs here)",
                    self.old, self.old
                ),
            )),
        }
    }

    /// Nothing is changed yet. Every VM is such that it can be put right.
    fn ready(&self) -> Result<(), Failure> {
        let mut losses = vec![];
        let mut not_ready = vec![];
        for vm in &self.vms {
            match self.look(vm) {
                Err(failure) if failure.code == Code::State => not_ready.push(failure.why),
                Err(failure) => {
                    let why = format!("{}: {}", vm.name, failure.why);
                    return Err(Failure::new(failure.code, why));
                }
                Ok(None) => {}
                Ok(Some((record, lives))) => match self.judge(&record, lives, false) {
                    Decision::Refused(refusal) => {
                        losses.push(format!("{}: {}", vm.name, loss(&record, &refusal.why)));
                    }
                    Decision::Granted(_) | Decision::Already(_) => {}
                },
            }
        }
        if !not_ready.is_empty() {
            return Err(Failure::new(Code::State, not_ready.join("\n  ")));
        }
        let said = losses.join("\n  ");
        match (losses.is_empty(), self.word) {
            (true, _) => Ok(()),
            (false, true) => {
                println!("With host {} this is lost:\n  {said}", self.old);
                Ok(())
            }
            (false, false) => Err(Failure::new(
                Code::Arbiter,
                format!(
                    "by what is recorded, host {} is needed:\n  {said}\nIf it is dead and will never run again, \
                     say so with --i-know-the-peer-is-dead; nothing was changed",
                    self.old
                ),
            )),
        }
    }

    /// What becomes of a record: of one looked at, not asked for yet.
    fn judge(&self, record: &Record, lives: bool, word: bool) -> Decision {
        let holder = record
            .holder()
            .filter(|h| h.side == self.partner.side && lives);
        let holder = holder.map(|h| h.incarnation);
        let request = self.request(record, holder, MachineId([0; 16]), word);
        rules::decide(record.arbiter, Some(record), &request)
    }

    /// In the name of the process that lives here, or of nobody.
    fn request(
        &self,
        record: &Record,
        process: Option<Incarnation>,
        machine: MachineId,
        word: bool,
    ) -> Request {
        Request {
            pair: ax_wire::PairId([0; 16]),
            caller: Member {
                side: self.partner.side,
                incarnation: process.unwrap_or(Incarnation(0)),
            },
            machine: Some(self.machine),
            from: record.generation,
            change: Change::Replace { machine, word },
        }
    }

    fn state_dir(&self, vm: &Vm) -> PathBuf {
        self.config.vm_dir(&vm.name).join("state")
    }

    /// The process of a VM on this host, if it lives. One that waits for the operator's word is given it.
    ///
    /// # Errors
    /// It is neither running alone nor gone.
    fn process(&self, vm: &Vm) -> Result<Option<Status>, Failure> {
        let control = Places::of(&self.config, &vm.name).control;
        let until = Instant::now() + GOING_ON;
        let mut told = false;
        loop {
            let Some(status) = wait(control::status(&control))?.ok() else {
                return Ok(None);
            };
            let what = match (status.role, &status.phase) {
                (Role::Primary, Phase::Alone | Phase::Unprotected | Phase::Paused) => {
                    return Ok(Some(status));
                }
                (_, Phase::Held { waits_for }) => format!("is held: waits for {waits_for}"),
                (Role::Primary, Phase::Protected | Phase::Syncing { .. }) => {
                    format!("is protected by host {}, which lives", self.old)
                }
                (role, phase) => format!("has a process ({role:?}, {phase:?})"),
            };
            let held = matches!(status.phase, Phase::Held { .. });
            if held && self.word && !told && self.config.arbiter == Arbiter::Manual {
                let word = process::Request::PeerIsDead;
                // It may have been told, or be just being answered.
                told = wait(control::order(&control, &word, control::PATIENCE))?.is_ok();
            }
            let given_up = matches!(status.phase, Phase::Protected | Phase::Syncing { .. });
            if Instant::now() > until || given_up || (held && !self.word) {
                let help = match held && !self.word && self.config.arbiter == Arbiter::Manual {
                    true => "; if that host is dead, --i-know-the-peer-is-dead says so for all VMs",
                    false => "; wait until it runs alone or is stopped",
                };
                return Err(Failure::new(
                    Code::State,
                    format!("{} {what}{help}", vm.name),
                ));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn course(&self, vm: &Vm) -> Result<Course, Failure> {
        let path = self.state_dir(vm).join(DECIDES);
        let configured = || Course {
            now: self.config.arbiter.clone(),
            void_for: None,
            record: None,
        };
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Failure::new(Code::Failed, format!("{}: {e}", path.display()))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(configured()),
            Err(e) => Err(Failure::io(path.display().to_string(), &e)),
        }
    }

    fn third(&self, place: &Arbiter) -> Result<Option<Box<dyn ThirdParty>>, Failure> {
        Ok(match place {
            Arbiter::Manual => None,
            Arbiter::Etcd { members } => Some(Box::new(Etcd::new(members.clone(), None))),
            Arbiter::Witness { name, addresses } => {
                let pairs = addresses.iter().copied().map(AddressPair::from).collect();
                let name: HostName = name
                    .parse()
                    .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
                let connector = Connector::new(self.security.clone(), pairs, Some(name));
                let client = Client::new(connector, None);
                Some(Box::new(client.map_err(|e| Failure::io("starting", &e))?))
            }
        })
    }

    /// The record of a VM where it is kept now, and whether a process of it lives here; none for one that was
    /// never one of a pair.
    fn look(&self, vm: &Vm) -> Result<Option<(Record, bool)>, Failure> {
        let lives = self.process(vm)?.is_some();
        let known = recorded(&self.state_dir(vm));
        let Some(known) = known else {
            return Ok(None);
        };
        let course = self.course(vm)?;
        if course.void_for.is_some() {
            return Err(Failure::new(
                Code::State,
                format!(
                    "{} is changing its arbiter; wait for the end of that",
                    vm.name
                ),
            ));
        }
        let Some(mut third) = self.third(&course.now)? else {
            return Ok(Some((known, lives)));
        };
        let found = third.look(vm.pair, Instant::now() + ANSWER);
        let found = found.map_err(|e| {
            Failure::new(
                Code::Arbiter,
                format!("{} does not answer: {e}", course.now),
            )
        })?;
        // One whose store was lost is told by this side and the new machine.
        Ok(Some((found.unwrap_or(known), lives)))
    }

    /// Puts a VM's record right: the new machine is the other side, and has no copy.
    fn put_right(&self, vm: &Vm, machine: MachineId) -> Result<(), Failure> {
        for _ in 0..TRIES {
            let Some((record, _)) = self.look(vm)? else {
                return Ok(());
            };
            let process = self.process(vm)?.map(|status| status.incarnation);
            let request = Request {
                pair: vm.pair,
                ..self.request(&record, process, machine, self.word)
            };
            let course = self.course(vm)?;
            let Some(mut third) = self.third(&course.now)? else {
                return self.in_manual(vm, process.is_some(), &request);
            };
            let known = third.look(vm.pair, Instant::now() + ANSWER);
            let decided = match known {
                Ok(Some(_)) => third.ask(&request, Instant::now() + ANSWER),
                Ok(None) => Ok(rules::decide(record.arbiter, Some(&record), &request)),
                Err(e) => Err(e),
            };
            let decided = decided.map_err(|e| {
                Failure::new(
                    Code::Arbiter,
                    format!("{} does not answer: {e}", course.now),
                )
            })?;
            match decided {
                Decision::Granted(record) | Decision::Already(record) => {
                    // A process that lives learns it from its arbiter.
                    return match process {
                        Some(_) => Ok(()),
                        None => self.write_down(vm, &record),
                    };
                }
                Decision::Refused(refusal) if refusal.why == Why::Stale => {}
                Decision::Refused(refusal) => {
                    return Err(Failure::new(Code::Arbiter, refusal.to_string()));
                }
            }
        }
        Err(Failure::new(
            Code::Arbiter,
            "its record changes all the time",
        ))
    }

    /// Without a third party: this host's own record. A living process is told when the pairing is done.
    fn in_manual(&self, vm: &Vm, lives: bool, request: &Request) -> Result<(), Failure> {
        if lives {
            return Ok(());
        }
        let failed = |e: manual::ManualError| Failure::new(Code::Failed, e.to_string());
        let manual = Manual::open(&self.state_dir(vm)).map_err(failed)?;
        let Some(known) = manual.known() else {
            return Ok(());
        };
        let changed = manual
            .alone(&known, Word::Operator, request)
            .map_err(failed)?;
        changed
            .map(drop)
            .map_err(|refusal| Failure::new(Code::Arbiter, refusal.to_string()))
    }

    fn write_down(&self, vm: &Vm, record: &Record) -> Result<(), Failure> {
        let dir = self.state_dir(vm);
        let path = dir.join(DECIDES);
        let failed = |e: &std::io::Error| Failure::io(path.display().to_string(), e);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return manual::write(&dir.join(manual::FILE), record).map_err(|e| failed(&e));
            }
            Err(e) => return Err(failed(&e)),
        };
        let other = |e: serde_json::Error| failed(&std::io::Error::other(e));
        let mut written: serde_json::Value = serde_json::from_slice(&bytes).map_err(other)?;
        written["record"] = serde_json::to_value(record).map_err(other)?;
        manual::write(&path, &written).map_err(|e| failed(&e))
    }

    /// Has the new machine take the old one's place, before it is trusted; the side that it is.
    ///
    /// # Errors
    /// What could not be done: the same command goes on from there.
    pub fn take_place(&self, new: &Paired) -> Result<Side, Failure> {
        let machine = new.machine.ok_or_else(|| {
            Failure::new(
                Code::Peer,
                "the other machine does not say which it is: is [peer] in its axd.toml? A witness can't take a host's place",
            )
        })?;
        let is_witness = matches!(&self.config.arbiter, Arbiter::Witness { name, .. } if *name == new.name.as_str());
        if machine == self.machine || is_witness {
            let why = format!("{} can't be the other host of this one", new.name);
            return Err(Failure::new(Code::Usage, why));
        }
        if let Security::Mtls(_, trust) = &self.security {
            let old = self
                .old
                .parse()
                .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
            let former = self
                .partner
                .name
                .parse()
                .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
            for name in [old, former] {
                trust
                    .remove(&name)
                    .map_err(|e| Failure::new(Code::Failed, chain(&e)))?;
            }
        }
        for vm in &self.vms {
            self.put_right(vm, machine)
                .map_err(|f| Failure::new(f.code, format!("{}: {}", vm.name, f.why)))?;
        }
        let mut replaced = self.partner.replaced.clone();
        for name in [&self.old, &self.partner.name] {
            if !replaced.contains(name) {
                replaced.push(name.clone());
            }
        }
        let partner = Partner {
            name: new.name.as_str().to_owned(),
            side: self.partner.side,
            machine: Some(machine),
            replaced,
        };
        partner::keep(&self.config.data_dir, &partner)?;
        Ok(self.side())
    }

    /// Tells the processes that run here of their new partner.
    ///
    /// # Errors
    /// One does not take it in.
    pub fn tell(&self, new: &Paired) -> Result<(), Failure> {
        let addresses = self.config.peer.as_ref().map(|peer| peer.addresses.clone());
        for vm in &self.vms {
            let control = Places::of(&self.config, &vm.name).control;
            if wait(control::status(&control))?.is_err() {
                continue;
            }
            let request = process::Request::Peer {
                name: new.name.as_str().to_owned(),
                addresses: addresses.clone().unwrap_or_default(),
                machine: new.machine,
            };
            wait(control::order(&control, &request, control::PATIENCE))?
                .map_err(|f| Failure::new(f.code, format!("{}: {}", vm.name, f.why)))?;
        }
        Ok(())
    }

    /// What is to be done next, for the operator.
    pub fn next_steps(&self, new: &Paired) -> String {
        let name = &new.name;
        let mut text = String::new();
        if self.config.peer.as_ref().map(|p| p.name.as_str()) != Some(name.as_str()) {
            text.push_str(&format!(
                "- write [peer] name = \"{name}\" and its addresses into this host's axd.toml\n"
            ));
        }
        text.push_str("- restart axd here (guests go on), and start axd on the new machine\n");
        if let Arbiter::Witness { name: witness, .. } = &self.config.arbiter {
            text.push_str(&format!(
                "- on {witness}: `axd pair --replace {}`, and its token on the new machine\n",
                self.old
            ));
        }
        for vm in &self.vms {
            if recorded(&self.state_dir(vm)).is_some_and(|record| is_lost(&record)) {
                text.push_str(&format!(
                    "- {0} is held: `axvm start {0} --accept-loss` starts this host's older copy\n",
                    vm.name
                ));
            }
        }
        text
    }
}

/// What an operator is told of a VM whose record names the old host.
fn loss(record: &Record, why: &Why) -> String {
    match (why, record.state) {
        (Why::NotCurrent(_), State::Stopped { .. }) => {
            "stopped there, and only that copy is current: what it did since this host was its shadow is lost"
                .to_owned()
        }
        (Why::NotCurrent(_), _) => {
            "ran there when last heard of, and only that copy is current: what it did since is lost"
                .to_owned()
        }
        (Why::OtherHolds, _) => {
            "ran there when last heard of; its disks are current here, too".to_owned()
        }
        (why, _) => format!("{why} ({})", decides(record)),
    }
}

fn decides(record: &Record) -> &'static str {
    match record.arbiter {
        Decides::Operator => "by both hosts' record",
        Decides::Witness(_) => "by the arbiter's record",
    }
}

/// Waits for something of axd's asynchronous half.
fn wait<T>(what: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::io("starting", &e))?;
    Ok(runtime.block_on(what))
}
