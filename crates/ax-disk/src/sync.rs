//! Initial sync: the image itself, sent through the log that guest writes go through.

use std::io;
use std::sync::Arc;

use crate::image::Image;
use crate::log::WriteLog;

/// Bytes read and sent at a time.
pub const CHUNK: usize = 256 << 10;

/// How far the initial sync of all disks has come.
#[derive(Debug)]
pub struct SyncCursor {
    disks: Vec<Arc<Image>>,
    unit: usize,
    at: u64,
    chunk: Vec<u8>,
}

impl SyncCursor {
    /// Starts at the first byte of the first disk. `log` must be recording before the first step.
    pub fn new(disks: Vec<Arc<Image>>) -> SyncCursor {
        SyncCursor {
            disks,
            unit: 0,
            at: 0,
            chunk: vec![0; CHUNK],
        }
    }

    /// Bytes behind the cursor, and in all.
    pub fn progress(&self) -> (u64, u64) {
        let behind: u64 = self.disks.iter().take(self.unit).map(|d| d.size()).sum();
        (behind + self.at, self.disks.iter().map(|d| d.size()).sum())
    }

    /// True when every byte has been put in the log.
    pub fn is_done(&self) -> bool {
        self.unit >= self.disks.len()
    }

    /// Puts chunks in `log` until it has no room or everything is sent; returns [`Self::is_done`].
    ///
    /// A chunk is read and put in the log as one step with respect to guest writes (the image's
    /// order lock), so that an old chunk can never follow a newer write to the same place. Zeros and
    /// holes are skipped: the other side begins with zeros.
    ///
    /// # Errors
    /// The image could not be read; the cursor stays where it was.
    pub fn step(&mut self, log: &WriteLog) -> io::Result<bool> {
        while let Some(disk) = self.disks.get(self.unit) {
            let next = if self.at < disk.size() {
                disk.next_data(self.at)?
            } else {
                None
            };
            let Some(data) = next else {
                (self.unit, self.at) = (self.unit + 1, 0);
                continue;
            };
            let end = data.end.min(data.start + CHUNK as u64);
            let chunk = &mut self.chunk[..(end - data.start) as usize];
            let _order = disk.order.lock();
            disk.read(data.start, chunk)?;
            let blank = chunk.iter().all(|b| *b == 0);
            if !blank && !log.bulk(self.unit as u8, data.start, chunk) {
                return Ok(false);
            }
            self.at = end;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::{SIZE, fresh};
    use ax_wire::records::Records;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn content(image: &Image) -> Vec<u8> {
        let mut all = vec![0; SIZE as usize];
        image.read(0, &mut all).unwrap();
        all
    }

    /// I4's ground: after the sync both images are equal although the guest wrote all the time.
    #[test]
    fn both_images_are_equal_though_the_guest_writes_during_the_sync() {
        let dir = tempfile::tempdir().unwrap();
        let source = Arc::new(fresh(dir.path(), "source"));
        let target = fresh(dir.path(), "target");
        target.write(SIZE - 4096, &[0x55; 4096]).unwrap();
        target.begin_overwrite().unwrap();
        for n in 0..SIZE / 8192 {
            source.write(n * 8192, &[n as u8; 4096]).unwrap();
        }
        let log = Arc::new(WriteLog::new(1 << 20, || {}));
        log.record(true);
        let stop = Arc::new(AtomicBool::new(false));
        let guest = std::thread::spawn({
            let (source, log, stop) = (Arc::clone(&source), Arc::clone(&log), Arc::clone(&stop));
            move || {
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    n = n
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let at = (n >> 33) % (SIZE / 512) * 512;
                    assert!(log.admit(512));
                    source.write(at, &[n as u8; 512]).unwrap();
                    log.completed(0, at, &[n as u8; 512]);
                }
            }
        });
        let mut cursor = SyncCursor::new(vec![Arc::clone(&source)]);
        let mut buf = Vec::with_capacity(1 << 20);
        let apply = |buf: &[u8]| {
            for record in Records::new(buf) {
                let record = record.unwrap();
                target.write(record.at, record.payload).unwrap();
            }
        };
        while !cursor.step(&log).unwrap() {
            log.seal(&mut buf);
            apply(&buf);
        }
        stop.store(true, Ordering::Relaxed);
        while !guest.is_finished() {
            log.seal(&mut buf);
            apply(&buf);
        }
        guest.join().unwrap();
        log.seal(&mut buf);
        apply(&buf);
        assert!(content(&source) == content(&target));
    }
}
