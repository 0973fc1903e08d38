//! How a VM is, taken over both hosts.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::process::{Phase, Role, Status};
use crate::vm::Vm;

/// A process of a VM, as one host sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// The host.
    pub host: String,
    /// The VM's name.
    pub name: String,
    /// The VM's identity, in hexadecimal.
    pub pair: String,
    /// Process id on that host.
    pub pid: i32,
    /// What it says of itself; none if it does not answer.
    pub status: Option<Status>,
    /// Why its guest has not got the shadow it should have, as far as axd has tried.
    #[serde(default)]
    pub why_unprotected: Option<String>,
}

/// Where a VM is, taken over both hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Runs nowhere.
    Stopped,
    /// Runs nowhere, and nobody has stopped it.
    Failed,
    /// On its way.
    Starting,
    /// Runs; the initial copy is on its way.
    Syncing,
    /// Runs, protected as its mode says.
    Protected,
    /// Runs without the protection that its mode asks for.
    Degraded,
    /// Runs, local only, as its mode says.
    Unprotected,
    /// On its way from one host to the other.
    FailingOver,
    /// May not run until a question is answered.
    Held,
    /// Paused by the operator.
    Paused,
    /// On its way out.
    Ending,
    /// A process does not answer, or the host that may run it does not.
    Unknown,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Stopped => "stopped",
            State::Failed => "failed",
            State::Starting => "starting",
            State::Syncing => "syncing",
            State::Protected => "protected",
            State::Degraded => "degraded",
            State::Unprotected => "unprotected",
            State::FailingOver => "failing over",
            State::Held => "held",
            State::Paused => "paused",
            State::Ending => "ending",
            State::Unknown => "unknown",
        })
    }
}

/// One VM over both hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its definition.
    pub vm: Vm,
    /// Where it is.
    pub state: State,
    /// Whether an operator may sleep: false when something is unprotected, held or unknown.
    pub healthy: bool,
    /// What there is to say beyond the state; empty with nothing to say.
    pub note: String,
    /// Host that runs it.
    pub primary: Option<String>,
    /// Host that shadows it.
    pub shadow: Option<String>,
    /// Its processes.
    pub processes: Vec<ProcessReport>,
    /// Who decides who may run it, in words; empty for one that needs no such decision.
    #[serde(default)]
    pub arbiter: String,
}

impl VmReport {
    /// Sums up what the processes of `vm` say. `unreachable` names a host that was asked and did
    /// not answer.
    pub fn sum_up(vm: Vm, processes: Vec<ProcessReport>, unreachable: Option<&str>) -> VmReport {
        let with_role = |role| {
            processes
                .iter()
                .filter_map(move |p| p.status.as_ref().filter(|s| s.role == role).map(|s| (p, s)))
        };
        // During a failover two processes can call themselves primary; the newer generation is right.
        let primary = with_role(Role::Primary).max_by_key(|(_, s)| s.generation);
        let shadow = with_role(Role::Shadow).max_by_key(|(_, s)| s.generation);
        let silent = processes.iter().find(|p| p.status.is_none());

        let state_of = |phase: &Phase| match phase {
            Phase::Starting | Phase::Waiting | Phase::Entering => (State::Starting, String::new()),
            Phase::Syncing { done, total } => {
                let percent = done.saturating_mul(100).checked_div(*total).unwrap_or(0);
                (State::Syncing, format!("{percent} %"))
            }
            Phase::Protected => (State::Protected, String::new()),
            Phase::Alone => (State::Degraded, "runs without a shadow".to_owned()),
            Phase::Unprotected => (State::Unprotected, String::new()),
            Phase::Held { waits_for } => (State::Held, format!("waits for {waits_for}")),
            Phase::FailingOver => (State::FailingOver, String::new()),
            Phase::Paused => (State::Paused, String::new()),
            Phase::Ending => (State::Ending, String::new()),
            Phase::Other => (
                State::Unknown,
                "its process is of a later build than this axd".to_owned(),
            ),
        };
        let (state, note) = match (primary, shadow) {
            (Some((process, status)), _) => match (&status.phase, &process.why_unprotected) {
                (Phase::Syncing { .. }, _) => {
                    let (state, percent) = state_of(&status.phase);
                    match status.sync_left_s {
                        Some(left) => (state, format!("{percent}, about {left} s left")),
                        None => (state, percent),
                    }
                }
                (phase, _) if status.disk_fails.is_some() => {
                    let why = status.disk_fails.as_deref().unwrap_or_default();
                    let state = match phase {
                        Phase::Alone | Phase::Unprotected | Phase::Protected
                            if status.disk_holds =>
                        {
                            State::Held
                        }
                        phase => state_of(phase).0,
                    };
                    (state, format!("a disk of its host fails: {why}"))
                }
                (Phase::Alone, Some(why)) => {
                    (State::Degraded, format!("runs without a shadow: {why}"))
                }
                (phase, _) => state_of(phase),
            },
            (None, _) if silent.is_some() => (
                State::Unknown,
                silent
                    .map(|p| format!("its process {} on {} does not answer", p.pid, p.host))
                    .unwrap_or_default(),
            ),
            (None, Some((_, status))) => match &status.phase {
                Phase::Held { .. } | Phase::FailingOver => state_of(&status.phase),
                _ => match unreachable {
                    Some(host) => (State::Unknown, format!("host {host} does not answer")),
                    None => (State::Starting, "a shadow without a primary".to_owned()),
                },
            },
            (None, None) => match unreachable {
                Some(host) => (
                    State::Unknown,
                    format!("runs not here; host {host} does not answer"),
                ),
                None => (State::Stopped, String::new()),
            },
        };
        let healthy = match state {
            State::Protected | State::Paused | State::Ending => true,
            State::Stopped => !vm.autostart,
            // Unprotected on purpose is unprotected all the same: the host may not die.
            State::Unprotected
            | State::Starting
            | State::Syncing
            | State::Degraded
            | State::FailingOver
            | State::Failed
            | State::Held
            | State::Unknown => false,
        };
        let warning = processes
            .iter()
            .find_map(|p| p.status.as_ref()?.warning.clone());
        let (healthy, note) = match warning {
            Some(warning) => (false, format!("ALARM: {warning}")),
            None => (healthy, note),
        };
        VmReport {
            arbiter: String::new(),
            state,
            healthy,
            note,
            primary: primary.map(|(p, _)| p.host.clone()),
            shadow: shadow.map(|(p, _)| p.host.clone()),
            vm,
            processes,
        }
    }
}

/// How the other host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its name.
    pub host: String,
    /// Whether its axd answers.
    pub reachable: bool,
    /// Why not; empty when it does.
    pub why: String,
}

/// A network that the two hosts share, as one of them finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPath {
    /// Where the other host's axd is asked.
    pub address: SocketAddr,
    /// Whether it answers there; none before that is known.
    pub up: Option<bool>,
    /// Why not; empty when it does.
    pub why: String,
}

/// A host of the pair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Its name.
    pub host: String,
    /// Whether its axd answers; what follows is known only then.
    pub reachable: bool,
    /// Why not; empty when it does.
    pub why: String,
    /// Its axd's version.
    pub version: String,
    /// Newest wire version its axd's build speaks.
    #[serde(default = "crate::first_wire")]
    pub wire: u16,
    /// It takes no VM.
    pub maintenance: bool,
    /// It takes no VM because it is being shut down.
    #[serde(default)]
    pub shutting_down: bool,
    /// Memory in all, and available, bytes.
    pub memory: [u64; 2],
    /// VMs that run there.
    pub runs: Vec<String>,
    /// VMs whose shadow is there.
    pub shadows: Vec<String>,
    /// The networks by which it asks the other host.
    #[serde(default)]
    pub paths: Vec<HostPath>,
}
