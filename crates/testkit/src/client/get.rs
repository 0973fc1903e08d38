//! GET in a closed loop over one RESP connection: the next request leaves when the last is answered.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::conversation::{Conversation, bad};
use super::{Control, Oracle, Origin, Samples};
use crate::{Error, Result};

/// What to do.
#[derive(Debug, Clone)]
pub struct GetSpec {
    /// The RESP service.
    pub target: SocketAddr,
    /// The key; it is set first.
    pub key: String,
    /// Its value.
    pub value: String,
    /// How long an answer may take.
    pub patience: Duration,
}

impl GetSpec {
    /// A value of 64 bytes; an answer may take 30 s.
    pub fn new(target: SocketAddr, key: impl Into<String>) -> GetSpec {
        GetSpec {
            target,
            key: key.into(),
            value: "0123456789abcdef".repeat(4),
            patience: Duration::from_secs(30),
        }
    }
}

/// What it saw.
#[derive(Debug, Clone, Serialize)]
pub struct GetReport {
    /// Answer times.
    #[serde(skip)]
    pub samples: Samples,
}

/// Starts the client. A connection that breaks or a wrong value ends it with an error.
///
/// # Errors
/// When no thread can be started.
pub fn start(origin: &Origin, spec: GetSpec) -> Result<Oracle<GetReport>> {
    let what = format!("GET from {}", spec.target);
    Oracle::start("get", origin, move |control| {
        run(control, &spec).map_err(Error::os(what))
    })
}

fn run(control: &Control, spec: &GetSpec) -> std::io::Result<GetReport> {
    let (key, value) = (&spec.key, &spec.value);
    let mut peer = Conversation::connect(spec.target, spec.patience)?;
    let set = format!(
        "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n{value}\r\n",
        key.len(),
        value.len()
    );
    let answer = peer.ask(set.as_bytes())?;
    if answer != "+OK" {
        return Err(bad(format!("+OK was due, not {answer:?}")));
    }
    let request = format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len());
    let length = format!("${}", value.len());
    let mut samples = Samples::begin();
    while !control.stopping() {
        let sent = Instant::now();
        let (said, got) = (peer.ask(request.as_bytes())?, peer.line()?);
        samples.record(sent, Instant::now());
        if said != length || got != *value {
            return Err(bad(format!("the value was due, not {said:?}, {got:?}")));
        }
        control.answered();
    }
    samples.end();
    Ok(GetReport { samples })
}
