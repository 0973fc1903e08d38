//! One TCP connection, spoken line by line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Most bytes of a line: the guest is not trusted to end one.
const MAX_LINE: u64 = 64 * 1024;

/// A connection on which the peer answers in lines.
#[derive(Debug)]
pub(super) struct Conversation {
    stream: BufReader<TcpStream>,
}

impl Conversation {
    /// Connects; every later wait is at most `patience`.
    pub(super) fn connect(target: SocketAddr, patience: Duration) -> io::Result<Conversation> {
        let stream = TcpStream::connect_timeout(&target, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Conversation {
            stream: BufReader::new(stream),
        })
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// The next line, without its end. A connection that ends is an error.
    pub(super) fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.stream
            .by_ref()
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)?;
        match line.pop() {
            Some(b'\n') => {}
            Some(_) => return Err(bad("a line cut short, or without end")),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        String::from_utf8(line).map_err(|_| bad("a line that is not UTF-8"))
    }

    /// Sends one request and reads its one line of answer.
    pub(super) fn ask(&mut self, request: &[u8]) -> io::Result<String> {
        self.send(request)?;
        self.line()
    }
}

/// The peer spoke nonsense.
pub(super) fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
