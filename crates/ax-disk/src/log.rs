//! The primary's log of disk writes: what the open epoch carries of disks.

use std::collections::VecDeque;

use ax_sync::{Condvar, Mutex};
use ax_wire::EpochId;
use ax_wire::records::{FLUSH_AWAITED, Record, RecordKind, push, record_size};

/// A FLUSH that waits for the shadow.
struct Awaited {
    ticket: u64,
    /// The epoch that carries it, once sealed. 0 when the initial copy does: the shadow is not in sync
    /// before that is durable.
    epoch: Option<EpochId>,
}

struct Inner {
    /// Records of the open epoch. Never grows beyond its capacity.
    open: Vec<u8>,
    /// Bytes promised to admitted writes that have not completed yet.
    reserved: usize,
    /// Bytes that may be used in all; at most the capacity.
    budget: usize,
    recording: bool,
    /// FLUSHes of disks kept in sync wait for the shadow.
    mirrored: bool,
    awaited: Vec<Awaited>,
    tickets: u64,
    /// Last epoch durable on the shadow's disks.
    durable: EpochId,
    /// Epochs with records that are not known to be in the shadow's images yet, with their bytes; the oldest
    /// first.
    behind: VecDeque<(EpochId, usize)>,
    /// The rotation of the maps that waits for the shadow: the epoch that carries its mark, once sealed.
    mark: Option<Option<EpochId>>,
    /// Counts the starts of recording, so that a mark of an earlier one is not waited for.
    stint: u64,
}

impl Inner {
    /// Whether a FLUSH must still wait.
    fn waits(&self, ticket: u64) -> bool {
        let found = self.awaited.iter().find(|a| a.ticket == ticket);
        self.mirrored && found.is_some_and(|a| a.epoch.is_none_or(|epoch| epoch > self.durable))
    }

    /// The open epoch's records go with `epoch`.
    fn sealed(&mut self, epoch: EpochId) {
        if epoch != EpochId(0) && !self.open.is_empty() && self.behind.len() < TRACKED {
            self.behind.push_back((epoch, self.open.len()));
        }
        for awaited in &mut self.awaited {
            awaited.epoch.get_or_insert(epoch);
        }
        if let Some(mark) = &mut self.mark {
            mark.get_or_insert(epoch);
        }
    }

    fn fits(&self, bytes: usize) -> bool {
        self.open.len() + self.reserved + bytes <= self.budget
    }

    /// The shadow's disks are too far behind for the guest to write more.
    fn is_far_behind(&self) -> bool {
        let bytes = self.behind.iter().map(|(_, bytes)| bytes).sum::<usize>();
        self.behind.len() >= BEHIND || bytes >= self.budget
    }
}

/// Epochs whose disk writes the shadow may have to apply yet before the guest's next write waits. More than
/// are on their way to a disk that keeps up; few enough that a promotion, which applies them, is short
/// (rule 18).
const BEHIND: usize = 6;

/// So many are kept count of: FLUSHes and marks of the maps are recorded without being admitted. Far from it
/// the shadow holds up the epochs themselves.
const TRACKED: usize = 64;

/// How long a rotation of the maps waits before it looks whether it should still.
const MARK_PATIENCE: std::time::Duration = std::time::Duration::from_millis(100);

/// Collects the write payloads of all disks of one VM, in the order of their completion.
///
/// Invariant: what is recorded plus what is promised fits the buffer, so that a completion can
/// always be recorded without blocking or allocating.
pub struct WriteLog {
    inner: Mutex<Inner>,
    room: Condvar,
    /// Called when a write has to wait for room: the epoch should end now.
    pressed: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.inner.lock();
        write!(
            f,
            "WriteLog({} bytes, {} reserved)",
            inner.open.len(),
            inner.reserved
        )
    }
}

impl WriteLog {
    /// A log of at most `budget` bytes an epoch that calls `pressed` when a write must wait.
    pub fn new(budget: usize, pressed: impl Fn() + Send + Sync + 'static) -> WriteLog {
        WriteLog {
            inner: Mutex::new(Inner {
                open: Vec::with_capacity(budget),
                reserved: 0,
                budget,
                recording: false,
                mirrored: false,
                awaited: Vec::new(),
                tickets: 0,
                durable: EpochId(0),
                behind: VecDeque::with_capacity(TRACKED),
                mark: None,
                stint: 0,
            }),
            room: Condvar::new(),
            pressed: Box::new(pressed),
        }
    }

    /// Starts or stops recording. Stopping drops what is recorded and lets waiting writes go on.
    ///
    /// From the start on FLUSHes of disks kept in sync wait for the shadow, until
    /// [`Self::release_flushes`]: a shadow that is lost is still named in the record.
    pub fn record(&self, on: bool) {
        let mut inner = self.inner.lock();
        inner.recording = on;
        inner.mirrored |= on;
        inner.open.clear();
        inner.behind.clear();
        (inner.mark, inner.stint) = (None, inner.stint + 1);
        self.room.notify_all();
    }

    /// Waits until `len` bytes of payload may be recorded and promises them (back-pressure): what the open
    /// epoch has room for, and not while the shadow's disks are far behind (rule 2). Only the guest's
    /// writes wait for those; its memory and its network go on.
    /// Every admission is followed by exactly one [`Self::completed`] or [`Self::abandoned`].
    ///
    /// False, without a promise, for a payload that could never fit.
    #[must_use]
    pub fn admit(&self, len: usize) -> bool {
        let bytes = record_size(len);
        let mut inner = self.inner.lock();
        if bytes > inner.budget {
            return false;
        }
        loop {
            if inner.is_far_behind() {
                self.room.wait(&mut inner);
            } else if !inner.fits(bytes) {
                (self.pressed)();
                self.room
                    .wait_for(&mut inner, std::time::Duration::from_millis(20));
            } else {
                break;
            }
        }
        inner.reserved += bytes;
        true
    }

    /// An admitted write failed and changes nothing.
    pub fn abandoned(&self, len: usize) {
        let mut inner = self.inner.lock();
        inner.reserved = inner.reserved.saturating_sub(record_size(len));
        self.room.notify_all();
    }

    /// An admitted write of disk `unit` at byte `at` becomes visible to the guest (rule 13).
    pub fn completed(&self, unit: u8, at: u64, data: &[u8]) {
        let mut inner = self.inner.lock();
        inner.reserved = inner.reserved.saturating_sub(record_size(data.len()));
        if inner.recording {
            let record = Record {
                kind: RecordKind::DiskWrite,
                unit,
                at,
                payload: data,
            };
            if !push(&mut inner.open, record) {
                tracing::error!(unit, at, len = data.len(), "disk write was not admitted");
            }
        }
    }

    /// A FLUSH of disk `unit` becomes visible to the guest: earlier writes before later ones.
    /// Two in a row are one.
    pub fn flushed(&self, unit: u8) {
        let mut inner = self.inner.lock();
        if inner.recording && inner.fits(record_size(0)) {
            let record = Record {
                kind: RecordKind::DiskFlush,
                unit,
                at: 0,
                payload: &[],
            };
            // A barrier that finds no room is implied: the end of an epoch is one as well.
            let _ = push(&mut inner.open, record);
        }
    }

    /// A FLUSH of a disk kept in sync, durable here already: waits until the shadow has made durable
    /// every write of this disk that completed before (rule 15). Its record goes with the open epoch,
    /// which ends soon; its completion belongs to a later one. Returns at once while no shadow is
    /// protected by.
    ///
    /// To be called outside every lock an epoch's capture takes: the epoch it waits for is to come.
    pub fn flush_on_shadow(&self, unit: u8) {
        if !self.admit(0) {
            return; // no log can be too small for it
        }
        let mut inner = self.inner.lock();
        inner.reserved = inner.reserved.saturating_sub(record_size(0));
        if !inner.mirrored {
            return;
        }
        if inner.recording {
            let record = Record {
                kind: RecordKind::DiskFlush,
                unit,
                at: FLUSH_AWAITED,
                payload: &[],
            };
            if !push(&mut inner.open, record) {
                tracing::error!(unit, "disk flush was not admitted");
            }
        }
        inner.tickets += 1;
        let ticket = inner.tickets;
        inner.awaited.push(Awaited {
            ticket,
            epoch: None,
        });
        drop(inner);
        (self.pressed)();
        let mut inner = self.inner.lock();
        while inner.waits(ticket) {
            self.room.wait(&mut inner);
        }
        inner.awaited.retain(|a| a.ticket != ticket);
    }

    /// The shadow's images have the writes of all epochs up to `epoch`: writes that waited for that go on.
    pub fn applied_on_shadow(&self, epoch: EpochId) {
        let mut inner = self.inner.lock();
        let was = inner.is_far_behind();
        while inner.behind.front().is_some_and(|(at, _)| *at <= epoch) {
            inner.behind.pop_front();
        }
        if was && !inner.is_far_behind() {
            self.room.notify_all();
        }
    }

    /// The shadow's disks are durable up to `epoch`: FLUSHes that waited for it complete.
    pub fn durable_on_shadow(&self, epoch: EpochId) {
        let mut inner = self.inner.lock();
        inner.durable = inner.durable.max(epoch);
        if !inner.awaited.is_empty() || inner.mark.is_some() {
            self.room.notify_all();
        }
    }

    /// Puts the mark of a beginning rotation of the maps in the log and waits until the shadow has made
    /// durable whatever was recorded before it: the epoch that carries it. None when recording has
    /// stopped, `go_on` says no, or the mark goes with an initial copy, which ends durable anyway but
    /// has no epoch. Never waits in a way that a guest write notices.
    pub(crate) fn mark_and_wait(&self, go_on: impl Fn() -> bool) -> Option<EpochId> {
        let mut inner = self.inner.lock();
        let stint = inner.stint;
        let on = |inner: &Inner| inner.recording && inner.stint == stint && go_on();
        let begins = Record {
            kind: RecordKind::DiskMark,
            unit: 0,
            at: 0,
            payload: &[],
        };
        while on(&inner) {
            if inner.fits(record_size(0)) && push(&mut inner.open, begins) {
                inner.mark = Some(None);
                break;
            }
            self.room.wait_for(&mut inner, MARK_PATIENCE);
        }
        while on(&inner) {
            match inner.mark? {
                Some(EpochId(0)) => break,
                Some(epoch) if epoch <= inner.durable => {
                    inner.mark = None;
                    return Some(epoch);
                }
                _ => self.room.wait_for(&mut inner, MARK_PATIENCE),
            };
        }
        if inner.stint == stint {
            inner.mark = None;
        }
        None
    }

    /// Puts the end of the rotation that began in `epoch` in the log: from now on the maps are relative
    /// to `basis`. Not worth waiting for room: false then, and the shadow keeps its bits.
    pub(crate) fn mark_end(&self, epoch: EpochId, basis: [u8; 16]) -> bool {
        let mut inner = self.inner.lock();
        let ends = Record {
            kind: RecordKind::DiskMark,
            unit: 0,
            at: epoch.0,
            payload: &basis,
        };
        let room = inner.recording && inner.fits(record_size(basis.len()));
        room && push(&mut inner.open, ends)
    }

    /// No FLUSH waits for a shadow any more, until recording starts again. Only when the arbiter's
    /// record lets this process run the guest alone, or the guest does not run here any more.
    pub fn release_flushes(&self) {
        self.inner.lock().mirrored = false;
        self.room.notify_all();
    }

    /// Puts a piece of the image itself in the log if it fits now; false if it does not.
    #[must_use]
    pub(crate) fn bulk(&self, unit: u8, at: u64, data: &[u8]) -> bool {
        let mut inner = self.inner.lock();
        inner.fits(record_size(data.len()))
            && push(
                &mut inner.open,
                Record {
                    kind: RecordKind::DiskWrite,
                    unit,
                    at,
                    payload: data,
                },
            )
    }

    /// As [`Self::bulk`], `len` zeros.
    #[must_use]
    pub(crate) fn bulk_zeros(&self, unit: u8, at: u64, len: u64) -> bool {
        let mut inner = self.inner.lock();
        inner.fits(record_size(size_of::<u64>()))
            && push(
                &mut inner.open,
                Record {
                    kind: RecordKind::DiskZero,
                    unit,
                    at,
                    payload: &len.to_le_bytes(),
                },
            )
    }

    /// Bytes in the open epoch.
    pub fn len(&self) -> usize {
        self.inner.lock().open.len()
    }

    /// True when the open epoch has no disk records.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends the records that go with the initial copy: swaps them with `out`, which is emptied first
    /// and must have the log's capacity (kept by swapping the same buffers round).
    pub fn seal(&self, out: &mut Vec<u8>) {
        self.seal_epoch(EpochId(0), out);
    }

    /// Ends the open epoch's records, as [`Self::seal`]: they go with `epoch`.
    pub fn seal_epoch(&self, epoch: EpochId, out: &mut Vec<u8>) {
        out.clear();
        let mut inner = self.inner.lock();
        inner.sealed(epoch);
        let budget = inner.budget;
        if out.capacity() < budget {
            out.reserve_exact(budget);
        }
        std::mem::swap(&mut inner.open, out);
        self.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_wire::records::Records;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn an_admitted_write_always_finds_room_and_order_is_kept() {
        let pressed = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&pressed);
        let log = Arc::new(WriteLog::new(4096, move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        log.record(true);
        let writer = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for n in 0..500u64 {
                    assert!(log.admit(1000));
                    log.completed(0, n, &[n as u8; 1000]);
                    log.flushed(0);
                }
            }
        });
        let mut seen = Vec::new();
        let mut buf = Vec::with_capacity(4096);
        while seen.len() < 500 {
            log.seal(&mut buf);
            for record in Records::new(&buf) {
                let record = record.unwrap();
                if record.kind == RecordKind::DiskWrite {
                    assert_eq!(record.payload, [record.at as u8; 1000]);
                    seen.push(record.at);
                }
            }
        }
        writer.join().unwrap();
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        assert!(
            !log.admit(5000),
            "a write beyond the whole budget can never fit"
        );
    }

    /// Rule 2: a shadow whose disk is slow slows the guest's writes, and nothing else of it.
    #[test]
    fn a_write_waits_while_the_shadows_disks_are_far_behind_and_no_longer_than_it_has_a_shadow() {
        let log = Arc::new(WriteLog::new(4096, || {}));
        let mut buf = Vec::new();
        let mut epoch = |n: u64| {
            assert!(log.admit(100));
            log.completed(0, n, &[0; 100]);
            log.seal_epoch(EpochId(n), &mut buf);
        };
        log.record(true);
        let most = BEHIND as u64;
        (1..=most).for_each(&mut epoch);
        let write = || {
            let log = Arc::clone(&log);
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || tell.send(log.admit(100)));
            told
        };
        let short = std::time::Duration::from_millis(50);
        let waiting = write();
        assert!(waiting.recv_timeout(short).is_err());
        // What comes without a write is no end of its waiting.
        log.applied_on_shadow(EpochId(0));
        assert!(waiting.recv_timeout(short).is_err());
        log.applied_on_shadow(EpochId(1));
        assert_eq!(waiting.recv(), Ok(true));
        log.abandoned(100);
        epoch(most + 1);
        let waiting = write();
        assert!(waiting.recv_timeout(short).is_err());
        log.record(false);
        assert_eq!(waiting.recv(), Ok(true));
    }

    /// A log, and FLUSHes of it that wait: each begun when this returns.
    fn waiting(flushes: usize) -> (Arc<WriteLog>, Vec<std::thread::JoinHandle<()>>) {
        let (tell, told) = std::sync::mpsc::channel();
        let log = Arc::new(WriteLog::new(4096, move || {
            let _ = tell.send(());
        }));
        log.record(true);
        assert!(log.admit(100));
        log.completed(0, 7, &[7; 100]);
        let flush = |_| {
            let log = Arc::clone(&log);
            let thread = std::thread::spawn(move || log.flush_on_shadow(0));
            told.recv().unwrap();
            thread
        };
        let threads = (0..flushes).map(flush).collect();
        (log, threads)
    }

    /// Whether it still waits, after a time in which one that need not would have returned.
    fn waits(flush: &std::thread::JoinHandle<()>) -> bool {
        std::thread::sleep(std::time::Duration::from_millis(50));
        !flush.is_finished()
    }

    fn kinds(records: &[u8]) -> Vec<(RecordKind, u64)> {
        let records = Records::new(records).map(|r| r.unwrap());
        records.map(|r| (r.kind, r.at)).collect()
    }

    #[test]
    fn a_flush_kept_in_sync_waits_until_its_epoch_is_durable_on_the_shadow() {
        let (log, mut flushes) = waiting(1);
        let flush = flushes.pop().unwrap();
        let mut buf = Vec::new();
        log.durable_on_shadow(EpochId(4));
        assert!(waits(&flush), "its epoch has not even ended");
        log.seal_epoch(EpochId(5), &mut buf);
        let expected = [
            (RecordKind::DiskWrite, 7),
            (RecordKind::DiskFlush, FLUSH_AWAITED),
        ];
        assert_eq!(kinds(&buf), expected);
        log.seal_epoch(EpochId(6), &mut buf);
        assert_eq!(kinds(&buf), []);
        log.durable_on_shadow(EpochId(4));
        assert!(waits(&flush), "an earlier epoch is durable");
        log.durable_on_shadow(EpochId(5));
        flush.join().unwrap();
    }

    #[test]
    fn a_flush_that_goes_with_the_initial_copy_need_not_wait() {
        let (log, mut flushes) = waiting(1);
        log.seal(&mut Vec::new());
        flushes.pop().unwrap().join().unwrap();
    }

    #[test]
    fn flushes_outlast_a_lost_shadow_until_the_guest_may_run_alone() {
        let (log, mut flushes) = waiting(2);
        log.seal_epoch(EpochId(5), &mut Vec::new());
        log.record(false);
        let late = Arc::clone(&log);
        flushes.push(std::thread::spawn(move || late.flush_on_shadow(0)));
        for flush in &flushes {
            assert!(waits(flush), "the record still names the shadow");
        }
        log.release_flushes();
        flushes.into_iter().for_each(|f| f.join().unwrap());
        log.flush_on_shadow(0);
    }

    #[test]
    fn a_write_admitted_before_recording_began_is_recorded_if_it_completes_after() {
        let log = WriteLog::new(4096, || {});
        assert!(log.admit(100) && log.admit(100));
        log.completed(0, 1, &[1; 100]);
        log.record(true);
        log.completed(0, 2, &[2; 100]);
        let mut buf = Vec::with_capacity(4096);
        log.seal(&mut buf);
        let at: Vec<_> = Records::new(&buf).map(|r| r.unwrap().at).collect();
        assert_eq!(at, [2]);
    }
}
