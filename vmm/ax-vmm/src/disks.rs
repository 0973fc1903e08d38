//! A mirrored disk as the machine's virtio-blk sees it.

use std::io;
use std::sync::Arc;

use ax_disk::{Image, WriteLog};
use vmm::ports::Disk;

/// One image and its place in the VM's write log.
#[derive(Debug)]
pub struct MirroredDisk {
    /// Which disk of the VM.
    pub unit: u8,
    /// The local image.
    pub image: Arc<Image>,
    /// Where completed writes are recorded.
    pub log: Arc<WriteLog>,
}

impl Disk for MirroredDisk {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        self.image.read_only()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if !self.log.admit(data.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "request beyond the budget",
            ));
        }
        self.image
            .write(offset, data)
            .inspect_err(|_| self.log.abandoned(data.len()))
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn write_completed(&self, offset: u64, data: &[u8]) {
        self.log.completed(self.unit, offset, data);
    }

    fn flush_completed(&self) {
        self.log.flushed(self.unit);
    }
}
