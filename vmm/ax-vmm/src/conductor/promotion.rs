//! From shadow to running guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::process::{PromotionParts, What};
use ax_wire::record::{Record, State};
use io_barrier::{Gate, Grant, SoloGrant};
use statepoint::pair::{Event, Phase};

use super::{Conductor, Input};
use crate::error::Error;
use crate::faults::Standing;
use crate::guest::Part;
use crate::shadowing::Shadowing;

/// A step of a promotion that is behind it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// Every acknowledged epoch is applied and durable on the disks.
    Applied,
    /// The machine is restored.
    Restored,
    /// The arbiter is asked.
    Asked,
    /// It has granted, and that is written down.
    Granted,
    /// The disks' generation is durable.
    Durable,
    /// The guest runs.
    Started,
}

/// When each step of a promotion was taken last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Steps([Option<Instant>; 6]);

impl Steps {
    /// The step is taken now.
    pub(super) fn reached(&mut self, step: Step) {
        if let Some(at) = self.0.get_mut(step as usize) {
            *at = Some(Instant::now());
        }
    }

    /// What the time from the notice to the first output consists of. A step that was not taken, or was taken
    /// before the notice, took no time.
    fn parts(&self, noticed: Instant, shown: Instant) -> PromotionParts {
        let mut before = noticed;
        let mut part = |at: Option<Instant>| {
            let at = at.map_or(before, |at| at.max(before));
            let part = at.saturating_duration_since(before);
            before = at;
            u64::try_from(part.as_micros()).unwrap_or(u64::MAX)
        };
        let [applied, restored, asked, granted, durable, started] = self.0;
        PromotionParts {
            apply: part(applied),
            restore: part(restored),
            permission: part(asked),
            grant: part(granted),
            disks: part(durable),
            start: part(started),
            release: part(Some(shown)),
        }
    }
}

impl Conductor {
    /// Everything of a promotion that needs no grant: finish applying, make the disks durable, restore
    /// the machine. With `protected` the guest will have a shadow from its first instruction on: what
    /// it writes is tracked and recorded from here.
    pub(super) fn prepare(&mut self, protected: bool) -> Result<(), String> {
        let shadowing = self.shadowing.as_mut().ok_or("there was no session")?;
        let committed = shadowing
            .finish()
            .ok_or("no committed epoch is wholly applied")?;
        shadowing.replica.settle().map_err(|e| e.to_string())?;
        self.promotion.reached(Step::Applied);
        if self.part() == Part::Disks {
            // The guest was put in place for its boot when this process began.
            self.last_epoch = committed.epoch;
            self.prepared = Some(committed);
            return Ok(());
        }
        let now = ax_link::heartbeat::boottime_ns();
        let elapsed = Duration::from_nanos(now.saturating_sub(committed.arrived_ns));
        let mut machine = self.parts.machine.lock();
        // Before the restore, which may write guest memory.
        let tracked = match protected {
            true => machine.track_dirty(true),
            false => Ok(()),
        };
        tracked
            .and_then(|()| machine.restore(&committed.state, elapsed))
            .and_then(|()| machine.promote_fixups())
            .map_err(|e| e.to_string())?;
        drop(machine);
        self.parts.log.record(protected);
        self.last_epoch = committed.epoch;
        self.prepared = Some(committed);
        self.promotion.reached(Step::Restored);
        Ok(())
    }

    pub(super) fn promote(&mut self, record: Record) -> Result<(), Error> {
        let prepared = match self.prepared {
            Some(_) => Ok(()),
            None => self.prepare(matches!(record.state, State::Ft { .. })),
        };
        let promoted = prepared.and_then(|()| self.try_promote(record));
        match promoted {
            Ok(()) => self.step(Event::Running),
            Err(why) => {
                self.events.note(format!("promotion failed: {why}"));
                self.step(Event::PromotionFailed)
            }
        }
    }

    fn try_promote(&mut self, record: Record) -> Result<(), String> {
        self.prepared
            .take()
            .ok_or("no committed epoch could be restored")?;
        let shadowing = self.shadowing.as_ref().ok_or("no session")?;
        shadowing
            .replica
            .promote(record.generation)
            .map_err(|e| e.to_string())?;
        self.promotion.reached(Step::Durable);
        self.parts.taps.open().map_err(|e| e.to_string())?;
        // From the first instruction on: a disk that fails then keeps its request until more is known.
        self.parts.faults.stand(Standing::Mirrored);
        let started = self.parts.machine.lock().start();
        self.promotion.reached(Step::Started);
        started.map_err(|e| e.to_string())
    }

    /// Outputs pass, after a promotion or without one.
    pub(super) fn release_alone(&mut self, record: Record) {
        let Some(grant) = SoloGrant::of(&record, self.me) else {
            return tracing::error!(%record, "this record does not let this process run alone");
        };
        match self.shadowing.take() {
            None => {
                self.parts.barrier.pass(grant);
                // The MAC may have been seen behind another port before, and a server doesn't speak first.
                self.parts.taps.announce();
                self.keep_announcing();
            }
            Some(shadowing) => {
                self.release_promoted(grant.into(), &shadowing);
                shadowing.leave(false);
            }
        }
    }

    /// The first outputs after a promotion: announcements, then what committed epochs had not released
    /// (rule 6), then the frames the guest has not seen (rule 7). After a planned failover the outputs wait
    /// for the old primary's word ([`Self::may_show`]).
    pub(super) fn release_promoted(&mut self, grant: Grant, shadowing: &Shadowing) {
        let committed = self.last_epoch;
        if matches!(grant, Grant::Solo(_)) {
            self.parts.taps.announce();
        }
        shadowing
            .engine
            .with_outputs(|outputs| self.parts.barrier.promote(grant, outputs, committed));
        let handle = &self.parts.handle;
        shadowing.engine.drain_received(|nic, packet| {
            crate::parts::give(handle, nic, packet);
        });
        self.board.follows(None);
        let (noticed, now) = (self.lost_at.take(), Instant::now());
        let took = |at: Instant| now.saturating_duration_since(at).as_micros() as u64;
        let parts = |at| self.promotion.parts(at, now);
        self.events.tell(What::Promoted {
            epoch: committed.0,
            took_us: noticed.map_or(0, took),
            parts_us: noticed.map(parts).unwrap_or_default(),
        });
        // A power output may have left the old primary, which died before it did what it says.
        self.act_on_power();
        self.keep_announcing();
        if let Err(error) = self.parts.receive() {
            tracing::error!(%error, "frames can't be received");
        }
    }

    /// Does what the guest's power state asks for, if it does.
    pub(super) fn act_on_power(&self) {
        let power = self.parts.machine.lock().power();
        if let Some(what) = power {
            let what = match what {
                vmm::ports::Power::Off => io_barrier::Power::Off,
                vmm::ports::Power::Reset => io_barrier::Power::Reset,
                vmm::ports::Power::Crash => io_barrier::Power::Crash,
            };
            let _ = self.sender.send(Input::Power(what));
        }
    }

    /// The old primary has heard that the guest runs here, and is its shadow from then on: what was true
    /// when this side said so permits outputs as an acknowledgement does (rule 24).
    pub(super) fn may_show(&self) {
        let (Some(stamp), Some(Phase::Ft { .. })) = (self.turned_ns, self.phase()) else {
            return;
        };
        let (barrier, taps) = (&self.parts.barrier, &self.parts.taps);
        barrier.permit(stamp);
        if barrier.if_permitted(|| taps.announce()) {
            // What is too late leaves with the first acknowledgement.
            let _ = barrier.release(self.last_epoch, stamp);
        }
    }

    /// Announcements may be lost: they are repeated for a few seconds, each only while an output might
    /// leave (I3): a host that stood still may have been taken over from.
    fn keep_announcing(&self) {
        let taps = Arc::clone(&self.parts.taps);
        let barrier = Arc::clone(&self.parts.barrier);
        let again = move || {
            for pause in [1, 2, 4, 8, 15, 30, 60, 120, 250, 500, 1000, 2000] {
                std::thread::sleep(Duration::from_millis(pause));
                // Permissions are as far apart as epochs: up to 50 ms while nothing happens.
                for _ in 0..100 {
                    if barrier.gate() == Gate::Frozen {
                        return;
                    }
                    if barrier.if_permitted(|| taps.announce()) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("announce".into())
            .spawn(again)
        {
            tracing::warn!(%error, "announcements are not repeated");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_promotion_make_up_the_whole_of_it() {
        let noticed = Instant::now();
        let at = |ms| Some(noticed + Duration::from_millis(ms));
        let before = noticed.checked_sub(Duration::from_secs(1));
        let steps = Steps([at(2), at(3), at(6), None, before, at(10)]);
        let parts = steps.parts(noticed, noticed + Duration::from_millis(11));
        let expected = PromotionParts {
            apply: 2000,
            restore: 1000,
            permission: 3000,
            grant: 0,
            disks: 0,
            start: 4000,
            release: 1000,
        };
        assert_eq!(parts, expected);
    }
}
