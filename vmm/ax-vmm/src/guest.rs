//! The machine as the epoch engine sees it, and as everybody else may use it meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_wire::state::StateWriter;
use parking_lot::{Condvar, Mutex, MutexGuard};
use statepoint::guest::{Guest, GuestError, Page, RamRegion, ShadowGuest};
use vmm::Machine;

/// One machine, shared by the epoch engine and the conductor.
///
/// The *turn* is held from an epoch's pause to its resume, so that nobody resets, pauses for an
/// operator or parks for good in the middle of a capture.
#[derive(Debug)]
pub struct SharedMachine {
    machine: Mutex<Machine>,
    turn: Mutex<bool>,
    turn_over: Condvar,
    /// The vCPUs stay parked after an epoch: an operator's pause, or a parking for good.
    parked: AtomicBool,
    ram: Vec<RamRegion>,
}

fn failed(doing: &'static str) -> impl Fn(vmm::Error) -> GuestError {
    move |source| GuestError {
        doing,
        source: Box::new(source),
    }
}

impl SharedMachine {
    /// Shares a machine.
    pub fn new(machine: Machine) -> Arc<SharedMachine> {
        let ram = machine
            .ram()
            .iter()
            .map(|region| RamRegion {
                start: region.start,
                pages: region.pages,
            })
            .collect();
        Arc::new(SharedMachine {
            machine: Mutex::new(machine),
            turn: Mutex::new(false),
            turn_over: Condvar::new(),
            parked: AtomicBool::new(false),
            ram,
        })
    }

    /// The machine, for one short call that is harmless in the middle of a capture.
    pub fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock()
    }

    fn take_turn(&self) {
        let mut taken = self.turn.lock();
        while *taken {
            self.turn_over.wait(&mut taken);
        }
        *taken = true;
    }

    fn end_turn(&self) {
        *self.turn.lock() = false;
        self.turn_over.notify_one();
    }

    /// Does something to the machine between two captures.
    pub fn between_epochs<T>(&self, act: impl FnOnce(&mut Machine) -> T) -> T {
        self.take_turn();
        let done = act(&mut self.machine.lock());
        self.end_turn();
        done
    }

    /// Keeps the vCPUs parked from now on (true), or lets them go (false).
    ///
    /// # Errors
    /// The machine was never started, or a vCPU thread has died.
    pub fn park(&self, on: bool) -> vmm::Result<()> {
        self.parked.store(on, Ordering::Release);
        self.between_epochs(|machine| {
            if on {
                machine.pause()
            } else {
                machine.resume()
            }
        })
    }

    /// Gives the guest up that a final epoch left paused: [`Machine::vacate`]. The turn that the epoch
    /// took ends with it.
    ///
    /// # Errors
    /// As there.
    pub fn vacate(&self) -> vmm::Result<()> {
        let vacated = self.machine.lock().vacate();
        self.end_turn();
        vacated
    }

    /// Whether the vCPUs are kept parked.
    pub fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Acquire)
    }
}

/// The engine's handle.
#[derive(Clone, Debug)]
pub struct EpochGuest {
    machine: Arc<SharedMachine>,
    /// What an epoch takes of it.
    part: Part,
}

/// What of a guest the two sides of a pair share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything: the other side goes on where this one was.
    Whole,
    /// Its disks: the other side boots it. Nothing is paused, nothing of its memory or state is looked at.
    Disks,
}

impl EpochGuest {
    /// A handle to `part` of the guest.
    pub fn new(machine: &Arc<SharedMachine>, part: Part) -> EpochGuest {
        EpochGuest {
            machine: Arc::clone(machine),
            part,
        }
    }

    fn shared_ram(&self) -> &[RamRegion] {
        match self.part {
            Part::Whole => &self.machine.ram,
            Part::Disks => &[],
        }
    }
}

impl Guest for EpochGuest {
    fn ram(&self) -> &[RamRegion] {
        self.shared_ram()
    }

    fn track_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            return Ok(());
        }
        self.machine
            .lock()
            .track_dirty(on)
            .map_err(failed("switch dirty tracking"))
    }

    fn dirty_estimate(&mut self) -> Result<usize, GuestError> {
        if self.part == Part::Disks {
            return Ok(0);
        }
        self.machine
            .lock()
            .dirty_estimate()
            .map_err(failed("count dirty pages"))
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            return Ok(());
        }
        self.machine.take_turn();
        self.machine
            .lock()
            .pause()
            .map_err(failed("pause"))
            .inspect_err(|_| self.machine.end_turn())
    }

    fn pause_and<T: Send, R: Send>(
        whole: &mut T,
        of: impl Fn(&mut T) -> &mut Self,
        act: impl FnOnce(&mut T) -> R + Send,
    ) -> Result<R, GuestError> {
        if of(whole).part == Part::Disks {
            return Ok(act(whole));
        }
        let shared = Arc::clone(&of(whole).machine);
        shared.take_turn();
        let mut act = Some(act);
        let mut done = Err(vmm::Error::VcpuGone);
        // Not with the machine locked: `act` locks it, on another thread.
        let parking = shared.lock().parking();
        let parked = parking.and_then(|parking| {
            let mut then = || {
                let quiet = shared.lock().parked();
                if let Some(act) = act.take() {
                    done = quiet.map(|()| act(whole));
                }
            };
            match parking {
                Some(parking) => parking.run(&mut then),
                None => {
                    then();
                    Ok(())
                }
            }
        });
        parked
            .and(done)
            .map_err(failed("pause"))
            .inspect_err(|_| shared.end_turn())
    }

    fn was_idle(&self) -> bool {
        self.part == Part::Whole && self.machine.lock().was_idle()
    }

    fn save(&mut self, out: &mut StateWriter<'_>) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            return Ok(());
        }
        self.machine
            .lock()
            .save(out)
            .map_err(failed("save the machine's state"))
    }

    fn harvest(&mut self, dirty: &mut Vec<Page>) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            dirty.clear();
            return Ok(());
        }
        self.machine
            .lock()
            .harvest(dirty)
            .map_err(failed("harvest dirty pages"))
    }

    fn give_back(&mut self, pages: &[Page]) {
        if self.part == Part::Disks {
            return;
        }
        self.machine.lock().give_back(pages);
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        self.machine
            .lock()
            .read_pages(first, out)
            .map_err(failed("read guest memory"))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            return Ok(());
        }
        let resumed = if self.machine.is_parked() {
            Ok(())
        } else {
            self.machine.lock().resume()
        };
        self.machine.end_turn();
        resumed.map_err(failed("resume"))
    }

    fn parked_ns(&self) -> Option<u64> {
        if self.part == Part::Disks {
            return None;
        }
        Some(self.machine.lock().parked_ns())
    }

    fn resumed_ns(&self) -> Option<u64> {
        if self.part == Part::Disks {
            return None;
        }
        self.machine.lock().resumed_ns()
    }
}

impl ShadowGuest for EpochGuest {
    fn ram(&self) -> &[RamRegion] {
        self.shared_ram()
    }

    fn write_pages(&mut self, first: Page, data: &[u8]) -> Result<(), GuestError> {
        if self.part == Part::Disks {
            return Err(GuestError {
                doing: "write guest memory",
                source: "this VM shares its disks alone, and pages came".into(),
            });
        }
        self.machine
            .lock()
            .write_pages(first, data)
            .map_err(failed("write guest memory"))
    }

    fn read_pages(&self, first: Page, out: &mut [u8]) -> Result<(), GuestError> {
        self.machine
            .lock()
            .read_pages(first, out)
            .map_err(failed("read guest memory"))
    }
}
