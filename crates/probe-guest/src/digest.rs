//! XXH64 with seed 0 over whole 32-byte stripes, streaming: fast enough for whole disks and
//! memories, and known to everyone, so a host can check the guest's answers.

const P1: u64 = 0x9e37_79b1_85eb_ca87;
const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const P3: u64 = 0x1656_67b1_9e37_79f9;
const P4: u64 = 0x85eb_ca77_c2b2_ae63;

/// A digest under way.
#[derive(Debug, Clone)]
pub struct Digest {
    lanes: [u64; 4],
    len: u64,
}

impl Default for Digest {
    fn default() -> Self {
        Self {
            lanes: [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)],
            len: 0,
        }
    }
}

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(P2))
        .rotate_left(31)
        .wrapping_mul(P1)
}

impl Digest {
    /// Adds `bytes`, whose length is a multiple of 32 (pages and sectors are); what is beyond
    /// the last whole 32 bytes is left out.
    pub fn update(&mut self, bytes: &[u8]) {
        for stripe in bytes.as_chunks::<32>().0 {
            for (lane, word) in self.lanes.iter_mut().zip(stripe.as_chunks::<8>().0) {
                *lane = round(*lane, u64::from_le_bytes(*word));
            }
            self.len += 32;
        }
    }

    /// The digest of everything added so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        let mut h = if self.len == 0 {
            0x27d4_eb2f_1656_67c5
        } else {
            let [a, b, c, d] = self.lanes;
            let mut h = a
                .rotate_left(1)
                .wrapping_add(b.rotate_left(7))
                .wrapping_add(c.rotate_left(12))
                .wrapping_add(d.rotate_left(18));
            for lane in self.lanes {
                h = (h ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4);
            }
            h
        };
        h = h.wrapping_add(self.len);
        h = (h ^ (h >> 33)).wrapping_mul(P2);
        h = (h ^ (h >> 29)).wrapping_mul(P3);
        h ^ (h >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> u64 {
        let mut d = Digest::default();
        d.update(bytes);
        d.value()
    }

    // Reference values: xxhsum (XXH64), seed 0.
    #[test]
    fn is_xxh64() {
        assert_eq!(of(b""), 0xef46_db37_51d8_e999);
        assert_eq!(
            of(b"0123456789abcdef0123456789abcdef"),
            0x642a_9495_8e71_e6c5
        );
    }

    #[test]
    fn is_the_same_in_pieces_and_sees_every_byte() {
        let whole: [u8; 4096] = core::array::from_fn(|i| (i * 7 % 251) as u8);
        let mut d = Digest::default();
        d.update(&whole[..1024]);
        d.update(&whole[1024..]);
        assert_eq!(d.value(), of(&whole));
        for at in (0..4096).step_by(97) {
            let mut other = whole;
            other[at] ^= 1;
            assert_ne!(of(&other), of(&whole), "byte {at}");
        }
    }
}
