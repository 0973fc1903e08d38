//! The ledger's record: one 512-byte sector each, in order of their numbers.
//!
//! A record carries the checksum of the one before it. Sectors written by an append
//! that was never acknowledged, and overtaken by another after a restart, thus cannot come back
//! to life as the tail's continuation.

/// Bytes of a record on disk.
pub const RECORD: usize = 512;
const HEADER: usize = 32;
/// Most payload bytes of a record.
pub const MAX_PAYLOAD: usize = RECORD - HEADER;
const MAGIC: [u8; 8] = *b"AXLEDGR1";

/// What the first record has for the checksum of its predecessor.
pub const GENESIS: u64 = 0;

/// Why a payload cannot be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

// Layout, little-endian: magic 8, number u64, checksum of the predecessor u64, checksum of
// this one's other bytes u32, reserved u16, payload length u16, payload, zeros.

/// Writes record `number` and returns its link: the checksum its successor carries.
///
/// # Errors
/// [`TooLong`] beyond [`MAX_PAYLOAD`] bytes.
pub fn encode(
    number: u64,
    link: u64,
    payload: &[u8],
    out: &mut [u8; RECORD],
) -> Result<u64, TooLong> {
    let len = u16::try_from(payload.len()).map_err(|_| TooLong)?;
    if payload.len() > MAX_PAYLOAD {
        return Err(TooLong);
    }
    out.fill(0);
    out[..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&number.to_le_bytes());
    out[16..24].copy_from_slice(&link.to_le_bytes());
    out[30..32].copy_from_slice(&len.to_le_bytes());
    out[HEADER..HEADER + payload.len()].copy_from_slice(payload);
    let sum = checksum(out);
    out[24..28].copy_from_slice(&sum.to_le_bytes());
    Ok(link_of(out))
}

/// Reads the payload and link of record `number`; `None` if the sector holds anything else.
/// The predecessor's link is checked where it is known.
#[must_use]
pub fn decode(number: u64, link: Option<u64>, sector: &[u8; RECORD]) -> Option<(&[u8], u64)> {
    let mut bare = *sector;
    bare[24..28].fill(0);
    let len = usize::from(u16::from_le_bytes([sector[30], sector[31]]));
    let good = sector[..8] == MAGIC
        && sector[8..16] == number.to_le_bytes()
        && link.is_none_or(|l| sector[16..24] == l.to_le_bytes())
        && len <= MAX_PAYLOAD
        && sector[24..28] == checksum(&bare).to_le_bytes();
    good.then(|| (&sector[HEADER..HEADER + len], link_of(sector)))
}

fn link_of(sector: &[u8; RECORD]) -> u64 {
    let mut d = crate::digest::Digest::default();
    d.update(sector);
    d.value()
}

/// CRC-32 (IEEE 802.3).
fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &b in bytes {
        crc = TABLE[usize::from((crc as u8) ^ b)] ^ (crc >> 8);
    }
    !crc
}

static TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = if c & 1 != 0 {
                0xedb8_8320 ^ (c >> 1)
            } else {
                c >> 1
            };
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_wrote() {
        let mut s = [0xaa; RECORD];
        let link = encode(7, 99, b"payload", &mut s).unwrap();
        assert_eq!(decode(7, Some(99), &s), Some((&b"payload"[..], link)));
        assert_eq!(decode(7, None, &s), Some((&b"payload"[..], link)));
        assert_eq!(decode(8, None, &s), None);
        assert_eq!(decode(7, Some(98), &s), None);
        assert_eq!(decode(0, None, &[0; RECORD]), None);
    }

    #[test]
    fn notices_every_flipped_bit() {
        let mut s = [0; RECORD];
        encode(1, GENESIS, &[0x55; MAX_PAYLOAD], &mut s).unwrap();
        for at in 0..RECORD {
            let mut bad = s;
            bad[at] ^= 0x10;
            assert_eq!(decode(1, Some(GENESIS), &bad), None, "byte {at}");
        }
    }

    #[test]
    fn a_stale_continuation_is_no_record() {
        let (mut a, mut b, mut c) = ([0; RECORD], [0; RECORD], [0; RECORD]);
        let lost = encode(1, GENESIS, b"never acknowledged", &mut a).unwrap();
        encode(2, lost, b"never acknowledged either", &mut b).unwrap();
        let kept = encode(1, GENESIS, b"acknowledged", &mut c).unwrap();
        assert_eq!(decode(2, Some(kept), &b), None);
    }

    #[test]
    fn checksum_is_crc32() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn refuses_long_payloads() {
        let mut s = [0; RECORD];
        assert_eq!(encode(0, 0, &[0; MAX_PAYLOAD + 1], &mut s), Err(TooLong));
        assert_eq!(encode(0, 0, &[0; 70_000], &mut s), Err(TooLong));
        assert!(encode(0, 0, &[0; MAX_PAYLOAD], &mut s).is_ok());
    }
}
