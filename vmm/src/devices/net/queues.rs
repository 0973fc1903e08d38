//! Frames between the queues and the outside.

use ax_wire::offload::{HEADER, MAX_PACKET, Malformed, Offloads, Packet, Work};
use virtio_queue::QueueT;

use super::super::RxOutcome;
use super::super::ring::{Fault, Ring, Segments};
use super::{Inner, Net, RX, TX, drop_malformed, features};

/// Frames sent per passage of the gate, and the bytes after which no other one is: both bound how long a
/// capture waits.
const BATCH: usize = 8;
const BATCH_BYTES: usize = 64 << 10;

/// Descriptor chains that one received frame takes: each one's head and the bytes that it takes.
#[derive(Debug)]
pub(super) struct Chains {
    all: [(u16, u32); Segments::MOST],
    count: u16,
}

impl Default for Chains {
    fn default() -> Self {
        Chains {
            all: [(0, 0); Segments::MOST],
            count: 0,
        }
    }
}

impl Chains {
    fn iter(&self) -> impl Iterator<Item = &(u16, u32)> {
        self.all.iter().take(self.count.into())
    }

    /// False when there are too many.
    fn add(&mut self, head: u16, bytes: u32) -> bool {
        let place = self.all.get_mut(usize::from(self.count));
        let known = place.map(|place| *place = (head, bytes)).is_some();
        self.count += u16::from(known);
        known
    }

    fn untake(&mut self, ring: &mut Ring<'_>) {
        for _ in 0..std::mem::take(&mut self.count) {
            ring.untake();
        }
    }
}

/// How the search for room for a frame ended.
enum Room {
    /// There is.
    Found,
    /// More buffers may come.
    NotYet,
    /// There will never be.
    Never,
}

impl Inner {
    /// Sends up to [`BATCH`] frames. True when there may be more.
    pub(super) fn transmit(&mut self, net: &Net, sent: &mut bool) -> Result<bool, Fault> {
        let agreed = features::host(&self.transport);
        let Inner {
            transport,
            segments,
            packet,
            malformed,
            nic,
            ..
        } = self;
        let Some(mut ring) = transport.ring(TX) else {
            return Ok(false);
        };
        let mut bytes = 0;
        for _ in 0..BATCH {
            if bytes >= BATCH_BYTES {
                break;
            }
            let Some(chain) = ring.next()? else {
                if ring.arm()? {
                    continue;
                }
                return Ok(false);
            };
            ring.disarm()?;
            segments.parse(ring.mem, chain)?;
            if segments.read_len < HEADER {
                return Err(Fault::TooShort);
            }
            bytes += segments.read_len;
            let (head, len) = (segments.head, segments.read_len.min(MAX_PACKET + 1));
            let checked = match packet.get_mut(..len) {
                Some(packet) => {
                    segments.read(ring.mem, 0, packet)?;
                    check(packet, agreed)
                }
                None => Err(Malformed::Length),
            };
            match checked {
                Ok(packet) if !net.send(packet) => {
                    ring.untake();
                    return Ok(false);
                }
                Ok(_) => {}
                Err(why) => drop_malformed(malformed, *nic, "of the guest", why),
            }
            ring.used(head, 0)?;
            *sent = true;
        }
        Ok(true)
    }

    pub(super) fn receive(&mut self, packet: Packet<'_>) -> Result<RxOutcome, Fault> {
        self.starved = true;
        let merges = features::merges(&self.transport);
        let agreed = features::guest(&self.transport);
        let Inner {
            transport,
            segments,
            chains,
            ..
        } = self;
        let Some(mut ring) = transport.ring(RX) else {
            return Ok(RxOutcome::NotReady);
        };
        let work = Work::parse(&packet.header(), packet.frame(), agreed);
        let room = match work {
            Ok(_) => chains.find(&mut ring, segments, packet.bytes().len(), merges)?,
            Err(_) => Room::Never,
        };
        if let Room::NotYet = room {
            return Ok(RxOutcome::NoBuffers);
        }
        self.starved = false;
        self.received = self.received.wrapping_add(1);
        let work = match work {
            Ok(work) => work,
            Err(why) => {
                drop_malformed(&mut self.malformed, self.nic, "for the guest", why);
                return Ok(RxOutcome::Dropped);
            }
        };
        if let Room::Never = room {
            return Ok(RxOutcome::Dropped);
        }
        ring.disarm()?;
        let mut header = work.header();
        let [.., low, high] = &mut header;
        [*low, *high] = chains.count.to_le_bytes();
        segments.write(ring.mem, 0, &header)?;
        segments.write(ring.mem, HEADER, packet.frame())?;
        // The driver takes all buffers of a frame at once, so it must not see some of them before the others.
        for (ahead, (head, bytes)) in (0..).zip(chains.iter()) {
            ring.fill(ahead, *head, *bytes)?;
        }
        ring.publish(chains.count)?;
        Ok(RxOutcome::Delivered)
    }
}

/// The guest's frame behind a header that says what was understood and no more.
fn check(packet: &mut [u8], agreed: Offloads) -> Result<Packet<'_>, Malformed> {
    let (header, frame) = packet
        .split_first_chunk_mut::<HEADER>()
        .ok_or(Malformed::Length)?;
    let work = Work::parse(header, frame, agreed)?;
    // That checksums are right is for the device to say (5.1.6.2.1).
    *header = Work {
        verified: false,
        ..work
    }
    .header();
    Packet::new(packet).ok_or(Malformed::Length)
}

impl Chains {
    /// Takes as many chains as `len` bytes need, or none.
    fn find(
        &mut self,
        ring: &mut Ring<'_>,
        segments: &mut Segments,
        len: usize,
        merges: bool,
    ) -> Result<Room, Fault> {
        self.count = 0;
        segments.clear();
        loop {
            let mut chain = ring.next()?;
            if chain.is_none() && ring.arm()? {
                chain = ring.next()?;
            }
            let Some(chain) = chain else {
                self.untake(ring);
                return Ok(Room::NotYet);
            };
            let before = segments.write_len;
            let added = segments.add(ring.mem, chain);
            if added == Err(Fault::TooMany) && self.count > 0 {
                // Each chain is right; there are only more buffers than any frame needs.
                ring.untake();
                self.untake(ring);
                return Ok(Room::Never);
            }
            added?;
            let used = segments.write_len.min(len) - before;
            if !self.add(segments.head, used as u32) {
                ring.untake();
                self.untake(ring);
                return Ok(Room::Never);
            }
            if segments.write_len >= len {
                return Ok(Room::Found);
            }
            if !merges || self.count >= ring.queue.size() {
                self.untake(ring);
                return Ok(Room::Never);
            }
        }
    }
}
