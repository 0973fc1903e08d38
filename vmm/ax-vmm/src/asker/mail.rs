//! The ways to the other host for a letter about the pair's record: its process, or its axd.
//!
//! A process that is known to live is written to directly, so that a pair comes into protection, turns
//! and stops in order though both daemons are dead. Where there is none, or none is known, the daemon
//! passes the letter on or answers it.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use ax_api::host::{MAX_LINE, PeerRequest, Reply};
use ax_arbiter::message;
use ax_link::{Connector, Preamble, Stream};
use ax_wire::frame::FrameKind;
use ax_wire::word::{Answer, Letter};
use parking_lot::Mutex;

use super::TRY;

/// How long the other process is waited for before its host's axd is tried.
const DIRECT: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// The other host is not reached.
    Away(String),
    /// It is reached and can't answer for the pair.
    Unable(String),
}

/// The ways.
pub struct Mail {
    name: String,
    process: Mutex<Option<Connector>>,
    axd: Mutex<Connector>,
}

impl Mail {
    /// For the VM `name`, by way of the other host's axd.
    pub fn new(name: &str, axd: Connector) -> Mail {
        Mail {
            name: name.to_owned(),
            process: Mutex::new(None),
            axd: Mutex::new(axd),
        }
    }

    /// The other host's axd is reached so from now on.
    pub fn axd_at(&self, connector: Connector) {
        *self.axd.lock() = connector;
    }

    /// The other process can be reached so.
    pub fn process_at(&self, connector: Connector) {
        *self.process.lock() = Some(connector);
    }

    /// Sends a letter and waits for the answer, at most [`DIRECT`] and [`TRY`].
    pub fn send(&self, letter: &Letter) -> Result<Answer, Unanswered> {
        let process = self.process.lock().clone();
        if let Some(process) = process {
            match to_process(&process, letter) {
                Ok(answer) => return Ok(answer),
                Err(why) => tracing::debug!(why, "the other process does not answer"),
            }
        }
        self.to_axd(letter)
    }

    fn to_axd(&self, letter: &Letter) -> Result<Answer, Unanswered> {
        let away = |e: &dyn std::fmt::Display| Unanswered::Away(e.to_string());
        let until = Instant::now() + TRY;
        let axd = self.axd.lock().clone();
        let opened = axd.open_until(Preamble::rpc(), until);
        let mut stream = opened.map_err(|error| match error.is_distrust() {
            // It lives: an operator's word that it is dead would be wrong.
            true => Unanswered::Unable(error.to_string()),
            false => away(&error),
        })?;
        timed(&stream, until).map_err(|e| away(&e))?;
        let request = PeerRequest::Word {
            name: self.name.clone(),
            letter: Box::new(letter.in_version(stream.version())),
        };
        stream.version().has(&request).map_err(|e| away(&e))?;
        let mut line = serde_json::to_vec(&request).map_err(|e| away(&e))?;
        line.push(b'\n');
        std::io::Write::write_all(&mut stream, &line)
            .and_then(|()| std::io::Write::flush(&mut stream))
            .map_err(|e| away(&e))?;
        let mut from = BufReader::new(stream);
        loop {
            let mut line = Vec::new();
            timed(from.get_ref(), until).map_err(|e| away(&e))?;
            from.by_ref()
                .take(MAX_LINE as u64)
                .read_until(b'\n', &mut line)
                .map_err(|e| away(&e))?;
            match serde_json::from_slice(&line).map_err(|e| away(&e))? {
                Reply::Word { answer } => return Ok(*answer),
                Reply::Failed { why, .. } => return Err(Unanswered::Unable(why)),
                _ if Instant::now() >= until => return Err(away(&"it does not answer in time")),
                _ => {}
            }
        }
    }
}

fn timed(stream: &Stream, until: Instant) -> std::io::Result<()> {
    let left = until
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

fn to_process(process: &Connector, letter: &Letter) -> Result<Answer, String> {
    let until = Instant::now() + DIRECT;
    let mut stream = process
        .open_until(Preamble::witness(), until)
        .map_err(|e| e.to_string())?;
    timed(&stream, until).map_err(|e| e.to_string())?;
    let letter = letter.in_version(stream.version());
    message::write(&mut stream, FrameKind::ArbiterCall, &letter).map_err(|e| e.to_string())?;
    message::read(&mut stream, FrameKind::ArbiterAnswer).map_err(|e| e.to_string())
}
