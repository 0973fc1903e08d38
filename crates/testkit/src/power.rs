//! The power of a site's hosts, and the disks that lose what was not flushed with it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::fuse::{Disk, Harm, Loss, Op};
use crate::net::{Host, KillReport};
use crate::site::{Side, Site};
use crate::{Error, Result, panic_text};

/// By then SIGKILL has reached every process of a host, whether or not it can end.
const KILLED: Duration = Duration::from_millis(100);

impl Site {
    /// The disk a side's data folder is on, if it is on one of its own.
    pub fn disk(&self, side: Side) -> Option<&Disk> {
        self.disks.as_ref().map(|disks| match side {
            Side::A => &disks[0],
            Side::B => &disks[1],
        })
    }

    /// The disk the witness's store is on, if it is on one of its own.
    pub fn witness_disk(&self) -> Option<&Disk> {
        self.disks.as_ref().map(|disks| &disks[2])
    }

    /// Pulls the power plug of a host: every process of it is gone, and of its disk, where it has one,
    /// what `seed` draws of all that was not durable.
    ///
    /// # Errors
    /// When the host is switched off already, or the kernel refuses.
    pub fn cut_power(&mut self, side: Side, seed: u64) -> Result<(KillReport, Loss)> {
        let host = match side {
            Side::A => &self.lab.a,
            Side::B => &self.lab.b,
        };
        match &mut self.disks {
            Some(disks) => cut(host, &mut disks[side as usize], seed),
            None => Ok((host.kill_all()?, Loss::default())),
        }
    }

    /// [`Site::cut_power`] of the witness's host.
    ///
    /// # Errors
    /// As [`Site::cut_power`].
    pub fn cut_witness_power(&mut self, seed: u64) -> Result<(KillReport, Loss)> {
        let host = &self.lab.witness;
        match &mut self.disks {
            Some([.., disk]) => cut(host, disk, seed),
            None => Ok((host.kill_all()?, Loss::default())),
        }
    }

    /// Switches a host on again after [`Site::cut_power`]; its axd is to be started.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn power_on(&mut self, side: Side) -> Result<()> {
        if let Some(disks) = &mut self.disks {
            disks[side as usize].power_on()?;
        }
        self.host(side).power_on()
    }

    /// Switches the witness's host on again after [`Site::cut_witness_power`]; the witness is to be started.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn power_on_witness(&mut self) -> Result<()> {
        if let Some([.., disk]) = &mut self.disks {
            disk.power_on()?;
        }
        self.lab.witness.power_on()
    }

    /// Takes the witness's memory: its store is empty when it is started again. It must not be running.
    ///
    /// # Errors
    /// When the store can't be removed.
    pub fn wipe_witness(&self) -> Result<()> {
        let store = self.dir().join("w/witness/records.redb");
        fs::remove_file(&store).map_err(Error::os(format!("remove {}", store.display())))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for disk in self.disks.iter_mut().flatten() {
            // Nobody can be killed who waits for a disk that hangs.
            disk.lift();
            if self.keep {
                disk.disconnect();
                if let Err(e) = disk.copy_to(disk.point()) {
                    eprintln!("cannot keep {}: {e}", disk.point().display());
                }
            }
        }
    }
}

/// A disk for a host's data, mounted where that is expected. What was said stays, for a look at it.
pub(crate) fn disk(dir: &Path, name: &str) -> Result<Disk> {
    let point = dir.join(name);
    fs::create_dir(&point).map_err(Error::os(format!("make {}", point.display())))?;
    Disk::new(&point, &["log"])
}

fn cut(host: &Host, disk: &mut Disk, seed: u64) -> Result<(KillReport, Loss)> {
    // The disk stops with the host, not after it: what is asked of it from here on is never answered.
    disk.harm("", &Op::ALL, Harm::Hang);
    let killed = std::thread::scope(|threads| {
        let killed = threads.spawn(|| host.kill_all());
        let deadline = Instant::now() + KILLED;
        while !killed.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Who waits for it now can't die before that ends.
        disk.disconnect();
        killed.join()
    });
    let killed = killed.map_err(|p| Error::Panicked(panic_text(&*p)))??;
    Ok((killed, disk.cut(seed)))
}
