//! The simulated guest, its copy, its disks and its network.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ax_wire::records::{Record, RecordKind, Records, push};
use ax_wire::resync::{Ask, DiskAsk};
use ax_wire::state::StateWriter;
use ax_wire::{EpochId, Generation, PAGE_SIZE};
use io_barrier::{Barrier, OutputSink, Power, RxCounts};
use parking_lot::{Mutex, MutexGuard};
use statepoint::guest::{Guest, GuestError, Page, RamRegion, ShadowGuest};
use statepoint::primary::{DiskSync, EpochSource};
use statepoint::shadow::ShadowSink;
use zerocopy::IntoBytes;

pub const RAM: [RamRegion; 2] = [
    RamRegion {
        start: 0,
        pages: 160,
    },
    RamRegion {
        start: 256,
        pages: 96,
    },
];
const PAGES: usize = 256;
pub const DISK: usize = 64 * 512;

pub use ax_sync::sim::Rng;

fn index(page: Page) -> Option<usize> {
    let mut at = 0;
    for region in RAM {
        if (region.start..region.start + region.pages).contains(&page) {
            return Some(at + (page - region.start) as usize);
        }
        at += region.pages as usize;
    }
    None
}

fn number(at: usize) -> Page {
    if at < RAM[0].pages as usize {
        at as u64
    } else {
        RAM[1].start + (at - RAM[0].pages as usize) as u64
    }
}

fn error(doing: &'static str) -> GuestError {
    GuestError {
        doing,
        source: "injected or out of bounds".into(),
    }
}

/// A machine's registers: most stay as they are, and the last one is the counter.
pub fn registers(counter: u64) -> [u8; 5000] {
    let mut bytes = [3; 5000];
    bytes[4992..].copy_from_slice(&counter.to_le_bytes());
    bytes
}

/// Steps of a capture that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Pause,
    Save,
    Harvest,
    Read,
}

pub struct Inner {
    pub memory: Vec<u8>,
    dirty: Vec<bool>,
    tracking: bool,
    paused: bool,
    rng: Rng,
    pub disk: Vec<u8>,
    disk_log: Vec<u8>,
    /// Fail this step at its n-th call from now.
    fail: Option<(Step, u32)>,
    pub rx_given: RxCounts,
    /// Whole memory and disk by counter, at every harvest in a pause.
    pub history: HashMap<u64, (Vec<u8>, Vec<u8>)>,
    pub keep_history: bool,
    /// Pages the workload touches each step.
    pub touch: u64,
}

impl Inner {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
        for page in at / PAGE_SIZE..=(at + bytes.len() - 1) / PAGE_SIZE {
            self.dirty[page] = true;
        }
    }

    pub fn counter(&self) -> u64 {
        u64::from_le_bytes(self.memory[..8].try_into().unwrap())
    }

    fn fails(&mut self, step: Step) -> Result<(), GuestError> {
        match &mut self.fail {
            Some((at, left)) if *at == step => {
                if *left == 0 {
                    self.fail = None;
                    return Err(error("an injected failure"));
                }
                *left -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The guest, shared by its engine and its workload.
#[derive(Clone)]
pub struct Sim(pub Arc<Mutex<Inner>>);

impl Sim {
    pub fn new(seed: u64) -> Sim {
        Sim(Arc::new(Mutex::new(Inner {
            memory: vec![0; PAGES * PAGE_SIZE],
            dirty: vec![false; PAGES],
            tracking: false,
            paused: false,
            rng: Rng(seed),
            disk: vec![0; DISK],
            disk_log: Vec::with_capacity(1 << 20),
            fail: None,
            rx_given: RxCounts::default(),
            history: HashMap::new(),
            keep_history: true,
            touch: 6,
        })))
    }

    /// A guest that goes on from this memory and disk.
    pub fn from(memory: Vec<u8>, disk: Vec<u8>, seed: u64) -> Sim {
        let sim = Sim::new(seed);
        {
            let mut inner = sim.lock();
            (inner.memory, inner.disk) = (memory, disk);
        }
        sim
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }

    pub fn fail(&self, step: Step, after: u32) {
        self.lock().fail = Some((step, after));
    }

    /// One step of the workload: false when paused or refused by the barrier.
    pub fn step(&self, barrier: &Barrier) -> bool {
        let mut inner = self.lock();
        if inner.paused || inner.disk_log.len() > 1 << 19 {
            return false;
        }
        let counter = inner.counter() + 1;
        let nonce = inner.rng.word();
        let mut frame = [0; 64];
        frame[..8].copy_from_slice(&counter.to_le_bytes());
        frame[8..16].copy_from_slice(&nonce.to_le_bytes());
        let output = Record {
            kind: RecordKind::Frame,
            unit: 0,
            at: 0,
            payload: &frame,
        };
        if barrier.hold(output).is_err() {
            return false;
        }
        inner.write(0, &counter.to_le_bytes());
        inner.write(8, &nonce.to_le_bytes());
        for _ in 0..inner.touch {
            let page = 1 + inner.rng.below(PAGES as u64 - 1) as usize;
            let at = page * PAGE_SIZE + 8 * inner.rng.below(500) as usize;
            let value = inner.rng.word();
            // Now and then a page becomes all zeros again.
            if value.is_multiple_of(8) {
                inner.write(page * PAGE_SIZE, &[0; PAGE_SIZE]);
            } else {
                inner.write(at, &value.to_le_bytes());
            }
        }
        let sector = inner.rng.below(64) as usize * 512;
        let data = [counter as u8; 512];
        inner.disk[sector..sector + 512].copy_from_slice(&data);
        let written = Record {
            kind: RecordKind::DiskWrite,
            unit: 0,
            at: sector as u64,
            payload: &data,
        };
        assert!(push(&mut inner.disk_log, written));
        true
    }
}

impl Guest for Sim {
    fn ram(&self) -> &[RamRegion] {
        &RAM
    }

    fn track_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.tracking = on;
        inner.dirty.fill(false);
        Ok(())
    }

    fn dirty_estimate(&mut self) -> Result<usize, GuestError> {
        Ok(self.lock().dirty.iter().filter(|d| **d).count())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.fails(Step::Pause)?;
        assert!(!inner.paused, "paused twice");
        inner.paused = true;
        Ok(())
    }

    fn save(&mut self, out: &mut StateWriter<'_>) -> Result<(), GuestError> {
        let mut inner = self.lock();
        assert!(inner.paused, "saved while running");
        inner.fails(Step::Save)?;
        let counter = inner.counter();
        out.block(1, 1, 0, &counter.to_le_bytes())
            .and_then(|()| out.block(2, 1, 0, &registers(counter)))
            .map_err(|_| error("saving"))
    }

    fn harvest(&mut self, dirty: &mut Vec<Page>) -> Result<(), GuestError> {
        let mut inner = self.lock();
        assert!(inner.tracking, "harvested without tracking");
        inner.fails(Step::Harvest)?;
        dirty.clear();
        for at in 0..PAGES {
            if std::mem::take(&mut inner.dirty[at]) {
                dirty.push(number(at));
            }
        }
        if inner.paused && inner.keep_history {
            let (counter, now) = (inner.counter(), (inner.memory.clone(), inner.disk.clone()));
            inner.history.insert(counter, now);
        }
        Ok(())
    }

    fn give_back(&mut self, pages: &[Page]) {
        let mut inner = self.lock();
        for page in pages {
            let at = index(*page).unwrap();
            inner.dirty[at] = true;
        }
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.fails(Step::Read)?;
        let at = index(first).ok_or_else(|| error("reading"))? * PAGE_SIZE;
        out.copy_from_slice(&inner.memory[at..at + out.len()]);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.lock().paused = false;
        Ok(())
    }
}

/// The other things of an epoch: the simulated disk. It asks for each piece of the shadow's before it
/// sends its own: so many answers have come.
pub struct Source(pub Sim, pub usize, pub Asked);

/// How many questions about the disk were asked and answered.
#[derive(Default)]
pub struct Asked {
    asked: u64,
    answered: u64,
}

/// Bytes of the simulated disk that are asked for at a time.
const PIECE: usize = 4096;

impl EpochSource for Source {
    fn restart_sync(&mut self) -> Result<(), GuestError> {
        self.0.lock().disk_log.clear();
        (self.1, self.2) = (0, Asked::default());
        Ok(())
    }

    fn sync_ask(&mut self) -> Option<Ask> {
        let asked = &mut self.2;
        if asked.asked * PIECE as u64 >= DISK as u64 || asked.asked > asked.answered + 1 {
            return None;
        }
        asked.asked += 1;
        let first = asked.asked - 1;
        Some(Ask::Sums(DiskAsk {
            unit: 0.into(),
            first: first.into(),
            count: 1.into(),
            key: [3; 32],
        }))
    }

    fn sync_answered(&mut self, payload: &[u8]) -> bool {
        let asked = &mut self.2;
        let right = payload == asked.answered.to_le_bytes();
        asked.answered += 1;
        right
    }

    fn sync_progress(&self) -> DiskSync {
        DiskSync {
            done: self.1 as u64,
            total: DISK as u64,
            compared: self.1 as u64,
            moved: self.2.answered,
        }
    }

    fn sync_step(&mut self, records: &mut Vec<u8>) -> Result<bool, GuestError> {
        let mut inner = self.0.lock();
        records.clear();
        records.reserve(1 << 20);
        records.append(&mut inner.disk_log);
        let answered = self.2.answered as usize * PIECE;
        let end = (self.1 + PIECE).min(DISK).min(answered);
        if self.1 < end {
            let piece = Record {
                kind: RecordKind::DiskWrite,
                unit: 0,
                at: self.1 as u64,
                payload: &inner.disk[self.1..end],
            };
            assert!(push(records, piece));
        }
        self.1 = end;
        Ok(end == DISK)
    }

    fn disk_bytes(&self) -> usize {
        self.0.lock().disk_log.len()
    }

    fn seal(&mut self, _: EpochId, records: &mut Vec<u8>) {
        records.clear();
        records.reserve(1 << 20);
        std::mem::swap(records, &mut self.0.lock().disk_log);
    }

    fn rx_given(&self) -> RxCounts {
        self.0.lock().rx_given
    }
}

/// The shadow's memory.
#[derive(Clone)]
pub struct Copy {
    pub memory: Arc<Mutex<Vec<u8>>>,
    /// Fail the n-th write from now.
    pub fail: Arc<AtomicU64>,
}

impl Copy {
    pub fn new() -> Copy {
        Copy {
            memory: Arc::new(Mutex::new(vec![0xee; PAGES * PAGE_SIZE])),
            fail: Arc::new(AtomicU64::new(u64::MAX)),
        }
    }
}

impl ShadowGuest for Copy {
    fn ram(&self) -> &[RamRegion] {
        &RAM
    }

    fn write_pages(&mut self, first: Page, data: &[u8]) -> Result<(), GuestError> {
        if self.fail.fetch_sub(1, Ordering::SeqCst) == 0 {
            return Err(error("an injected failure"));
        }
        let at = index(first).ok_or_else(|| error("writing"))? * PAGE_SIZE;
        let mut memory = self.memory.lock();
        let place = memory.get_mut(at..at + data.len());
        place.ok_or_else(|| error("writing"))?.copy_from_slice(data);
        Ok(())
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        let at = index(first).ok_or_else(|| error("reading"))? * PAGE_SIZE;
        out.copy_from_slice(&self.memory.lock()[at..at + out.len()]);
        Ok(())
    }
}

/// The shadow's disk, and the last epoch it may call durable; none: every one at once.
#[derive(Clone, Default)]
pub struct Disk(
    pub Arc<Mutex<(Vec<u8>, u64, bool)>>,
    pub Arc<Mutex<Option<u64>>>,
);

fn write_records(disk: &mut [u8], records: &[u8]) {
    for record in Records::new(records) {
        let record = record.unwrap();
        let at = record.at as usize;
        disk[at..at + record.payload.len()].copy_from_slice(record.payload);
    }
}

impl ShadowSink for Disk {
    fn asked(&mut self, ask: &Ask, answer: &mut Vec<u8>) -> Result<bool, GuestError> {
        let Ask::Sums(ask) = ask else {
            return Ok(false);
        };
        answer.clear();
        answer.extend_from_slice(ask.first.as_bytes());
        Ok((ask.first.get() as usize) < DISK / PIECE && ask.key == [3; 32])
    }

    fn begin_sync(&mut self) -> Result<(), GuestError> {
        *self.0.lock() = (vec![0xdd; DISK], 0, false);
        Ok(())
    }

    fn bulk(&mut self, records: &[u8]) -> Result<(), GuestError> {
        write_records(&mut self.0.lock().0, records);
        Ok(())
    }

    fn committed(&mut self, epoch: EpochId, records: &mut Vec<u8>) -> Result<(), GuestError> {
        let mut disk = self.0.lock();
        assert!(epoch.0 > disk.1, "I5: epoch {epoch:?} after {}", disk.1);
        disk.1 = epoch.0;
        write_records(&mut disk.0, records);
        Ok(())
    }

    fn in_sync(&mut self, _: EpochId, _: Generation) -> Result<(), GuestError> {
        self.0.lock().2 = true;
        Ok(())
    }

    fn applied(&self) -> EpochId {
        EpochId(self.0.lock().1)
    }

    fn durable(&self) -> EpochId {
        let most = self.1.lock().unwrap_or(u64::MAX);
        EpochId(self.0.lock().1.min(most))
    }
}

/// What has left: (counter, nonce) in order.
#[derive(Clone, Default)]
pub struct Net(pub Arc<Mutex<Vec<(u64, u64)>>>);

impl OutputSink for Net {
    fn frame(&mut self, _nic: u8, _header: &[u8; ax_wire::offload::HEADER], frame: &[u8]) {
        let word = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap());
        self.0.lock().push((word(0), word(8)));
    }

    fn console(&mut self, _: u64, _: &[u8]) {}

    fn power(&mut self, _: Power) {}
}
