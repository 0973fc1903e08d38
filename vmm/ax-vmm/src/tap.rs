//! A tap interface: where frames enter and leave the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// Largest frame handled, bytes: 64 KiB and an Ethernet header, far above any MTU in use.
pub const MAX_FRAME: usize = 65_550;

/// An open tap queue, non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the queue of the interface called `name`, which an administrator (or axd) has made.
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
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is a tun device and `request` a valid ifreq that outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(Tap { file })
        }
    }

    /// Sends one frame. A full queue drops it, as a wire would.
    pub fn send(&self, frame: &[u8]) {
        if let Err(error) = (&self.file).write(frame) {
            tracing::trace!(%error, "frame dropped at the tap");
        }
    }

    /// Receives one frame into `out`; none when nothing waits.
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

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
