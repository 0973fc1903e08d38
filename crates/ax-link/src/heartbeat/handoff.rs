//! Handing a connection to the sentinel's thread: its socket leaves the process's file table for that
//! thread's (rule 10).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::Sender;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use parking_lot::Mutex;

use super::paths::MAX_PATHS;
use crate::stream::Parts;
use crate::{LinkError, Stream};

/// What goes ahead of a socket.
pub(super) struct Handed {
    pub(super) path: usize,
    pub(super) parts: Parts,
}

struct Way {
    socket: OwnedFd,
    sender: Sender<Handed>,
    /// The shadow's end of each path, by number.
    paths: Vec<IpAddr>,
}

/// The process's end.
pub(super) struct Handoff(Mutex<Way>);

impl Handoff {
    /// `paths` are those that this side dials; those that the peer dials are added as they come.
    pub(super) fn new(socket: OwnedFd, sender: Sender<Handed>, paths: Vec<IpAddr>) -> Handoff {
        Handoff(Mutex::new(Way {
            socket,
            sender,
            paths,
        }))
    }

    /// The shadow's end of each path, by number.
    pub(super) fn paths(&self) -> Vec<IpAddr> {
        self.0.lock().paths.clone()
    }

    /// Gives the thread a connection that this side has dialled.
    pub(super) fn dialled(&self, path: usize, stream: Stream) -> Result<(), LinkError> {
        self.0.lock().give(path, stream)
    }

    /// Gives it one that the peer has dialled: the address it came to says by which path.
    pub(super) fn accepted(&self, stream: Stream) -> Result<(), LinkError> {
        let here = stream.local_addr().map_err(|source| LinkError::System {
            what: "read a connection's address",
            source,
        })?;
        let mut way = self.0.lock();
        let known = way.paths.iter().position(|path| *path == here.ip());
        let path = known.unwrap_or(way.paths.len());
        if path >= MAX_PATHS {
            return Err(LinkError::TooManyPaths(MAX_PATHS));
        }
        if known.is_none() {
            way.paths.push(here.ip());
        }
        way.give(path, stream)
    }
}

impl Way {
    fn give(&self, path: usize, stream: Stream) -> Result<(), LinkError> {
        let (sock, parts) = stream.into_parts();
        let handed = Handed { path, parts };
        self.sender
            .send(handed)
            .map_err(|_| LinkError::SentinelEnded)?;
        let fds = [sock.as_raw_fd()];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|_| LinkError::SentinelEnded)?;
        // `sock` closes here: the sentinel's copy is the only one left.
        Ok(())
    }
}

/// One socket from the handing-over socket, if one is there.
pub(super) fn receive_socket(from: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<()>(from.as_raw_fd(), &mut iov, Some(&mut space), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    // The handle is going away: the command says how.
    if message.bytes == 0 {
        return Ok(None);
    }
    let mut sock = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just put this descriptor into this thread's table for
                // this message; nobody else owns it.
                sock = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(sock)
}
