//! Two small facts about a VM on this host that outlive axd: "its start is not through yet", so that
//! the next axd ends what is half-started, and "an operator stopped it", so that autostart leaves it.

use std::path::PathBuf;

use ax_api::host::PeerRequest;

use crate::daemon::Daemon;
use crate::store::write_atomic;

/// The mark that a start of a VM is under way on this host.
pub struct Journal(PathBuf);

impl Journal {
    /// Sets the mark, durably.
    ///
    /// # Errors
    /// The system's.
    pub fn begin(&self) -> std::io::Result<()> {
        write_atomic(&self.0, b"")
    }

    /// Whether the mark is set.
    pub fn is_open(&self) -> bool {
        self.0.exists()
    }

    /// Takes the mark away.
    pub fn end(&self) {
        // Absent already: as it should be.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Names this boot of the host; empty where the kernel does not say.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

impl Daemon {
    /// The mark of a VM's start.
    pub fn journal(&self, name: &str) -> Journal {
        Journal(self.config.vm_dir(name).join("starting"))
    }

    /// Remembers, until this host boots again, that the VM was stopped on purpose.
    pub fn mark_stopped(&self, name: &str) {
        let path = self.config.vm_dir(name).join("stopped");
        if let Err(e) = write_atomic(&path, boot_id().as_bytes()) {
            tracing::warn!("{}: {e}", path.display());
        }
    }

    /// [`Daemon::mark_stopped`] on both hosts. One that does not answer now hears of it from nobody;
    /// it will call the VM missed, which is the safe side.
    pub async fn mark_stopped_on_both(&self, name: &str) {
        self.mark_stopped(name);
        if let Some(peer) = &self.peer {
            let name = name.to_owned();
            let _ = peer.call(PeerRequest::Stopped { name }).await;
        }
    }

    /// Whether the VM was started on this host and not stopped on purpose since: if nothing of it
    /// runs, it is missed.
    pub fn is_missed(&self, name: &str) -> bool {
        let dir = self.config.vm_dir(name);
        dir.join("spec.json").exists() && !dir.join("stopped").exists()
    }

    /// Forgets it.
    pub fn unmark_stopped(&self, name: &str) {
        // Absent already: as it should be.
        let _ = std::fs::remove_file(self.config.vm_dir(name).join("stopped"));
    }

    /// Whether the VM was stopped on purpose since this host booted.
    pub fn is_marked_stopped(&self, name: &str) -> bool {
        std::fs::read_to_string(self.config.vm_dir(name).join("stopped"))
            .is_ok_and(|text| text == boot_id())
    }
}
