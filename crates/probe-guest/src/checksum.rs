//! Checksums of TCP and UDP over IPv4 that somebody else computes, or has looked at.

/// Place of the checksum in the header of TCP (RFC 9293, 3.1) and of UDP (RFC 768).
const TCP: (u8, usize) = (6, 16);
const UDP: (u8, usize) = (17, 6);

const ETHERNET: usize = 14;

/// A TCP segment or UDP datagram in an Ethernet frame.
struct Place {
    /// First byte of its header.
    start: usize,
    /// The byte after its last.
    end: usize,
    /// Place of its checksum, from `start`.
    offset: usize,
    /// Sum over its pseudo header.
    pseudo: u32,
}

/// The sum of 16-bit words, the last of which may be half.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    // At most 2¹⁵ words of 2¹⁶: no overflow.
    words.sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// `None` for frames that carry something else, or a part of it.
fn find(frame: &[u8]) -> Option<Place> {
    const FRAGMENT: u16 = 0x3fff;
    let packet = frame.get(ETHERNET..)?;
    if frame.get(12..ETHERNET)? != [8, 0] || packet.first()? >> 4 != 4 {
        return None;
    }
    let word = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let header = usize::from(packet.first()? & 15) * 4;
    let total = usize::from(word(2)?);
    let protocol = *packet.get(9)?;
    let (_, offset) = [TCP, UDP].into_iter().find(|(p, _)| *p == protocol)?;
    let inside = packet.get(header..total)?;
    if header < 20 || word(6)? & FRAGMENT != 0 || inside.len() < offset + 2 {
        return None;
    }
    let addresses = sum(packet.get(12..20)?);
    Some(Place {
        start: ETHERNET + header,
        end: ETHERNET + total,
        offset,
        pseudo: addresses + u32::from(protocol) + inside.len() as u32,
    })
}

/// Leaves a frame's checksum to be computed: what it is computed from is put in its place. Returns the first
/// byte that it covers and its place from there; `None` when the frame has none.
pub fn leave(frame: &mut [u8]) -> Option<(u16, u16)> {
    let place = find(frame)?;
    let at = place.start + place.offset;
    frame
        .get_mut(at..at + 2)?
        .copy_from_slice(&fold(place.pseudo).to_be_bytes());
    Some((
        u16::try_from(place.start).ok()?,
        u16::try_from(place.offset).ok()?,
    ))
}

/// Whether a frame's checksum is right; true for a frame without.
#[must_use]
pub fn is_right(frame: &[u8]) -> bool {
    let Some(place) = find(frame) else {
        return true;
    };
    let bytes = frame.get(place.start..place.end).unwrap_or_default();
    let unsaid = place.offset == UDP.1 && bytes.get(6..8) == Some(&[0, 0]);
    unsaid || fold(place.pseudo + sum(bytes)) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// UDP from 10.0.0.1:1 to 10.0.0.2:2, with padding behind it.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let len = 8 + payload.len() as u8;
        let mut frame = Vec::from([0; 12]);
        frame.extend([8, 0, 0x45, 0, 0, 20 + len, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2, 0, len, 0, 0]);
        frame.extend(payload);
        frame.extend([9; 3]);
        frame
    }

    /// What a device does that is left the checksum.
    fn complete(frame: &mut [u8], start: u16, offset: u16, end: usize) {
        let start = usize::from(start);
        let value = !fold(sum(&frame[start..end]));
        frame[start + usize::from(offset)..][..2].copy_from_slice(&value.to_be_bytes());
    }

    #[test]
    fn what_is_left_and_completed_is_right() {
        for payload in [&b""[..], b"x", b"even", b"another"] {
            let mut frame = datagram(payload);
            let end = frame.len() - 3;
            assert!(is_right(&frame), "a datagram may have none");
            assert_eq!(leave(&mut frame), Some((34, 6)));
            assert!(!is_right(&frame));
            complete(&mut frame, 34, 6, end);
            assert!(is_right(&frame));
            frame[30] ^= 1;
            assert!(!is_right(&frame));
        }
        // By hand: 10.0.0.1 and 10.0.0.2, 17, twice the length 8, ports 1 and 2.
        let mut frame = datagram(b"");
        leave(&mut frame);
        complete(&mut frame, 34, 6, 42);
        let by_hand: u16 = !(0x0a00 + 1 + 0x0a00 + 2 + 17 + 8 + 8 + 1 + 2);
        assert_eq!(frame[40..42], by_hand.to_be_bytes());
    }

    #[test]
    fn other_frames_are_left_alone() {
        let right = datagram(b"hello");
        for (at, value) in [
            (12, 9),
            (14, 0x65),
            (14, 0x44),
            (20, 0x20),
            (21, 1),
            (23, 1),
            (17, 200),
            (17, 27),
        ] {
            let mut frame = right.clone();
            frame[at] = value;
            let before = frame.clone();
            assert_eq!(leave(&mut frame), None, "byte {at}");
            assert!(is_right(&frame) && frame == before);
        }
        for len in 0..right.len() - 3 {
            assert_eq!(leave(&mut right[..len].to_vec()), None);
            assert!(is_right(&right[..len]));
        }
    }
}
