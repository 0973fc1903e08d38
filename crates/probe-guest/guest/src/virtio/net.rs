//! virtio-net as smoltcp's device.
//!
//! Buffers are few and used again at once (transmission last in, first out), so that traffic
//! keeps touching the same pages.

use smoltcp::phy::{Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::queue::{Buffer, SIZE};
use super::{Queue, Transport, take_dma};

/// VIRTIO_NET_F_MAC.
const F_MAC: u64 = 1 << 5;
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
}

/// The sending half.
pub struct Tx {
    queue: Queue,
    buffers: *mut u8,
    free: [u16; N],
    n_free: usize,
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
    pub fn new(mut transport: Transport) -> Option<Self> {
        let features = transport.negotiate(F_MAC)?;
        let mut mac = [0x02, 0, 0, 0, 0, 1];
        if features & F_MAC != 0 {
            transport.config(0, &mut mac);
        }
        let mut it = Self {
            rx: Rx {
                queue: transport.queue(0, features)?,
                buffers: take_dma(N * BUFFER, 512)?.as_mut_ptr(),
                held: None,
            },
            tx: Tx {
                queue: transport.queue(1, features)?,
                buffers: take_dma(N * BUFFER, 512)?.as_mut_ptr(),
                free: core::array::from_fn(|i| SIZE - 1 - i as u16),
                n_free: N,
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
        self.rx.give_back();
        self.tx.reclaim();
        if self.tx.n_free == 0 {
            return None;
        }
        let (id, len) = self.rx.queue.take()?;
        self.rx.held = Some(id);
        let len = (len as usize).clamp(HEADER, BUFFER) - HEADER;
        // SAFETY: the device is done with this buffer and gets it back only at the next
        // `give_back`, which needs `&mut self`; len is within it.
        let frame =
            unsafe { core::slice::from_raw_parts(self.rx.at(id).wrapping_add(HEADER), len) };
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
        let b = Buffer {
            addr: at,
            len: (HEADER + len) as u32,
            writable: false,
        };
        self.tx.queue.offer(id, &[b]);
        result
    }
}
