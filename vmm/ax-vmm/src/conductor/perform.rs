//! The state machine's actions, performed.

use std::time::{Duration, Instant};

use ax_api::process::{Reply, What};
use ax_link::heartbeat::boottime_ns;
use ax_wire::record::{Record, State};
use io_barrier::FtGrant;
use statepoint::pair::{Action, Ending, Event};

use super::promotion::Step;
use super::{Conductor, DRIFT_MARGIN, Ended};
use crate::error::Error;
use crate::faults::Standing;
use crate::guest::Part;
use crate::protect::Parked;

impl Conductor {
    pub(super) fn perform(&mut self, action: Action) -> Result<(), Error> {
        match action {
            Action::Ask(from, change) => {
                self.promotion.reached(Step::Asked);
                if let Some(asker) = &self.asker {
                    asker.ask(from, change);
                }
                // Rule 24: the old permission is over. A bridge forwards for a tap a moment after it
                // has been opened; that moment passes while the arbiter is asked. Nothing is sent.
                if self.shadowing.is_some()
                    && let Err(error) = self.parts.taps.open()
                {
                    tracing::warn!(%error, "before the grant");
                }
            }
            Action::FreezeOutputs => self.parts.barrier.freeze(),
            Action::HoldOutputs => {
                match self.part() {
                    Part::Whole => self.parts.barrier.start_holding(),
                    Part::Disks => {
                        let lease = Duration::from_millis(self.spec.timing.lease_ms);
                        let lease = lease.as_nanos() as u64;
                        self.parts.barrier.start_leasing(lease)
                    }
                };
            }
            Action::ReleaseAlone(record) => self.release_alone(record),
            Action::ReleaseAcked(record) => match FtGrant::of(&record, self.me) {
                Some(grant) => match &self.protection {
                    Some(protection) => {
                        if self.part() == Part::Whole {
                            self.parts.barrier.protect(grant);
                        }
                        protection.granted(record.generation);
                    }
                    None => self.release_turned(grant),
                },
                None => tracing::error!(%record, "this record does not protect this process"),
            },
            Action::FreezeAcks => {
                if let Some(shadowing) = &self.shadowing {
                    shadowing.engine.freeze_acks();
                }
            }
            Action::AwaitPermissionOver => {
                self.permission_over = Some(Instant::now() + self.permission_left());
                // Before anyone is asked: a record that names this side must never be ahead of what
                // this side holds (I4).
                if let Err(why) = self.prepare(false) {
                    self.permission_over = None;
                    self.events
                        .note(format!("this side can't take over: {why}"));
                    return self.step(Event::PromotionFailed);
                }
            }
            Action::Boot(record) => self.start_guest(Some(record))?,
            Action::Joined(record) => self.joined(&record)?,
            Action::StayLocal(refusal) => self.stay_local(&refusal),
            Action::Promote(record) => return self.promote(record),
            Action::DropShadow => {
                if std::mem::take(&mut self.dismissing) {
                    self.dismiss_shadow();
                }
                // Every record that drops a shadow lets this process run the guest.
                match self.protection.take() {
                    Some(protection) => protection.end(&self.parts, false, Parked::GoesOn),
                    None => self.stop_turning(),
                }
                self.parts.log.release_flushes();
            }
            Action::ParkForGood => return self.park_for_good(),
            Action::Unpark => self.unpark(),
            Action::TellShadow(record) => {
                if let Some(protection) = &self.protection {
                    match record.state {
                        State::Stopped { .. } => protection.tell_stopped(record),
                        _ => protection.tell_to_run(record),
                    }
                }
            }
            Action::BecomeShadow(record) => return self.become_shadow(&record),
            Action::EndClean(_) => {
                self.parts.images.iter().for_each(|image| image.close());
                let why = self.why_stopping.take();
                let mut why = why.unwrap_or_else(|| "stopped in order".into());
                let clean = self.not_durable.is_none();
                if let Some(disk) = self.not_durable.take() {
                    why = self.not_durable_here(&why, &disk);
                }
                self.events.tell(What::Ended { why, clean });
                self.ended = Some(Ended::InOrder);
            }
            Action::EndFenced(ending) => {
                let why = match ending {
                    Ending::Resigned => {
                        self.resigned();
                        return Ok(());
                    }
                    Ending::Superseded => "the other side runs the VM by the arbiter's record",
                    Ending::Stale => "this copy was not in sync when its primary was lost",
                    Ending::Dismissed => "the VM needs no shadow any more, by an operator's order",
                    Ending::MayNotStart => "the arbiter does not allow this side to start the VM",
                };
                self.events.tell(What::Ended {
                    why: why.into(),
                    clean: false,
                });
                if ending == Ending::MayNotStart {
                    let held = self.waits_for.take().unwrap_or_else(|| why.into());
                    return Err(Error::Arbiter(held));
                }
                self.ended = Some(Ended::Fenced);
            }
        }
        Ok(())
    }

    /// How long after this side's last acknowledgement the other one may still show outputs, with what two
    /// clocks may drift apart in that time (rules 24, 28).
    pub(super) fn permission(&self) -> Duration {
        match self.part() {
            Part::Whole => Duration::from_millis(self.spec.timing.permission_ms) + DRIFT_MARGIN,
            Part::Disks => {
                let lease = Duration::from_millis(self.spec.timing.lease_ms);
                lease + lease / 50 + DRIFT_MARGIN
            }
        }
    }

    /// How much of that time to wait for. Acknowledgements must have been frozen.
    ///
    /// Where the peer may live and ask as well, all of it: a cut cable favours the side that need not roll back
    /// (rule 21). So it is where this side has acknowledged nothing: it may have given its word after a
    /// planned failover (rule 25). A peer that has died asks nobody: what is left since the last acknowledgement.
    fn permission_left(&self) -> Duration {
        let permitted = self.shadowing.as_ref().map(|s| s.engine.permitted_ns());
        let since = match permitted {
            Some(at) if self.peer_died && at > 0 => boottime_ns().saturating_sub(at),
            _ => 0,
        };
        self.permission()
            .saturating_sub(Duration::from_nanos(since))
    }

    /// Lets the guest run from boot. The record that allows it is durable beside the images first.
    pub(super) fn start_guest(&mut self, record: Option<Record>) -> Result<(), Error> {
        if let Some(record) = record {
            for image in self.parts.images.iter().filter(|i| !i.read_only()) {
                image
                    .meta()
                    .lock()
                    .set_generation(record.generation)
                    .map_err(ax_disk::OpenError::from)?;
            }
        }
        self.parts.faults.stand(Standing::Alone);
        self.parts.machine.lock().start()?;
        self.parts.receive()
    }

    fn park_for_good(&mut self) -> Result<(), Error> {
        self.leaving = true;
        match &self.protection {
            Some(protection) => {
                if self.part() == Part::Disks {
                    // Its epochs park nobody.
                    self.parts.machine.park(true)?;
                }
                protection.engine.request_final_epoch();
                Ok(())
            }
            None => {
                self.parts.machine.park(true)?;
                self.final_epoch(self.last_epoch)
            }
        }
    }

    fn unpark(&mut self) {
        if let Some(protection) = &self.protection {
            protection.unpark();
        }
        if self.parts.machine.is_parked()
            && let Err(error) = self.parts.machine.park(false)
        {
            tracing::error!(%error, "the guest could not go on");
        }
        self.not_durable = None;
        if std::mem::take(&mut self.leaving) {
            self.act_on_power();
        }
        let why = "the other side was lost on the way; the VM runs on here".into();
        self.answer(&Reply::Refused { why });
    }
}
