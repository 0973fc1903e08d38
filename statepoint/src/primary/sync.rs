//! The initial copy, while the guest runs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ax_wire::stream::{FrameError, FrameKind};
use ax_wire::{EpochId, PAGE_SIZE};

use super::capture::runs;
use super::ship::{CHUNK_BYTES, write_pages};
use super::{CaptureError, EpochSource, PrimaryEngine, PrimaryError};
use crate::guest::{Guest, Page};
use crate::link::{FrameWriter, LinkError};

/// How long the epoch thread sleeps when only the shadow's answers about its disks are missing; guest
/// writes fill the log meanwhile.
const ANSWER_PATIENCE: Duration = Duration::from_millis(1);

/// Most bytes of disk records in one frame.
const PIECE: usize = 512 << 10;

impl<G: Guest, S: EpochSource> PrimaryEngine<G, S> {
    /// Copies memory whole and of the disks what differs, then in rounds what has changed meanwhile, until the rest is
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
        {
            // One asked on an earlier connection is not answered any more.
            let mut question = self.shared.question.lock();
            (question.wanted, question.stamp_ns) = (false, None);
        }
        let mut total: u64 = ram.iter().map(|r| r.pages).sum();
        let mut sent = 0;
        self.shared.answers.lock().come.clear();
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
        let (mut round, mut caught_up) = (0, false);
        loop {
            let mut dirty = std::mem::take(&mut self.pages);
            let harvested = self.guest.harvest(&mut dirty);
            self.pages = dirty;
            harvested.map_err(CaptureError::Guest)?;
            let small = self.pages.len() <= self.config.copy_rest;
            if disks_done && caught_up && (small || round >= self.config.copy_rounds) {
                self.guest.give_back(&self.pages);
                break;
            }
            total += self.pages.len() as u64;
            self.copy_dirty(writer, &mut sent, total)?;
            while !disks_done && small {
                disks_done = self.copy_disk(writer)?;
                self.copied(sent, total);
                self.between(writer)?;
                self.await_answer(disks_done);
            }
            disks_done = disks_done || self.copy_disk(writer)?;
            self.between(writer)?;
            if disks_done {
                self.catch_up(writer)?;
                caught_up = true;
            }
            round += 1;
        }
        self.copied(sent, total);
        self.events.copy_done();
        match self.config.lease_ns {
            Some(lease) => self.shared.barrier.start_leasing(lease),
            None => self.shared.barrier.start_holding(),
        };
        writer.frame(FrameKind::SyncDone, EpochId(0), |_| {})?;
        writer.flush()?;
        Ok(())
    }

    /// Waits until the shadow has worked off everything sent so far, with its disks durable. A page of zeros
    /// is a few bytes on the link and a page to be written there: were outputs held from the moment the
    /// last byte is sent, the guest would be silent for all that the shadow is behind.
    fn catch_up(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        self.shared.ask();
        loop {
            self.between(writer)?;
            writer.flush()?;
            let question = self.shared.question.lock();
            if !question.wanted && question.stamp_ns.is_none() {
                return Ok(());
            }
            drop(question);
            self.shared.trigger.wait(ANSWER_PATIENCE);
        }
    }

    fn copied(&self, sent: u64, total: u64) {
        let bytes = PAGE_SIZE as u64;
        let disks = self.source.sync_progress();
        let counters = &self.shared.counters;
        counters
            .disk_compared
            .store(disks.compared, Ordering::Relaxed);
        counters.disk_moved.store(disks.moved, Ordering::Relaxed);
        self.events
            .copying(sent * bytes + disks.done, total * bytes + disks.total);
    }

    /// Waits for the shadow's next answer about its disks while nothing else is left to do.
    fn await_answer(&self, disks_done: bool) {
        let answers = self.shared.answers.lock();
        let waits = !disks_done && answers.come.is_empty() && !answers.due.is_empty();
        drop(answers);
        if waits {
            self.shared.trigger.wait(ANSWER_PATIENCE);
        }
    }

    /// Passes on what the shadow has said of its disks, and asks what is due to be asked.
    fn talk_of_disks(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        loop {
            let come = self.shared.answers.lock().come.pop_front();
            let Some(payload) = come else { break };
            if !self.source.sync_answered(&payload) {
                let error = FrameError::Body {
                    kind: FrameKind::DiskSums,
                    what: "not an answer to what was asked of the disks",
                };
                return Err(LinkError::from(error).into());
            }
        }
        let mut asked = false;
        while let Some(ask) = self.source.sync_ask() {
            self.shared.answers.lock().due.push_back(ask.answer());
            writer.frame(ask.kind(), EpochId(0), |out| {
                out.extend_from_slice(ask.as_bytes());
            })?;
            asked = true;
        }
        if asked {
            writer.flush()?;
        }
        Ok(())
    }

    /// Sends and stops between pieces as the others wish.
    fn between(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        if self.shared.stop.load(Ordering::Acquire) {
            return Err(LinkError::Closed.into());
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
        self.talk_of_disks(writer)?;
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
