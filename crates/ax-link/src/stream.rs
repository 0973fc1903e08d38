//! One open channel: bytes in order, protected as configured.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::{Fingerprint, HostName};

/// A connected, opened channel. Blocking unless set otherwise.
///
/// With TLS both directions share one state, so a stream is used by one thread at a time; the
/// epoch path has a connection per direction. To end a blocked call from another thread, take a
/// [`Closer`].
pub struct Stream {
    sock: TcpStream,
    tls: Option<Box<rustls::Connection>>,
    peer: SocketAddr,
    name: Option<HostName>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.tls.is_some() { "tls" } else { "plain" };
        write!(f, "Stream({kind}, {})", self.describe())
    }
}

/// Ends a stream from another thread.
#[derive(Debug)]
pub struct Closer(TcpStream);

impl Closer {
    /// Shuts the connection down: blocked reads and writes of the stream return.
    pub fn close(&self) {
        // Not connected any more is what was wanted.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Stream {
    pub(crate) fn new(
        sock: TcpStream,
        tls: Option<Box<rustls::Connection>>,
        peer: SocketAddr,
        name: Option<HostName>,
    ) -> Stream {
        Stream {
            sock,
            tls,
            peer,
            name,
        }
    }

    /// The peer's name, proven by its certificate; `None` on a plain connection, where nobody
    /// proves anything.
    pub fn peer_name(&self) -> Option<&HostName> {
        self.name.as_ref()
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// Name and address, for messages.
    pub fn describe(&self) -> String {
        match &self.name {
            Some(name) => format!("{name} at {}", self.peer),
            None => self.peer.to_string(),
        }
    }

    /// The fingerprint of the peer's certificate, on a TLS connection.
    pub fn peer_fingerprint(&self) -> Option<Fingerprint> {
        self.peer_certificate().map(Fingerprint::of)
    }

    pub(crate) fn peer_certificate(&self) -> Option<&rustls::pki_types::CertificateDer<'static>> {
        self.tls
            .as_ref()
            .and_then(|tls| tls.peer_certificates())
            .and_then(|certs| certs.first())
    }

    /// Limits each read; `None` waits for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.sock.set_read_timeout(timeout)
    }

    /// Limits each write; `None` waits for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.sock.set_write_timeout(timeout)
    }

    /// Makes calls return `WouldBlock` instead of waiting.
    ///
    /// # Errors
    /// The system's.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.sock.set_nonblocking(on)
    }

    /// A handle that ends this stream from another thread. It holds a duplicate of the socket:
    /// never take one of a liveness stream (rule 10).
    ///
    /// # Errors
    /// The system's.
    pub fn closer(&self) -> io::Result<Closer> {
        self.sock.try_clone().map(Closer)
    }

    /// Ends the sending side in order: TLS says so, then TCP. The peer reads end of file.
    pub fn finish(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            // The peer may be gone; ending was all that was wanted.
            let _ = flush_tls(tls, &mut self.sock);
        }
        let _ = self.sock.shutdown(Shutdown::Write);
    }

    /// Whether bytes accepted by `write` still wait for the socket (nonblocking streams).
    pub(crate) fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.sock
    }

    pub(crate) fn into_parts(self) -> (TcpStream, Parts) {
        (
            self.sock,
            Parts {
                tls: self.tls,
                peer: self.peer,
                name: self.name,
            },
        )
    }

    pub(crate) fn from_parts(sock: TcpStream, parts: Parts) -> Stream {
        Stream::new(sock, parts.tls, parts.peer, parts.name)
    }
}

/// A stream without its socket, on the way to a thread with another file table.
pub(crate) struct Parts {
    tls: Option<Box<rustls::Connection>>,
    peer: SocketAddr,
    name: Option<HostName>,
}

fn flush_tls(tls: &mut rustls::Connection, sock: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        if tls.write_tls(sock)? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// `WouldBlock` is no failure of bytes that are kept for later.
fn unless_full(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

impl Read for Stream {
    /// Errors as a socket's; a TLS failure is `InvalidData` holding a `rustls::Error`, and an end
    /// without the peer's TLS goodbye is `UnexpectedEof`.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return self.sock.read(buf);
        };
        loop {
            match tls.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            match tls.read_tls(&mut self.sock) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if let Err(error) = tls.process_new_packets() {
                // The alert tells the peer why; it may be gone.
                let _ = flush_tls(tls, &mut self.sock);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if tls.wants_write() {
                unless_full(flush_tls(tls, &mut self.sock))?;
            }
        }
    }
}

impl Write for Stream {
    /// With TLS and a nonblocking socket, bytes taken may still wait inside; `flush` moves them.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return self.sock.write(buf);
        };
        // Drained first, so that what waits inside stays within the TLS buffer's limit.
        flush_tls(tls, &mut self.sock)?;
        let taken = tls.writer().write(buf)?;
        unless_full(flush_tls(tls, &mut self.sock))?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => flush_tls(tls, &mut self.sock),
            None => self.sock.flush(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }
}
