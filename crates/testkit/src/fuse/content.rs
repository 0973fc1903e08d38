//! A file's content twice: as programs see it, and as a power cut would leave it at the least.

use super::sparse::Sparse;
use super::{Loss, Lot};

/// What a disk writes as one.
pub const SECTOR: u64 = 512;
/// With more than so many bytes unflushed, the oldest are written out, as a kernel does by itself.
const MOST_UNFLUSHED: u64 = 64 << 20;

/// A change of a file's content.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Write { at: u64, data: Vec<u8> },
    Size(u64),
    Punch { at: u64, len: u64 },
}

impl Change {
    fn bytes(&self) -> u64 {
        match self {
            Change::Write { data, .. } => data.len() as u64,
            Change::Size(_) | Change::Punch { .. } => 0,
        }
    }

    fn apply(&self, to: &mut Sparse) {
        match self {
            Change::Write { at, data } => to.write(*at, data),
            Change::Size(size) => to.set_size(*size),
            Change::Punch { at, len } => to.punch(*at, *len),
        }
    }

    /// Applies some of its sectors.
    fn apply_torn(&self, to: &mut Sparse, lot: &mut Lot) {
        let Change::Write { at, data } = self else {
            return;
        };
        // Some of them, or those before a place.
        let scattered = lot.chance.below(2) == 0;
        let whole = data.len() as u64 / SECTOR + 2;
        let stop = lot.chance.below(whole);
        let mut next = 0;
        for number in 0.. {
            let end = (at / SECTOR + number + 1) * SECTOR - at;
            let end = usize::try_from(end).unwrap_or(data.len()).min(data.len());
            let keep = match scattered {
                true => lot.chance.below(2) == 0,
                false => number < stop,
            };
            if keep {
                to.write(at + next as u64, data.get(next..end).unwrap_or_default());
            }
            next = end;
            if next == data.len() {
                return;
            }
        }
    }
}

/// The content of one file.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    now: Sparse,
    durable: Sparse,
    pending: Vec<Change>,
    bytes: u64,
}

impl Content {
    pub(super) fn now(&self) -> &Sparse {
        &self.now
    }

    pub(super) fn change(&mut self, change: Change) {
        change.apply(&mut self.now);
        self.bytes += change.bytes();
        self.pending.push(change);
        if self.bytes > MOST_UNFLUSHED {
            let half = self.pending.len().div_ceil(2);
            for change in self.pending.drain(..half) {
                self.bytes -= change.bytes();
                change.apply(&mut self.durable);
            }
        }
    }

    /// Everything so far is durable.
    pub(super) fn flush(&mut self) {
        for change in self.pending.drain(..) {
            change.apply(&mut self.durable);
        }
        self.bytes = 0;
    }

    /// Making it durable has failed: programs go on seeing it, no later flush tries again, as Linux has it.
    pub(super) fn flush_failed(&mut self) {
        self.pending.clear();
        self.bytes = 0;
    }

    /// What a power cut leaves.
    pub(super) fn cut(&mut self, lot: &mut Lot, loss: &mut Loss) {
        for change in self.pending.drain(..) {
            if lot.keeps() {
                loss.kept += 1;
                change.apply(&mut self.durable);
            } else if lot.tears() {
                loss.torn += 1;
                change.apply_torn(&mut self.durable, lot);
            } else {
                loss.lost += 1;
            }
        }
        self.bytes = 0;
        self.now = self.durable.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(at: u64, byte: u8, len: usize) -> Change {
        Change::Write {
            at,
            data: vec![byte; len],
        }
    }

    #[test]
    fn what_was_flushed_stays_whatever_is_drawn_and_the_rest_tears_at_sectors() {
        let (mut torn, mut lost, mut kept) = (0, 0, 0);
        for seed in 0..200 {
            let mut file = Content::default();
            file.change(written(0, 1, 4096));
            file.flush();
            file.change(written(100, 2, 2000));
            let (mut lot, mut loss) = (Lot::new(seed), Loss::default());
            file.cut(&mut lot, &mut loss);
            let bytes = file.now().read(0, 5000);
            assert_eq!(bytes.len(), 4096);
            let turns: Vec<usize> = (1..4096).filter(|n| bytes[*n] != bytes[n - 1]).collect();
            let allowed =
                |at: &usize| at.is_multiple_of(SECTOR as usize) || [100, 2100].contains(at);
            assert!(turns.iter().all(allowed), "{turns:?}");
            match bytes.iter().filter(|b| **b == 2).count() {
                0 => lost += 1,
                2000 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(torn > 10 && lost > 10 && kept > 10, "{torn} {lost} {kept}");
    }

    #[test]
    fn after_a_flush_that_failed_no_later_one_makes_up_for_it() {
        let mut file = Content::default();
        file.change(written(0, 1, 512));
        file.flush_failed();
        assert_eq!(file.now().read(0, 1), [1]);
        file.change(written(512, 2, 512));
        file.flush();
        file.cut(&mut Lot::new(0), &mut Loss::default());
        assert_eq!(file.now().read(0, 1024), [[0; 512], [2; 512]].concat());
    }

    #[test]
    fn more_than_a_kernel_keeps_is_written_out_by_itself() {
        let mut file = Content::default();
        for n in 0..80 {
            file.change(written(n << 20, 1, 1 << 20));
        }
        assert!(file.bytes <= MOST_UNFLUSHED);
        assert_eq!(file.durable.read(0, 1), [1]);
    }
}
