//! A pair's disks and a model of them.
//!
//! The model keeps each image's content and what a power failure may take from it: any sector written
//! since its image was last made durable falls back to what it was then. What the sides say to each other
//! travels in queues, so that a hash is old by the time it is compared.

mod side;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use ax_disk::{Replica, Stepped, SyncCursor, SyncProgress, WriteLog, rotate};
use ax_wire::records::{RecordKind, Records};
use ax_wire::resync::{Ask, BLOCK, REGION};
use ax_wire::{EpochId, Generation};

pub use side::Rng;
use side::{SIZE, Side};

enum Forward {
    Ask(Ask),
    Bulk(Vec<u8>),
}

pub struct World {
    rng: Rng,
    sides: [Side; 2],
    /// Who runs the guest.
    primary: usize,
    log: Arc<WriteLog>,
    epoch: u64,
    /// The guest's write that is in the image and not in the stream.
    in_hand: Option<(u64, Vec<u8>)>,
    replica: Option<(Replica, mpsc::Receiver<EpochId>)>,
    pub resyncs: u64,
    /// Of them, how many compared everything.
    pub whole: u64,
    /// Rotations that ended.
    pub dropped: u64,
    seed: u64,
    _dir: tempfile::TempDir,
}

impl World {
    pub fn new(seed: u64) -> World {
        let dir = tempfile::tempdir().unwrap();
        let side = |name: &str| {
            let path = dir.path().join(name);
            Side::new(path)
        };
        World {
            rng: Rng(seed),
            sides: [side("a"), side("b")],
            primary: 0,
            log: Arc::new(WriteLog::new(2 << 20, || {})),
            epoch: 0,
            in_hand: None,
            replica: None,
            resyncs: 0,
            whole: 0,
            dropped: 0,
            seed,
            _dir: dir,
        }
    }

    fn shadow(&self) -> usize {
        1 - self.primary
    }

    /// One stretch: alone, filled, protected, and how that ends.
    pub fn live(&mut self) {
        self.writes(8);
        while self.rng.one_in(3) {
            if self.resync(true) {
                break;
            }
            self.writes(3);
            self.lose_shadow();
            self.writes(3);
        }
        if self.replica.is_none() {
            self.resync(false);
        }
        let mut protected = self.protected();
        if protected && self.rng.one_in(3) {
            self.hand_over();
            protected = self.protected();
        }
        match self.rng.below(5) {
            0 | 1 => self.lose_shadow(),
            2 | 3 => self.lose_primary(),
            // A shadow that is not in sync any more is gone as well.
            4 if protected => self.stop(),
            _ => {
                self.lose_shadow();
                self.restart();
            }
        }
    }

    fn writes(&mut self, most: u64) {
        for _ in 0..self.rng.below(most + 1) {
            self.write();
        }
    }

    /// The guest writes; the write may stay in hand.
    fn write(&mut self) {
        self.complete();
        if self.log.len() > 1 << 20 {
            return;
        }
        let rng = &mut self.rng;
        let len = [512, 4096, 8192, 65536][rng.below(4) as usize];
        // Most of it at few places, so that some regions are left alone for long.
        let regions = if rng.one_in(5) { 7 } else { 2 };
        let at = rng.below((regions * REGION).min(SIZE) / 512) * 512;
        let len = len.min((SIZE - at) as usize);
        let zero = rng.one_in(4);
        let word = |rng: &mut Rng| if zero { 0 } else { rng.word() };
        let data = (0..len / 8).flat_map(|_| word(rng).to_le_bytes());
        let data: Vec<u8> = data.collect();
        assert!(self.log.admit(data.len()));
        let side = &mut self.sides[self.primary];
        side.image().write_in_hand(at, &data).unwrap();
        side.wrote(at, &data);
        self.in_hand = Some((at, data));
        if !self.rng.one_in(6) {
            self.complete();
        }
    }

    fn complete(&mut self) {
        if let Some((at, data)) = self.in_hand.take() {
            self.log.completed(0, at, &data);
            self.sides[self.primary].image().settled(at, data.len());
        }
    }

    /// What the shadow makes of records, in the model.
    fn model(&mut self, records: &[u8]) {
        let shadow = self.shadow();
        for record in Records::new(records) {
            let record = record.unwrap();
            match record.kind {
                RecordKind::DiskWrite => self.sides[shadow].wrote(record.at, record.payload),
                RecordKind::DiskZero => {
                    let len = u64::from_le_bytes(record.payload.try_into().unwrap());
                    self.sides[shadow].wrote(record.at, &vec![0; len as usize]);
                }
                _ => {}
            }
        }
    }

    /// Ends an epoch; it is committed and applied.
    fn commit(&mut self) {
        self.epoch += 1;
        let mut records = Vec::new();
        self.log.seal_epoch(EpochId(self.epoch), &mut records);
        self.model(&records);
        let (replica, _) = self.replica.as_ref().unwrap();
        let epoch = EpochId(self.epoch);
        replica.committed(epoch, &mut records).unwrap();
        while replica.progress().0 < epoch {
            std::thread::yield_now();
        }
        self.log.applied_on_shadow(epoch);
    }

    fn follow(&mut self) {
        let image = self.sides[self.shadow()].image();
        let replica = Replica::new(vec![image], 2).unwrap();
        let (tell, told) = mpsc::channel();
        replica.on_durable(move |epoch| {
            let _ = tell.send(epoch);
        });
        self.replica = Some((replica, told));
    }

    /// A new shadow is filled; false when that was cut. The shadow is in sync after it.
    fn resync(&mut self, cut: bool) -> bool {
        self.complete();
        let (busy, shadow) = (self.rng.one_in(2), self.shadow());
        if self.sides[shadow].image.is_none() {
            self.sides[shadow].open();
        }
        self.follow();
        let blocks = (0..SIZE as usize).step_by(BLOCK);
        let blocks = blocks.map(|b| b..(b + BLOCK).min(SIZE as usize));
        let [a, b] = &self.sides;
        let differs = blocks.filter(|b_| a.content[b_.clone()] != b.content[b_.clone()]);
        let differs = differs.count() as u64;
        self.log.record(true);
        let mut cursor = SyncCursor::new(vec![self.sides[self.primary].image()]).unwrap();
        self.replica.as_ref().unwrap().0.begin_sync().unwrap();
        let (mut forward, mut backward) = (VecDeque::new(), VecDeque::<Vec<u8>>::new());
        let mut steps = if cut {
            self.rng.below(40) + 1
        } else {
            u64::MAX
        };
        loop {
            steps -= 1;
            if steps == 0 {
                self.log.record(false);
                return false;
            }
            if busy && self.rng.one_in(2) {
                self.write();
            }
            match self.rng.below(4) {
                0 => forward.extend(cursor.ask().map(Forward::Ask)),
                1 => {
                    if let Some(answer) = backward.pop_front() {
                        assert!(cursor.answered(&answer));
                    }
                }
                2 => {
                    let stepped = cursor.step(&self.log).unwrap();
                    let mut records = Vec::new();
                    self.log.seal(&mut records);
                    forward.push_back(Forward::Bulk(records));
                    if stepped == Stepped::Done {
                        break;
                    }
                }
                _ => {
                    if let Some(next) = forward.pop_front() {
                        self.receive(next, &mut backward);
                    }
                }
            }
        }
        for next in forward {
            self.receive(next, &mut backward);
        }
        assert!(backward.is_empty());
        self.complete();
        self.commit();
        let (replica, _) = self.replica.as_ref().unwrap();
        replica.mark_in_sync(Generation(3)).unwrap();
        self.sides[shadow].volatile.clear();
        self.check(cursor.progress(), (!busy).then_some(differs));
        true
    }

    fn check(&mut self, at: SyncProgress, differed: Option<u64>) {
        assert_eq!((at.done, at.total), (SIZE, SIZE));
        assert!(at.compared <= SIZE);
        self.sides.iter().for_each(Side::check);
        let [a, b] = &self.sides;
        let differs = (0..SIZE as usize).find(|n| a.content[*n] != b.content[*n]);
        assert_eq!(differs, None, "seed {}, resync {}", self.seed, self.resyncs);
        if let Some(blocks) = differed {
            let hashes = at.compared / 256 + 8 * 1000;
            assert!(at.moved <= blocks * 4200 + hashes, "{at:?} for {blocks}");
        }
        self.resyncs += 1;
        self.whole += u64::from(at.compared == SIZE);
    }

    fn receive(&mut self, next: Forward, backward: &mut VecDeque<Vec<u8>>) {
        let (replica, _) = self.replica.as_ref().unwrap();
        match next {
            Forward::Ask(ask) => {
                let mut answer = vec![];
                assert!(replica.answer(&ask, &mut answer).unwrap());
                backward.push_back(answer);
            }
            Forward::Bulk(records) => {
                replica.bulk(&records).unwrap();
                self.model(&records);
            }
        }
    }

    /// Epochs and rotations; false when the shadow was lost on the way.
    fn protected(&mut self) -> bool {
        for _ in 0..self.rng.below(7) {
            self.writes(3);
            if self.rng.one_in(4) {
                let patience = if self.rng.one_in(3) {
                    1 + self.rng.below(4)
                } else {
                    1000
                };
                if !self.rotate(patience) {
                    return false;
                }
            } else {
                self.commit();
            }
        }
        true
    }

    /// The maps are rotated while the guest goes on; `patience` epochs are committed meanwhile at most:
    /// then the shadow is lost, and it returns false.
    fn rotate(&mut self, mut patience: u64) -> bool {
        let go_on = AtomicBool::new(true);
        let disks = [self.sides[self.primary].image()];
        let log = Arc::clone(&self.log);
        let then = self.sides[self.primary].content.clone();
        let mut commits = VecDeque::new();
        let (empty, mut began) = (self.log.len(), false);
        let (go, log, disks) = (&go_on, &log, &disks);
        let rotated = std::thread::scope(|scope| {
            let rotating = scope
                .spawn(move || rotate::rotate(disks, log, false, || go.load(Ordering::SeqCst)));
            // What is written before the rotation has begun is made durable by it, which `then` does not
            // know of. Its mark tells that it has; without one there was nothing to drop.
            while log.len() == empty && !rotating.is_finished() {
                std::thread::yield_now();
            }
            began = log.len() != empty;
            while !rotating.is_finished() {
                if patience == 0 {
                    go_on.store(false, Ordering::SeqCst);
                    log.record(false);
                    continue;
                }
                patience -= 1;
                self.writes(2);
                self.commit();
                commits.push_back((self.epoch, self.sides[self.shadow()].content.clone()));
                let (_, told) = self.replica.as_ref().unwrap();
                if let Ok(epoch) = told.recv_timeout(Duration::from_millis(2)) {
                    let at = commits.iter().position(|c| c.0 == epoch.0);
                    let (_, then) = commits.drain(..=at.unwrap()).next_back().unwrap();
                    let shadow = self.shadow();
                    self.sides[shadow].durable_as_of(&then);
                    log.durable_on_shadow(epoch);
                }
            }
            rotating.join().unwrap().unwrap().done
        });
        if rotated && began {
            self.sides[self.primary].durable_as_of(&then);
            self.dropped += 1;
        }
        patience > 0
    }

    fn facts(&mut self, side: usize) -> Vec<u8> {
        // The shadow's thread may be about to drop bits, or in the middle of it.
        std::thread::sleep(Duration::from_micros(
            self.rng.below(2) * self.rng.below(4000),
        ));
        std::fs::read(self.sides[side].facts()).unwrap()
    }

    fn lose_shadow(&mut self) {
        self.log.record(false);
        let shadow = self.shadow();
        let facts = self.facts(shadow);
        self.replica = None;
        let power = self.rng.one_in(2);
        self.sides[shadow].crash(facts, power, &mut self.rng);
    }

    fn lose_primary(&mut self) {
        let old = self.primary;
        let facts = self.facts(old);
        let power = self.rng.one_in(2);
        self.sides[old].crash(facts, power, &mut self.rng);
        self.log.record(false);
        // What was not completed was not admitted for ever.
        self.abandon();
        let (replica, _) = self.replica.take().unwrap();
        replica.promote(Generation(9)).unwrap();
        drop(replica);
        self.primary = self.shadow();
        self.sides[self.primary].volatile.clear();
    }

    fn abandon(&mut self) {
        if let Some((_, data)) = self.in_hand.take() {
            self.log.abandoned(data.len());
        }
    }

    /// The primary's host, alone, dies and comes back.
    fn restart(&mut self) {
        self.abandon();
        let side = self.primary;
        let facts = self.facts(side);
        let power = self.rng.one_in(2);
        self.sides[side].crash(facts, power, &mut self.rng);
        self.sides[side].open();
    }

    /// The roles are swapped. A write in hand is in the old primary's image: the guest, which goes on
    /// elsewhere, may issue it again or not.
    fn hand_over(&mut self) {
        self.commit();
        let (replica, _) = self.replica.take().unwrap();
        self.sides[self.primary].flushed();
        replica.settle().unwrap();
        drop(replica);
        self.log.record(false);
        let again = self.in_hand.take();
        if let Some((_, data)) = &again {
            self.log.abandoned(data.len());
        }
        self.primary = self.shadow();
        self.sides[self.primary].volatile.clear();
        self.log.record(true);
        self.follow();
        if let Some((at, data)) = again.filter(|_| self.rng.one_in(2)) {
            assert!(self.log.admit(data.len()));
            let side = &mut self.sides[self.primary];
            side.image().write_in_hand(at, &data).unwrap();
            side.wrote(at, &data);
            self.in_hand = Some((at, data));
        }
    }

    /// Both stop in order, either starts. Somebody may change a disk meanwhile.
    fn stop(&mut self) {
        self.complete();
        self.commit();
        self.log.record(false);
        self.replica = None;
        for side in &mut self.sides {
            side.flushed();
            side.image = None;
        }
        self.primary = self.rng.below(2) as usize;
        if self.rng.one_in(2) {
            let side = &mut self.sides[self.rng.below(2) as usize];
            use std::os::unix::fs::FileExt;
            let file = std::fs::File::options().write(true).open(&side.path);
            // Later than the clock's grain.
            std::thread::sleep(Duration::from_millis(12));
            file.unwrap()
                .write_all_at(&[0x77; 512], 4 * REGION)
                .unwrap();
            side.content[4 * REGION as usize..][..512].fill(0x77);
        }
        self.sides[self.primary].open();
    }
}
