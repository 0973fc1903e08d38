//! Two cables made of socket pairs, with faults at chosen bytes.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ax_wire::WIRE_VERSION;
use ax_wire::stream::FrameKind;
use parking_lot::Mutex;
use statepoint::link::{PrimaryLink, ShadowLink};

/// What happens to a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The connection ends before this byte.
    Cut(u64),
    /// The connection ends inside the n-th acknowledgement (backward only, one frame a write).
    CutAck(u64),
    /// This byte arrives flipped.
    Flip(u64),
    /// From this byte on, so many bytes are missing.
    Lose(u64, u64),
    /// The bytes from here arrive twice.
    Double(u64, u64),
    /// Two neighbouring pieces of this length change places, from this byte on.
    Swap(u64, u64),
    /// Every write takes this long.
    Slow(Duration),
    /// Every n-th write takes this long.
    Hiccup(u64, Duration),
}

/// A direction with a fault.
pub struct Faulty {
    to: UnixStream,
    fault: Fault,
    at: u64,
    acks: u64,
    writes: u64,
    written: Arc<AtomicU64>,
    copy: Option<Arc<Mutex<Vec<u8>>>>,
}

impl Faulty {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        if let Some(copy) = &self.copy {
            copy.lock().extend_from_slice(bytes);
        }
        self.to.write_all(bytes)
    }
}

impl Write for Faulty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (start, end) = (self.at, self.at + bytes.len() as u64);
        self.at = end;
        let place = |at: u64| (at.clamp(start, end) - start) as usize;
        match self.fault {
            Fault::None => self.send(bytes)?,
            Fault::Slow(time) => {
                std::thread::sleep(time);
                self.send(bytes)?;
            }
            Fault::Hiccup(every, time) => {
                self.writes += 1;
                if self.writes.is_multiple_of(every) {
                    std::thread::sleep(time);
                }
                self.send(bytes)?;
            }
            Fault::Cut(at) => {
                self.send(&bytes[..place(at)])?;
                if end > at {
                    let _ = self.to.shutdown(Shutdown::Both);
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
            Fault::CutAck(n) => {
                if bytes[6] == FrameKind::Ack as u8 {
                    self.acks += 1;
                }
                if self.acks < n {
                    self.send(bytes)?;
                } else {
                    self.send(&bytes[..40])?;
                    let _ = self.to.shutdown(Shutdown::Both);
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
            Fault::Flip(at) => {
                let mut bytes = bytes.to_vec();
                if (start..end).contains(&at) {
                    bytes[place(at)] ^= 0x10;
                }
                self.send(&bytes)?;
            }
            Fault::Lose(at, n) => {
                self.send(&bytes[..place(at)])?;
                self.send(&bytes[place(at + n)..])?;
            }
            Fault::Double(at, n) => {
                self.send(&bytes[..place(at + n)])?;
                if start <= at + n && at + n <= end && start < at + n {
                    self.send(&bytes[place(at)..])?;
                } else {
                    self.send(&bytes[place(at + n)..])?;
                }
            }
            Fault::Swap(at, n) => {
                // Only within one write: that is where frames stand next to each other.
                if start <= at && at + 2 * n <= end {
                    self.send(&bytes[..place(at)])?;
                    self.send(&bytes[place(at + n)..place(at + 2 * n)])?;
                    self.send(&bytes[place(at)..place(at + n)])?;
                    self.send(&bytes[place(at + 2 * n)..])?;
                } else {
                    self.send(bytes)?;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the ends can tell the test.
#[derive(Clone, Default)]
pub struct Meter {
    pub forward: Arc<AtomicU64>,
    pub backward: Arc<AtomicU64>,
    /// Every byte sent forward, when wanted.
    pub copy: Option<Arc<Mutex<Vec<u8>>>>,
}

/// A connected pair of links.
pub fn cable(forward: Fault, backward: Fault, meter: &Meter) -> (PrimaryLink, ShadowLink) {
    let (fw, fr) = UnixStream::pair().unwrap();
    let (bw, br) = UnixStream::pair().unwrap();
    let close = {
        let ends = [
            fw.try_clone().unwrap(),
            fr.try_clone().unwrap(),
            bw.try_clone().unwrap(),
            br.try_clone().unwrap(),
        ];
        Arc::new(move || {
            for end in &ends {
                let _ = end.shutdown(Shutdown::Both);
            }
        })
    };
    let faulty = |to, fault, written: &Arc<AtomicU64>, copy| Faulty {
        to,
        fault,
        at: 0,
        acks: 0,
        writes: 0,
        written: written.clone(),
        copy,
    };
    let primary = PrimaryLink {
        forward: Box::new(faulty(fw, forward, &meter.forward, meter.copy.clone())),
        backward: Box::new(br),
        version: WIRE_VERSION,
        close: close.clone(),
    };
    let shadow = ShadowLink {
        forward: Box::new(fr),
        backward: Box::new(faulty(bw, backward, &meter.backward, None)),
        version: WIRE_VERSION,
        close,
    };
    (primary, shadow)
}

/// Bytes that were recorded, played to a shadow.
pub struct Tape(pub io::Cursor<Vec<u8>>);

impl Read for Tape {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}
