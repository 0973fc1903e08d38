//! The control socket: how axd (also one that has just been restarted) talks to this process.
//!
//! One thread accepts, one serves each connection. Status, events and console are answered from
//! shared boards, so that they work whatever the rest of the process is waiting for; orders go to
//! the conductor one at a time.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use ax_api::process::{NO_REQUEST, Reply, Request, Status};

use crate::console::Console;
use crate::error::Error;
use crate::events::Events;

/// Connections served at once.
const MAX_CONNECTIONS: usize = 64;

/// A request line longer than this is no request.
const MAX_LINE: u64 = 64 << 10;

/// An order for the conductor; exactly one reply is awaited.
#[derive(Debug)]
pub struct Order {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes. A dropped sender reads as "the process ended".
    pub reply: mpsc::Sender<Reply>,
}

/// Takes bytes typed at the console.
pub type TypeIn = Box<dyn Fn(&[u8]) + Send + Sync>;

/// What connections are served from.
pub struct Boards {
    /// Says how things are now.
    pub status: Box<dyn Fn() -> Status + Send + Sync>,
    /// Answers what is asked of the epochs ([`Request::Trace`], [`Request::Stats`]).
    pub epochs: Box<dyn Fn(&Request) -> Reply + Send + Sync>,
    /// What happened.
    pub events: Arc<Events>,
    /// The guest's console, released bytes only.
    pub console: Arc<Console>,
    /// Where bytes typed at the console go.
    pub type_in: TypeIn,
    /// Hands an order to the conductor.
    pub order: Box<dyn Fn(Order) + Send + Sync>,
}

impl std::fmt::Debug for Boards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Boards").finish_non_exhaustive()
    }
}

/// Listens on the Unix socket `path`, replacing one left by a dead process, and serves it from
/// threads until the process ends. Only this user may connect.
///
/// # Errors
/// Another living process listens there, or the path can't be used.
pub fn serve(path: &Path, boards: Arc<Boards>) -> Result<(), Error> {
    let failed = |source| Error::Listen {
        at: path.display().to_string(),
        source,
    };
    if UnixStream::connect(path).is_ok() {
        return Err(failed(std::io::ErrorKind::AddrInUse.into()));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
    let open = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (boards, open) = (Arc::clone(&boards), Arc::clone(&open));
            let serve = move || {
                if let Err(error) = connection(stream, &boards) {
                    tracing::debug!(%error, "control connection");
                }
                open.fetch_sub(1, Ordering::Relaxed);
            };
            let thread = std::thread::Builder::new()
                .name("control-conn".into())
                .spawn(serve);
            if let Err(error) = thread {
                tracing::warn!(%error, "no thread for a control connection");
            }
        }
    };
    std::thread::Builder::new()
        .name("control".into())
        .spawn(accept)
        .map_err(Error::Thread)?;
    Ok(())
}

fn send(stream: &mut impl Write, message: &impl serde::Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn connection(mut stream: UnixStream, boards: &Boards) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    loop {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let request = match serde_json::from_str(&line) {
            Ok(request) => request,
            Err(error) => {
                let why = format!("{NO_REQUEST}: {error}");
                return send(&mut stream, &Reply::Refused { why });
            }
        };
        match request {
            Request::Status => {
                send(&mut stream, &Reply::Status(Box::new((boards.status)())))?;
            }
            Request::Trace { .. } | Request::Stats => {
                send(&mut stream, &(boards.epochs)(&request))?;
            }
            Request::Subscribe { since } => return subscription(stream, boards, since),
            Request::Console { from } => return console(stream, reader, boards, from),
            request => {
                let (reply, answer) = mpsc::channel();
                (boards.order)(Order { request, reply });
                let reply = answer.recv().unwrap_or_else(|_| Reply::Refused {
                    why: "the process ended before it could answer".into(),
                });
                send(&mut stream, &reply)?;
            }
        }
    }
}

fn subscription(mut stream: UnixStream, boards: &Boards, since: u64) -> std::io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut next = since.max(1);
    loop {
        for event in boards.events.since(next, Duration::from_secs(1)) {
            next = event.seq + 1;
            send(&mut stream, &event)?;
        }
        if hung_up(&stream) {
            return Ok(());
        }
    }
}

fn hung_up(stream: &UnixStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    matches!(recv(stream.as_raw_fd(), &mut [0; 1], flags), Ok(0))
}

fn console(
    mut stream: UnixStream,
    mut reader: BufReader<UnixStream>,
    boards: &Boards,
    from: Option<u64>,
) -> std::io::Result<()> {
    let mut at = boards.console.begin(from);
    send(&mut stream, &Reply::Console { offset: at.at })?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut typed = [0; 256];
            while let Ok(n @ 1..) = reader.read(&mut typed) {
                (boards.type_in)(&typed[..n]);
            }
        });
        let mut out = Vec::new();
        while boards
            .console
            .read(&mut at, &mut out, Duration::from_millis(500))
        {
            if stream.write_all(&out).is_err() || (out.is_empty() && hung_up(&stream)) {
                break;
            }
            out.clear();
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::process::What;

    fn boards() -> Arc<Boards> {
        Arc::new(Boards {
            status: Box::new(|| Status {
                name: "t".into(),
                pid: 1,
                wire: 1,
                incarnation: ax_wire::Incarnation(1),
                role: ax_api::process::Role::Primary,
                phase: ax_api::process::Phase::Starting,
                warning: None,
                disk_fails: None,
                disk_holds: false,
                arbiter: String::new(),
                sync_left_s: None,
                mode: ax_api::vm::Mode::Ft,
                generation: ax_wire::Generation(0),
                listen: Vec::new(),
                epoch: 0,
                epochs_per_second: 0.0,
                pause_us: [0; 2],
                pause_parts_us: Default::default(),
                disk_sync: Default::default(),
                commit_us: [0; 2],
                ship_us: [0; 2],
                pages: [0; 2],
                link_bytes_per_second: 0,
                oldest_held_us: 0,
                paths: Vec::new(),
            }),
            epochs: Box::new(|_| Reply::Done),
            events: Events::new(),
            console: Console::new(),
            type_in: Box::new(|_| {}),
            order: Box::new(|order| {
                let _ = order.reply.send(Reply::Done);
            }),
        })
    }

    fn ask(stream: &mut UnixStream, line: &str) -> String {
        stream.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut answer)
            .unwrap();
        answer
    }

    #[test]
    fn requests_are_answered_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        drop(UnixListener::bind(&path).unwrap());
        let boards = boards();
        serve(&path, Arc::clone(&boards)).unwrap();
        assert!(
            serve(&path, Arc::clone(&boards)).is_err(),
            "a second process is refused"
        );
        let mut stream = UnixStream::connect(&path).unwrap();
        assert!(ask(&mut stream, "{\"do\":\"status\"}\n").contains("\"name\":\"t\""));
        assert!(ask(&mut stream, "{\"do\":\"pause\"}\n").contains("done"));
        assert!(ask(&mut stream, "{\"do\":\"dance\"}\n").contains("not a request"));

        boards.events.note("one");
        let mut stream = UnixStream::connect(&path).unwrap();
        let line = ask(&mut stream, "{\"do\":\"subscribe\",\"since\":0}\n");
        let event: ax_api::process::Event = serde_json::from_str(&line).unwrap();
        assert_eq!(event.what, What::Note { text: "one".into() });

        boards.console.released(0, b"booted\n");
        let mut stream = UnixStream::connect(&path).unwrap();
        stream
            .write_all(b"{\"do\":\"console\",\"from\":null}\n")
            .unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.contains("\"offset\":0"), "{line}");
        line.clear();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "booted\n");
    }
}
