//! `axd pair`: two machines come to know each other's keys.

use std::net::SocketAddr;

use ax_api::host::Code;

use crate::config::Config;
use crate::failure::Failure;

/// Prints a one-time token and waits for the machine that uses it.
///
/// # Errors
/// Nobody came with it in time, or keys cannot be made or kept.
pub fn wait_for_other(config: &Config, listen: Option<SocketAddr>) -> Result<(), Failure> {
    let _ = (config, listen);
    Err(Failure::new(Code::Failed, "pending ax-link pairing"))
}

/// Goes to the machine that printed `token`.
///
/// # Errors
/// It is not there, or does not know the token any more.
pub fn use_token(config: &Config, token: &str) -> Result<(), Failure> {
    let _ = (config, token);
    Err(Failure::new(Code::Failed, "pending ax-link pairing"))
}
