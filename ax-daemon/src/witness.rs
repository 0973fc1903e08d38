//! `axd witness`: the arbiter's server, on a third machine.

use std::net::SocketAddr;
use std::path::Path;

use ax_api::host::Code;
use ax_arbiter::Witness;
use ax_link::Acceptor;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{self, Config};
use crate::failure::{Failure, chain};
use crate::run;

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

/// Serves until SIGTERM or SIGINT, or until its store fails.
///
/// # Errors
/// It could not begin, or its store has failed.
pub fn run(config: &Config) -> Result<(), Failure> {
    let _lock = run::claim_data_dir(&config.data_dir)?;
    let failed = |e: ax_arbiter::witness::WitnessError| Failure::new(Code::Failed, chain(&e));
    let records = config.data_dir.join("witness");
    std::fs::create_dir_all(&records)
        .map_err(|e| Failure::io(format!("making {}", records.display()), &e))?;
    let witness = Witness::open(&records).map_err(failed)?;
    let acceptor = Acceptor::bind(&config.listen, run::security(config)?)
        .map_err(|e| Failure::new(Code::Network, chain(&e)))?;
    let stopper = acceptor.stopper();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|e| Failure::io("starting", &e))?;
    runtime.spawn(async move {
        let signals = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
        );
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            tracing::warn!("no orderly end on signals");
            return;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopper.stop();
    });
    let addresses: Vec<String> = acceptor
        .local_addrs()
        .iter()
        .map(|a| a.to_string())
        .collect();
    // For whoever waits for it on standard output.
    println!(
        "axd: witness {} is ready on {}",
        config.name,
        addresses.join(", ")
    );
    let served = witness.serve(&acceptor).map_err(failed);
    runtime.shutdown_background();
    served
}
