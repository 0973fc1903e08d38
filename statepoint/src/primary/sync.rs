//! The initial copy, while the guest runs.

use std::sync::atomic::Ordering;

use ax_wire::stream::FrameKind;
use ax_wire::{EpochId, PAGE_SIZE};

use super::capture::runs;
use super::ship::{CHUNK_BYTES, write_pages};
use super::{CaptureError, EpochSource, PrimaryEngine, PrimaryError};
use crate::guest::{Guest, Page};
use crate::link::FrameWriter;

/// Most bytes of disk records in one frame.
const PIECE: usize = 512 << 10;

impl<G: Guest, S: EpochSource> PrimaryEngine<G, S> {
    /// Copies memory and disks whole, then in rounds what has changed meanwhile, until the rest is
    /// small enough for an epoch (or the rounds are used up: then the first epoch is large). From the
    /// return on outputs are held (rule 22, step 1). Zero pages travel as a few bytes.
    pub(super) fn full_copy(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        self.source.restart_sync().map_err(CaptureError::Guest)?;
        if self.tracking {
            self.guest.track_dirty(false).map_err(CaptureError::Guest)?;
        }
        self.guest.track_dirty(true).map_err(CaptureError::Guest)?;
        self.tracking = true;
        let ram = self.guest.ram().to_vec();
        if ram.is_empty() {
            // Disks alone: an empty piece begins the copy, though they may have nothing to send either.
            writer.frame(FrameKind::BulkDiskEnd, EpochId(0), |_| {})?;
        }
        let mut total: u64 = ram.iter().map(|r| r.pages).sum();
        let mut sent = 0;
        let mut disks_done = false;
        for region in &ram {
            let mut page = region.start;
            let end = region.start.saturating_add(region.pages);
            while page < end {
                let pages = (end - page).min((CHUNK_BYTES / PAGE_SIZE) as u64);
                self.copy_run(writer, page, pages as usize)?;
                disks_done = disks_done || self.copy_disk(writer)?;
                (page, sent) = (page + pages, sent + pages);
                self.copied(sent, total);
                self.between(writer)?;
            }
        }
        let mut round = 0;
        loop {
            let mut dirty = std::mem::take(&mut self.pages);
            let harvested = self.guest.harvest(&mut dirty);
            self.pages = dirty;
            harvested.map_err(CaptureError::Guest)?;
            let small = self.pages.len() <= self.config.copy_rest;
            if disks_done && (small || round >= self.config.copy_rounds) {
                self.guest.give_back(&self.pages);
                break;
            }
            total += self.pages.len() as u64;
            self.copy_dirty(writer, &mut sent, total)?;
            while !disks_done && small {
                disks_done = self.copy_disk(writer)?;
                self.between(writer)?;
            }
            disks_done = disks_done || self.copy_disk(writer)?;
            self.between(writer)?;
            round += 1;
        }
        self.events.copy_done();
        match self.config.lease_ns {
            Some(lease) => self.shared.barrier.start_leasing(lease),
            None => self.shared.barrier.start_holding(),
        };
        writer.frame(FrameKind::SyncDone, EpochId(0), |_| {})?;
        writer.flush()?;
        Ok(())
    }

    fn copied(&self, sent: u64, total: u64) {
        let bytes = PAGE_SIZE as u64;
        self.events.copying(sent * bytes, total * bytes);
    }

    /// Sends and stops between pieces as the others wish.
    fn between(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        if self.shared.stop.load(Ordering::Acquire) {
            return Err(crate::link::LinkError::Closed.into());
        }
        if let Some(failure) = self.shared.flow.lock().failure.take() {
            return Err(failure.into());
        }
        self.write_between(writer)?;
        Ok(())
    }

    fn copy_run(
        &mut self,
        writer: &mut FrameWriter,
        first: Page,
        pages: usize,
    ) -> Result<(), PrimaryError> {
        self.scratch.resize(pages * PAGE_SIZE, 0);
        self.guest
            .read_pages(first, &mut self.scratch)
            .map_err(CaptureError::Guest)?;
        write_pages(
            writer,
            FrameKind::BulkPages,
            EpochId(0),
            first,
            &self.scratch,
            |_| {},
        )?;
        Ok(())
    }

    fn copy_dirty(
        &mut self,
        writer: &mut FrameWriter,
        sent: &mut u64,
        total: u64,
    ) -> Result<(), PrimaryError> {
        let pages = std::mem::take(&mut self.pages);
        let copied = (|| {
            for chunk in pages.chunks(CHUNK_BYTES / PAGE_SIZE) {
                for (first, n) in runs(chunk) {
                    self.copy_run(writer, first, n)?;
                }
                *sent += chunk.len() as u64;
                self.copied(*sent, total);
                self.between(writer)?;
            }
            Ok(())
        })();
        self.pages = pages;
        copied
    }

    /// Sends the next piece of the disks; true once all is sent.
    fn copy_disk(&mut self, writer: &mut FrameWriter) -> Result<bool, PrimaryError> {
        let done = self
            .source
            .sync_step(&mut self.scratch)
            .map_err(CaptureError::Guest)?;
        if !self.scratch.is_empty() {
            for piece in self.scratch.chunks(PIECE) {
                writer.frame(FrameKind::BulkDisk, EpochId(0), |out| {
                    out.extend_from_slice(piece);
                })?;
            }
            writer.frame(FrameKind::BulkDiskEnd, EpochId(0), |_| {})?;
        }
        Ok(done)
    }
}
