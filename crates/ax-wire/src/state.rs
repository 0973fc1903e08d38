//! Saved machine state: fixed blocks tagged (kind, version, index), each with its CRC32.
//!
//! A block is a 16-byte header and its payload, padded with zeros to 8 bytes. Kinds are owned
//! by whoever saves them (`vmm` lists its own in one enum). Writing never allocates: the buffer
//! is preallocated and a block that does not fit is an error, not a growth.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

/// What precedes each block's payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct BlockHeader {
    /// Which state this is.
    pub kind: little_endian::U16,
    /// The layout's version.
    pub version: little_endian::U16,
    /// Which of several (vCPU number, device number).
    pub index: little_endian::U32,
    /// Payload length, bytes, without padding.
    pub len: little_endian::U32,
    /// CRC32 (IEEE) of the payload.
    pub crc: little_endian::U32,
}

const HEADER: usize = size_of::<BlockHeader>();

/// The preallocated buffer is too small for the state to save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "state block kind {kind} of {len} bytes does not fit: {room} bytes left of the state buffer"
)]
pub struct StateFull {
    /// The block's kind.
    pub kind: u16,
    /// Its payload's length.
    pub len: usize,
    /// What was left.
    pub room: usize,
}

/// Appends blocks to a preallocated buffer.
#[derive(Debug)]
pub struct StateWriter<'a> {
    buf: &'a mut Vec<u8>,
}

impl<'a> StateWriter<'a> {
    /// Starts with an empty buffer; only its capacity is used.
    pub fn new(buf: &'a mut Vec<u8>) -> Self {
        buf.clear();
        StateWriter { buf }
    }

    /// Appends one block. Its bytes are copied.
    ///
    /// # Errors
    /// [`StateFull`] when it would outgrow the buffer's capacity; the buffer is as before.
    pub fn block(
        &mut self,
        kind: u16,
        version: u16,
        index: u32,
        payload: &[u8],
    ) -> Result<(), StateFull> {
        let padded = payload.len().next_multiple_of(8);
        let room = self.buf.capacity() - self.buf.len();
        let full = StateFull {
            kind,
            len: payload.len(),
            room,
        };
        let len = u32::try_from(payload.len()).map_err(|_| full)?;
        if HEADER + padded > room {
            return Err(full);
        }
        let header = BlockHeader {
            kind: kind.into(),
            version: version.into(),
            index: index.into(),
            len: len.into(),
            crc: crc32fast::hash(payload).into(),
        };
        self.buf.extend_from_slice(header.as_bytes());
        self.buf.extend_from_slice(payload);
        self.buf.resize(self.buf.len() + padded - payload.len(), 0);
        Ok(())
    }

    /// Appends blocks that were written elsewhere before.
    ///
    /// # Errors
    /// As [`StateWriter::block`]; the kind is 0.
    pub fn append(&mut self, blocks: &[u8]) -> Result<(), StateFull> {
        let room = self.buf.capacity() - self.buf.len();
        if blocks.len() > room {
            return Err(StateFull {
                kind: 0,
                len: blocks.len(),
                room,
            });
        }
        self.buf.extend_from_slice(blocks);
        Ok(())
    }
}

/// One block read back, its CRC checked.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Which state this is.
    pub kind: u16,
    /// The layout's version.
    pub version: u16,
    /// Which of several.
    pub index: u32,
    /// The saved bytes.
    pub payload: &'a [u8],
}

/// Why saved state could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The buffer ends inside a block.
    #[error("state is truncated at byte {at}")]
    Truncated {
        /// Offset of the block's header.
        at: usize,
    },
    /// A block's bytes are not those that were written.
    #[error("state block kind {kind} index {index} at byte {at} fails its CRC32")]
    Crc {
        /// The block's kind.
        kind: u16,
        /// The block's index.
        index: u32,
        /// Offset of the block's header.
        at: usize,
    },
}

/// Reads blocks one after the other; stops after the first error.
#[derive(Clone, Debug)]
pub struct StateReader<'a> {
    buf: &'a [u8],
    at: usize,
}

impl<'a> StateReader<'a> {
    /// Reads from the start of `buf`.
    pub fn new(buf: &'a [u8]) -> Self {
        StateReader { buf, at: 0 }
    }

    fn read(&mut self) -> Result<Block<'a>, StateError> {
        let at = self.at;
        let truncated = StateError::Truncated { at };
        let rest = self.buf.get(at..).unwrap_or_default();
        let (header, rest) = BlockHeader::read_from_prefix(rest).map_err(|_| truncated)?;
        let len = header.len.get() as usize;
        let payload = rest.get(..len).ok_or(truncated)?;
        let (kind, index) = (header.kind.get(), header.index.get());
        if crc32fast::hash(payload) != header.crc.get() {
            return Err(StateError::Crc { kind, index, at });
        }
        self.at = at + HEADER + len.next_multiple_of(8);
        Ok(Block {
            kind,
            version: header.version.get(),
            index,
            payload,
        })
    }
}

impl<'a> Iterator for StateReader<'a> {
    type Item = Result<Block<'a>, StateError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.buf.len() {
            return None;
        }
        let block = self.read();
        if block.is_err() {
            self.at = self.buf.len();
        }
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(blocks: &[(u16, u16, u32, Vec<u8>)]) -> Vec<u8> {
        let mut buf = Vec::with_capacity(1 << 20);
        let mut writer = StateWriter::new(&mut buf);
        for (kind, version, index, payload) in blocks {
            writer.block(*kind, *version, *index, payload).unwrap();
        }
        buf
    }

    proptest! {
        #[test]
        fn what_was_written_reads_back(
            blocks in prop::collection::vec(
                (any::<u16>(), any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..100)),
                0..20,
            )
        ) {
            let buf = written(&blocks);
            let read: Vec<_> = StateReader::new(&buf)
                .map(|b| b.map(|b| (b.kind, b.version, b.index, b.payload.to_vec())))
                .collect::<Result<_, _>>()
                .unwrap();
            prop_assert_eq!(read, blocks);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            StateReader::new(&bytes).for_each(drop);
        }

        #[test]
        fn a_flipped_payload_bit_is_found(at in 16usize..48, bit in 0u8..8) {
            let mut buf = written(&[(7, 1, 0, vec![0xa5; 32])]);
            buf[at] ^= 1 << bit;
            prop_assert!(StateReader::new(&buf).any(|b| b.is_err()));
        }
    }

    #[test]
    fn a_full_buffer_is_an_error_and_keeps_what_it_had() {
        let mut buf = Vec::with_capacity(64);
        let capacity = buf.capacity();
        let mut writer = StateWriter::new(&mut buf);
        writer.block(1, 1, 0, &[1; 8]).unwrap();
        assert!(writer.block(2, 1, 0, &vec![2; capacity]).is_err());
        assert_eq!(StateReader::new(&buf).count(), 1);
    }
}
