//! The generator behind `WORK`: splitmix64, so that a seed determines every byte written.

/// A reproducible sequence of 64-bit numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence(u64);

impl Sequence {
    /// The sequence of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Lets the rest of the sequence depend on `word` too.
    pub fn absorb(&mut self, word: u64) {
        self.0 ^= word.rotate_left(17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Reference values: splitmix64.c by Vigna, seed 1234567.
    #[test]
    fn is_splitmix64() {
        let mut s = Sequence::new(1_234_567);
        assert_eq!(s.next_number(), 6_457_827_717_110_365_317);
        assert_eq!(s.next_number(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn depends_on_what_it_absorbs() {
        let (mut a, mut b) = (Sequence::new(1), Sequence::new(1));
        a.absorb(5);
        assert_ne!(a.next_number(), b.next_number());
    }
}
