//! The bytes of a file, without room for what was never written.

use std::collections::BTreeMap;

/// Room is taken in pieces of so many bytes.
pub(super) const BLOCK: u64 = 4096;

type Block = [u8; BLOCK as usize];

/// Bytes and holes.
#[derive(Debug, Clone, Default)]
pub(super) struct Sparse {
    blocks: BTreeMap<u64, Box<Block>>,
    size: u64,
}

/// A stretch inside one block: its number, and from where to where in it.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = at.saturating_add(len);
    let mut next = at;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let (number, from) = (next / BLOCK, next % BLOCK);
        let to = (end - number * BLOCK).min(BLOCK);
        next = (number + 1) * BLOCK;
        Some((number, from as usize, to as usize))
    })
}

impl Sparse {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes it takes.
    pub(super) fn taken(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// At most `len` bytes from `at`, fewer at the end.
    pub(super) fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let len = len.min(self.size.saturating_sub(at));
        let mut bytes = Vec::with_capacity(len as usize);
        for (number, from, to) in pieces(at, len) {
            match self.blocks.get(&number) {
                Some(block) => bytes.extend_from_slice(&block[from..to]),
                None => bytes.resize(bytes.len() + to - from, 0),
            }
        }
        bytes
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        let mut rest = data;
        for (number, from, to) in pieces(at, data.len() as u64) {
            let (part, others) = rest.split_at(to - from);
            rest = others;
            let block = self.blocks.entry(number);
            let block = block.or_insert_with(|| Box::new([0; BLOCK as usize]));
            block[from..to].copy_from_slice(part);
        }
        if !data.is_empty() {
            self.size = self.size.max(at + data.len() as u64);
        }
    }

    /// Makes these bytes zeros, as far as the file goes, and gives back the room of whole blocks.
    pub(super) fn punch(&mut self, at: u64, len: u64) {
        for (number, from, to) in pieces(at, len.min(self.size.saturating_sub(at))) {
            if to - from == BLOCK as usize {
                self.blocks.remove(&number);
            } else if let Some(block) = self.blocks.get_mut(&number) {
                block[from..to].fill(0);
            }
        }
    }

    pub(super) fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.punch(size, self.size - size);
            self.blocks.split_off(&size.div_ceil(BLOCK));
        }
        self.size = size;
    }

    /// True when a write there takes no more room than there is.
    pub(super) fn has_room(&self, at: u64, len: u64) -> bool {
        pieces(at, len).all(|(number, ..)| self.blocks.contains_key(&number))
    }

    /// Where data begins at or after `at`; none when only a hole follows.
    pub(super) fn data(&self, at: u64) -> Option<u64> {
        let (number, _) = self.blocks.range(at / BLOCK..).next()?;
        Some(at.max(number * BLOCK)).filter(|at| *at < self.size)
    }

    /// Where a hole begins at or after `at`; the end counts as one.
    pub(super) fn hole(&self, at: u64) -> u64 {
        let mut number = at / BLOCK;
        while self.blocks.contains_key(&number) {
            number += 1;
        }
        at.max(number * BLOCK).min(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_back_and_holes_are_zeros() {
        let mut file = Sparse::default();
        file.write(BLOCK - 2, b"abcd");
        assert_eq!((file.size(), file.taken()), (BLOCK + 2, 2 * BLOCK));
        assert_eq!(file.read(BLOCK - 3, 100), b"\0abcd");
        file.set_size(5 * BLOCK);
        assert_eq!((file.data(0), file.data(2 * BLOCK)), (Some(0), None));
        assert_eq!((file.hole(0), file.hole(5 * BLOCK)), (2 * BLOCK, 5 * BLOCK));
        file.punch(0, BLOCK);
        assert_eq!(file.data(0), Some(BLOCK));
        assert!(!file.has_room(0, BLOCK + 1) && file.has_room(BLOCK, 7));
        file.set_size(BLOCK + 1);
        file.set_size(2 * BLOCK);
        assert_eq!(file.read(BLOCK, 4), b"c\0\0\0");
        assert_eq!(file.read(2 * BLOCK, 1), b"");
    }
}
