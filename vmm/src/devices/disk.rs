//! virtio-blk: one queue and one worker thread per disk.
//!
//! The worker takes requests in the guest's order, one at a time, and leaves each at the head of
//! the available ring until it completes. So the saved queue place always points at the oldest
//! request the guest has not seen completed: after a restore the new worker finds it there and
//! issues it again (rule 13), and nothing in flight needs saving.

use std::io;
use std::sync::Arc;

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tracing::warn;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::gate::Gate;
use super::records::DiskRecord;
use super::ring::{Fault, Ring, Segments};
use super::transport::{Restored, Transport};
use super::{Error, Virtio};
use crate::memory::GuestMemory;
use crate::ports::Disk;

const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 128;
const SECTOR: u64 = 512;

/// Bytes of `struct virtio_blk_outhdr`: type, reserved (4 bytes each), sector (8 bytes).
const HEADER: usize = 16;

/// Most data buffers of a request, as advertised.
const MAX_SEGMENTS: u32 = 64;
/// Largest data buffer, bytes, as advertised.
const MAX_SEGMENT: u32 = 4096;
/// Most bytes one request may read or write; larger ones fail.
pub const MAX_REQUEST: usize = (MAX_SEGMENTS * MAX_SEGMENT) as usize;

/// Bytes copied to guest memory per passage of the gate: bounds how long a capture waits.
const CHUNK: usize = 64 << 10;

/// Bytes of the configuration space up to and including `blk_size`.
const CONFIG: usize = 24;

/// One disk device.
pub(super) struct DiskDevice {
    number: usize,
    disk: Arc<dyn Disk>,
    config: [u8; CONFIG],
    doorbell: [EventFd; 1],
    transport: Mutex<Transport>,
}

/// What a worker does between taking a request and completing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Read,
    Write { through: bool },
    Flush,
}

/// The request a worker has taken. One per worker, allocated once.
pub(super) struct Job {
    op: Op,
    /// Which life of the queue it was taken from.
    life: u64,
    /// Byte offset on the disk.
    offset: u64,
    /// Bytes of data.
    len: usize,
    segments: Segments,
    data: Box<[u8]>,
}

impl Job {
    pub(super) fn new() -> Self {
        Job {
            op: Op::Flush,
            life: 0,
            offset: 0,
            len: 0,
            segments: Segments::default(),
            data: vec![0; MAX_REQUEST].into_boxed_slice(),
        }
    }
}

enum Taken {
    /// Nothing to do until the doorbell rings.
    Idle,
    /// The job is filled in: do it, then complete it.
    Job,
    /// One request was answered at once; look again.
    Answered,
}

impl DiskDevice {
    pub(super) fn new(
        number: usize,
        disk: Arc<dyn Disk>,
        mem: GuestMemory,
        irq: EventFd,
        doorbell: EventFd,
    ) -> Result<Self, Error> {
        let size = disk.size();
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(Error::DiskSize { disk: number, size });
        }
        let mut config = [0; CONFIG];
        config[..8].copy_from_slice(&(size / SECTOR).to_le_bytes());
        config[8..12].copy_from_slice(&MAX_SEGMENT.to_le_bytes());
        config[12..16].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        let name = format!("disk{number}");
        let transport = Transport::new(name, VIRTIO_ID_BLOCK, features, &[QUEUE_SIZE], mem, irq);
        Ok(DiskDevice {
            number,
            disk,
            config,
            doorbell: [doorbell],
            transport: Mutex::new(transport),
        })
    }

    /// The worker: answers requests until the gate is stopped, sleeping on the doorbell (blocking).
    pub(super) fn work(&self, gate: &Gate) {
        let [doorbell] = &self.doorbell;
        let mut job = Job::new();
        while let Some(more) = self.step(gate, &mut job) {
            if !more {
                // Reading a blocking event fails only when interrupted: then look anyway.
                let _ = doorbell.read();
            }
        }
    }

    /// Answers the oldest request. True when one was there; `None` when the gate is stopped.
    pub(super) fn step(&self, gate: &Gate, job: &mut Job) -> Option<bool> {
        let taken = {
            let _inside = gate.enter()?;
            self.take(job)
        };
        match taken {
            Taken::Idle => Some(false),
            Taken::Answered => Some(true),
            Taken::Job => {
                let result = self.perform(job);
                if result.as_ref().is_err_and(given_back) {
                    return (!gate.is_stopped()).then_some(false);
                }
                self.complete(gate, job, result).map(|()| true)
            }
        }
    }

    /// Looks at the oldest request. Inside the gate.
    fn take(&self, job: &mut Job) -> Taken {
        let mut transport = self.transport.lock();
        match self.try_take(&mut transport, job) {
            Ok(taken) => {
                if matches!(taken, Taken::Answered) {
                    transport.signal_used(QUEUE);
                }
                taken
            }
            Err(fault) => {
                transport.fail(fault);
                Taken::Idle
            }
        }
    }

    fn try_take(&self, transport: &mut Transport, job: &mut Job) -> Result<Taken, Fault> {
        job.life = transport.life();
        let through = !transport.accepted(VIRTIO_BLK_F_FLUSH);
        let Some(mut ring) = transport.ring(QUEUE) else {
            return Ok(Taken::Idle);
        };
        let mut chain = ring.next()?;
        if chain.is_none() && ring.arm()? {
            chain = ring.next()?;
        }
        let Some(chain) = chain else {
            return Ok(Taken::Idle);
        };
        ring.disarm()?;
        ring.untake();
        let segments = &mut job.segments;
        segments.parse(ring.mem, chain)?;
        let mut header = [0; HEADER];
        segments.read(ring.mem, 0, &mut header)?;
        let room = segments.write_len.checked_sub(1).ok_or(Fault::TooShort)?;
        let payload = segments.read_len - HEADER;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let answer = match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                job.op = Op::Read;
                self.place(job, u64::from_le_bytes(sector), room)
            }
            VIRTIO_BLK_T_OUT if self.disk.read_only() => Some(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_OUT => {
                job.op = Op::Write { through };
                let answer = self.place(job, u64::from_le_bytes(sector), payload);
                if answer.is_none() {
                    // The only look at the payload: the image and the stream get these bytes,
                    // whatever the guest does to the buffer meanwhile.
                    let data = job.data.get_mut(..payload).ok_or(Fault::TooShort)?;
                    job.segments.read(ring.mem, HEADER, data)?;
                }
                answer
            }
            VIRTIO_BLK_T_FLUSH => {
                (job.op, job.len) = (Op::Flush, 0);
                None
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                let name = format!("ax-disk{}", self.number);
                id.iter_mut()
                    .zip(name.bytes())
                    .for_each(|(to, from)| *to = from);
                let fits = id.get(..id.len().min(room)).unwrap_or_default();
                job.segments.write(ring.mem, 0, fits)?;
                Some(VIRTIO_BLK_S_OK)
            }
            _ => Some(VIRTIO_BLK_S_UNSUPP),
        };
        match answer {
            None => Ok(Taken::Job),
            Some(status) => {
                answer_guest(&mut ring, &job.segments, status)?;
                Ok(Taken::Answered)
            }
        }
    }

    /// Notes which bytes of the disk `job` is about, or says why the guest can't have them.
    fn place(&self, job: &mut Job, sector: u64, len: usize) -> Option<u32> {
        let offset = sector.checked_mul(SECTOR);
        let end = offset.and_then(|o| o.checked_add(len as u64));
        match (offset, end) {
            (Some(offset), Some(end))
                if end <= self.disk.size()
                    && len <= MAX_REQUEST
                    && (len as u64).is_multiple_of(SECTOR) =>
            {
                (job.offset, job.len) = (offset, len);
                None
            }
            _ => Some(VIRTIO_BLK_S_IOERR),
        }
    }

    /// The I/O itself: outside the gate, without any lock.
    fn perform(&self, job: &mut Job) -> io::Result<()> {
        let data = job.data.get_mut(..job.len).unwrap_or_default();
        match job.op {
            Op::Read => self.disk.read(job.offset, data),
            Op::Write { through: false } => self.disk.write(job.offset, data),
            Op::Write { through: true } => self.disk.write_durably(job.offset, data),
            Op::Flush => self.disk.flush(),
        }
    }

    /// Shows the guest the result. `None` when the gate is stopped: then nobody sees it, and the
    /// request, still at the head of the ring, is issued again by whoever goes on.
    ///
    /// The stream's record, the status byte, the used ring and the interrupt come in one passage
    /// of the gate, so one epoch has them all (rule 13). A read's data may arrive over several:
    /// until it is used, a buffer's contents mean nothing.
    fn complete(&self, gate: &Gate, job: &Job, result: io::Result<()>) -> Option<()> {
        if let Err(error) = &result {
            warn!(disk = self.number, op = ?job.op, offset = job.offset, len = job.len, %error,
                "disk request failed; the guest gets an I/O error");
        }
        let data = job.data.get(..job.len).unwrap_or_default();
        if job.op == Op::Read && result.is_ok() {
            for (i, chunk) in data.chunks(CHUNK).enumerate() {
                let _inside = gate.enter()?;
                let mut transport = self.transport.lock();
                if transport.life() != job.life {
                    return Some(());
                }
                let copied = match transport.ring(QUEUE) {
                    Some(ring) => job.segments.write(ring.mem, i * CHUNK, chunk),
                    None => return Some(()),
                };
                if let Err(fault) = copied {
                    transport.fail(fault);
                    return Some(());
                }
            }
        }
        let _inside = gate.enter()?;
        let mut transport = self.transport.lock();
        if result.is_ok() {
            // Recorded even when the guest has reset the device meanwhile: the image has the
            // write, so the stream must have it too, before anything the guest does later.
            match job.op {
                Op::Read => {}
                Op::Write { through } => {
                    self.disk.write_completed(job.offset, data);
                    if through {
                        self.disk.flush_completed();
                    }
                }
                Op::Flush => self.disk.flush_completed(),
            }
        }
        if transport.life() != job.life {
            return Some(());
        }
        let status = if result.is_ok() {
            VIRTIO_BLK_S_OK
        } else {
            VIRTIO_BLK_S_IOERR
        };
        let answered = match transport.ring(QUEUE) {
            Some(mut ring) => answer_guest(&mut ring, &job.segments, status),
            None => Ok(()),
        };
        match answered {
            Ok(()) => transport.signal_used(QUEUE),
            Err(fault) => transport.fail(fault),
        }
        Some(())
    }

    pub(super) fn record(&self) -> DiskRecord {
        DiskRecord {
            transport: self.transport.lock().record(),
            size: self.disk.size(),
            read_only: self.disk.read_only().into(),
        }
    }

    pub(super) fn check(&self, record: &DiskRecord) -> Result<Restored, &'static str> {
        if record.size != self.disk.size() {
            return Err("the disk has another size");
        }
        if record.read_only != u64::from(self.disk.read_only()) {
            return Err("one disk is read-only, the other is not");
        }
        self.transport.lock().check(&record.transport)
    }

    pub(super) fn load(&self, restored: Restored) {
        self.transport.lock().load(restored);
    }
}

/// True when the request is not to be completed here.
fn given_back(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

/// Writes the status byte and returns the request at the head of the ring to the guest.
fn answer_guest(ring: &mut Ring<'_>, segments: &Segments, status: u32) -> Result<(), Fault> {
    let at = segments.write_len.checked_sub(1).ok_or(Fault::TooShort)?;
    segments.write(ring.mem, at, &[status as u8])?;
    ring.retake();
    ring.used(segments.head, segments.write_len as u32)
}

impl Virtio for DiskDevice {
    fn transport(&self) -> MappedMutexGuard<'_, Transport> {
        MutexGuard::map(self.transport.lock(), |t| t)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn doorbells(&self) -> &[EventFd] {
        &self.doorbell
    }
}
