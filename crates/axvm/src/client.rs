//! One request to axd and its answer, blocking.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ax_api::host::{Code, DEFAULT_SOCKET, MAX_LINE, Reply, Request};

use crate::show::Show;

/// Why a command could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// What was wrong and what to do.
    pub why: String,
}

impl Failure {
    /// A failure of a kind.
    pub fn new(code: Code, why: impl Into<String>) -> Failure {
        Failure {
            code,
            why: why.into(),
        }
    }

    /// axd gave an answer that does not belong to its question.
    pub fn unexpected(reply: &Reply) -> Failure {
        Failure::new(
            Code::Failed,
            format!("axd gave an unexpected answer: {reply:?}"),
        )
    }
}

/// The way to axd.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// To the socket given, that of `$AX_SOCKET`, or the usual one.
    pub fn new(socket: Option<PathBuf>) -> Client {
        let socket = socket
            .or_else(|| std::env::var_os("AX_SOCKET").map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
        Client { socket }
    }

    /// Sends a request.
    pub fn send(&self, request: &Request) -> Result<BufReader<UnixStream>, Failure> {
        let away = |e: std::io::Error| {
            Failure::new(
                Code::NoAxd,
                format!(
                    "axd does not answer at {}: {e}; is it running? (--socket or $AX_SOCKET names another)",
                    self.socket.display()
                ),
            )
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(away)?;
        let mut line = serde_json::to_vec(request)
            .map_err(|e| Failure::new(Code::Usage, format!("the request: {e}")))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(away)?;
        Ok(BufReader::new(stream))
    }

    /// Sends a request, shows what is said meanwhile, and returns the last line.
    pub fn ask(&self, request: &Request, show: &Show) -> Result<Reply, Failure> {
        let mut stream = self.send(request)?;
        loop {
            match next(&mut stream)? {
                Reply::Failed { code, why } => {
                    show.progress_ends();
                    return Err(Failure::new(code, why));
                }
                reply if reply.is_last() => {
                    show.progress_ends();
                    return Ok(reply);
                }
                reply => show.meanwhile(&reply),
            }
        }
    }
}

/// The next line of an answer.
pub fn next(stream: &mut BufReader<UnixStream>) -> Result<Reply, Failure> {
    let away = |why: String| {
        Failure::new(
            Code::NoAxd,
            format!(
                "axd went away before it had answered ({why}); `axvm list` tells how things are"
            ),
        )
    };
    let mut line = vec![];
    stream
        .take(MAX_LINE as u64 + 1)
        .read_until(b'\n', &mut line)
        .map_err(|e| away(e.to_string()))?;
    if line.last() != Some(&b'\n') {
        return Err(away("connection closed".to_owned()));
    }
    serde_json::from_slice(&line).map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("axd's answer is not understood ({e}); are axvm and axd of the same version?"),
        )
    })
}
