//! Keeping watch over processes: their events, their end, and those an earlier axd left.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{HostWhat, PeerRequest, Reply};
use ax_api::process::{Arbiter, Event, Phase, Request, Role, What};
use ax_wire::Generation;

use crate::control::{self, Connection};
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::process::{Exit, FENCED, Places, Process};

/// How long, and how often, the other host is asked to end what is left of a lost pair.
const FENCE_TRIES: u32 = 60;
const FENCE_EVERY: Duration = Duration::from_millis(500);

impl Daemon {
    /// Watches a process to its end.
    pub fn supervise(self: &Arc<Self>, process: Arc<Process>) {
        let daemon = self.clone();
        let listening = tokio::spawn(daemon.listen(process.clone()));
        let daemon = self.clone();
        tokio::spawn(async move {
            let how = process.wait().await;
            // Its last events may still be in the socket.
            let clean = match tokio::time::timeout(Duration::from_secs(1), listening).await {
                Ok(Ok(clean)) => clean,
                _ => false,
            };
            if clean {
                daemon.mark_stopped_on_both(&process.name).await;
            }
            daemon.note_end(&process);
            daemon.let_go(&process);
            let ended_by_itself = !matches!(how, Exit::Status(0 | FENCED));
            let how = match daemon.last_end_of(&process.name) {
                Some(why) => format!("{how}: {why}"),
                None => how.to_string(),
            };
            let what = HostWhat::Exited {
                incarnation: process.incarnation,
                how,
            };
            let now = crate::events::now_ms();
            daemon.events.record(Some(&process.name), now, what);
            if !clean && ended_by_itself && !process.was_ended() {
                daemon.restart_here(&process).await;
            }
        });
    }

    /// Records what a process tells until it ends; whether it said it was stopped cleanly.
    async fn listen(self: Arc<Self>, process: Arc<Process>) -> bool {
        let mut lost = false;
        let mut clean = false;
        while process.exited().is_none() {
            let since = self.events.last_of(process.incarnation).saturating_add(1);
            let heard = async {
                let mut connection = Connection::open(&process.control).await?;
                let subscribe = Request::Subscribe { since };
                control::write_line(&mut connection.to, &subscribe).await?;
                while let Some(event) = control::read_line(&mut connection.from).await? {
                    self.heard(&process, event, &mut lost, &mut clean);
                }
                Ok::<(), std::io::Error>(())
            };
            if let Err(e) = heard.await {
                tracing::debug!("events of {}: {e}", process.name);
            }
            tokio::select! {
                _ = process.wait() => {}
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
        clean
    }

    fn heard(
        self: &Arc<Self>,
        process: &Arc<Process>,
        event: Event,
        lost: &mut bool,
        clean: &mut bool,
    ) {
        // One that was never granted to run was not missed by anybody.
        if let What::Phase {
            role: Role::Primary,
            phase: Phase::Alone | Phase::Syncing { .. } | Phase::Protected,
            ..
        } = &event.what
        {
            process.ran_guest();
        }
        if let What::Phase {
            role: Role::Primary,
            phase: Phase::Syncing { .. },
            ..
        } = &event.what
        {
            self.synced_anew(&process.name);
        }
        match &event.what {
            What::PeerLost { .. } => *lost = true,
            What::Phase {
                role: Role::Primary,
                phase: Phase::Alone,
                generation,
            } if *lost => {
                *lost = false;
                tokio::spawn(self.clone().fence(process.clone(), *generation));
            }
            What::Ended { why, clean: ended } => {
                process.tells_end(why, *ended);
                *clean |= *ended;
            }
            _ => {}
        }
        let what = HostWhat::Process {
            incarnation: process.incarnation,
            seq: event.seq,
            event: event.what,
        };
        self.events.record(Some(&process.name), event.at_ms, what);
    }

    /// Rule 24: has the other host end, and confirm the end of, what is left there of the pair,
    /// and tells the process that now runs alone.
    async fn fence(self: Arc<Self>, process: Arc<Process>, generation: Generation) {
        let Some(peer) = &self.peer else { return };
        // Where the hosts agree, the other side's process was part of it; where an operator spoke, the
        // hosts compare what they know first, as both may have been told to go on.
        if self.config.arbiter == Arbiter::Manual {
            return;
        }
        for _ in 0..FENCE_TRIES {
            if process.exited().is_some() {
                return;
            }
            let request = PeerRequest::Fence {
                pair: process.pair.to_string(),
                generation,
            };
            match peer.call(request).await {
                Ok(Reply::Gone { incarnations }) => {
                    for incarnation in incarnations {
                        let gone = Request::PeerGone { incarnation };
                        // It may not care any more.
                        let _ = control::order(&process.control, &gone, control::PATIENCE).await;
                    }
                    self.events.note(
                        Some(&process.name),
                        format!("host {} confirms that the old process is gone", peer.name()),
                    );
                    return;
                }
                Ok(_) => return,
                Err(_) => tokio::time::sleep(FENCE_EVERY).await,
            }
        }
    }

    /// Rule 24, the asked side: SIGKILL to processes of the pair under a generation before `before`,
    /// waited for. A shadow that waits for a primary is of the coming pair, not of the old one.
    pub async fn end_older(&self, pair: &str, before: Generation) -> Vec<ax_wire::Incarnation> {
        for process in self.processes() {
            if process.pair.to_string() != pair {
                continue;
            }
            let keep = match process.status().await {
                Some(s) => {
                    s.generation >= before
                        || (s.role == Role::Shadow
                            && before != Generation(u64::MAX)
                            && matches!(
                                s.phase,
                                Phase::Starting | Phase::Waiting | Phase::Syncing { .. }
                            ))
                }
                // It may hang in the middle of a promotion that was granted later than this was asked.
                None => self.granted(&process.name).is_some_and(|g| g >= before),
            };
            if !keep {
                process.kill_and_wait().await;
                self.let_go(&process);
                self.events.note(
                    Some(&process.name),
                    format!(
                        "ended its process {}: fenced by the other host",
                        process.pid
                    ),
                );
            }
        }
        match pair.parse() {
            Ok(pair) => self.gone(pair),
            Err(_) => vec![],
        }
    }

    /// The generation of the last record that a process of this VM has acted on here, durable before it did.
    fn granted(&self, name: &str) -> Option<Generation> {
        let file = self.config.vm_dir(name).join("state").join("record.json");
        let record = std::fs::read(file).ok()?;
        let record: ax_wire::record::Record = serde_json::from_slice(&record).ok()?;
        Some(record.generation)
    }

    /// Finds the processes an earlier axd started, takes them over, and ends what was half-started.
    pub async fn adopt(self: &Arc<Self>) -> Result<(), Failure> {
        let run = self.config.run_dir();
        std::fs::create_dir_all(&run)
            .map_err(|e| Failure::io(format!("making {}", run.display()), &e))?;
        let entries = std::fs::read_dir(&run)
            .map_err(|e| Failure::io(format!("reading {}", run.display()), &e))?;
        let names: std::collections::BTreeSet<String> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let stem = name.strip_suffix(".json").or(name.strip_suffix(".sock"))?;
                crate::config::check_name(stem).ok()?;
                Some(stem.to_owned())
            })
            .collect();
        for name in names {
            let places = Places::of(&self.config, &name);
            let Some(process) = Process::adopt(&places).await else {
                continue;
            };
            let process = Arc::new(process);
            self.hold(process.clone());
            self.supervise(process.clone());
            if self.is_half_started(&process).await {
                process.kill_and_wait().await;
                self.let_go(&process);
                self.events.note(
                    Some(&name),
                    "its start was cut short by the end of axd; ended what was left of it",
                );
            } else {
                self.events.note(
                    Some(&name),
                    format!("found again: process {} goes on", process.pid),
                );
                tokio::spawn(self.clone().tell_news(process.clone()));
            }
            self.journal(&name).end();
        }
        self.end_strays();
        Ok(())
    }

    /// The configuration may name another arbiter than when the process began: a change, once the other
    /// host's says so too (rule 27). And another machine may be the other host now.
    async fn tell_news(self: Arc<Self>, process: Arc<Process>) {
        let request = Request::Arbiter {
            arbiter: Box::new(self.config.arbiter.clone()),
            standby: self.config.standby.clone().map(Box::new),
        };
        if let Err(failure) = control::order(&process.control, &request, control::PATIENCE).await {
            tracing::warn!("{} does not hear of its arbiter: {failure}", process.name);
        }
        let Some(peer) = &self.config.peer else {
            return;
        };
        let request = Request::Peer {
            name: peer.name.clone(),
            addresses: peer.addresses.clone(),
            machine: self.config.partner_machine,
        };
        if let Err(failure) = control::order(&process.control, &request, control::PATIENCE).await {
            tracing::warn!(
                "{} does not hear of its other host: {failure}",
                process.name
            );
        }
    }

    /// A start that axd did not live to see through and that has no running guest to show for it. A
    /// guest that runs already goes on; its process needs no axd to become protected.
    async fn is_half_started(&self, process: &Process) -> bool {
        if !self.journal(&process.name).is_open() {
            return false;
        }
        let status = process.status().await;
        status.is_none_or(|s| {
            matches!(
                s.phase,
                Phase::Starting | Phase::Waiting | Phase::Held { .. } | Phase::Ending
            )
        })
    }

    /// Ends processes that run one of this axd's specifications and that nobody wrote down: axd ended
    /// between starting them and doing so.
    fn end_strays(&self) {
        let vms = self.config.data_dir.join("vms");
        let held: Vec<i32> = self.processes().iter().map(|p| p.pid).collect();
        for (pid, spec) in crate::process::running_specs(&vms) {
            if !held.contains(&pid) && crate::process::kill_stray(pid, &spec) {
                self.events.note(
                    None,
                    format!("ended stray process {pid} of {}", spec.display()),
                );
            }
        }
    }
}
