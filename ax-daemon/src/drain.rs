//! A host that is about to be shut down: an orderly shutdown is a planned failover, not a failure.
//!
//! `axd-drain.service` gives the order when systemd shuts the host down, before axd and the network end. It is
//! a maintenance ([`crate::maintenance`]) that loses no guest's work to the shutdown:
//!
//! ```text
//!   protected                   moved by planned failover; mode ha: stopped here, started there
//!   about to be protected       waited for, then moved
//!   neither, or both hosts are shut down
//!                               stopped, all at once, its guest asked first; with autostart it comes up at
//!                               the next boot
//! ```
//! The maintenance belongs to this boot of the host and is over at the next one. A restart of axd alone neither
//! begins nor ends it.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::Code;
use ax_api::process::{self, Phase, Role, Status};
use ax_api::vm::Mode;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;
use crate::journal::boot_id;
use crate::maintenance::Maintenance;
use crate::ops::ORDERLY;
use crate::process::Process;
use crate::stop;

/// How often what is left is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often a VM that can be neither moved nor stopped is tried.
const TRIES: u32 = 3;
/// Between them.
const PAUSE: Duration = Duration::from_secs(2);

/// What is to be done with a VM that runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// To the other host.
    Move,
    /// Its pause is the operator's and does not go along: without it, it can be moved.
    Unpause,
    /// It may be protected soon.
    Wait,
    /// In order.
    Stop,
    /// It is on its way out.
    Leave,
}

/// What is to be done with a VM in this phase. `takes`: whether the other host takes VMs, none when it does not
/// answer; a guest that is protected needs no axd there to go on there. `hope`: there is time to wait for a
/// shadow that is being looked for.
fn step(mode: Mode, phase: &Phase, takes: Option<bool>, hope: bool) -> Step {
    let hope = hope && takes == Some(true);
    match (mode, phase) {
        (_, Phase::Ending | Phase::FailingOver) => Step::Leave,
        (Mode::Ft, Phase::Protected) if takes != Some(false) => Step::Move,
        (Mode::Ha, Phase::Protected) if takes == Some(true) => Step::Move,
        (Mode::Ft, Phase::Paused) if takes != Some(false) => Step::Unpause,
        (
            Mode::Ft | Mode::Ha,
            Phase::Syncing { .. } | Phase::Entering | Phase::Starting | Phase::Alone,
        ) if hope => Step::Wait,
        _ => Step::Stop,
    }
}

impl Daemon {
    /// Empties this host within `patience`.
    ///
    /// # Errors
    /// Something runs here yet, which is named; the host stays closed to new VMs.
    pub async fn drain(
        self: &Arc<Self>,
        patience: Duration,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let here = self.config.name.clone();
        if self.read_maintenance().is_none() {
            self.write_maintenance(&Maintenance {
                shutdown: Some(boot_id()),
                ..Maintenance::default()
            })?;
        }
        self.events
            .note(None, "the host is being shut down: it is being emptied");
        let deadline = Instant::now() + patience;
        let mut stopped = vec![];
        let emptied =
            tokio::time::timeout_at(deadline, self.empty(deadline, &mut stopped, tell)).await;
        let result = match emptied {
            Ok(emptied) => emptied,
            Err(_) => Err(self.still_here(patience).await),
        };
        if let Err(failure) = result {
            self.events.note(None, format!("not emptied: {failure}"));
            return Err(failure);
        }
        let mut text = format!("host {here} is empty and may be shut down");
        let by_hand: Vec<_> = stopped
            .into_iter()
            .filter(|name| !self.store.vm(name).is_ok_and(|vm| vm.autostart))
            .collect();
        if !by_hand.is_empty() {
            text = format!(
                "{text}; stopped, and not autostart, so to be started by hand: {}",
                by_hand.join(", ")
            );
        }
        self.events.note(None, text.clone());
        Ok(text)
    }

    async fn empty(
        self: &Arc<Self>,
        deadline: Instant,
        stopped: &mut Vec<String>,
        tell: &Tell,
    ) -> Result<(), Failure> {
        // Half the time for what is about to be protected, the rest for stopping what is not by then.
        let hope_until = Instant::now() + deadline.duration_since(Instant::now()) / 2;
        let mut tries = 0;
        let mut waits = vec![];
        loop {
            let (mut left, mut stay) = (vec![], vec![]);
            let takes = self.peer_takes_vms().await;
            let hope = Instant::now() < hope_until;
            let mut stops = JoinSet::new();
            for process in self.processes() {
                let status = process.status().await;
                match &status {
                    Some(status) if status.role == Role::Shadow => continue,
                    Some(status) => {
                        let looked_for = self.config.reprotect
                            && !self.unprotected.lock().contains_key(&process.name);
                        let step = step(status.mode, &status.phase, takes, hope && looked_for);
                        if step == Step::Stop {
                            let (daemon, tell) = (self.clone(), tell.clone());
                            let stop =
                                daemon.stop_for_shutdown(process.name.clone(), deadline, tell);
                            stops.spawn(stop);
                            continue;
                        }
                        match self.take(step, &process, status, tell).await {
                            Ok(true) => {}
                            Ok(false) => left.push(process.name.clone()),
                            Err(failure) => stay.push(format!("{} ({failure})", process.name)),
                        }
                    }
                    None => stay.push(format!("{} (does not answer)", process.name)),
                }
            }
            while let Some(joined) = stops.join_next().await {
                match joined {
                    Ok(Ok(name)) => stopped.push(name),
                    Ok(Err((name, failure))) => stay.push(format!("{name} ({failure})")),
                    Err(e) => stay.push(e.to_string()),
                }
            }
            if left.is_empty() && stay.is_empty() {
                break;
            }
            if waits != left && !left.is_empty() {
                tell.progress(format!("waiting for {}", left.join(", ")));
                waits.clone_from(&left);
            }
            if !stay.is_empty() {
                tries += 1;
                if tries == TRIES {
                    return Err(self.not_empty(&stay.join("; ")));
                }
                tokio::time::sleep(PAUSE).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.end_shadows(tell).await
    }

    /// Takes a step with one VM; whether nothing of it runs here any more.
    async fn take(
        self: &Arc<Self>,
        step: Step,
        process: &Arc<Process>,
        status: &Status,
        tell: &Tell,
    ) -> Result<bool, Failure> {
        let name = process.name.as_str();
        let text = match step {
            Step::Wait | Step::Leave | Step::Stop => return Ok(false),
            Step::Unpause => {
                control::order(&process.control, &process::Request::Resume, ORDERLY).await?;
                "not paused any more"
            }
            Step::Move => {
                tell.progress(format!("moving {name} away"));
                self.move_away(process, status, tell).await?;
                "moved away"
            }
        };
        let text = format!("{text}: its host is being shut down");
        self.events.note(Some(name), text);
        Ok(step != Step::Unpause)
    }

    /// Stops a VM that can't be moved. Its guest has half of what is left to shut itself down, so that there
    /// is time to stop it all the same.
    async fn stop_for_shutdown(
        self: Arc<Self>,
        name: String,
        deadline: Instant,
        tell: Tell,
    ) -> Result<String, (String, Failure)> {
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = stop::PATIENCE.min(left / 2);
        let done = self.stop(&name, patience, Asker::Peer, &tell).await;
        match stop::stopped_in_any_way(done) {
            Ok(()) => {
                let text = "stopped: its host is being shut down";
                self.events.note(Some(&name), text);
                Ok(name)
            }
            Err(failure) => Err((name, failure)),
        }
    }

    fn not_empty(&self, what: &str) -> Failure {
        let why = format!(
            "host {} is not empty: still there: {what}. What is protected goes on there or on the other \
             host by failover when this one ends; the rest ends with it, as by a crash",
            self.config.name
        );
        Failure::new(Code::State, why)
    }

    async fn still_here(&self, patience: Duration) -> Failure {
        let reports = self.reports().await;
        let names: Vec<_> = reports.into_iter().map(|report| report.name).collect();
        let mut failure = self.not_empty(&names.join(", "));
        failure.why = format!("after {} s {}", patience.as_secs(), failure.why);
        failure
    }

    /// Ends the maintenance that a shutdown of an earlier boot began: the host is back.
    pub fn end_shutdown(&self) {
        let of_boot = self.read_maintenance().and_then(|m| m.shutdown);
        if of_boot.is_none_or(|boot| boot == boot_id()) {
            return;
        }
        let text = match self.forget_maintenance() {
            Ok(()) => "back after a shutdown: in service".to_owned(),
            Err(failure) => format!("back after a shutdown, but takes no VM: {failure}"),
        };
        self.events.note(None, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing that could be kept running is stopped, and nothing is waited for without hope.
    #[test]
    fn what_can_be_moved_is_moved_what_may_be_soon_is_waited_for_the_rest_is_stopped() {
        use Step::{Leave, Move, Stop, Unpause, Wait};
        let syncing = Phase::Syncing { done: 1, total: 2 };
        let held = Phase::Held {
            waits_for: "the witness".into(),
        };
        // With the other host taking VMs, not answering, and in maintenance itself.
        let cases = [
            (Mode::Ft, Phase::Protected, [Move, Move, Stop]),
            (Mode::Ha, Phase::Protected, [Move, Stop, Stop]),
            (Mode::Ft, Phase::Paused, [Unpause, Unpause, Stop]),
            (Mode::Ft, syncing.clone(), [Wait, Stop, Stop]),
            (Mode::Ha, syncing, [Wait, Stop, Stop]),
            (Mode::Ft, Phase::Entering, [Wait, Stop, Stop]),
            (Mode::Ft, Phase::Alone, [Wait, Stop, Stop]),
            (Mode::Ft, held, [Stop; 3]),
            (Mode::None, Phase::Unprotected, [Stop; 3]),
            (Mode::None, Phase::Paused, [Stop; 3]),
            (Mode::Ft, Phase::Ending, [Leave; 3]),
        ];
        for (mode, phase, wanted) in cases {
            for (takes, wanted) in [Some(true), None, Some(false)].into_iter().zip(wanted) {
                let said = format!("{mode} {phase:?} {takes:?}");
                assert_eq!(step(mode, &phase, takes, true), wanted, "{said}");
                let hopeless = if wanted == Wait { Stop } else { wanted };
                assert_eq!(step(mode, &phase, takes, false), hopeless, "{said}");
            }
        }
    }
}
