//! The simulated machine: a few pages of memory, one disk, one program.
//!
//! All that the program knows is in its memory and its program counter, as with a real guest: whatever is restored
//! goes on from there. It looks for itself whether its memory and its disk are what it left there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ax_disk::{Image, WriteLog};
use ax_sync::sim::{self, Rng};
use ax_sync::{Condvar, Mutex};
use ax_wire::PAGE_SIZE;
use ax_wire::records::{Record, RecordKind};
use ax_wire::state::{StateReader, StateWriter};
use io_barrier::Barrier;
use statepoint::guest::{Guest, GuestError, Page, RamRegion, ShadowGuest};

const PAGES: usize = 40;
const RAM: [RamRegion; 2] = [
    RamRegion {
        start: 0,
        pages: 24,
    },
    RamRegion {
        start: 64,
        pages: 16,
    },
];

/// Records the ledger on the disk holds, oldest overwritten.
const SLOTS: u64 = 96;
/// From one record to the next on the disk: over more than one region of its map.
const STRIDE: u64 = 24 << 10;
/// Bytes of the disk.
pub const DISK: u64 = 3 << 20;

/// Where in page 0 things are: the number of the last record, the table of pages.
const NUMBER: usize = 0;
const TABLE: usize = 512;

/// What the program does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counter {
    /// Reads its ledger from the disk.
    Boot = 0,
    /// Draws the next record, changes memory.
    Think = 1,
    /// Writes it to the disk.
    Write = 2,
    /// Makes it durable.
    Flush = 3,
    /// Answers for it.
    Answer = 4,
}

impl Counter {
    fn of(n: u64) -> Counter {
        match n {
            1 => Counter::Think,
            2 => Counter::Write,
            3 => Counter::Flush,
            4 => Counter::Answer,
            _ => Counter::Boot,
        }
    }
}

struct State {
    memory: Vec<u8>,
    counter: Counter,
    dirty: Vec<bool>,
    tracking: bool,
    paused: bool,
    started: bool,
    /// Counts its starts: a program of an earlier one ends.
    life: u64,
}

/// The machine, shared by its engine and its program.
#[derive(Clone)]
pub struct Machine {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
    /// The two sides share its disk alone (mode `ha`): nothing of the machine is captured.
    disk_only: bool,
}

/// Told the number of the last record on the disk, and the nonces of all that are there.
pub type Booted = Box<dyn Fn(u64, &HashMap<u64, u64>) + Send + Sync>;

/// What the program talks to.
pub struct Ports {
    /// Its outputs.
    pub barrier: Arc<Barrier>,
    /// Its disk.
    pub image: Arc<Image>,
    /// Its disk's writes.
    pub log: Arc<WriteLog>,
    /// Every FLUSH is durable on both sides.
    pub sync: bool,
    /// Told what a guest that booted has found on its disk.
    pub booted: Booted,
    /// Told of a request that its disk could not do, and whether it was a FLUSH.
    pub trouble: Box<dyn Fn(bool) + Send + Sync>,
    /// Told of what must never be; does not return.
    pub failed: Arc<dyn Fn(&str) + Send + Sync>,
}

fn page_at(page: Page) -> Option<usize> {
    let mut at = 0;
    for region in RAM {
        if (region.start..region.start + region.pages).contains(&page) {
            return Some(at + (page - region.start) as usize);
        }
        at += region.pages as usize;
    }
    None
}

fn page_of(at: usize) -> Page {
    match at < RAM[0].pages as usize {
        true => at as u64,
        false => RAM[1].start + (at - RAM[0].pages as usize) as u64,
    }
}

fn trouble(doing: &'static str) -> GuestError {
    GuestError {
        doing,
        source: "the simulated machine can't".into(),
    }
}

/// A number that only this number gives.
fn mixed(of: u64) -> u64 {
    Rng(of ^ 0x5eed).word()
}

impl State {
    fn word(&self, at: usize) -> u64 {
        let bytes = self.memory.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    }

    fn put(&mut self, at: usize, word: u64) {
        if let Some(place) = self.memory.get_mut(at..at + 8) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        if let Some(dirty) = self.dirty.get_mut(at / PAGE_SIZE) {
            *dirty = true;
        }
    }

    /// The place of a record's nonce in memory: pages 1 and 2 are the ledger as memory knows it.
    fn nonce_at(number: u64) -> usize {
        PAGE_SIZE + (number % SLOTS) as usize * 16
    }

    /// Changes a page in the way the table says.
    fn stamp(&mut self, page: usize, with: u64) {
        let at = page * PAGE_SIZE;
        self.put(at, with);
        self.put(at + 2048, mixed(with ^ page as u64));
        self.put(at + PAGE_SIZE - 8, !with);
        self.put(TABLE + page * 8, with);
    }

    fn check(&self, page: usize) -> Result<(), String> {
        let (at, with) = (page * PAGE_SIZE, self.word(TABLE + page * 8));
        let there = [
            self.word(at),
            self.word(at + 2048),
            self.word(at + PAGE_SIZE - 8),
        ];
        let right = [with, mixed(with ^ page as u64), !with];
        match with == 0 || there == right {
            true => Ok(()),
            false => Err(format!("I2: page {page} is {there:x?}, not {right:x?}")),
        }
    }
}

fn sector(number: u64, nonce: u64) -> [u8; 512] {
    let mut data = [0; 512];
    let words = [number, nonce, mixed(number ^ nonce)];
    for (place, word) in data.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    data
}

fn parse(data: &[u8; 512]) -> Option<(u64, u64)> {
    let word = |n: usize| {
        let bytes = data.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let (number, nonce) = (word(0), word(1));
    (number != 0 && word(2) == mixed(number ^ nonce)).then_some((number, nonce))
}

fn place(number: u64) -> u64 {
    number % SLOTS * STRIDE
}

impl Machine {
    /// A machine that has not started.
    pub fn new(disk_only: bool) -> Machine {
        let state = State {
            memory: vec![0; PAGES * PAGE_SIZE],
            counter: Counter::Boot,
            dirty: vec![false; PAGES],
            tracking: false,
            paused: false,
            started: false,
            life: 0,
        };
        Machine {
            state: Arc::new(Mutex::new(state)),
            changed: Arc::default(),
            disk_only,
        }
    }

    fn shared_ram(&self) -> &[RamRegion] {
        if self.disk_only { &[] } else { &RAM }
    }

    /// Takes a saved state over; its memory is there already.
    pub fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let block = StateReader::new(saved).next();
        let block = block.and_then(Result::ok).ok_or("no state block")?;
        let number = block.payload.try_into().map_err(|_| "a short block")?;
        let mut state = self.state.lock();
        state.counter = Counter::of(u64::from_le_bytes(number));
        state.paused = false;
        (0..PAGES).try_for_each(|page| match page {
            0..=2 => Ok(()),
            page => state.check(page),
        })
    }

    /// Lets the program run, in a thread of its own.
    pub fn start(&self, ports: Ports) -> std::io::Result<()> {
        let mut state = self.state.lock();
        state.paused = false;
        if std::mem::replace(&mut state.started, true) {
            self.changed.notify_all();
            return Ok(());
        }
        state.life += 1;
        let life = state.life;
        drop(state);
        let machine = self.clone();
        let run = move || Program { machine, life }.run(&ports);
        ax_sync::thread::spawn("vcpu", run).map(drop)
    }

    /// Pauses it for good, or lets it go on.
    pub fn park(&self, on: bool) {
        self.state.lock().paused = on;
        self.changed.notify_all();
    }

    /// It runs elsewhere now: the program here ends at its next step, the memory stays.
    pub fn vacate(&self) {
        let mut state = self.state.lock();
        state.started = false;
        state.paused = true;
        self.changed.notify_all();
    }

    /// The memory, for a comparison.
    pub fn memory(&self) -> Vec<u8> {
        self.state.lock().memory.clone()
    }
}

/// One run of the program.
struct Program {
    machine: Machine,
    life: u64,
}

impl Program {
    /// The state, once the machine is not paused; none when it runs elsewhere.
    fn running(&self) -> Option<ax_sync::MutexGuard<'_, State>> {
        let mut state = self.machine.state.lock();
        let lives = |state: &State| state.started && state.life == self.life;
        while state.paused && lives(&state) {
            self.machine.changed.wait(&mut state);
        }
        lives(&state).then_some(state)
    }

    fn run(&self, ports: &Ports) {
        while let Some(state) = self.running() {
            let counter = state.counter;
            drop(state);
            let done = match counter {
                Counter::Boot => self.boot(ports),
                Counter::Think => self.think(ports),
                Counter::Write => self.write(ports),
                Counter::Flush => self.flush(ports),
                Counter::Answer => self.answer(ports),
            };
            if done.is_none() {
                return;
            }
        }
    }

    /// True when the request was done. One that was not stays in flight, and is tried again.
    fn io(ports: &Ports, flush: bool, done: std::io::Result<()>) -> bool {
        if done.is_err() {
            (ports.trouble)(flush);
            ax_sync::thread::sleep(Duration::from_millis(5));
        }
        done.is_ok()
    }

    fn boot(&self, ports: &Ports) -> Option<()> {
        let mut found = HashMap::new();
        let mut last = 0;
        for slot in 0..SLOTS {
            let mut data = [0; 512];
            if !Self::io(ports, false, ports.image.read(slot * STRIDE, &mut data)) {
                return self.running().map(drop);
            }
            if let Some((number, nonce)) = parse(&data) {
                found.insert(number, nonce);
                last = last.max(number);
            }
        }
        let mut state = self.running()?;
        (ports.booted)(last, &found);
        let from = last.saturating_sub(SLOTS - 1).max(1);
        for number in from..=last {
            // What is not there was never answered for, or an older one than the ledger holds.
            let nonce = found.get(&number).copied().unwrap_or(0);
            state.put(State::nonce_at(number), number);
            state.put(State::nonce_at(number) + 8, nonce);
        }
        state.put(NUMBER, last);
        state.counter = Counter::Think;
        Some(())
    }

    fn think(&self, ports: &Ports) -> Option<()> {
        let here = sim::current()?;
        here.sleep(Duration::from_nanos(here.below(900_000)));
        let old = self.running()?.word(NUMBER);
        if old > 0 && here.below(3) == 0 {
            self.look_back(ports, old - here.below(old.min(SLOTS - 1)))?;
        }
        let mut state = self.running()?;
        let number = state.word(NUMBER) + 1;
        // Not of the guest's memory: a guest that does this again draws another one.
        let nonce = here.below(u64::MAX);
        for _ in 0..1 + here.below(5) {
            let page = 3 + here.below(PAGES as u64 - 3) as usize;
            if let Err(why) = state.check(page) {
                (ports.failed)(&why);
            }
            state.stamp(page, number);
        }
        state.put(State::nonce_at(number), number);
        state.put(State::nonce_at(number) + 8, nonce);
        state.put(NUMBER, number);
        state.counter = Counter::Write;
        Some(())
    }

    /// The disk must have what memory knows was written there.
    fn look_back(&self, ports: &Ports, number: u64) -> Option<()> {
        let mut data = [0; 512];
        if !Self::io(ports, false, ports.image.read(place(number), &mut data)) {
            return Some(());
        }
        let state = self.running()?;
        let at = State::nonce_at(number);
        let (known, nonce) = (state.word(at), state.word(at + 8));
        if known == number && nonce != 0 && parse(&data) != Some((number, nonce)) {
            let there = parse(&data);
            (ports.failed)(&format!(
                "I4: the disk has {there:?} where record {number} with {nonce:x} was written"
            ));
        }
        Some(())
    }

    fn record(state: &State) -> (u64, [u8; 512]) {
        let number = state.word(NUMBER);
        let nonce = state.word(State::nonce_at(number) + 8);
        (number, sector(number, nonce))
    }

    fn write(&self, ports: &Ports) -> Option<()> {
        let (number, data) = Self::record(&*self.running()?);
        let at = place(number);
        if !ports.log.admit(data.len()) {
            (ports.failed)("a write was not admitted");
        }
        if !Self::io(ports, false, ports.image.write_in_hand(at, &data)) {
            ports.log.abandoned(data.len());
            return self.running().map(drop);
        }
        let Some(mut state) = self.running() else {
            ports.log.abandoned(data.len());
            return None;
        };
        ports.log.completed(0, at, &data);
        ports.image.settled(at, data.len());
        state.counter = Counter::Flush;
        Some(())
    }

    fn flush(&self, ports: &Ports) -> Option<()> {
        if !Self::io(ports, true, ports.image.flush()) {
            return self.running().map(drop);
        }
        if ports.sync {
            ports.log.flush_on_shadow(0);
        }
        let mut state = self.running()?;
        if !ports.sync {
            ports.log.flushed(0);
        }
        state.counter = Counter::Answer;
        Some(())
    }

    fn answer(&self, ports: &Ports) -> Option<()> {
        let mut state = self.running()?;
        let (_, data) = Self::record(&state);
        let frame = data.get(..64).unwrap_or_default();
        let output = Record {
            kind: RecordKind::Frame,
            unit: 0,
            at: 0,
            payload: frame,
        };
        if ports.barrier.hold(output).is_ok() {
            state.counter = Counter::Think;
            return Some(());
        }
        drop(state);
        ax_sync::thread::sleep(Duration::from_micros(300));
        Some(())
    }
}

/// Where two images differ that should be equal, but for a record that nobody was answered for: the one in hand
/// when the guest stopped is in its own image and nowhere else.
pub fn differ(a: &[u8], b: &[u8], answered: u64) -> Option<usize> {
    let number = |sector: &[u8]| sector.try_into().ok().and_then(parse).map(|r| r.0);
    let mut in_hand = 0;
    let sectors = a.chunks(512).zip(b.chunks(512));
    let mut differing = sectors.enumerate().filter(|(_, (a, b))| a != b);
    let first = differing.find(|(_, (a, b))| {
        in_hand += 1;
        let later = |sector| number(sector).is_some_and(|n| n > answered);
        in_hand > 1 || !(later(a) || later(b))
    });
    first.map(|(n, _)| n * 512)
}

/// The answer that a frame is.
pub fn answer_of(frame: &[u8]) -> Option<(u64, u64)> {
    let mut data = [0; 512];
    data.get_mut(..frame.len())?.copy_from_slice(frame);
    parse(&data)
}

impl Guest for Machine {
    fn ram(&self) -> &[RamRegion] {
        self.shared_ram()
    }

    fn track_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        let mut state = self.state.lock();
        state.tracking = on;
        state.dirty.fill(false);
        Ok(())
    }

    fn dirty_estimate(&mut self) -> Result<usize, GuestError> {
        if self.disk_only {
            return Ok(0);
        }
        Ok(self.state.lock().dirty.iter().filter(|d| **d).count())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if self.disk_only {
            return Ok(());
        }
        self.state.lock().paused = true;
        Ok(())
    }

    fn save(&mut self, out: &mut StateWriter<'_>) -> Result<(), GuestError> {
        if self.disk_only {
            return Ok(());
        }
        let state = self.state.lock();
        let counter = state.counter as u64;
        // Registers that stay as they are: so much state that it travels as patches.
        out.block(1, 1, 0, &counter.to_le_bytes())
            .and_then(|()| out.block(2, 1, 0, &[0; 1024]))
            .map_err(|_| trouble("saving"))
    }

    fn harvest(&mut self, dirty: &mut Vec<Page>) -> Result<(), GuestError> {
        dirty.clear();
        if self.disk_only {
            return Ok(());
        }
        let mut state = self.state.lock();
        for at in 0..PAGES {
            if let Some(bit) = state.dirty.get_mut(at)
                && std::mem::take(bit)
            {
                dirty.push(page_of(at));
            }
        }
        Ok(())
    }

    fn give_back(&mut self, pages: &[Page]) {
        let mut state = self.state.lock();
        // None are given back that were not harvested.
        for at in pages.iter().filter_map(|page| page_at(*page)) {
            if let Some(bit) = state.dirty.get_mut(at) {
                *bit = true;
            }
        }
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        let at = page_at(first).ok_or_else(|| trouble("reading"))? * PAGE_SIZE;
        let state = self.state.lock();
        let there = state.memory.get(at..at + out.len());
        out.copy_from_slice(there.ok_or_else(|| trouble("reading"))?);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.disk_only {
            return Ok(());
        }
        self.park(false);
        Ok(())
    }
}

impl ShadowGuest for Machine {
    fn ram(&self) -> &[RamRegion] {
        self.shared_ram()
    }

    fn write_pages(&mut self, first: Page, data: &[u8]) -> Result<(), GuestError> {
        let at = page_at(first).ok_or_else(|| trouble("writing"))? * PAGE_SIZE;
        let mut state = self.state.lock();
        let place = state.memory.get_mut(at..at + data.len());
        place
            .ok_or_else(|| trouble("writing"))?
            .copy_from_slice(data);
        Ok(())
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        Guest::read_pages(self, first, out)
    }
}
