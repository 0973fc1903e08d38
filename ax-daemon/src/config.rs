//! `axd.toml`, parsed into what may be relied on.
//!
//! Every error says file, line, what is wrong and what to write instead; nothing is guessed.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ax_api::process::{Arbiter, Security, Timing};
use ax_wire::{MachineId, Side};
use serde::Deserialize;
use toml::Spanned;

/// The longest path a Unix socket can have.
const SOCKET_PATH_MAX: usize = 107;

/// The other host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name, as in its own configuration.
    pub name: String,
    /// Where its axd listens, in the order to be tried.
    pub addresses: Vec<SocketAddr>,
}

/// What a host's axd works by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This host's name.
    pub name: String,
    /// Folder for definitions, keys, logs and state.
    pub data_dir: PathBuf,
    /// Unix socket for axvm.
    pub socket: PathBuf,
    /// Where the other axd reaches this one.
    pub listen: Vec<SocketAddr>,
    /// The other host; without it only mode `none` is possible.
    pub peer: Option<Peer>,
    /// Local addresses of the dedicated link.
    pub link: Vec<IpAddr>,
    /// Who decides who may run.
    pub arbiter: Arbiter,
    /// The witness that decides in its place when both hosts have lost it.
    pub standby: Option<Arbiter>,
    /// Whether the link and the peer connection are encrypted.
    pub mtls: bool,
    /// Times that decide.
    pub timing: Timing,
    /// Whether a VM that runs without its shadow gets a new one by itself.
    pub reprotect: bool,
    /// The `ax-vmm` program, when it is not beside axd.
    pub ax_vmm: Option<PathBuf>,
    /// Which side this host is; by the names while it has not met the other one. Not of the file
    /// ([`crate::partner`]), as are the next two.
    pub side: Option<Side>,
    /// Which machine this is.
    pub machine: Option<MachineId>,
    /// Which machine the other host is, where it has taken another's place.
    pub partner_machine: Option<MachineId>,
}

impl Config {
    /// A machine without peer, link or witness: a witness itself, or one that is only checked.
    pub fn bare(name: &str, data_dir: PathBuf, listen: &[SocketAddr], mtls: bool) -> Config {
        Config {
            name: name.to_owned(),
            data_dir,
            socket: PathBuf::from(ax_api::host::DEFAULT_SOCKET),
            listen: listen.to_vec(),
            peer: None,
            link: vec![],
            arbiter: Arbiter::Manual,
            standby: None,
            mtls,
            timing: Timing::default(),
            reprotect: true,
            ax_vmm: None,
            side: None,
            machine: None,
            partner_machine: None,
        }
    }

    /// How the link is secured, as `ax-vmm` wants to know it.
    pub fn security(&self) -> Security {
        if self.mtls {
            Security::Mtls {
                dir: self.data_dir.clone(),
            }
        } else {
            Security::Plain
        }
    }

    /// Which side of every pair this host is; `A` without a peer.
    pub fn side(&self) -> Side {
        match (self.side, &self.peer) {
            (Some(side), _) => side,
            (None, Some(peer)) => Side::of(&self.name, &peer.name),
            (None, None) => Side::A,
        }
    }

    /// Folder of Unix sockets and pid files of running processes.
    pub fn run_dir(&self) -> PathBuf {
        self.data_dir.join("run")
    }

    /// Where a disk's image is on this host: a bare file name lives in `images/` of the data folder.
    pub fn image_path(&self, path: &Path) -> PathBuf {
        if path.is_absolute() {
            path.to_path_buf()
        } else {
            self.data_dir.join("images").join(path)
        }
    }

    /// Folder of one VM.
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.data_dir.join("vms").join(name)
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}; write one after the example axd.toml", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or a key or value is not one axd knows.
    #[error("{path}: {what}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        what: String,
    },
    /// A value makes no sense.
    #[error("{path}:{line}: {what}", path = path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong and what to do.
        what: String,
    },
    /// Something is missing.
    #[error("{path}: {what}", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What to add.
        what: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawSecurity {
    Mtls,
    Plain,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    name: Spanned<String>,
    addresses: Spanned<Vec<SocketAddr>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLink {
    addresses: Spanned<Vec<IpAddr>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "an address with port, or a list of them")]
enum OneOrMany {
    One(SocketAddr),
    Many(Vec<SocketAddr>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Spanned<String>,
    data_dir: Spanned<PathBuf>,
    socket: Option<Spanned<PathBuf>>,
    listen: Option<OneOrMany>,
    peer: Option<RawHost>,
    link: Option<RawLink>,
    witness: Option<RawHost>,
    standby: Option<RawHost>,
    etcd: Option<Spanned<Vec<String>>>,
    security: Option<RawSecurity>,
    heartbeat_ms: Option<Spanned<u64>>,
    detect_ms: Option<Spanned<u64>>,
    stall_ms: Option<Spanned<u64>>,
    permission_ms: Option<Spanned<u64>>,
    lease_ms: Option<Spanned<u64>>,
    reprotect: Option<bool>,
    ax_vmm: Option<PathBuf>,
}

/// Reads and checks a configuration file. `default_port` is where it listens unless it says.
///
/// # Errors
/// [`ConfigError`] says what to change where.
pub fn load(path: &Path, default_port: u16) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    parse(&text, path, default_port)
}

/// Checks a configuration; `path` is for messages only.
///
/// # Errors
/// [`ConfigError`] says what to change where.
pub fn parse(text: &str, path: &Path, default_port: u16) -> Result<Config, ConfigError> {
    let raw: Raw = toml::from_str(text).map_err(|e| ConfigError::Parse {
        path: path.to_path_buf(),
        what: e.to_string().trim_end().to_owned(),
    })?;
    let at = |span: std::ops::Range<usize>, what: String| ConfigError::Value {
        path: path.to_path_buf(),
        line: 1 + text[..span.start.min(text.len())].matches('\n').count(),
        what,
    };
    let missing = |what: &str| ConfigError::Missing {
        path: path.to_path_buf(),
        what: what.to_owned(),
    };
    let host_name = |name: &Spanned<String>| match check_name(name.get_ref()) {
        Ok(()) => Ok(name.get_ref().clone()),
        Err(why) => Err(at(
            name.span(),
            format!("name = {:?}: {why}", name.get_ref()),
        )),
    };

    let name = host_name(&raw.name)?;
    let data_dir = raw.data_dir.get_ref().clone();
    if !data_dir.is_absolute() {
        return Err(at(
            raw.data_dir.span(),
            "data_dir must be an absolute path".to_owned(),
        ));
    }
    // A control socket is `run/NAME.sock`, NAME of at most 63 bytes.
    let longest = data_dir.join("run").as_os_str().len() + 1 + 63 + ".sock".len();
    if longest > SOCKET_PATH_MAX {
        return Err(at(
            raw.data_dir.span(),
            format!(
                "data_dir is too long for the Unix sockets below it; {} bytes fewer will do",
                longest - SOCKET_PATH_MAX
            ),
        ));
    }
    let socket = match &raw.socket {
        None => PathBuf::from(ax_api::host::DEFAULT_SOCKET),
        Some(socket) => {
            let bytes = socket.get_ref().as_os_str().len();
            if !socket.get_ref().is_absolute() || bytes > SOCKET_PATH_MAX {
                return Err(at(
                    socket.span(),
                    format!(
                        "socket must be an absolute path of at most {SOCKET_PATH_MAX} bytes (it has {bytes})"
                    ),
                ));
            }
            socket.get_ref().clone()
        }
    };
    let listen = match raw.listen {
        None => vec![SocketAddr::from(([0, 0, 0, 0], default_port))],
        Some(OneOrMany::One(address)) => vec![address],
        Some(OneOrMany::Many(addresses)) if addresses.is_empty() => {
            return Err(missing(
                "listen = [] names no address: name one, as in \"0.0.0.0:7430\", or leave the key out",
            ));
        }
        Some(OneOrMany::Many(addresses)) => addresses,
    };
    let other = |host: &RawHost, what: &str| -> Result<Peer, ConfigError> {
        let other = host_name(&host.name)?;
        if other == name {
            return Err(at(
                host.name.span(),
                format!("{what}.name is this host's own name; the two must differ"),
            ));
        }
        let addresses = host.addresses.get_ref();
        if addresses.is_empty() || addresses.iter().any(|a| a.port() == 0) {
            return Err(at(
                host.addresses.span(),
                format!("{what}.addresses must name at least one address, each with a port"),
            ));
        }
        Ok(Peer {
            name: other,
            addresses: addresses.clone(),
        })
    };
    let peer = raw.peer.as_ref().map(|p| other(p, "peer")).transpose()?;
    let witness = raw
        .witness
        .as_ref()
        .map(|w| other(w, "witness"))
        .transpose()?;
    if let (Some(peer), Some(witness), Some(raw)) = (&peer, &witness, &raw.witness)
        && peer.name == witness.name
    {
        return Err(at(
            raw.name.span(),
            "the witness must be a third machine, with a name of its own".to_owned(),
        ));
    }
    let etcd = match &raw.etcd {
        None => None,
        Some(etcd) if witness.is_some() => {
            return Err(at(
                etcd.span(),
                "either [witness] or etcd decides, not both: remove one".to_owned(),
            ));
        }
        Some(etcd) => Some(members(etcd.get_ref()).map_err(|why| at(etcd.span(), why))?),
    };
    let standby = raw
        .standby
        .as_ref()
        .map(|s| other(s, "standby"))
        .transpose()?;
    if let (Some(standby), Some(raw)) = (&standby, &raw.standby) {
        let taken = |host: &Option<Peer>| host.as_ref().is_some_and(|h| h.name == standby.name);
        if taken(&peer) || taken(&witness) {
            return Err(at(
                raw.name.span(),
                "the standby must be a further machine, with a name of its own".to_owned(),
            ));
        }
        if witness.is_none() && etcd.is_none() {
            return Err(at(
                raw.name.span(),
                "a [standby] stands by for a [witness] or etcd: name the one that decides, or make this \
                 one the [witness]"
                    .to_owned(),
            ));
        }
    }
    let link = match (&raw.link, &peer) {
        (None, None) => vec![],
        (None, Some(_)) => {
            return Err(missing(
                "a host with a [peer] needs a dedicated link: add link = { addresses = [\"10.99.0.1\"] } with this host's own address on it",
            ));
        }
        (Some(link), _) => {
            let addresses = link.addresses.get_ref();
            let distinct: HashSet<_> = addresses.iter().collect();
            if addresses.is_empty()
                || distinct.len() != addresses.len()
                || addresses.iter().any(IpAddr::is_unspecified)
            {
                return Err(at(
                    link.addresses.span(),
                    "link.addresses must name this host's own addresses on the dedicated link, each once"
                        .to_owned(),
                ));
            }
            addresses.clone()
        }
    };

    let times = [
        ("heartbeat_ms", raw.heartbeat_ms, 1, 10_000),
        ("detect_ms", raw.detect_ms, 10, 600_000),
        ("stall_ms", raw.stall_ms, 50, 600_000),
        ("permission_ms", raw.permission_ms, 1, 1_000),
        ("lease_ms", raw.lease_ms, 100, 600_000),
    ];
    let mut values = [None; 5];
    let mut spans = [0..0, 0..0, 0..0, 0..0, 0..0];
    for (i, (key, value, least, most)) in times.into_iter().enumerate() {
        if let Some(value) = value {
            if !(least..=most).contains(value.get_ref()) {
                return Err(at(
                    value.span(),
                    format!(
                        "{key} = {}: must be between {least} and {most} milliseconds",
                        value.get_ref()
                    ),
                ));
            }
            spans[i] = value.span();
            values[i] = Some(*value.get_ref());
        }
    }
    let default = Timing::default();
    let timing = Timing {
        heartbeat_ms: values[0].unwrap_or(default.heartbeat_ms),
        detect_ms: values[1].unwrap_or(default.detect_ms),
        stall_ms: values[2].unwrap_or(default.stall_ms),
        permission_ms: values[3].unwrap_or(default.permission_ms),
        lease_ms: values[4].unwrap_or(default.lease_ms),
    };
    let needed = timing.heartbeat_ms.saturating_mul(3);
    if timing.detect_ms < needed {
        let span = if values[1].is_some() {
            spans[1].clone()
        } else {
            spans[0].clone()
        };
        return Err(at(
            span,
            format!(
                "detect_ms = {} must be at least three times heartbeat_ms ({}), or one late heartbeat is a death: write detect_ms = {needed} or more",
                timing.detect_ms, timing.heartbeat_ms
            ),
        ));
    }

    Ok(Config {
        name,
        data_dir,
        socket,
        listen,
        peer,
        link,
        arbiter: match (witness, etcd) {
            (Some(w), _) => Arbiter::Witness {
                name: w.name,
                addresses: w.addresses,
            },
            (None, Some(members)) => Arbiter::Etcd { members },
            (None, None) => Arbiter::Manual,
        },
        standby: standby.map(|s| Arbiter::Witness {
            name: s.name,
            addresses: s.addresses,
        }),
        mtls: raw.security != Some(RawSecurity::Plain),
        timing,
        reprotect: raw.reprotect.unwrap_or(true),
        ax_vmm: raw.ax_vmm,
        side: None,
        machine: None,
        partner_machine: None,
    })
}

/// The members of an etcd cluster. A name that must be looked up could hold up a failover.
fn members(urls: &[String]) -> Result<Vec<SocketAddr>, String> {
    let wrong = |url: &str| {
        format!(
            "etcd: {url:?} must be like \"http://10.0.0.5:2379\": an IP address and a port, plain HTTP \
             (keep it on a network of its own, or put a TLS proxy on this host before it)"
        )
    };
    let member = |url: &String| {
        let address = url
            .strip_prefix("http://")
            .map(|rest| rest.trim_end_matches('/'));
        address
            .and_then(|address| address.parse::<SocketAddr>().ok())
            .filter(|address| address.port() != 0)
            .ok_or_else(|| wrong(url))
    };
    match urls {
        [] => Err("etcd = [] names no member: leave the key out, or name one".to_owned()),
        urls => urls.iter().map(member).collect(),
    }
}

/// Whether a text can name a host or a VM.
///
/// # Errors
/// What a name must look like.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if name.is_empty()
        || name.len() > 63
        || !name.bytes().all(allowed)
        || name.starts_with('-')
        || name.ends_with('-')
    {
        return Err("a name is 1 to 63 of a-z, 0-9 and -, and neither starts nor ends with -");
    }
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
