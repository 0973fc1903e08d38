//! What the tests of the machine share.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_wire::offload::Packet;
use parking_lot::Mutex;
use vmm::ports::{Full, Outputs, Power};
use vmm::selfcheck::rig;
use vmm::{HostCaps, Machine, MachineConfig};

pub use vmm::selfcheck::payload;
pub use vmm::selfcheck::rig::{BITMAP, RING, Random, config};

/// Collects what the guest shows.
#[derive(Default)]
pub struct Collected {
    pub console: Mutex<Vec<u8>>,
    pub power: Mutex<Vec<Power>>,
}

impl Outputs for Collected {
    fn frame(&self, _: u8, _: Packet<'_>) -> Result<(), Full> {
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

pub fn machine(caps: &HostCaps, config: &MachineConfig, outputs: &Arc<Collected>) -> Machine {
    rig::machine(caps, config, Arc::clone(outputs) as _).unwrap()
}

pub fn booted(caps: &HostCaps, config: &MachineConfig, outputs: &Arc<Collected>) -> Machine {
    rig::booted(caps, config, Arc::clone(outputs) as _).unwrap()
}

/// All RAM.
pub fn ram(machine: &Machine) -> Vec<u8> {
    rig::ram(machine).unwrap()
}

pub fn word(machine: &Machine, address: u64) -> u64 {
    rig::word(machine, address).unwrap()
}

pub fn state(machine: &Machine) -> Vec<u8> {
    rig::state(machine).unwrap()
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

/// A fresh machine from saved state and RAM, ready to start.
pub fn revived(
    caps: &HostCaps,
    config: &MachineConfig,
    outputs: &Arc<Collected>,
    state: &[u8],
    ram: &[u8],
) -> Machine {
    rig::revived(caps, config, Arc::clone(outputs) as _, state, ram).unwrap()
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
