//! Disks of this host that fail (rule 19): the guest goes on from the other side's copy, or waits.
//!
//! With a shadow in sync the guest moves to it as in a planned failover, up to the final epoch and the
//! shadow's disks made durable; then this process ends, and the shadow finds itself without a primary and
//! takes over. Nothing has to be recorded here: what fails may be all that could record it. Without a
//! shadow in sync the request that failed is held or reported by [`crate::faults`], and this says so.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ax_api::process::{Reply, What};
use ax_disk::Condition;
use ax_wire::record::Record;
use statepoint::pair::{Event, Goal, Phase};

use super::{Conductor, Ended};
use crate::error::Error;
use crate::faults::{Failed, Standing, Trouble, Watch};

/// How long a disk that is about to be left may take to take down that it is.
const MARKING: Duration = Duration::from_millis(500);

/// How much longer than `stall_time` making the disks durable may take at a guest's end here.
const FLUSHING: u32 = 30;

/// The same failure is told again after this time at the earliest.
const TOLD_FOR: Duration = Duration::from_secs(60);

/// What has been told of disks that fail here.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The last failure, and when it was told.
    last: Option<(Trouble, Instant)>,
    /// It has not been mended since.
    fails: bool,
    /// The arbiter is being looked for, before the guest moves.
    probing: bool,
    /// Why it can't move, while that is so.
    refused: Option<String>,
    /// The last words of this process, for axd.
    end: Option<String>,
}

/// Does `act` in a thread of its own; none when it has not come back in time.
fn within<T: Send + 'static>(
    patience: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (tell, told) = mpsc::channel();
    let run = move || drop(tell.send(act()));
    let thread = std::thread::Builder::new().name("disk-end".into());
    thread.spawn(run).ok()?;
    told.recv_timeout(patience).ok()
}

/// The words axd takes for why this process ended.
fn last_words(why: &str) {
    let code = Ended::Fenced.code();
    eprintln!("{}", serde_json::json!({ "error": why, "code": code }));
}

impl Conductor {
    /// Begins to look after the disks here.
    pub(super) fn watch_disks(&self) -> Result<(), Error> {
        let (events, control) = (self.events.clone(), self.spec.control.clone());
        let faults = Arc::clone(&self.parts.faults);
        let end_shadow = move |why: String| {
            // The conductor may be waiting for that very disk.
            let why = format!("a disk of this host fails: {why}");
            events.tell(What::DiskFails { why: why.clone() });
            events.tell(What::Ended {
                why: why.clone(),
                clean: false,
            });
            std::thread::sleep(Duration::from_millis(50));
            if faults.standing() == Standing::Elsewhere {
                return; // its primary was lost meanwhile: there is no other copy
            }
            let _ = std::fs::remove_file(&control);
            last_words(&why);
            std::process::exit(Ended::Fenced.code().into());
        };
        let watch = Watch {
            images: self.parts.images.iter().map(Arc::downgrade).collect(),
            faults: Arc::clone(&self.parts.faults),
            stall: Duration::from_millis(self.spec.timing.stall_ms),
            end_shadow: Box::new(end_shadow),
        };
        watch.start().map_err(Error::Thread)
    }

    /// What this process is to the guest, as far as its disks are concerned.
    pub(super) fn standing(&self) -> Standing {
        match self.phase() {
            Some(Phase::Copying) => Standing::Copying,
            Some(Phase::InSync { .. }) => Standing::Follows,
            Some(
                Phase::Ended
                | Phase::Waiting { .. }
                | Phase::AskingTakeover { .. }
                | Phase::Promoting { .. },
            ) => Standing::Elsewhere,
            Some(
                Phase::Ft { .. }
                | Phase::AskingAlone { .. }
                | Phase::AskingHandover { .. }
                | Phase::HandedOver { .. },
            ) => Standing::Mirrored,
            Some(Phase::Parking { record, .. } | Phase::AskingStop { record, .. })
                if record.shadow().is_some() =>
            {
                Standing::Mirrored
            }
            _ => Standing::Alone,
        }
    }

    /// Tells what has changed about the disks, and has the guest go on elsewhere if it can and should.
    pub(super) fn look_at_disks(&mut self) -> Result<(), Error> {
        let Some(trouble) = self.parts.faults.trouble() else {
            self.disks.refused = None;
            if std::mem::take(&mut self.disks.fails) {
                self.board.disk_fails(None, false);
                if let Some((trouble, _)) = &self.disks.last {
                    let disk = trouble.disk.display().to_string();
                    self.events.tell(What::DiskWorks { disk });
                }
            }
            return Ok(());
        };
        let holds = self.parts.faults.holds();
        let shown = match &self.disks.refused {
            Some(no) => format!(
                "{}; the guest waits there for the arbiter ({no})",
                trouble.why
            ),
            None => trouble.why.clone(),
        };
        self.board.disk_fails(Some(shown), holds);
        let again = |(last, at): &(Trouble, Instant)| *last == trouble && at.elapsed() < TOLD_FOR;
        if !self.disks.last.as_ref().is_some_and(again) || !self.disks.fails {
            self.disks.fails = true;
            let why = trouble.why.clone();
            self.disks.last = Some((trouble, Instant::now()));
            self.events.tell(What::DiskFails { why });
        }
        self.move_away();
        Ok(())
    }

    /// True when the guest could be left to its shadow now.
    fn may_move(&self) -> bool {
        let free = !self.leaving && self.changing.is_none() && self.turning.is_none();
        free && matches!(self.phase(), Some(Phase::Ft { .. }))
            // An operator's pause does not go along.
            && !self.parts.machine.is_parked()
    }

    /// Looks for the arbiter: without it the guest would stand still until it is back.
    fn move_away(&mut self) {
        if self.disks.probing || !self.may_move() {
            return;
        }
        if let Some(asker) = &self.asker {
            asker.probe();
            self.disks.probing = true;
        }
    }

    /// The arbiter was looked for before the guest leaves a disk that fails; true if that was what it was
    /// for.
    pub(super) fn found_for_resigning(
        &mut self,
        found: &Result<Record, String>,
    ) -> Result<bool, Error> {
        if !std::mem::take(&mut self.disks.probing) {
            return Ok(false);
        }
        let fails = self.parts.faults.trouble().is_some();
        match (found, self.phase()) {
            (Ok(found), Some(Phase::Ft { record }))
                if found.agrees_with(record) && fails && self.may_move() =>
            {
                self.disks.refused = None;
                self.step(Event::Resign)?;
            }
            (Err(why), _) if self.disks.refused.as_ref() != Some(why) => {
                self.disks.refused = Some(why.clone());
                self.events.note(format!(
                    "the guest can't go on on the other host: the arbiter is out of reach ({why})"
                ));
            }
            _ => {}
        }
        Ok(true)
    }

    /// True while the guest is being left to its shadow because of the disks here.
    pub(super) fn resigns(&self) -> bool {
        let goal = match self.phase() {
            Some(Phase::Parking { goal, .. }) => *goal,
            _ => return false,
        };
        goal == Goal::Resign
    }

    /// Takes down, if that can still be done, that the disks here are not to be started from: what they
    /// have lost is not known. They have every FLUSH that was answered, so that it is no harm where it can't.
    pub(super) fn mark_as_failed(&self) {
        let images = self.parts.images.clone();
        let mark = move || {
            let writable = images.iter().filter(|image| !image.read_only());
            let mut failures = writable.filter_map(|image| {
                let mut meta = image.meta().lock();
                match meta.condition() {
                    Condition::Inconsistent => None,
                    Condition::Consistent => meta.mark_inconsistent().err(),
                }
            });
            failures.next().map(|error| error.to_string())
        };
        match within(MARKING, mark) {
            Some(None) => {}
            Some(Some(why)) => tracing::warn!(%why, "the disks are not marked as failed"),
            None => tracing::warn!("the disks are not marked as failed: no answer"),
        }
    }

    /// This process has left its guest to the shadow.
    pub(super) fn resigned(&mut self) {
        self.not_durable = None;
        let last = self.disks.last.take();
        let disk = last.map_or(String::new(), |(trouble, _)| trouble.why);
        let why =
            format!("a disk of this host failed, and the guest goes on on the other one: {disk}");
        self.events.tell(What::Ended {
            why: why.clone(),
            clean: false,
        });
        self.disks.end = Some(why);
        self.ended = Some(Ended::Fenced);
    }

    /// This shadow's copy can't be promoted any more: if it is for a disk, it is said, durably too.
    pub(super) fn spoiled_by_its_disk(&mut self, why: &str) {
        let failed = |s: &crate::shadowing::Shadowing| s.replica.has_failed();
        let broken = self.shadowing.as_ref().is_some_and(failed);
        if broken {
            self.mark_as_failed();
        }
        self.disks.end = Some(why.into());
        if broken {
            self.events.tell(What::DiskFails { why: why.into() });
        }
    }

    /// True when this process ends because of its disks: nothing more is expected of them.
    pub(super) fn ends_for_its_disks(&self) -> bool {
        self.disks.end.is_some()
    }

    /// What axd is to tell of this process's end, once nothing else is said.
    pub(super) fn last_words(&mut self) {
        if let Some(why) = self.disks.end.take() {
            last_words(&why);
        }
        let stall = Duration::from_millis(self.spec.timing.stall_ms);
        if self.parts.images.iter().any(|i| i.busy().any >= stall) {
            // Whoever waits for the thread that waits for that disk waits with it.
            let code = self.ended.map_or(0, Ended::code);
            std::process::exit(code.into());
        }
    }

    /// Makes the disks here durable, if that can be done in a time.
    pub(super) fn flush_in_time(&self) -> Result<(), String> {
        let trouble = self.parts.faults.trouble();
        let hopeless = |t: &Trouble| !matches!(t.failed, Failed::Read | Failed::Write);
        if let Some(trouble) = trouble.filter(hopeless) {
            return Err(trouble.why);
        }
        let images = self.parts.images.clone();
        let flush = move || {
            let mut writable = images.iter().filter(|image| !image.read_only());
            writable.try_for_each(|image| {
                let path = image.path().display();
                image.flush().map_err(|error| format!("{path}: {error}"))
            })
        };
        let patience = Duration::from_millis(self.spec.timing.stall_ms) * FLUSHING;
        let late = || Err("no answer from the disk".to_owned());
        within(patience, flush).unwrap_or_else(late)
    }

    /// Says of a stop that the disks of the stopping side are not durable; whoever asked for it is told.
    pub(super) fn not_durable_here(&mut self, why: &str, disk: &str) -> String {
        let why = format!("{why}, but the disks of this host could not be made durable: {disk}");
        self.answer(&Reply::Refused { why: why.clone() });
        why
    }
}
