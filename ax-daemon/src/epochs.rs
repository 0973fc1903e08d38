//! What a VM's process tells of its epochs, for whoever asks on either host.

use std::sync::Arc;

use ax_api::host::{Code, Reply, Request};
use ax_api::process::{self, Role};

use crate::control::{self, PATIENCE};
use crate::daemon::{Asker, Daemon};
use crate::failure::Failure;

impl Daemon {
    /// Answers [`Request::Trace`] or [`Request::Stats`], from the VM's primary on whichever host it is.
    ///
    /// # Errors
    /// There is no such VM, it does not run, nothing protects it, or its host or process does not answer.
    pub async fn epochs_of(
        self: &Arc<Self>,
        request: Request,
        asker: Asker,
    ) -> Result<Reply, Failure> {
        let (name, question) = match &request {
            Request::Trace { name, since, most } => {
                let (since, most) = (*since, *most);
                (name.clone(), process::Request::Trace { since, most })
            }
            Request::Stats { name } => (name.clone(), process::Request::Stats),
            _ => return Err(Failure::new(Code::Failed, "not a question about epochs")),
        };
        self.store.vm(&name)?;
        if let Some((process, Some(Role::Primary))) = self.local_role(&name).await {
            let host = self.config.name.clone();
            return match control::ask(&process.control, &question, PATIENCE).await? {
                process::Reply::Trace(mut trace) => {
                    trace.of.host = host;
                    Ok(Reply::Trace { trace })
                }
                process::Reply::Stats(mut stats) => {
                    stats.of.host = host;
                    Ok(Reply::Stats { stats })
                }
                _ => Err(Failure::new(
                    Code::Failed,
                    "the VM's process gave an unexpected answer",
                )),
            };
        }
        let peer = match (asker, &self.peer) {
            (Asker::User, Some(peer)) => peer,
            _ => return Err(self.does_not_run(&name)),
        };
        match peer.forward(request, None).await {
            Ok(reply @ (Reply::Trace { .. } | Reply::Stats { .. })) => Ok(reply),
            Ok(other) => Err(peer.unexpected(&other)),
            // It has not heard of it yet, so it cannot run it.
            Err(failure) if failure.code == Code::NoSuchVm => Err(self.does_not_run(&name)),
            Err(failure) => Err(failure),
        }
    }
}
