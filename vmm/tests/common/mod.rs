//! What the tests of the machine share.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod payload;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmm::ports::{Full, Outputs, Power};
use vmm::{BootConfig, DirtyTracking, HostCaps, Image, Machine, MachineConfig, Ports};

use ax_wire::state::StateWriter;
use payload::Mode;

/// Collects what the guest shows.
#[derive(Default)]
pub struct Collected {
    pub console: Mutex<Vec<u8>>,
    pub power: Mutex<Vec<Power>>,
}

impl Outputs for Collected {
    fn frame(&self, _: u8, _: &[u8]) -> Result<(), Full> {
        Ok(())
    }

    /// Places bytes by their offset, as a reader of the released stream does.
    fn console(&self, offset: u64, bytes: &[u8]) -> Result<(), Full> {
        let mut all = self.console.lock();
        assert!(offset as usize <= all.len(), "a gap in the console stream");
        all.truncate(offset as usize);
        all.extend(bytes);
        Ok(())
    }

    fn power(&self, what: Power) {
        self.power.lock().push(what);
    }
}

/// Whether there is a KVM to test with; says by name that a test is skipped if not.
pub fn kvm() -> Option<HostCaps> {
    match HostCaps::probe() {
        Ok(caps) => Some(caps),
        Err(e) => {
            // anything else is a finding, not a reason to skip
            assert!(matches!(e, vmm::Error::NoKvm(_)), "{e}");
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            eprintln!("SKIPPED (no usable KVM): {name}: {e}");
            None
        }
    }
}

/// Ends a test that needs KVM where there is none, saying so.
#[macro_export]
macro_rules! require_kvm {
    () => {
        match $crate::common::kvm() {
            Some(caps) => caps,
            None => return,
        }
    };
}

pub const BITMAP: DirtyTracking = DirtyTracking::Bitmap { hot_pages: 64 };
pub const RING: DirtyTracking = DirtyTracking::Ring { entries: 256 };
pub const MEMORY: u64 = 16 << 20;

pub fn config(mode: Mode, vcpus: u8, limit: u64, dirty: DirtyTracking) -> MachineConfig {
    MachineConfig {
        memory: MEMORY,
        vcpus,
        nics: Vec::new(),
        rng: false,
        dirty,
        boot: BootConfig {
            kernel: Some(Image::Embedded(payload::elf(mode, vcpus, limit))),
            ..Default::default()
        },
    }
}

pub fn machine(caps: &HostCaps, config: &MachineConfig, outputs: &Arc<Collected>) -> Machine {
    let ports = Ports {
        outputs: Arc::clone(outputs) as _,
        disks: Vec::new(),
    };
    Machine::with_caps(config.clone(), ports, caps.clone()).unwrap()
}

pub fn booted(caps: &HostCaps, config: &MachineConfig, outputs: &Arc<Collected>) -> Machine {
    let mut machine = machine(caps, config, outputs);
    machine.boot().unwrap();
    machine
}

/// All RAM.
pub fn ram(machine: &Machine) -> Vec<u8> {
    let pages: u64 = machine.ram().iter().map(|r| r.pages).sum();
    let mut all = vec![0; pages as usize * 4096];
    let mut at = 0;
    for region in machine.ram() {
        let len = region.pages as usize * 4096;
        machine
            .read_pages(region.start, &mut all[at..at + len])
            .unwrap();
        at += len;
    }
    all
}

pub fn word(machine: &Machine, address: u64) -> u64 {
    let mut page = [0; 4096];
    machine.read_pages(address / 4096, &mut page).unwrap();
    let at = (address % 4096) as usize;
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

pub fn state(machine: &Machine) -> Vec<u8> {
    let mut buf = Vec::with_capacity(machine.state_capacity());
    machine.save(&mut StateWriter::new(&mut buf)).unwrap();
    buf
}

/// A fresh machine that goes on where a paused one is.
pub fn moved(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: &Arc<Collected>,
    from: &Machine,
) -> Machine {
    revived(caps, config, outputs, &state(from), &ram(from))
}

/// A fresh machine from saved state and RAM (one region), ready to start.
pub fn revived(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: &Arc<Collected>,
    state: &[u8],
    ram: &[u8],
) -> Machine {
    let mut machine = machine(caps, config, outputs);
    machine.write_pages(0, ram).unwrap();
    machine.restore(state, Duration::from_millis(1)).unwrap();
    machine.promote_fixups().unwrap();
    machine
}

/// Waits until `condition` holds; long enough to mean never when it does not.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Small deterministic random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    /// Lets time pass: up to `micros`.
    pub fn nap(&mut self, micros: u64) {
        std::thread::sleep(Duration::from_micros(self.below(micros)));
    }
}
