//! Fixed buffers whose pages cost nothing until they are used.

use ax_wire::PAGE_SIZE;

/// A fixed buffer filled from its start. Its memory comes zeroed from the kernel, so that only what
/// was ever used is resident.
///
/// It begins at a page's boundary, as guest pages do: where source and destination of a copy lie a few
/// bytes apart modulo 4096, as they do with what `malloc` gives, `rep movsb` (which glibc 2.36 takes for
/// copies of 4 to 512 KiB) is ten times slower on AMD's Zen 3 and 4 (glibc bug 30995).
#[derive(Debug)]
pub(crate) struct Arena {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Arena {
    pub(crate) fn new(capacity: usize) -> Arena {
        let bytes = vec![0u8; capacity + PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE).min(PAGE_SIZE);
        Arena {
            bytes,
            start,
            len: 0,
        }
    }

    /// The next `len` bytes (with whatever they held before), or none when they do not fit.
    pub(crate) fn grab(&mut self, len: usize) -> Option<&mut [u8]> {
        let end = self.len.checked_add(len)?;
        if end > self.capacity() {
            return None;
        }
        let slice = self
            .bytes
            .get_mut(self.start + self.len..self.start + end)?;
        self.len = end;
        Some(slice)
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len() - PAGE_SIZE
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes
            .get(self.start..self.start + self.len)
            .unwrap_or_default()
    }
}
