//! `axd pair`: two machines come to know each other's keys.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::Code;
use ax_api::process::Arbiter;
use ax_link::pairing::{Before, Offer, PairError, Paired, Token, join_as};
use ax_link::{HostName, Identity, Security, TrustStore};
use ax_wire::Side;

use crate::config::Config;
use crate::failure::{Failure, chain};
use crate::partner::{self, Partner};
use crate::replace::Replacing;
use crate::run;
use crate::store::Store;

/// Port the printing side waits on, unless told otherwise.
const PORT: u16 = 7432;
/// How long a token is good.
const VALID: Duration = Duration::from_secs(600);
/// How long using one may take.
const JOINING: Duration = Duration::from_secs(120);

/// Which host the machine that comes takes the place of, and whether an operator says that it is dead.
#[derive(Clone, Debug)]
pub struct Replace {
    /// Its name.
    pub old: String,
    /// It is known to be dead.
    pub word: bool,
}

/// Prints a one-time token and waits for the machine that uses it.
///
/// # Errors
/// Nobody came with it in time, or keys cannot be made or kept. A host that is to be replaced may not be.
pub fn wait_for_other(
    config: &Config,
    listen: Option<SocketAddr>,
    replace: Option<&Replace>,
) -> Result<(), Failure> {
    let (identity, trust) = keys(config)?;
    // A witness has no VMs: it only trusts the new one in place of the old.
    let is_host = config.peer.is_some() || partner::load(&config.data_dir)?.is_some();
    let replacing = match replace {
        Some(Replace { old, word }) if is_host => {
            Some(Arc::new(Replacing::prepare(config, old, *word)?))
        }
        _ => None,
    };
    let machine = match is_host {
        true => Some(partner::machine(&config.data_dir)?),
        false => None,
    };
    let before: Before = match (&replacing, replace) {
        (Some(replacing), _) => {
            let replacing = Arc::clone(replacing);
            Arc::new(move |new| {
                let side = replacing.take_place(new).map_err(|f| f.why)?;
                Ok(Some(side))
            })
        }
        (None, Some(Replace { old, .. })) => {
            let old: HostName = old
                .parse()
                .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
            let trust = trust.clone();
            Arc::new(move |_| trust.remove(&old).map(|_| None).map_err(|e| chain(&e)))
        }
        (None, None) => Arc::new(|_| Ok(None)),
    };
    let addresses = match listen {
        Some(address) => vec![address],
        None => own_addresses(config)?,
    };
    let offer = Offer::open(&identity, &trust, &addresses, VALID).map_err(failure)?;
    let offer = offer.doing(machine, before);
    println!(
        "On the other machine, within {} minutes:\n\n  axd pair --config FILE --token {}\n\nThe token is good once. Waiting for it.",
        VALID.as_secs() / 60,
        offer.token()
    );
    let paired = offer.wait().map_err(failure)?;
    let Some(replacing) = replacing else {
        report(config, &paired);
        return Ok(());
    };
    replacing.tell(&paired)?;
    println!(
        "{} has taken the place of {} (its certificate: {}). What is left to do:\n{}",
        paired.name,
        replace.map_or("", |r| r.old.as_str()),
        paired.fingerprint,
        replacing.next_steps(&paired)
    );
    Ok(())
}

/// Goes to the machine that printed `token`.
///
/// # Errors
/// It is not there, or does not know the token any more.
pub fn use_token(config: &Config, token: &str) -> Result<(), Failure> {
    let token: Token = token
        .trim()
        .parse()
        .map_err(|e| Failure::new(Code::Usage, format!("--token: {e}")))?;
    let (identity, trust) = keys(config)?;
    let machine = match config.peer.is_some() {
        true => Some(partner::machine(&config.data_dir)?),
        false => None,
    };
    let taking = config.clone();
    let before: Before = Arc::new(move |other| match other.side {
        Some(side) => take_side(&taking, other, side)
            .map(|()| None)
            .map_err(|f| f.why),
        None => Ok(None),
    });
    let joined = join_as(&identity, &trust, &token, JOINING, machine, &before);
    let paired = joined.map_err(failure)?;
    report(config, &paired);
    Ok(())
}

/// This machine takes another's place beside `other`, and is that side from now on.
fn take_side(config: &Config, other: &Paired, side: Side) -> Result<(), Failure> {
    // The same command once more.
    let known = partner::load(&config.data_dir)?;
    if known.is_some_and(|p| p.name == other.name.as_str() && p.side == side) {
        return Ok(());
    }
    let (store, unreadable) = Store::open(&config.name, config.data_dir.join("vms"))?;
    if !store.all().is_empty() || !unreadable.is_empty() {
        return Err(Failure::new(
            Code::State,
            format!(
                "{} holds VMs: a machine that takes another's place begins with an empty data folder (move this one away)",
                config.data_dir.display()
            ),
        ));
    }
    let partner = Partner {
        name: other.name.as_str().to_owned(),
        side,
        machine: None,
        replaced: vec![],
    };
    partner::keep(&config.data_dir, &partner)
}

fn keys(config: &Config) -> Result<(Identity, TrustStore), Failure> {
    match run::security(config)? {
        Security::Mtls(identity, trust) => Ok((identity, trust)),
        Security::Plain => Err(Failure::new(
            Code::Usage,
            "security = \"plain\" needs no pairing; write \"mtls\" to have keys",
        )),
    }
}

/// Addresses the other machine may reach this one at: those it listens on if they are particular ones,
/// and those of the link.
fn own_addresses(config: &Config) -> Result<Vec<SocketAddr>, Failure> {
    let particular = config.listen.iter().map(SocketAddr::ip);
    let mut addresses: Vec<SocketAddr> = vec![];
    for ip in particular.chain(config.link.iter().copied()) {
        let address = SocketAddr::new(ip, PORT);
        if !ip.is_unspecified() && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(Failure::new(
            Code::Usage,
            format!(
                "say at which address the other machine can reach this one: --listen 192.0.2.3:{PORT}"
            ),
        ));
    }
    Ok(addresses)
}

fn failure(error: PairError) -> Failure {
    let code = match &error {
        PairError::Token(_) | PairError::Unspecified(_) | PairError::SameName(_) => Code::Usage,
        PairError::Link(ax_link::LinkError::Listen { .. }) => Code::Network,
        PairError::Link(_) | PairError::Before(_) => Code::Failed,
        _ => Code::Peer,
    };
    Failure::new(code, chain(&error))
}

fn witness_name(arbiter: Option<&Arbiter>) -> Option<&str> {
    match arbiter {
        Some(Arbiter::Witness { name, .. }) => Some(name),
        _ => None,
    }
}

fn report(config: &Config, paired: &Paired) {
    println!(
        "{} and {} know each other now (its certificate: {})",
        config.name, paired.name, paired.fingerprint
    );
    let expected = [
        config.peer.as_ref().map(|p| p.name.as_str()),
        witness_name(Some(&config.arbiter)),
        witness_name(config.standby.as_ref()),
    ];
    let is_host = expected.iter().any(Option::is_some);
    if is_host && !expected.contains(&Some(paired.name.as_str())) {
        println!(
            "note: {} is neither the peer nor the witness in this machine's configuration",
            paired.name
        );
    }
}
