//! `axd`: the daemon itself, from its configuration to its last signal.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::host::Code;
use ax_link::{Acceptor, HostName, Identity, Security, TrustStore};
use ax_wire::Versions;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::daemon::Daemon;
use crate::events::Events;
use crate::failure::Failure;
use crate::partner;
use crate::peer::PeerLink;
use crate::server;
use crate::store::Store;

/// Port axd listens on for the other host, unless configured.
pub const PORT: u16 = 7430;

/// How connections of this host are secured. Makes its identity at first use.
///
/// # Errors
/// Keys cannot be read or made.
pub fn security(config: &Config) -> Result<Security, Failure> {
    if !config.mtls {
        return Ok(Security::Plain);
    }
    let failed = |e: ax_link::LinkError| Failure::new(Code::Failed, crate::failure::chain(&e));
    let name: HostName = config
        .name
        .parse()
        .map_err(|e: ax_link::NameError| Failure::new(Code::Usage, e.to_string()))?;
    Ok(Security::Mtls(
        Identity::load_or_create(&config.data_dir, &name).map_err(failed)?,
        TrustStore::open(&config.data_dir).map_err(failed)?,
    ))
}

/// Makes the data folder this process's own for as long as the file lives.
///
/// # Errors
/// Another process has it, or it cannot be made.
pub fn claim_data_dir(data_dir: &Path) -> Result<File, Failure> {
    let path = data_dir.join("axd.lock");
    let failed = |e: &std::io::Error| Failure::io(format!("using {}", path.display()), e);
    std::fs::create_dir_all(data_dir).map_err(|e| failed(&e))?;
    let file = File::create(&path).map_err(|e| failed(&e))?;
    let deadline = Instant::now() + DYING;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(
                    Code::State,
                    format!("another axd uses {}", data_dir.display()),
                ));
            }
            Err(TryLockError::Error(e)) => return Err(failed(&e)),
        }
    }
}

/// How long an axd that was killed may keep its lock: the kernel closes its files last.
const DYING: Duration = Duration::from_millis(500);

/// The `ax-vmm` program: `$AX_VMM`, the configured one, or the one beside axd.
pub fn program(config: &Config) -> PathBuf {
    if let Some(path) = std::env::var_os("AX_VMM") {
        return path.into();
    }
    if let Some(path) = &config.ax_vmm {
        return path.clone();
    }
    std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("ax-vmm")))
        .unwrap_or_else(|| PathBuf::from("ax-vmm"))
}

/// Runs until SIGTERM or SIGINT. Guests go on.
///
/// # Errors
/// It could not begin.
pub fn run(mut config: Config) -> Result<(), Failure> {
    let _lock = claim_data_dir(&config.data_dir)?;
    let security = security(&config)?;
    let (store, unreadable) = Store::open(&config.name, config.data_dir.join("vms"))?;
    partner::settle(&mut config, !store.all().is_empty())?;
    let events = Events::open(&config.name, &config.data_dir);
    for what in unreadable {
        events.note(None, format!("definition left aside: {what}"));
    }
    let peer = match &config.peer {
        Some(peer) => Some(Arc::new(PeerLink::new(&config, peer, security.clone())?)),
        None => None,
    };
    let acceptor = match &peer {
        Some(_) => Some(
            Acceptor::bind(&config.listen, security)
                .map_err(|e| Failure::new(Code::Network, crate::failure::chain(&e)))?,
        ),
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::io("starting", &e))?;
    let program = program(&config);
    let result = runtime.block_on(async {
        let listener = server::bind(&config.socket)?;
        let mut terminate =
            signal(SignalKind::terminate()).map_err(|e| Failure::io("taking signals", &e))?;
        let mut interrupt =
            signal(SignalKind::interrupt()).map_err(|e| Failure::io("taking signals", &e))?;
        let daemon = Daemon::new(config, store, events, peer, program);
        daemon.adopt().await?;
        if let Some(acceptor) = acceptor {
            let daemon = daemon.clone();
            let handle = tokio::runtime::Handle::current();
            // Its own thread, for as long as the process lives: it blocks.
            std::thread::Builder::new()
                .name("axd-accept".into())
                .spawn(move || server::serve_peer(&daemon, &acceptor, &handle))
                .map_err(|e| Failure::io("starting", &e))?;
        }
        tokio::spawn(server::serve_users(daemon.clone(), listener));
        tokio::spawn(daemon.clone().keep_in_touch());
        daemon.look_after_paths();
        if daemon.config.reprotect {
            tokio::spawn(daemon.clone().keep_protected());
        }
        tokio::spawn(daemon.clone().keep_home());
        daemon.end_shutdown();
        daemon.begin_autostart();
        daemon.events.note(
            None,
            format!(
                "axd {} is up, {}",
                env!("CARGO_PKG_VERSION"),
                Versions::ours()
            ),
        );
        if daemon.peer.is_some()
            && let Some(warning) = daemon.config.arbiter.warning()
        {
            tracing::warn!("{warning}");
            daemon.events.note(None, warning);
        }
        // For whoever waits for it on standard output.
        println!(
            "axd: {} is ready on {}",
            daemon.config.name,
            daemon.config.socket.display()
        );
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        daemon.events.note(None, "axd ends; guests go on");
        let _ = std::fs::remove_file(&daemon.config.socket);
        Ok(())
    });
    // Threads that wait for the other host or for a console are not worth waiting for.
    runtime.shutdown_background();
    result
}
