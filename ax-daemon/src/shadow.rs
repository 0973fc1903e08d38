//! The other host's part in a start: a shadow that waits for its primary, or nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, Definition, Reply};
use ax_api::process::{Phase, Request, Start};
use tokio::time::Instant;

use crate::control;
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::images;
use crate::process::Process;

/// How often a starting shadow is asked where it is.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How long a shadow may take until it waits for its primary.
const SHADOW_PATIENCE: Duration = Duration::from_secs(30);

impl Daemon {
    /// The asked side of [`ax_api::host::PeerRequest::SpawnShadow`].
    ///
    /// # Errors
    /// What failed here; nothing is left.
    pub async fn spawn_shadow(
        self: &Arc<Self>,
        definition: Definition,
        operation: u64,
    ) -> Result<Reply, Failure> {
        let name = definition.name.clone();
        let _claim = self.claim(&name).await?;
        self.take_definitions(vec![definition.clone()])?;
        let Some(vm) = definition
            .vm
            .filter(|vm| self.store.vm(&name).is_ok_and(|v| v == *vm))
        else {
            return Err(Failure::new(
                Code::State,
                format!("{name} is defined otherwise here, by a newer change"),
            ));
        };
        self.refuse_in_maintenance()?;
        if self.crashes_too_often(&name) {
            return Err(Failure::new(
                Code::State,
                format!(
                    "{name} ended too often by itself here; `axvm start {name}` on this host forgets it"
                ),
            ));
        }
        let mut made = self.supersede(&name).await;
        match images::prepare(&self.config, &vm, Start::Shadow) {
            Ok(new) => made.extend(new),
            Err(failure) => {
                images::remove(&made);
                return Err(failure);
            }
        }
        self.made.lock().insert((name.clone(), operation), made);
        let run = async {
            self.journal(&name)
                .begin()
                .map_err(|e| Failure::io("noting the start down", &e))?;
            let process = self.spawn(&vm, Start::Shadow).await?;
            let deadline = Instant::now() + SHADOW_PATIENCE;
            loop {
                if process.exited().is_some() {
                    return Err(process.why_it_ended());
                }
                match process.status().await {
                    Some(s) if s.phase == Phase::Waiting && !s.listen.is_empty() => {
                        return Ok(Reply::Shadow {
                            incarnation: s.incarnation,
                            listen: s.listen,
                        });
                    }
                    _ if Instant::now() > deadline => {
                        return Err(Failure::new(
                            Code::Failed,
                            "the shadow does not come to wait for its primary",
                        ));
                    }
                    _ => tokio::time::sleep(ASK_EVERY).await,
                }
            }
        };
        match run.await {
            Ok(reply) => Ok(reply),
            Err(failure) => {
                self.undo_shadow(&name, operation, false).await;
                Err(failure)
            }
        }
    }

    /// Ends a shadow whose start has failed; false if it has come in sync meanwhile, or does not say: it may
    /// be the last copy of a guest whose primary is gone, and is left.
    pub(crate) async fn give_up(&self, process: &Arc<Process>) -> bool {
        if process.exited().is_none() {
            let order = control::order(&process.control, &Request::GiveUp, control::PATIENCE);
            if order.await.is_err()
                // It may have been about to end anyhow.
                && tokio::time::timeout(ASK_EVERY * 25, process.wait()).await.is_err()
            {
                return false;
            }
            process.kill_and_wait().await;
        }
        self.let_go(process);
        true
    }

    /// Ends what an earlier operation on this VM left unsettled here: whoever asks for a shadow now knows
    /// of no other, and an undo of the earlier one that comes late must not meet the new one. Returns the
    /// images made for it, which are the new operation's from here on.
    async fn supersede(&self, name: &str) -> Vec<PathBuf> {
        let earlier: Vec<_> = {
            let mut made = self.made.lock();
            let keys = made.keys().filter(|(vm, _)| vm == name).cloned();
            let keys: Vec<_> = keys.collect();
            keys.iter().filter_map(|key| made.remove(key)).collect()
        };
        if let Some(process) = self.process(name) {
            self.give_up(&process).await;
        }
        earlier.into_iter().flatten().collect()
    }

    /// The asked side of [`ax_api::host::PeerRequest::Undo`]: ends the shadow of a start that failed and removes the
    /// images made for it. Why the shadow had ended by itself, if it had.
    pub async fn undo_shadow(&self, name: &str, operation: u64, spare: bool) -> String {
        // Unknown: never begun here, or settled. Then its process is none of this start's business.
        let Some(made) = self.made.lock().remove(&(name.to_owned(), operation)) else {
            return String::new();
        };
        if let Some(process) = self.process(name) {
            if process.exited().is_some() {
                self.note_end(&process);
            }
            if !spare {
                process.kill_and_wait().await;
                self.let_go(&process);
            } else if !self.give_up(&process).await {
                // Its primary failed after it had come in sync: by now it may be the one that runs the guest.
                self.journal(name).end();
                return "its shadow was in sync by then and stays".to_owned();
            }
        }
        let why = self.take_end(name).unwrap_or_default();
        images::remove(&made);
        let _ = std::fs::remove_file(self.config.vm_dir(name).join("spec.json"));
        self.journal(name).end();
        why
    }

    /// The asked side of [`ax_api::host::PeerRequest::Settle`].
    pub fn settle(&self, name: &str, operation: u64) {
        self.made.lock().remove(&(name.to_owned(), operation));
        self.journal(name).end();
        self.unmark_stopped(name);
    }
}
