//! virtio-net: frames out through [`Outputs`], frames in from whoever reads the tap.
//!
//! No offloads are offered, so every frame is one Ethernet frame behind a 12-byte header of zeros.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use vmm_sys_util::eventfd::EventFd;

use super::records::NetRecord;
use super::ring::{Fault, Segments};
use super::transport::{Restored, Transport};
use super::{RxOutcome, Virtio};
use crate::memory::GuestMemory;
use crate::ports::Outputs;

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// The header before each received frame: all zeros but `num_buffers` = 1.
const RX_HEADER: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Shortest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// Longest frame carried, bytes without FCS: a jumbo frame with room for tags.
pub const MAX_FRAME: usize = 9216;

/// Frames sent per passage of the gate: bounds how long a capture waits.
const BATCH: usize = 8;

/// One network device.
pub(super) struct Net {
    nic: u8,
    mac: [u8; 6],
    outputs: Arc<dyn Outputs>,
    pub(super) doorbells: [EventFd; 2],
    inner: Mutex<Inner>,
    /// The outputs were full: the transmit queue waits for `unblock`.
    blocked: AtomicBool,
    /// Written when a receiver that was turned away should try again.
    pub(super) wakeup: EventFd,
}

struct Inner {
    transport: Transport,
    segments: Segments,
    frame: Box<[u8; MAX_FRAME]>,
    received: u64,
    /// A receiver was turned away. Not saved: one that is turned away again sets it again.
    starved: bool,
}

/// A checked record, ready to be put in place.
#[derive(Debug)]
pub(super) struct Loaded {
    transport: Restored,
    received: u64,
}

impl Net {
    pub(super) fn new(
        nic: u8,
        mac: [u8; 6],
        outputs: Arc<dyn Outputs>,
        mem: GuestMemory,
        irq: EventFd,
        doorbells: [EventFd; 2],
        wakeup: EventFd,
    ) -> Self {
        let name = format!("net{nic}");
        let features = 1 << VIRTIO_NET_F_MAC;
        let sizes = [QUEUE_SIZE; 2];
        Net {
            nic,
            mac,
            outputs,
            doorbells,
            inner: Mutex::new(Inner {
                transport: Transport::new(name, VIRTIO_ID_NET, features, &sizes, mem, irq),
                segments: Segments::default(),
                frame: Box::new([0; MAX_FRAME]),
                received: 0,
                starved: false,
            }),
            blocked: AtomicBool::new(false),
            wakeup,
        }
    }

    /// Sends up to [`BATCH`] frames. True when there may be more to send at once. Inside the gate.
    pub(super) fn transmit(&self) -> bool {
        let mut inner = self.inner.lock();
        let mut sent = false;
        let more = inner.transmit(self, &mut sent);
        if sent {
            inner.transport.signal_used(TX);
        }
        more.unwrap_or_else(|fault| {
            inner.transport.fail(fault);
            false
        })
    }

    /// Puts one received frame into the guest's memory. Inside the gate.
    pub(super) fn receive(&self, frame: &[u8]) -> RxOutcome {
        let mut inner = self.inner.lock();
        match inner.receive(frame) {
            Ok(outcome) => {
                if outcome == RxOutcome::Delivered {
                    inner.transport.signal_used(RX);
                }
                outcome
            }
            Err(fault) => {
                inner.transport.fail(fault);
                RxOutcome::NotReady
            }
        }
    }

    /// The guest rang the receive queue's doorbell, or its driver started: there may be buffers.
    pub(super) fn refilled(&self) {
        let starved = std::mem::take(&mut self.inner.lock().starved);
        if starved {
            // A full counter means that a wakeup is pending.
            let _ = self.wakeup.write(1);
        }
    }

    /// True when the transmit queue waits for room in the outputs.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::SeqCst)
    }

    /// If the transmit queue waited for room in the outputs, rings its doorbell.
    pub(super) fn unblock(&self) {
        if self.blocked.swap(false, Ordering::SeqCst) {
            let [_, tx] = &self.doorbells;
            let _ = tx.write(1);
        }
    }

    pub(super) fn received(&self) -> u64 {
        self.inner.lock().received
    }

    pub(super) fn record(&self) -> NetRecord {
        let inner = self.inner.lock();
        NetRecord {
            transport: inner.transport.record(),
            mac: self.mac,
            unused: [0; 2],
            received: inner.received,
        }
    }

    pub(super) fn check(&self, record: &NetRecord) -> Result<Loaded, &'static str> {
        if record.mac != self.mac {
            return Err("it has another MAC address");
        }
        let transport = self.inner.lock().transport.check(&record.transport)?;
        Ok(Loaded {
            transport,
            received: record.received,
        })
    }

    pub(super) fn load(&self, loaded: Loaded) {
        let mut inner = self.inner.lock();
        inner.transport.load(loaded.transport);
        inner.received = loaded.received;
    }
}

impl Inner {
    fn transmit(&mut self, net: &Net, sent: &mut bool) -> Result<bool, Fault> {
        let Inner {
            transport,
            segments,
            frame,
            ..
        } = self;
        let Some(mut ring) = transport.ring(TX) else {
            return Ok(false);
        };
        for _ in 0..BATCH {
            let Some(chain) = ring.next()? else {
                if ring.arm()? {
                    continue;
                }
                return Ok(false);
            };
            ring.disarm()?;
            segments.parse(ring.mem, chain)?;
            let len = segments
                .read_len
                .checked_sub(HEADER)
                .ok_or(Fault::TooShort)?;
            // A frame no network would carry is lost, as it would be there.
            if let Some(frame) = frame.get_mut(..len).filter(|f| f.len() >= MIN_FRAME) {
                segments.read(ring.mem, HEADER, frame)?;
                if !net.send(frame) {
                    ring.untake();
                    return Ok(false);
                }
            }
            ring.used(segments.head, 0)?;
            *sent = true;
        }
        Ok(true)
    }

    fn receive(&mut self, frame: &[u8]) -> Result<RxOutcome, Fault> {
        self.starved = true;
        let Inner {
            transport,
            segments,
            ..
        } = self;
        let Some(mut ring) = transport.ring(RX) else {
            return Ok(RxOutcome::NotReady);
        };
        let mut chain = ring.next()?;
        if chain.is_none() && ring.arm()? {
            chain = ring.next()?;
        }
        let Some(chain) = chain else {
            return Ok(RxOutcome::NoBuffers);
        };
        segments.parse(ring.mem, chain)?;
        self.starved = false;
        self.received = self.received.wrapping_add(1);
        if frame.len() < MIN_FRAME || HEADER + frame.len() > segments.write_len {
            ring.untake();
            return Ok(RxOutcome::Dropped);
        }
        ring.disarm()?;
        segments.write(ring.mem, 0, &RX_HEADER)?;
        segments.write(ring.mem, HEADER, frame)?;
        ring.used(segments.head, (HEADER + frame.len()) as u32)?;
        Ok(RxOutcome::Delivered)
    }
}

impl Net {
    /// Hands a frame out; false when there is no room for it.
    ///
    /// "Blocked" is said before the last try: room made after that try failed is then announced
    /// to a device that is seen to wait, so no wakeup is lost.
    fn send(&self, frame: &[u8]) -> bool {
        if self.outputs.frame(self.nic, frame).is_ok() {
            return true;
        }
        self.blocked.store(true, Ordering::SeqCst);
        let sent = self.outputs.frame(self.nic, frame).is_ok();
        if sent {
            self.blocked.store(false, Ordering::SeqCst);
        }
        sent
    }
}

impl Virtio for Net {
    fn transport(&self) -> MappedMutexGuard<'_, Transport> {
        MutexGuard::map(self.inner.lock(), |i| &mut i.transport)
    }

    fn config(&self) -> &[u8] {
        &self.mac
    }

    fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }
}
