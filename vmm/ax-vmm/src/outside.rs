//! Where released outputs go, and where frames come from: taps, console, power.

use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use io_barrier::{OutputSink, Power};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use crate::announce::{self, Seen};
use crate::console::Console;
use crate::error::Error;
use crate::tap::{MAX_FRAME, Tap};

/// One network device's way to the outside.
#[derive(Debug)]
struct Port {
    tap: String,
    mac: [u8; 6],
    open: OnceLock<Tap>,
    seen: Mutex<Seen>,
}

/// The taps of one VM: closed until this side runs the guest.
#[derive(Debug)]
pub struct Taps {
    ports: Vec<Port>,
}

impl Taps {
    /// Taps by interface name and MAC, in the guest's order of devices.
    pub fn new(nics: impl IntoIterator<Item = (String, [u8; 6])>) -> Arc<Taps> {
        let port = |(tap, mac)| Port {
            tap,
            mac,
            open: OnceLock::new(),
            seen: Mutex::default(),
        };
        Arc::new(Taps {
            ports: nics.into_iter().map(port).collect(),
        })
    }

    /// Opens every tap; one that is open stays so.
    ///
    /// # Errors
    /// The first that can't be opened, by name.
    pub fn open(&self) -> Result<(), Error> {
        for (nic, port) in self.ports.iter().enumerate() {
            if port.open.get().is_none() {
                let tap = Tap::open(&port.tap).map_err(|source| Error::Tap {
                    nic,
                    tap: port.tap.clone(),
                    source,
                })?;
                let _ = port.open.set(tap);
            }
        }
        Ok(())
    }

    /// Learns the guest's addresses from one of its frames (also from those it sent elsewhere).
    pub fn learn(&self, nic: u8, frame: &[u8]) {
        if let Some(port) = self.ports.get(usize::from(nic)) {
            port.seen.lock().learn(port.mac, frame);
        }
    }

    /// Sends one frame out.
    fn send(&self, nic: u8, frame: &[u8]) {
        if let Some(tap) = self.ports.get(usize::from(nic)).and_then(|p| p.open.get()) {
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

    /// Reads frames of all open taps and hands them to `deliver`, until `deliver` says false or a
    /// tap is gone. Blocks; run it in a thread of its own.
    ///
    /// # Errors
    /// The taps could not be waited for or read.
    pub fn receive(&self, mut deliver: impl FnMut(u8, &[u8]) -> bool) -> std::io::Result<()> {
        let taps: Vec<(u8, &Tap)> = self
            .ports
            .iter()
            .enumerate()
            .filter_map(|(nic, port)| Some((nic as u8, port.open.get()?)))
            .collect();
        if taps.is_empty() {
            return Ok(());
        }
        let mut frame = vec![0; MAX_FRAME];
        loop {
            let mut fds: Vec<PollFd> = taps
                .iter()
                .map(|(_, tap)| PollFd::new(tap.as_fd(), PollFlags::POLLIN))
                .collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            for (nic, tap) in &taps {
                while let Some(frame) = tap.receive(&mut frame)? {
                    if !deliver(*nic, frame) {
                        return Ok(());
                    }
                }
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
