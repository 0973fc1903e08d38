//! What is durably known of an image: its condition, its generation, its dirty regions.
//!
//! One small file beside the state of its VM: two header slots written in turn (a torn one leaves the
//! other), then pages of the dirty-region map, each with its own CRC32. A map page that is
//! missing or torn reads as "everything dirty" (rule 16).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ax_wire::{Generation, PairId};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes of image that one bit of the map stands for.
pub const REGION: u64 = 1 << 20;

const PAGE: usize = 4096;
const MAGIC: [u8; 8] = *b"AXDISK01";
const MAP_START: u64 = 2 * PAGE as u64;
const BITS_PER_PAGE: usize = (PAGE - 8) * 8;

/// Whether an image may be started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// A point in the guest's own history.
    Consistent,
    /// Being overwritten, or the overwriting was cut short: never started, never a source (I4).
    Inconsistent,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    pair: [u8; 16],
    sequence: u64,
    size: u64,
    generation: u64,
    inconsistent: u32,
    crc: u32,
}

impl Header {
    fn sum(&self) -> u32 {
        let bytes = self.as_bytes();
        crc32fast::hash(&bytes[..bytes.len() - 4])
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct MapPage {
    crc: u32,
    number: u32,
    bits: [u8; PAGE - 8],
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

/// The durable facts of one image.
#[derive(Debug)]
pub struct Meta {
    file: File,
    path: PathBuf,
    header: Header,
    pages: Vec<MapPage>,
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

impl std::fmt::Debug for MapPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MapPage({})", self.number)
    }
}

impl Meta {
    /// Opens the facts of the image of `size` bytes, or starts them: a fresh file has condition
    /// `fresh`, generation 0 and a clean map.
    ///
    /// # Errors
    /// [`MetaError`]; nothing is changed.
    pub fn open(path: &Path, pair: PairId, size: u64, fresh: Condition) -> Result<Meta, MetaError> {
        let failed = |doing| {
            let path = path.to_path_buf();
            move |source| MetaError::Io {
                doing,
                path,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed("open"))?;
        let regions = size.div_ceil(REGION) as usize;
        let count = regions.div_ceil(BITS_PER_PAGE);
        let blank = |number: usize| {
            let mut page = MapPage::new_zeroed();
            page.number = number as u32;
            page
        };
        if file.metadata().map_err(failed("look at"))?.len() == 0 {
            let header = Header {
                magic: MAGIC,
                pair: pair.0,
                sequence: 0,
                size,
                generation: 0,
                inconsistent: u32::from(fresh == Condition::Inconsistent),
                crc: 0,
            };
            let mut meta = Meta {
                file,
                path: path.to_path_buf(),
                header,
                pages: (0..count).map(blank).collect(),
            };
            for number in 0..count {
                meta.write_page(number)?;
            }
            meta.write_header()?;
            return Ok(meta);
        }
        let header = Self::read_header(&file, path)?;
        if header.pair != pair.0 || header.size != size {
            return Err(MetaError::Foreign {
                path: path.to_path_buf(),
                found: format!("pair {}, {} bytes", PairId(header.pair), header.size),
            });
        }
        let pages = (0..count)
            .map(|number| {
                let mut page = blank(number);
                let at = MAP_START + (number * PAGE) as u64;
                let whole = file.read_exact_at(page.as_mut_bytes(), at).is_ok()
                    && page.number == number as u32
                    && page.crc == crc32fast::hash(&page.as_bytes()[4..]);
                if !whole {
                    page.bits = [0xff; PAGE - 8];
                    page.number = number as u32;
                }
                page
            })
            .collect();
        Ok(Meta {
            file,
            path: path.to_path_buf(),
            header,
            pages,
        })
    }

    fn read_header(file: &File, path: &Path) -> Result<Header, MetaError> {
        let slot = |n: u64| {
            let mut header = Header::new_zeroed();
            file.read_exact_at(header.as_mut_bytes(), n * PAGE as u64)
                .ok()?;
            (header.magic == MAGIC && header.crc == header.sum()).then_some(header)
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

    fn write_header(&mut self) -> Result<(), MetaError> {
        self.header.sequence += 1;
        self.header.crc = self.header.sum();
        let at = (self.header.sequence % 2) * PAGE as u64;
        self.file
            .write_all_at(self.header.as_bytes(), at)
            .map_err(self.failed("write"))?;
        self.file.sync_data().map_err(self.failed("make durable"))
    }

    fn write_page(&mut self, number: usize) -> Result<(), MetaError> {
        let Some(page) = self.pages.get_mut(number) else {
            return Ok(());
        };
        page.crc = crc32fast::hash(&page.as_bytes()[4..]);
        let at = MAP_START + (number * PAGE) as u64;
        let written = self.file.write_all_at(page.as_bytes(), at);
        written.map_err(self.failed("write"))
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

    /// Makes the bits of `len` bytes at `offset` durable; free when they are set already.
    ///
    /// Rule 16: must have returned before the write touches the image.
    pub fn before_write(&mut self, offset: u64, len: u64) -> Result<(), MetaError> {
        let mut changed = false;
        let end = (offset + len).div_ceil(REGION);
        for region in offset / REGION..end {
            let (number, bit) = (
                region as usize / BITS_PER_PAGE,
                region as usize % BITS_PER_PAGE,
            );
            let Some(page) = self.pages.get_mut(number) else {
                continue;
            };
            let mask = 1 << (bit % 8);
            if page.bits[bit / 8] & mask == 0 {
                page.bits[bit / 8] |= mask;
                self.write_page(number)?;
                changed = true;
            }
        }
        if changed {
            self.file.sync_data().map_err(self.failed("make durable"))?;
        }
        Ok(())
    }

    /// Regions whose content may differ from the other side's.
    pub fn dirty_regions(&self) -> impl Iterator<Item = u64> + '_ {
        let regions = self.header.size.div_ceil(REGION);
        (0..regions).filter(|region| {
            let (number, bit) = (
                *region as usize / BITS_PER_PAGE,
                *region as usize % BITS_PER_PAGE,
            );
            self.pages
                .get(number)
                .is_none_or(|p| p.bits[bit / 8] & (1 << (bit % 8)) != 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: PairId = PairId([3; 16]);
    const SIZE: u64 = 100 * REGION;

    fn reopen(path: &Path) -> Result<Meta, MetaError> {
        Meta::open(path, PAIR, SIZE, Condition::Consistent)
    }

    #[test]
    fn facts_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.meta");
        let mut meta = reopen(&path).unwrap();
        assert_eq!(meta.dirty_regions().count(), 0);
        meta.before_write(3 * REGION + 5, 2 * REGION).unwrap();
        meta.mark_inconsistent().unwrap();
        meta.set_generation(Generation(9)).unwrap();
        drop(meta);
        let meta = reopen(&path).unwrap();
        assert_eq!(meta.condition(), Condition::Inconsistent);
        assert_eq!(meta.generation(), Generation(9));
        assert_eq!(meta.dirty_regions().collect::<Vec<_>>(), [3, 4, 5]);
    }

    #[test]
    fn a_torn_header_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.meta");
        let mut meta = reopen(&path).unwrap();
        meta.set_generation(Generation(4)).unwrap();
        meta.set_generation(Generation(5)).unwrap();
        let slot = (meta.header.sequence % 2) * PAGE as u64;
        meta.file.write_all_at(&[0xee; 20], slot + 8).unwrap();
        drop(meta);
        assert_eq!(reopen(&path).unwrap().generation(), Generation(4));
    }

    #[test]
    fn a_torn_map_means_everything_is_dirty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.meta");
        let meta = reopen(&path).unwrap();
        meta.file.write_all_at(&[1; 7], MAP_START + 100).unwrap();
        drop(meta);
        assert_eq!(
            reopen(&path).unwrap().dirty_regions().count() as u64,
            SIZE / REGION
        );
    }

    #[test]
    fn another_disks_facts_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.meta");
        drop(reopen(&path).unwrap());
        let other = Meta::open(&path, PAIR, SIZE + REGION, Condition::Consistent);
        assert!(matches!(other, Err(MetaError::Foreign { .. })));
        std::fs::write(&path, [1; 9000]).unwrap();
        assert!(matches!(reopen(&path), Err(MetaError::Damaged { .. })));
    }
}
