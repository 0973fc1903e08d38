//! The primary's log of disk writes: what the open epoch carries of disks.

use ax_wire::records::{Record, RecordKind, push, record_size};
use parking_lot::{Condvar, Mutex};

struct Inner {
    /// Records of the open epoch. Never grows beyond its capacity.
    open: Vec<u8>,
    /// Bytes promised to admitted writes that have not completed yet.
    reserved: usize,
    /// Bytes that may be used in all; at most the capacity.
    budget: usize,
    recording: bool,
}

impl Inner {
    fn fits(&self, bytes: usize) -> bool {
        self.open.len() + self.reserved + bytes <= self.budget
    }
}

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
            }),
            room: Condvar::new(),
            pressed: Box::new(pressed),
        }
    }

    /// Starts or stops recording. Stopping drops what is recorded and lets waiting writes go on.
    pub fn record(&self, on: bool) {
        let mut inner = self.inner.lock();
        inner.recording = on;
        inner.open.clear();
        self.room.notify_all();
    }

    /// Waits until `len` bytes of payload may be recorded and promises them (back-pressure).
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
        while !inner.fits(bytes) {
            (self.pressed)();
            self.room
                .wait_for(&mut inner, std::time::Duration::from_millis(20));
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

    /// Bytes in the open epoch.
    pub fn len(&self) -> usize {
        self.inner.lock().open.len()
    }

    /// True when the open epoch has no disk records.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends the open epoch's records: swaps them with `out`, which is emptied first and must have
    /// the log's capacity (kept by swapping the same buffers round).
    pub fn seal(&self, out: &mut Vec<u8>) {
        out.clear();
        let mut inner = self.inner.lock();
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
