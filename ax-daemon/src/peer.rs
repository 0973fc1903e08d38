//! The way to the other host's axd: one connection a request, over the authenticated link.
//!
//! The link's streams block, so each exchange runs on a thread made for blocking. The answering side
//! says [`Reply::Alive`] every second while it works, so that a dead host is noticed within
//! [`SILENCE`] however long the work takes.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, MAX_LINE, PeerReport, PeerRequest, ProcessReport, Reply, Request};
use ax_api::report::HostPath;
use ax_link::{AddressPair, Connector, HostName, Preamble, Security, Stream};
use ax_wire::Version;
use ax_wire::version::Lacks;
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::config::{Config, Peer};
use crate::console::Console;
use crate::failure::Failure;
use crate::paths::Path;

/// How long the other host may say nothing.
pub const SILENCE: Duration = Duration::from_secs(5);
/// How often the answering side says that it is still at it.
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long opening a connection may take.
const OPENING: Duration = Duration::from_secs(2);
/// How long it may take while the last attempt of any kind has failed, so that nobody waits for a dead host
/// with every question. [`PeerLink::try_path`] goes on with [`OPENING`], and ends this.
const OPENING_AGAIN: Duration = Duration::from_millis(500);
/// How long a console's thread waits for bytes of one direction before it looks at the other.
const TURN: Duration = Duration::from_millis(10);

/// The way to the other host.
pub struct PeerLink {
    host: String,
    name: String,
    connector: Connector,
    /// The same, less patient.
    again: Connector,
    /// What was last known of it: reachable, or why not. None before the first try.
    state: Mutex<Option<Result<(), String>>>,
    /// The wire version of the latest connection; none before the first.
    spoken: Mutex<Option<Version>>,
    /// Each of its addresses, how it is and the way there.
    paths: Vec<(Mutex<Path>, Connector)>,
}

impl PeerLink {
    /// The way to `peer`, secured as configured.
    ///
    /// # Errors
    /// The peer's name is none the link knows.
    pub fn new(config: &Config, peer: &Peer, security: Security) -> Result<PeerLink, Failure> {
        let paths = peer.addresses.iter().copied().map(AddressPair::from);
        let expected: HostName = peer
            .name
            .parse()
            .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
        let connector = Connector::new(security, paths.collect(), Some(expected)).timeout(OPENING);
        let again = connector.clone().timeout(OPENING_AGAIN);
        let ways = connector.each().into_iter();
        Ok(PeerLink {
            host: config.name.clone(),
            name: peer.name.clone(),
            connector,
            again,
            state: Mutex::new(None),
            spoken: Mutex::new(None),
            paths: ways
                .map(|(address, way)| (Mutex::new(Path::new(address)), way))
                .collect(),
        })
    }

    /// Each of its addresses, as this host finds them.
    pub fn paths(&self) -> Vec<HostPath> {
        self.paths
            .iter()
            .map(|(path, _)| path.lock().report())
            .collect()
    }

    /// Whether it answers at one of its addresses, blocking.
    ///
    /// # Errors
    /// Why not.
    pub fn try_path(&self, path: usize) -> Result<(), String> {
        let Some((_, way)) = self.paths.get(path) else {
            return Ok(());
        };
        let failed = |e: &dyn std::fmt::Display| e.to_string();
        let stream = way
            .open(Preamble::rpc())
            .map_err(|e| crate::failure::chain(&e))?;
        stream
            .set_read_timeout(Some(OPENING))
            .and_then(|()| stream.set_write_timeout(Some(OPENING)))
            .map_err(|e| failed(&e))?;
        let hello = PeerRequest::Hello {
            host: self.host.clone(),
        };
        let mut stream = BufReader::new(stream);
        write_line(stream.get_mut(), &hello).map_err(|e| failed(&e))?;
        match read_line::<Reply>(&mut stream).map_err(|e| failed(&e))? {
            Some(Reply::Version { host, .. }) if host == self.name => Ok(()),
            Some(Reply::Version { host, .. }) => Err(format!("host {host} answers there")),
            Some(other) => Err(self.unexpected(&other).why),
            None => Err("it closed the connection".to_owned()),
        }
    }

    /// What came of [`PeerLink::try_path`]; the line for the operator, if it is news.
    pub fn path_tried(&self, path: usize, outcome: Result<(), String>) -> Option<String> {
        let (path, _) = self.paths.get(path)?;
        if outcome.is_ok() {
            *self.state.lock() = Some(Ok(()));
        }
        path.lock().tried(outcome, &self.name)
    }

    /// The other host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was last known: reachable, or why not. None before the first try.
    pub fn state(&self) -> Option<Result<(), String>> {
        self.state.lock().clone()
    }

    /// The wire version that was last spoken with it; none before the first time.
    pub fn spoken(&self) -> Option<Version> {
        *self.spoken.lock()
    }

    /// Asks, and waits for the last line of the answer.
    ///
    /// # Errors
    /// It does not answer ([`Code::Peer`]), or its own failure.
    pub async fn call(self: &Arc<Self>, request: PeerRequest) -> Result<Reply, Failure> {
        self.call_and_tell(request, None).await
    }

    /// Asks; lines before the last go to `tell` as they come. Ends early when nobody listens there.
    ///
    /// # Errors
    /// As [`PeerLink::call`].
    pub async fn call_and_tell(
        self: &Arc<Self>,
        request: PeerRequest,
        tell: Option<UnboundedSender<Reply>>,
    ) -> Result<Reply, Failure> {
        let link = self.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let (reply, _) = link.exchange(&request, |line| match &tell {
                Some(tell) => tell.send(line).is_ok(),
                None => true,
            })?;
            Ok(reply)
        });
        match asked.await {
            Ok(Ok(Reply::Failed { code, why })) => Err(Failure::new(code, why)),
            Ok(answered) => answered,
            Err(e) => Err(Failure::new(Code::Failed, format!("asking the peer: {e}"))),
        }
    }

    /// Forwards a user's request. The reply may be a failure: it is the user's all the same.
    ///
    /// # Errors
    /// As [`PeerLink::call`].
    pub async fn forward(
        self: &Arc<Self>,
        request: Request,
        tell: Option<UnboundedSender<Reply>>,
    ) -> Result<Reply, Failure> {
        self.call_and_tell(PeerRequest::Forward { request }, tell)
            .await
    }

    /// Which processes run there.
    ///
    /// # Errors
    /// As [`PeerLink::call`].
    pub async fn processes(self: &Arc<Self>) -> Result<Vec<ProcessReport>, Failure> {
        match self.call(PeerRequest::Processes).await? {
            Reply::Processes { processes } => Ok(processes),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Whether it answers, now.
    pub async fn hello(self: &Arc<Self>) -> PeerReport {
        let hello = PeerRequest::Hello {
            host: self.host.clone(),
        };
        let why = match self.call(hello).await {
            Ok(Reply::Version { host, .. }) if host == self.name => String::new(),
            Ok(Reply::Version { host, .. }) => format!("host {host} answers at its address"),
            Ok(other) => self.unexpected(&other).why,
            Err(failure) => failure.why,
        };
        PeerReport {
            host: self.name.clone(),
            reachable: why.is_empty(),
            why,
        }
    }

    /// A failure for an answer that does not belong to its question.
    pub fn unexpected(&self, reply: &Reply) -> Failure {
        Failure::new(
            Code::Peer,
            format!("host {} gave an unexpected answer: {reply:?}", self.name),
        )
    }

    /// Opens the console of a VM that runs there.
    ///
    /// # Errors
    /// As [`PeerLink::call`].
    pub async fn console(
        self: &Arc<Self>,
        name: &str,
        from: Option<u64>,
    ) -> Result<(u64, Console), Failure> {
        let link = self.clone();
        let request = PeerRequest::Forward {
            request: Request::Console {
                name: name.to_owned(),
                from,
            },
        };
        let opened = tokio::task::spawn_blocking(move || link.exchange(&request, |_| true));
        let joined = opened
            .await
            .map_err(|e| Failure::new(Code::Failed, format!("asking the peer: {e}")))?;
        match joined? {
            (Reply::Console { offset }, stream) => {
                let (ours, theirs) = Console::pair();
                tokio::task::spawn_blocking(move || carry(stream, theirs));
                Ok((offset, ours))
            }
            (Reply::Failed { code, why }, _) => Err(Failure::new(code, why)),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// One request and its answer, blocking. `line` gets all lines but the last and keep-alives, and
    /// says whether to go on.
    fn exchange(
        &self,
        request: &PeerRequest,
        mut line: impl FnMut(Reply) -> bool,
    ) -> Result<(Reply, BufReader<Stream>), Failure> {
        let away = |why: String| {
            *self.state.lock() = Some(Err(why.clone()));
            Failure::new(
                Code::Peer,
                format!("host {} does not answer: {why}", self.name),
            )
        };
        let connector = match &*self.state.lock() {
            Some(Err(_)) => &self.again,
            Some(Ok(())) | None => &self.connector,
        };
        let stream = connector
            .open(Preamble::rpc())
            .map_err(|e| away(crate::failure::chain(&e)))?;
        stream
            .set_read_timeout(Some(SILENCE))
            .and_then(|()| stream.set_write_timeout(Some(SILENCE)))
            .map_err(|e| away(e.to_string()))?;
        let lacks = |e: Lacks| Failure::new(Code::Peer, format!("host {}: {e}", self.name));
        *self.spoken.lock() = Some(stream.version());
        stream.version().has(request).map_err(lacks)?;
        let mut stream = BufReader::new(stream);
        write_line(stream.get_mut(), request).map_err(|e| away(e.to_string()))?;
        loop {
            let reply = match read_line::<Reply>(&mut stream) {
                Ok(Some(reply)) => reply,
                Ok(None) => return Err(away("it closed the connection".to_owned())),
                // However TLS words it.
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Err(away("it went away before it had answered".to_owned()));
                }
                Err(e) => return Err(away(e.to_string())),
            };
            *self.state.lock() = Some(Ok(()));
            if reply.is_last() {
                return Ok((reply, stream));
            }
            if reply != Reply::Alive && !line(reply) {
                return Err(Failure::new(Code::Failed, "whoever asked has gone"));
            }
        }
    }
}

/// Writes one line of JSON, blocking.
///
/// # Errors
/// The stream's.
pub fn write_line<T: Serialize>(to: &mut impl Write, what: &T) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(what).map_err(std::io::Error::other)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads one line of JSON, blocking; none at the end of the stream.
///
/// # Errors
/// The stream's, or the line is too long or not what was expected.
pub fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> std::io::Result<Option<T>> {
    let bad = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    let mut line = Vec::new();
    from.by_ref()
        .take(MAX_LINE as u64 + 1)
        .read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => serde_json::from_slice(&line)
            .map(Some)
            .map_err(|e| bad(format!("not understood: {e}"))),
        Some(_) if line.len() > MAX_LINE => Err(bad(format!("a line of over {MAX_LINE} bytes"))),
        Some(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Carries console bytes between a blocking stream and `console` until either ends. One thread for
/// both directions, as TLS has one state: it takes turns.
pub fn carry(mut stream: BufReader<Stream>, mut console: Console) {
    if stream.get_ref().set_read_timeout(Some(TURN)).is_err() {
        return;
    }
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(n) => {
                if console.to.blocking_send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock
                        | std::io::ErrorKind::TimedOut
                        | std::io::ErrorKind::Interrupted
                ) => {}
            Err(_) => break,
        }
        loop {
            match console.from.try_recv() {
                Ok(out) => {
                    if stream.get_mut().write_all(&out).is_err() {
                        return;
                    }
                }
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    stream.get_mut().finish();
                    return;
                }
            }
        }
        if stream.get_mut().flush().is_err() {
            break;
        }
    }
}
