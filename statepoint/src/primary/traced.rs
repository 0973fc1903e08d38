//! What the engine writes into its trace, and when: the record of an epoch once its guest runs again.

use std::sync::atomic::Ordering;

use super::capture::Slot;
use super::handle::{Flight, Shared};
use super::{EpochSource, PrimaryEngine};
use crate::guest::Guest;
use crate::policy::Reason;
use crate::trace::{Moment, Record, Size};

/// What the records need besides what the engine keeps anyway. Nanoseconds of its clock.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traced {
    /// The first kick of the pause under way, or of the last one.
    pub began: u64,
    /// That of the last epoch captured.
    before: Option<u64>,
    /// When the last vCPU was parked.
    parked: u64,
    /// Record of the last epoch captured, until it is known when its guest ran again.
    resuming: Option<u64>,
}

impl<G: Guest, S: EpochSource> PrimaryEngine<G, S> {
    /// Why an epoch really ends that the policy ends for `why`.
    pub(super) fn reason(&self, why: Reason, last: bool) -> Reason {
        let ring_full = self.shared.ring_full.swap(false, Ordering::AcqRel);
        match why {
            _ if last => Reason::Final,
            Reason::Asked if ring_full => Reason::RingFull,
            why => why,
        }
    }

    /// The guest is paused since a pause that `began` then.
    pub(super) fn trace_pause(&mut self, began: u64) {
        self.traced.began = began;
        self.traced.parked = self.guest.parked_ns().unwrap_or(0);
    }

    /// The guest of the last epoch captured ran again at `ns`.
    pub(super) fn trace_running(&mut self, ns: u64) {
        if let Some(record) = self.traced.resuming.take() {
            self.shared.trace.mark(record, Moment::Running, ns);
        }
    }

    /// What is known of the pause: of one that was cut short the moments it came to.
    fn record(&self, slot: &Slot, reason: Reason) -> Record {
        let (ends, began) = (&self.ends, self.traced.began);
        // Quiet is when the engine had its turn again: without a guest that knows more the same moment.
        let parked = match self.traced.parked {
            0 => ends.park,
            known => known,
        };
        let moments = [
            (Moment::Parked, parked),
            (Moment::Quiet, ends.park),
            (Moment::Saved, ends.save),
            (Moment::Harvested, ends.harvest),
            (Moment::Copied, ends.copy),
            (Moment::Closed, ends.close),
        ];
        let reached = moments.into_iter().filter(|(_, ns)| *ns >= began);
        let record = Record::new(slot.epoch, reason).with(Moment::Began, began);
        reached.fold(record, |record, (moment, ns)| record.with(moment, ns))
    }

    /// `slot` is captured; the guest runs, unless it is to stay paused.
    pub(super) fn trace_captured(&mut self, slot: &mut Slot, reason: Reason) {
        let mut record = self
            .record(slot, reason)
            .sized(Size::Pages, slot.pages.len() as u64)
            .sized(Size::State, slot.state.len() as u64)
            .sized(Size::Disk, slot.disk.len() as u64)
            .sized(Size::Outputs, slot.sealed.outputs)
            .sized(Size::OutputBytes, slot.sealed.bytes as u64);
        if let Some(since) = slot.sealed.since_ns {
            record = record.with(Moment::Held, since);
        }
        if self.parked_since.is_none() {
            record = record.with(Moment::Resumed, slot.resumed_ns);
        }
        slot.record = self.shared.trace.push(record);
        self.traced.resuming = Some(slot.record);
        let counters = &self.shared.counters;
        if let Some(count) = counters.reasons.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let began = self.traced.began;
        if let Some(before) = self.traced.before.replace(began) {
            counters.length.record(began.saturating_sub(before));
        }
    }

    /// A capture into `slot` failed and was undone.
    pub(super) fn trace_failed(&mut self, slot: &Slot, reason: Reason) {
        let mut record = self.record(slot, reason);
        (record.epoch, record.failed) = (self.next, true);
        self.shared.trace.push(record);
    }

    /// `slot` was written to the link from `began` to `ended`, as so many bytes.
    pub(super) fn trace_shipped(&self, slot: &Slot, [began, ended]: [u64; 2], bytes: u64) {
        let trace = &self.shared.trace;
        trace.mark(slot.record, Moment::Encoding, began);
        trace.mark(slot.record, Moment::Sent, ended);
        trace.measure(slot.record, Size::Shipped, bytes);
        self.shared.counters.shipped.record(bytes);
    }
}

impl Shared {
    /// The acknowledgement of `flight` was read at `ns`.
    pub(super) fn trace_acked(&self, flight: &Flight, ns: u64) {
        self.trace.mark(flight.record, Moment::Acked, ns);
        // It has no stamp if the connection ended before its last byte was known sent.
        if flight.stamp_ns != 0 {
            let ack = ns.saturating_sub(flight.stamp_ns);
            self.counters.ack.record(ack);
        }
    }

    /// Outputs were offered for release: notes which epochs have none left. From the reading thread.
    pub(super) fn trace_released(&self) {
        let (released, now) = (self.barrier.released(), self.clock.now_ns());
        let mut number = self.unreleased.load(Ordering::Relaxed);
        while number < self.trace.next() {
            let record = self.trace.get(number).filter(|record| !record.failed);
            if record.is_some_and(|record| record.epoch > released) {
                break;
            }
            // Without an acknowledgement: of a first copy that was cut, and begun anew.
            if let Some(record) = record
                && let Some(acked) = record.at(Moment::Acked)
            {
                self.trace.mark(number, Moment::Released, now);
                self.counters.release.record(now.saturating_sub(acked));
                if let Some(held) = record.at(Moment::Held) {
                    self.counters.held.record(now.saturating_sub(held));
                }
            }
            number += 1;
        }
        self.unreleased.store(number, Ordering::Relaxed);
    }
}
