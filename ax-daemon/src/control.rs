//! Talking to an `ax-vmm` process over its control socket.

use std::path::Path;
use std::time::Duration;

use ax_api::host::{Code, MAX_LINE};
use ax_api::process::{NO_REQUEST, Press, Reply, Request, Status};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader,
};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::failure::Failure;

/// How long a process may take to answer an ordinary question.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long it may take to press a guest's power button: orders wait for what is being done.
const PRESS: Duration = Duration::from_secs(10);

/// Reads one line of JSON; none at the end of the stream.
///
/// # Errors
/// The stream's, or the line is too long or not what was expected.
pub async fn read_line<T: DeserializeOwned>(
    from: &mut (impl AsyncBufRead + Unpin),
) -> std::io::Result<Option<T>> {
    let bad = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    let mut line = Vec::new();
    let limit = MAX_LINE as u64 + 1;
    from.take(limit).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => serde_json::from_slice(&line)
            .map(Some)
            .map_err(|e| bad(format!("not understood: {e}"))),
        Some(_) if line.len() > MAX_LINE => Err(bad(format!("a line of over {MAX_LINE} bytes"))),
        Some(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes one line of JSON.
///
/// # Errors
/// The stream's.
pub async fn write_line<T: Serialize>(
    to: &mut (impl AsyncWrite + Unpin),
    what: &T,
) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(what).map_err(std::io::Error::other)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}

/// One connection to an `ax-vmm` process.
pub struct Connection {
    /// What it says.
    pub from: BufReader<OwnedReadHalf>,
    /// What it hears.
    pub to: OwnedWriteHalf,
    /// Its process id, as the kernel says.
    pub pid: i32,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or does not accept in time.
    pub async fn open(socket: &Path) -> std::io::Result<Connection> {
        let stream = timeout(PATIENCE, UnixStream::connect(socket)).await??;
        let pid = stream.peer_cred()?.pid().unwrap_or(0);
        let (from, to) = stream.into_split();
        Ok(Connection {
            from: BufReader::new(from),
            to,
            pid,
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection ended or the answer did not come in time.
    pub async fn ask(&mut self, request: &Request, patience: Duration) -> std::io::Result<Reply> {
        let exchange = async {
            write_line(&mut self.to, request).await?;
            read_line(&mut self.from)
                .await?
                .ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
        };
        timeout(patience, exchange).await?
    }

    /// Asks who and where it is.
    ///
    /// # Errors
    /// No proper answer in time.
    pub async fn status(&mut self) -> std::io::Result<Status> {
        match self.ask(&Request::Status, PATIENCE).await? {
            Reply::Status(status) => Ok(*status),
            other => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("answered {other:?} to a question for its status"),
            )),
        }
    }
}

/// Asks the process at `socket` for its status.
///
/// # Errors
/// No proper answer in time.
pub async fn status(socket: &Path) -> std::io::Result<Status> {
    Connection::open(socket).await?.status().await
}

/// Orders the process at `socket` to do something; a refusal is an error.
///
/// # Errors
/// It refused ([`Code::State`]) or did not answer in time.
pub async fn order(socket: &Path, request: &Request, patience: Duration) -> Result<(), Failure> {
    ask(socket, request, patience).await.map(drop)
}

/// Asks the process at `socket` and returns its answer; a refusal is an error.
///
/// # Errors
/// As [`order`].
pub async fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<Reply, Failure> {
    let answer = async { Connection::open(socket).await?.ask(request, patience).await };
    match answer.await {
        Ok(Reply::Refused { why }) if why.starts_with(NO_REQUEST) => Err(Failure::new(
            Code::State,
            format!(
                "the VM's process does not know this: it is of an earlier build, and gets that of this axd when it \
                 is started anew ({why})"
            ),
        )),
        Ok(Reply::Refused { why }) => Err(Failure::new(Code::State, why)),
        Ok(reply) => Ok(reply),
        Err(e) => Err(Failure::io("the VM's process does not answer", &e)),
    }
}

/// Presses the power button of the guest of the process at `socket`.
///
/// # Errors
/// It has none, or does not answer in time.
pub async fn press(socket: &Path) -> std::io::Result<Press> {
    let mut connection = Connection::open(socket).await?;
    match connection.ask(&Request::PowerButton, PRESS).await? {
        Reply::Button { press } => Ok(press),
        other => Err(std::io::Error::other(format!(
            "answered {other:?} to a press of the power button"
        ))),
    }
}
