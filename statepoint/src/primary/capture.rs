//! The pause: capturing one epoch into a slot.

use ax_failpoint::Point;
use ax_wire::state::StateWriter;
use ax_wire::{EpochId, PAGE_SIZE};
use io_barrier::{RxCounts, Sealed};
use std::sync::atomic::Ordering;

use super::{CaptureError, EpochSource, PrimaryConfig, PrimaryEngine, PrimaryError};
use crate::arena::Arena;
use crate::digest::digest;
use crate::guest::{Guest, GuestError, Page};

/// One captured epoch. Every buffer is allocated once; its memory is resident only as far as used.
#[derive(Debug)]
pub(super) struct Slot {
    pub epoch: EpochId,
    pub state: Vec<u8>,
    /// Dirty pages, ascending.
    pub pages: Vec<Page>,
    /// The content of the first `pages` (all of them unless the epoch is larger than its slot).
    pub content: Arena,
    pub disk: Vec<u8>,
    pub outputs: Vec<u8>,
    pub rx_given: RxCounts,
    pub digest: Option<u64>,
    pub resumed_ns: u64,
    /// The outputs it has.
    pub sealed: Sealed,
    /// Number of its record in the trace.
    pub record: u64,
}

impl Slot {
    pub fn new(config: &PrimaryConfig, total_pages: usize) -> Slot {
        Slot {
            epoch: EpochId(0),
            state: Vec::with_capacity(config.state_bytes),
            pages: Vec::with_capacity(total_pages),
            content: Arena::new(config.slot_bytes / PAGE_SIZE * PAGE_SIZE),
            disk: Vec::new(),
            outputs: Vec::with_capacity(config.output_bytes),
            rx_given: RxCounts::default(),
            digest: None,
            resumed_ns: 0,
            sealed: Sealed::default(),
            record: 0,
        }
    }

    /// Pages whose content is here.
    pub fn captured(&self) -> usize {
        self.content.as_slice().len() / PAGE_SIZE
    }

    /// True when the rest of the pages must be read from the paused guest.
    pub fn spilled(&self) -> bool {
        self.captured() < self.pages.len()
    }
}

/// Lengths of the runs of consecutive numbers in `pages`, each with its first number.
pub(super) fn runs(pages: &[Page]) -> impl Iterator<Item = (Page, usize)> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let same = rest
            .iter()
            .zip(first..)
            .take_while(|(page, expected)| **page == *expected)
            .count();
        rest = rest.get(same..).unwrap_or_default();
        Some((first, same))
    })
}

/// An error when a test has the capture fail here (I6).
fn step(point: Point) -> Result<(), CaptureError> {
    if ax_failpoint::fails(point) {
        return Err(CaptureError::Guest(GuestError {
            doing: "capture",
            source: format!("a test has it fail at {point}").into(),
        }));
    }
    Ok(())
}

impl<G: Guest + Send, S: EpochSource + Send> PrimaryEngine<G, S> {
    /// Captures the open epoch into `slot` in the order of rule 3, memory last, then closes the
    /// epoch's outputs and disk writes, which cannot fail any more, then resumes, unless the guest
    /// must stay paused: `stay` (final epoch), or an epoch larger than its slot.
    ///
    /// # Errors
    /// I6: the dirty pages are counted dirty again, outputs and disk writes stay in the open epoch and
    /// the guest runs.
    pub(super) fn capture(&mut self, slot: &mut Slot, stay: bool) -> Result<(), PrimaryError> {
        if let Some(since) = self.parked_since {
            return self.capture_paused(slot, stay, since);
        }
        let began = self.shared.clock.now_ns();
        self.traced.began = began;
        let captured = G::pause_and(
            self,
            |engine| &mut engine.guest,
            |engine| {
                engine.parked_since = Some(began);
                engine.capture_paused(slot, stay, began)
            },
        );
        captured.unwrap_or_else(|error| self.undo(error.into()))
    }

    /// The rest of [`Self::capture`], with the guest paused since a pause that `began` then.
    fn capture_paused(
        &mut self,
        slot: &mut Slot,
        stay: bool,
        began: u64,
    ) -> Result<(), PrimaryError> {
        ax_failpoint::reached(Point::Parked);
        self.count_pause();
        self.trace_pause(began);
        self.ends.park = self.shared.clock.now_ns();
        if let Err(error) = self.fill(slot) {
            return self.undo(error);
        }
        // Nothing fails from here on.
        self.source.seal(slot.epoch, &mut slot.disk);
        slot.rx_given = self.source.rx_given();
        self.next = slot.epoch.next();
        self.failures = 0;
        self.estimate = 0;
        self.shared.captured.store(slot.epoch.0, Ordering::Release);
        ax_failpoint::reached(Point::Captured);
        if slot.spilled() {
            self.shared.counters.spilled.fetch_add(1, Ordering::Relaxed);
        }
        self.ends.close = self.shared.clock.now_ns();
        if !stay && !slot.spilled() {
            self.unpark().map_err(PrimaryError::Resume)?;
        }
        slot.resumed_ns = self.shared.clock.now_ns();
        self.paused_for = match self.guest.was_idle() {
            true => 0,
            false => slot.resumed_ns.saturating_sub(began),
        };
        self.uncounted_pause = Some(began);
        self.shared.counters.pages.record(slot.pages.len() as u64);
        Ok(())
    }

    /// Counts the last pause, from the first kick to the last vCPU running again. That vCPU may run
    /// long after `resume` has returned, and is parked again now.
    fn count_pause(&mut self) {
        if let Some(began) = self.uncounted_pause.take() {
            let known = self.guest.resumed_ns().filter(|at| *at >= began);
            self.ends.resume = known.unwrap_or(self.resumed);
            self.trace_running(self.ends.resume);
            let counters = &self.shared.counters;
            counters
                .pause
                .record(self.ends.resume.saturating_sub(began));
            let mut last = began;
            counters.parts.zip(&self.ends).map(|(histogram, end)| {
                histogram.record(end.saturating_sub(last));
                last = **end;
            });
        }
    }

    /// Everything of a capture that can fail, with the guest paused.
    fn fill(&mut self, slot: &mut Slot) -> Result<(), CaptureError> {
        slot.epoch = self.next;
        slot.content.clear();
        slot.outputs.clear();
        slot.pages.clear();
        let filled = self.save_and_copy(slot);
        if filled.is_err() {
            self.guest.give_back(&slot.pages);
        }
        filled
    }

    fn save_and_copy(&mut self, slot: &mut Slot) -> Result<(), CaptureError> {
        step(Point::Saving)?;
        self.guest.save(&mut StateWriter::new(&mut slot.state))?;
        step(Point::Saved)?;
        self.ends.save = self.shared.clock.now_ns();
        self.guest.harvest(&mut slot.pages)?;
        step(Point::Harvested)?;
        self.ends.harvest = self.shared.clock.now_ns();
        let room = slot.content.capacity() / PAGE_SIZE;
        let fitting = slot.pages.get(..room).unwrap_or(&slot.pages);
        for (first, pages) in runs(fitting) {
            if let Some(out) = slot.content.grab(pages * PAGE_SIZE) {
                self.guest.read_pages(first, out)?;
            }
        }
        let due =
            self.config.verify_every != 0 && slot.epoch.0.is_multiple_of(self.config.verify_every);
        slot.digest = if due {
            let guest = &self.guest;
            let read = |first, out: &mut [u8]| guest.read_pages(first, out);
            self.shared.verifying.store(true, Ordering::Release);
            let digested = digest(guest.ram(), &mut self.scratch, read);
            self.shared.verifying.store(false, Ordering::Release);
            let digest = digested?;
            self.shared.verified.store(slot.epoch.0, Ordering::Release);
            Some(digest)
        } else {
            None
        };
        step(Point::Copied)?;
        self.ends.copy = self.shared.clock.now_ns();
        slot.sealed = self.shared.barrier.seal(slot.epoch, &mut slot.outputs)?;
        Ok(())
    }

    /// The guest goes on as if no capture had been tried.
    fn undo(&mut self, error: CaptureError) -> Result<(), PrimaryError> {
        self.shared
            .counters
            .failed_captures
            .fetch_add(1, Ordering::Relaxed);
        self.parked_since = None;
        self.guest.resume().map_err(PrimaryError::Resume)?;
        self.resumed = self.shared.clock.now_ns();
        tracing::warn!(%error, epoch = self.next.0, "a capture failed and was undone");
        Err(PrimaryError::Capture(error))
    }
}
