//! The virtio-mmio register window (version 2, "modern" only) and the queues behind it.
//!
//! Virtio 1.2, sections 2.1 (status), 4.2.2 (registers). An interrupt is an edge on the
//! device's irqfd; a driver that never changes configuration can leave InterruptStatus unread
//! and unacknowledged, which saves it two exits per interrupt.

use ax_failpoint::Point;
use tracing::warn;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::records::{QueueRecord, TransportRecord};
use super::ring::{Fault, Ring};
use crate::memory::GuestMemory;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"AX  ");

/// Most queues of any device here.
pub(super) const MOST_QUEUES: usize = 2;

/// Features every device here offers.
pub(super) const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a register write asks for beyond the register file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The guest rang this queue's doorbell.
    Notify(usize),
    /// The driver is ready: queues may already hold buffers.
    Started,
    /// The driver has reset the device.
    Reset,
}

/// What the guest has told about a queue; `ready` once it is checked and in use.
#[derive(Debug, Default)]
struct Slot {
    max: u16,
    size: u32,
    desc: u64,
    avail: u64,
    used: u64,
    ready: Option<Queue>,
    /// See [`Ring::looked_at`]. Not saved: after a restore every interrupt is raised.
    looked_at: u16,
}

impl Slot {
    /// The queue these registers describe, if all of it lies in RAM.
    fn build(&self, mem: &GuestMemory, event_idx: bool, at: (u16, u16)) -> Result<Queue, Fault> {
        let size = u16::try_from(self.size).map_err(|_| Fault::Ring)?;
        let queue = Queue::try_from(QueueState {
            max_size: self.max,
            next_avail: at.0,
            next_used: at.1,
            event_idx_enabled: event_idx,
            size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })
        .map_err(|_| Fault::Ring)?;
        let size = usize::from(size);
        let inside = |at, len, access| mem.check_range(GuestAddress(at), len, access);
        // The event fields behind both rings belong to them whether or not they are used.
        let whole = self.avail != 0
            && inside(self.desc, 16 * size, Permissions::Read)
            && inside(self.avail, 6 + 2 * size, Permissions::Read)
            && inside(self.used, 6 + 8 * size, Permissions::Write);
        if whole { Ok(queue) } else { Err(Fault::Ring) }
    }
}

/// Registers and queues of one device.
#[derive(Debug)]
pub(super) struct Transport {
    name: String,
    device_id: u32,
    offered: u64,
    mem: GuestMemory,
    irq: EventFd,
    warned: bool,
    /// How often the queues were taken away (reset, restore): a request begun before belongs to
    /// nobody any more. Not guest state.
    life: u64,
    status: u32,
    interrupts: u32,
    device_sel: u32,
    driver_sel: u32,
    accepted: u64,
    queue_sel: u32,
    slots: [Slot; MOST_QUEUES],
}

/// A checked [`TransportRecord`], ready to be put in place.
#[derive(Debug)]
pub(super) struct Restored {
    record: TransportRecord,
    slots: [Slot; MOST_QUEUES],
}

impl Transport {
    /// A device `name` after reset. `sizes` are its queues' largest sizes, powers of two.
    pub(super) fn new(
        name: String,
        device_id: u32,
        features: u64,
        sizes: &[u16],
        mem: GuestMemory,
        irq: EventFd,
    ) -> Self {
        let mut slots: [Slot; MOST_QUEUES] = Default::default();
        for (slot, max) in slots.iter_mut().zip(sizes) {
            slot.max = *max;
        }
        Transport {
            name,
            device_id,
            offered: features | COMMON_FEATURES,
            mem,
            irq,
            warned: false,
            life: 0,
            status: 0,
            interrupts: 0,
            device_sel: 0,
            driver_sel: 0,
            accepted: 0,
            queue_sel: 0,
            slots,
        }
    }

    /// Reads the 32-bit register at `offset` (below the configuration space).
    pub(super) fn read(&self, offset: u64) -> u32 {
        let slot = self.slots.get(self.queue_sel as usize);
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => slot.map_or(0, |s| s.max.into()),
            VIRTIO_MMIO_QUEUE_READY => slot.map_or(0, |s| s.ready.is_some().into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts,
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory region: length and base are all ones.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes: its generation stays 0.
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset`. What makes no sense at this point is ignored.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Effect {
        let negotiated = self.negotiated();
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if !negotiated => {
                let value = u64::from(value);
                match self.driver_sel {
                    0 => self.accepted = self.accepted >> 32 << 32 | value,
                    1 => self.accepted = self.accepted & u64::from(u32::MAX) | value << 32,
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                let queue = value as usize;
                if self.slots.get(queue).is_some_and(|s| s.ready.is_some()) {
                    return Effect::Notify(queue);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupts &= !value,
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            register if negotiated => self.write_queue(register, value),
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        // The driver only adds bits, and NEEDS_RESET is not the driver's.
        let before = self.status;
        let mut status = before | value & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let version_1 = self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
        if !version_1 || self.accepted & !self.offered != 0 {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status = status;
        if status & !before & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            Effect::Started
        } else {
            Effect::None
        }
    }

    fn write_queue(&mut self, register: u32, value: u32) {
        fn low(of: &mut u64, value: u32) {
            *of = *of >> 32 << 32 | u64::from(value);
        }
        fn high(of: &mut u64, value: u32) {
            *of = *of & u64::from(u32::MAX) | u64::from(value) << 32;
        }
        let event_idx = self.event_idx();
        let Some(slot) = self
            .slots
            .get_mut(self.queue_sel as usize)
            .filter(|s| s.max > 0)
        else {
            return;
        };
        if register == VIRTIO_MMIO_QUEUE_READY {
            if value == 0 {
                if slot.ready.take().is_some() {
                    self.life += 1;
                }
            } else if slot.ready.is_none() {
                match slot.build(&self.mem, event_idx, (0, 0)) {
                    Ok(queue) => (slot.ready, slot.looked_at) = (Some(queue), 0),
                    Err(fault) => self.fail(fault),
                }
            }
            return;
        }
        if slot.ready.is_some() {
            return; // fixed while in use
        }
        match register {
            VIRTIO_MMIO_QUEUE_NUM => slot.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut slot.desc, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut slot.desc, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut slot.avail, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut slot.avail, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut slot.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut slot.used, value),
            _ => {}
        }
    }

    /// Back to how the device was made.
    pub(super) fn reset(&mut self) {
        self.life += 1;
        (self.status, self.interrupts, self.accepted) = (0, 0, 0);
        (self.device_sel, self.driver_sel, self.queue_sel) = (0, 0, 0);
        for slot in &mut self.slots {
            *slot = Slot {
                max: slot.max,
                ..Slot::default()
            };
        }
    }

    fn event_idx(&self) -> bool {
        self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    /// True when the driver has accepted feature `bit`.
    pub(super) fn accepted(&self, bit: u32) -> bool {
        self.accepted & 1 << bit != 0
    }

    /// Whether features are agreed on.
    pub(super) fn negotiated(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0
    }

    /// Which life of the queues this is: a request taken in an earlier one must not be completed.
    pub(super) fn life(&self) -> u64 {
        self.life
    }

    /// True when the driver is ready and the device not broken.
    pub(super) fn running(&self) -> bool {
        let bits = VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status & bits == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// Queue `index`, when the device is running and the guest has made it ready.
    pub(super) fn ring(&mut self, index: usize) -> Option<Ring<'_>> {
        if !self.running() {
            return None;
        }
        let slot = self.slots.get_mut(index)?;
        Some(Ring {
            queue: slot.ready.as_mut()?,
            mem: &self.mem,
            looked_at: &mut slot.looked_at,
        })
    }

    /// Raises the used-buffer interrupt, if the driver wants one for queue `index`.
    pub(super) fn signal_used(&mut self, index: usize) {
        match self.ring(index).map(|mut r| r.wants_interrupt()) {
            Some(Ok(true)) => self.interrupt(VIRTIO_MMIO_INT_VRING),
            Some(Err(fault)) => self.fail(fault),
            Some(Ok(false)) | None => {}
        }
    }

    /// Raises the used-buffer interrupt whether or not it was raised before (rule 12).
    pub(super) fn signal_anyway(&mut self) {
        if self.running() {
            self.interrupt(VIRTIO_MMIO_INT_VRING);
        }
    }

    /// Marks the device broken: it does nothing until the driver resets it.
    pub(super) fn fail(&mut self, fault: Fault) {
        if !self.warned {
            self.warned = true;
            warn!(device = self.name, %fault, "the guest broke a device; it needs a reset (said once)");
        }
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn interrupt(&mut self, why: u32) {
        self.interrupts |= why;
        if ax_failpoint::fails(Point::Interrupt) {
            return;
        }
        if let Err(error) = self.irq.write(1)
            && !self.warned
        {
            self.warned = true;
            warn!(device = self.name, %error, "cannot raise an interrupt (said once)");
        }
    }

    /// What [`Transport::check`] takes back.
    pub(super) fn record(&self) -> TransportRecord {
        let mut queues = [QueueRecord::default(); MOST_QUEUES];
        for (record, slot) in queues.iter_mut().zip(&self.slots) {
            *record = QueueRecord {
                desc: slot.desc,
                avail: slot.avail,
                used: slot.used,
                size: slot.size,
                next_avail: slot.ready.as_ref().map_or(0, |q| q.next_avail()),
                next_used: slot.ready.as_ref().map_or(0, |q| q.next_used()),
                ready: slot.ready.is_some().into(),
            };
        }
        TransportRecord {
            accepted: self.accepted,
            status: self.status,
            interrupts: self.interrupts,
            device_sel: self.device_sel,
            driver_sel: self.driver_sel,
            queue_sel: self.queue_sel,
            unused: 0,
            queues,
        }
    }

    /// Checks a record against this device and its memory.
    pub(super) fn check(&self, record: &TransportRecord) -> Result<Restored, &'static str> {
        if record.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && record.accepted & !self.offered != 0
        {
            return Err("it uses features this device does not offer");
        }
        let mut slots: [Slot; MOST_QUEUES] = Default::default();
        for ((slot, mine), queue) in slots.iter_mut().zip(&self.slots).zip(&record.queues) {
            *slot = Slot {
                max: mine.max,
                size: queue.size,
                desc: queue.desc,
                avail: queue.avail,
                used: queue.used,
                ready: None,
                looked_at: queue.next_used,
            };
            if queue.ready != 0 {
                let event_idx = record.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
                let at = (queue.next_avail, queue.next_used);
                let queue = slot.build(&self.mem, event_idx, at);
                slot.ready = Some(queue.map_err(|_| "a queue of it is impossible")?);
            }
        }
        Ok(Restored {
            record: *record,
            slots,
        })
    }

    /// Puts a checked record in place. Touches no guest memory and raises nothing.
    pub(super) fn load(&mut self, restored: Restored) {
        let Restored { record, slots } = restored;
        self.life += 1;
        self.status = record.status;
        self.interrupts = record.interrupts;
        (self.device_sel, self.driver_sel) = (record.device_sel, record.driver_sel);
        (self.accepted, self.queue_sel) = (record.accepted, record.queue_sel);
        self.slots = slots;
    }
}
