//! `axvm host`: the two hosts, and taking one out of service.
//!
//! A host in maintenance takes no VM: no start, no shadow, no restart. Going into it moves away what runs
//! here, one after the other: `ft` by planned failover, `ha` by a stop here and a start there. Then the
//! shadows here end, as in any loss of a shadow; their guests run alone until the maintenance is over. It is
//! a file in the data folder, so it outlives axd and the host's reboot, with the names of what was
//! moved: those return once they are protected again. One that a shutdown of the host began
//! ([`crate::drain`]) is over by itself at the next boot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, HostReport, Reply, Request, State};
use ax_api::process::{self, Phase, Role};
use ax_api::vm::Mode;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;
use crate::ops::ORDERLY;
use crate::process::Process;
use crate::stop;
use crate::store::write_atomic;

/// How long a VM that was moved away may take to be protected again before it stays where it is.
const RETURN: Duration = Duration::from_secs(1800);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the guest of a shadow that was ended may take to run alone.
const LETTING_GO: Duration = Duration::from_secs(10);

/// What is remembered of a maintenance.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Maintenance {
    /// VMs moved away by planned failover.
    pub(crate) moved: Vec<String>,
    /// The boot of this host whose shutdown began it, and with which it is over; none for an operator's.
    #[serde(default)]
    pub(crate) shutdown: Option<String>,
}

impl Daemon {
    fn maintenance_file(&self) -> PathBuf {
        self.config.data_dir.join("maintenance.json")
    }

    pub(crate) fn read_maintenance(&self) -> Option<Maintenance> {
        let bytes = std::fs::read(self.maintenance_file()).ok()?;
        // One that cannot be read is one all the same.
        Some(serde_json::from_slice(&bytes).unwrap_or_default())
    }

    pub(crate) fn write_maintenance(&self, what: &Maintenance) -> Result<(), Failure> {
        let file = self.maintenance_file();
        let json = serde_json::to_vec(what).map_err(std::io::Error::other);
        json.and_then(|json| write_atomic(&file, &json))
            .map_err(|e| Failure::io(format!("writing {}", file.display()), &e))
    }

    pub(crate) fn forget_maintenance(&self) -> Result<(), Failure> {
        let file = self.maintenance_file();
        std::fs::remove_file(&file)
            .map_err(|e| Failure::io(format!("removing {}", file.display()), &e))
    }

    /// Whether this host is in maintenance.
    pub fn in_maintenance(&self) -> bool {
        self.maintenance_file().exists()
    }

    /// Whether it is because the host is being shut down.
    pub fn is_shutting_down(&self) -> bool {
        self.read_maintenance()
            .is_some_and(|maintenance| maintenance.shutdown.is_some())
    }

    /// Refuses what a host in maintenance does not do.
    ///
    /// # Errors
    /// It is.
    pub fn refuse_in_maintenance(&self) -> Result<(), Failure> {
        if !self.in_maintenance() {
            return Ok(());
        }
        let here = &self.config.name;
        let what = match self.is_shutting_down() {
            true => "is being shut down",
            false => "is in maintenance",
        };
        let why = format!(
            "host {here} {what} and takes no VM; `axvm host maintenance off {here}` ends that"
        );
        Err(Failure::new(Code::State, why))
    }

    /// This host as it sees itself.
    pub async fn host_report(&self) -> HostReport {
        let mut report = HostReport {
            host: self.config.name.clone(),
            reachable: true,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            wire: ax_wire::Versions::ours().newest().number(),
            maintenance: self.in_maintenance(),
            shutting_down: self.is_shutting_down(),
            memory: crate::daemon::memory(),
            paths: self
                .peer
                .as_ref()
                .map(|peer| peer.paths())
                .unwrap_or_default(),
            ..HostReport::default()
        };
        for process in self.reports().await {
            let role = process.status.map(|status| status.role);
            match role {
                Some(Role::Shadow) => report.shadows.push(process.name),
                Some(Role::Primary) | None => report.runs.push(process.name),
            }
        }
        report
    }

    /// Both hosts; the other one as it says, or why it does not.
    pub async fn hosts(&self, asker: Asker) -> Vec<HostReport> {
        let mut hosts = vec![self.host_report().await];
        if let (Asker::User, Some(peer)) = (asker, &self.peer) {
            hosts.push(match peer.forward(Request::Hosts, None).await {
                Ok(Reply::Hosts { hosts, .. }) if hosts.len() == 1 => {
                    hosts.into_iter().next().unwrap_or_default()
                }
                Ok(other) => away(peer.name(), peer.unexpected(&other).why),
                Err(failure) => away(peer.name(), failure.why),
            });
        }
        hosts.sort_by(|a, b| a.host.cmp(&b.host));
        hosts
    }

    /// Takes a host out of service, or back into it.
    ///
    /// # Errors
    /// Something still runs there; it stays in maintenance, and the order may be given again.
    pub async fn maintenance(
        self: &Arc<Self>,
        host: Option<String>,
        on: bool,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let here = &self.config.name;
        match (&host, &self.peer) {
            (Some(other), Some(peer)) if other == peer.name() && asker == Asker::User => {
                let request = Request::Maintenance { host, on };
                return match peer.forward(request, Some(tell.0.clone())).await? {
                    Reply::Done { text } => Ok(text),
                    other => Err(peer.unexpected(&other)),
                };
            }
            (Some(other), _) if other != here => {
                let why = format!("no host of this pair is called {other}");
                return Err(Failure::new(Code::Usage, why));
            }
            _ => {}
        }
        match on {
            true => self.begin_maintenance(tell).await,
            false => Ok(self.end_maintenance()?),
        }
    }

    async fn begin_maintenance(self: &Arc<Self>, tell: &Tell) -> Result<String, Failure> {
        let here = self.config.name.clone();
        let mut maintenance = self.read_maintenance().unwrap_or_default();
        // First of all: nothing comes while what is here goes. From here on it is the operator's.
        maintenance.shutdown = None;
        self.write_maintenance(&maintenance)?;
        self.events.note(None, "operator: maintenance begins");
        let mut stay = vec![];
        for process in self.processes() {
            let Some(status) = process.status().await else {
                stay.push(format!("{} (does not answer)", process.name));
                continue;
            };
            if status.role != Role::Primary {
                continue;
            }
            tell.progress(format!("moving {} away", process.name));
            match self.move_away(&process, &status, tell).await {
                Ok(()) => {
                    if status.mode == Mode::Ft && !maintenance.moved.contains(&process.name) {
                        maintenance.moved.push(process.name.clone());
                        self.write_maintenance(&maintenance)?;
                    }
                }
                Err(failure) => stay.push(format!("{} ({failure})", process.name)),
            }
        }
        if !stay.is_empty() {
            let why = format!(
                "host {here} is not safe to power off: still there: {}. It stays in maintenance: stop them, \
                 or mend what is wrong, and give this order again",
                stay.join("; ")
            );
            return Err(Failure::new(Code::State, why));
        }
        self.end_shadows(tell).await?;
        self.events.note(None, "safe to power off");
        Ok(format!(
            "host {here} is in maintenance and safe to power off"
        ))
    }

    /// Ends every shadow here and waits until their guests run alone on the other host.
    ///
    /// # Errors
    /// A guest runs here, come back while others were moved away, or one there is held.
    pub(crate) async fn end_shadows(&self, tell: &Tell) -> Result<(), Failure> {
        for process in self.processes() {
            if let Some((_, Some(Role::Primary))) = self.local_role(&process.name).await {
                let why = format!(
                    "host {} is not safe to power off: {} has come back to it; give this order again",
                    self.config.name, process.name
                );
                return Err(Failure::new(Code::State, why));
            }
            tell.progress(format!("ending the shadow of {} here", process.name));
            process.kill_and_wait().await;
            self.let_go(&process);
        }
        self.until_let_go().await
    }

    /// Whether the other host takes VMs, which one in maintenance does not; none when it does not answer.
    pub(crate) async fn peer_takes_vms(&self) -> Option<bool> {
        match self.peer.as_ref()?.forward(Request::Hosts, None).await {
            Ok(Reply::Hosts { hosts, .. }) => Some(hosts.iter().all(|host| !host.maintenance)),
            _ => None,
        }
    }

    /// Moves a VM that runs here to the other host.
    ///
    /// # Errors
    /// It can't be moved, or the other host does not take it; it runs here yet.
    pub(crate) async fn move_away(
        self: &Arc<Self>,
        process: &Arc<Process>,
        status: &process::Status,
        tell: &Tell,
    ) -> Result<(), Failure> {
        let name = process.name.as_str();
        let takes = self.peer_takes_vms().await;
        match status.mode {
            Mode::Ft | Mode::Ha if takes == Some(false) => Err(Failure::new(
                Code::Peer,
                "the other host is in maintenance, too",
            )),
            Mode::None => Err(Failure::new(
                Code::State,
                "mode none: it can't be moved; stop it, or `axvm set-mode` it to ft first",
            )),
            Mode::Ft if status.phase == Phase::Protected => {
                let _claim = self.claim(name).await?;
                control::order(&process.control, &process::Request::Failover, ORDERLY).await
            }
            Mode::Ft => Err(Failure::new(
                Code::State,
                "not protected now: the other host could not go on with it",
            )),
            Mode::Ha => {
                let peer = self.peer()?.clone();
                // Nothing is stopped that could not be started there.
                peer.processes().await?;
                let stopped = self.stop(name, stop::PATIENCE, Asker::Peer, tell).await;
                stop::stopped_in_any_way(stopped)?;
                let start = Request::Start {
                    name: name.to_owned(),
                    define: None,
                    wait: false,
                    alone_ok: true,
                    accept_loss: false,
                };
                peer.forward(start, Some(tell.0.clone())).await.map(drop)
            }
        }
    }

    /// Waits until the guests whose shadows were ended here run alone there: until then their outputs wait
    /// for the arbiter.
    pub(crate) async fn until_let_go(&self) -> Result<(), Failure> {
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        let deadline = Instant::now() + LETTING_GO;
        while let Ok(theirs) = peer.processes().await {
            let held: Vec<String> = theirs
                .iter()
                .filter(|p| {
                    let phase = p.status.as_ref().map(|s| &s.phase);
                    matches!(
                        phase,
                        None | Some(Phase::Held { .. } | Phase::FailingOver | Phase::Protected)
                    )
                })
                .map(|p| p.name.clone())
                .collect();
            if held.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                let why = format!(
                    "not safe to power off: held on host {}: {}",
                    peer.name(),
                    held.join(", ")
                );
                return Err(Failure::new(Code::State, why));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn end_maintenance(self: &Arc<Self>) -> Result<String, Failure> {
        let here = &self.config.name;
        let Some(maintenance) = self.read_maintenance() else {
            return Ok(format!("host {here} is in service"));
        };
        self.forget_maintenance()?;
        self.events.note(None, "operator: maintenance is over");
        let text = match maintenance.moved.is_empty() {
            true => format!("host {here} is in service"),
            false => format!(
                "host {here} is in service; {} will return once protected again",
                maintenance.moved.join(", ")
            ),
        };
        for name in maintenance.moved {
            tokio::spawn(self.clone().bring_back(name));
        }
        Ok(text)
    }

    /// Brings a VM back that a maintenance had moved away, once it is protected by this host, unless
    /// somebody has done something else with it by then.
    async fn bring_back(self: Arc<Self>, name: String) {
        let deadline = Instant::now() + RETURN;
        let Some(peer) = self.peer.clone() else {
            return;
        };
        while Instant::now() < deadline && !self.in_maintenance() {
            tokio::time::sleep(LOOK_EVERY).await;
            let Ok(shown) = self.show(&name, Asker::User).await else {
                return;
            };
            if shown.primary.as_ref() == Some(&self.config.name)
                || matches!(shown.state, State::Stopped | State::Failed)
            {
                return;
            }
            if shown.state == State::Protected {
                let failover = Request::Failover { name: name.clone() };
                let text = match peer.forward(failover, None).await {
                    Ok(_) => "returned after maintenance".to_owned(),
                    Err(failure) => format!("does not return after maintenance: {failure}"),
                };
                self.events.note(Some(&name), text);
                return;
            }
        }
    }
}

fn away(host: &str, why: String) -> HostReport {
    HostReport {
        host: host.to_owned(),
        why,
        ..HostReport::default()
    }
}
