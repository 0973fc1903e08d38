//! Stopping a VM: its guest is asked by its power button first, and stopped in order all the same if it does not
//! shut itself down in time.
//!
//! ```text
//!   press ──guest listens──► wait ──it switches itself off──► stopped
//!     ▲                       │ └──time is over──► orderly stop (rule 26), and the failure says so
//!     └─guest runs elsewhere──┘
//!   press ──it does not, or stands still──► orderly stop
//! ```
//! A press is no part of the pair's record: one that was in no committed epoch is lost with its host. So
//! whoever waits watches where the guest runs, and presses there again. While it waits the VM is not claimed:
//! the guest could switch itself off at any time, too, and a second stop may be less patient.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, PeerRequest, Request, STOP_TIMEOUT_S};
use ax_api::process::{self, Phase, Press, Role};
use ax_api::vm::{Mode, Vm};
use ax_wire::Generation;
use tokio::time::Instant;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;
use crate::ops::ORDERLY;
use crate::process::{Exit, Process};

/// How long the processes of a stopped VM may take to be gone.
const GOING: Duration = Duration::from_secs(10);
/// How often a guest that has been asked is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often it is told that it is waited for.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// How long a guest may take to go on elsewhere, when its process ended while it was asked.
const GOES_ON: Duration = Duration::from_secs(15);
/// How much later than the detection time a shadow may begin to take over.
const TAKES_OVER: Duration = Duration::from_secs(3);
/// How long after its end a process may still be telling of it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a guest has to shut itself down, where an operator says nothing else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(STOP_TIMEOUT_S);

/// A guest that is being asked to shut itself down.
struct Asking {
    patience: Duration,
    until: Instant,
    /// It has been asked, where it runs now.
    asked: bool,
    /// Why it is not asked.
    not_asked: Option<&'static str>,
}

/// How a wait for a guest ended.
enum Waited {
    /// It has switched itself off, or ended in another way that is in the record.
    Ended(String),
    /// It does not run in that process any more, but may elsewhere.
    Left,
    /// Time is over.
    TimeOver,
}

/// Why a guest in this phase can't be asked, if it can't.
fn why_not(phase: &Phase) -> Option<&'static str> {
    match phase {
        Phase::Paused => Some("is paused"),
        Phase::Held { .. } => Some("is held"),
        Phase::Syncing { .. }
        | Phase::Entering
        | Phase::Protected
        | Phase::Alone
        | Phase::Unprotected => None,
        Phase::Starting | Phase::Waiting | Phase::FailingOver | Phase::Ending => {
            Some("is between two states")
        }
        Phase::Other => Some("is in a state that this axd does not know"),
    }
}

/// A guest that was asked in vain is stopped, too.
///
/// # Errors
/// It is not stopped.
pub(crate) fn stopped_in_any_way(stopped: Result<String, Failure>) -> Result<(), Failure> {
    match stopped {
        Err(failure) if failure.code != Code::Forced => Err(failure),
        _ => Ok(()),
    }
}

impl Daemon {
    /// Stops a VM in order, on whichever host it runs, and waits until its processes are gone. Its guest has
    /// `patience` to shut itself down; none at all: it is not asked.
    ///
    /// # Errors
    /// It does not run, or refuses. [`Code::Forced`]: it is stopped, but its guest was asked in vain.
    pub async fn stop(
        self: &Arc<Self>,
        name: &str,
        patience: Duration,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let vm = self.store.vm(name)?;
        let mut asking = Asking {
            patience,
            until: Instant::now() + patience,
            asked: false,
            not_asked: None,
        };
        loop {
            if let Some((process, Some(Role::Primary))) = self.local_role(name).await {
                if let Some(text) = self.stop_here(&vm, &process, &mut asking, tell).await? {
                    return Ok(text);
                }
                if asker == Asker::Peer {
                    let why = format!("{name} left host {} while it was stopped", self.config.name);
                    return Err(Failure::new(Code::Peer, why));
                }
                self.until_it_goes_on(&vm).await?;
                continue;
            }
            let left = asking.until.saturating_duration_since(Instant::now());
            let request = Request::Stop {
                name: name.to_owned(),
                force: false,
                // One that changed hosts on the way gets a second at least: 0 would mean that it is not asked.
                timeout_s: match patience.is_zero() {
                    true => 0,
                    false => (left.as_secs_f64().ceil() as u64).max(1),
                },
            };
            let stopped = self
                .forward_or_not_running(name, request, asker, tell)
                .await;
            match stopped {
                Err(failure) if failure.code == Code::Peer => {
                    if !self.takes_over_here(name).await {
                        return Err(failure);
                    }
                }
                Err(failure) if failure.code != Code::Forced => return Err(failure),
                stopped => {
                    self.mark_stopped(name);
                    self.until_gone_here(name).await;
                    return stopped;
                }
            }
        }
    }

    /// Stops a guest that runs here; none when it left this process while it was asked.
    async fn stop_here(
        self: &Arc<Self>,
        vm: &Vm,
        process: &Arc<Process>,
        asking: &mut Asking,
        tell: &Tell,
    ) -> Result<Option<String>, Failure> {
        let name = vm.name.as_str();
        if !asking.patience.is_zero() {
            self.ask(process, asking, tell).await;
        }
        if asking.asked {
            match self.wait_for_guest(process, asking, tell).await? {
                Waited::Left => return Ok(None),
                Waited::TimeOver => {}
                Waited::Ended(why) => {
                    self.clear_up(vm, process).await;
                    self.events
                        .note(Some(name), format!("operator: stopped: {why}"));
                    return Ok(Some(format!("{name} is stopped: {why}")));
                }
            }
        }
        let _claim = match self.claim(name).await {
            Ok(claim) => claim,
            Err(failure) if asking.asked => {
                // Perhaps another stop whose time is over.
                let gone = tokio::time::timeout(ORDERLY, process.wait()).await.is_ok();
                return match self.last_words(process).await {
                    Some((why, true)) if gone => Ok(Some(format!("{name} is stopped: {why}"))),
                    _ => Err(failure),
                };
            }
            Err(failure) => return Err(failure),
        };
        tell.progress(format!("stopping {name}"));
        let ordered = control::order(&process.control, &process::Request::Stop, ORDERLY).await;
        if let Err(failure) = ordered {
            // It may have been on its way out when the order came.
            let ends = matches!(
                process.status().await,
                None | Some(process::Status {
                    phase: Phase::Ending,
                    ..
                })
            );
            let gone = ends && tokio::time::timeout(GOING, process.wait()).await.is_ok();
            if !gone
                || self
                    .last_words(process)
                    .await
                    .is_none_or(|(_, clean)| !clean)
            {
                return Err(failure);
            }
        }
        self.clear_up(vm, process).await;
        if asking.asked {
            let seconds = asking.patience.as_secs();
            let why =
                format!("its guest was asked, and did not switch itself off within {seconds} s");
            self.events
                .note(Some(name), format!("operator: stopped: {why}"));
            return Err(Failure::new(
                Code::Forced,
                format!("{name} is stopped, but {why}"),
            ));
        }
        self.events.note(Some(name), "operator: stopped");
        Ok(Some(match asking.not_asked {
            Some(why) => format!("{name} is stopped at once: its guest {why}, so it was not asked"),
            None => format!("{name} is stopped"),
        }))
    }

    /// Presses the power button.
    async fn ask(&self, process: &Arc<Process>, asking: &mut Asking, tell: &Tell) {
        let name = process.name.as_str();
        let phase = process.status().await.map(|status| status.phase);
        asking.not_asked = match phase.as_ref().map(why_not) {
            Some(None) => match control::press(&process.control).await {
                Ok(Press::Pressed) => None,
                Ok(Press::NobodyListens) => Some("does not listen to its power button"),
                Ok(Press::StandsStill) => Some("stands still"),
                // Of an earlier build, too.
                Err(_) => Some("can't be reached by its process"),
            },
            Some(why) => why,
            None => Some("is not told of by its process"),
        };
        asking.asked = asking.not_asked.is_none();
        if asking.asked {
            let left = asking.until.saturating_duration_since(Instant::now());
            let text = format!(
                "asked the guest of {name} to shut itself down; it has {} s",
                left.as_secs_f64().ceil() as u64
            );
            self.events.note(Some(name), format!("operator: {text}"));
            tell.progress(text);
        }
    }

    /// Waits for a guest that has been asked.
    ///
    /// # Errors
    /// It has ended, but its disks here could not be made durable.
    async fn wait_for_guest(
        &self,
        process: &Arc<Process>,
        asking: &Asking,
        tell: &Tell,
    ) -> Result<Waited, Failure> {
        let asked = Instant::now();
        let mut told = asked;
        loop {
            if let Some(exit) = process.exited() {
                return match self.last_words(process).await {
                    Some((why, true)) => Ok(Waited::Ended(why)),
                    Some((why, false)) if exit == Exit::Status(0) => Err(Failure::new(
                        Code::Failed,
                        format!("{} has ended: {why}", process.name),
                    )),
                    _ => Ok(Waited::Left),
                };
            }
            let status = process.status().await;
            let ending = status.as_ref().is_some_and(|s| s.phase == Phase::Ending);
            if status.is_some_and(|s| s.role == Role::Shadow) {
                return Ok(Waited::Left);
            }
            // One that is on its way out is left to it, as long as an orderly stop may take.
            let late = Instant::now().saturating_duration_since(asking.until);
            if late > if ending { ORDERLY } else { Duration::ZERO } {
                return Ok(Waited::TimeOver);
            }
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                let (so_far, all) = (asked.elapsed().as_secs(), asking.patience.as_secs());
                tell.progress(format!(
                    "waiting for the guest of {} to shut itself down: {so_far} of {all} s",
                    process.name
                ));
            }
            let next = LOOK_EVERY.min(asking.until.saturating_duration_since(Instant::now()));
            let next = next.max(Duration::from_millis(10));
            // Its end is seen at once.
            let _ = tokio::time::timeout(next, process.wait()).await;
        }
    }

    /// Why a process that is gone said that it ended, and whether the record says stopped in order.
    async fn last_words(&self, process: &Arc<Process>) -> Option<(String, bool)> {
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            match process.told_end() {
                Some(told) => return Some(told),
                None if Instant::now() >= deadline => return None,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Waits until a guest that has left its process here runs on somewhere.
    ///
    /// # Errors
    /// It does not.
    async fn until_it_goes_on(&self, vm: &Vm) -> Result<(), Failure> {
        let patience = match vm.mode {
            Mode::None => Duration::ZERO,
            Mode::Ft | Mode::Ha => GOES_ON,
        };
        let deadline = Instant::now() + patience;
        let pair = vm.pair.to_string();
        while Instant::now() < deadline {
            let (reports, _) = self.reports_of_both(Asker::User).await;
            let of_it = |p: &&ax_api::host::ProcessReport| p.pair == pair;
            let runs = reports
                .iter()
                .filter(of_it)
                .any(|p| p.status.as_ref().is_some_and(|s| s.role == Role::Primary));
            if runs {
                return Ok(());
            }
            if reports.iter().filter(of_it).count() == 0 && self.is_marked_stopped(&vm.name) {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let why = format!(
            "{} ended while its guest was asked to shut itself down, without having shut down, and nobody runs \
             it now; `axvm events {}` tells how",
            vm.name, vm.name
        );
        Err(Failure::new(Code::State, why))
    }

    /// Whether the shadow here becomes the primary, after the other host or its guest was lost.
    async fn takes_over_here(&self, name: &str) -> bool {
        let detect = Duration::from_millis(self.config.timing.detect_ms);
        let (begins, ends) = (
            Instant::now() + detect + TAKES_OVER,
            Instant::now() + detect + GOES_ON,
        );
        while let Some(process) = self.process(name) {
            let following = match process.status().await {
                Some(status) if status.role == Role::Primary => return true,
                Some(status) => status.phase == Phase::Protected,
                None => true,
            };
            if Instant::now() > if following { begins } else { ends } {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        false
    }

    /// What follows an orderly stop: both hosts know of it, and the VM's processes are gone.
    async fn clear_up(self: &Arc<Self>, vm: &Vm, process: &Arc<Process>) {
        self.mark_stopped_on_both(&vm.name).await;
        self.until_gone(process).await;
        // The other side exits by the same record; if it does not, it is ended: the record says
        // stopped, so nothing can be lost. A user's axd there waits for its own.
        if let Some(peer) = &self.peer
            && vm.mode != Mode::None
        {
            let pair = vm.pair.to_string();
            let deadline = Instant::now() + GOING;
            while let Ok(theirs) = peer.processes().await
                && theirs.iter().any(|p| p.pair == pair)
            {
                if Instant::now() > deadline {
                    let generation = Generation(u64::MAX);
                    let _ = peer.call(PeerRequest::Fence { pair, generation }).await;
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn until_gone(&self, process: &Arc<Process>) {
        if tokio::time::timeout(GOING, process.wait()).await.is_err() {
            process.kill_and_wait().await;
        }
        self.let_go(process);
    }

    async fn until_gone_here(&self, name: &str) {
        if let Some(process) = self.process(name) {
            self.until_gone(&process).await;
        }
    }

    /// Ends a VM's processes on both hosts at once, without a record.
    ///
    /// # Errors
    /// There is no such VM, or nothing of it runs on a host that answers.
    pub async fn stop_by_force(
        self: &Arc<Self>,
        name: &str,
        asker: Asker,
    ) -> Result<String, Failure> {
        let vm = self.store.vm(name)?;
        self.mark_stopped(name);
        let local = self.local_role(name).await;
        let here_first = matches!(&local, Some((_, Some(Role::Shadow))));
        let end_here = async {
            if let Some((process, _)) = &local {
                process.kill_and_wait().await;
                self.let_go(process);
            }
        };
        let end_there = async {
            match (asker, &self.peer) {
                (Asker::User, Some(peer)) if vm.mode != ax_api::vm::Mode::None => {
                    let request = Request::Stop {
                        name: name.to_owned(),
                        force: true,
                        timeout_s: STOP_TIMEOUT_S,
                    };
                    match peer.forward(request, None).await {
                        Ok(_) => Some(Ok(())),
                        Err(failure) if matches!(failure.code, Code::State | Code::NoSuchVm) => {
                            None
                        }
                        Err(failure) => Some(Err(failure)),
                    }
                }
                _ => None,
            }
        };
        // The shadow first: with its primary gone it might take over.
        let there = if here_first {
            end_here.await;
            end_there.await
        } else {
            let there = end_there.await;
            end_here.await;
            there
        };
        match (local.is_some(), there) {
            (false, None) => Err(self.does_not_run(name)),
            (false, Some(Err(failure))) => Err(failure),
            (true, Some(Err(failure))) => Ok(format!(
                "the process of {name} on {} is ended; what runs on the other host is not known: {failure}",
                self.config.name
            )),
            (_, Some(Ok(())) | None) => {
                self.events.note(Some(name), "operator: stopped by force");
                Ok(format!(
                    "{name} is ended, without a record of an orderly stop"
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that can't answer is not waited for.
    #[test]
    fn only_a_guest_that_runs_is_asked() {
        let syncing = Phase::Syncing { done: 1, total: 2 };
        for phase in [
            Phase::Protected,
            Phase::Alone,
            Phase::Unprotected,
            Phase::Entering,
            syncing,
        ] {
            assert_eq!(why_not(&phase), None, "{phase:?}");
        }
        let held = Phase::Held {
            waits_for: "the witness".into(),
        };
        for phase in [Phase::Paused, held, Phase::FailingOver, Phase::Ending] {
            assert!(why_not(&phase).is_some(), "{phase:?}");
        }
    }
}
