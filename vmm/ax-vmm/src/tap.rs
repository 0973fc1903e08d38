//! A tap interface: where frames enter and leave the host.
//!
//! Every frame goes behind a header, in both directions ([`ax_wire::offload`]), whatever the guest has agreed
//! to: the interface is told separately what it may leave to be done in frames for the guest. It remembers
//! that when it is closed, so it is told that nothing may be left, for a program that does not ask.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use ax_wire::offload::{HEADER, MAX_PACKET, Offloads};

/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `TUNSETOFFLOAD`: what may be left to be done.
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// `TUNSETVNETHDRSZ`: bytes of the header.
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`, `TUN_F_TSO_ECN`.
const CSUM: libc::c_ulong = 1;
const TSO4: libc::c_ulong = 2;
const TSO6: libc::c_ulong = 4;
const TSO_ECN: libc::c_ulong = 8;

/// Room for the longest packet, and a byte that shows that one was longer still.
pub const ROOM: usize = MAX_PACKET + 1;

/// An open tap queue, non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the queue of the interface called `name`, which an administrator (or axd) has made. Nothing may
    /// be left to be done in frames from it.
    ///
    /// # Errors
    /// The name is too long, the interface is in use, or this user may not open it.
    pub fn open(name: &str) -> io::Result<Tap> {
        // TUNSETIFF would make an absent interface and so hide a wrong name.
        nix::net::if_::if_nametoindex(name)
            .map_err(|_| io::Error::new(io::ErrorKind::NotFound, "no such interface"))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain data for which all-zero is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "interface name too long",
            ));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is a tun device and `request` a valid ifreq that outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) };
        if done < 0 {
            return Err(explained(io::Error::last_os_error()));
        }
        let tap = Tap { file };
        let size = HEADER as libc::c_int;
        // SAFETY: the descriptor is a tun device; the call reads one int, which outlives it.
        let done = unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        tap.set_offloads(Offloads::NONE)?;
        Ok(tap)
    }

    /// Says what may be left to be done in frames received from now on.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads {
            checksum,
            tso4,
            tso6,
            ecn,
        } = offloads.usable();
        let bits = [(checksum, CSUM), (tso4, TSO4), (tso6, TSO6), (ecn, TSO_ECN)];
        let bits = bits.into_iter().filter(|(on, _)| *on);
        let flags: libc::c_ulong = bits.map(|(_, bit)| bit).sum();
        // SAFETY: the descriptor is a tun device; the argument is a number.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Sends one frame behind its header. A full queue drops it, as a wire would.
    pub fn send(&self, header: &[u8; HEADER], frame: &[u8]) {
        let parts = [IoSlice::new(header), IoSlice::new(frame)];
        if let Err(error) = (&self.file).write_vectored(&parts) {
            tracing::trace!(%error, "frame dropped at the tap");
        }
    }

    /// Receives one frame, behind its header, into `out`; none when nothing waits.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn receive<'a>(&self, out: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match (&self.file).read(out) {
            Ok(n) => Ok(out.get(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// The kernel says of every mismatch that the argument is invalid.
fn explained(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(libc::EINVAL) {
        let why = "it is no tap with one queue: it must be of mode tap, without multi_queue";
        return io::Error::new(io::ErrorKind::InvalidInput, why);
    }
    error
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.set_offloads(Offloads::NONE);
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
