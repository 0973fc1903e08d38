//! A mirrored disk as the machine's virtio-blk sees it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_disk::{Image, WriteLog};
use vmm::ports::Disk;

use crate::faults::{Failed, Faults};

/// One image and its place in the VM's write log.
#[derive(Debug)]
pub struct MirroredDisk {
    /// Which disk of the VM.
    pub unit: u8,
    /// The local image.
    pub image: Arc<Image>,
    /// Where completed writes are recorded.
    pub log: Arc<WriteLog>,
    /// FLUSH completes when durable on both hosts (rule 15), not only here.
    pub sync: bool,
    /// So it is while this is set (mode `ha`).
    pub mirrored: Arc<AtomicBool>,
    /// What becomes of requests that the image can't do.
    pub faults: Arc<Faults>,
    /// The write in hand is in the log already, before its completion (rule 13: no later than that).
    pub recorded: AtomicBool,
}

impl MirroredDisk {
    fn flushes_on_both(&self) -> bool {
        self.sync || self.mirrored.load(Ordering::Acquire)
    }
}

impl Disk for MirroredDisk {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        self.image.read_only()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let unit = usize::from(self.unit);
        let read = || self.image.read(offset, out);
        self.faults.persist(unit, Failed::Read, read)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        // The mark of one that was never completed is not this one's.
        self.recorded.store(false, Ordering::Relaxed);
        if !self.log.admit(data.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "request beyond the budget",
            ));
        }
        let write = || self.image.write_in_hand(offset, data);
        self.faults
            .persist(usize::from(self.unit), Failed::Write, write)
            .inspect_err(|_| self.log.abandoned(data.len()))
    }

    fn flush(&self) -> io::Result<()> {
        let flush = || self.image.flush();
        let unit = usize::from(self.unit);
        self.faults.persist(unit, Failed::Flush, flush)?;
        if self.flushes_on_both() {
            self.log.flush_on_shadow(self.unit);
        }
        Ok(())
    }

    fn write_durably(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)?;
        if self.flushes_on_both() {
            // What the shadow is to make durable must be on its way to it.
            self.log.completed(self.unit, offset, data);
            self.recorded.store(true, Ordering::Relaxed);
        }
        self.flush()
    }

    fn write_completed(&self, offset: u64, data: &[u8]) {
        if !self.recorded.swap(false, Ordering::Relaxed) {
            self.log.completed(self.unit, offset, data);
        }
        // Only now: what is in the map's older part must be in the log before its mark.
        self.image.settled(offset, data.len());
    }

    fn flush_completed(&self) {
        // Where FLUSHes wait for the shadow, each is in the log since it was asked for.
        if !self.flushes_on_both() {
            self.log.flushed(self.unit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_wire::records::{RecordKind, Records};
    use ax_wire::{EpochId, PairId};

    const SIZE: u64 = 1 << 20;

    fn disk(dir: &std::path::Path, sync: bool) -> MirroredDisk {
        let path = dir.join("image");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let image = Image::open(&path, &dir.join("meta"), PairId([1; 16]), SIZE, false);
        MirroredDisk {
            unit: 0,
            image: Arc::new(image.unwrap()),
            log: Arc::new(WriteLog::new(1 << 16, || {})),
            sync,
            mirrored: Arc::default(),
            faults: Faults::new(vec![Default::default()], || {}),
            recorded: AtomicBool::new(false),
        }
    }

    fn sealed(disk: &MirroredDisk, epoch: u64) -> Vec<(RecordKind, u64)> {
        let mut buf = Vec::new();
        disk.log.seal_epoch(EpochId(epoch), &mut buf);
        let records = Records::new(&buf).map(|r| r.unwrap());
        records.map(|r| (r.kind, r.at)).collect()
    }

    #[test]
    fn without_sync_nothing_waits_and_a_flush_is_recorded_when_it_completes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path(), false);
        disk.log.record(true);
        disk.write(0, &[1; 512]).unwrap();
        disk.write_completed(0, &[1; 512]);
        disk.flush().unwrap();
        assert_eq!(sealed(&disk, 1), [(RecordKind::DiskWrite, 0)]);
        disk.flush_completed();
        assert_eq!(sealed(&disk, 2), [(RecordKind::DiskFlush, 0)]);
    }

    /// Rule 15 for a guest that does not flush: its write is on its way before it waits, and once.
    #[test]
    fn a_durable_write_kept_in_sync_travels_before_its_completion_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(disk(dir.path(), true));
        disk.log.record(true);
        let writer = Arc::clone(&disk);
        let write = std::thread::spawn(move || writer.write_durably(512, &[1; 512]));
        let mut records = Vec::new();
        while records.len() < 2 {
            records.extend(sealed(&disk, 3));
        }
        assert_eq!(
            records,
            [(RecordKind::DiskWrite, 512), (RecordKind::DiskFlush, 1)]
        );
        assert!(!write.is_finished(), "the shadow has said nothing");
        disk.log.durable_on_shadow(EpochId(3));
        write.join().unwrap().unwrap();
        disk.write_completed(512, &[1; 512]);
        disk.flush_completed();
        assert_eq!(sealed(&disk, 4), []);
        // The next one is recorded as ever.
        disk.write(0, &[2; 512]).unwrap();
        disk.write_completed(0, &[2; 512]);
        assert_eq!(sealed(&disk, 5), [(RecordKind::DiskWrite, 0)]);
    }

    /// A request that nobody saw completed leaves no mark on the next.
    #[test]
    fn a_durable_write_that_was_never_completed_hides_no_later_one() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path(), true);
        disk.write_durably(0, &[1; 512]).unwrap();
        disk.log.record(true);
        disk.write(512, &[2; 512]).unwrap();
        disk.write_completed(512, &[2; 512]);
        assert_eq!(sealed(&disk, 1), [(RecordKind::DiskWrite, 512)]);
    }
}
