//! virtio-rng: the host's entropy. The bytes are captured as part of guest memory.

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use super::Virtio;
use super::records::RngRecord;
use super::ring::{Fault, Segments};
use super::transport::{Restored, Transport};
use crate::memory::GuestMemory;

const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; the driver asks again for more.
const MOST: usize = 4096;

/// The entropy device.
pub(super) struct Rng {
    pub(super) doorbell: [EventFd; 1],
    inner: Mutex<Inner>,
}

struct Inner {
    transport: Transport,
    segments: Segments,
    bytes: [u8; MOST],
}

impl Rng {
    pub(super) fn new(mem: GuestMemory, irq: EventFd, doorbell: EventFd) -> Self {
        let inner = Mutex::new(Inner {
            transport: Transport::new("rng".into(), VIRTIO_ID_RNG, 0, &[QUEUE_SIZE], mem, irq),
            segments: Segments::default(),
            bytes: [0; MOST],
        });
        Rng {
            doorbell: [doorbell],
            inner,
        }
    }

    /// Answers one request. True when there may be more. Inside the gate.
    pub(super) fn fill(&self) -> bool {
        let mut inner = self.inner.lock();
        match inner.fill() {
            Ok(true) => {
                inner.transport.signal_used(QUEUE);
                true
            }
            Ok(false) => false,
            Err(fault) => {
                inner.transport.fail(fault);
                false
            }
        }
    }

    pub(super) fn record(&self) -> RngRecord {
        RngRecord {
            transport: self.inner.lock().transport.record(),
        }
    }

    pub(super) fn check(&self, record: &RngRecord) -> Result<Restored, &'static str> {
        self.inner.lock().transport.check(&record.transport)
    }

    pub(super) fn load(&self, restored: Restored) {
        self.inner.lock().transport.load(restored);
    }
}

impl Inner {
    fn fill(&mut self) -> Result<bool, Fault> {
        let Inner {
            transport,
            segments,
            bytes,
        } = self;
        let Some(mut ring) = transport.ring(QUEUE) else {
            return Ok(false);
        };
        let mut chain = ring.next()?;
        if chain.is_none() && ring.arm()? {
            chain = ring.next()?;
        }
        let Some(chain) = chain else { return Ok(false) };
        segments.parse(ring.mem, chain)?;
        let wanted = segments.write_len.min(MOST);
        let bytes = bytes.get_mut(..wanted).unwrap_or_default();
        if let Err(error) = getrandom::fill(bytes) {
            warn!(%error, "no entropy from the host; the guest's request waits");
            ring.untake();
            return Ok(false);
        }
        segments.write(ring.mem, 0, bytes)?;
        ring.used(segments.head, bytes.len() as u32)?;
        Ok(true)
    }
}

impl Virtio for Rng {
    fn transport(&self) -> MappedMutexGuard<'_, Transport> {
        MutexGuard::map(self.inner.lock(), |i| &mut i.transport)
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn doorbells(&self) -> &[EventFd] {
        &self.doorbell
    }
}
