//! Which pages changed (rule 4): two sources in KVM behind one interface, joined with what
//! devices wrote.
//!
//! Everything ends in the regions' [`crate::bitmap::DirtyBitmap`]s: device writes mark them as
//! they happen, a harvest adds what KVM reports, pages given back (I6) are marked again. Draining
//! them gives each page once, ascending.

mod bitmap;
mod hot;
mod ring;

use kvm_ioctls::VmFd;

use crate::config::DirtyTracking;
use crate::error::{Error, Result};
use crate::memory::Ram;
use crate::vm::Vm;

pub(crate) use ring::ENTRY_BYTES as RING_ENTRY_BYTES;

/// A way to learn from KVM which pages vCPUs wrote.
pub(crate) trait Source: Send {
    /// Forgets everything: tracking has just been switched on, every page counts as clean.
    fn start(&mut self, vm: &VmFd, ram: &Ram) -> Result<()>;

    /// Marks in `ram`'s bitmaps the pages written since the last call, and counts them clean. A page
    /// written while this runs is in this harvest or the next.
    fn collect(&mut self, vm: &VmFd, ram: &Ram) -> Result<()>;

    /// About how many pages `collect` would mark.
    fn estimate(&mut self, vm: &VmFd, ram: &Ram) -> Result<usize>;

    /// Whether to report a page found dirty: false when it is known to be as last reported. `paused`
    /// says that nobody writes guest memory now.
    fn report(&mut self, ram: &Ram, page: u64, paused: bool) -> bool;

    /// A page's report was not acted upon: the next one must not be suppressed.
    fn given_back(&mut self, page: u64);
}

/// The dirty pages of one machine.
pub(crate) struct Tracker {
    source: Box<dyn Source>,
    on: bool,
}

impl Tracker {
    pub(crate) fn new(how: DirtyTracking, vm: &Vm, ram: &Ram) -> Result<Self> {
        let source: Box<dyn Source> = match how {
            DirtyTracking::Bitmap { hot_pages } => {
                Box::new(bitmap::BitmapSource::new(ram, hot_pages))
            }
            DirtyTracking::Ring { entries } => Box::new(ring::RingSource::new(vm, entries)?),
        };
        Ok(Tracker { source, on: false })
    }

    /// Starts tracking with every page clean, or stops it.
    pub(crate) fn switch(&mut self, on: bool, vm: &Vm, ram: &Ram) -> Result<()> {
        if self.on {
            self.source.collect(&vm.fd, ram)?; // no entry of the old log may outlive it
        }
        vm.log_dirty(ram, false)?;
        self.on = false;
        if on {
            vm.log_dirty(ram, true)?;
            self.source.start(&vm.fd, ram)?;
            for slot in 0..ram.regions().len() {
                if let Some(dirty) = ram.dirty(slot) {
                    dirty.drain(|_| {});
                }
            }
            self.on = true;
        }
        Ok(())
    }

    /// Goes on tracking on new KVM objects: what the old ones knew is kept as marks.
    pub(crate) fn collect_last(&mut self, vm: &Vm, ram: &Ram) -> Result<()> {
        if self.on {
            self.source.collect(&vm.fd, ram)
        } else {
            Ok(())
        }
    }

    /// Begins on new KVM objects with their log clean, keeping the marks.
    pub(crate) fn adopt(&mut self, how: DirtyTracking, vm: &Vm, ram: &Ram) -> Result<()> {
        let on = self.on;
        *self = Tracker::new(how, vm, ram)?;
        if on {
            vm.log_dirty(ram, true)?;
            self.source.start(&vm.fd, ram)?;
            self.on = true;
        }
        Ok(())
    }

    /// Replaces `dirty` by the pages written since the last harvest, unique and ascending.
    pub(crate) fn harvest(
        &mut self,
        vm: &VmFd,
        ram: &Ram,
        paused: bool,
        dirty: &mut Vec<u64>,
    ) -> Result<()> {
        dirty.clear();
        if !self.on {
            return Err(Error::Order("harvest: dirty pages are not tracked"));
        }
        self.source.collect(vm, ram)?;
        for (slot, region) in ram.regions().iter().enumerate() {
            if let Some(bitmap) = ram.dirty(slot) {
                bitmap.drain(|at| {
                    let page = region.start + at as u64;
                    if self.source.report(ram, page, paused) {
                        dirty.push(page);
                    }
                });
            }
        }
        Ok(())
    }

    pub(crate) fn give_back(&mut self, ram: &Ram, pages: &[u64]) {
        for page in pages {
            self.source.given_back(*page);
            ram.mark(*page);
        }
    }

    pub(crate) fn estimate(&mut self, vm: &VmFd, ram: &Ram) -> Result<usize> {
        if !self.on {
            return Ok(0);
        }
        let marked: usize = (0..ram.regions().len())
            .filter_map(|s| ram.dirty(s))
            .map(|d| d.count())
            .sum();
        Ok(self.source.estimate(vm, ram)? + marked)
    }
}
