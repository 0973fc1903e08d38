//! Sockets: options, connecting to several addresses at once, and I/O with a total deadline.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, setsockopt,
    socket, sockopt,
};

/// Unacknowledged bytes end a connection after this long. Far above the detection time: it
/// frees what a silent peer holds, it does not detect.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// How far apart attempts at several addresses begin.
const STAGGER: Duration = Duration::from_millis(50);

/// Options every channel has. `USER_TIMEOUT` covers bytes on the way; keepalive finds a peer
/// that vanished while the channel was idle.
pub(crate) fn tune(sock: &TcpStream) -> io::Result<()> {
    sock.set_nodelay(true)?;
    let millis = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    setsockopt(sock, sockopt::TcpUserTimeout, &millis)?;
    setsockopt(sock, sockopt::KeepAlive, &true)?;
    setsockopt(sock, sockopt::TcpKeepIdle, &5)?;
    setsockopt(sock, sockopt::TcpKeepInterval, &2)?;
    setsockopt(sock, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

/// Poll's timeout until `deadline`, rounded up so that it never spins.
pub(crate) fn poll_until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = left.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(i32::try_from(millis).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX)
}

fn start_connect(local: Option<IpAddr>, peer: SocketAddr) -> io::Result<(TcpStream, bool)> {
    let family = if peer.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    if let Some(local) = local {
        bind(
            fd.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::new(local, 0)),
        )?;
    }
    let done = match connect(fd.as_raw_fd(), &SockaddrStorage::from(peer)) {
        Ok(()) => true,
        Err(Errno::EINPROGRESS) => false,
        Err(e) => return Err(e.into()),
    };
    Ok((TcpStream::from(fd), done))
}

/// Connects to the first of `pairs` (local address, peer address) on which `open` succeeds.
/// Attempts begin [`STAGGER`] apart, or as soon as nothing else is under way, and run beside one
/// another, so that one dead path costs no more than that.
///
/// # Errors
/// Every address's failure, in order of occurrence.
pub(crate) fn connect_any<T, E: std::fmt::Display>(
    pairs: impl IntoIterator<Item = (Option<IpAddr>, SocketAddr)>,
    deadline: Instant,
    mut open: impl FnMut(TcpStream, SocketAddr) -> Result<T, E>,
) -> Result<T, Vec<(SocketAddr, String)>> {
    let mut waiting = pairs.into_iter().peekable();
    let mut under_way: Vec<(TcpStream, SocketAddr)> = Vec::new();
    let mut failures = Vec::new();
    let mut next_start = Instant::now();
    loop {
        let now = Instant::now();
        if now >= deadline {
            let rest = under_way
                .drain(..)
                .map(|(_, peer)| peer)
                .chain(waiting.map(|(_, p)| p));
            failures.extend(rest.map(|peer| (peer, "no answer in time".to_owned())));
            return Err(failures);
        }
        let mut ready = Vec::new();
        if (under_way.is_empty() || now >= next_start)
            && let Some((local, peer)) = waiting.next()
        {
            next_start = now + STAGGER;
            match start_connect(local, peer) {
                Ok((sock, true)) => ready.push((sock, peer)),
                Ok((sock, false)) => under_way.push((sock, peer)),
                Err(e) => failures.push((peer, e.to_string())),
            }
        }
        if ready.is_empty() && under_way.is_empty() {
            if waiting.peek().is_none() {
                return Err(failures);
            }
            continue;
        }
        if ready.is_empty() {
            let wake = if waiting.peek().is_some() {
                deadline.min(next_start)
            } else {
                deadline
            };
            ready = poll_connected(&mut under_way, wake, &mut failures);
        }
        for (sock, peer) in ready {
            let result = sock
                .set_nonblocking(false)
                .and_then(|()| tune(&sock))
                .map_err(|e| e.to_string())
                .and_then(|()| open(sock, peer).map_err(|e| e.to_string()));
            match result {
                Ok(value) => return Ok(value),
                Err(why) => failures.push((peer, why)),
            }
        }
    }
}

/// Waits until `wake` for any attempt to end; takes the connected ones out.
fn poll_connected(
    under_way: &mut Vec<(TcpStream, SocketAddr)>,
    wake: Instant,
    failures: &mut Vec<(SocketAddr, String)>,
) -> Vec<(TcpStream, SocketAddr)> {
    let mut fds: Vec<_> = under_way
        .iter()
        .map(|(s, _)| PollFd::new(s.as_fd(), PollFlags::POLLOUT))
        .collect();
    // An interrupted or failed poll reads as nothing ready; the caller's deadline still holds.
    let polled = nix::poll::poll(&mut fds, poll_until(wake)).unwrap_or(0);
    if polled == 0 {
        return Vec::new();
    }
    let done: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
    let mut ready = Vec::new();
    let mut done = done.into_iter();
    let (ended, rest): (Vec<_>, Vec<_>) = under_way
        .drain(..)
        .partition(|_| done.next().unwrap_or(false));
    *under_way = rest;
    for (sock, peer) in ended {
        match getsockopt(&sock, sockopt::SocketError) {
            Ok(0) => ready.push((sock, peer)),
            Ok(e) => failures.push((peer, io::Error::from_raw_os_error(e).to_string())),
            Err(e) => failures.push((peer, e.to_string())),
        }
    }
    ready
}

/// Limits a blocking socket by a total deadline: a peer that sends a byte now and then gains
/// nothing by it. Clears the socket's timeouts when dropped.
pub(crate) struct Timed<'a> {
    sock: &'a TcpStream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    pub(crate) fn new(sock: &'a TcpStream, deadline: Instant) -> Timed<'a> {
        Timed { sock, deadline }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.sock.set_read_timeout(self.left()?)?;
        let mut sock = self.sock;
        sock.read(buf)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.sock.set_write_timeout(self.left()?)?;
        let mut sock = self.sock;
        sock.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        // Only a closed socket refuses, and that one needs no timeouts.
        let _ = self.sock.set_read_timeout(None);
        let _ = self.sock.set_write_timeout(None);
    }
}

/// Ends a connection so that what was sent last arrives: closing with unread input would reset
/// it and may take the message with it. Waits for the peer's end at most until `deadline`.
pub(crate) fn linger(sock: &TcpStream, deadline: Instant) {
    let _ = sock.set_nonblocking(false);
    let _ = sock.shutdown(Shutdown::Write);
    let mut timed = Timed::new(sock, deadline);
    let mut sink = [0; 4096];
    // Bounded in bytes too: a peer that pours data in is not owed a graceful end.
    for _ in 0..256 {
        match timed.read(&mut sink) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// Has the socket's close reset the connection, so that the peer reads an error and no end.
pub(crate) fn reset_on_close(sock: &TcpStream) {
    let now = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // Only a socket that has ended refuses.
    let _ = setsockopt(sock, sockopt::Linger, &now);
}

/// Whether TCP calls the connection established: nobody has ended or reset it.
pub(crate) fn is_established(sock: &TcpStream) -> bool {
    /// `TCP_ESTABLISHED` of <linux/tcp.h>.
    const ESTABLISHED: u8 = 1;
    // The first byte of tcp_info is the state.
    let (mut state, mut len) = (0u8, 1);
    // SAFETY: the kernel writes at most `len` bytes to `state`, and `len` itself; both outlive the call.
    let got = unsafe {
        libc::getsockopt(
            sock.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut len,
        )
    };
    got == 0 && state == ESTABLISHED
}
