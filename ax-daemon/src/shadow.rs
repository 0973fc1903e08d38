//! The other host's part in a start: a shadow that waits for its primary, or nothing.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, Definition, Reply};
use ax_api::process::{Phase, Start};
use tokio::time::Instant;

use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::images;

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
        let _claim = self.claim(&name)?;
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
        let made = images::prepare(&self.config, &vm)?;
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
                self.undo_shadow(&name, operation).await;
                Err(failure)
            }
        }
    }

    /// The asked side of [`ax_api::host::PeerRequest::Undo`]: ends the shadow of a start that failed and removes the
    /// images made for it. Why the shadow had ended by itself, if it had.
    pub async fn undo_shadow(&self, name: &str, operation: u64) -> String {
        // Unknown: never begun here, or settled. Then its process is none of this start's business.
        let Some(made) = self.made.lock().remove(&(name.to_owned(), operation)) else {
            return String::new();
        };
        if let Some(process) = self.process(name) {
            if process.exited().is_some() {
                self.note_end(&process);
            }
            process.kill_and_wait().await;
            self.let_go(&process);
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
