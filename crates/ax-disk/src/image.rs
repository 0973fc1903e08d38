//! A raw image on this host, under an exclusive lock (rule 17).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ax_wire::{Generation, PairId};
use parking_lot::Mutex;

use crate::meta::{Condition, Meta, MetaError};

/// Why an image could not be opened. Nothing has been changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such file, or not readable and writable.
    #[error("disk image {path}: {source}", path = path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("disk image {path} is in use by another process: stop what uses it, or name another image",
        path = path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// It has another size than the VM's definition says.
    #[error("disk image {path} has {found} bytes, the definition says {wanted}", path = path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size, bytes.
        found: u64,
        /// The defined size, bytes.
        wanted: u64,
    },
    /// Its content is half overwritten.
    #[error("disk image {path} is inconsistent (a resync was cut short); it cannot be started from",
        path = path.display())]
    Inconsistent {
        /// The image.
        path: PathBuf,
    },
    /// Its durable facts could not be read.
    #[error(transparent)]
    Meta(#[from] MetaError),
}

/// One image, locked for as long as this lives.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    size: u64,
    read_only: bool,
    meta: Mutex<Meta>,
    /// Held while the image's content changes or is read for the other side, so that a bulk chunk
    /// and its place in the log are one step with respect to guest writes.
    pub(crate) order: Mutex<()>,
}

impl Image {
    /// Opens and locks the image; its durable facts live in `facts`.
    ///
    /// # Errors
    /// [`OpenError`] names what was wrong; nothing was changed.
    pub fn open(
        path: &Path,
        facts: &Path,
        pair: PairId,
        size: u64,
        read_only: bool,
    ) -> Result<Image, OpenError> {
        let failed = |source| OpenError::Io {
            path: path.to_path_buf(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError::InUse {
                    path: path.to_path_buf(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let found = file.metadata().map_err(failed)?.len();
        if found != size {
            return Err(OpenError::Size {
                path: path.to_path_buf(),
                found,
                wanted: size,
            });
        }
        let meta = Mutex::new(Meta::open(facts, pair, size, Condition::Consistent)?);
        Ok(Image {
            file,
            path: path.to_path_buf(),
            size,
            read_only,
            meta,
            order: Mutex::new(()),
        })
    }

    /// Refuses an image whose content cannot be started from (rule 16).
    ///
    /// # Errors
    /// [`OpenError::Inconsistent`].
    pub fn require_consistent(&self) -> Result<(), OpenError> {
        match self.meta.lock().condition() {
            Condition::Consistent => Ok(()),
            Condition::Inconsistent => Err(OpenError::Inconsistent {
                path: self.path.clone(),
            }),
        }
    }

    /// Size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True when it may not be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The durable facts.
    pub fn meta(&self) -> &Mutex<Meta> {
        &self.meta
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
        }
    }

    /// Reads at byte `offset`.
    ///
    /// # Errors
    /// Beyond the end, or the host's own.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.check(offset, out.len())?;
        self.file.read_exact_at(out, offset)
    }

    /// Sets the region bits durably, then writes at byte `offset`.
    ///
    /// # Errors
    /// Beyond the end, read-only, or the host's own.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len())?;
        self.meta
            .lock()
            .before_write(offset, data.len() as u64)
            .map_err(io::Error::other)?;
        let _order = self.order.lock();
        self.file.write_all_at(data, offset)
    }

    /// Makes earlier writes durable.
    ///
    /// # Errors
    /// The host's own.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Marks the image inconsistent, durably, then makes it all zeros: the start of a full resync.
    ///
    /// # Errors
    /// The host's own; the image then stays inconsistent.
    pub fn begin_overwrite(&self) -> io::Result<()> {
        self.meta
            .lock()
            .mark_inconsistent()
            .map_err(io::Error::other)?;
        self.file.set_len(0)?;
        self.file.set_len(self.size)
    }

    /// Makes the content durable, then the fact that it is whole as of `generation`.
    ///
    /// # Errors
    /// The host's own; the fact is then not stated.
    pub fn make_durable(&self, generation: Generation) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush()?;
        self.meta
            .lock()
            .mark_consistent(generation)
            .map_err(io::Error::other)
    }

    /// The next run of bytes at or after `from` that may hold something other than zeros.
    pub(crate) fn next_data(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        use nix::unistd::{Whence, lseek};
        let at = i64::try_from(from).map_err(io::Error::other)?;
        let start = match lseek(&self.file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::errno::Errno::ENXIO) => return Ok(None),
            Err(nix::errno::Errno::EINVAL) => return Ok(Some(from..self.size)),
            Err(e) => return Err(e.into()),
        };
        let end = lseek(&self.file, start, Whence::SeekHole)?;
        Ok(Some(
            start.max(0) as u64..(end.max(0) as u64).min(self.size),
        ))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SIZE: u64 = 4 << 20;

    pub(crate) fn fresh(dir: &Path, name: &str) -> Image {
        let path = dir.join(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        reopen(dir, name).unwrap()
    }

    pub(crate) fn reopen(dir: &Path, name: &str) -> Result<Image, OpenError> {
        let facts = dir.join(format!("{name}.meta"));
        Image::open(&dir.join(name), &facts, PairId([1; 16]), SIZE, false)
    }

    #[test]
    fn an_image_in_use_missing_or_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = fresh(dir.path(), "a");
        assert!(matches!(
            reopen(dir.path(), "a"),
            Err(OpenError::InUse { .. })
        ));
        drop(image);
        assert!(matches!(reopen(dir.path(), "b"), Err(OpenError::Io { .. })));
        File::create(dir.path().join("c"))
            .unwrap()
            .set_len(SIZE + 512)
            .unwrap();
        assert!(matches!(
            reopen(dir.path(), "c"),
            Err(OpenError::Size { .. })
        ));
    }

    #[test]
    fn a_cut_short_overwrite_can_not_be_started_from() {
        let dir = tempfile::tempdir().unwrap();
        let image = fresh(dir.path(), "a");
        image.write(0, &[7; 512]).unwrap();
        image.begin_overwrite().unwrap();
        drop(image);
        let image = reopen(dir.path(), "a").unwrap();
        assert!(matches!(
            image.require_consistent(),
            Err(OpenError::Inconsistent { .. })
        ));
        image.make_durable(Generation(2)).unwrap();
        image.require_consistent().unwrap();
        let mut sector = [1; 512];
        image.read(0, &mut sector).unwrap();
        assert_eq!(sector, [0; 512]);
    }

    #[test]
    fn a_write_is_in_the_durable_map_and_never_beyond_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let image = fresh(dir.path(), "a");
        image.write((1 << 20) - 512, &[1; 1024]).unwrap();
        assert!(image.write(SIZE - 512, &[1; 1024]).is_err());
        assert!(image.write(u64::MAX, &[1; 1]).is_err());
        drop(image);
        let image = reopen(dir.path(), "a").unwrap();
        assert_eq!(
            image.meta().lock().dirty_regions().collect::<Vec<_>>(),
            [0, 1]
        );
    }
}
