//! One test host: its network, its processes, its power plug.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::init::{self, Init};
use super::{NetNs, netlink};
use crate::{Error, Result};

/// A host: switched on from the start.
#[derive(Debug)]
pub struct Host {
    name: String,
    net: NetNs,
    ahead: Duration,
    init: Mutex<Option<Arc<Init>>>,
}

/// What [`Host::kill_all`] did.
#[derive(Debug, Clone, Copy)]
pub struct KillReport {
    /// When SIGKILL was sent.
    pub at: Instant,
    /// How long after that the last process was gone, its memory freed.
    pub gone_after: Duration,
}

impl Host {
    /// A host with a loopback interface only, whose CLOCK_MONOTONIC and CLOCK_BOOTTIME run
    /// `ahead` of the machine's.
    pub(super) fn new(name: &str, ahead: Duration) -> Result<Host> {
        let net = NetNs::new(name)?;
        netlink::set_up(&net, "lo", true)?;
        let host = Host {
            name: name.into(),
            net,
            ahead,
            init: Mutex::new(None),
        };
        host.power_on()?;
        Ok(host)
    }

    /// Its name: `a`, `b`, `witness` or `client` in a [`super::Lab`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub fn net(&self) -> &NetNs {
        &self.net
    }

    /// A command that will run on this host: in its network, process, mount and time
    /// namespaces. The [`std::process::Child`] stands for it as usual; signals sent to it are
    /// passed on, and its pid is not the one the host knows.
    ///
    /// Spawning fails with ESRCH while the host is switched off.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let init = self.init().clone();
        let join = move || match &init {
            // SAFETY: pre_exec runs between fork and exec, and `init` keeps its descriptors open.
            Some(init) => unsafe { init::join(init.pidfd(), init.time_fd()) },
            None => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        // SAFETY: `join` makes system calls only.
        unsafe { command.pre_exec(join) };
        command
    }

    /// Runs `f` on a thread inside this host's network and waits for it.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `f` panicked.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.net.run(f)
    }

    /// Makes one more tap on this host, in no bridge.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn add_tap(&self, name: &str) -> Result<()> {
        netlink::add_tap(&self.net, name)
    }

    /// Pulls the power plug: SIGKILL to every process of this host at once, whatever sessions
    /// or groups they made, and waits until all are gone. The network stays plugged in.
    ///
    /// # Errors
    /// When the host is switched off already, or the kernel refuses.
    pub fn kill_all(&self) -> Result<KillReport> {
        let taken = self.init().take();
        let init = taken.ok_or_else(|| {
            Error::os(format!("kill host {}", self.name))(io::Error::from_raw_os_error(libc::ESRCH))
        })?;
        let at = Instant::now();
        init.kill()
            .map_err(Error::os(format!("kill host {}", self.name)))?;
        init.wait()
            .map_err(Error::os(format!("wait for host {} to die", self.name)))?;
        Ok(KillReport {
            at,
            gone_after: at.elapsed(),
        })
    }

    /// Switches the host on again after [`Host::kill_all`]; no effect while it is on.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn power_on(&self) -> Result<()> {
        let mut init = self.init();
        if init.is_none() {
            *init = Some(Arc::new(
                self.net.run(|| Init::start(&self.name, self.ahead))??,
            ));
        }
        Ok(())
    }

    /// The processes running on this host, by this machine's process id, with their command
    /// lines; the host's own init is not among them.
    pub fn processes(&self) -> BTreeMap<u32, String> {
        let Some(init) = self.init().clone() else {
            return BTreeMap::new();
        };
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let Some(ours) = namespace(init.pid) else {
            return BTreeMap::new();
        };
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return BTreeMap::new();
        };
        entries
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != init.pid && namespace(*pid).as_ref() == Some(&ours))
            .filter(|pid| !is_zombie(*pid))
            .map(|pid| {
                let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let words: Vec<_> = raw
                    .split(|b| *b == 0)
                    .map(|w| String::from_utf8_lossy(w))
                    .collect();
                (pid, words.join(" ").trim_end().to_string())
            })
            .collect()
    }

    fn init(&self) -> MutexGuard<'_, Option<Arc<Init>>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A command not yet spawned may still hold the init: switch off by name.
        if let Some(init) = self.init().take() {
            let _ = init.kill();
            let _ = init.wait();
        }
    }
}

fn is_zombie(pid: u32) -> bool {
    let stat: PathBuf = format!("/proc/{pid}/stat").into();
    // "pid (comm) S ...": comm may hold anything, so look behind its last parenthesis.
    std::fs::read_to_string(stat)
        .ok()
        .and_then(|s| {
            s.rsplit_once(')')
                .map(|(_, rest)| rest.trim_start().starts_with('Z'))
        })
        .unwrap_or(true)
}
