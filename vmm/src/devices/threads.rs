//! The threads that serve the guest's doorbells: one for net and entropy, one per disk.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tracing::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Devices, Error};

/// What an event of the device thread's poll set means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// Outputs have room again, or the gate was stopped.
    Attention,
    Receive(usize),
    Transmit(usize),
    Entropy,
}

/// The device thread's poll set: events by their place in `sources`.
pub(super) struct Poll {
    epoll: Epoll,
    sources: Vec<(Event, EventFd)>,
}

impl Poll {
    pub(super) fn new(devices: &Devices) -> Result<Self, Error> {
        let os = |doing| move |source| Error::Os { doing, source };
        let clone = |fd: &EventFd| fd.try_clone().map_err(os("duplicate a doorbell"));
        let mut sources = vec![(Event::Attention, clone(&devices.attention)?)];
        for (nic, net) in devices.nets.iter().enumerate() {
            let [rx, tx] = &net.events.doorbells;
            sources.push((Event::Receive(nic), clone(rx)?));
            sources.push((Event::Transmit(nic), clone(tx)?));
        }
        if let Some(rng) = &devices.rng {
            let [doorbell] = &rng.doorbell;
            sources.push((Event::Entropy, clone(doorbell)?));
        }
        let epoll = Epoll::new().map_err(os("make the device thread's poll set"))?;
        for (token, (_, fd)) in sources.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN, token as u64);
            epoll
                .ctl(ControlOperation::Add, fd.as_raw_fd(), event)
                .map_err(os("fill the device thread's poll set"))?;
        }
        Ok(Poll { epoll, sources })
    }
}

/// Starts all threads.
pub(super) fn start(devices: &Arc<Devices>) -> Result<Vec<JoinHandle<()>>, Error> {
    let poll = Poll::new(devices)?;
    let mut threads = Vec::with_capacity(1 + devices.disks.len());
    let mine = Arc::clone(devices);
    threads.push(spawn("ax-devices".into(), move || serve(&mine, &poll))?);
    for (number, disk) in devices.disks.iter().enumerate() {
        let (mine, disk) = (Arc::clone(devices), Arc::clone(disk));
        match spawn(format!("ax-disk{number}"), move || disk.work(&mine.gate)) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                devices.stop(threads);
                return Err(error);
            }
        }
    }
    Ok(threads)
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    let os = |source| Error::Os {
        doing: "start a device thread",
        source,
    };
    thread::Builder::new().name(name).spawn(body).map_err(os)
}

/// The device thread. One passage of the gate per batch, so that a capture waits for one only.
fn serve(devices: &Devices, poll: &Poll) {
    let mut events = vec![EpollEvent::default(); poll.sources.len()];
    // Sources with more to do than one batch: served again before sleeping.
    let mut busy = vec![false; poll.sources.len()];
    loop {
        let timeout = if busy.contains(&true) { 0 } else { -1 };
        let ready = match poll.epoll.wait(timeout, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                error!(%error, "the device thread cannot wait for doorbells and ends");
                return;
            }
        };
        for event in events.iter().take(ready) {
            let token = event.data() as usize;
            if let (Some((_, fd)), Some(busy)) = (poll.sources.get(token), busy.get_mut(token)) {
                // Non-blocking: at worst somebody else has read it.
                let _ = fd.read();
                *busy = true;
            }
        }
        for (token, (event, _)) in poll.sources.iter().enumerate() {
            if let Some(busy) = busy.get_mut(token).filter(|b| **b) {
                let Some(_inside) = devices.gate.enter() else {
                    return;
                };
                *busy = devices.handle(*event);
            }
        }
    }
}

impl Devices {
    /// Does one batch of what `event` asks for. True when there is more. Inside the gate.
    fn handle(&self, event: Event) -> bool {
        match event {
            Event::Attention => {
                self.drain_console();
                self.nets.iter().for_each(|net| net.unblock());
                false
            }
            Event::Receive(nic) => {
                if let Some(net) = self.nets.get(nic) {
                    net.refilled();
                }
                false
            }
            Event::Transmit(nic) => self.nets.get(nic).is_some_and(|n| n.transmit()),
            Event::Entropy => self.rng.as_ref().is_some_and(|r| r.fill()),
        }
    }
}
