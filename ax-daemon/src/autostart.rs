//! VMs marked `autostart`: started when axd starts, if they run nowhere and nobody stopped them since
//! this host booted.
//!
//! When both hosts come up together both look at the same VMs. Who may start one is the arbiter's to
//! say, and `ax-vmm` asks it; so that they do not both try at once, the VM's preferred host, or side A, goes
//! first and the other waits a while longer. An attempt that is refused (say, because the other host holds the current
//! copy) is repeated until the VM runs somewhere.

use std::sync::Arc;
use std::time::Duration;

use ax_api::vm::Mode;
use ax_wire::Side;
use tokio::sync::mpsc;

use crate::daemon::{Daemon, Tell};

/// Before the first attempt: time for the other host's axd to come up as well.
const FIRST: Duration = Duration::from_secs(2);
/// How much longer side B waits before each attempt.
const AFTER_YOU: Duration = Duration::from_secs(6);
/// Longest time between attempts.
const LONGEST: Duration = Duration::from_secs(30);

impl Daemon {
    /// Starts one VM as autostart does, however long it takes.
    async fn autostart_one(self: Arc<Self>, name: String) {
        let mut pause = FIRST;
        let mut told = String::new();
        loop {
            let Ok(vm) = self.store.vm(&name) else { return };
            let courtesy = match &vm.preferred {
                Some(preferred) if preferred.host == self.config.name => Duration::ZERO,
                None if self.config.side() == Side::A => Duration::ZERO,
                _ => AFTER_YOU,
            };
            let wait = match vm.mode {
                Mode::None => Duration::ZERO,
                Mode::Ft | Mode::Ha => pause + courtesy,
            };
            tokio::time::sleep(wait).await;
            let wanted = self.store.vm(&name).is_ok_and(|vm| vm.autostart);
            if !wanted || self.is_marked_stopped(&name) || self.runs_anywhere(&vm).await {
                return;
            }
            let (tell, _nobody) = mpsc::unbounded_channel();
            match self.start_somehow(&name, &Tell(tell)).await {
                Ok(_) => return,
                Err(failure) => {
                    if told != failure.why {
                        self.events
                            .note(Some(&name), format!("autostart tries again: {failure}"));
                        told = failure.why;
                    }
                }
            }
            pause = (pause * 2).min(LONGEST);
            if vm.mode == Mode::None {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Starts what is to be started with this host.
    pub fn begin_autostart(self: &Arc<Self>) {
        for vm in self.store.vms() {
            if vm.autostart && !self.is_marked_stopped(&vm.name) {
                tokio::spawn(self.clone().autostart_one(vm.name));
            }
        }
    }
}
