//! Where released outputs go, and where frames come from: taps, console, power.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use ax_wire::offload::{HEADER, MAX_PACKET, NOTHING, Offloads, Packet, Work};
use io_barrier::{OutputSink, Power};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, RwLock};

use crate::announce;
use crate::console::Console;
use crate::error::Error;
use crate::seen::Seen;
use crate::tap::{ROOM, Tap};

/// One network device's way to the outside.
#[derive(Debug)]
struct Port {
    tap: String,
    mac: [u8; 6],
    open: RwLock<Option<Arc<Tap>>>,
    seen: Mutex<Seen>,
}

impl Port {
    fn try_open(&self, nic: usize) -> Result<Tap, Error> {
        Tap::open(&self.tap).map_err(|source| Error::Tap {
            nic,
            tap: self.tap.clone(),
            source,
        })
    }
}

/// The taps of one VM: closed until this side runs the guest.
#[derive(Debug)]
pub struct Taps {
    ports: Vec<Port>,
    receiving: Mutex<Option<Receiving>>,
}

/// Where frames from the taps go.
pub trait Inside: Send {
    /// Takes one. Nothing of its header has been looked at.
    fn deliver(&self, nic: u8, packet: Packet<'_>);

    /// What may be left to be done in frames for this device.
    fn offloads(&self, nic: u8) -> Offloads;

    /// Becomes readable when that may have changed, until it is asked for.
    fn renegotiated(&self, nic: u8) -> Option<BorrowedFd<'_>>;
}

/// The thread that reads the open taps.
#[derive(Debug)]
struct Receiving {
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Taps {
    /// Taps by interface name and MAC, in the guest's order of devices.
    pub fn new(nics: impl IntoIterator<Item = (String, [u8; 6])>) -> Arc<Taps> {
        let port = |(tap, mac)| Port {
            tap,
            mac,
            open: RwLock::default(),
            seen: Mutex::default(),
        };
        Arc::new(Taps {
            ports: nics.into_iter().map(port).collect(),
            receiving: Mutex::default(),
        })
    }

    /// Opens every tap; one that is open stays so.
    ///
    /// # Errors
    /// The first that can't be opened, by name.
    pub fn open(&self) -> Result<(), Error> {
        for (nic, port) in self.ports.iter().enumerate() {
            let mut open = port.open.write();
            if open.is_none() {
                *open = Some(Arc::new(port.try_open(nic)?));
            }
        }
        Ok(())
    }

    /// Finds out whether every tap could be opened, and leaves those that are not open closed.
    ///
    /// # Errors
    /// The first that can't be opened, by name.
    pub fn try_out(&self) -> Result<(), Error> {
        for (nic, port) in self.ports.iter().enumerate() {
            if port.open.read().is_none() {
                drop(port.try_open(nic)?);
            }
        }
        Ok(())
    }

    /// Closes every tap: nothing leaves or comes in here any more. Waits for the receiving thread,
    /// which must not be waiting for anything meanwhile.
    pub fn close(&self) {
        if let Some(Receiving { stop, thread }) = self.receiving.lock().take() {
            // Fails only when it is stopped already.
            let _ = stop.write(1);
            if thread.join().is_err() {
                tracing::error!("the thread that reads the taps had panicked");
            }
        }
        for port in &self.ports {
            *port.open.write() = None;
        }
    }

    /// Learns the guest's addresses from one of its frames, which has left here or, seen by the
    /// shadow, is of a committed epoch.
    pub fn learn(&self, nic: u8, frame: &[u8]) {
        if let Some(port) = self.ports.get(usize::from(nic)) {
            port.seen.lock().learn(port.mac, frame);
        }
    }

    /// Sends one frame out, behind its header.
    fn send(&self, nic: u8, header: &[u8; HEADER], frame: &[u8]) {
        if let Some(port) = self.ports.get(usize::from(nic))
            && let Some(tap) = &*port.open.read()
        {
            tap.send(header, frame);
        }
    }

    /// Tells the network where the guest is now (rule 14). Only by whoever may release outputs.
    pub fn announce(&self) {
        for (nic, port) in self.ports.iter().enumerate() {
            let frames = announce::frames(port.mac, &port.seen.lock());
            let send = |frame: &Vec<u8>| self.send(nic as u8, &NOTHING, frame);
            frames.iter().for_each(send);
        }
    }

    /// Reads frames of all open taps in a thread of its own and hands them to `inside`, until the
    /// taps are closed.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn receive(&self, inside: impl Inside + 'static) -> std::io::Result<()> {
        let mut receiving = self.receiving.lock();
        let taps: Vec<(u8, Arc<Tap>)> = self
            .ports
            .iter()
            .enumerate()
            .filter_map(|(nic, port)| Some((nic as u8, Arc::clone(port.open.read().as_ref()?))))
            .collect();
        if taps.is_empty() || receiving.is_some() {
            return Ok(());
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_flags(flags)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("net-rx".into())
            .spawn(move || {
                if let Err(error) = read_taps(&taps, &stopped, &inside) {
                    tracing::error!(%error, "the taps can't be read any more");
                }
            })?;
        *receiving = Some(Receiving { stop, thread });
        Ok(())
    }
}

fn read_taps(taps: &[(u8, Arc<Tap>)], stop: &EventFd, inside: &impl Inside) -> std::io::Result<()> {
    let mut room = vec![0; ROOM];
    let mut reads: Vec<Read<'_>> = taps
        .iter()
        .map(|(nic, tap)| Read {
            nic: *nic,
            tap,
            told: Offloads::NONE,
        })
        .collect();
    let events = taps.iter().filter_map(|(nic, _)| inside.renegotiated(*nic));
    let mut fds: Vec<PollFd> = taps
        .iter()
        .map(|(_, tap)| tap.as_fd())
        .chain([stop.as_fd()])
        .chain(events)
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    let mut news = true;
    loop {
        // Before the frames that have come meanwhile: none must be lost to an agreement that is over.
        if news {
            reads
                .iter_mut()
                .for_each(|read| read.tell(inside.offloads(read.nic)));
        }
        for Read { nic, tap, .. } in &reads {
            while let Some(bytes) = tap.receive(&mut room)? {
                // What is longer than any packet has been cut short.
                if let Some(packet) = Packet::new(bytes).filter(|_| bytes.len() <= MAX_PACKET) {
                    inside.deliver(*nic, packet);
                }
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let readable = |fd: &PollFd<'_>| fd.any() == Some(true);
        let (_, others) = fds.split_at(taps.len());
        if others.first().is_some_and(readable) {
            return Ok(());
        }
        news = others.iter().skip(1).any(readable);
    }
}

/// One tap being read.
struct Read<'a> {
    nic: u8,
    tap: &'a Tap,
    /// What it has been told that it may leave to be done.
    told: Offloads,
}

impl Read<'_> {
    /// Tells the tap what the guest has agreed to, if it is news.
    fn tell(&mut self, agreed: Offloads) {
        if agreed == self.told {
            return;
        }
        match self.tap.set_offloads(agreed) {
            Ok(()) => self.told = agreed,
            // What it leaves to be done all the same is dropped by the device.
            Err(error) => {
                tracing::warn!(%error, nic = self.nic, "the tap keeps to what was agreed before");
            }
        }
    }
}

/// The barrier's way out. Nothing else writes to a tap but [`Taps::announce`].
pub struct Sink {
    /// Network.
    pub taps: Arc<Taps>,
    /// Console.
    pub console: Arc<Console>,
    /// Told of a power output that has been released.
    pub power: Box<dyn Fn(Power) + Send>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").finish_non_exhaustive()
    }
}

impl OutputSink for Sink {
    fn frame(&mut self, nic: u8, header: &[u8; HEADER], frame: &[u8]) {
        // After a promotion it is what a peer has sent: the kernel gets no other header than a sound one.
        match Work::parse(header, frame, Offloads::ALL) {
            Ok(work) => {
                self.taps.learn(nic, frame);
                self.taps.send(nic, &work.header(), frame);
            }
            Err(why) => tracing::debug!(nic, %why, "a frame is dropped"),
        }
    }

    fn console(&mut self, offset: u64, bytes: &[u8]) {
        self.console.released(offset, bytes);
    }

    fn power(&mut self, what: Power) {
        (self.power)(what);
    }
}
