//! Everything that lives as long as the process, whatever its role: made once, wired once.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_api::process::{Arbiter, Security as SecuritySpec, Spec};
use ax_api::vm::{Boot, DirtySource, Secondary};
use ax_arbiter::{Client, Etcd};
use ax_disk::{Image, WriteLog};
use ax_link::{AddressPair, Connector, HostName, Identity, Security, TrustStore};
use ax_wire::offload::{Offloads, Packet};
use ax_wire::records::{Record, RecordKind};
use io_barrier::{Barrier, BarrierConfig, Boottime};
use parking_lot::Mutex;
use statepoint::primary::PrimaryHandle;
use vmm::ports::{Disk, Full, Outputs, Power};
use vmm::{BootConfig, DirtyTracking, Machine, MachineConfig, MachineHandle, NicConfig, Ports};

use crate::asker::third::Connect;
use crate::console::Console;
use crate::disks::MirroredDisk;
use crate::error::Error;
use crate::faults::{Faults, Standing};
use crate::guest::SharedMachine;
use crate::outside::{Inside, Sink, Taps};

/// Bytes of disk writes one epoch may carry: with pages and outputs well under an epoch's budget.
const DISK_BUDGET: usize = 4 << 20;

/// Pages that may stay writable between epochs (rule 4): 4 MiB of copies at most.
const HOT_PAGES: usize = 1024;

/// Entries of all dirty rings together: 16 MiB of pages, the byte budget of an epoch (rule 2).
const RING_ENTRIES: u32 = 4096;

/// The engine that is to be woken, if there is one now.
#[derive(Clone, Default)]
pub struct EngineBell(Arc<Mutex<Option<PrimaryHandle>>>);

impl std::fmt::Debug for EngineBell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EngineBell({})", self.0.lock().is_some())
    }
}

impl EngineBell {
    /// Connects the bell to an engine, or to none.
    pub fn set(&self, engine: Option<PrimaryHandle>) {
        *self.0.lock() = engine;
    }

    /// The engine, if there is one: for what takes longer than a device should wait.
    pub fn engine(&self) -> Option<PrimaryHandle> {
        self.0.lock().clone()
    }

    /// Does something with the engine, if there is one.
    pub fn with(&self, act: impl FnOnce(&PrimaryHandle)) {
        if let Some(engine) = &*self.0.lock() {
            act(engine);
        }
    }
}

/// The machine's outputs on their way into the barrier.
struct ToBarrier(Arc<Barrier>);

impl ToBarrier {
    fn hold(&self, kind: RecordKind, unit: u8, at: u64, payload: &[u8]) -> Result<(), Full> {
        self.0
            .hold(Record {
                kind,
                unit,
                at,
                payload,
            })
            .map_err(|io_barrier::Full| Full)
    }
}

impl Outputs for ToBarrier {
    fn frame(&self, nic: u8, packet: Packet<'_>) -> Result<(), Full> {
        let held = self.0.hold(packet.sent(nic));
        held.map_err(|io_barrier::Full| Full)
    }

    fn console(&self, offset: u64, bytes: &[u8]) -> Result<(), Full> {
        self.hold(RecordKind::Console, 0, offset, bytes)
    }

    fn power(&self, what: Power) {
        let kind = match what {
            Power::Off => RecordKind::PowerOff,
            Power::Reset => RecordKind::Reset,
            Power::Crash => RecordKind::Crash,
        };
        // Power outputs always find room.
        let _ = self.hold(kind, 0, 0, &[]);
    }
}

/// The parts.
#[derive(Debug)]
pub struct Parts {
    /// The machine: booted, restored, or waiting for either.
    pub machine: Arc<SharedMachine>,
    /// Feeds it.
    pub handle: MachineHandle,
    /// Its disks' images.
    pub images: Vec<Arc<Image>>,
    /// Its disks' writes.
    pub log: Arc<WriteLog>,
    /// The gate.
    pub barrier: Arc<Barrier>,
    /// The taps.
    pub taps: Arc<Taps>,
    /// The console.
    pub console: Arc<Console>,
    /// Whoever captures epochs now.
    pub bell: EngineBell,
    /// The other side shares the disks alone (mode `ha`): every FLUSH is durable on both, and it is not told
    /// of received frames.
    pub mirrored: Arc<AtomicBool>,
    /// Which of its disks fail.
    pub faults: Arc<Faults>,
    /// How connections are protected.
    pub security: Security,
}

fn machine_config(spec: &Spec) -> MachineConfig {
    let boot = match &spec.vm.boot {
        Boot::Probe { cmdline } => BootConfig {
            kernel: Some(vmm::Image::Embedded(probe_guest::ELF)),
            initrd: None,
            cmdline: cmdline.clone(),
        },
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => BootConfig {
            kernel: Some(vmm::Image::File(kernel.clone())),
            initrd: initrd.clone().map(vmm::Image::File),
            cmdline: cmdline.clone(),
        },
    };
    let dirty = match spec.vm.dirty {
        DirtySource::Auto | DirtySource::Bitmap => DirtyTracking::Bitmap {
            hot_pages: HOT_PAGES,
        },
        DirtySource::Ring => {
            let vcpus = u32::from(spec.vm.cpus.max(1)).next_power_of_two();
            DirtyTracking::Ring {
                entries: (RING_ENTRIES / vcpus).max(1024),
            }
        }
    };
    MachineConfig {
        memory: spec.vm.memory,
        vcpus: spec.vm.cpus,
        nics: spec
            .vm
            .nics
            .iter()
            .map(|nic| NicConfig {
                mac: nic.mac,
                offload: nic.offload,
            })
            .collect(),
        rng: true,
        dirty,
        boot,
    }
}

fn security(spec: &Spec) -> Result<Security, Error> {
    match &spec.security {
        SecuritySpec::Plain => Ok(Security::Plain),
        SecuritySpec::Mtls { dir } => {
            let link = |e: ax_link::LinkError| Error::Link(e.to_string());
            let identity = Identity::load(dir).map_err(link)?;
            Ok(Security::Mtls(
                identity,
                TrustStore::open(dir).map_err(link)?,
            ))
        }
    }
}

/// A host or witness name as the link knows it.
fn host_name(name: &str) -> Result<HostName, Error> {
    name.parse()
        .map_err(|e| Error::Link(format!("host name {name:?}: {e}")))
}

impl Parts {
    /// Opens the images (locked), builds the machine and wires it. `power` is told of a power output
    /// that has been released, `disks` that a disk has begun to fail, or works again.
    ///
    /// # Errors
    /// Names what was missing; nothing is left behind.
    pub fn build(
        spec: &Spec,
        power: impl Fn(io_barrier::Power) + Send + 'static,
        disks: impl Fn() + Send + Sync + 'static,
    ) -> Result<Parts, Error> {
        let security = security(spec)?;
        let bell = EngineBell::default();
        let images = spec
            .vm
            .disks
            .iter()
            .enumerate()
            .map(|(unit, disk)| {
                let facts = spec.state_dir.join(format!("disk{unit}.meta"));
                Image::open(&disk.path, &facts, spec.vm.pair, disk.size, disk.read_only)
                    .map(Arc::new)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let pressed = bell.clone();
        let log = Arc::new(WriteLog::new(DISK_BUDGET, move || {
            pressed.with(PrimaryHandle::trigger);
        }));
        let taps = Taps::new(spec.vm.nics.iter().map(|nic| (nic.tap.clone(), nic.mac)));
        let console = Console::new();
        let sink = Sink {
            taps: Arc::clone(&taps),
            console: Arc::clone(&console),
            power: Box::new(power),
        };
        let config = BarrierConfig {
            permission_ns: spec.timing.permission_ms * 1_000_000,
            ..BarrierConfig::default()
        };
        let barrier = Arc::new(Barrier::new(config, Box::new(sink), Arc::new(Boottime)));
        let mirrored = Arc::new(AtomicBool::new(false));
        let each = spec.vm.disks.iter();
        let each = each.map(|disk| (disk.path.clone(), disk.on_error));
        let faults = Faults::new(each.collect(), disks);
        let disk = |(unit, image): (usize, &Arc<Image>)| {
            let (image, log) = (Arc::clone(image), Arc::clone(&log));
            let secondary = spec.vm.disks.get(unit).map(|disk| disk.secondary);
            Arc::new(MirroredDisk {
                unit: unit as u8,
                image,
                log,
                sync: secondary == Some(Secondary::Sync),
                mirrored: Arc::clone(&mirrored),
                faults: Arc::clone(&faults),
                recorded: AtomicBool::new(false),
            }) as Arc<dyn Disk>
        };
        let ports = Ports {
            outputs: Arc::new(ToBarrier(Arc::clone(&barrier))),
            disks: images.iter().enumerate().map(disk).collect(),
        };
        let machine = Machine::new(machine_config(spec), ports)?;
        let handle = machine.handle();
        let retry = handle.clone();
        barrier.on_room(move || retry.retry_outputs());
        let ring = bell.clone();
        barrier.on_pending(move || ring.with(PrimaryHandle::wake));
        let full = bell.clone();
        machine.on_ring_full(Arc::new(move || full.with(PrimaryHandle::ring_full)));
        let machine = SharedMachine::new(machine);
        Ok(Parts {
            machine,
            handle,
            images,
            log,
            barrier,
            taps,
            console,
            bell,
            mirrored,
            faults,
            security,
        })
    }

    /// Leads to the peer's process at these addresses.
    ///
    /// # Errors
    /// The peer has no usable name.
    pub fn connector(
        &self,
        spec: &Spec,
        addresses: &[std::net::SocketAddr],
    ) -> Result<Connector, Error> {
        let peer = spec.peer.as_deref().map(host_name).transpose()?;
        let pairs = addresses.iter().map(|a| AddressPair::from(*a)).collect();
        Ok(Connector::new(self.security.clone(), pairs, peer))
    }

    /// Leads to the other host's axd.
    ///
    /// # Errors
    /// The peer has no usable name.
    pub fn peer_axd(&self, spec: &Spec) -> Result<Connector, Error> {
        self.connector(spec, &spec.peer_axd)
    }

    /// Makes clients of third parties.
    pub fn third_parties(&self) -> Connect {
        let security = self.security.clone();
        Box::new(move |place, expected| match place {
            Arbiter::Manual => Err(Error::Arbiter("there is no third party".into())),
            Arbiter::Etcd { members } => Ok(Box::new(Etcd::new(members.clone(), expected))),
            Arbiter::Witness { name, addresses } => {
                let pairs = addresses.iter().map(|a| AddressPair::from(*a)).collect();
                let name = host_name(name)?;
                let connector = Connector::new(security.clone(), pairs, Some(name));
                let client = Client::new(connector, expected).map_err(Error::Thread)?;
                Ok(Box::new(client))
            }
        })
    }

    /// Hands frames from the taps to the guest, and first to the shadow, in a thread of its own.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn receive(&self) -> Result<(), Error> {
        let guest = ToGuest {
            handle: self.handle.clone(),
            bell: self.bell.clone(),
            mirrored: Arc::clone(&self.mirrored),
        };
        self.taps.receive(guest).map_err(Error::Thread)
    }
}

/// Frames on their way to the guest, and first to the shadow.
struct ToGuest {
    handle: MachineHandle,
    bell: EngineBell,
    mirrored: Arc<AtomicBool>,
}

impl Inside for ToGuest {
    fn deliver(&self, nic: u8, packet: Packet<'_>) {
        // The thread that reads the taps alone gives the device frames, so the next one's number is known.
        let number = self.handle.rx_delivered(nic.into()) + 1;
        if !self.mirrored.load(Ordering::Relaxed) {
            self.bell
                .with(|engine| engine.received(nic, number, packet));
        }
        give(&self.handle, nic, packet);
    }

    fn offloads(&self, nic: u8) -> Offloads {
        let devices = self.handle.devices();
        if let Some(event) = devices.renegotiated(nic.into()) {
            // Non-blocking; what is not read now has been said before.
            let _ = event.read();
        }
        devices.offloads(nic.into())
    }

    fn renegotiated(&self, nic: u8) -> Option<BorrowedFd<'_>> {
        let event = self.handle.devices().renegotiated(nic.into())?;
        // SAFETY: the event lives in the device set, which `self.handle` keeps alive.
        Some(unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) })
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // A disk's thread may wait for a shadow: the machine's end waits for that thread. Nobody sees the
        // request complete.
        self.log.release_flushes();
        // Or for its disk.
        self.faults.stand(Standing::Elsewhere);
    }
}

/// Gives the guest one frame; waits a moment for room in its queue, then drops it as a wire would.
pub fn give(handle: &MachineHandle, nic: u8, packet: Packet<'_>) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut tries = 0;
    while handle.net_rx(nic.into(), packet) == vmm::RxOutcome::NoBuffers && tries < 20 {
        tries += 1;
        let Some(room) = handle.devices().rx_wakeup(nic.into()) else {
            return;
        };
        // SAFETY: the event lives in the device set, which `handle` keeps alive.
        let fd = unsafe { BorrowedFd::borrow_raw(room.as_raw_fd()) };
        let _ = poll(
            &mut [PollFd::new(fd, PollFlags::POLLIN)],
            PollTimeout::from(50u8),
        );
        let _ = room.read();
    }
}
