//! What is durably known of an image: its condition, its generation, its dirty regions.
//!
//! One small file beside the state of its VM: two header slots written in turn (a torn one leaves the
//! other), then pages of the dirty-region map, each with its own CRC32 and the basis it is relative
//! to. A page that is missing, torn or of another basis than the header's reads as "everything dirty"
//! (rule 16), and so does the whole map of an image that is not the file the map was made for.
//!
//! **Basis.** A map alone says nothing: two maps tell what may differ between two images only when both
//! are relative to one moment at which the images were equal and durable. That moment has a name drawn at
//! random, the [`Basis`], and both files must hold the same one. It is set together with the bits that
//! are left: pages first, then the header. A crash between leaves pages of another basis than the
//! header's: everything is dirty.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

use ax_sync::Mutex;
use ax_wire::{Generation, PairId};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::map::{Marks, Regions, Rotation};
use crate::medium::Medium;

pub use ax_wire::resync::REGION;

const PAGE: usize = 4096;
const MAGIC: [u8; 8] = *b"AXDISK02";
/// Before maps had a basis.
const MAGIC_1: [u8; 8] = *b"AXDISK01";
const MAP_START: u64 = 2 * PAGE as u64;
const WORDS_PER_PAGE: usize = (PAGE - 24) / 8;

/// Whether an image may be started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// A point in the guest's own history.
    Consistent,
    /// Being overwritten, or the overwriting was cut short: never started, never a source (I4).
    Inconsistent,
}

/// The moment a map is relative to: both images were equal then, and durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis(pub [u8; 16]);

impl Basis {
    /// Relative to nothing: every region may differ.
    pub const NONE: Basis = Basis([0; 16]);

    /// A new one.
    ///
    /// # Errors
    /// The host gives no random bytes.
    pub fn random() -> io::Result<Basis> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Basis(bytes))
    }

    /// True when maps relative to `self` and to `other` tell together what may differ.
    pub fn matches(self, other: Basis) -> bool {
        self == other && self != Basis::NONE
    }
}

/// Which file an image is, and what it was like when it was last closed in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Inode number.
    pub inode: u64,
    /// When the file was made, nanoseconds since 1970; 0 where the file system does not say.
    pub made: u64,
    /// When its content was last changed, nanoseconds since 1970.
    pub changed: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    pair: [u8; 16],
    sequence: u64,
    size: u64,
    generation: u64,
    basis: [u8; 16],
    inode: u64,
    made: u64,
    /// [`Identity::changed`] when it was closed in order; 0 while it is open, and after a crash.
    closed: u64,
    inconsistent: u32,
    crc: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header1 {
    magic: [u8; 8],
    pair: [u8; 16],
    sequence: u64,
    size: u64,
    generation: u64,
    inconsistent: u32,
    crc: u32,
}

fn sum(header: &[u8]) -> u32 {
    crc32fast::hash(header.get(..header.len() - 4).unwrap_or_default())
}

impl From<Header1> for Header {
    fn from(old: Header1) -> Header {
        Header {
            magic: MAGIC_1,
            pair: old.pair,
            sequence: old.sequence,
            size: old.size,
            generation: old.generation,
            basis: Basis::NONE.0,
            inode: 0,
            made: 0,
            closed: 0,
            inconsistent: old.inconsistent,
            crc: 0,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct MapPage {
    crc: u32,
    number: u32,
    basis: [u8; 16],
    words: [u64; WORDS_PER_PAGE],
}

impl MapPage {
    fn sum(&self) -> u32 {
        crc32fast::hash(self.as_bytes().get(4..).unwrap_or_default())
    }
}

/// Why the durable facts of an image could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The file could not be used.
    #[error("{doing} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file is of another VM or of an image of another size.
    #[error("{path} belongs to another disk ({found}); remove it only if the image's content may be replaced",
        path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it says it belongs to.
        found: String,
    },
    /// Both header slots are damaged.
    #[error("{path} is damaged: the image beside it cannot be trusted and needs a full resync",
        path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

impl From<MetaError> for io::Error {
    /// Of the same kind, so that a full disk is known for one.
    fn from(error: MetaError) -> io::Error {
        let kind = match &error {
            MetaError::Io { source, .. } => source.kind(),
            MetaError::Foreign { .. } | MetaError::Damaged { .. } => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// The durable facts of one image.
#[derive(Debug)]
pub struct Meta {
    file: Box<dyn Medium>,
    path: PathBuf,
    header: Header,
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Header {
            sequence,
            size,
            generation,
            inconsistent,
            ..
        } = *self;
        write!(
            f,
            "Header({sequence}, {size} bytes, g{generation}, inconsistent {inconsistent})"
        )
    }
}

impl Meta {
    /// The file of facts at this path, made if there is none.
    ///
    /// # Errors
    /// [`MetaError::Io`].
    pub(crate) fn file(path: &Path) -> Result<Box<dyn Medium>, MetaError> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = opened.map_err(|source| MetaError::Io {
            doing: "open",
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Box::new(file))
    }

    /// The image that the file of facts at `path` tells of is gone, and another file is about to take its place:
    /// durably, that is nothing to start from before everything has been copied into it, and nothing in it is known.
    ///
    /// # Errors
    /// [`MetaError`]; no fact is changed.
    pub fn disown(path: &Path, pair: PairId, size: u64) -> Result<(), MetaError> {
        let (file, nobody) = (Self::file(path)?, Identity::default());
        let (mut meta, _) = Self::on(file, path, pair, size, Condition::Inconsistent, nobody)?;
        meta.mark_inconsistent()
    }

    /// Opens the facts of the image of `size` bytes that is `image`, or starts them: a fresh file has
    /// condition `fresh`, generation 0 and a map relative to nothing. Returns the map as well.
    ///
    /// # Errors
    /// [`MetaError`]; no fact is changed.
    pub(crate) fn on(
        file: Box<dyn Medium>,
        path: &Path,
        pair: PairId,
        size: u64,
        fresh: Condition,
        image: Identity,
    ) -> Result<(Meta, Marks), MetaError> {
        let count = Regions::of_size(size);
        let looked = file.size().map_err(|source| MetaError::Io {
            doing: "look at",
            path: path.to_path_buf(),
            source,
        });
        let new = Self::is_unwritten(file.as_ref(), looked?);
        let header = if new {
            Header {
                magic: MAGIC,
                pair: pair.0,
                sequence: 0,
                size,
                generation: 0,
                basis: Basis::NONE.0,
                inode: image.inode,
                made: image.made,
                closed: 0,
                inconsistent: u32::from(fresh == Condition::Inconsistent),
                crc: 0,
            }
        } else {
            Self::read_header(file.as_ref(), path)?
        };
        if header.pair != pair.0 || header.size != size {
            return Err(MetaError::Foreign {
                path: path.to_path_buf(),
                found: format!("pair {}, {} bytes", PairId(header.pair), header.size),
            });
        }
        let path = path.to_path_buf();
        let mut meta = Meta { file, path, header };
        if new {
            let none = Regions::none(count);
            meta.write_pages(&none)?;
            meta.sync()?;
            meta.write_header()?;
            return Ok((meta, Marks::new(none)));
        }
        let known = header.magic == MAGIC
            && (header.inode, header.made) == (image.inode, image.made)
            && (header.closed == 0 || header.closed == image.changed);
        if !known {
            return meta.relative_to_nothing(count, image);
        }
        if header.closed != 0 {
            // From here on the image changes, and a crash can't say when it did last.
            meta.header.closed = 0;
            meta.write_header()?;
        }
        let map = meta.read_pages(count);
        Ok((meta, Marks::new(map)))
    }

    /// The image is not, or is not known to be, the one the map was made for: somebody has replaced or
    /// changed it, or the file is of a format before maps had a basis. Both slots are written, so that
    /// no build that knows the older format only takes an old one for the latest.
    fn relative_to_nothing(
        mut self,
        count: u64,
        image: Identity,
    ) -> Result<(Meta, Marks), MetaError> {
        tracing::info!(path = %self.path.display(),
            "this disk's dirty-region map does not tell of this image: the next resync compares all of it");
        self.header = Header {
            magic: MAGIC,
            basis: Basis::NONE.0,
            inode: image.inode,
            made: image.made,
            closed: 0,
            ..self.header
        };
        self.write_header()?;
        let all = Regions::all(count);
        self.write_pages(&all)?;
        self.write_header()?;
        Ok((self, Marks::new(all)))
    }

    /// True of a file to which no header was ever written: power was lost while it was made. One slot at least
    /// holds a header from then on.
    fn is_unwritten(file: &dyn Medium, size: u64) -> bool {
        let mut headers = vec![0; (size as usize).min(2 * PAGE)];
        let read = file.read_at(&mut headers, 0);
        read.is_ok() && headers.iter().all(|byte| *byte == 0)
    }

    fn read_header(file: &dyn Medium, path: &Path) -> Result<Header, MetaError> {
        fn read<T: FromBytes + IntoBytes>(file: &dyn Medium, n: u64) -> Option<T> {
            let mut header = T::new_zeroed();
            file.read_at(header.as_mut_bytes(), n * PAGE as u64).ok()?;
            Some(header)
        }
        let slot = |n| {
            let new = read::<Header>(file, n).filter(|h| h.magic == MAGIC);
            let new = new.filter(|h| h.crc == sum(h.as_bytes()));
            let old = || read::<Header1>(file, n).filter(|h| h.magic == MAGIC_1);
            new.or_else(|| {
                let old = old().filter(|h| h.crc == sum(h.as_bytes()));
                old.map(Header::from)
            })
        };
        [slot(0), slot(1)]
            .into_iter()
            .flatten()
            .max_by_key(|h| h.sequence)
            .ok_or_else(|| MetaError::Damaged {
                path: path.to_path_buf(),
            })
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> MetaError + use<> {
        let path = self.path.clone();
        move |source| MetaError::Io {
            doing,
            path: path.clone(),
            source,
        }
    }

    fn sync(&self) -> Result<(), MetaError> {
        self.file.sync().map_err(self.failed("make durable"))
    }

    fn write_header(&mut self) -> Result<(), MetaError> {
        self.header.sequence += 1;
        self.header.crc = sum(self.header.as_bytes());
        let at = (self.header.sequence % 2) * PAGE as u64;
        self.file
            .write_at(self.header.as_bytes(), at)
            .map_err(self.failed("write"))?;
        self.sync()
    }

    fn read_pages(&self, count: u64) -> Regions {
        let mut map = Regions::none(count);
        let words = map.words().len();
        for (number, first) in (0..words).step_by(WORDS_PER_PAGE).enumerate() {
            let mut page = MapPage::new_zeroed();
            let at = MAP_START + (number * PAGE) as u64;
            let whole = self.file.read_at(page.as_mut_bytes(), at).is_ok()
                && page.number == number as u32
                && page.crc == page.sum()
                && page.basis == self.header.basis;
            for (bits, word) in page.words.iter().zip(first..words) {
                map.set_word(word, if whole { *bits } else { u64::MAX });
            }
        }
        map
    }

    fn write_page(&self, number: usize, bits: &Regions) -> Result<(), MetaError> {
        let mut page = MapPage::new_zeroed();
        (page.number, page.basis) = (number as u32, self.header.basis);
        let words = bits.words().iter().skip(number * WORDS_PER_PAGE);
        page.words.iter_mut().zip(words).for_each(|(p, w)| *p = *w);
        page.crc = page.sum();
        let at = MAP_START + (number * PAGE) as u64;
        let written = self.file.write_at(page.as_bytes(), at);
        written.map_err(self.failed("write"))
    }

    fn write_pages(&self, bits: &Regions) -> Result<(), MetaError> {
        let pages = bits.words().len().div_ceil(WORDS_PER_PAGE);
        (0..pages).try_for_each(|number| self.write_page(number, bits))
    }

    /// Whether the image may be started from.
    pub fn condition(&self) -> Condition {
        if self.header.inconsistent == 0 {
            Condition::Consistent
        } else {
            Condition::Inconsistent
        }
    }

    /// Generation under which the image was last written beside (rule 18).
    pub fn generation(&self) -> Generation {
        Generation(self.header.generation)
    }

    /// What the map is relative to.
    pub fn basis(&self) -> Basis {
        Basis(self.header.basis)
    }

    /// Durably states that the image is about to be overwritten (before the first byte).
    pub fn mark_inconsistent(&mut self) -> Result<(), MetaError> {
        self.header.inconsistent = 1;
        self.write_header()
    }

    /// Durably states that the image, already durable itself, is whole as of `generation`.
    pub fn mark_consistent(&mut self, generation: Generation) -> Result<(), MetaError> {
        self.header.inconsistent = 0;
        self.header.generation = generation.0;
        self.write_header()
    }

    /// Durably writes the generation beside the image (rule 18).
    pub fn set_generation(&mut self, generation: Generation) -> Result<(), MetaError> {
        self.header.generation = generation.0;
        self.write_header()
    }

    /// The image is closed in order; whoever changes it before it is opened again is found out by the
    /// time of its last change. Not durable before the image is: then the next resync compares all.
    pub(crate) fn close(&mut self, changed: u64) -> Result<(), MetaError> {
        if self.header.closed == changed {
            return Ok(());
        }
        self.header.closed = changed;
        self.write_header()
    }

    /// Makes the bits of `run` durable (rule 16: returns before the write touches the image). What was
    /// not durable when it failed is not counted as such: the next write tries again.
    pub(crate) fn cover(
        &mut self,
        marks: &Mutex<Marks>,
        run: &std::ops::Range<u64>,
    ) -> Result<(), MetaError> {
        // Nothing is dropped meanwhile: that takes this file, too.
        let locked = marks.lock();
        let (run, mut bits) = (&locked.ahead(run), locked.set().clone());
        drop(locked);
        bits.insert(run.clone());
        let page = |region: u64| (region / 64) as usize / WORDS_PER_PAGE;
        for number in page(run.start)..=page(run.end.saturating_sub(1).max(run.start)) {
            self.write_page(number, &bits)?;
        }
        self.sync()?;
        marks.lock().covered(run);
        Ok(())
    }

    /// Every write completed before `rotation` began is durable on both sides: durably drops the older bits
    /// and makes the rest relative to `basis`. Returns how many were dropped; none, with nothing changed,
    /// when that rotation is over.
    ///
    /// # Errors
    /// The file then holds the former map, the new one, or pages of both: each is right.
    pub(crate) fn end_rotation(
        &mut self,
        marks: &Mutex<Marks>,
        rotation: Rotation,
        basis: Basis,
    ) -> Result<Option<u64>, MetaError> {
        let mut locked = marks.lock();
        let Some(dropped) = locked.end_rotation(rotation) else {
            return Ok(None);
        };
        let left = locked.set().clone();
        drop(locked);
        // From here on pages are written for the new basis, also by a write that comes after a failure.
        self.header.basis = basis.0;
        self.write_pages(&left)?;
        self.sync()?;
        self.write_header()?;
        Ok(Some(dropped))
    }
}

#[cfg(test)]
mod tests;
