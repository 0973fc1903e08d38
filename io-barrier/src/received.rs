//! Frames the primary received and the guest may not have seen yet (rule 7).

use std::collections::VecDeque;

use ax_wire::offload::{HEADER, Packet};

/// Network devices a VM can have.
pub const MAX_NICS: usize = 8;

/// Frames given to the guest so far, per network device.
pub type RxCounts = [u64; MAX_NICS];

#[derive(Clone, Copy, Debug)]
struct Entry {
    nic: u8,
    seq: u64,
    arrived_ns: u64,
    /// Header and frame.
    len: usize,
}

/// Received frames in order, bounded in bytes and age. What does not fit pushes the oldest out: a
/// frame forgotten is a frame lost on the network, no worse.
#[derive(Debug)]
pub struct ReceivedLog {
    entries: VecDeque<Entry>,
    bytes: VecDeque<u8>,
    max_bytes: usize,
    max_age_ns: u64,
    given: RxCounts,
}

/// Entries kept at most, whatever their size.
const MAX_ENTRIES: usize = 8192;

impl ReceivedLog {
    /// Keeps at most `max_bytes` of frames and their headers, none older than `max_age_ns`.
    pub fn new(max_bytes: usize, max_age_ns: u64) -> ReceivedLog {
        ReceivedLog {
            entries: VecDeque::with_capacity(MAX_ENTRIES),
            bytes: VecDeque::with_capacity(max_bytes),
            max_bytes,
            max_age_ns,
            given: [0; MAX_NICS],
        }
    }

    fn forget_first(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes.drain(..entry.len);
        }
    }

    fn is_given(&self, entry: &Entry) -> bool {
        self.given
            .get(usize::from(entry.nic))
            .is_none_or(|given| entry.seq <= *given)
    }

    fn tidy(&mut self, now_ns: u64) {
        while let Some(first) = self.entries.front() {
            let old = now_ns.saturating_sub(first.arrived_ns) > self.max_age_ns;
            if !old && !self.is_given(first) {
                break;
            }
            self.forget_first();
        }
    }

    /// Remembers frame number `seq` (from 1) of device `nic`, arrived at `now_ns`, and its header. A frame
    /// already given to the guest, out of order, of an unknown device or larger than everything is ignored.
    pub fn push(&mut self, nic: u8, seq: u64, now_ns: u64, header: &[u8; HEADER], frame: &[u8]) {
        self.tidy(now_ns);
        let entry = Entry {
            nic,
            seq,
            arrived_ns: now_ns,
            len: HEADER + frame.len(),
        };
        let newest = self.entries.iter().rev().find(|e| e.nic == nic);
        if self.is_given(&entry)
            || newest.is_some_and(|e| e.seq >= seq)
            || entry.len > self.max_bytes
        {
            return;
        }
        while self.bytes.len() + entry.len > self.max_bytes || self.entries.len() == MAX_ENTRIES {
            self.forget_first();
        }
        self.entries.push_back(entry);
        self.bytes.extend(header);
        self.bytes.extend(frame);
    }

    /// The committed epoch's guest has been given `given` frames per device: forgets those.
    pub fn committed(&mut self, given: &RxCounts, now_ns: u64) {
        self.given = *given;
        self.tidy(now_ns);
    }

    /// Bytes remembered.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True when nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Promotion: hands `give` (nic, packet), in order of arrival, every frame the committed guest
    /// has not been given and that is young enough, and forgets them all.
    pub fn drain(&mut self, now_ns: u64, mut give: impl FnMut(u8, Packet<'_>)) {
        self.tidy(now_ns);
        self.bytes.make_contiguous();
        let (bytes, _) = self.bytes.as_slices();
        let mut at = 0;
        for entry in &self.entries {
            let packet = bytes.get(at..at + entry.len).unwrap_or_default();
            at += entry.len;
            let old = now_ns.saturating_sub(entry.arrived_ns) > self.max_age_ns;
            if !old
                && !self.is_given(entry)
                && let Some(packet) = Packet::new(packet)
            {
                give(entry.nic, packet);
            }
        }
        self.entries.clear();
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn drained(log: &mut ReceivedLog, now: u64) -> Vec<(u8, Vec<u8>)> {
        let mut out = vec![];
        log.drain(now, |nic, packet| {
            assert_eq!(packet.header(), header(packet.frame()));
            out.push((nic, packet.frame().to_vec()));
        });
        out
    }

    /// Each frame has a header of its own.
    fn header(frame: &[u8]) -> [u8; HEADER] {
        [frame.len() as u8; HEADER]
    }

    fn push(log: &mut ReceivedLog, nic: u8, seq: u64, now: u64, frame: &[u8]) {
        log.push(nic, seq, now, &header(frame), frame);
    }

    #[test]
    fn only_frames_the_guest_has_not_seen_are_given_again() {
        let mut log = ReceivedLog::new(1 << 16, SECOND);
        for seq in 1..=4 {
            push(&mut log, 0, seq, 0, &[seq as u8; 60]);
        }
        push(&mut log, 1, 1, 0, &[11; 10]);
        let mut given = [0; MAX_NICS];
        given[0] = 2;
        log.committed(&given, 0);
        let expected = vec![(0, vec![3; 60]), (0, vec![4; 60]), (1, vec![11; 10])];
        assert_eq!(drained(&mut log, 0), expected);
        assert!(log.is_empty());
    }

    #[test]
    fn old_frames_are_forgotten() {
        let mut log = ReceivedLog::new(1 << 16, SECOND);
        push(&mut log, 0, 1, 0, b"old");
        push(&mut log, 0, 2, SECOND, b"young");
        assert_eq!(drained(&mut log, SECOND + 1), vec![(0, b"young".to_vec())]);
    }

    #[test]
    fn the_oldest_make_room() {
        let mut log = ReceivedLog::new(2 * (HEADER + 40), SECOND);
        for seq in 1..=5 {
            push(&mut log, 0, seq, 0, &[seq as u8; 40]);
        }
        push(&mut log, 0, 6, 0, &[6; HEADER + 81]);
        assert_eq!(
            drained(&mut log, 0),
            vec![(0, vec![4; 40]), (0, vec![5; 40])]
        );
    }

    #[test]
    fn hostile_numbers_are_ignored() {
        let mut log = ReceivedLog::new(100, SECOND);
        push(&mut log, 200, 1, 0, b"no such device");
        push(&mut log, 0, 5, 0, b"five");
        push(&mut log, 0, 5, 0, b"again");
        push(&mut log, 0, 4, 0, b"back");
        assert_eq!(drained(&mut log, 0), vec![(0, b"five".to_vec())]);
    }

    proptest! {
        #[test]
        fn never_more_than_bounded_and_always_a_suffix(
            frames in prop::collection::vec((0u8..2, 0usize..80), 0..60), given in 0u64..30
        ) {
            let mut log = ReceivedLog::new(400, SECOND);
            let mut seqs = [0u64; 2];
            let mut all = vec![];
            for (nic, len) in frames {
                seqs[nic as usize] += 1;
                let seq = seqs[nic as usize];
                push(&mut log, nic, seq, 0, &vec![seq as u8; len]);
                all.push((nic, seq, vec![seq as u8; len]));
                prop_assert!(log.len() <= 400);
            }
            let mut counts = [0; MAX_NICS];
            counts[0] = given;
            log.committed(&counts, 0);
            let mut kept = vec![];
            let mut room = 400usize;
            for (nic, seq, bytes) in all.iter().rev() {
                let len = HEADER + bytes.len();
                if room < len { break; }
                room -= len;
                if *seq > counts[*nic as usize] { kept.push((*nic, bytes.clone())); }
            }
            kept.reverse();
            prop_assert_eq!(drained(&mut log, 0), kept);
        }
    }
}
