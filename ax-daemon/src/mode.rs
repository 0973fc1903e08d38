//! `axvm set-mode`: another protection for a VM, also while it runs (rule 22).
//!
//! ```text
//!   ft or ha -> none     grant to run alone; the shadow is dismissed
//!   none -> ft or ha     a shadow is made there, registered, granted to run alone here; copied, protected
//!   ft <-> ha            the one, then the other: for the time of the copy it runs unprotected
//! ```
//! The definition is changed first, so that an axd that ends in the middle finds what was wanted; what
//! fails is undone, and the VM is as it was.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{PeerRequest, Request};
use ax_api::process::{self, Arbiter, Phase, Role};
use ax_api::vm::{Mode, Vm};
use tokio::time::Instant;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;
use crate::ops::ORDERLY;
use crate::process::Process;

/// How long the shadow of a VM that leaves its protection may take to end.
const GOING: Duration = Duration::from_secs(3);

impl Daemon {
    /// Changes how a VM is protected, on whichever host it runs.
    ///
    /// # Errors
    /// What failed; the VM is protected as before, or says why not.
    pub async fn set_mode(
        self: &Arc<Self>,
        name: &str,
        mode: Mode,
        wait: bool,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let vm = self.store.vm(name)?;
        let Some((process, Some(Role::Primary))) = self.local_role(name).await else {
            if asker == Asker::User && self.runs_anywhere(&vm).await {
                let request = Request::SetMode {
                    name: name.to_owned(),
                    mode,
                    wait,
                };
                return self
                    .forward_or_not_running(name, request, asker, tell)
                    .await;
            }
            return self.redefine(name, vm, mode, tell).await;
        };
        let claim = self.claim(name).await?;
        let before = vm.mode;
        if mode != Mode::None {
            self.peer()?;
        }
        self.write_mode(name, mode)?;
        match self.change_running(&process, mode, wait, tell).await {
            Ok(text) => {
                drop(claim);
                self.share_now(tell).await;
                self.events.note(Some(name), format!("operator: {text}"));
                Ok(text)
            }
            Err(mut failure) => {
                if before != mode {
                    if let Err(e) = self.write_mode(name, before) {
                        failure.why = format!("{}; its definition stays changed: {e}", failure.why);
                    }
                    let back = process::Request::SetMode { mode: before };
                    if before == Mode::None {
                        // It took no harm; if it does not hear of this now, the next look finds it.
                        let _ = control::order(&process.control, &back, ORDERLY).await;
                    }
                }
                drop(claim);
                self.share_now(tell).await;
                self.events
                    .note(Some(name), format!("mode {mode} failed: {failure}"));
                Err(failure)
            }
        }
    }

    /// Waits until nothing of the VM is left on the other host, which has no more part in it; ends what does
    /// not end by itself.
    async fn end_there(&self, process: &Process) {
        let Some(peer) = &self.peer else { return };
        let pair = process.pair.to_string();
        let deadline = Instant::now() + GOING;
        while let Ok(theirs) = peer.processes().await
            && theirs.iter().any(|p| p.pair == pair)
        {
            if Instant::now() > deadline
                && let Some(status) = process.status().await
            {
                let fence = PeerRequest::Fence {
                    pair: pair.clone(),
                    generation: status.generation,
                };
                if self.config.arbiter != Arbiter::Manual {
                    let _ = peer.call(fence).await;
                }
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn write_mode(&self, name: &str, mode: Mode) -> Result<(), Failure> {
        let mut vm = self.store.vm(name)?;
        if vm.mode != mode {
            vm.mode = mode;
            self.store.change(name, Some(vm))?;
        }
        Ok(())
    }

    /// Of a VM that runs nowhere: from its next start on.
    async fn redefine(
        self: &Arc<Self>,
        name: &str,
        vm: Vm,
        mode: Mode,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let _claim = self.claim(name).await?;
        if vm.mode != mode {
            self.write_mode(name, mode)?;
            self.events.note(Some(name), format!("mode {mode}"));
            self.share_now(tell).await;
        }
        Ok(format!("{name} will be {mode} when it is started"))
    }

    async fn change_running(
        self: &Arc<Self>,
        process: &Arc<Process>,
        mode: Mode,
        wait: bool,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let name = process.name.as_str();
        let here = &self.config.name;
        let Some(status) = process.status().await else {
            return Err(Failure::new(
                ax_api::host::Code::State,
                format!("the process of {name} does not answer"),
            ));
        };
        if status.mode == mode && status.phase == Phase::Protected {
            return Ok(format!("{name} is {mode} and protected already"));
        }
        tell.progress(format!("changing {name} to mode {mode}"));
        if status.mode != mode || mode == Mode::None {
            // Out of what it is; the way into the other begins with a shadow.
            if status.mode != Mode::None {
                let order = process::Request::SetMode { mode: Mode::None };
                control::order(&process.control, &order, ORDERLY).await?;
            }
        }
        if mode == Mode::None {
            self.end_there(process).await;
            return Ok(format!("{name} runs on {here}, unprotected (mode none)"));
        }
        let peer = self.peer()?.clone();
        let there = peer.name();
        let operation = match self.find_shadow(process, status.generation).await {
            Ok(operation) => operation,
            Err(failure) if status.mode == mode => return Err(failure),
            Err(failure) => return Err(failure.at(there)),
        };
        let name = name.to_owned();
        let protected = match wait {
            true => self.until_protected(process, tell).await,
            false => Ok(()),
        };
        match protected {
            Ok(()) => {
                let text = match wait {
                    true => format!("{name} runs on {here}, protected by {there} (mode {mode})"),
                    false => {
                        format!("{name} runs on {here}; {there} is being synced (mode {mode})")
                    }
                };
                let _ = peer.call(PeerRequest::Settle { name, operation }).await;
                Ok(text)
            }
            Err(failure) => {
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
