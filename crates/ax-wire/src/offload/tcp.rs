//! Is it really a TCP segment that is to be cut?

use super::{Checksum, Ip, MIN_FRAME};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Customer and service tags (IEEE 802.1Q).
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const TAG: usize = 4;
/// Most tags before the packet.
const MOST_TAGS: usize = 2;

const TCP: u8 = 6;
/// Place of TCP's checksum in its header (RFC 9293, 3.1).
const TCP_CHECKSUM: u16 = 16;
const TCP_HEADER: usize = 20;

/// Extension headers that may precede TCP (RFC 8200, 4): hop-by-hop and destination options, routing.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// Most of them.
const MOST_EXTENSIONS: usize = 8;

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// Bytes of all headers of a whole TCP segment over `ip` whose checksum is where `sum` says; `None` when the
/// frame is anything else.
pub(super) fn headers(frame: &[u8], ip: Ip, sum: Checksum) -> Option<u16> {
    let mut packet = MIN_FRAME;
    let mut ethertype = word(frame, packet - 2)?;
    for _ in 0..MOST_TAGS {
        if TAGS.contains(&ethertype) {
            packet += TAG;
            ethertype = word(frame, packet - 2)?;
        }
    }
    let version = frame.get(packet)? >> 4;
    let tcp = match (ip, ethertype, version) {
        (Ip::V4, ETHERTYPE_IPV4, 4) => v4(frame, packet)?,
        (Ip::V6, ETHERTYPE_IPV6, 6) => v6(frame, packet)?,
        _ => return None,
    };
    if tcp != usize::from(sum.start) || sum.offset != TCP_CHECKSUM {
        return None;
    }
    let header = usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let end = tcp + header;
    if header < TCP_HEADER || end > frame.len() {
        return None;
    }
    u16::try_from(end).ok()
}

/// Where the TCP header begins.
fn v4(frame: &[u8], packet: usize) -> Option<usize> {
    const FRAGMENT: u16 = 0x3fff;
    let header = usize::from(frame.get(packet)? & 15) * 4;
    let fragment = word(frame, packet + 6)? & FRAGMENT != 0;
    let tcp = *frame.get(packet + 9)? == TCP;
    (header >= 20 && tcp && !fragment).then_some(packet + header)
}

/// As above.
fn v6(frame: &[u8], packet: usize) -> Option<usize> {
    let mut next = *frame.get(packet + 6)?;
    let mut at = packet + 40;
    for _ in 0..MOST_EXTENSIONS {
        if !EXTENSIONS.contains(&next) {
            break;
        }
        next = *frame.get(at)?;
        at += 8 + 8 * usize::from(*frame.get(at + 1)?);
    }
    (next == TCP).then_some(at)
}
