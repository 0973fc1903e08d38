//! What one host's axd knows and holds, and the way of one request through it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::host::{Code, PeerReport, ProcessReport, Reply, Request, State, VmReport};
use ax_api::process::{Role, Spec, Start};
use ax_api::vm::{Mode, Vm};
use ax_wire::{Incarnation, PairId};
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Mutex as AsyncMutex, Notify, OwnedMutexGuard};

use crate::config::Config;
use crate::events::Events;
use crate::failure::Failure;
use crate::ha::{CRASHES_WITHIN, MOST_CRASHES};
use crate::peer::PeerLink;
use crate::process::{Places, Process};
use crate::replace;
use crate::store::Store;

/// How long a command waits for what axd does of its own accord.
const BEHIND_PATIENCE: Duration = Duration::from_secs(15);

/// Runs remembered as gone, per pair.
const GONE_REMEMBERED: usize = 8;

/// Where lines that are not the last go.
#[derive(Clone)]
pub struct Tell(pub UnboundedSender<Reply>);

impl Tell {
    /// Says what is being done.
    pub fn progress(&self, text: impl Into<String>) {
        self.bytes(text, None);
    }

    /// Says what is being done, and how far it is in (done, total) bytes.
    pub fn bytes(&self, text: impl Into<String>, bytes: Option<(u64, u64)>) {
        // Whoever asked may have gone away; what was asked for is done all the same.
        let _ = self.0.send(Reply::Progress {
            text: text.into(),
            done: bytes.map(|b| b.0),
            total: bytes.map(|b| b.1),
        });
    }
}

/// Who asks: a user here, or the other host on behalf of a user there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A user of this host: what concerns the other host is forwarded.
    User,
    /// The other host: answered from here alone.
    Peer,
}

/// What is done with a VM while this lives, axd does of its own accord.
pub struct Behind {
    daemon: Arc<Daemon>,
    name: String,
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.daemon.behind.lock().remove(&self.name);
    }
}

/// One host's axd.
pub struct Daemon {
    /// Its configuration.
    pub config: Config,
    /// The definitions.
    pub store: Store,
    /// What happened here.
    pub events: Events,
    /// The way to the other host; none without one.
    pub peer: Option<Arc<PeerLink>>,
    /// The `ax-vmm` program.
    pub program: PathBuf,
    processes: Mutex<BTreeMap<String, Arc<Process>>>,
    gone: Mutex<HashMap<PairId, VecDeque<Incarnation>>>,
    /// Why a VM's last process here ended by itself with a failure.
    last_end: Mutex<HashMap<String, String>>,
    operations: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    /// VMs claimed by what axd does of its own accord.
    behind: Mutex<HashSet<String>>,
    /// When processes of VMs of mode `ha` ended here that should not have, lately.
    pub(crate) crashes: Mutex<HashMap<String, VecDeque<Instant>>>,
    /// Rung when the other host answers again.
    pub(crate) peer_back: Notify,
    /// Why VMs that run alone here have no shadow.
    pub(crate) unprotected: Mutex<HashMap<String, String>>,
    /// VMs that run here, and how far each is on the way back to its preferred host.
    pub(crate) homeward: Mutex<HashMap<String, crate::home::Homeward>>,
    /// Images made for a start that is not settled yet, by (VM, operation).
    pub(crate) made: Mutex<HashMap<(String, u64), Vec<PathBuf>>>,
    /// VMs that an operator starts from an older copy, the current one being lost.
    accepted: Mutex<HashSet<String>>,
}

impl Daemon {
    /// An axd that holds no process yet.
    pub fn new(
        config: Config,
        store: Store,
        events: Events,
        peer: Option<Arc<PeerLink>>,
        program: PathBuf,
    ) -> Arc<Daemon> {
        Arc::new(Daemon {
            config,
            store,
            events,
            peer,
            program,
            processes: Mutex::default(),
            gone: Mutex::default(),
            last_end: Mutex::default(),
            operations: Mutex::default(),
            behind: Mutex::default(),
            crashes: Mutex::default(),
            peer_back: Notify::new(),
            unprotected: Mutex::default(),
            homeward: Mutex::default(),
            made: Mutex::default(),
            accepted: Mutex::default(),
        })
    }

    /// The process of a VM on this host.
    pub fn process(&self, name: &str) -> Option<Arc<Process>> {
        self.processes.lock().get(name).cloned()
    }

    /// All processes on this host.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        self.processes.lock().values().cloned().collect()
    }

    /// Takes a process into its keeping.
    pub fn hold(&self, process: Arc<Process>) {
        self.processes.lock().insert(process.name.clone(), process);
    }

    /// Lets go of a process that has ended.
    pub fn let_go(&self, process: &Arc<Process>) {
        let mut processes = self.processes.lock();
        if processes
            .get(&process.name)
            .is_some_and(|held| Arc::ptr_eq(held, process))
        {
            processes.remove(&process.name);
            Places::of(&self.config, &process.name).clean_up();
        }
        drop(processes);
        let mut gone = self.gone.lock();
        let runs = gone.entry(process.pair).or_default();
        runs.push_back(process.incarnation);
        if runs.len() > GONE_REMEMBERED {
            runs.pop_front();
        }
    }

    /// Remembers why a process that ended by itself failed.
    pub fn note_end(&self, process: &Process) {
        let mut ends = self.last_end.lock();
        match process.exited() {
            Some(crate::process::Exit::Status(status)) if status != 0 => {
                ends.insert(process.name.clone(), process.why_it_ended().why);
            }
            _ => {
                ends.remove(&process.name);
            }
        }
    }

    /// Why a VM's last process here failed, if it did.
    pub fn last_end_of(&self, name: &str) -> Option<String> {
        self.last_end.lock().get(name).cloned()
    }

    /// [`Daemon::last_end_of`], forgotten with this.
    pub fn take_end(&self, name: &str) -> Option<String> {
        self.last_end.lock().remove(name)
    }

    /// Runs of the pair on this host that are certainly over.
    pub fn gone(&self, pair: PairId) -> Vec<Incarnation> {
        let gone = self.gone.lock();
        gone.get(&pair)
            .map(|g| g.iter().copied().collect())
            .unwrap_or_default()
    }

    fn operation(&self, name: &str) -> Arc<AsyncMutex<()>> {
        let mut operations = self.operations.lock();
        operations.entry(name.to_owned()).or_default().clone()
    }

    fn under_way(&self, name: &str) -> Failure {
        let here = &self.config.name;
        let why = format!("another operation on {name} is under way on host {here}");
        Failure::new(Code::State, why)
    }

    /// Claims a VM for one operation at a time. Waits for what axd does of its own accord.
    ///
    /// # Errors
    /// Another one is under way.
    pub async fn claim(&self, name: &str) -> Result<OwnedMutexGuard<()>, Failure> {
        let lock = self.operation(name);
        if let Ok(claim) = lock.clone().try_lock_owned() {
            return Ok(claim);
        }
        if !self.behind.lock().contains(name) {
            return Err(self.under_way(name));
        }
        let claimed = tokio::time::timeout(BEHIND_PATIENCE, lock.lock_owned());
        claimed.await.map_err(|_| self.under_way(name))
    }

    /// Claims a VM for what axd does of its own accord: an operator's command waits for it.
    ///
    /// # Errors
    /// Another operation is under way.
    pub fn claim_behind(
        self: &Arc<Self>,
        name: &str,
    ) -> Result<(Behind, OwnedMutexGuard<()>), Failure> {
        let lock = self.operation(name).try_lock_owned();
        let claim = lock.map_err(|_| self.under_way(name))?;
        Ok((self.behind(name), claim))
    }

    /// From here on what is done with a VM is axd's own: an operator's command waits for it.
    pub fn behind(self: &Arc<Self>, name: &str) -> Behind {
        self.behind.lock().insert(name.to_owned());
        Behind {
            daemon: self.clone(),
            name: name.to_owned(),
        }
    }

    /// The specification of a VM's process on this host.
    pub fn spec(&self, vm: &Vm, start: Start) -> Spec {
        let places = Places::of(&self.config, &vm.name);
        let (name, mut vm) = (vm.name.clone(), vm.clone());
        // Where it runs is axd's business, and its process may be of an earlier version.
        vm.preferred = None;
        for disk in &mut vm.disks {
            disk.path = self.config.image_path(&disk.path);
        }
        Spec {
            vm,
            start,
            host: self.config.name.clone(),
            peer: self.config.peer.as_ref().map(|p| p.name.clone()),
            control: places.control,
            state_dir: places.dir.join("state"),
            link: self.config.link.clone(),
            security: self.config.security(),
            arbiter: self.config.arbiter.clone(),
            standby: self.config.standby.clone(),
            peer_axd: self
                .config
                .peer
                .as_ref()
                .map_or_else(Vec::new, |p| p.addresses.clone()),
            side: Some(self.config.side()),
            machine: self.config.machine,
            accept_loss: self.accepted.lock().contains(&name),
            timing: self.config.timing,
        }
    }

    /// Starts a process of a VM here and keeps it. The caller has claimed the VM.
    ///
    /// # Errors
    /// One runs already, or it could not start; nothing is left.
    pub async fn spawn(self: &Arc<Self>, vm: &Vm, start: Start) -> Result<Arc<Process>, Failure> {
        if let Some(process) = self.process(&vm.name) {
            return Err(Failure::new(
                Code::State,
                format!("{} has a process already (pid {})", vm.name, process.pid),
            ));
        }
        has_memory(vm.memory.saturating_add(self.reserved_except(&vm.name)))?;
        self.take_end(&vm.name);
        let places = Places::of(&self.config, &vm.name);
        let process = Process::spawn(&self.program, &self.spec(vm, start), &places).await;
        match process {
            Ok(process) => {
                let process = Arc::new(process);
                self.hold(process.clone());
                self.supervise(process.clone());
                Ok(process)
            }
            Err(failure) => {
                places.clean_up();
                Err(failure)
            }
        }
    }

    /// The peer, or why there is none.
    ///
    /// # Errors
    /// This host has none.
    pub fn peer(&self) -> Result<&Arc<PeerLink>, Failure> {
        self.peer.as_ref().ok_or_else(|| {
            Failure::new(
                Code::Peer,
                format!(
                    "host {} has no peer: add [peer] and link to axd.toml, or use --mode none",
                    self.config.name
                ),
            )
        })
    }

    /// What the processes on this host say.
    pub async fn reports(&self) -> Vec<ProcessReport> {
        // All at once: one that does not answer costs its patience only once.
        let asked: Vec<_> = self
            .processes()
            .into_iter()
            .map(|process| {
                let host = self.config.name.clone();
                tokio::spawn(async move { process.report(&host).await })
            })
            .collect();
        let mut reports = Vec::with_capacity(asked.len());
        for report in asked {
            reports.extend(report.await);
        }
        let unprotected = self.unprotected.lock();
        for report in &mut reports {
            report.why_unprotected = unprotected.get(&report.name).cloned();
        }
        reports
    }

    /// What the processes on both hosts say, and how the other host is.
    pub async fn reports_of_both(&self, asker: Asker) -> (Vec<ProcessReport>, Option<PeerReport>) {
        let peer = match (asker, &self.peer) {
            (Asker::User, Some(peer)) => peer,
            _ => return (self.reports().await, None),
        };
        let (mut reports, theirs) = tokio::join!(self.reports(), peer.processes());
        let mut report = PeerReport {
            host: peer.name().to_owned(),
            reachable: true,
            why: String::new(),
        };
        match theirs {
            Ok(theirs) => reports.extend(theirs),
            Err(failure) => {
                report.reachable = false;
                report.why = failure.why;
            }
        }
        (reports, Some(report))
    }

    /// One VM over both hosts.
    ///
    /// # Errors
    /// There is no such VM.
    pub async fn show(&self, name: &str, asker: Asker) -> Result<VmReport, Failure> {
        let vm = self.store.vm(name)?;
        let (reports, peer) = self.reports_of_both(asker).await;
        let silent = peer.filter(|p| !p.reachable).map(|p| p.host);
        Ok(self.sum_up(vm, &reports, silent.as_deref()))
    }

    /// Who decides for a VM: what its process says, or who is configured.
    fn arbiter_of(&self, report: &VmReport) -> String {
        let says = |p: &ProcessReport| p.status.as_ref().map(|s| s.arbiter.clone());
        let told = report.processes.iter().filter_map(says);
        let mut told: Vec<String> = told.filter(|arbiter| !arbiter.is_empty()).collect();
        told.sort();
        told.dedup();
        match told.is_empty() {
            true => self.arbiter_configured(),
            // In a change of arbiter the two sides differ for a moment.
            false => told.join("; on the other side: "),
        }
    }

    /// Who is configured to decide, and who stands by.
    fn arbiter_configured(&self) -> String {
        match &self.config.standby {
            Some(standby) => format!("{}; {standby} stands by", self.config.arbiter),
            None => self.config.arbiter.to_string(),
        }
    }

    fn sum_up(&self, vm: Vm, reports: &[ProcessReport], silent: Option<&str>) -> VmReport {
        let pair = vm.pair.to_string();
        let its = reports.iter().filter(|r| r.pair == pair).cloned().collect();
        let mut report = VmReport::sum_up(vm, its, silent);
        if report.vm.mode != Mode::None {
            report.arbiter = self.arbiter_of(&report);
        }
        if report.processes.is_empty()
            && let Some(why) = self.lost_with_a_host(&report.vm.name)
        {
            (report.state, report.healthy, report.note) = (State::Held, false, why);
            return report;
        }
        if report.state == State::Stopped && self.is_missed(&report.vm.name) {
            (report.state, report.healthy) = (State::Failed, false);
            report.note = "ended without being stopped; `axvm events` tells how".to_owned();
        }
        if report.primary.is_none() && self.crashes_too_often(&report.vm.name) {
            (report.state, report.healthy) = (State::Failed, false);
            report.note = format!(
                "ended {MOST_CRASHES} times by itself within {} minutes and is not started again: \
                 see its log, then `axvm start {}`",
                CRASHES_WITHIN.as_secs() / 60,
                report.vm.name
            );
        }
        report
    }

    /// What to tell of a VM whose only current copy went with a host that was replaced.
    fn lost_with_a_host(&self, name: &str) -> Option<String> {
        let record = replace::recorded(&self.config.vm_dir(name).join("state"))?;
        replace::is_lost(&record).then(|| {
            format!(
                "its only current copy was on the host that was replaced and is lost with it; `axvm start {name} \
                 --accept-loss` on {} starts the older copy there",
                self.config.name
            )
        })
    }

    /// A VM whose current copy is lost starts only by an operator who accepts that, and no other VM does so.
    fn may_be_started(&self, name: &str, accept_loss: bool) -> Result<(), Failure> {
        match (self.lost_with_a_host(name), accept_loss) {
            (Some(why), false) => Err(Failure::new(
                Code::Arbiter,
                format!("{name} is held: {why}"),
            )),
            (None, true) => Err(Failure::new(
                Code::Usage,
                format!(
                    "--accept-loss: nothing of {name} was lost with a replaced host, as far as this host knows"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The role and process of a VM on this host, if it answers.
    pub async fn local_role(&self, name: &str) -> Option<(Arc<Process>, Option<Role>)> {
        let process = self.process(name)?;
        let role = process.status().await.map(|s| s.role);
        Some((process, role))
    }

    /// Does what is asked. Lines that are not the last go through `tell`.
    pub async fn answer(self: &Arc<Self>, request: Request, asker: Asker, tell: &Tell) -> Reply {
        match self.try_answer(request, asker, tell).await {
            Ok(reply) => reply,
            Err(failure) => failure.into_reply(),
        }
    }

    async fn try_answer(
        self: &Arc<Self>,
        request: Request,
        asker: Asker,
        tell: &Tell,
    ) -> Result<Reply, Failure> {
        let done = |text: String| Ok(Reply::Done { text });
        match request {
            Request::Version => Ok(Reply::Version {
                host: self.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                peer: match (&self.peer, asker) {
                    (Some(peer), Asker::User) => Some(peer.hello().await),
                    _ => None,
                },
            }),
            Request::List => {
                let (reports, peer) = self.reports_of_both(asker).await;
                let silent = peer.as_ref().filter(|p| !p.reachable).map(|p| &*p.host);
                let vms = self.store.vms().into_iter();
                let vms = vms.map(|vm| self.sum_up(vm, &reports, silent)).collect();
                Ok(Reply::Vms { vms, peer })
            }
            Request::Show { name } => Ok(Reply::Vm {
                vm: Box::new(self.show(&name, asker).await?),
            }),
            Request::Define { vm } => {
                self.define(&vm, tell).await?;
                Ok(Reply::Vm {
                    vm: Box::new(self.show(&vm.name, asker).await?),
                })
            }
            Request::Undefine { name } => done(self.undefine(&name).await?),
            Request::Autostart { name, on } => done(self.autostart(&name, on).await?),
            Request::Prefer { name, preferred } => done(self.prefer(&name, preferred).await?),
            Request::Start {
                name,
                define,
                wait,
                alone_ok,
                accept_loss,
            } => {
                self.may_be_started(&name, accept_loss)?;
                if accept_loss {
                    self.accepted.lock().insert(name.clone());
                }
                let started = self.start(&name, define.as_deref(), wait, alone_ok, tell);
                let started = started.await;
                self.accepted.lock().remove(&name);
                done(started?)
            }
            Request::Stop {
                name, force: true, ..
            } => done(self.stop_by_force(&name, asker).await?),
            Request::Stop {
                name, timeout_s, ..
            } => {
                let patience = Duration::from_secs(timeout_s);
                done(self.stop(&name, patience, asker, tell).await?)
            }
            Request::SetMode { name, mode, wait } => {
                done(self.set_mode(&name, mode, wait, asker, tell).await?)
            }
            Request::Hosts => Ok(Reply::Hosts {
                hosts: self.hosts(asker).await,
                arbiter: self.arbiter_configured(),
            }),
            Request::Maintenance { host, on } => {
                done(self.maintenance(host, on, asker, tell).await?)
            }
            Request::Drain { timeout_s } => {
                let patience = Duration::from_secs(timeout_s);
                done(self.drain(patience, tell).await?)
            }
            Request::Kill { name, host } => done(self.kill(&name, host, asker, tell).await?),
            Request::Events {
                vm,
                follow,
                both_hosts,
            } => {
                let both = both_hosts && asker == Asker::User;
                self.tell_events(vm, follow, both, tell).await?;
                done(String::new())
            }
            Request::Trace { .. } | Request::Stats { .. } => self.epochs_of(request, asker).await,
            Request::Console { .. } => Err(Failure::new(
                Code::Failed,
                "a console needs a connection of its own",
            )),
            Request::Resume {
                ref name,
                peer_is_dead: true,
            } => done(self.peer_is_dead(name, &request, asker, tell).await?),
            Request::Reboot { .. }
            | Request::Pause { .. }
            | Request::Resume { .. }
            | Request::Failover { .. } => done(self.order_primary(request, asker, tell).await?),
        }
    }
}

/// Memory of this host in all, and available, bytes; 0 where the system does not say.
pub(crate) fn memory() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    ["MemTotal:", "MemAvailable:"].map(|key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    })
}

/// Whether the host has `wanted` bytes to give. Guest memory is taken page by page as it is used, so
/// without this a guest too large for its host would be found out only in the middle of its work.
fn has_memory(wanted: u64) -> Result<(), Failure> {
    match memory()[1] {
        available if available > 0 && available < wanted => Err(Failure::new(
            Code::Memory,
            format!(
                "not enough memory: {} MiB wanted, {} MiB available; give the VM less, or make room",
                wanted >> 20,
                available >> 20
            ),
        )),
        // A system that does not say is left to the allocation itself.
        _ => Ok(()),
    }
}
