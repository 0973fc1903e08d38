//! A machine without a CPU: devices, the RAM they share with a fake driver, fake ports.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use ax_wire::offload::{NOTHING, Packet};
use parking_lot::{Condvar, Mutex};
use tempfile::tempfile;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::super::{DeviceSet, DeviceSpec, Ports, RxOutcome};
use crate::bitmap::DirtyBitmap;
use crate::config::NicConfig;
use crate::memory::GuestMemory;
use crate::ports::{Disk, Full, Outputs, Power};

pub const RAM: usize = 4 << 20;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
pub const NIC: NicConfig = NicConfig {
    mac: MAC,
    offload: true,
};
pub const DISK: usize = 1 << 20;

/// Waits for what other threads bring about.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "never happened: {what}"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[derive(Default)]
pub struct FakeOutputs {
    /// Frames whose headers leave nothing to be done.
    pub frames: Mutex<Vec<Vec<u8>>>,
    /// All others, behind their headers.
    pub packets: Mutex<Vec<Vec<u8>>>,
    pub console: Mutex<Vec<u8>>,
    pub power: Mutex<Vec<Power>>,
    /// Frames and console calls refused from now on.
    pub full: AtomicBool,
    pub calls: AtomicUsize,
    /// The state was tampered with: offsets may be anything.
    pub lax: AtomicBool,
}

impl Outputs for FakeOutputs {
    fn frame(&self, nic: u8, packet: Packet<'_>) -> Result<(), Full> {
        self.calls.fetch_add(1, SeqCst);
        assert_eq!(nic, 0);
        if self.full.load(SeqCst) {
            return Err(Full);
        }
        match packet.header() == NOTHING {
            true => self.frames.lock().push(packet.frame().to_vec()),
            false => self.packets.lock().push(packet.bytes().to_vec()),
        }
        Ok(())
    }

    fn console(&self, offset: u64, bytes: &[u8]) -> Result<(), Full> {
        self.calls.fetch_add(1, SeqCst);
        if self.full.load(SeqCst) {
            return Err(Full);
        }
        let mut console = self.console.lock();
        let right = offset == console.len() as u64 || self.lax.load(SeqCst);
        assert!(right, "rule 8: every byte at its place, once");
        console.extend(bytes);
        Ok(())
    }

    fn power(&self, what: Power) {
        self.calls.fetch_add(1, SeqCst);
        self.power.lock().push(what);
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Logged {
    Wrote(u64, Vec<u8>),
    Flushed,
    WriteSeen(u64, Vec<u8>),
    FlushSeen,
}

pub struct FakeDisk {
    pub image: Mutex<Vec<u8>>,
    pub log: Mutex<Vec<Logged>>,
    pub fail: AtomicBool,
    /// While true, requests are not completed here.
    pub gives_back: AtomicBool,
    pub read_only: bool,
    /// While true, I/O waits before it returns.
    held: Mutex<bool>,
    freed: Condvar,
    pub inside: AtomicUsize,
    pub inside_ever: AtomicUsize,
    pub seen: AtomicU64,
}

impl FakeDisk {
    pub fn new(image: Vec<u8>, read_only: bool) -> Arc<Self> {
        Arc::new(FakeDisk {
            image: Mutex::new(image),
            log: Mutex::default(),
            fail: AtomicBool::new(false),
            gives_back: AtomicBool::new(false),
            read_only,
            held: Mutex::new(false),
            freed: Condvar::new(),
            inside: AtomicUsize::new(0),
            inside_ever: AtomicUsize::new(0),
            seen: AtomicU64::new(0),
        })
    }

    pub fn hold(&self, on: bool) {
        *self.held.lock() = on;
        self.freed.notify_all();
    }

    fn io<T>(&self, act: impl FnOnce() -> T) -> io::Result<T> {
        let done = act();
        self.inside.fetch_add(1, SeqCst);
        self.inside_ever.fetch_add(1, SeqCst);
        self.freed.wait_while(&mut self.held.lock(), |held| *held);
        self.inside.fetch_sub(1, SeqCst);
        if self.gives_back.load(SeqCst) {
            Err(io::ErrorKind::Interrupted.into())
        } else if self.fail.load(SeqCst) {
            Err(io::Error::other("injected"))
        } else {
            Ok(done)
        }
    }
}

impl Disk for FakeDisk {
    fn size(&self) -> u64 {
        self.image.lock().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        self.io(|| out.copy_from_slice(&self.image.lock()[at..at + out.len()]))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        self.io(|| {
            self.image.lock()[at..at + data.len()].copy_from_slice(data);
            self.log.lock().push(Logged::Wrote(offset, data.to_vec()));
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.io(|| self.log.lock().push(Logged::Flushed))
    }

    fn write_completed(&self, offset: u64, data: &[u8]) {
        self.seen.fetch_add(1, SeqCst);
        self.log
            .lock()
            .push(Logged::WriteSeen(offset, data.to_vec()));
    }

    fn flush_completed(&self) {
        self.seen.fetch_add(1, SeqCst);
        self.log.lock().push(Logged::FlushSeen);
    }
}

/// Net in window 0, disk in window 1, entropy in window 2.
pub struct Rig {
    pub set: DeviceSet,
    pub outputs: Arc<FakeOutputs>,
    pub disk: Arc<FakeDisk>,
    /// The guest's view of RAM: its writes mark nothing.
    pub ram: GuestMemory,
    /// The devices' view: all that is marked here was written by devices.
    pub devices_ram: Arc<MmapRegion<DirtyBitmap>>,
}

pub const NET: usize = 0;
pub const BLK: usize = 1;
pub const RNG: usize = 2;

impl Rig {
    /// With patterned disk contents and zeroed RAM; threads not started.
    pub fn new() -> Self {
        Rig::with(FakeDisk::new(
            (0..DISK).map(|i| (i / 512 + i) as u8).collect(),
            false,
        ))
    }

    pub fn with_nic(nic: NicConfig) -> Self {
        Rig::of(FakeDisk::new(vec![0; DISK], false), nic)
    }

    pub fn with(disk: Arc<FakeDisk>) -> Self {
        Rig::of(disk, NIC)
    }

    fn of(disk: Arc<FakeDisk>, nic: NicConfig) -> Self {
        let file = tempfile().unwrap();
        file.set_len(RAM as u64).unwrap();
        let file = Arc::new(file);
        let map = || {
            let bitmap = DirtyBitmap::new(RAM / 4096);
            let map = MmapRegionBuilder::new_with_bitmap(RAM, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
                .build()
                .unwrap();
            Arc::new(map)
        };
        let memory = |map: &Arc<MmapRegion<DirtyBitmap>>| {
            let region = GuestRegionMmap::with_arc(Arc::clone(map), GuestAddress(0)).unwrap();
            GuestMemoryMmap::from_regions(vec![region]).unwrap()
        };
        let (guest, devices) = (map(), map());
        let outputs = Arc::new(FakeOutputs::default());
        let spec = DeviceSpec {
            nics: vec![nic],
            disks: 1,
            rng: true,
        };
        let ports = Ports {
            outputs: Arc::clone(&outputs) as Arc<dyn Outputs>,
            disks: vec![Arc::clone(&disk) as Arc<dyn Disk>],
        };
        let set = DeviceSet::new(memory(&devices), spec, ports).unwrap();
        Rig {
            set,
            outputs,
            disk,
            ram: memory(&guest),
            devices_ram: devices,
        }
    }

    /// A received frame of which nothing is left to be done.
    pub fn net_rx(&self, nic: usize, frame: &[u8]) -> RxOutcome {
        let bytes = [&NOTHING[..], frame].concat();
        self.set.net_rx(nic, Packet::new(&bytes).unwrap())
    }

    pub fn started() -> Self {
        let rig = Rig::new();
        rig.set.start().unwrap();
        rig
    }

    pub fn read(&self, window: usize, register: u64) -> u32 {
        let mut value = [0; 4];
        self.set
            .mmio_read(self.set.wires()[window].base + register, &mut value);
        u32::from_le_bytes(value)
    }

    pub fn write(&self, window: usize, register: u64, value: u32) {
        self.set.mmio_write(
            self.set.wires()[window].base + register,
            &value.to_le_bytes(),
        );
    }

    /// What the devices have written since the last call, as page numbers.
    pub fn drain(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        self.devices_ram.bitmap().drain(|p| pages.push(p));
        pages
    }

    pub fn all_ram(&self) -> Vec<u8> {
        let mut all = vec![0; RAM];
        self.ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.ram.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    pub fn irq(&self, window: usize) -> &EventFd {
        &self.set.wires()[window].irq
    }

    /// Interrupts raised since the last call.
    pub fn irqs(&self, window: usize) -> u64 {
        self.irq(window).read().unwrap_or(0)
    }
}

pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const BLK_FLUSH: u64 = 1 << 9;

/// A driver's half of a virtqueue. Can be moved to another rig with the same RAM contents.
#[derive(Debug, Clone)]
pub struct Queue {
    pub size: u16,
    pub base: u64,
    window: usize,
    index: u32,
    next_desc: u16,
    pub avail: u16,
    seen: u16,
    event_idx: bool,
}

impl Queue {
    pub fn desc_at(&self) -> u64 {
        self.base
    }

    pub fn avail_at(&self) -> u64 {
        self.base + 0x1000
    }

    pub fn used_at(&self) -> u64 {
        self.base + 0x2000
    }

    /// Makes a chain of (address, length) buffers available, without ringing. Returns its head.
    pub fn add(&mut self, rig: &Rig, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let head = self.next_desc;
        let all = readable
            .iter()
            .map(|b| (b, 0u16))
            .chain(writable.iter().map(|b| (b, 2)));
        let count = readable.len() + writable.len();
        for (i, ((addr, len), flags)) in all.enumerate() {
            let next = (self.next_desc + 1) % self.size;
            let flags = if i + 1 < count { flags | 1 } else { flags };
            let mut descriptor = addr.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            rig.put(self.desc_at() + 16 * u64::from(self.next_desc), &descriptor);
            self.next_desc = next;
        }
        self.publish(rig, head);
        head
    }

    pub fn publish(&mut self, rig: &Rig, head: u16) {
        let slot = u64::from(self.avail % self.size);
        rig.put(self.avail_at() + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        std::sync::atomic::fence(SeqCst);
        let at = GuestAddress(self.avail_at() + 2);
        rig.ram
            .store(self.avail, at, std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    pub fn kick(&self, rig: &Rig) {
        rig.write(self.window, 0x50, self.index);
    }

    /// Chains used since the last call: (head, bytes written). Keeps asking for interrupts.
    pub fn used(&mut self, rig: &Rig) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        loop {
            let at = GuestAddress(self.used_at() + 2);
            let used: u16 = rig
                .ram
                .load(at, std::sync::atomic::Ordering::SeqCst)
                .unwrap();
            if used == self.seen {
                return all;
            }
            let at = self.used_at() + 4 + 8 * u64::from(self.seen % self.size);
            let entry = rig.get(at, 8);
            let word = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
            all.push((word(0), word(4)));
            self.seen = self.seen.wrapping_add(1);
            if self.event_idx {
                let used_event = self.avail_at() + 4 + 2 * u64::from(self.size);
                rig.put(used_event, &self.seen.to_le_bytes());
            }
        }
    }

    /// How many chains were used and not seen yet. Writes nothing.
    pub fn unseen(&self, rig: &Rig) -> u16 {
        let at = GuestAddress(self.used_at() + 2);
        let used: u16 = rig
            .ram
            .load(at, std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        used.wrapping_sub(self.seen)
    }

    /// Waits for the next used chain.
    pub fn wait_used(&mut self, rig: &Rig) -> Vec<(u32, u32)> {
        let mut got = Vec::new();
        wait_for("a used buffer", || {
            got = self.used(rig);
            !got.is_empty()
        });
        got
    }
}

/// Initialises the device in `window` as a driver does; its queues lie at `base`.
pub fn drive(rig: &Rig, window: usize, features: u64, base: u64, sizes: &[u16]) -> Vec<Queue> {
    let features = features | VERSION_1;
    for status in [0, 1, 3] {
        rig.write(window, 0x70, status);
    }
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        rig.write(window, 0x24, select);
        rig.write(window, 0x20, half);
    }
    rig.write(window, 0x70, 11);
    assert_eq!(
        rig.read(window, 0x70),
        11,
        "the device accepts what it offers"
    );
    let queues: Vec<_> = (0u32..)
        .zip(sizes)
        .map(|(index, size)| Queue {
            size: *size,
            base: base + 0x4000 * u64::from(index),
            window,
            index,
            next_desc: 0,
            avail: 0,
            seen: 0,
            event_idx: features & EVENT_IDX != 0,
        })
        .collect();
    for queue in &queues {
        rig.put(queue.base, &[0; 0x4000]);
        rig.write(window, 0x30, queue.index);
        rig.write(window, 0x38, queue.size.into());
        let places = [
            (0x80, queue.desc_at()),
            (0x90, queue.avail_at()),
            (0xa0, queue.used_at()),
        ];
        for (register, at) in places {
            rig.write(window, register, at as u32);
            rig.write(window, register + 4, (at >> 32) as u32);
        }
        rig.write(window, 0x44, 1);
        assert_eq!(rig.read(window, 0x44), 1, "the queue is taken");
    }
    rig.write(window, 0x70, 15);
    queues
}

/// A virtio-blk request header.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}
