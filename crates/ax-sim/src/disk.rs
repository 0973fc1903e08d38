//! Simulated files: what a write puts there is in the host's cache until it is made durable.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use ax_disk::Medium;
use ax_disk::meta::Identity;
use ax_sync::sim::{self, Rng};
use parking_lot::Mutex;

const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct Inner {
    /// As a read sees it.
    content: Vec<u8>,
    /// Sectors that are not durable, with what was there when they were; none beyond the durable end.
    volatile: BTreeMap<usize, Option<Vec<u8>>>,
    /// What an operation takes on top, and until when every one of them hangs.
    slow: Duration,
    hung_until: u64,
    /// Every operation fails.
    fails: bool,
    changed: u64,
}

/// A file of one host. It outlives the processes that have it open.
#[derive(Debug)]
pub struct SimFile {
    inner: Mutex<Inner>,
    inode: u64,
    /// It only says that it makes things durable.
    lies: bool,
}

/// An open file.
#[derive(Debug)]
pub struct Handle(pub Arc<SimFile>);

impl SimFile {
    /// A file of `size` zeros, durable; one that `lies` loses what it has called durable.
    pub fn new(inode: u64, size: usize, lies: bool) -> Arc<SimFile> {
        Arc::new(SimFile {
            inner: Mutex::new(Inner {
                content: vec![0; size],
                ..Inner::default()
            }),
            inode,
            lies,
        })
    }

    /// The host loses power: each sector that was not durable is there, or as it was.
    pub fn cut(&self, rng: &mut Rng) {
        let mut inner = self.inner.lock();
        for (at, before) in std::mem::take(&mut inner.volatile) {
            if rng.below(2) == 0 {
                continue;
            }
            match before {
                Some(before) => {
                    if let Some(place) = inner.content.get_mut(at..at + before.len()) {
                        place.copy_from_slice(&before);
                    }
                }
                // Beyond the durable end: zeros, as a file that has grown and lost its data has.
                None => {
                    let end = (at + SECTOR).min(inner.content.len());
                    if let Some(place) = inner.content.get_mut(at..end) {
                        place.fill(0);
                    }
                }
            }
        }
        (inner.slow, inner.hung_until, inner.fails) = (Duration::ZERO, 0, false);
    }

    /// From here on every operation takes so much longer.
    pub fn slow(&self, by: Duration) {
        self.inner.lock().slow = by;
    }

    /// Operations hang until then.
    pub fn hang(&self, until: u64) {
        self.inner.lock().hung_until = until;
    }

    /// From here on every operation fails, or none.
    pub fn fail(&self, fails: bool) {
        self.inner.lock().fails = fails;
    }

    fn works(&self) -> io::Result<()> {
        match self.inner.lock().fails {
            true => Err(io::Error::other("an injected failure")),
            false => Ok(()),
        }
    }

    /// What a read sees of it.
    pub fn content(&self) -> Vec<u8> {
        self.inner.lock().content.clone()
    }

    /// What an operation takes: never with a lock held that another process may want.
    fn take_time(&self, usual: u64) {
        let Some(here) = sim::current() else { return };
        let (slow, hung) = {
            let inner = self.inner.lock();
            (inner.slow, inner.hung_until)
        };
        let wait = hung.saturating_sub(here.now()) + here.below(usual + 1);
        here.sleep(slow + Duration::from_nanos(wait));
    }
}

impl Medium for Handle {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.0.take_time(5_000);
        self.0.works()?;
        let inner = self.0.inner.lock();
        let at = at as usize;
        match inner.content.get(at..at + out.len()) {
            Some(there) => out.copy_from_slice(there),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.0.take_time(10_000);
        self.0.works()?;
        let now = sim::current().map_or(0, |here| here.now());
        let mut inner = self.0.inner.lock();
        let (at, end) = (at as usize, at as usize + data.len());
        let durable_end = inner.content.len();
        if inner.content.len() < end {
            inner.content.resize(end, 0);
        }
        for sector in (at / SECTOR * SECTOR..end).step_by(SECTOR) {
            let upto = (sector + SECTOR).min(inner.content.len());
            let before = inner.content.get(sector..upto).map(<[u8]>::to_vec);
            let before = before.filter(|_| sector < durable_end);
            inner.volatile.entry(sector).or_insert(before);
        }
        if let Some(place) = inner.content.get_mut(at..end) {
            place.copy_from_slice(data);
        }
        inner.changed = now;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // What is written while this is under way is not known to be made durable by it.
        let then: Vec<(usize, Vec<u8>)> = {
            let inner = self.0.inner.lock();
            let sectors = inner.volatile.keys();
            let content = |at: usize| {
                let end = (at + SECTOR).min(inner.content.len());
                inner.content.get(at..end).unwrap_or_default().to_vec()
            };
            sectors.map(|at| (*at, content(*at))).collect()
        };
        self.0.take_time(400_000);
        self.0.works()?;
        if self.0.lies {
            return Ok(());
        }
        let mut inner = self.0.inner.lock();
        for (at, durable) in then {
            let end = (at + SECTOR).min(inner.content.len());
            let same = inner.content.get(at..end) == Some(&durable[..]);
            if same {
                inner.volatile.remove(&at);
            } else if let Some(before) = inner.volatile.get_mut(&at) {
                *before = Some(durable);
            }
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.inner.lock().content.len() as u64)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.write_at(&vec![0; len as usize], at)?;
        Ok(true)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        let inner = self.0.inner.lock();
        let rest = inner.content.get(from as usize..).unwrap_or_default();
        let first = rest.iter().position(|byte| *byte != 0);
        // As file systems do: whole blocks.
        let start = first
            .map(|n| (from + n as u64) & !4095)
            .map(|s| s.max(from));
        Ok(start.map(|start| start..inner.content.len() as u64))
    }

    fn is_at(&self, _: &std::path::Path) -> io::Result<bool> {
        Ok(true)
    }

    fn drop_cached(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        let changed = self.0.inner.lock().changed;
        Ok(Identity {
            inode: self.0.inode,
            made: 1,
            changed,
        })
    }
}
