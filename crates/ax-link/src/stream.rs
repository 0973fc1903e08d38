//! One open channel: bytes in order, protected as configured.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ax_wire::Version;

use crate::{Fingerprint, HostName};

/// A connected, opened channel. Blocking unless set otherwise.
///
/// With TLS both directions share one state, so a stream is used by one thread at a time; the
/// epoch path has a connection per direction. To end a blocked call from another thread, take a
/// [`Closer`].
pub struct Stream {
    sock: TcpStream,
    tls: Option<Box<Tls>>,
    peer: SocketAddr,
    name: Option<HostName>,
    version: Version,
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
        conn: Option<rustls::Connection>,
        peer: SocketAddr,
        name: Option<HostName>,
    ) -> Stream {
        let tls = conn.map(|conn| Box::new(Tls::new(conn)));
        Stream {
            sock,
            tls,
            peer,
            name,
            version: Version::FIRST,
        }
    }

    /// This wire version is spoken from here on.
    pub(crate) fn speak(&mut self, version: Version) {
        self.version = version;
    }

    /// The wire version that both ends have settled on.
    pub fn version(&self) -> Version {
        self.version
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

    /// This end's address.
    ///
    /// # Errors
    /// The system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.sock.local_addr()
    }

    /// Whether neither side has ended the connection, as far as this host has heard. Says nothing of what
    /// waits to be read.
    pub fn is_established(&self) -> bool {
        crate::sock::is_established(&self.sock)
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
            .and_then(|tls| tls.conn.peer_certificates())
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
            tls.conn.send_close_notify();
            // The peer may be gone; ending was all that was wanted.
            let _ = tls.flush(&mut self.sock);
        }
        let _ = self.sock.shutdown(Shutdown::Write);
    }

    /// Whether bytes accepted by `write` still wait for the socket (nonblocking streams).
    pub(crate) fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.conn.wants_write())
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
                version: self.version,
            },
        )
    }

    pub(crate) fn from_parts(sock: TcpStream, parts: Parts) -> Stream {
        Stream {
            sock,
            tls: parts.tls,
            peer: parts.peer,
            name: parts.name,
            version: parts.version,
        }
    }
}

/// A stream without its socket, on the way to a thread with another file table.
pub(crate) struct Parts {
    tls: Option<Box<Tls>>,
    peer: SocketAddr,
    name: Option<HostName>,
    version: Version,
}

/// A TLS state and what was read from the socket for it: rustls takes 4 KiB at a time, which
/// would be a system call for every page.
struct Tls {
    conn: rustls::Connection,
    input: Box<[u8]>,
    /// The unread part of `input`.
    unread: std::ops::Range<usize>,
}

const INPUT: usize = 256 << 10;

impl Tls {
    fn new(conn: rustls::Connection) -> Tls {
        Tls {
            conn,
            input: vec![0; INPUT].into_boxed_slice(),
            unread: 0..0,
        }
    }

    fn flush(&mut self, sock: &mut TcpStream) -> io::Result<()> {
        while self.conn.wants_write() {
            if self.conn.write_tls(sock)? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    fn read(&mut self, sock: &mut TcpStream, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.conn.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.unread.is_empty() {
                // An end of file leaves it empty, and rustls learns of it as such.
                self.unread = 0..sock.read(&mut self.input)?;
            }
            let mut source = &self.input[self.unread.clone()];
            self.unread.start += self.conn.read_tls(&mut source)?;
            if let Err(error) = self.conn.process_new_packets() {
                // The alert tells the peer why; it may be gone.
                let _ = self.flush(sock);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if self.conn.wants_write() {
                unless_full(self.flush(sock))?;
            }
        }
    }

    /// Writes with `fill`, after what waits inside, so that this stays within rustls's limit.
    fn write(
        &mut self,
        sock: &mut TcpStream,
        fill: impl FnOnce(&mut rustls::Writer<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.flush(sock)?;
        let taken = fill(&mut self.conn.writer())?;
        unless_full(self.flush(sock))?;
        Ok(taken)
    }
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
        match &mut self.tls {
            Some(tls) => tls.read(&mut self.sock, buf),
            None => self.sock.read(buf),
        }
    }
}

impl Write for Stream {
    /// With TLS every write is sent at once, in records of its own: write large pieces. On a
    /// nonblocking socket, bytes taken may still wait inside; `flush` moves them.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.write(&mut self.sock, |writer| writer.write(buf)),
            None => self.sock.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.write(&mut self.sock, |writer| writer.write_vectored(bufs)),
            None => self.sock.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => tls.flush(&mut self.sock),
            None => self.sock.flush(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }
}
