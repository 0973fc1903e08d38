//! Which regions of an image may differ from the other side's, as this process knows it (rule 16).
//!
//! [`Marks`] is the map in memory, beside the durable one in [`crate::meta`]. It never says less than
//! that one, and it knows what must stay when older bits are dropped:
//!
//! - what was touched since the maps were last rotated: a write counts when it begins and again when it
//!   is in the stream, so that one on the way at the rotation stays, wherever it was caught;
//! - the guest's write in hand, which is in the image and not in the stream yet;
//! - what a failed or never completed write has left, of which nobody can say what it is: for good.

use std::ops::Range;

use ax_wire::resync::REGION;

/// A set of regions of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    words: Vec<u64>,
    count: u64,
}

impl Regions {
    /// None of `count` regions.
    pub fn none(count: u64) -> Regions {
        Regions {
            words: vec![0; count.div_ceil(64) as usize],
            count,
        }
    }

    /// All of `count` regions.
    pub fn all(count: u64) -> Regions {
        let mut all = Regions::none(count);
        all.fill();
        all
    }

    /// Regions of an image of `size` bytes.
    pub fn of_size(size: u64) -> u64 {
        size.div_ceil(REGION)
    }

    /// How many regions there are, in the set or not.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many are in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// True when none is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    fn fill(&mut self) {
        self.words.fill(u64::MAX);
        if let (Some(last), rest @ 1..) = (self.words.last_mut(), self.count % 64) {
            *last = (1 << rest) - 1;
        }
    }

    /// Whether `region` is in the set.
    pub fn contains(&self, region: u64) -> bool {
        let word = self.words.get((region / 64) as usize);
        word.is_some_and(|word| word >> (region % 64) & 1 != 0)
    }

    /// Adds a run of regions; what is beyond the last one is ignored.
    pub fn insert(&mut self, run: Range<u64>) {
        for region in run.start..run.end.min(self.count) {
            if let Some(word) = self.words.get_mut((region / 64) as usize) {
                *word |= 1 << (region % 64);
            }
        }
    }

    fn remove(&mut self, run: Range<u64>) {
        for region in run.start..run.end.min(self.count) {
            if let Some(word) = self.words.get_mut((region / 64) as usize) {
                *word &= !(1 << (region % 64));
            }
        }
    }

    /// True when every region of the run is in the set.
    fn covers(&self, run: &Range<u64>) -> bool {
        run.clone().all(|region| self.contains(region))
    }

    fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds what is in `other`.
    pub fn unite(&mut self, other: &Regions) {
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(a, b)| *a |= b);
    }

    /// Adds the regions from `from` on whose bit is set in `bits`, lowest first.
    pub fn unite_bits(&mut self, from: u64, bits: &[u8]) {
        for (byte, at) in bits.iter().zip((from..).step_by(8)) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                self.insert(at + bit..at + bit + 1);
            }
        }
    }

    /// Bits of `count` regions from `from` on, lowest first.
    pub fn bits(&self, from: u64, count: u64) -> impl Iterator<Item = u8> + '_ {
        (from..from + count).step_by(8).map(move |at| {
            let within = at..(at + 8).min(from + count);
            within.fold(0, |byte, region| {
                byte | u8::from(self.contains(region)) << (region - at)
            })
        })
    }

    /// Takes out the first run at or after `from`, at most `most` regions of it.
    pub fn take_run(&mut self, from: u64, most: u64) -> Option<Range<u64>> {
        let mut word = (from / 64) as usize;
        let mut bits = self.words.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        let start = word as u64 * 64 + u64::from(bits.trailing_zeros());
        let mut end = start + 1;
        while end - start < most && self.contains(end) {
            end += 1;
        }
        self.remove(start..end);
        Some(start..end)
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn set_word(&mut self, at: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(at) {
            *word = bits;
        }
        if let (Some(last), rest @ 1..) = (self.words.last_mut(), self.count % 64) {
            *last &= (1 << rest) - 1;
        }
    }
}

/// Bytes of one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub offset: u64,
    pub len: u64,
}

impl Span {
    /// Regions it touches.
    pub fn run(self) -> Range<u64> {
        self.offset / REGION..self.offset.saturating_add(self.len).div_ceil(REGION)
    }
}

/// Regions whose bits are set ahead of a write that goes on where others ended.
const AHEAD: u64 = 8;

/// Names one rotation of an image's map: older bits may be dropped for the latest one only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation(u64);

/// The map of one image. Its lock is held for moments only, never during I/O.
#[derive(Debug)]
pub(crate) struct Marks {
    /// Durably in the map on disk.
    set: Regions,
    /// Touched since the last rotation.
    recent: Regions,
    /// Never dropped while this process lives.
    kept: Regions,
    /// Of the guest's write that is in the image, or is being written, and not in the stream yet.
    in_hand: Option<Span>,
    rotation: u64,
    /// The image has failed to become durable once: what it has lost is not known.
    doubtful: bool,
}

impl Marks {
    pub fn new(set: Regions) -> Marks {
        let count = set.count();
        Marks {
            set,
            recent: Regions::none(count),
            kept: Regions::none(count),
            in_hand: None,
            rotation: 0,
            doubtful: false,
        }
    }

    /// A write is about to begin; true when its bits are durable already.
    pub fn touch(&mut self, run: &Range<u64>) -> bool {
        self.recent.insert(run.clone());
        self.set.covers(run)
    }

    /// What to make durable for a write of `run`: more than that when it goes on where others ended, so
    /// that who writes on and on does not wait for the map at every region.
    pub fn ahead(&self, run: &Range<u64>) -> Range<u64> {
        let goes_on = run
            .start
            .checked_sub(1)
            .is_some_and(|r| self.set.contains(r));
        let ahead = if goes_on { AHEAD } else { 0 };
        run.start..(run.end + ahead).min(self.set.count())
    }

    /// The bits of `run` are durable now.
    pub fn covered(&mut self, run: &Range<u64>) {
        self.set.insert(run.clone());
    }

    /// The guest's write is in hand from here on. One before it that was never completed left an image
    /// of which only the guest knows whether it will write it again.
    pub fn take_in_hand(&mut self, write: Span) {
        let before = self.in_hand.replace(write);
        // The same bytes again take its place; others, be they of the same region, do not.
        if let Some(before) = before.filter(|before| *before != write) {
            self.kept.insert(before.run());
        }
    }

    /// The guest's write in hand is in the stream.
    pub fn settled(&mut self, write: Span) {
        self.recent.insert(write.run());
        if self.in_hand == Some(write) {
            self.in_hand = None;
        }
    }

    /// A write failed, who knows where.
    pub fn failed(&mut self, run: &Range<u64>) {
        self.kept.insert(run.clone());
    }

    /// The image could not be made durable.
    pub fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// What may differ.
    pub fn dirty(&self) -> Regions {
        let mut dirty = self.set.clone();
        dirty.unite(&self.recent);
        dirty.unite(&self.kept);
        dirty.insert(self.in_hand.map(Span::run).unwrap_or_default());
        dirty
    }

    /// True when a rotation could drop something.
    pub fn worth_rotating(&self) -> bool {
        let mut pairs = self.set.words().iter().zip(self.kept.words());
        pairs.any(|(set, kept)| set & !kept != 0)
    }

    /// True when the image has failed to become durable: nothing is dropped any more.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// A rotation begins: what is touched from here on stays.
    pub fn begin_rotation(&mut self) -> Rotation {
        self.recent.clear();
        self.rotation += 1;
        Rotation(self.rotation)
    }

    /// No rotation begun earlier may end any more.
    pub fn forget_rotation(&mut self) {
        self.rotation += 1;
    }

    /// Every write completed before `rotation` began is durable on both sides: drops older bits. What is
    /// left must be made durable before anything else is dropped from the map on disk. Returns how many
    /// were dropped; none, with nothing changed, when that rotation is not the latest, or what is durable
    /// is in doubt.
    pub fn end_rotation(&mut self, rotation: Rotation) -> Option<u64> {
        if self.rotation != rotation.0 || self.doubtful {
            return None;
        }
        let before = self.set.len();
        let mut stays = self.recent.clone();
        stays.unite(&self.kept);
        stays.insert(self.in_hand.map(Span::run).unwrap_or_default());
        let set = self.set.words.iter_mut();
        set.zip(&stays.words).for_each(|(a, b)| *a &= b);
        Some(before - self.set.len())
    }

    /// The bits that are durable.
    pub fn set(&self) -> &Regions {
        &self.set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn within(region: u64) -> Span {
        Span {
            offset: region * REGION,
            len: 512,
        }
    }

    #[test]
    fn what_stays_when_older_bits_are_dropped() {
        let mut marks = Marks::new(Regions::none(200));
        let durable = |marks: &mut Marks, run: Range<u64>| {
            marks.touch(&run);
            marks.covered(&run);
        };
        durable(&mut marks, 1..4); // older
        durable(&mut marks, 10..11); // older, written again since
        marks.take_in_hand(within(20)); // in hand at the rotation and at its end
        durable(&mut marks, 20..21);
        marks.failed(&(30..31));
        durable(&mut marks, 30..31);
        let rotation = marks.begin_rotation();
        assert!(marks.touch(&(10..11)), "durable already");
        assert!(!marks.touch(&(199..200)), "not yet");
        assert!(marks.end_rotation(rotation).is_some());
        let left = |marks: &Marks| {
            let mut all = marks.dirty();
            let runs = std::iter::from_fn(|| all.take_run(0, 1));
            runs.map(|r| r.start).collect::<Vec<_>>()
        };
        assert_eq!(left(&marks), [10, 20, 30, 199]);
        assert!(!marks.set().contains(199) && !marks.set().contains(2));
        // Completed after the rotation began: in the stream of a later epoch.
        let rotation = marks.begin_rotation();
        marks.settled(within(20));
        assert!(marks.end_rotation(rotation).is_some());
        assert_eq!(left(&marks), [20, 30]);
        let rotation = marks.begin_rotation();
        assert!(marks.end_rotation(rotation).is_some());
        assert_eq!(left(&marks), [30]);
        assert!(!marks.worth_rotating());
    }

    #[test]
    fn bits_are_set_ahead_of_who_writes_on_and_on_only() {
        let mut marks = Marks::new(Regions::none(100));
        assert_eq!(marks.ahead(&(0..1)), 0..1);
        assert_eq!(marks.ahead(&(20..22)), 20..22);
        marks.covered(&(20..22));
        assert_eq!(marks.ahead(&(22..23)), 22..31);
        marks.covered(&(97..98));
        assert_eq!(marks.ahead(&(98..99)), 98..100);
    }

    #[test]
    fn a_write_that_was_never_completed_stays_for_good() {
        let mut marks = Marks::new(Regions::all(8));
        marks.take_in_hand(within(5));
        // Another one in the same region.
        let other = Span {
            offset: 5 * REGION + 4096,
            len: 512,
        };
        marks.take_in_hand(other);
        marks.settled(other);
        // One that is issued again, and completed this time.
        for _ in 0..2 {
            marks.take_in_hand(within(1));
        }
        marks.settled(within(1));
        for _ in 0..3 {
            let rotation = marks.begin_rotation();
            assert!(marks.end_rotation(rotation).is_some());
        }
        assert!(marks.dirty().contains(5) && marks.dirty().len() == 1);
    }

    #[test]
    fn an_earlier_rotation_or_a_failed_flush_drops_nothing() {
        let mut marks = Marks::new(Regions::all(8));
        let first = marks.begin_rotation();
        let second = marks.begin_rotation();
        assert_eq!(marks.end_rotation(first), None);
        marks.doubt();
        assert_eq!(marks.end_rotation(second), None);
        assert_eq!(marks.dirty().len(), 8);
    }

    proptest! {
        #[test]
        fn bits_and_runs_read_back(
            members in prop::collection::btree_set(0u64..300, 0..60), from in 0u64..300, most in 1u64..80
        ) {
            let mut regions = Regions::none(300);
            members.iter().for_each(|r| regions.insert(*r..*r + 1));
            prop_assert_eq!(regions.len(), members.len() as u64);
            let bits: Vec<u8> = regions.bits(from, 300 - from).collect();
            let mut read = Regions::none(300);
            read.unite_bits(from, &bits);
            for region in 0..300 {
                prop_assert_eq!(regions.contains(region), members.contains(&region));
                prop_assert_eq!(read.contains(region), region >= from && members.contains(&region));
            }
            let mut seen = vec![];
            while let Some(run) = regions.take_run(0, most) {
                prop_assert!(run.end - run.start <= most);
                seen.extend(run);
            }
            prop_assert_eq!(seen, members.into_iter().collect::<Vec<_>>());
        }
    }
}
