//! The epoch thread's loop.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ax_failpoint::Point;
use ax_wire::EpochId;
use io_barrier::Gate;

use super::capture::Slot;
use super::handle::Failure;
use super::{Ended, EpochSource, PrimaryEngine, PrimaryError, acks};
use crate::guest::Guest;
use crate::link::{FrameReader, FrameWriter, LinkError, PrimaryLink};
use crate::policy::{Decision, Reason, Situation};

/// Captures that may fail one after the other before the engine gives up.
const MAX_FAILURES: u32 = 3;

impl<G: Guest + Send, S: EpochSource + Send> PrimaryEngine<G, S> {
    /// Protects the guest over one connection until it ends, the engine is stopped or the final epoch
    /// is acknowledged. Blocks; call it from a thread of its own.
    ///
    /// # Errors
    /// [`PrimaryError`]. After a link error the guest goes on running with its outputs held (paused if
    /// [`Self::is_parked`]); call `run` again with a new connection to the same shadow.
    pub fn run(&mut self, link: PrimaryLink) -> Result<Ended, PrimaryError> {
        // Gaps of a fraction of a millisecond are waited for: the default slack is 50 µs.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        *self.shared.close.lock() = Some(link.close.clone());
        self.shared.flow.lock().failure = None;
        *self.shared.question.lock() = Default::default();
        *self.shared.answers.lock() = Default::default();
        let result = self.connection(link);
        self.shared.connected.store(false, Ordering::Release);
        *self.shared.close.lock() = None;
        let failure = self.shared.flow.lock().failure.take();
        if self.shared.stop.load(Ordering::Acquire) {
            return Ok(Ended::Stopped);
        }
        match (result, failure) {
            // A refusal explains why the connection ended.
            (Err(PrimaryError::Link(_)), Some(Failure::Refused(refusal))) => {
                Err(PrimaryError::Refused(refusal))
            }
            (result, _) => result,
        }
    }

    fn connection(&mut self, link: PrimaryLink) -> Result<Ended, PrimaryError> {
        // A generation granted since is told again on every connection: the last one may have ended
        // before the shadow heard of it.
        let mut writer = FrameWriter::new(link.forward, self.shared.session, link.version);
        let mut reader = FrameReader::new(link.backward, link.version);
        if self.shared.stop.load(Ordering::Acquire) {
            (link.close)();
            return Ok(Ended::Stopped);
        }
        let staged = acks::read_resume(&self.shared, &mut reader)?;
        let full = self.take_up(staged)?;
        let (shared, events) = (self.shared.clone(), self.events.clone());
        ax_sync::thread::scope(|scope| {
            let acks = move || acks::run(&shared, events.as_ref(), reader);
            scope.spawn("epoch-acks", acks).map_err(LinkError::Io)?;
            let result = self.drive(&mut writer, full);
            (link.close)();
            result
        })
    }

    /// Compares where the shadow stands with what this engine can go on from; true when everything
    /// must be copied.
    fn take_up(&mut self, staged: Option<EpochId>) -> Result<bool, PrimaryError> {
        let captured = EpochId(self.shared.captured.load(Ordering::Acquire));
        let mut flow = self.shared.flow.lock();
        let (from, confirmed) = (flow.acked, self.shared.confirmed.load(Ordering::Acquire));
        let out_of_step = PrimaryError::OutOfStep {
            shadow: staged,
            from,
            to: captured,
        };
        match staged {
            // Outputs are held already: a copy takes too long for that. They must pass again first.
            None if confirmed || self.shared.barrier.gate() != Gate::Passing => Err(out_of_step),
            None => {
                // A first copy that was cut: what it captured is in the next one.
                while let Some(flight) = flow.flying.pop_front() {
                    flow.free.extend(flight.slot);
                }
                Ok(true)
            }
            Some(staged)
                if staged < from || staged > captured || (!confirmed && staged == from) =>
            {
                Err(out_of_step)
            }
            Some(staged) => {
                drop(flow);
                // What was being written when the connection was cut may have arrived whole.
                self.shared.shipped.fetch_max(staged.0, Ordering::AcqRel);
                let committed = self.shared.commit(staged);
                debug_assert!(committed.is_ok());
                if !self.shared.confirmed.swap(true, Ordering::AcqRel) {
                    self.events.confirmed(staged);
                }
                for flight in &mut self.shared.flow.lock().flying {
                    flight.stamp_ns = 0;
                }
                // Whatever it permitted has long expired: ask.
                self.shared.ask();
                self.events.committed(staged);
                Ok(false)
            }
        }
    }

    fn drive(&mut self, writer: &mut FrameWriter, full: bool) -> Result<Ended, PrimaryError> {
        // What the shadow did not stage is sent again.
        self.sent.clear();
        self.sent_state.clear();
        self.write_between(writer)?;
        if full {
            self.unpark().map_err(PrimaryError::Resume)?;
            self.full_copy(writer)?;
            self.resumed = self.shared.clock.now_ns();
        }
        self.shared.connected.store(true, Ordering::Release);
        self.resend(writer)?;
        loop {
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(Ended::Stopped);
            }
            if let Some(failure) = self.shared.flow.lock().failure.take() {
                return Err(failure.into());
            }
            self.write_between(writer)?;
            if let Some(ended) = self.after_pause()? {
                return Ok(ended);
            }
            let now = self.shared.clock.now_ns();
            let situation = self.situation(now);
            let waits = !situation.room || self.stays.is_some();
            if waits && !self.shared.hungry.swap(true, Ordering::AcqRel) {
                // Look once more, now that news rings.
                continue;
            }
            match self.config.policy.decide(&situation) {
                Decision::Capture(why) if !self.waits_for_ack() => self.epoch(writer, why)?,
                Decision::Capture(_) => self.shared.trigger.wait(Duration::from_millis(5)),
                Decision::Park => {
                    if let Err(error) = self.guest.pause() {
                        self.guest.resume().map_err(PrimaryError::Resume)?;
                        return Err(PrimaryError::Capture(error.into()));
                    }
                    self.parked_since = Some(now);
                }
                Decision::WaitUntil(until) => {
                    let wait = Duration::from_nanos(until.saturating_sub(now));
                    self.shared.trigger.wait(wait);
                }
            }
        }
    }

    /// True while the guest must stay as it is until the last epoch captured is acknowledged: the
    /// final epoch, or one larger than its slot.
    fn waits_for_ack(&self) -> bool {
        let captured = self.shared.captured.load(Ordering::Acquire);
        self.parked_since.is_some()
            && self.shared.acked.load(Ordering::Acquire) < captured
            && self.stays.is_some_and(|epoch| epoch.0 == captured)
    }

    /// What follows the acknowledgement of an epoch after which the guest stayed paused.
    fn after_pause(&mut self) -> Result<Option<Ended>, PrimaryError> {
        let Some(epoch) = self.stays else {
            return Ok(None);
        };
        if self.shared.acked.load(Ordering::Acquire) < epoch.0 {
            return Ok(None);
        }
        if self.is_final {
            self.shared.last.store(false, Ordering::Release);
            (self.stays, self.is_final) = (None, false);
            return Ok(Some(Ended::Final { epoch }));
        }
        self.stays = None;
        self.unpark().map_err(PrimaryError::Resume)?;
        Ok(None)
    }

    fn situation(&mut self, now: u64) -> Situation {
        if now.saturating_sub(self.estimated) >= self.config.policy.poll_ns {
            self.estimated = now;
            self.estimate = self.guest.dirty_estimate().unwrap_or(0);
        }
        let open = self.shared.barrier.open();
        let held = open.map_or(0, |(_, bytes)| bytes);
        let bytes = self.estimate * ax_wire::PAGE_SIZE + self.source.disk_bytes() + held;
        let free = !self.shared.flow.lock().free.is_empty();
        Situation {
            now,
            resumed: self.resumed,
            paused_for: self.paused_for,
            pending: open.is_some(),
            asked: self.shared.asked.load(Ordering::Acquire)
                || self.shared.last.load(Ordering::Acquire),
            bytes,
            room: free && self.shared.barrier.can_seal(),
            parked: self.parked_since.is_some(),
        }
    }

    fn epoch(&mut self, writer: &mut FrameWriter, why: Reason) -> Result<(), PrimaryError> {
        let Some(mut slot) = self.shared.flow.lock().free.pop() else {
            return Ok(());
        };
        self.shared.asked.store(false, Ordering::Release);
        let last = self.shared.last.load(Ordering::Acquire);
        let why = self.reason(why, last);
        match self.capture(&mut slot, last) {
            Ok(()) => {
                ax_failpoint::reached(Point::Resumed);
                self.trace_captured(&mut slot, why);
                if last || slot.spilled() {
                    (self.stays, self.is_final) = (Some(slot.epoch), last);
                }
                self.ship(writer, slot)
            }
            Err(error) => {
                self.trace_failed(&slot, why);
                self.not_captured(slot, error)
            }
        }
    }

    fn not_captured(&mut self, slot: Slot, error: PrimaryError) -> Result<(), PrimaryError> {
        self.shared.flow.lock().free.push(slot);
        self.failures += 1;
        match error {
            PrimaryError::Capture(error) if self.failures < MAX_FAILURES => {
                self.events.capture_failed(&error);
                Ok(())
            }
            error => {
                self.failures = 0;
                Err(error)
            }
        }
    }
}
