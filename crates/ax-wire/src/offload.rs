//! What a frame leaves to be done by whoever carries it: the header before it (virtio 1.2, 5.1.6).
//!
//! A frame may come without its checksum, and as one segment far larger than the network's frames. Guest,
//! tap and the other host of a pair all speak of this by the same 12 bytes, none of which is believed: they
//! are parsed into [`Work`] against the frame behind them, and written anew from that.

mod tcp;

use crate::records::{Record, RecordKind};

/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER: usize = 12;

/// A header that leaves nothing to be done.
pub const NOTHING: [u8; HEADER] = [0; HEADER];

/// Shortest frame, bytes without FCS: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// Longest frame that no one cuts, bytes without FCS: a jumbo frame with room for tags.
pub const MAX_FRAME: usize = 9216;
/// Longest frame that is to be cut into segments, bytes: an IP packet with Ethernet header and a tag.
pub const MAX_SEGMENT: usize = 65_535 + 18;
/// Longest packet: header and frame.
pub const MAX_PACKET: usize = HEADER + MAX_SEGMENT;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Which work may be left to somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP, UDP and the like.
    pub checksum: bool,
    /// Cutting TCP over IPv4; needs `checksum`.
    pub tso4: bool,
    /// Cutting TCP over IPv6; needs `checksum`.
    pub tso6: bool,
    /// Cutting TCP segments that carry congestion notices; needs one of the two before.
    pub ecn: bool,
}

impl Offloads {
    /// None.
    pub const NONE: Offloads = Offloads {
        checksum: false,
        tso4: false,
        tso6: false,
        ecn: false,
    };

    /// All that there are.
    pub const ALL: Offloads = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };

    /// Without those that lack another one they need.
    #[must_use]
    pub fn usable(self) -> Offloads {
        let Offloads {
            checksum,
            tso4,
            tso6,
            ecn,
        } = self;
        Offloads {
            checksum,
            tso4: tso4 && checksum,
            tso6: tso6 && checksum,
            ecn: ecn && checksum && (tso4 || tso6),
        }
    }
}

/// Why a header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It leaves work to somebody who has not agreed to do it.
    #[error("it leaves work that nobody has agreed to do")]
    Unagreed,
    /// The checksum's place is not within the frame, behind its Ethernet header.
    #[error("its checksum does not lie within the frame")]
    Checksum,
    /// What is to be cut is no TCP segment of the kind that the header says, or into pieces of no size.
    #[error("what it wants cut is not a TCP segment of that kind")]
    Segment,
    /// The frame is shorter or longer than any may be.
    #[error("the frame has an impossible length")]
    Length,
}

/// The Internet checksum is to be put in: over all bytes from `start`, at `start + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// First byte covered.
    pub start: u16,
    /// Place of the checksum, from there.
    pub offset: u16,
}

/// What IP carries the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A TCP segment is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What carries it.
    pub ip: Ip,
    /// It carries a congestion notice (CWR).
    pub ecn: bool,
    /// Bytes of payload in each piece, 1 or more.
    pub size: u16,
    /// Bytes of all headers, Ethernet to TCP.
    pub headers: u16,
}

/// What is left to be done with one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The checksum.
    pub checksum: Option<Checksum>,
    /// There is nothing to be done, and the checksums were found right.
    pub verified: bool,
    /// The cutting; only with `checksum`.
    pub cut: Option<Cut>,
}

impl Work {
    /// Reads a header against the frame behind it, and against what was `agreed`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(header: &[u8; HEADER], frame: &[u8], agreed: Offloads) -> Result<Work, Malformed> {
        // The header's length is a hint, and the number of buffers is the device's to say.
        let [
            flags,
            gso,
            _,
            _,
            size_low,
            size_high,
            start_low,
            start_high,
            offset_low,
            offset_high,
            _,
            _,
        ] = *header;
        let checksum = if flags & NEEDS_CSUM != 0 {
            let checksum = Checksum {
                start: u16::from_le_bytes([start_low, start_high]),
                offset: u16::from_le_bytes([offset_low, offset_high]),
            };
            let end = usize::from(checksum.start) + usize::from(checksum.offset) + 2;
            if !agreed.checksum {
                return Err(Malformed::Unagreed);
            }
            if usize::from(checksum.start) < MIN_FRAME || end > frame.len() {
                return Err(Malformed::Checksum);
            }
            Some(checksum)
        } else {
            None
        };
        let cut = match gso & !GSO_ECN {
            GSO_NONE if gso == GSO_NONE => None,
            kind @ (GSO_TCPV4 | GSO_TCPV6) => {
                let (ip, may) = match kind {
                    GSO_TCPV4 => (Ip::V4, agreed.tso4),
                    _ => (Ip::V6, agreed.tso6),
                };
                let ecn = gso & GSO_ECN != 0;
                if !may || ecn && !agreed.ecn {
                    return Err(Malformed::Unagreed);
                }
                let size = u16::from_le_bytes([size_low, size_high]);
                let headers = checksum.and_then(|sum| tcp::headers(frame, ip, sum));
                match headers {
                    Some(headers) if size > 0 => Some(Cut {
                        ip,
                        ecn,
                        size,
                        headers,
                    }),
                    _ => return Err(Malformed::Segment),
                }
            }
            _ => return Err(Malformed::Unagreed),
        };
        let most = if cut.is_some() {
            MAX_SEGMENT
        } else {
            MAX_FRAME
        };
        if !(MIN_FRAME..=most).contains(&frame.len()) {
            return Err(Malformed::Length);
        }
        Ok(Work {
            checksum,
            verified: flags & DATA_VALID != 0 && checksum.is_none() && agreed.checksum,
            cut,
        })
    }

    /// The header that says this; the number of buffers is 0.
    pub fn header(&self) -> [u8; HEADER] {
        let mut header = NOTHING;
        let mut put = |at: usize, value: u16| {
            if let Some(place) = header.get_mut(at..at + 2) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        };
        if let Some(Checksum { start, offset }) = self.checksum {
            put(6, start);
            put(8, offset);
        }
        let mut gso = GSO_NONE;
        if let Some(cut) = self.cut {
            put(2, cut.headers);
            put(4, cut.size);
            gso = match cut.ip {
                Ip::V4 => GSO_TCPV4,
                Ip::V6 => GSO_TCPV6,
            } | if cut.ecn { GSO_ECN } else { 0 };
        }
        header[0] = match self.checksum {
            Some(_) => NEEDS_CSUM,
            None if self.verified => DATA_VALID,
            None => 0,
        };
        header[1] = gso;
        header
    }
}

/// A frame behind its header, in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// `None` for bytes that are shorter than a header.
    pub fn new(bytes: &'a [u8]) -> Option<Packet<'a>> {
        (bytes.len() >= HEADER).then_some(Packet(bytes))
    }

    /// All of it.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Its header.
    pub fn header(self) -> [u8; HEADER] {
        self.0.first_chunk().copied().unwrap_or(NOTHING)
    }

    /// Its frame.
    pub fn frame(self) -> &'a [u8] {
        self.0.get(HEADER..).unwrap_or_default()
    }

    /// The record of a frame that device `unit` has sent.
    pub fn sent(self, unit: u8) -> Record<'a> {
        self.record(RecordKind::Frame, RecordKind::FrameWithHeader, unit, 0)
    }

    /// The record of the frame that is the `seq`-th received for device `unit`.
    pub fn received(self, unit: u8, seq: u64) -> Record<'a> {
        self.record(
            RecordKind::Received,
            RecordKind::ReceivedWithHeader,
            unit,
            seq,
        )
    }

    fn record(self, plain: RecordKind, whole: RecordKind, unit: u8, at: u64) -> Record<'a> {
        let (kind, payload) = match self.header() == NOTHING {
            true => (plain, self.frame()),
            false => (whole, self.0),
        };
        Record {
            kind,
            unit,
            at,
            payload,
        }
    }
}

/// Header and frame of a record that carries a frame; `None` for any other.
pub fn carried<'a>(record: &Record<'a>) -> Option<([u8; HEADER], &'a [u8])> {
    match record.kind {
        RecordKind::Frame | RecordKind::Received => Some((NOTHING, record.payload)),
        RecordKind::FrameWithHeader | RecordKind::ReceivedWithHeader => {
            Packet::new(record.payload).map(|packet| (packet.header(), packet.frame()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
