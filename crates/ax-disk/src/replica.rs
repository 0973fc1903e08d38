//! The shadow's disks: writes held by epoch, applied in the guest's order after commit.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, OnceLock};

use ax_sync::thread::{self, JoinHandle};
use ax_sync::{Condvar, Mutex};
use ax_wire::resync::Ask;
use ax_wire::{EpochId, Generation};

use crate::apply::{Chore, apply, each};
use crate::image::Image;
use crate::map::Rotation;
use crate::sums;

pub use crate::apply::ApplyError;

struct Work {
    queue: VecDeque<(EpochId, Vec<u8>)>,
    /// Bytes of records in the queue.
    bytes: usize,
    spare: Vec<Vec<u8>>,
    applied: EpochId,
    durable: EpochId,
    busy: bool,
    failed: Option<Arc<ApplyError>>,
    ending: bool,
    /// What the settling thread is to do.
    chores: VecDeque<Chore>,
}

/// Chores that may wait: a primary has one rotation at a time.
const CHORES: usize = 4;

struct Shared {
    disks: Vec<Arc<Image>>,
    work: Mutex<Work>,
    changed: Condvar,
    /// Epochs that may wait to be applied, whatever they hold, before [`Replica::committed`] blocks.
    backlog: usize,
    /// Told of an epoch whose FLUSH the primary waits for.
    on_durable: OnceLock<Box<dyn Fn(EpochId) + Send + Sync>>,
}

/// More epochs than [`Replica::new`]'s may wait as long as their records have less than so many bytes ...
const SMALL: usize = 4 << 20;

/// ... and so many of them at most. A primary has its guest's writes wait before it comes to that
/// ([`crate::WriteLog::admit`]).
const MOST: usize = 16;

/// All disks of one VM on the shadow's side.
pub struct Replica {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replica({} disks)", self.shared.disks.len())
    }
}

impl Shared {
    fn is_full(&self, work: &Work) -> bool {
        let epochs = work.queue.len();
        epochs >= self.backlog && (epochs >= MOST || work.bytes >= SMALL)
    }
}

fn run(shared: &Shared) {
    let mut work = shared.work.lock();
    loop {
        let Some((epoch, records)) = work.queue.pop_front() else {
            if work.ending {
                return;
            }
            shared.changed.wait(&mut work);
            continue;
        };
        work.busy = true;
        work.bytes = work.bytes.saturating_sub(records.len());
        drop(work);
        let result = apply(&shared.disks, Some(epoch), &records);
        work = shared.work.lock();
        work.busy = false;
        match result {
            Ok(applied) => {
                work.applied = epoch;
                if applied.durable {
                    work.durable = work.durable.max(epoch);
                }
                // What a backlog has grown to is not kept.
                if work.spare.len() <= shared.backlog {
                    work.spare.push(records);
                }
                let room = CHORES.saturating_sub(work.chores.len());
                work.chores.extend(applied.chores.into_iter().take(room));
                if let (true, Some(tell)) = (applied.awaited, shared.on_durable.get()) {
                    drop(work);
                    tell(epoch);
                    work = shared.work.lock();
                }
            }
            Err(error) => {
                tracing::error!(%error, "applying an epoch's disk writes");
                work.fail(error);
                shared.changed.notify_all();
                return;
            }
        }
        shared.changed.notify_all();
    }
}

impl Work {
    fn fail(&mut self, error: ApplyError) {
        self.failed = Some(Arc::new(error));
        self.queue.clear();
        self.bytes = 0;
    }
}

/// The settling thread: what rotating the maps takes besides applying, which must not wait for it.
fn settle(shared: &Shared) {
    let mut begun: Option<(EpochId, Vec<Rotation>)> = None;
    let mut work = shared.work.lock();
    while !work.ending && work.failed.is_none() {
        let Some(chore) = work.chores.pop_front() else {
            shared.changed.wait(&mut work);
            continue;
        };
        drop(work);
        let done = match chore {
            Chore::Settle(epoch, rotations) => {
                begun = Some((epoch, rotations));
                each(&shared.disks, Image::flush_apart).map(|()| Some(epoch))
            }
            Chore::Drop(epoch, basis) => match begun.take() {
                Some((began, rotations)) if began == epoch => {
                    let mut pairs = shared.disks.iter().zip(rotations);
                    let writable = |disk: &Image| !disk.read_only();
                    pairs
                        .try_for_each(|(disk, rotation)| match writable(disk) {
                            true => disk.end_rotation(rotation, basis).map(drop),
                            false => Ok(()),
                        })
                        .map(|()| None)
                        .map_err(ApplyError::from)
                }
                _ => Ok(None),
            },
        };
        work = shared.work.lock();
        match done {
            Ok(None) => {}
            Ok(Some(epoch)) => {
                work.durable = work.durable.max(epoch);
                if let Some(tell) = shared.on_durable.get() {
                    drop(work);
                    tell(epoch);
                    work = shared.work.lock();
                }
            }
            Err(error) => {
                tracing::error!(%error, "making an epoch's disk writes durable");
                work.fail(error);
                shared.changed.notify_all();
            }
        }
    }
}

impl Replica {
    /// Takes over the images; `backlog` committed epochs, and more as long as they are small, wait to be
    /// applied.
    ///
    /// # Errors
    /// [`ApplyError::Thread`].
    pub fn new(disks: Vec<Arc<Image>>, backlog: usize) -> Result<Replica, ApplyError> {
        let work = Work {
            queue: VecDeque::with_capacity(backlog.max(MOST)),
            bytes: 0,
            spare: Vec::new(),
            applied: EpochId(0),
            durable: EpochId(0),
            busy: false,
            failed: None,
            ending: false,
            chores: VecDeque::with_capacity(CHORES),
        };
        let shared = Arc::new(Shared {
            disks,
            work: Mutex::new(work),
            changed: Condvar::new(),
            backlog,
            on_durable: OnceLock::new(),
        });
        let mut replica = Replica {
            shared: Arc::clone(&shared),
            threads: Vec::with_capacity(2),
        };
        let applying = ("disk-replica", run as fn(&Shared));
        let settling = ("disk-settle", settle as fn(&Shared));
        for (name, work) in [applying, settling] {
            let shared = Arc::clone(&shared);
            let thread = thread::spawn(name, move || work(&shared)).map_err(ApplyError::Thread)?;
            replica.threads.push(thread);
        }
        Ok(replica)
    }

    /// Sets who is told, by their own threads, of each durable epoch with a FLUSH that the primary waits
    /// for or a beginning rotation of the maps. Set once.
    pub fn on_durable(&self, tell: impl Fn(EpochId) + Send + Sync + 'static) {
        let _ = self.shared.on_durable.set(Box::new(tell));
    }

    /// Starts a resync: every image is durably inconsistent until [`Self::mark_in_sync`].
    ///
    /// # Errors
    /// An image failed.
    pub fn begin_sync(&self) -> Result<(), ApplyError> {
        self.each(Image::begin_copy)
    }

    /// Answers what the primary asks to find the blocks that differ; `out` is replaced by the payload.
    /// False, with nothing in it, when it asks for what these disks do not have.
    ///
    /// # Errors
    /// An image could not be read.
    pub fn answer(&self, ask: &Ask, out: &mut Vec<u8>) -> Result<bool, ApplyError> {
        sums::answer(&self.shared.disks, ask, out).map_err(|source| ApplyError::Image {
            path: "(for a resync)".into(),
            source,
        })
    }

    /// Applies bulk records of the initial sync at once (before the first epoch).
    ///
    /// # Errors
    /// A record is not one of this VM's disks, or an image failed.
    pub fn bulk(&self, records: &[u8]) -> Result<(), ApplyError> {
        apply(&self.shared.disks, None, records).map(drop)
    }

    /// The first epoch is whole and every image with it: makes that durable.
    ///
    /// # Errors
    /// An image failed; it stays inconsistent.
    pub fn mark_in_sync(&self, generation: Generation) -> Result<(), ApplyError> {
        self.drain()?;
        self.each(|disk| disk.make_durable(generation))
    }

    /// Queues a committed epoch's records; they are swapped with an empty buffer. Blocks while the
    /// backlog is full, so that a slow disk slows the primary and promotion stays short.
    ///
    /// # Errors
    /// An earlier epoch could not be applied: this shadow must not be promoted (I4).
    pub fn committed(&self, epoch: EpochId, records: &mut Vec<u8>) -> Result<(), Arc<ApplyError>> {
        let mut work = self.shared.work.lock();
        if records.is_empty() {
            // Nothing to do is done once everything before it is.
            if work.queue.is_empty() && !work.busy {
                work.applied = work.applied.max(epoch);
            }
            return work.failed.clone().map_or(Ok(()), Err);
        }
        while self.shared.is_full(&work) && work.failed.is_none() {
            self.shared.changed.wait(&mut work);
        }
        if let Some(error) = &work.failed {
            return Err(Arc::clone(error));
        }
        work.bytes += records.len();
        let mut spare = work.spare.pop().unwrap_or_default();
        spare.clear();
        work.queue
            .push_back((epoch, std::mem::replace(records, spare)));
        self.shared.changed.notify_all();
        Ok(())
    }

    /// True once a disk has failed: this shadow must not be promoted (I4).
    pub fn has_failed(&self) -> bool {
        self.shared.work.lock().failed.is_some()
    }

    /// Last epoch whose writes are in the images, and last one that ended durable.
    pub fn progress(&self) -> (EpochId, EpochId) {
        let work = self.shared.work.lock();
        (work.applied, work.durable)
    }

    fn drain(&self) -> Result<(), ApplyError> {
        let mut work = self.shared.work.lock();
        while work.failed.is_none() && (work.busy || !work.queue.is_empty()) {
            self.shared.changed.wait(&mut work);
        }
        match &work.failed {
            None => Ok(()),
            Some(error) => Err(ApplyError::Image {
                path: "(an earlier epoch)".into(),
                source: io::Error::other(error.to_string()),
            }),
        }
    }

    fn each(&self, act: impl Fn(&Image) -> io::Result<()>) -> Result<(), ApplyError> {
        each(&self.shared.disks, act)
    }

    /// Applies every committed epoch and makes it durable. Must have returned before the arbiter is
    /// asked: a record that names this side must never be ahead of its disk (I4).
    ///
    /// # Errors
    /// An image failed; this shadow must not be promoted.
    pub fn settle(&self) -> Result<(), ApplyError> {
        self.drain()?;
        self.each(Image::flush_at_leisure)
    }

    /// Rule 18: [`Self::settle`], then durably writes the generation beside the images. Only after it
    /// has returned may the promoted guest show an output.
    ///
    /// # Errors
    /// An image failed; this shadow must not be promoted.
    pub fn promote(&self, generation: Generation) -> Result<(), ApplyError> {
        self.drain()?;
        self.each(|disk| disk.make_durable(generation))
    }

    /// The images, for whoever runs the guest now. The threads have ended.
    ///
    /// # Errors
    /// An epoch could not be applied.
    pub fn into_images(mut self) -> Result<Vec<Arc<Image>>, ApplyError> {
        self.drain()?;
        self.end();
        Ok(self.shared.disks.clone())
    }

    fn end(&mut self) {
        self.shared.work.lock().ending = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::{fresh, reopen};
    use crate::meta::Condition;
    use ax_wire::records::{FLUSH_AWAITED, Record, RecordKind, push};

    fn write(unit: u8, at: u64, byte: u8) -> Vec<u8> {
        let mut buf = Vec::with_capacity(4096);
        let payload = &[byte; 512];
        assert!(push(
            &mut buf,
            Record {
                kind: RecordKind::DiskWrite,
                unit,
                at,
                payload
            }
        ));
        assert!(push(
            &mut buf,
            Record {
                kind: RecordKind::DiskFlush,
                unit,
                at: 0,
                payload: &[]
            }
        ));
        buf
    }

    #[test]
    fn committed_epochs_apply_in_order_and_promotion_makes_them_durable() {
        let dir = tempfile::tempdir().unwrap();
        let replica = Replica::new(vec![Arc::new(fresh(dir.path(), "a"))], 2).unwrap();
        for epoch in 1..=50u64 {
            replica
                .committed(EpochId(epoch), &mut write(0, 512, epoch as u8))
                .unwrap();
        }
        replica.promote(Generation(7)).unwrap();
        assert_eq!(replica.progress(), (EpochId(50), EpochId(50)));
        replica.committed(EpochId(51), &mut Vec::new()).unwrap();
        assert_eq!(replica.progress().0, EpochId(51));
        drop(replica.into_images().unwrap());
        let image = reopen(dir.path(), "a").unwrap();
        let mut sector = [0; 512];
        image.read(512, &mut sector).unwrap();
        assert_eq!(sector, [50; 512]);
        assert_eq!(image.meta().lock().generation(), Generation(7));
    }

    #[test]
    fn an_epoch_with_an_awaited_flush_is_durable_and_told_whatever_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let disks = vec![
            Arc::new(fresh(dir.path(), "a")),
            Arc::new(fresh(dir.path(), "b")),
        ];
        let replica = Replica::new(disks, 2).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        replica.on_durable(move |epoch| tell.send(epoch).unwrap());
        let record = |kind, unit, at, payload: &'static [u8]| Record {
            kind,
            unit,
            at,
            payload,
        };
        // Nobody waits for this one.
        replica.committed(EpochId(1), &mut write(0, 0, 1)).unwrap();
        let mut records = Vec::with_capacity(4096);
        for next in [
            record(RecordKind::DiskWrite, 0, 512, &[2; 512]),
            record(RecordKind::DiskFlush, 0, FLUSH_AWAITED, &[]),
            record(RecordKind::DiskWrite, 1, 0, &[3; 512]),
        ] {
            assert!(push(&mut records, next));
        }
        replica.committed(EpochId(2), &mut records).unwrap();
        assert_eq!(told.recv().unwrap(), EpochId(2));
        assert_eq!(replica.progress(), (EpochId(2), EpochId(2)));
        assert!(told.try_recv().is_err());
    }

    /// Rule 2: an epoch waits for a slow disk only when much is waiting already.
    #[test]
    fn small_epochs_wait_for_a_slow_disk_and_nobody_waits_for_them_until_they_are_many() {
        let dir = tempfile::tempdir().unwrap();
        let image = Arc::new(fresh(dir.path(), "a"));
        let replica = Arc::new(Replica::new(vec![Arc::clone(&image)], 2).unwrap());
        let slow = image.order.lock();
        replica.committed(EpochId(1), &mut write(0, 0, 1)).unwrap();
        while !replica.shared.work.lock().busy {
            std::thread::yield_now();
        }
        let (tell, told) = std::sync::mpsc::channel();
        let committing = std::thread::spawn({
            let replica = Arc::clone(&replica);
            move || {
                for epoch in 2..=2 + MOST as u64 {
                    let mut records = write(0, 0, epoch as u8);
                    replica.committed(EpochId(epoch), &mut records).unwrap();
                    tell.send(epoch).unwrap();
                }
            }
        });
        for epoch in 2..2 + MOST as u64 {
            assert_eq!(told.recv(), Ok(epoch));
        }
        assert_eq!(replica.progress().0, EpochId(0));
        let more = told.recv_timeout(std::time::Duration::from_millis(100));
        assert!(more.is_err(), "more than may wait");
        drop(slow);
        assert_eq!(told.recv(), Ok(2 + MOST as u64));
        committing.join().unwrap();
        replica.settle().unwrap();
        let work = replica.shared.work.lock();
        assert_eq!((work.bytes, work.applied), (0, EpochId(2 + MOST as u64)));
    }

    #[test]
    fn a_full_sync_is_inconsistent_until_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let image = Arc::new(fresh(dir.path(), "a"));
        let replica = Replica::new(vec![Arc::clone(&image)], 2).unwrap();
        replica.begin_sync().unwrap();
        assert_eq!(image.meta().lock().condition(), Condition::Inconsistent);
        replica.bulk(&write(0, 0, 1)).unwrap();
        replica.mark_in_sync(Generation(3)).unwrap();
        assert_eq!(image.meta().lock().condition(), Condition::Consistent);
    }

    #[test]
    fn hostile_records_are_refused_and_stop_promotion() {
        let dir = tempfile::tempdir().unwrap();
        let replica = Replica::new(vec![Arc::new(fresh(dir.path(), "a"))], 2).unwrap();
        assert!(matches!(
            replica.bulk(&write(3, 0, 1)),
            Err(ApplyError::NotADisk { .. })
        ));
        assert!(matches!(
            replica.bulk(&[1, 0, 0]),
            Err(ApplyError::Record(_))
        ));
        assert!(matches!(
            replica.bulk(&write(0, 1 << 40, 1)),
            Err(ApplyError::Image { .. })
        ));
        replica
            .committed(EpochId(1), &mut write(0, 1 << 40, 1))
            .unwrap();
        assert!(replica.promote(Generation(2)).is_err());
        assert!(replica.committed(EpochId(2), &mut write(0, 0, 1)).is_err());
    }

    #[test]
    fn the_flush_of_one_disk_makes_no_epoch_durable_that_has_another() {
        let dir = tempfile::tempdir().unwrap();
        let disks = ["a", "b"].map(|name| Arc::new(fresh(dir.path(), name)));
        let replica = Replica::new(disks.to_vec(), 2).unwrap();
        let mut records = write(1, 0, 1);
        records.append(&mut write(0, 0, 1));
        replica.committed(EpochId(1), &mut records).unwrap();
        replica.drain().unwrap();
        assert_eq!(replica.progress(), (EpochId(1), EpochId(0)));
    }

    #[test]
    fn a_mark_of_the_maps_that_is_none_stops_promotion() {
        for (at, payload) in [(5, &[1; 15][..]), (5, &[]), (0, &[1; 3])] {
            let dir = tempfile::tempdir().unwrap();
            let replica = Replica::new(vec![Arc::new(fresh(dir.path(), "a"))], 2).unwrap();
            let mut records = Vec::with_capacity(64);
            let mark = Record {
                kind: RecordKind::DiskMark,
                unit: 0,
                at,
                payload,
            };
            assert!(push(&mut records, mark));
            let _ = replica.committed(EpochId(1), &mut records);
            assert!(replica.promote(Generation(2)).is_err(), "{at} {payload:?}");
        }
    }
}
