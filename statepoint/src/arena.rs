//! Fixed buffers whose pages cost nothing until they are used.

use ax_wire::PageAligned;

/// A fixed buffer filled from its start. Its memory comes zeroed from the kernel, so that only what
/// was ever used is resident.
#[derive(Debug)]
pub(crate) struct Arena {
    bytes: PageAligned<u8>,
    len: usize,
}

impl Arena {
    pub(crate) fn new(capacity: usize) -> Arena {
        Arena {
            bytes: PageAligned::new(capacity),
            len: 0,
        }
    }

    /// The next `len` bytes (with whatever they held before), or none when they do not fit.
    pub(crate) fn grab(&mut self, len: usize) -> Option<&mut [u8]> {
        let end = self.len.checked_add(len)?;
        let slice = self.bytes.get_mut(self.len..end)?;
        self.len = end;
        Some(slice)
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
