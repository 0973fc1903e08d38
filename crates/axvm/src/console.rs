//! `axvm console`: the terminal becomes the guest's serial line; Ctrl-] leaves it.
//!
//! Every byte of the guest has an offset (rule 8). When the connection ends because the guest moved to
//! the other host, it is opened again from the first byte not seen: each byte is shown once.

use std::io::{BufReader, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ax_api::host::{Code, Reply, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::client::{Client, Failure, next};

/// Ctrl-].
const LEAVE: u8 = 0x1d;
/// How long a guest that went away may take to come back on the other host.
const PATIENCE: Duration = Duration::from_secs(15);
const TRY_EVERY: Duration = Duration::from_millis(100);

/// Why the bytes stopped.
enum Stopped {
    /// The user left.
    Left,
    /// The connection ended.
    Ended,
}

/// Runs until the user leaves or the guest is gone for good.
pub fn run(client: &Client, name: &str) -> Result<(), Failure> {
    let (mut offset, mut stream) = open(client, name, None)?;
    let raw = Raw::enter();
    if raw.is_some() {
        eprint!("console of {name}; Ctrl-] leaves it\r\n");
    }
    loop {
        match carry(&mut stream, &mut offset) {
            Ok(Stopped::Left) => return Ok(()),
            Ok(Stopped::Ended) => {}
            Err(e) => {
                let failure = Failure::new(Code::Failed, format!("console: {e}"));
                return Err(failure);
            }
        }
        let deadline = Instant::now() + PATIENCE;
        (offset, stream) = loop {
            match open(client, name, Some(offset)) {
                Ok(opened) => break opened,
                Err(failure) if matches!(failure.code, Code::NoSuchVm) => return Err(failure),
                Err(failure) if Instant::now() > deadline => {
                    return match failure.code {
                        // It was stopped: nothing is wrong.
                        Code::State => Ok(()),
                        _ => Err(failure),
                    };
                }
                Err(_) => std::thread::sleep(TRY_EVERY),
            }
        };
    }
}

fn open(
    client: &Client,
    name: &str,
    from: Option<u64>,
) -> Result<(u64, BufReader<UnixStream>), Failure> {
    let mut stream = client.send(&Request::Console {
        name: name.to_owned(),
        from,
    })?;
    match next(&mut stream)? {
        Reply::Console { offset } => {
            if let Some(wanted) = from.filter(|wanted| *wanted < offset) {
                eprint!(
                    "[{} bytes are not remembered any more]\r\n",
                    offset - wanted
                );
            }
            Ok((offset, stream))
        }
        Reply::Failed { code, why } => Err(Failure::new(code, why)),
        other => Err(Failure::new(
            Code::Failed,
            format!("axd gave an unexpected answer: {other:?}"),
        )),
    }
}

fn carry(stream: &mut BufReader<UnixStream>, offset: &mut u64) -> std::io::Result<Stopped> {
    let stdin = std::io::stdin();
    let mut stdout = std::io::stdout();
    let mut to = stream.get_ref().try_clone()?;
    let mut bytes = [0; 4096];
    // Input of a pipe may end before the guest has said all: then only output goes on.
    let mut input_open = true;
    loop {
        // What came with the answer is in the buffer already and would not wake poll.
        if stream.buffer().is_empty() {
            let (output_ready, input_ready) = {
                let mut fds = [
                    PollFd::new(to.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
                ];
                let watched = if input_open { 2 } else { 1 };
                match poll(&mut fds[..watched], PollTimeout::NONE) {
                    Err(Errno::EINTR) => continue,
                    other => other?,
                };
                let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
                (ready(&fds[0]), input_open && ready(&fds[1]))
            };
            if input_ready {
                let n = nix::unistd::read(&stdin, &mut bytes)?;
                input_open = n > 0;
                let typed = &bytes[..n];
                if let Some(end) = typed.iter().position(|b| *b == LEAVE) {
                    let _ = to.write_all(&typed[..end]);
                    return Ok(Stopped::Left);
                }
                if to.write_all(typed).is_err() {
                    return Ok(Stopped::Ended);
                }
            }
            if !output_ready {
                continue;
            }
        }
        let n = match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return Ok(Stopped::Ended),
            Ok(n) => n,
        };
        stdout.write_all(&bytes[..n])?;
        stdout.flush()?;
        *offset = offset.saturating_add(n as u64);
    }
}

/// A terminal in raw mode; as it was when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Raw> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone; then so is its mode.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
