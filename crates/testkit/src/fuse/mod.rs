//! Disks whose power can be cut, and that fail, fill up, are slow or hang by order.
//!
//! A [`Disk`] is a FUSE file system that lives in the memory of the process that made it, so it outlives
//! every process of the product. It keeps each file twice: as programs see it, and as far as it was made
//! durable ([`content`], [`tree`]). [`Disk::cut`] breaks every open file off, draws what becomes of all that
//! was not durable (kept, lost, or torn at the ends of sectors; the same seed draws the same), and leaves the
//! disk to be mounted again by [`Disk::power_on`], as after a reboot. What an `fsync` promises is told in
//! [`tree`]. [`Disk::harm`] makes it misbehave ([`faults`]); [`serve`] answers the kernel.
//!
//! Only as root: the kernel lets an ordinary user mount through a helper program alone. A test that needs
//! one says [`require_disks!`](crate::require_disks).

mod content;
mod faults;
mod mount;
mod serve;
mod sparse;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::chance::Chance;
use crate::{Error, Result};
use faults::Faults;
use mount::Mounted;
use tree::Tree;

pub use content::SECTOR;
pub use faults::{Harm, Op};

/// What a power cut took, in changes that were not durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loss {
    /// Changes of contents that are there all the same.
    pub kept: usize,
    /// Writes of which some sectors are there.
    pub torn: usize,
    /// Changes of contents that are gone.
    pub lost: usize,
    /// New, changed and removed names that are as before.
    pub names: usize,
}

/// How one power cut draws.
#[derive(Debug)]
struct Lot {
    chance: Chance,
    /// Of eight changes so many are kept.
    keep: u64,
}

impl Lot {
    fn new(seed: u64) -> Lot {
        let mut chance = Chance::new(seed);
        // Everything unflushed gone is the cut that tells most.
        let keep = [0, 0, 2, 4, 7].get(chance.below(5) as usize);
        Lot {
            keep: keep.copied().unwrap_or(0),
            chance,
        }
    }

    fn keeps(&mut self) -> bool {
        self.chance.below(8) < self.keep
    }

    fn tears(&mut self) -> bool {
        self.keep > 0 && self.chance.below(2) == 0
    }

    /// How many of `count` changes come before the moment of the cut.
    fn first_of(&mut self, count: usize) -> usize {
        match self.keep {
            0 => 0,
            _ => self.chance.below(count as u64 + 1) as usize,
        }
    }
}

#[derive(Debug)]
struct Shared {
    tree: Mutex<Tree>,
    faults: Faults,
}

impl Shared {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk, mounted while it has power. Dropping it takes it away whatever uses it.
#[derive(Debug)]
pub struct Disk {
    point: PathBuf,
    shared: Arc<Shared>,
    mounted: Option<Mounted>,
}

impl Disk {
    /// An empty disk, mounted on the folder `point`. Files called like one of `through` (logs, say) are
    /// durable as they are written, so that what was said before a cut can be read.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn new(point: &Path, through: &[&str]) -> Result<Disk> {
        let mut disk = Disk {
            point: point.to_path_buf(),
            shared: Arc::new(Shared {
                tree: Mutex::new(Tree::new(through)),
                faults: Faults::default(),
            }),
            mounted: None,
        };
        disk.power_on()?;
        Ok(disk)
    }

    /// Whether there can be such disks here; why not otherwise.
    ///
    /// # Errors
    /// The reason, and what to do about it.
    pub fn usable() -> std::result::Result<(), String> {
        static ANSWER: OnceLock<std::result::Result<(), String>> = OnceLock::new();
        let try_one = || {
            let point = tempfile::tempdir().map_err(|e| e.to_string())?;
            let disk = Disk::new(point.path(), &[]).map_err(|e| {
                let why = std::error::Error::source(&e).map_or(String::new(), |s| s.to_string());
                format!("{e}: {why}; run as root, with /dev/fuse (modprobe fuse)")
            })?;
            let file = point.path().join("file");
            std::fs::write(&file, b"x").map_err(|e| format!("write {}: {e}", file.display()))?;
            drop(disk);
            Ok(())
        };
        ANSWER.get_or_init(try_one).clone()
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// From now on, what is asked (`ops`) of paths below `under` (relative to the disk) goes wrong, in
    /// addition to what does already.
    pub fn harm(&self, under: impl AsRef<Path>, ops: &[Op], harm: Harm) {
        self.shared.faults.add(under.as_ref(), ops, harm);
    }

    /// Lifts every [`Disk::harm`]; what hangs goes on.
    pub fn lift(&self) {
        self.shared.faults.lift();
    }

    /// Breaks the connection to whoever uses it: all of that fails from now on (EIO, ENOTCONN,
    /// ECONNABORTED). Nothing is lost by that alone.
    pub fn disconnect(&mut self) {
        self.shared.faults.end_life();
        drop(self.mounted.take());
    }

    /// Cuts the power: [`Disk::disconnect`], then a part of what was not durable is gone, drawn from
    /// `seed`. Every harm is lifted.
    pub fn cut(&mut self, seed: u64) -> Loss {
        self.disconnect();
        self.lift();
        self.shared.tree().cut(&mut Lot::new(seed))
    }

    /// Mounts it again after [`Disk::cut`] or [`Disk::disconnect`]; no effect while it is mounted.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn power_on(&mut self) -> Result<()> {
        if self.mounted.is_none() {
            let disk = serve::Serve::new(Arc::clone(&self.shared));
            let what = format!("mount a disk on {}", self.point.display());
            self.mounted = Some(Mounted::new(disk, &self.point).map_err(Error::os(what))?);
        }
        Ok(())
    }

    /// Writes its files into a folder, as programs see them now.
    ///
    /// # Errors
    /// The first that could not be written.
    pub fn copy_to(&self, folder: &Path) -> io::Result<()> {
        self.shared.tree().copy_to(tree::ROOT, folder)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// Returns from the calling test, listed as skipped, when disks can't be made here.
#[macro_export]
macro_rules! require_disks {
    () => {
        if let Err(why) = $crate::fuse::Disk::usable() {
            $crate::skip::report("no FUSE", &why, &$crate::skip::test_name());
            return;
        }
    };
}
