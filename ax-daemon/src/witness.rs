//! `axd witness`: the arbiter's server, on a third machine.

use std::net::SocketAddr;
use std::path::Path;

use ax_api::host::Code;

use crate::config::{self, Config};
use crate::failure::Failure;

/// Port the witness listens on, unless configured.
pub const PORT: u16 = 7431;

/// A witness's configuration from the command line.
///
/// # Errors
/// The name or folder is none.
pub fn config_of(
    name: &str,
    data_dir: Option<&Path>,
    listen: &[SocketAddr],
    plain: bool,
) -> Result<Config, Failure> {
    let bad = |why: String| Failure::new(Code::Usage, why);
    config::check_name(name).map_err(|why| bad(format!("--name {name}: {why}")))?;
    let data_dir = data_dir.ok_or_else(|| bad("--data-dir is missing".to_owned()))?;
    let data_dir = std::path::absolute(data_dir)
        .map_err(|e| Failure::io(format!("--data-dir {}", data_dir.display()), &e))?;
    Ok(Config::bare(name, data_dir, listen, !plain))
}

/// Serves until it is killed, or its store fails.
///
/// # Errors
/// It could not begin, or its store has failed.
pub fn run(config: &Config) -> Result<(), Failure> {
    let _ = config;
    Err(Failure::new(Code::Failed, "pending ax-arbiter witness"))
}
