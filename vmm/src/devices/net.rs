//! virtio-net: frames out through [`Outputs`], frames in from whoever reads the tap.
//!
//! Every frame goes behind a 12-byte header ([`ax_wire::offload`]). What the headers may ask for is what driver
//! and device have agreed on; both the guest's and a received one are parsed against that before they are
//! passed on, and what is malformed is dropped and counted. What is agreed is part of the transport's state,
//! so a frame never meets another agreement than that of its guest, wherever that runs.

mod features;
mod queues;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_wire::offload::{MAX_PACKET, Malformed, Offloads, Packet};
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::eventfd::EventFd;

use super::records::NetRecord;
use super::ring::Segments;
use super::transport::{Restored, Transport};
use super::{RxOutcome, Virtio};
use crate::config::NicConfig;
use crate::memory::GuestMemory;
use crate::ports::Outputs;
use queues::Chains;

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// The events of one network device.
pub(super) struct NetEvents {
    pub(super) doorbells: [EventFd; 2],
    /// Written when a receiver that was turned away should try again.
    pub(super) wakeup: EventFd,
    /// Written when what is agreed on may have changed.
    pub(super) renegotiated: EventFd,
}

/// One network device.
pub(super) struct Net {
    nic: u8,
    mac: [u8; 6],
    outputs: Arc<dyn Outputs>,
    pub(super) events: NetEvents,
    inner: Mutex<Inner>,
    /// The outputs were full: the transmit queue waits for `unblock`.
    blocked: AtomicBool,
}

struct Inner {
    nic: u8,
    transport: Transport,
    segments: Segments,
    chains: Chains,
    packet: Box<[u8; MAX_PACKET]>,
    received: u64,
    /// A receiver was turned away. Not saved: one that is turned away again sets it again.
    starved: bool,
    /// Frames dropped because of their headers. Not guest state.
    malformed: u64,
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
        config: NicConfig,
        outputs: Arc<dyn Outputs>,
        mem: GuestMemory,
        irq: EventFd,
        events: NetEvents,
    ) -> Self {
        let name = format!("net{nic}");
        let features = features::offered(config.offload);
        let sizes = [QUEUE_SIZE; 2];
        Net {
            nic,
            mac: config.mac,
            outputs,
            events,
            inner: Mutex::new(Inner {
                nic,
                transport: Transport::new(name, VIRTIO_ID_NET, features, &sizes, mem, irq),
                segments: Segments::default(),
                chains: Chains::default(),
                packet: Box::new([0; MAX_PACKET]),
                received: 0,
                starved: false,
                malformed: 0,
            }),
            blocked: AtomicBool::new(false),
        }
    }

    /// Sends a batch of frames. True when there may be more to send at once. Inside the gate.
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
    pub(super) fn receive(&self, packet: Packet<'_>) -> RxOutcome {
        let mut inner = self.inner.lock();
        match inner.receive(packet) {
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
            let _ = self.events.wakeup.write(1);
        }
    }

    /// True when the transmit queue waits for room in the outputs.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::SeqCst)
    }

    /// If the transmit queue waited for room in the outputs, rings its doorbell.
    pub(super) fn unblock(&self) {
        if self.blocked.swap(false, Ordering::SeqCst) {
            let [_, tx] = &self.events.doorbells;
            let _ = tx.write(1);
        }
    }

    pub(super) fn received(&self) -> u64 {
        self.inner.lock().received
    }

    pub(super) fn malformed(&self) -> u64 {
        self.inner.lock().malformed
    }

    /// What received frames may leave to the guest.
    pub(super) fn offloads(&self) -> Offloads {
        features::guest(&self.inner.lock().transport)
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
        drop(inner);
        self.renegotiated();
    }

    /// Hands a frame out; false when there is no room for it.
    ///
    /// "Blocked" is said before the last try: room made after that try failed is then announced
    /// to a device that is seen to wait, so no wakeup is lost.
    fn send(&self, packet: Packet<'_>) -> bool {
        if self.outputs.frame(self.nic, packet).is_ok() {
            return true;
        }
        self.blocked.store(true, Ordering::SeqCst);
        let sent = self.outputs.frame(self.nic, packet).is_ok();
        if sent {
            self.blocked.store(false, Ordering::SeqCst);
        }
        sent
    }
}

/// Counts a frame that is dropped because of its header, and says so the first time.
fn drop_malformed(count: &mut u64, nic: u8, from: &str, why: Malformed) {
    if *count == 0 {
        warn!(device = %format_args!("net{nic}"), %why, "a frame {from} is dropped (said once)");
    }
    *count += 1;
}

impl Virtio for Net {
    fn transport(&self) -> MappedMutexGuard<'_, Transport> {
        MutexGuard::map(self.inner.lock(), |i| &mut i.transport)
    }

    fn config(&self) -> &[u8] {
        &self.mac
    }

    fn doorbells(&self) -> &[EventFd] {
        &self.events.doorbells
    }

    fn renegotiated(&self) {
        // A full counter means that the word is pending.
        let _ = self.events.renegotiated.write(1);
    }
}
