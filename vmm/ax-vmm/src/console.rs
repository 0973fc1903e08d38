//! The console as the outside sees it: released bytes, remembered, each at its stream offset.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// Bytes remembered for a reader that comes later.
const REMEMBERED: usize = 256 << 10;

#[derive(Default)]
struct Inner {
    /// Offset of the first remembered byte.
    start: u64,
    bytes: VecDeque<u8>,
    closed: bool,
    /// Counts [`Console::dismiss`].
    dismissals: u64,
}

/// How far one reader has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset of the next byte it gets.
    pub at: u64,
    dismissals: u64,
}

/// Released console bytes. A byte at an offset seen before is the same byte sent again (rule 6)
/// and is dropped here, so that a reader sees each once (rule 8).
#[derive(Default)]
pub struct Console {
    inner: Mutex<Inner>,
    more: Condvar,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.inner.lock();
        write!(f, "Console({}..+{})", inner.start, inner.bytes.len())
    }
}

impl Console {
    /// An empty console.
    pub fn new() -> Arc<Console> {
        Arc::new(Console::default())
    }

    /// Takes released bytes that begin at stream offset `at`.
    pub fn released(&self, at: u64, bytes: &[u8]) {
        let mut inner = self.inner.lock();
        let end = inner.start + inner.bytes.len() as u64;
        if at > end {
            // The other side had the guest meanwhile, and said more than is remembered.
            inner.bytes.clear();
            inner.start = at;
        }
        let end = inner.start + inner.bytes.len() as u64;
        let seen = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        if let Some(new) = bytes.get(seen..) {
            inner.bytes.extend(new);
        }
        let excess = inner.bytes.len().saturating_sub(REMEMBERED);
        inner.bytes.drain(..excess);
        inner.start += excess as u64;
        self.more.notify_all();
    }

    /// No more will come; waiting readers are told.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        self.more.notify_all();
    }

    /// The guest goes on elsewhere: whoever reads here is told to look for it there.
    pub fn dismiss(&self) {
        self.inner.lock().dismissals += 1;
        self.more.notify_all();
    }

    /// Where a reader that wants byte `from` begins: there, or at the first byte remembered.
    pub fn begin(&self, from: Option<u64>) -> Place {
        let inner = self.inner.lock();
        Place {
            at: from.unwrap_or(0).max(inner.start),
            dismissals: inner.dismissals,
        }
    }

    /// Appends to `out` what there is from `place` on, waiting at most `patience` for the first byte;
    /// false when nothing will ever come here. That is so too for a reader that fell behind what is
    /// remembered: it counts its bytes, so it must begin anew and be told where.
    pub fn read(
        &self,
        place: &mut Place,
        out: &mut Vec<u8>,
        patience: std::time::Duration,
    ) -> bool {
        let mut inner = self.inner.lock();
        let over = |inner: &Inner| inner.closed || inner.dismissals != place.dismissals;
        if inner.start + inner.bytes.len() as u64 <= place.at && !over(&inner) {
            self.more.wait_for(&mut inner, patience);
        }
        if place.at < inner.start {
            return false;
        }
        let skip = usize::try_from(place.at - inner.start).unwrap_or(usize::MAX);
        let before = out.len();
        out.extend(inner.bytes.iter().skip(skip));
        let over = over(&inner);
        place.at += (out.len() - before) as u64;
        !(over && out.len() == before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_byte_released_again_is_seen_once() {
        let console = Console::new();
        console.released(0, b"hello ");
        console.released(3, b"lo wor");
        console.released(9, b"ld");
        console.released(2, b"llo");
        let (mut at, mut out) = (console.begin(None), Vec::new());
        assert!(console.read(&mut at, &mut out, Duration::ZERO));
        assert_eq!(out, b"hello world");
        assert_eq!(at.at, 11);
    }

    #[test]
    fn a_console_that_begins_after_a_failover_keeps_the_guests_offsets() {
        let console = Console::new();
        console.released(1000, b"abc");
        assert_eq!(console.begin(Some(1001)).at, 1001);
        assert_eq!(console.begin(Some(5)).at, 1000);
        let (mut at, mut out) = (console.begin(Some(1001)), Vec::new());
        assert!(console.read(&mut at, &mut out, Duration::ZERO));
        assert_eq!(out, b"bc");
        console.close();
        out.clear();
        assert!(!console.read(&mut at, &mut out, Duration::ZERO));
    }

    #[test]
    fn what_another_side_said_meanwhile_is_no_silent_gap() {
        let console = Console::new();
        console.released(0, b"abc");
        console.released(100, b"xyz");
        assert_eq!(console.begin(Some(3)).at, 100);
        let (mut at, mut out) = (console.begin(Some(3)), Vec::new());
        assert!(console.read(&mut at, &mut out, Duration::ZERO));
        assert_eq!(out, b"xyz");
    }

    #[test]
    fn only_the_last_bytes_are_remembered() {
        let console = Console::new();
        console.released(0, &vec![1; REMEMBERED]);
        console.released(REMEMBERED as u64, &[2; 10]);
        assert_eq!(console.begin(None).at, 10);
    }

    #[test]
    fn a_reader_is_told_when_it_must_begin_anew() {
        let console = Console::new();
        console.released(0, b"abc");
        let (mut slow, mut out) = (console.begin(None), Vec::new());
        console.released(3, &vec![1; REMEMBERED]);
        assert!(!console.read(&mut slow, &mut out, Duration::ZERO));
        assert!(out.is_empty());
        assert_eq!(console.begin(Some(slow.at)).at, 3);

        let mut reader = console.begin(Some(3));
        assert!(console.read(&mut reader, &mut out, Duration::ZERO));
        console.dismiss();
        let mut later = console.begin(Some(reader.at));
        out.clear();
        assert!(!console.read(&mut reader, &mut out, Duration::ZERO));
        console.released(reader.at, b"again here");
        assert!(console.read(&mut later, &mut out, Duration::ZERO));
        assert_eq!(out, b"again here");
    }
}
