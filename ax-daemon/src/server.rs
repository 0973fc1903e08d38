//! Where requests come in: axvm's Unix socket, and the other host's connections.

use std::io::BufReader as BlockingReader;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use ax_api::host::{Code, PeerRequest, Reply, Request};
use ax_link::{Acceptor, Channel, Incoming, Stream};
use ax_wire::Versions;
use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;
use crate::peer::{self, ALIVE_EVERY, SILENCE};

/// Most connections of the other host at a time; one that hangs holds one.
const MOST_PEER_CONNECTIONS: usize = 64;

/// Listens on axvm's socket. One left by a dead axd is replaced.
///
/// # Errors
/// Another axd answers there, or the socket cannot be made.
pub fn bind(socket: &Path) -> Result<UnixListener, Failure> {
    let failed = |e: &std::io::Error| {
        let code = match e.kind() {
            std::io::ErrorKind::AddrInUse => Code::Network,
            _ => Code::Failed,
        };
        Failure {
            code,
            ..Failure::io(format!("listening on {}", socket.display()), e)
        }
    };
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(Failure::new(
            Code::Network,
            format!(
                "listening on {}: another axd answers there; give this one a socket of its own in axd.toml",
                socket.display()
            ),
        ));
    }
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(|e| failed(&e))?;
    }
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(&e)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(|e| failed(&e))?;
    // Whoever may connect may do everything: axd's own user, and its group.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660))
        .map_err(|e| failed(&e))?;
    Ok(listener)
}

/// Serves axvm for ever.
pub async fn serve_users(daemon: Arc<Daemon>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = daemon.clone();
                tokio::spawn(async move {
                    if let Err(e) = serve_user(daemon, stream).await {
                        tracing::debug!("a user's connection: {e}");
                    }
                });
            }
            Err(e) => {
                tracing::warn!("accepting a user: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_user(daemon: Arc<Daemon>, stream: UnixStream) -> std::io::Result<()> {
    let (from, mut to) = stream.into_split();
    let mut from = BufReader::new(from);
    let request = match control::read_line::<Request>(&mut from).await {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(e) => {
            return control::write_line(&mut to, &unknown(&e).into_reply()).await;
        }
    };
    if let Request::Console { name, from: offset } = &request {
        return match daemon.console(name, *offset, Asker::User).await {
            Ok((offset, console)) => {
                control::write_line(&mut to, &Reply::Console { offset }).await?;
                console.carry(from, to).await;
                Ok(())
            }
            Err(failure) => control::write_line(&mut to, &failure.into_reply()).await,
        };
    }
    let (tell, mut lines) = mpsc::unbounded_channel();
    // In a task of its own: a user who goes away does not leave a thing half done.
    let answer = tokio::spawn(async move {
        let tell = Tell(tell);
        let last = daemon.answer(request, Asker::User, &tell).await;
        let _ = tell.0.send(last);
    });
    while let Some(line) = lines.recv().await {
        // On an error `lines` is dropped, which ends what only talks.
        control::write_line(&mut to, &line).await?;
    }
    answer.await.map_err(std::io::Error::other)
}

/// The answer to a line that is no request, or none that this build knows.
fn unknown(error: &std::io::Error) -> Failure {
    let why = format!(
        "request {error}; if it is of a later build than this axd ({}, {}), upgrade this one, or restart it \
         if its program has been upgraded",
        env!("CARGO_PKG_VERSION"),
        Versions::ours()
    );
    Failure::new(Code::Usage, why)
}

/// Serves the other host on the acceptor's connections; blocks until it is stopped.
pub fn serve_peer(daemon: &Arc<Daemon>, acceptor: &Acceptor, runtime: &Handle) {
    let busy = Arc::new(());
    while let Some(incoming) = acceptor.accept() {
        if let Err(why) = admit(daemon, &incoming) {
            incoming.refuse(&why);
            continue;
        }
        if Arc::strong_count(&busy) > MOST_PEER_CONNECTIONS {
            incoming.refuse("too many connections");
            continue;
        }
        let (daemon, runtime, slot) = (daemon.clone(), runtime.clone(), busy.clone());
        let started = std::thread::Builder::new()
            .name("axd-peer".into())
            .spawn(move || {
                let served = incoming
                    .accept()
                    .map_err(std::io::Error::other)
                    .and_then(|stream| serve_one(&daemon, stream, &runtime));
                if let Err(e) = served {
                    tracing::debug!("a connection of the other host: {e}");
                }
                drop(slot);
            });
        if let Err(e) = started {
            tracing::warn!("no thread for a connection of the other host: {e}");
        }
    }
}

/// Whether a connection is the other host's axd.
fn admit(daemon: &Daemon, incoming: &Incoming) -> Result<(), String> {
    let here = &daemon.config.name;
    if incoming.preamble().channel() != Channel::Rpc {
        return Err(format!("this is the axd of {here}, not a VM's process"));
    }
    let Some(peer) = &daemon.config.peer else {
        return Err(format!("host {here} has no peer in its axd.toml"));
    };
    match incoming.stream().peer_name() {
        Some(name) if name.as_str() == peer.name => Ok(()),
        Some(name) => Err(format!(
            "host {here} has {} as its peer, not {name}",
            peer.name
        )),
        // Plain by configuration: the cable is trusted.
        None if !daemon.config.mtls => Ok(()),
        None => Err("who are you?".to_owned()),
    }
}

fn serve_one(daemon: &Arc<Daemon>, stream: Stream, runtime: &Handle) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut stream = BlockingReader::new(stream);
    let request = match peer::read_line::<PeerRequest>(&mut stream) {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            return peer::write_line(stream.get_mut(), &unknown(&e).into_reply());
        }
        Err(e) => return Err(e),
    };
    if let PeerRequest::Forward {
        request: Request::Console { name, from },
    } = &request
    {
        match runtime.block_on(daemon.console(name, *from, Asker::Peer)) {
            Ok((offset, console)) => {
                peer::write_line(stream.get_mut(), &Reply::Console { offset })?;
                peer::carry(stream, console);
            }
            Err(failure) => peer::write_line(stream.get_mut(), &failure.into_reply())?,
        }
        return Ok(());
    }
    let (tell, mut lines) = mpsc::unbounded_channel();
    let daemon = daemon.clone();
    runtime.spawn(async move {
        let tell = Tell(tell);
        let last = daemon.answer_peer(request, &tell).await;
        let _ = tell.0.send(last);
    });
    while let Some(line) = next_line(runtime, &mut lines) {
        peer::write_line(stream.get_mut(), &line)?;
        if line.is_last() {
            stream.get_mut().finish();
            break;
        }
    }
    Ok(())
}

/// The next line, or a sign of life when none comes for a while; none when there is no more.
fn next_line(runtime: &Handle, lines: &mut UnboundedReceiver<Reply>) -> Option<Reply> {
    let waited = runtime.block_on(async { tokio::time::timeout(ALIVE_EVERY, lines.recv()).await });
    waited.unwrap_or(Some(Reply::Alive))
}
