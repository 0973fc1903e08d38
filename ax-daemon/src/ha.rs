//! Mode `ha`: a VM is started again where it ended, or, with its host gone, on the other one.
//!
//! The other host's part is its `ax-vmm`, which mirrors the disks and boots the guest once the lease of the
//! one that ran it is over; no axd is needed for that. This one's part is a process that ends while its
//! host lives: it is started again here, at once, by the arbiter's grant like any start. One that goes on
//! ending is left alone, so that a guest that cannot run does not take a host with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::process::Start;
use ax_api::vm::Mode;

use crate::daemon::Daemon;
use crate::process::Process;

/// So many ends of a VM on one host within [`CRASHES_WITHIN`] are too many.
pub const MOST_CRASHES: usize = 3;
/// The time over which they are counted.
pub const CRASHES_WITHIN: Duration = Duration::from_secs(600);
/// How long a start waits for another operation on the VM.
const PATIENCE: Duration = Duration::from_secs(30);

impl Daemon {
    /// Starts a VM of mode `ha` again whose process, its primary, has ended by itself.
    pub async fn restart_here(self: &Arc<Self>, process: &Process) {
        let name = process.name.as_str();
        let Ok(vm) = self.store.vm(name) else { return };
        if self.in_maintenance()
            || vm.mode != Mode::Ha
            || !process.was_primary()
            || self.is_marked_stopped(name)
        {
            return;
        }
        if self.count_crash(name) {
            self.events.note(
                Some(name),
                format!(
                    "ended {MOST_CRASHES} times by itself here within {} minutes: not started again; \
                     `axvm start {name}` does, its log tells why",
                    CRASHES_WITHIN.as_secs() / 60
                ),
            );
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        let claim = loop {
            match self.claim(name).await {
                Ok(claim) => break claim,
                Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(_) => return,
            }
        };
        // Stopped, undefined or started by somebody meanwhile.
        let wanted = self.store.vm(name).is_ok_and(|now| now.mode == Mode::Ha);
        if !wanted || self.is_marked_stopped(name) || self.process(name).is_some() {
            return;
        }
        let text = match self.spawn(&vm, Start::Boot).await {
            Ok(primary) => match self.until_running(&primary).await {
                Ok(()) => "started again here after it had ended by itself".to_owned(),
                Err(failure) => format!("not started again here: {failure}"),
            },
            Err(failure) => format!("not started again here: {failure}"),
        };
        drop(claim);
        self.events.note(Some(name), text);
    }

    /// Counts one end; true if there were too many.
    fn count_crash(&self, name: &str) -> bool {
        let mut crashes = self.crashes.lock();
        let times = crashes.entry(name.to_owned()).or_default();
        times.push_back(Instant::now());
        while times.len() > MOST_CRASHES {
            times.pop_front();
        }
        drop(crashes);
        self.crashes_too_often(name)
    }

    /// Whether a VM has ended by itself too often here, lately.
    pub fn crashes_too_often(&self, name: &str) -> bool {
        let crashes = self.crashes.lock();
        let lately = |at: &&Instant| at.elapsed() < CRASHES_WITHIN;
        let times = crashes.get(name);
        times.is_some_and(|times| times.iter().filter(lately).count() >= MOST_CRASHES)
    }

    /// An operator starts the VM: what it did before does not count.
    pub fn forget_crashes(&self, name: &str) {
        self.crashes.lock().remove(name);
    }

    /// Memory, bytes, that VMs of mode `ha` which run on the other host will need here, but for `name`:
    /// it is nobody else's, so that their start cannot fail for lack of it.
    pub fn reserved_except(&self, name: &str) -> u64 {
        let standing_by = |process: &Arc<Process>| {
            process.name != name && process.start == Start::Shadow && !process.was_primary()
        };
        let held = self.processes().into_iter().filter(standing_by);
        let vms = held.filter_map(|process| self.store.vm(&process.name).ok());
        vms.filter(|vm| vm.mode == Mode::Ha)
            .map(|vm| vm.memory)
            .sum()
    }
}
