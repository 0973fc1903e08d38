//! Where released outputs go, and where frames come from: taps, console, power.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use io_barrier::{OutputSink, Power};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, RwLock};

use crate::announce;
use crate::console::Console;
use crate::error::Error;
use crate::seen::Seen;
use crate::tap::{MAX_FRAME, Tap};

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
    /// whose `deliver` must not be waiting for anything meanwhile.
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

    /// Sends one frame out.
    fn send(&self, nic: u8, frame: &[u8]) {
        if let Some(port) = self.ports.get(usize::from(nic))
            && let Some(tap) = &*port.open.read()
        {
            tap.send(frame);
        }
    }

    /// Tells the network where the guest is now (rule 14). Only by whoever may release outputs.
    pub fn announce(&self) {
        for (nic, port) in self.ports.iter().enumerate() {
            let frames = announce::frames(port.mac, &port.seen.lock());
            frames.iter().for_each(|frame| self.send(nic as u8, frame));
        }
    }

    /// Reads frames of all open taps in a thread of its own and hands them to `deliver`, until the
    /// taps are closed.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn receive(&self, deliver: impl FnMut(u8, &[u8]) + Send + 'static) -> std::io::Result<()> {
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
                if let Err(error) = read_taps(&taps, &stopped, deliver) {
                    tracing::error!(%error, "the taps can't be read any more");
                }
            })?;
        *receiving = Some(Receiving { stop, thread });
        Ok(())
    }
}

fn read_taps(
    taps: &[(u8, Arc<Tap>)],
    stop: &EventFd,
    mut deliver: impl FnMut(u8, &[u8]),
) -> std::io::Result<()> {
    let mut frame = vec![0; MAX_FRAME];
    let mut fds: Vec<PollFd> = taps
        .iter()
        .map(|(_, tap)| PollFd::new(tap.as_fd(), PollFlags::POLLIN))
        .chain([PollFd::new(stop.as_fd(), PollFlags::POLLIN)])
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.last().and_then(PollFd::any) == Some(true) {
            return Ok(());
        }
        for (nic, tap) in taps {
            while let Some(frame) = tap.receive(&mut frame)? {
                deliver(*nic, frame);
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
    fn frame(&mut self, nic: u8, frame: &[u8]) {
        self.taps.learn(nic, frame);
        self.taps.send(nic, frame);
    }

    fn console(&mut self, offset: u64, bytes: &[u8]) {
        self.console.released(offset, bytes);
    }

    fn power(&mut self, what: Power) {
        (self.power)(what);
    }
}
