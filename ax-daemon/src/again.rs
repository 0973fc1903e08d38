//! Protection that was lost comes back by itself.
//!
//! A guest that runs here alone though its mode asks for more gets a new shadow as soon as the other host
//! answers: what is left there of the old pair is ended (rule 24: this process runs alone by the
//! arbiter's grant, so nothing older may), memory and disks are copied while the guest runs, and then it
//! is protected. What fails is tried again, less and less often, and said once.
//!
//! An operator's command comes first: the VM is claimed only until its process has taken the new
//! shadow, and a command waits that long rather than be refused. A stop ends the copying.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, PeerRequest, ProcessReport, Reply};
use ax_api::process::{Arbiter, Phase, Request, Role, Status};
use ax_api::vm::Mode;
use ax_wire::Generation;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::control;
use crate::daemon::Daemon;
use crate::define;
use crate::failure::Failure;
use crate::ops::ORDERLY;
use crate::process::Process;
use crate::start::Shadow;

/// How often VMs that run alone are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Before the second attempt; twice as long before each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// Longest time between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often a VM being protected is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// How long a VM may run alone again before its new shadow counts as lost.
const SETBACK: Duration = Duration::from_secs(2);
/// VMs copied at once: each takes a share of the link and of the guests' memory bandwidth, and one that
/// is protected soon is better than all of them late.
const AT_ONCE: usize = 2;

impl Daemon {
    /// Looks, for ever, for VMs here that run without the shadow they should have.
    pub async fn keep_protected(self: Arc<Self>) {
        if self.peer.is_none() {
            return;
        }
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let mut under_way: HashMap<String, JoinHandle<()>> = HashMap::new();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            under_way.retain(|_, task| !task.is_finished());
            for process in self.processes() {
                if under_way.contains_key(&process.name) {
                    continue;
                }
                self.take_mode(&process).await;
                if self.runs_alone(&process).await.is_some() {
                    let task = self.clone().protect_again(process.clone(), turns.clone());
                    under_way.insert(process.name.clone(), tokio::spawn(task));
                }
            }
        }
    }

    /// A change of mode that an earlier axd did not see through is taken up: what the definition says is
    /// what was wanted.
    async fn take_mode(self: &Arc<Self>, process: &Process) {
        let wanted = self.store.vm(&process.name).map(|vm| vm.mode);
        let Some(status) = process.status().await else {
            return;
        };
        if wanted.is_ok_and(|mode| mode == Mode::None)
            && status.mode != Mode::None
            && status.role == Role::Primary
            && let Ok(_claim) = self.claim_behind(&process.name)
        {
            let none = Request::SetMode { mode: Mode::None };
            if let Err(failure) = control::order(&process.control, &none, ORDERLY).await {
                tracing::warn!("{} does not take mode none: {failure}", process.name);
            }
        }
    }

    /// What the process says if it runs a guest without the shadow that it should have.
    async fn runs_alone(&self, process: &Process) -> Option<Status> {
        let wanted = self.store.vm(&process.name).ok()?.mode;
        if wanted == Mode::None || process.exited().is_some() {
            return None;
        }
        let status = process.status().await?;
        let alone = status.role == Role::Primary
            && matches!(status.phase, Phase::Alone | Phase::Unprotected);
        alone.then_some(status)
    }

    /// Tries until the VM is protected again, or is not to be any more.
    async fn protect_again(self: Arc<Self>, process: Arc<Process>, turns: Arc<Semaphore>) {
        let mut pause = FIRST_PAUSE;
        while self.runs_alone(&process).await.is_some() {
            let Ok(turn) = turns.acquire().await else {
                return;
            };
            let tried = self.try_to_protect(&process).await;
            drop(turn);
            match tried {
                Ok(()) => break,
                Err(failure) => {
                    let said = failure.to_string();
                    if self.unprotected.lock().insert(process.name.clone(), said)
                        != Some(failure.to_string())
                    {
                        let text = format!("runs without a shadow, another try follows: {failure}");
                        self.events.note(Some(&process.name), text);
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                () = self.peer_back.notified() => pause = FIRST_PAUSE,
            }
        }
        self.unprotected.lock().remove(&process.name);
    }

    /// One attempt, to its end.
    ///
    /// # Errors
    /// Why the VM is not protected; nothing is left of the attempt.
    async fn try_to_protect(self: &Arc<Self>, process: &Arc<Process>) -> Result<(), Failure> {
        let peer = self.peer()?.clone();
        let Ok(claim) = self.claim_behind(&process.name) else {
            return Ok(()); // what is being done with it comes first
        };
        let Some(status) = self.runs_alone(process).await else {
            return Ok(());
        };
        let operation = self.find_shadow(process, status.generation).await?;
        drop(claim);
        let name = process.name.clone();
        match until_protected(process).await {
            Ok(()) => {
                let text = format!("protected by host {} again", peer.name());
                self.events.note(Some(&name), text);
                let _ = peer.call(PeerRequest::Settle { name, operation }).await;
                Ok(())
            }
            Err(mut failure) => {
                let undo = PeerRequest::Undo {
                    name,
                    operation,
                    spare: true,
                };
                if let Ok(Reply::Done { text }) = peer.call(undo).await
                    && !text.is_empty()
                {
                    failure.why = format!("{}: host {}: {text}", failure.why, peer.name());
                }
                Err(failure)
            }
        }
    }

    /// Gives the process, which runs alone or unprotected, a new shadow as its definition says; returns the
    /// name of the operation, to be settled or undone. The VM is claimed.
    ///
    /// # Errors
    /// There is none to be had; nothing is left.
    pub(crate) async fn find_shadow(
        self: &Arc<Self>,
        process: &Arc<Process>,
        generation: Generation,
    ) -> Result<u64, Failure> {
        let peer = self.peer()?.clone();
        let there = peer.name();
        let name = process.name.as_str();
        let pair = process.pair.to_string();
        let definition = self.store.get(name)?;
        let fence = PeerRequest::Fence {
            pair: pair.clone(),
            generation,
        };
        // Without a third party both may have been given the word: nothing of the other's is ended then.
        if self.config.arbiter != Arbiter::Manual {
            peer.call(fence).await?;
        }
        let theirs = peer.processes().await?;
        // A shadow that nobody has brought into step gives way to the new one.
        let stays =
            |p: &&ProcessReport| p.pair == pair && !p.status.as_ref().is_some_and(is_unmade);
        if let Some(left) = theirs.iter().find(stays) {
            let why = format!("host {there} still has process {} of it", left.pid);
            return Err(Failure::new(Code::State, why));
        }
        let operation = u64::from_le_bytes(define::random()?);
        let spawn = PeerRequest::SpawnShadow {
            definition: Box::new(definition),
            operation,
        };
        let shadow = match peer.call(spawn).await.map_err(|f| f.at(there))? {
            Reply::Shadow {
                incarnation,
                listen,
            } => Shadow {
                incarnation,
                listen,
            },
            other => return Err(peer.unexpected(&other)),
        };
        let mode = self.store.vm(name)?.mode;
        // The arbiter may want to hear from both sides before this one is granted anything.
        let aimed = control::order(&process.control, &Request::SetMode { mode }, ORDERLY).await;
        let taken = match aimed {
            Ok(()) => self.protect(process, &shadow).await,
            Err(failure) => Err(failure),
        };
        match taken {
            Ok(()) => {
                let text = format!("host {there} is being synced");
                self.events.note(Some(name), text);
                Ok(operation)
            }
            Err(failure) => {
                let name = name.to_owned();
                let _ = peer
                    .call(PeerRequest::Undo {
                        name,
                        operation,
                        spare: true,
                    })
                    .await;
                Err(failure)
            }
        }
    }
}

/// A shadow that is not in sync, and never was.
fn is_unmade(status: &Status) -> bool {
    let unmade = matches!(
        status.phase,
        Phase::Starting | Phase::Waiting | Phase::Syncing { .. }
    );
    status.role == Role::Shadow && unmade
}

/// Waits until the copying ends in protection.
///
/// # Errors
/// Its shadow, or the process itself, was lost before that.
pub(crate) async fn until_protected(process: &Process) -> Result<(), Failure> {
    let mut alone_since: Option<Instant> = None;
    loop {
        if process.exited().is_some() {
            return Err(process.why_it_ended());
        }
        match process.status().await.map(|status| status.phase) {
            Some(Phase::Protected) => return Ok(()),
            Some(Phase::Alone) => {
                let since = *alone_since.get_or_insert_with(Instant::now);
                if since.elapsed() > SETBACK {
                    let why = "its new shadow was lost before it was in sync";
                    return Err(Failure::new(Code::Peer, why));
                }
            }
            Some(_) => alone_since = None,
            // One that does not answer for a moment may be busy with a large guest.
            None => {}
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
