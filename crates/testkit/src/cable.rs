//! A cable through user space: a TCP relay whose two directions can each be held, slowed,
//! corrupted or cut off, independently and while connections run.
//!
//! For what the network cannot do here (there is no netem) and no real cable should: single
//! bytes changed under TCP's checksums, a stream that ends in the middle of a message. A pulled
//! plug or silent switch between test hosts is [`crate::net::Cable`].

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::client::Origin;
use crate::{Error, Result};

/// A direction through a [`StreamCable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From who connected, to the target.
    Forward,
    /// From the target back.
    Back,
}

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// They pass.
    #[default]
    None,
    /// They wait until this fault is changed, none lost: an unplugged cable as TCP sees it.
    Hold,
    /// Each piece is this much later.
    Delay(Duration),
    /// After this many more bytes one bit of one byte is flipped; then they pass.
    CorruptAfter(u64),
    /// After this many more bytes the connection ends, in both directions.
    TruncateAfter(u64),
}

/// A running relay. Dropping it ends its connections.
#[derive(Debug)]
pub struct StreamCable {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    faults: [Fault; 2],
    passed: [u64; 2],
    open: Vec<TcpStream>,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamCable {
    /// Listens on `listen` (port 0 chooses one) and relays every connection to `target`, both
    /// from within `origin`.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn start(origin: &Origin, listen: SocketAddr, target: SocketAddr) -> Result<StreamCable> {
        let fail = || Error::os(format!("relay {listen} to {target}"));
        let bind = || TcpListener::bind(listen);
        let listener = match origin {
            Origin::Here => bind(),
            Origin::In(ns) => ns.run(bind)?,
        }
        .map_err(fail())?;
        let address = listener.local_addr().map_err(fail())?;
        let shared = Arc::new(Shared::default());
        let (theirs, origin) = (shared.clone(), origin.clone());
        thread::Builder::new()
            .name("cable".into())
            .spawn(move || {
                if let Origin::In(ns) = &origin
                    && let Err(e) = ns.enter()
                {
                    tracing::error!("cable: {e}");
                    return;
                }
                for near in listener.incoming() {
                    if theirs.state().ended {
                        return;
                    }
                    if let Err(e) = near.and_then(|near| relay(near, target, &theirs)) {
                        tracing::debug!("cable to {target}: {e}");
                    }
                }
            })
            .map_err(fail())?;
        Ok(StreamCable { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on `fault` befalls the bytes going `way`, of every connection.
    pub fn set(&self, way: Way, fault: Fault) {
        self.shared.state().faults[way as usize] = fault;
        self.shared.changed.notify_all();
    }

    /// Bytes that went `way` so far, all connections together.
    pub fn passed(&self, way: Way) -> u64 {
        self.shared.state().passed[way as usize]
    }

    /// Ends every connection there is; new ones are relayed.
    pub fn sever(&self) {
        let mut state = self.shared.state();
        for stream in state.open.drain(..) {
            // Ended already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for StreamCable {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.sever();
        // Wakes the listener where it can be reached; else it ends with the process.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(100));
    }
}

fn relay(near: TcpStream, target: SocketAddr, shared: &Arc<Shared>) -> io::Result<()> {
    let far = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    shared
        .state()
        .open
        .extend([near.try_clone()?, far.try_clone()?]);
    for (way, from, to) in [
        (Way::Forward, near.try_clone()?, far.try_clone()?),
        (Way::Back, far, near),
    ] {
        let shared = shared.clone();
        thread::Builder::new()
            .name(format!("cable-{way:?}"))
            .spawn(move || {
                if pump(way, &from, &to, &shared).is_err() {
                    // A broken connection is broken for both.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                } else {
                    let _ = to.shutdown(Shutdown::Write);
                }
            })?;
    }
    Ok(())
}

fn pump(way: Way, mut from: &TcpStream, mut to: &TcpStream, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let len = from.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        let piece = &mut buffer[..len];
        let whole = suffer(way, piece, shared);
        // Counted first: whoever has seen the bytes must find them counted.
        shared.state().passed[way as usize] += whole as u64;
        to.write_all(&piece[..whole])?;
        if whole < len {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
    }
}

/// Lets the direction's fault befall `piece`; returns how many of its bytes go on. Fewer than
/// all ends the connection.
fn suffer(way: Way, piece: &mut [u8], shared: &Shared) -> usize {
    let mut state = shared.state();
    while state.faults[way as usize] == Fault::Hold && !state.ended {
        state = shared
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
    let fault = &mut state.faults[way as usize];
    let len = piece.len() as u64;
    match *fault {
        Fault::None | Fault::Hold => {}
        Fault::Delay(time) => {
            drop(state);
            thread::sleep(time);
        }
        Fault::CorruptAfter(bytes) if bytes < len => {
            piece[bytes as usize] ^= 0x10;
            *fault = Fault::None;
        }
        Fault::CorruptAfter(bytes) => *fault = Fault::CorruptAfter(bytes - len),
        Fault::TruncateAfter(bytes) if bytes < len => {
            *fault = Fault::None;
            return bytes as usize;
        }
        Fault::TruncateAfter(bytes) => *fault = Fault::TruncateAfter(bytes - len),
    }
    piece.len()
}
