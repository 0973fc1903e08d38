//! The joining side: uses a token.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ax_wire::MachineId;
use ax_wire::channel::printable;
use ax_wire::frame::FrameKind;

use super::{
    Before, PairError, Paired, Reply, Request, STORED, Token, VERSION, decode, encode, nothing,
};
use crate::sock::{Timed, connect_any};
use crate::{Fingerprint, HostName, Identity, LinkError, Stream, TrustStore, message, tls};

/// Pairs with whoever made `token`, within `timeout`.
///
/// # Errors
/// [`PairError`]; nothing was stored then.
pub fn join(
    identity: &Identity,
    trust: &TrustStore,
    token: &Token,
    timeout: Duration,
) -> Result<Paired, PairError> {
    join_as(identity, trust, token, timeout, None, &nothing())
}

/// The same, saying which machine this is; `before` is done before the other side is trusted.
///
/// # Errors
/// [`PairError`]; nothing was stored then.
pub fn join_as(
    identity: &Identity,
    trust: &TrustStore,
    token: &Token,
    timeout: Duration,
    machine: Option<MachineId>,
    before: &Before,
) -> Result<Paired, PairError> {
    let deadline = Instant::now() + timeout;
    let paths = token.addrs.iter().map(|addr| (None, *addr));
    let mut stream = connect_any(paths, deadline, |sock, addr| {
        authenticate(identity, token, sock, addr, deadline)
    })
    .map_err(|failures| PairError::NobodyOffers {
        attempts: failures
            .into_iter()
            .map(|(addr, why)| format!("{addr}: {why}"))
            .collect(),
    })?;
    let request = Request {
        version: VERSION,
        secret: token.secret,
        name: identity.name().to_string(),
        machine,
    };
    let (kind, due) = (FrameKind::Pairing, "take the secret");
    message::send(&mut stream, kind, &encode(&request)?, deadline, due)?;
    let body = message::receive(&mut stream, kind, deadline, "answer the pairing")?;
    let (name, machine, side): (HostName, _, _) = match decode(&body) {
        Some(Reply::Paired {
            name,
            machine,
            side,
        }) => (name.parse().map_err(LinkError::from)?, machine, side),
        Some(Reply::Refused { reason }) => {
            return Err(PairError::Refused(printable(reason.as_bytes())));
        }
        None => return Err(PairError::Refused("its answer is malformed".into())),
    };
    if name == *identity.name() {
        return Err(PairError::SameName(name));
    }
    let cert = stream
        .peer_certificate()
        .cloned()
        .ok_or_else(|| LinkError::Closed {
            peer: stream.describe(),
        })?;
    let paired = Paired {
        name,
        fingerprint: Fingerprint::of(&cert),
        machine,
        side,
    };
    before(&paired).map_err(PairError::Before)?;
    trust.add(&paired.name, &cert)?;
    message::send(&mut stream, kind, STORED, deadline, "take the confirmation")?;
    stream.finish();
    Ok(paired)
}

fn authenticate(
    identity: &Identity,
    token: &Token,
    sock: TcpStream,
    addr: SocketAddr,
    deadline: Instant,
) -> Result<Stream, LinkError> {
    let mut conn = tls::client(
        identity,
        tls::Pins::Exactly(token.fingerprint),
        tls::PAIRING,
    )?;
    conn.complete_io(&mut Timed::new(&sock, deadline))
        .map_err(|e| LinkError::opening("finish the TLS handshake", &addr.to_string(), e))?;
    Ok(Stream::new(sock, Some(conn.into()), addr, None))
}
