//! Two hosts compare versions and capabilities on an open channel.
//!
//! Both send their [`Hello`], both decide, both tell the other. So each side knows whether the
//! pair is possible and, if not, every reason of both.

use std::time::{Duration, Instant};

use ax_wire::frame::FrameKind;
use ax_wire::hello::{Hello, HelloError, Negotiated, Verdict, negotiate};

use crate::{LinkError, Stream, message};

/// Exchanges hellos within `timeout`; both sides call it, in any order. The stream is usable
/// afterwards only on success.
///
/// # Errors
/// [`LinkError::Incompatible`] and [`LinkError::PeerRefused`] name every difference;
/// [`LinkError::Hello`] when the peer speaks no common version; otherwise the connection failed.
pub fn exchange(
    stream: &mut Stream,
    mine: &Hello,
    timeout: Duration,
) -> Result<(Hello, Negotiated), LinkError> {
    let deadline = Instant::now() + timeout;
    message::send(
        stream,
        FrameKind::Hello,
        &mine.encode()?,
        deadline,
        "take the hello",
    )?;
    let bytes = message::receive(stream, FrameKind::Hello, deadline, "send its hello")?;
    let decided = Hello::parse(&bytes, mine.versions)
        .map_err(LinkError::from)
        .and_then(|theirs| named(stream, theirs))
        .and_then(|theirs| Ok((negotiate(mine, &theirs)?, theirs)));
    let verdict = match &decided {
        Ok(_) => Verdict::Agreed,
        Err(LinkError::Incompatible(refusal)) => Verdict::Refused(refusal.reasons.clone()),
        Err(other) => Verdict::Refused(vec![other.to_string()]),
    };
    let told = message::send(
        stream,
        FrameKind::Verdict,
        &verdict.encode()?,
        deadline,
        "take the verdict",
    );
    let (negotiated, theirs) = decided?;
    told?;
    let bytes = message::receive(stream, FrameKind::Verdict, deadline, "send its verdict")?;
    match Verdict::parse(&bytes)? {
        Verdict::Agreed => {}
        Verdict::Refused(reasons) => return Err(LinkError::PeerRefused(reasons)),
    }
    message::no_deadline(stream)?;
    Ok((theirs, negotiated))
}

/// The name in a hello must be the one the certificate proves.
fn named(stream: &Stream, theirs: Hello) -> Result<Hello, LinkError> {
    match stream.peer_name() {
        Some(name) if name.as_str() != theirs.body.host => Err(HelloError::Field(
            "host name: it is not the one the certificate was paired under",
        )
        .into()),
        _ => Ok(theirs),
    }
}
