//! What an image, or the file of facts beside it, is kept on.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::meta::Identity;

/// An open file, or what stands for one where a whole pair is simulated.
pub trait Medium: std::fmt::Debug + Send + Sync {
    /// Fills `out` from byte `at` on.
    ///
    /// # Errors
    /// The host's own, or it ends before.
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `data` at byte `at`.
    ///
    /// # Errors
    /// The host's own; what has been written is not known then.
    fn write_at(&self, data: &[u8], at: u64) -> io::Result<()>;

    /// Makes earlier writes durable.
    ///
    /// # Errors
    /// The host's own; what is durable is not known then.
    fn sync(&self) -> io::Result<()>;

    /// Its size, bytes.
    ///
    /// # Errors
    /// The host's own.
    fn size(&self) -> io::Result<u64>;

    /// Makes `len` bytes at `at` zeros that take no room; false, with nothing done, where that can't be.
    ///
    /// # Errors
    /// The host's own.
    fn punch(&self, at: u64, len: u64) -> io::Result<bool>;

    /// The next run of bytes at or after `from` that may hold something other than zeros.
    ///
    /// # Errors
    /// The host's own.
    fn next_data(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>>;

    /// True while the file at `path` is this one.
    ///
    /// # Errors
    /// The path can't be looked at.
    fn is_at(&self, path: &Path) -> io::Result<bool>;

    /// Has what is read from now on come from the disk, where it is durable there.
    ///
    /// # Errors
    /// The host's own.
    fn drop_cached(&self) -> io::Result<()>;

    /// Which file it is.
    ///
    /// # Errors
    /// The host's own.
    fn identity(&self) -> io::Result<Identity>;
}

impl Medium for File {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(out, at)
    }

    fn write_at(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(data, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|facts| facts.len())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let at = i64::try_from(at).map_err(io::Error::other)?;
        let len = i64::try_from(len).map_err(io::Error::other)?;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self, punch, at, len) {
            Err(nix::errno::Errno::EOPNOTSUPP) => Ok(false),
            punched => Ok(punched.map(|()| true)?),
        }
    }

    fn next_data(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        use nix::unistd::{Whence, lseek};
        let at = i64::try_from(from).map_err(io::Error::other)?;
        let start = match lseek(self, at, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::errno::Errno::ENXIO) => return Ok(None),
            Err(nix::errno::Errno::EINVAL) => return Ok(Some(from..self.size()?)),
            Err(e) => return Err(e.into()),
        };
        let end = lseek(self, start, Whence::SeekHole)?;
        Ok(Some(start.max(0) as u64..end.max(0) as u64))
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        let here = self.metadata()?;
        match std::fs::metadata(path) {
            Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn drop_cached(&self) -> io::Result<()> {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        Ok(posix_fadvise(
            self,
            0,
            0,
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        )?)
    }

    /// A file system that does not tell when a file was made says 0 always.
    fn identity(&self) -> io::Result<Identity> {
        let facts = self.metadata()?;
        let since = |time: io::Result<SystemTime>| {
            let since = time.ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            since.map_or(0, |d| d.as_nanos() as u64)
        };
        Ok(Identity {
            inode: facts.ino(),
            made: since(facts.created()),
            changed: since(facts.modified()),
        })
    }
}
