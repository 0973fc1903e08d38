//! What a process is made of: disk, gate, tap, machine, heartbeats.

use std::sync::Arc;

use ax_disk::{Image, Medium, WriteLog};
use ax_sync::Mutex;
use ax_wire::offload::HEADER;
use io_barrier::{Barrier, BarrierConfig, OutputSink, Power};
use statepoint::primary::PrimaryHandle;

use crate::disk::Handle;
use crate::guest::{self, DISK, Machine};
use crate::oracle::Sender;
use crate::universe::{Broken, HostClock, PAIR, Running, Universe, place};

use super::{BEAT, Input, PERMISSION};

/// What lives as long as the process.
pub struct Parts {
    /// Everything else.
    pub universe: Arc<Universe>,
    /// Who this is.
    pub mine: Running,
    /// The machine.
    pub machine: Machine,
    /// Its disk.
    pub image: Arc<Image>,
    /// Its disk's writes.
    pub log: Arc<WriteLog>,
    /// The gate.
    pub barrier: Arc<Barrier>,
    /// This host's clock.
    pub clock: Arc<HostClock>,
    /// Who captures epochs now.
    pub bell: Arc<Mutex<Option<PrimaryHandle>>>,
    /// Under which generation outputs leave.
    pub(super) releases: Arc<parking_lot::Mutex<u64>>,
    pub(super) failed: Arc<dyn Fn(&str) + Send + Sync>,
}

/// The tap: what comes here is seen by the outside.
struct Tap {
    universe: Arc<Universe>,
    side: usize,
    releases: Arc<parking_lot::Mutex<u64>>,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
}

impl OutputSink for Tap {
    fn frame(&mut self, _: u8, _: &[u8; HEADER], frame: &[u8]) {
        let sender = Sender {
            generation: *self.releases.lock(),
            side: self.side,
        };
        let answer = guest::answer_of(frame).ok_or_else(|| "a frame is torn".to_owned());
        let judged = answer.and_then(|(n, nonce)| self.universe.oracle.answer(sender, n, nonce));
        if let Err(why) = judged {
            (self.failed)(&why);
        }
    }

    fn console(&mut self, _: u64, _: &[u8]) {}

    fn power(&mut self, _: Power) {}
}

pub(super) fn parts(
    universe: &Arc<Universe>,
    mine: &Running,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Parts, ax_disk::OpenError> {
    let side = mine.me.side as usize;
    let (image, facts) = {
        let host = universe.hosts[side].lock();
        (Arc::clone(&host.image), Arc::clone(&host.facts))
    };
    let media = [(); 2].map(|()| Box::new(Handle(Arc::clone(&image))) as Box<dyn Medium>);
    let facts: Box<dyn Medium> = Box::new(Handle(facts));
    let path = std::path::Path::new("image");
    let image = Image::on(path, media, (facts, path), PAIR, DISK, false)?;
    let bell: Arc<Mutex<Option<PrimaryHandle>>> = Arc::default();
    let ring = |bell: &Arc<Mutex<Option<PrimaryHandle>>>, how: fn(&PrimaryHandle)| {
        let bell = Arc::clone(bell);
        move || {
            if let Some(engine) = &*bell.lock() {
                how(engine);
            }
        }
    };
    let log = WriteLog::new(64 << 10, ring(&bell, PrimaryHandle::trigger));
    let clock = universe.clock(side);
    let releases = Arc::new(parking_lot::Mutex::new(0));
    let tap = Tap {
        universe: Arc::clone(universe),
        side,
        releases: Arc::clone(&releases),
        failed: Arc::clone(&failed),
    };
    let config = BarrierConfig {
        epoch_bytes: 1 << 12,
        max_epochs: 4,
        permission_ns: match universe.breaks(Broken::Permission) {
            true => 500_000_000,
            false => PERMISSION,
        },
    };
    let barrier = Barrier::new(config, Box::new(tap), clock.clone());
    barrier.on_pending(ring(&bell, PrimaryHandle::wake));
    Ok(Parts {
        universe: Arc::clone(universe),
        mine: mine.clone(),
        machine: Machine::new(universe.setting.ha),
        image: Arc::new(image),
        log: Arc::new(log),
        barrier: Arc::new(barrier),
        clock,
        bell,
        releases,
        failed,
    })
}

/// Heartbeats, from a thread of their own.
pub(super) fn beat(parts: &Parts, to: Arc<parking_lot::Mutex<Option<Running>>>, side: usize) {
    let (bell, mine) = (Arc::clone(&parts.bell), parts.mine.clone());
    let send = move || {
        loop {
            ax_sync::thread::sleep(BEAT);
            let Some(peer) = to.lock().clone() else {
                continue;
            };
            let engine = bell.lock().clone();
            let (at, pending) = engine.map_or(([0; 2], false), |engine| {
                let progress = engine.progress();
                let epochs = [progress.captured.0, progress.acked.0];
                (epochs, progress.acked.0 > 0 && engine.work_pending())
            });
            let beat = Input::Beat(mine.me.incarnation, at, pending);
            peer.inbox.send(place(side), beat);
        }
    };
    let _ = ax_sync::thread::spawn("beats", send);
}
