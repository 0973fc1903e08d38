//! virtio-net as smoltcp's device.
//!
//! Buffers are few and used again at once (transmission last in, first out), so that traffic
//! keeps touching the same pages. A frame too large for one comes in several and is put together.

use alloc::vec::Vec;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::queue::{Buffer, SIZE};
use super::{Queue, Transport, take_dma};

/// VIRTIO_NET_F_MAC.
const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_CSUM: the device computes the checksums of what is sent.
const F_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM: what is received may lack its checksum.
const F_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_GUEST_TSO4: TCP comes in segments as large as the sockets' windows.
const F_GUEST_TSO4: u64 = 1 << 7;
/// VIRTIO_NET_F_MRG_RXBUF: a frame may come in several buffers.
const F_MERGE: u64 = 1 << 15;
/// Taken together or not at all. No window is as large as all buffers of the queue.
const F_OFFLOAD: u64 = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_MERGE;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_F_DATA_VALID.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// virtio_net_hdr_v1.
const HEADER: usize = 12;
const MTU: usize = 1514;
const BUFFER: usize = 1536;
const N: usize = SIZE as usize;

/// The receiving half.
pub struct Rx {
    queue: Queue,
    buffers: *mut u8,
    /// Taken by the stack; goes back to the device at the next chance.
    held: Option<u16>,
    /// A frame that came in several buffers.
    whole: Vec<u8>,
    offload: bool,
}

/// The sending half.
pub struct Tx {
    queue: Queue,
    buffers: *mut u8,
    free: [u16; N],
    n_free: usize,
    offload: bool,
}

/// One network device.
pub struct Net {
    transport: Transport,
    rx: Rx,
    tx: Tx,
    /// Its address.
    pub mac: [u8; 6],
    /// Frames received and sent.
    pub frames: [u64; 2],
}

impl Net {
    /// Takes over the device.
    pub fn new(mut transport: Transport, offload: bool) -> Option<Self> {
        let features = transport.negotiate(|offered| match offload {
            true if offered & F_OFFLOAD == F_OFFLOAD => F_MAC | F_OFFLOAD,
            _ => F_MAC,
        })?;
        let offload = features & F_OFFLOAD == F_OFFLOAD;
        let mut mac = [0x02, 0, 0, 0, 0, 1];
        if features & F_MAC != 0 {
            transport.config(0, &mut mac);
        }
        let mut it = Self {
            rx: Rx {
                queue: transport.queue(0, features)?,
                buffers: take_dma(N * BUFFER, 512)?.as_mut_ptr(),
                held: None,
                whole: Vec::with_capacity(if offload { N * BUFFER } else { 0 }),
                offload,
            },
            tx: Tx {
                queue: transport.queue(1, features)?,
                buffers: take_dma(N * BUFFER, 512)?.as_mut_ptr(),
                free: core::array::from_fn(|i| SIZE - 1 - i as u16),
                n_free: N,
                offload,
            },
            transport,
            mac,
            frames: [0; 2],
        };
        for id in 0..SIZE {
            it.rx.offer(id);
        }
        it.tx.queue.no_interrupt();
        it.transport.ready();
        it.rx.queue.kick();
        Some(it)
    }

    /// Whether the device computes checksums and gives large segments.
    pub fn offload(&self) -> bool {
        self.tx.offload
    }

    /// Before looking for frames: see [`Transport::acknowledge`].
    pub fn acknowledge(&mut self) {
        self.transport.acknowledge();
    }

    /// Passes on what was sent and returned since the last time.
    pub fn kick(&mut self) {
        self.rx.give_back();
        self.rx.queue.kick();
        self.tx.queue.kick();
    }

    /// Readies the device for the CPU's sleep; true if there is work already.
    pub fn before_sleep(&mut self) -> bool {
        let rx = self.rx.queue.want_interrupt();
        // A full transmit queue is worth waking for, finished frames are not.
        let tx = self.tx.n_free == 0 && self.tx.queue.want_interrupt();
        rx || tx
    }

    /// After the sleep: polling needs no interrupts.
    pub fn after_sleep(&mut self) {
        self.rx.queue.no_interrupt();
        self.tx.queue.no_interrupt();
    }
}

impl Rx {
    fn at(&self, id: u16) -> *mut u8 {
        self.buffers.wrapping_add(usize::from(id) * BUFFER)
    }

    fn offer(&mut self, id: u16) {
        let b = Buffer {
            addr: self.at(id),
            len: BUFFER as u32,
            writable: true,
        };
        self.queue.offer(id, &[b]);
    }

    fn give_back(&mut self) {
        if let Some(id) = self.held.take() {
            self.offer(id);
        }
    }

    /// `len` bytes of buffer `id`.
    fn bytes(&self, id: u16, len: u32) -> &[u8] {
        let len = (len as usize).min(BUFFER);
        // SAFETY: within the buffer, which the device is done with; it gets it back only by `offer`, which
        // needs `&mut self`.
        unsafe { core::slice::from_raw_parts(self.at(id), len) }
    }

    /// The next frame that is whole and right, without its header; none if there is none.
    fn next(&mut self) -> Option<&[u8]> {
        loop {
            self.give_back();
            let (id, len) = self.queue.take()?;
            self.held = Some(id);
            let [flags, .., low, high] = *self.bytes(id, len).first_chunk::<HEADER>()?;
            let buffers = u16::from_le_bytes([low, high]);
            let several = self.offload && buffers > 1;
            if several {
                self.put_together(id, len, buffers);
            }
            let known = !self.offload || flags & (NEEDS_CSUM | DATA_VALID) != 0;
            if known || crate::checksum::is_right(self.frame(id, len, several)) {
                // Found again, as what is borrowed here can't be handed out of a loop.
                return Some(self.frame(id, len, several));
            }
        }
    }

    fn frame(&self, id: u16, len: u32, several: bool) -> &[u8] {
        let bytes = match several {
            true => &self.whole,
            false => self.bytes(id, len),
        };
        bytes.get(HEADER..).unwrap_or_default()
    }

    /// Copies the buffers of one frame, of which `id` is the first, behind each other. The device has handed
    /// over all of them at once.
    fn put_together(&mut self, id: u16, len: u32, buffers: u16) {
        let mut whole = core::mem::take(&mut self.whole);
        whole.clear();
        whole.extend_from_slice(self.bytes(id, len));
        for _ in 1..buffers {
            let Some((id, len)) = self.queue.take() else {
                break;
            };
            // A device that hands over more than there are buffers must not have the heap grow.
            if whole.len() + BUFFER <= whole.capacity() {
                whole.extend_from_slice(self.bytes(id, len));
            }
            self.offer(id);
        }
        self.whole = whole;
    }
}

impl Tx {
    fn reclaim(&mut self) {
        while let Some((id, _)) = self.queue.take() {
            // A device that answers twice must not overflow the list.
            if self.n_free < N {
                self.free[self.n_free] = id;
                self.n_free += 1;
            }
        }
    }
}

impl Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        self.tx.reclaim();
        if self.tx.n_free == 0 {
            self.rx.give_back();
            return None;
        }
        let frame = self.rx.next()?;
        let [received, sent] = &mut self.frames;
        *received += 1;
        Some((
            RxToken(frame),
            TxToken {
                tx: &mut self.tx,
                sent,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.tx.reclaim();
        (self.tx.n_free > 0).then(|| TxToken {
            tx: &mut self.tx,
            sent: &mut self.frames[1],
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = MTU;
        if self.tx.offload {
            (caps.checksum.tcp, caps.checksum.udp) = (Checksum::None, Checksum::None);
        }
        caps
    }
}

/// A received frame.
pub struct RxToken<'a>(&'a [u8]);

impl smoltcp::phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// The right to send one frame.
pub struct TxToken<'a> {
    tx: &'a mut Tx,
    sent: &'a mut u64,
}

impl smoltcp::phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        *self.sent += 1;
        self.tx.n_free -= 1;
        let id = self.tx.free[self.tx.n_free];
        let at = self.tx.buffers.wrapping_add(usize::from(id) * BUFFER);
        let len = len.min(MTU);
        // SAFETY: a free buffer of BUFFER >= HEADER + MTU bytes, not the device's now.
        let (header, frame) =
            unsafe { core::slice::from_raw_parts_mut(at, HEADER + len) }.split_at_mut(HEADER);
        header.fill(0);
        let result = f(frame);
        if self.tx.offload
            && let Some((start, offset)) = crate::checksum::leave(frame)
        {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        let b = Buffer {
            addr: at,
            len: (HEADER + len) as u32,
            writable: false,
        };
        self.tx.queue.offer(id, &[b]);
        result
    }
}
