//! Small machines: built, read, and compared with copies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ax_wire::offload::Packet;
use ax_wire::state::StateWriter;

use super::payload::{self, Mode};
use crate::ports::{Full, Outputs, Power};
use crate::{
    BootConfig, DirtyTracking, HostCaps, Image, Machine, MachineConfig, Ports, RamRegion, Result,
};

/// The bitmap, with a small hot set.
pub const BITMAP: DirtyTracking = DirtyTracking::Bitmap { hot_pages: 64 };

/// The smallest rings: full and wrapped all the time.
pub const RING: DirtyTracking = DirtyTracking::Ring { entries: 256 };

/// RAM of these machines, bytes.
pub const MEMORY: u64 = 16 << 20;

const PAGE: usize = 4096;

/// Outputs of a guest that shows nothing while all is well with it.
#[derive(Debug, Default)]
pub struct Silence(AtomicBool);

impl Silence {
    /// Whether something was shown after all.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn broken(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Outputs for Silence {
    fn frame(&self, _: u8, _: Packet<'_>) -> std::result::Result<(), Full> {
        self.broken();
        Ok(())
    }

    fn console(&self, _: u64, _: &[u8]) -> std::result::Result<(), Full> {
        self.broken();
        Ok(())
    }

    fn power(&self, _: Power) {
        self.broken();
    }
}

/// A machine whose guest does `mode`; `limit` is the number of steps of [`Mode::Work`].
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

/// A machine neither booted nor restored.
///
/// # Errors
/// It can't be made here.
pub fn machine(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: Arc<dyn Outputs>,
) -> Result<Machine> {
    let disks = Vec::new();
    Machine::with_caps(config.clone(), Ports { outputs, disks }, caps.clone())
}

/// A machine ready to start.
///
/// # Errors
/// It can't be made here.
pub fn booted(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: Arc<dyn Outputs>,
) -> Result<Machine> {
    let mut machine = machine(caps, config, outputs)?;
    machine.boot()?;
    Ok(machine)
}

/// A fresh machine from saved state and RAM, as [`ram`] gives it; ready to start.
///
/// # Errors
/// The state is refused.
pub fn revived(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: Arc<dyn Outputs>,
    state: &[u8],
    ram: &[u8],
) -> Result<Machine> {
    let mut machine = machine(caps, config, outputs)?;
    let regions: Vec<RamRegion> = machine.ram().to_vec();
    let mut rest = ram;
    for region in regions {
        let (here, after) = rest.split_at((region.pages as usize * PAGE).min(rest.len()));
        machine.write_pages(region.start, here)?;
        rest = after;
    }
    machine.restore(state, Duration::from_millis(1))?;
    machine.promote_fixups()?;
    Ok(machine)
}

/// A paused machine's state.
///
/// # Errors
/// KVM refuses, or the machine runs.
pub fn state(machine: &Machine) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(machine.state_capacity());
    machine.save(&mut StateWriter::new(&mut bytes))?;
    Ok(bytes)
}

/// All RAM, region after region.
///
/// # Errors
/// It can't be read.
pub fn ram(machine: &Machine) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for region in machine.ram() {
        let at = all.len();
        all.resize(at + region.pages as usize * PAGE, 0);
        machine.read_pages(region.start, &mut all[at..])?;
    }
    Ok(all)
}

/// The eight bytes at a guest-physical address, which do not cross a page.
///
/// # Errors
/// The address is not RAM.
pub fn word(machine: &Machine, address: u64) -> Result<u64> {
    let mut page = [0; PAGE];
    machine.read_pages(address / PAGE as u64, &mut page)?;
    let mut word = [0; 8];
    let at = address as usize % PAGE;
    word.iter_mut()
        .zip(page.iter().skip(at))
        .for_each(|(to, from)| *to = *from);
    Ok(u64::from_le_bytes(word))
}

/// A copy of a machine's RAM that is told of its dirty pages, as a shadow is. One region of RAM
/// from address 0, as these small machines have.
#[derive(Debug)]
pub struct Mirror(Vec<u8>);

impl Mirror {
    /// A full copy.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn of(machine: &Machine) -> Result<Mirror> {
        Ok(Mirror(ram(machine)?))
    }

    /// Pages it has.
    pub fn pages(&self) -> usize {
        self.0.len() / PAGE
    }

    /// Copies these pages.
    ///
    /// # Errors
    /// One is not RAM.
    pub fn take(&mut self, machine: &Machine, pages: &[u64]) -> Result<()> {
        for page in pages {
            let at = *page as usize * PAGE;
            match self.0.get_mut(at..at + PAGE) {
                Some(copy) => machine.read_pages(*page, copy)?,
                None => machine.read_pages(*page, &mut [0; PAGE])?,
            }
        }
        Ok(())
    }

    /// Pages in which a paused machine's RAM, all of it, differs from the copy.
    ///
    /// # Errors
    /// RAM can't be read.
    pub fn differing(&self, machine: &Machine) -> Result<Vec<u64>> {
        let now = ram(machine)?;
        let pairs = now.chunks(PAGE).zip(self.0.chunks(PAGE));
        Ok(pairs
            .enumerate()
            .filter(|(_, (now, copy))| now != copy)
            .map(|(page, _)| page as u64)
            .collect())
    }
}

/// Small deterministic random numbers (xorshift).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }

    /// Lets time pass: up to `micros` microseconds.
    pub fn nap(&mut self, micros: u64) {
        std::thread::sleep(Duration::from_micros(self.below(micros)));
    }
}
