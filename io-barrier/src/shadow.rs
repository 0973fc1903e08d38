//! Outputs of committed epochs, kept by the shadow until the primary says they are released.

use std::collections::VecDeque;

use ax_wire::EpochId;
use ax_wire::records::{Record, Records};

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

/// Outputs by committed epoch, ascending (rule 6).
#[derive(Debug)]
pub struct ShadowOutputs {
    epochs: VecDeque<(EpochId, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
    held: usize,
    max: usize,
    released: EpochId,
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
                buf.clear();
                self.spare.push(buf);
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

    #[test]
    fn a_primary_that_never_releases_is_found_out() {
        let mut outputs = ShadowOutputs::new(50);
        outputs.push(EpochId(1), &frame(1)).unwrap();
        outputs.push(EpochId(2), &frame(2)).unwrap();
        assert!(outputs.push(EpochId(3), &frame(3)).is_err());
        assert_eq!(kept(&outputs), [(1, 1), (2, 2)]);
    }
}
