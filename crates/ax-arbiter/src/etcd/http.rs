//! One request to one member of an etcd cluster: JSON over HTTP, as its gateway serves it.
//!
//! HTTP/1.0 and a connection a request: an answer ends with its connection, so there is nothing to
//! reuse wrongly. Every step is bounded by the deadline, every answer by [`MOST`].

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest answer read, bytes.
const MOST: usize = 256 << 10;

/// Why a member gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection failed or the time was over.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// What came is no answer of etcd's gateway.
    #[error("no answer of an etcd: {0}")]
    Malformed(&'static str),
    /// It answered with a failure.
    #[error("it answers with status {status}: {text}")]
    Status {
        /// HTTP's.
        status: u16,
        /// The beginning of what it says.
        text: String,
    },
}

fn left(until: Instant) -> std::io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(std::io::ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

/// Posts `body` to `path` of the member at `to` and returns its answer.
///
/// # Errors
/// [`HttpError`]. Whether it did what was asked is then unknown, but after a failure to connect.
pub fn post(to: SocketAddr, path: &str, body: &Value, until: Instant) -> Result<Value, HttpError> {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.0\r\nHost: {to}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect_timeout(&to, left(until)?)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(left(until)?))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(&mut piece)? {
            0 => break,
            n => answer.extend_from_slice(piece.get(..n).unwrap_or_default()),
        }
        if answer.len() > MOST {
            return Err(HttpError::Malformed("too long"));
        }
        if is_whole(&answer) {
            break;
        }
    }
    parse(&answer)
}

/// Where the body begins.
fn body_at(answer: &[u8]) -> Option<usize> {
    answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map(|at| at + 4)
}

/// True when the answer says how long it is and is all there.
fn is_whole(answer: &[u8]) -> bool {
    body_at(answer).is_some_and(|at| {
        let head = String::from_utf8_lossy(answer.get(..at).unwrap_or_default()).to_lowercase();
        let length = head.lines().find_map(|line| {
            line.strip_prefix("content-length:")?
                .trim()
                .parse::<usize>()
                .ok()
        });
        length.is_some_and(|length| answer.len() - at >= length)
    })
}

fn parse(answer: &[u8]) -> Result<Value, HttpError> {
    let at = body_at(answer).ok_or(HttpError::Malformed("cut short"))?;
    let (head, body) = answer.split_at(at);
    let head = String::from_utf8_lossy(head);
    let status = head
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5)?.parse::<u16>().ok())
        .ok_or(HttpError::Malformed("no HTTP status"))?;
    if status != 200 {
        let text = String::from_utf8_lossy(body)
            .trim()
            .chars()
            .take(200)
            .collect();
        return Err(HttpError::Status { status, text });
    }
    serde_json::from_slice(body).map_err(|_| HttpError::Malformed("its body is no JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_is_read_with_and_without_its_length() {
        let whole = b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\n{\"a\": 1}";
        assert!(is_whole(whole));
        assert!(!is_whole(&whole[..whole.len() - 1]));
        assert_eq!(parse(whole).unwrap()["a"], 1);
        let open = b"HTTP/1.1 200 OK\r\n\r\n{\"a\": 1}";
        assert!(!is_whole(open));
        assert_eq!(parse(open).unwrap()["a"], 1);
    }

    #[test]
    fn a_failure_says_what_etcd_says() {
        let failed = parse(b"HTTP/1.0 503 Busy\r\n\r\n{\"error\":\"no leader\"}").unwrap_err();
        assert!(failed.to_string().contains("no leader"), "{failed}");
    }

    proptest! {
        #[test]
        fn hostile_answers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (is_whole(&bytes), parse(&bytes));
        }
    }
}
