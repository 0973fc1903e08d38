//! `axd pair`: two machines come to know each other's keys.

use std::net::SocketAddr;
use std::time::Duration;

use ax_api::host::Code;
use ax_api::process::Arbiter;
use ax_link::pairing::{Offer, PairError, Paired, Token, join};
use ax_link::{Identity, Security, TrustStore};

use crate::config::Config;
use crate::failure::{Failure, chain};
use crate::run;

/// Port the printing side waits on, unless told otherwise.
const PORT: u16 = 7432;
/// How long a token is good.
const VALID: Duration = Duration::from_secs(600);
/// How long using one may take.
const JOINING: Duration = Duration::from_secs(20);

/// Prints a one-time token and waits for the machine that uses it.
///
/// # Errors
/// Nobody came with it in time, or keys cannot be made or kept.
pub fn wait_for_other(config: &Config, listen: Option<SocketAddr>) -> Result<(), Failure> {
    let (identity, trust) = keys(config)?;
    let addresses = match listen {
        Some(address) => vec![address],
        None => own_addresses(config)?,
    };
    let offer = Offer::open(&identity, &trust, &addresses, VALID).map_err(failure)?;
    println!(
        "On the other machine, within {} minutes:\n\n  axd pair --config FILE --token {}\n\nThe token is good once. Waiting for it.",
        VALID.as_secs() / 60,
        offer.token()
    );
    report(config, &offer.wait().map_err(failure)?);
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
    let paired = join(&identity, &trust, &token, JOINING).map_err(failure)?;
    report(config, &paired);
    Ok(())
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
        PairError::Link(_) => Code::Failed,
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
