//! A raw image on this host, under an exclusive lock (rule 17).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use ax_failpoint::Point;
use ax_sync::Mutex;
use ax_wire::{Generation, PairId};

use crate::busy::{Busy, UnderWay, Waits};
use crate::map::{Marks, Regions, Rotation, Span};
use crate::medium::Medium;
use crate::meta::{Basis, Condition, Meta, MetaError};

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
    file: Box<dyn Medium>,
    path: PathBuf,
    size: u64,
    read_only: bool,
    /// The image once more, opened apart: the kernel tells each opened file of a failed write-back once,
    /// so that who settles the map hears of it though the guest's FLUSH has heard already.
    apart: Box<dyn Medium>,
    /// Taken before `marks`, and held while the map is written.
    meta: Mutex<Meta>,
    marks: Mutex<Marks>,
    /// Held while the image's content changes or is read for the other side, so that a bulk chunk
    /// and its place in the log are one step with respect to guest writes.
    pub(crate) order: Mutex<()>,
    under_way: UnderWay,
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
        let apart = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed)?;
        require_size(path, &file, size)?;
        let facts = (Meta::file(facts)?, facts);
        let media = [file, apart].map(|file| Box::new(file) as Box<dyn Medium>);
        Self::on(path, media, facts, pair, size, read_only)
    }

    /// As [`Self::open`], on these two handles of one image and this file of facts; nobody else has them open.
    ///
    /// # Errors
    /// As there.
    pub fn on(
        path: &Path,
        [file, apart]: [Box<dyn Medium>; 2],
        (facts, facts_at): (Box<dyn Medium>, &Path),
        pair: PairId,
        size: u64,
        read_only: bool,
    ) -> Result<Image, OpenError> {
        require_size(path, file.as_ref(), size)?;
        let identity = file.identity().map_err(|source| OpenError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        let fresh = Condition::Consistent;
        let (meta, marks) = Meta::on(facts, facts_at, pair, size, fresh, identity)?;
        Ok(Image {
            file,
            path: path.to_path_buf(),
            size,
            read_only,
            apart,
            meta: Mutex::new(meta),
            marks: Mutex::new(marks),
            order: Mutex::new(()),
            under_way: UnderWay::default(),
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
        let _begun = self.under_way.begin(Waits::Somebody);
        strike(Point::ImageRead, libc::EIO)?;
        self.file.read_at(out, offset)
    }

    /// The bits of these bytes are durable when it returns (rule 16: before the write).
    fn before_write(&self, offset: u64, len: usize) -> io::Result<()> {
        let run = span(offset, len).run();
        if self.marks.lock().touch(&run) {
            return Ok(());
        }
        let covered = self.meta.lock().cover(&self.marks, &run);
        covered.map_err(io::Error::from)
    }

    fn change(&self, offset: u64, len: usize, act: impl Fn() -> io::Result<()>) -> io::Result<()> {
        self.check(offset, len)?;
        let _begun = self.under_way.begin(Waits::Somebody);
        self.before_write(offset, len)?;
        let order = self.order.lock();
        let changed = strike(Point::ImageWrite, libc::EIO)
            .and_then(|()| strike(Point::ImageFull, libc::ENOSPC))
            .and_then(|()| act());
        drop(order);
        changed.inspect_err(|_| self.marks.lock().failed(&span(offset, len).run()))
    }

    /// Sets the region bits durably, then writes at byte `offset`.
    ///
    /// # Errors
    /// Beyond the end, read-only, or the host's own.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(offset, data.len(), || self.file.write_at(data, offset))
    }

    /// As [`Self::write`], for the guest's own write, which is in hand until [`Self::settled`]: the image
    /// has it and the stream has not. One at a time.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_in_hand(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.marks.lock().take_in_hand(span(offset, data.len()));
        self.write(offset, data)
    }

    /// The guest's write in hand is in the stream. Never blocks.
    pub fn settled(&self, offset: u64, len: usize) {
        self.marks.lock().settled(span(offset, len));
    }

    /// Makes `len` bytes at `offset` zeros, without taking room for them where the host can do that.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        self.change(offset, bytes, || {
            if self.file.punch(offset, len)? {
                return Ok(());
            }
            let zeros = vec![0; bytes.min(1 << 20)];
            (offset..offset + len)
                .step_by(zeros.len().max(1))
                .try_for_each(|at| {
                    let n = (offset + len - at).min(zeros.len() as u64) as usize;
                    let zeros = zeros.get(..n).unwrap_or_default();
                    self.file.write_at(zeros, at)
                })
        })
    }

    /// Makes earlier writes durable.
    ///
    /// # Errors
    /// The host's own. What has been lost is not known then: no bit is dropped any more, and every later
    /// flush fails, too. The kernel counts what it could not write as written, and would say so.
    pub fn flush(&self) -> io::Result<()> {
        self.sync(self.file.as_ref(), Waits::Somebody)
    }

    /// As [`Self::flush`], where nobody is held up by it.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub(crate) fn flush_at_leisure(&self) -> io::Result<()> {
        self.sync(self.file.as_ref(), Waits::Nobody)
    }

    /// As [`Self::flush`], for whoever drops bits after it.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub(crate) fn flush_apart(&self) -> io::Result<()> {
        self.sync(self.apart.as_ref(), Waits::Nobody)
    }

    fn sync(&self, file: &dyn Medium, waits: Waits) -> io::Result<()> {
        let _begun = self.under_way.begin(waits);
        if self.is_doubtful() {
            return Err(io::Error::other(
                "it could not be made durable before: what has been lost is not known",
            ));
        }
        let flushed = strike(Point::ImageSync, libc::EIO).and_then(|()| file.sync());
        flushed.inspect_err(|_| self.marks.lock().doubt())
    }

    /// How long what the disk was asked for has been under way. Never blocks.
    pub fn busy(&self) -> Busy {
        self.under_way.busy()
    }

    /// True while the file at its path is this image; else what is opened here ends with this process.
    /// May block as long as the disk does not answer.
    ///
    /// # Errors
    /// The path can't be looked at.
    pub fn is_in_place(&self) -> io::Result<bool> {
        let _begun = self.under_way.begin(Waits::Nobody);
        self.file.is_at(&self.path)
    }

    /// Finds out whether the disk can be written and made durable at all, before much is copied to it;
    /// and has what is read from now on come from the disk. What a failed write-back of an earlier
    /// process has left in the kernel's cache is not on it.
    fn try_out(&self) -> io::Result<()> {
        let mut block = vec![0; usize::try_from(self.size.min(4096)).map_err(io::Error::other)?];
        self.read(0, &mut block)?;
        if block.iter().any(|byte| *byte != 0) {
            // The same again: not in the map, and a hole stays one.
            let _begun = self.under_way.begin(Waits::Nobody);
            strike(Point::ImageWrite, libc::EIO)?;
            strike(Point::ImageFull, libc::ENOSPC)?;
            self.file.write_at(&block, 0)?;
        }
        self.flush_at_leisure()?;
        self.file.drop_cached()
    }

    /// What may differ from the other side, and the moment it is relative to; no rotation of the map that has
    /// begun ends any more.
    pub(crate) fn differing(&self) -> (Basis, Regions) {
        let meta = self.meta.lock();
        let mut marks = self.marks.lock();
        marks.forget_rotation();
        (meta.basis(), marks.dirty())
    }

    /// Regions that may differ from the other side's, if its map is relative to the same moment.
    pub fn dirty(&self) -> Regions {
        self.marks.lock().dirty()
    }

    /// True when a rotation of the map could drop bits.
    pub(crate) fn worth_rotating(&self) -> bool {
        !self.read_only && self.marks.lock().worth_rotating()
    }

    /// True when it has failed to become durable once.
    pub fn is_doubtful(&self) -> bool {
        self.marks.lock().is_doubtful()
    }

    /// A rotation of the map begins: what is touched from here on stays when older bits are dropped.
    pub(crate) fn begin_rotation(&self) -> Rotation {
        self.marks.lock().begin_rotation()
    }

    /// Durably drops the bits of writes completed before `rotation` began, which are durable on both sides;
    /// the rest is relative to `basis`. Returns how many; none when that rotation is over.
    ///
    /// # Errors
    /// The file of the map could not be written; whatever it holds is right.
    pub(crate) fn end_rotation(
        &self,
        rotation: Rotation,
        basis: Basis,
    ) -> Result<Option<u64>, MetaError> {
        self.meta.lock().end_rotation(&self.marks, rotation, basis)
    }

    /// Marks the image inconsistent, durably: it is going to be overwritten in part.
    ///
    /// # Errors
    /// The host's own; nothing may be overwritten then.
    pub fn begin_overwrite(&self) -> io::Result<()> {
        let mut meta = self.meta.lock();
        match meta.condition() {
            Condition::Inconsistent => Ok(()),
            Condition::Consistent => meta.mark_inconsistent().map_err(io::Error::from),
        }
    }

    /// As [`Self::begin_overwrite`], and finds out first whether the disk works.
    ///
    /// # Errors
    /// The host's own; nothing has been overwritten.
    pub(crate) fn begin_copy(&self) -> io::Result<()> {
        self.begin_overwrite()?;
        self.try_out()
    }

    /// Makes the content durable, then the fact that it is whole as of `generation`.
    ///
    /// # Errors
    /// The host's own; the fact is then not stated.
    pub fn make_durable(&self, generation: Generation) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush_at_leisure()?;
        self.meta
            .lock()
            .mark_consistent(generation)
            .map_err(io::Error::from)
    }

    /// The next run of bytes at or after `from` that may hold something other than zeros.
    pub(crate) fn next_data(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        let data = self.file.next_data(from)?;
        Ok(data.map(|data| data.start..data.end.min(self.size)))
    }
}

fn require_size(path: &Path, file: &dyn Medium, wanted: u64) -> Result<(), OpenError> {
    let path = path.to_path_buf();
    match file.size() {
        Ok(found) if found == wanted => Ok(()),
        Ok(found) => Err(OpenError::Size {
            path,
            found,
            wanted,
        }),
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// Fails with this error where a test has ordered that.
fn strike(point: Point, errno: i32) -> io::Result<()> {
    match ax_failpoint::fails(point) {
        true => Err(io::Error::from_raw_os_error(errno)),
        false => Ok(()),
    }
}

fn span(offset: u64, len: usize) -> Span {
    let len = len as u64;
    Span { offset, len }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.close();
    }
}

impl Image {
    /// Nothing writes the image any more: notes when its content was last changed, so that whoever changes
    /// it before it is opened again is found out. Only logged when it fails: then nobody is.
    pub fn close(&self) {
        let closed = self
            .file
            .identity()
            .map_err(|e| e.to_string())
            .and_then(|is| {
                self.meta
                    .lock()
                    .close(is.changed)
                    .map_err(|e| e.to_string())
            });
        if let Err(error) = closed {
            tracing::debug!(path = %self.path.display(), %error, "closing a disk image");
        }
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
        assert_eq!(sector, [7; 512], "nothing is overwritten that need not be");
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
        let mut dirty = image.dirty();
        assert_eq!(dirty.take_run(0, 9), Some(0..2));
        assert!(dirty.is_empty());
    }
}
