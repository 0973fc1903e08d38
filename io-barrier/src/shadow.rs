//! Outputs of committed epochs, kept by the shadow until the primary says they are released.

use std::collections::VecDeque;

use ax_wire::EpochId;
use ax_wire::records::{Record, RecordKind, Records};

/// The primary had more unreleased outputs committed than a right one can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("outputs of epoch {epoch:?}: {bytes} bytes more than the {max} that may be unreleased")]
pub struct ShadowOutputsFull {
    /// The epoch that did not fit.
    pub epoch: EpochId,
    /// What it brought.
    pub bytes: usize,
    /// The bound.
    pub max: usize,
}

/// Released console bytes that are remembered: those a reader may not have got from the primary's
/// host before it died (rule 8).
const CONSOLE_BYTES: usize = 256 << 10;

/// The last released console bytes.
#[derive(Debug)]
struct ConsoleTail {
    /// Stream offset after the last byte.
    end: u64,
    bytes: VecDeque<u8>,
}

impl ConsoleTail {
    fn add(&mut self, at: u64, bytes: &[u8]) {
        if at > self.end {
            self.bytes.clear();
            self.end = at;
        }
        let seen = usize::try_from(self.end - at).unwrap_or(usize::MAX);
        let new = bytes.get(seen..).unwrap_or_default();
        let new = new
            .get(new.len().saturating_sub(CONSOLE_BYTES)..)
            .unwrap_or_default();
        let excess = (self.bytes.len() + new.len()).saturating_sub(CONSOLE_BYTES);
        self.bytes.drain(..excess);
        self.bytes.extend(new);
        self.end = self.end.max(at.saturating_add(bytes.len() as u64));
    }
}

/// Outputs by committed epoch, ascending (rule 6).
#[derive(Debug)]
pub struct ShadowOutputs {
    epochs: VecDeque<(EpochId, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
    held: usize,
    max: usize,
    released: EpochId,
    console: ConsoleTail,
}

impl ShadowOutputs {
    /// Keeps at most `max` bytes.
    pub fn new(max: usize) -> ShadowOutputs {
        ShadowOutputs {
            epochs: VecDeque::with_capacity(32),
            spare: Vec::new(),
            held: 0,
            max,
            released: EpochId(0),
            console: ConsoleTail {
                end: 0,
                bytes: VecDeque::with_capacity(CONSOLE_BYTES),
            },
        }
    }

    /// The primary has released every output of epochs ≤ `released`.
    pub fn released(&mut self, released: EpochId) {
        self.released = self.released.max(released);
        while self
            .epochs
            .front()
            .is_some_and(|(e, _)| *e <= self.released)
        {
            if let Some((_, mut buf)) = self.epochs.pop_front() {
                self.held -= buf.len();
                Records::new(&buf)
                    .map_while(Result::ok)
                    .filter(|r| r.kind == RecordKind::Console)
                    .for_each(|r| self.console.add(r.at, r.payload));
                buf.clear();
                self.spare.push(buf);
            }
        }
    }

    /// Hands over the last console bytes known released, in order, each piece with its stream offset.
    pub fn released_console(&self, mut take: impl FnMut(u64, &[u8])) {
        let (first, second) = self.console.bytes.as_slices();
        let middle = self.console.end.saturating_sub(second.len() as u64);
        for (at, bytes) in [
            (middle.saturating_sub(first.len() as u64), first),
            (middle, second),
        ] {
            if !bytes.is_empty() {
                take(at, bytes);
            }
        }
    }

    /// Last epoch known released.
    pub fn last_released(&self) -> EpochId {
        self.released
    }

    /// True when `bytes` more may be kept.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.held + bytes <= self.max
    }

    /// Bytes kept.
    pub fn len(&self) -> usize {
        self.held
    }

    /// True when nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }

    /// Keeps a committed epoch's output records.
    ///
    /// # Errors
    /// [`ShadowOutputsFull`]; nothing is kept of it.
    pub fn push(&mut self, epoch: EpochId, records: &[u8]) -> Result<(), ShadowOutputsFull> {
        if !self.has_room(records.len()) {
            return Err(ShadowOutputsFull {
                epoch,
                bytes: records.len(),
                max: self.max,
            });
        }
        if records.is_empty() || epoch <= self.released {
            return Ok(());
        }
        let mut buf = self.spare.pop().unwrap_or_default();
        buf.extend_from_slice(records);
        self.held += buf.len();
        self.epochs.push_back((epoch, buf));
        Ok(())
    }

    /// Every output not known released, in order. Records were checked when they were staged; a
    /// broken one ends its epoch's.
    pub fn unreleased(&self) -> impl Iterator<Item = (EpochId, Record<'_>)> {
        self.epochs.iter().flat_map(|(epoch, buf)| {
            Records::new(buf)
                .map_while(Result::ok)
                .map(move |r| (*epoch, r))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_wire::records::{RecordKind, push};

    fn frame(at: u64) -> Vec<u8> {
        let mut buf = Vec::with_capacity(4096);
        assert!(push(
            &mut buf,
            Record {
                kind: RecordKind::Frame,
                unit: 0,
                at,
                payload: b"x"
            }
        ));
        buf
    }

    fn kept(outputs: &ShadowOutputs) -> Vec<(u64, u64)> {
        outputs.unreleased().map(|(e, r)| (e.0, r.at)).collect()
    }

    #[test]
    fn what_is_not_known_released_is_kept_in_order() {
        let mut outputs = ShadowOutputs::new(1 << 16);
        for epoch in 1..=4 {
            outputs.push(EpochId(epoch), &frame(10 * epoch)).unwrap();
        }
        outputs.push(EpochId(5), &[]).unwrap();
        outputs.released(EpochId(2));
        assert_eq!(kept(&outputs), [(3, 30), (4, 40)]);
        outputs.released(EpochId(1));
        assert_eq!(kept(&outputs), [(3, 30), (4, 40)]);
        outputs.released(EpochId(9));
        assert!(outputs.is_empty());
        assert_eq!(outputs.len(), 0);
    }

    fn console(at: u64, payload: &[u8]) -> Vec<u8> {
        let mut buf = Vec::with_capacity(payload.len() + 64);
        assert!(push(
            &mut buf,
            Record {
                kind: RecordKind::Console,
                unit: 0,
                at,
                payload
            }
        ));
        buf
    }

    fn told(outputs: &ShadowOutputs) -> (u64, Vec<u8>) {
        let (mut start, mut all) = (None, Vec::new());
        outputs.released_console(|at, bytes| {
            let first = *start.get_or_insert(at);
            assert_eq!(at, first + all.len() as u64, "pieces follow each other");
            all.extend_from_slice(bytes);
        });
        (start.unwrap_or(0), all)
    }

    #[test]
    fn the_last_console_bytes_are_remembered_when_they_are_released() {
        let mut outputs = ShadowOutputs::new(2 * CONSOLE_BYTES);
        outputs.push(EpochId(1), &console(100, b"hello ")).unwrap();
        outputs.push(EpochId(2), &console(106, b"world")).unwrap();
        assert_eq!(told(&outputs).1, b"");
        outputs.released(EpochId(1));
        assert_eq!(told(&outputs), (100, b"hello ".to_vec()));
        outputs.released(EpochId(2));
        assert_eq!(told(&outputs), (100, b"hello world".to_vec()));
        // What comes again is the same; what was missed leaves a gap that is not hidden.
        outputs.push(EpochId(3), &console(109, b"ld!")).unwrap();
        outputs.released(EpochId(3));
        assert_eq!(told(&outputs), (100, b"hello world!".to_vec()));
        outputs.push(EpochId(4), &console(500, b"later")).unwrap();
        outputs.released(EpochId(4));
        assert_eq!(told(&outputs), (500, b"later".to_vec()));
        let long: Vec<u8> = (0..CONSOLE_BYTES).map(|n| n as u8).collect();
        outputs.push(EpochId(5), &console(505, &long)).unwrap();
        outputs.released(EpochId(5));
        assert_eq!(told(&outputs), (505, long));
    }

    #[test]
    fn a_primary_that_never_releases_is_found_out() {
        let mut outputs = ShadowOutputs::new(50);
        outputs.push(EpochId(1), &frame(1)).unwrap();
        outputs.push(EpochId(2), &frame(2)).unwrap();
        assert!(outputs.push(EpochId(3), &frame(3)).is_err());
        assert_eq!(kept(&outputs), [(1, 1), (2, 2)]);
    }

    #[test]
    fn console_offsets_at_the_end_of_numbers_are_no_panic() {
        let mut outputs = ShadowOutputs::new(1 << 16);
        for (epoch, at) in [(1, u64::MAX - 1), (2, u64::MAX), (3, 0)] {
            let mut buf = Vec::with_capacity(64);
            let record = Record {
                kind: RecordKind::Console,
                unit: 0,
                at,
                payload: b"hostile",
            };
            assert!(push(&mut buf, record));
            outputs.push(EpochId(epoch), &buf).unwrap();
        }
        outputs.released(EpochId(3));
        outputs.released_console(|_, _| {});
    }
}
