//! A folder in memory: what QEMU's documents advise for the disks that hold what is not committed yet.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::Error;

/// A file system in memory; it goes with the value, and with this process's mount namespace.
#[derive(Debug)]
pub struct RamFolder {
    path: PathBuf,
}

impl RamFolder {
    /// Makes it at `path`. Hosts made later see it.
    pub fn new(path: &Path) -> Result<RamFolder, Error> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::Failed(format!("a folder in memory at {}: {e}", path.display()))
        };
        std::fs::create_dir_all(path).map_err(|e| failed(&e))?;
        let size = Some("size=512m");
        mount(Some("ram"), path, Some("tmpfs"), MsFlags::empty(), size).map_err(|e| failed(&e))?;
        let path = path.to_path_buf();
        Ok(RamFolder { path })
    }
}

impl Drop for RamFolder {
    fn drop(&mut self) {
        // It goes with the namespace at the latest.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}
