//! The handshake: two hosts compare what they speak and what they are.
//!
//! Each side sends one [`Hello`]; each calls [`negotiate`] with its own and the other's, and
//! sends the outcome as a [`Verdict`], so that both sides know and can say why. The supported
//! wire versions come first, at fixed places: a peer of any version can read them, so one that
//! is neither N nor N−1 is refused by name even if everything after them has changed.
//!
//! What is compared is what a failover needs: the shadow's host must offer everything that the
//! guest has seen on the primary's. [`caps`] holds these rules.

use crate::channel::printable;
use crate::version::TooFarApart;
use crate::{PAGE_SIZE, PairId, Session, Version, Versions};

pub mod caps;

pub use caps::{CpuidLeaf, HostCaps, KvmCap};

/// Limit of an encoded [`Hello`] or [`Verdict`], bytes.
const LIMIT: usize = 64 << 10;
const MAX_NAME: usize = 63;
const MAX_REASONS: usize = 64;

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Which part a side plays in the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum Role {
    /// Runs the guest.
    Primary,
    /// Follows it.
    Shadow,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Primary => "primary",
            Role::Shadow => "shadow",
        })
    }
}

/// The machine a guest sees, as configured on one side. Must be equal on both.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Machine {
    /// Guest RAM, bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// SHA-256 of the device configuration (kinds, order, MACs, disk sizes).
    pub devices: [u8; 32],
}

/// What a session handshake says besides the host's capabilities.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct VmHello {
    /// The sender's session.
    pub session: Session,
    /// The sender's part.
    pub role: Role,
    /// The machine as the sender has it.
    pub machine: Machine,
}

/// What one side says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The wire versions it speaks.
    pub versions: Versions,
    /// Everything else.
    pub body: Body,
}

/// A [`Hello`] without its versions.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Body {
    /// The host's name.
    pub host: String,
    /// What its processor and KVM offer guests.
    pub caps: HostCaps,
    /// The VM this handshake is about; `None` between daemons.
    pub vm: Option<VmHello>,
}

/// Why bytes are not a hello or verdict.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Too short for the versions, or the versions contradict each other.
    #[error("malformed versions in the peer's hello")]
    Versions,
    /// The peer speaks no version this build speaks.
    #[error(transparent)]
    NoCommonVersion(#[from] TooFarApart),
    /// The rest does not decode.
    #[error("malformed hello or verdict: {0}")]
    Malformed(String),
    /// A field is out of its bounds.
    #[error("hello with impossible {0}")]
    Field(&'static str),
    /// It does not fit one message.
    #[error("hello does not fit {LIMIT} bytes: {0}")]
    TooLarge(String),
}

impl Hello {
    /// This build's hello.
    pub fn ours(host: String, caps: HostCaps, vm: Option<VmHello>) -> Hello {
        Hello {
            versions: Versions::ours(),
            body: Body { host, caps, vm },
        }
    }

    /// The body of its frame.
    ///
    /// # Errors
    /// It does not fit one message.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        let mut out = Vec::with_capacity(4096);
        out.extend_from_slice(&self.versions.oldest().number().to_le_bytes());
        out.extend_from_slice(&self.versions.newest().number().to_le_bytes());
        let body = bincode::encode_to_vec(&self.body, config())
            .map_err(|e| HelloError::TooLarge(e.to_string()))?;
        if body.len() > LIMIT {
            return Err(HelloError::TooLarge(format!("{} bytes", body.len())));
        }
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads a peer's hello. `ours` is what this host speaks: without a common version the rest
    /// is not even decoded.
    ///
    /// # Errors
    /// No common version, or malformed bytes.
    pub fn parse(bytes: &[u8], ours: Versions) -> Result<Hello, HelloError> {
        let [a, b, c, d, body @ ..] = bytes else {
            return Err(HelloError::Versions);
        };
        let theirs = Versions::new(u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]))
            .ok_or(HelloError::Versions)?;
        if ours.common(theirs).is_none() {
            return Err(TooFarApart { theirs, ours }.into());
        }
        let body: Body = decode(body)?;
        if body.host.is_empty()
            || body.host.len() > MAX_NAME
            || body.host.chars().any(char::is_control)
        {
            return Err(HelloError::Field("host name"));
        }
        if body
            .vm
            .as_ref()
            .is_some_and(|vm| vm.session.incarnation.0 == 0)
        {
            return Err(HelloError::Field("incarnation"));
        }
        Ok(Hello {
            versions: theirs,
            body,
        })
    }
}

fn decode<T: bincode::Decode<()>>(bytes: &[u8]) -> Result<T, HelloError> {
    let (value, used) = bincode::decode_from_slice(bytes, config())
        .map_err(|e| HelloError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(HelloError::Malformed(format!(
            "{} bytes too many",
            bytes.len() - used
        )));
    }
    Ok(value)
}

/// What both sides will use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The wire version. A connection has settled on it before ([`crate::channel`]) unless one side is a
    /// build of version 1, which says what it speaks only here.
    pub version: Version,
}

/// Why two hosts cannot be a pair. One entry per difference, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these hosts cannot protect this VM: {}", reasons.join("; "))]
pub struct Refusal {
    /// Each difference, naming both values.
    pub reasons: Vec<String>,
}

/// Decides whether the two can be a pair, naming every difference that would prevent a failover.
/// Both sides come to the same answer.
///
/// Generations are not compared: one side may have learned of a newer one first; the pair's
/// state machine and the arbiter decide about those.
///
/// # Errors
/// Every reason found.
pub fn negotiate(mine: &Hello, theirs: &Hello) -> Result<Negotiated, Refusal> {
    let mut reasons = Vec::new();
    let version = mine.versions.common(theirs.versions);
    if version.is_none() {
        reasons.push(format!(
            "{} speaks {}, {} {}: upgrade the older host",
            mine.body.host, mine.versions, theirs.body.host, theirs.versions
        ));
    }
    let (me, peer) = (&mine.body, &theirs.body);
    if me.host == peer.host {
        reasons.push(format!(
            "both hosts are called {:?}; names must differ",
            me.host
        ));
    }
    for body in [me, peer] {
        if body.caps.page_size as usize != PAGE_SIZE {
            reasons.push(format!(
                "page size on {} is {} bytes; only {PAGE_SIZE} is supported",
                body.host, body.caps.page_size
            ));
        }
    }
    match (&me.vm, &peer.vm) {
        (None, None) => {
            // No guest yet, so nobody knows which way it will move: both ways must work.
            reasons.extend(caps::lacking(
                (&me.host, &me.caps),
                (&peer.host, &peer.caps),
            ));
            reasons.extend(caps::lacking(
                (&peer.host, &peer.caps),
                (&me.host, &me.caps),
            ));
            reasons.dedup();
        }
        (Some(my_vm), Some(peer_vm)) => {
            reasons.extend(vm_differences((&me.host, my_vm), (&peer.host, peer_vm)));
            let (from, to) = if my_vm.role == Role::Primary {
                (me, peer)
            } else {
                (peer, me)
            };
            reasons.extend(caps::lacking(
                (&from.host, &from.caps),
                (&to.host, &to.caps),
            ));
        }
        _ => reasons.push("one side speaks of a VM, the other of the host alone".into()),
    }
    match (version, reasons.is_empty()) {
        (Some(version), true) => Ok(Negotiated { version }),
        _ => Err(Refusal { reasons }),
    }
}

fn vm_differences(me: (&str, &VmHello), peer: (&str, &VmHello)) -> Vec<String> {
    let ((my_name, mine), (peer_name, theirs)) = (me, peer);
    let mut out = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            out.push(format!("{what}: {my_name} has {a}, {peer_name} has {b}"));
        }
    };
    let pair = |p: PairId| p.to_string();
    differ("pair", pair(mine.session.pair), pair(theirs.session.pair));
    let (a, b) = (&mine.machine, &theirs.machine);
    differ(
        "guest memory",
        format!("{} bytes", a.memory_bytes),
        format!("{} bytes", b.memory_bytes),
    );
    differ("vCPUs", a.vcpus.to_string(), b.vcpus.to_string());
    let digest = |d: &[u8; 32]| {
        d.iter()
            .take(8)
            .map(|b| format!("{b:02x}"))
            .collect::<String>()
    };
    if a.devices != b.devices {
        out.push(format!(
            "device configuration: {my_name} has digest {}…, {peer_name} {}…; compare `axvm show` on both",
            digest(&a.devices),
            digest(&b.devices)
        ));
    }
    if mine.role == theirs.role {
        out.push(format!("both sides say they are the {}", mine.role));
    }
    out
}

/// The outcome, as told to the peer.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum Verdict {
    /// The sender agrees.
    Agreed,
    /// The sender does not; its reasons.
    Refused(Vec<String>),
}

impl Verdict {
    /// The body of its frame. More than 64 reasons are cut short with a note.
    ///
    /// # Errors
    /// It does not fit one message.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        let mut verdict = self.clone();
        if let Verdict::Refused(reasons) = &mut verdict
            && reasons.len() > MAX_REASONS
        {
            let more = reasons.len() - MAX_REASONS;
            reasons.truncate(MAX_REASONS);
            reasons.push(format!("and {more} more"));
        }
        bincode::encode_to_vec(&verdict, config()).map_err(|e| HelloError::TooLarge(e.to_string()))
    }

    /// Reads a peer's verdict; its texts are made safe to print.
    ///
    /// # Errors
    /// Malformed bytes.
    pub fn parse(bytes: &[u8]) -> Result<Verdict, HelloError> {
        Ok(match decode(bytes)? {
            Verdict::Agreed => Verdict::Agreed,
            Verdict::Refused(reasons) => Verdict::Refused(
                reasons
                    .iter()
                    .take(MAX_REASONS + 1)
                    .map(|r| printable(r.as_bytes()))
                    .collect(),
            ),
        })
    }
}

#[cfg(test)]
mod tests;
