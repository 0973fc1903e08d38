//! One `ax-vmm` process: started, found again after a restart of axd, watched, ended.
//!
//! A process is held by a pidfd, so a signal never hits a stranger that got its number, and it
//! lives in a session of its own: neither axd's death nor systemd's stop of axd reaches it. What
//! the next axd needs to find it lies in `run/NAME.json` and, answering, on `run/NAME.sock`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ax_api::host::{Code, ProcessReport, StartFailure};
use ax_api::process::{Spec, Start, Status};
use ax_wire::{Incarnation, PairId};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::control::{self, Connection};
use crate::failure::Failure;
use crate::store::write_atomic;

/// How long a process may take from its start to its first answer.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Bytes after which a log is turned over at the next start.
const LOG_TURN_OVER: u64 = 8 << 20;

/// Exit status of an `ax-vmm` that may not run because the other side does.
pub const FENCED: i32 = 9;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(String),
    /// It was not axd's child (axd was restarted meanwhile), so nobody told.
    Untold,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Status(0) => f.write_str("exited"),
            Exit::Status(FENCED) => f.write_str("ended: the other side runs the VM"),
            Exit::Status(status) => write!(f, "exited with status {status}"),
            Exit::Signal(signal) => write!(f, "ended by {signal}"),
            Exit::Untold => f.write_str("is gone"),
        }
    }
}

/// What is written down of a running process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PidFile {
    name: String,
    pair: PairId,
    pid: i32,
    /// Its start in clock ticks since boot: with the pid, names it for good.
    started: u64,
    incarnation: Incarnation,
    start: Start,
}

/// A running process of a VM on this host.
#[derive(Debug)]
pub struct Process {
    /// The VM's name.
    pub name: String,
    /// The VM's identity.
    pub pair: PairId,
    /// Process id.
    pub pid: i32,
    /// This run of it.
    pub incarnation: Incarnation,
    /// How it began.
    pub start: Start,
    /// When axd took it into its keeping.
    pub since: Instant,
    /// Its control socket.
    pub control: PathBuf,
    /// It was the primary at some time.
    primary: AtomicBool,
    /// axd has ended it.
    meant: AtomicBool,
    /// Why it said that it ends, and whether the record says stopped in order.
    told_end: parking_lot::Mutex<Option<(String, bool)>>,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    log: PathBuf,
    log_from: u64,
}

/// Where the files of a VM's process are.
pub struct Places {
    /// `run/NAME.sock`.
    pub control: PathBuf,
    /// `run/NAME.json`.
    pub pid_file: PathBuf,
    /// `vms/NAME`.
    pub dir: PathBuf,
}

impl Places {
    /// Of the VM `name`.
    pub fn of(config: &crate::config::Config, name: &str) -> Places {
        Places {
            control: config.run_dir().join(format!("{name}.sock")),
            pid_file: config.run_dir().join(format!("{name}.json")),
            dir: config.vm_dir(name),
        }
    }
}

impl Process {
    /// Runs `program` for `spec` and waits for its first answer.
    ///
    /// # Errors
    /// What the process said was wrong, or that it said nothing; it is gone then.
    pub async fn spawn(program: &Path, spec: &Spec, places: &Places) -> Result<Process, Failure> {
        let failed = |doing: &str, e: &std::io::Error| {
            Failure::io(format!("starting {}: {doing}", program.display()), e)
        };
        let control_dir = places.control.parent().unwrap_or(Path::new("/"));
        for dir in [places.dir.as_path(), spec.state_dir.as_path(), control_dir] {
            std::fs::create_dir_all(dir).map_err(|e| failed("making its folder", &e))?;
        }
        // Left by a process that is gone: the caller has made sure of that.
        let _ = std::fs::remove_file(&places.control);
        let spec_file = places.dir.join("spec.json");
        let json = serde_json::to_vec_pretty(spec)
            .map_err(|e| failed("its specification", &std::io::Error::other(e)))?;
        write_atomic(&spec_file, &json).map_err(|e| failed("its specification", &e))?;

        let log = places.dir.join("log");
        let (out, log_from) = open_log(&log).map_err(|e| failed("its log", &e))?;
        let err = out.try_clone().map_err(|e| failed("its log", &e))?;
        let mut command = Command::new(program);
        command
            .arg("--spec")
            .arg(&spec_file)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        // SAFETY: setsid is async-signal-safe, takes nothing and touches no memory of ours.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()
                    .map(drop)
                    .map_err(std::io::Error::from)
            });
        }
        let child = command.spawn().map_err(|e| {
            Failure::io(
                format!(
                    "cannot run {} (set ax_vmm in axd.toml or $AX_VMM to where it is)",
                    program.display()
                ),
                &e,
            )
        })?;
        let pid = i32::try_from(child.id())
            .map_err(|_| Failure::new(Code::Failed, "a pid beyond the kernel's own limit"))?;
        // Waited for through the pidfd; `Child` neither waits nor kills when dropped.
        drop(child);
        let pidfd = open_pidfd(pid).map_err(|e| failed("holding it", &e))?;
        let mut process = Process {
            name: spec.vm.name.clone(),
            pair: spec.vm.pair,
            pid,
            incarnation: Incarnation(0),
            start: spec.start,
            since: Instant::now(),
            control: places.control.clone(),
            primary: AtomicBool::new(false),
            meant: AtomicBool::new(false),
            told_end: parking_lot::Mutex::new(None),
            exit: watch_exit(pidfd.clone()),
            pidfd,
            log,
            log_from,
        };
        match tokio::time::timeout(START_PATIENCE, process.first_answer()).await {
            Ok(Ok(status)) => {
                process.incarnation = status.incarnation;
                let Err(e) = process.write_down(&places.pid_file) else {
                    return Ok(process);
                };
                match process.kill_and_wait().await {
                    // It answered, then found something missing: that is the news.
                    Exit::Status(_) => Err(process.why_it_ended()),
                    _ => Err(failed("writing its pid down", &e)),
                }
            }
            Ok(Err(failure)) => Err(failure),
            Err(_) => {
                process.kill_and_wait().await;
                Err(Failure::new(
                    Code::Failed,
                    format!(
                        "the VM's process said nothing within {} s; its log is {}",
                        START_PATIENCE.as_secs(),
                        process.log.display()
                    ),
                ))
            }
        }
    }

    async fn first_answer(&self) -> Result<Status, Failure> {
        loop {
            if self.exited().is_some() {
                return Err(self.why_it_ended());
            }
            if let Ok(status) = control::status(&self.control).await
                && i32::try_from(status.pid) == Ok(self.pid)
            {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn write_down(&self, pid_file: &Path) -> std::io::Result<()> {
        let content = PidFile {
            name: self.name.clone(),
            pair: self.pair,
            pid: self.pid,
            started: start_time(self.pid)?,
            incarnation: self.incarnation,
            start: self.start,
        };
        let json = serde_json::to_vec(&content).map_err(std::io::Error::other)?;
        write_atomic(pid_file, &json)
    }

    /// Finds the process that an earlier axd started and wrote down in `places`. None if it is gone;
    /// its leavings are removed then.
    pub async fn adopt(places: &Places) -> Option<Process> {
        let text = std::fs::read(&places.pid_file).ok()?;
        let found = serde_json::from_slice::<PidFile>(&text).ok();
        let adopted = found.and_then(|file| {
            let pidfd = open_pidfd(file.pid).ok()?;
            // Checked after the pidfd was opened: from here the number cannot change hands.
            (start_time(file.pid).ok()? == file.started).then_some((file, pidfd))
        });
        let Some((file, pidfd)) = adopted else {
            places.clean_up();
            return None;
        };
        let log = places.dir.join("log");
        let log_from = std::fs::metadata(&log).map_or(0, |m| m.len());
        Some(Process {
            name: file.name,
            pair: file.pair,
            pid: file.pid,
            incarnation: file.incarnation,
            start: file.start,
            since: Instant::now(),
            control: places.control.clone(),
            primary: AtomicBool::new(false),
            meant: AtomicBool::new(false),
            told_end: parking_lot::Mutex::new(None),
            exit: watch_exit(pidfd.clone()),
            pidfd,
            log,
            log_from,
        })
    }

    /// Notes that it is, or was, the primary.
    pub fn ran_guest(&self) {
        self.primary.store(true, Ordering::Relaxed);
    }

    /// Whether axd has ended it: nobody misses it.
    pub fn was_ended(&self) -> bool {
        self.meant.load(Ordering::Relaxed)
    }

    /// Notes what it said of its end.
    pub fn tells_end(&self, why: &str, clean: bool) {
        *self.told_end.lock() = Some((why.to_owned(), clean));
    }

    /// Why it said that it ends, and whether the record says stopped in order; none if it did not say.
    pub fn told_end(&self) -> Option<(String, bool)> {
        self.told_end.lock().clone()
    }

    /// Whether it was ever the primary.
    pub fn was_primary(&self) -> bool {
        self.primary.load(Ordering::Relaxed)
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Untold),
            Err(_) => Exit::Untold,
        }
    }

    /// Sends SIGKILL; harmless if it is gone.
    pub fn kill(&self) {
        signal_kill(&self.pidfd);
    }

    /// Sends SIGKILL, on purpose, and waits until it is gone.
    pub async fn kill_and_wait(&self) -> Exit {
        self.meant.store(true, Ordering::Relaxed);
        self.kill();
        self.wait().await
    }

    /// What it says of itself; none if it does not answer in time.
    pub async fn status(&self) -> Option<Status> {
        let status = async {
            let mut connection = Connection::open(&self.control).await?;
            connection.status().await
        };
        status.await.ok()
    }

    /// The process as this host sees it.
    pub async fn report(&self, host: &str) -> ProcessReport {
        ProcessReport {
            host: host.to_owned(),
            name: self.name.clone(),
            pair: self.pair.to_string(),
            pid: self.pid,
            status: self.status().await,
            why_unprotected: None,
        }
    }

    /// Why a process that has ended did so, from the last line of its log.
    pub fn why_it_ended(&self) -> Failure {
        let text = read_from(&self.log, self.log_from).unwrap_or_default();
        let told = text.lines().rev().take(5).find_map(|line| {
            let line = line.trim();
            line.starts_with('{')
                .then(|| serde_json::from_str::<StartFailure>(line).ok())
                .flatten()
        });
        if let Some(told) = told {
            return Failure::new(Code::of_process(told.code), told.error);
        }
        let how = self.exited().unwrap_or(Exit::Untold);
        let code = match how {
            Exit::Status(status) => Code::of_process(status),
            Exit::Signal(_) | Exit::Untold => Code::Failed,
        };
        let last = text.lines().rev().find(|l| !l.trim().is_empty());
        let last: String = last.unwrap_or("nothing").chars().take(400).collect();
        Failure::new(
            code,
            format!(
                "the VM's process {how}; its last words in {}: {last}",
                self.log.display()
            ),
        )
    }
}

impl Places {
    /// Removes what a process that is gone leaves.
    pub fn clean_up(&self) {
        for file in [&self.control, &self.pid_file] {
            match std::fs::remove_file(file) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove {}: {e}", file.display());
                }
                _ => {}
            }
        }
    }
}

fn open_log(path: &Path) -> std::io::Result<(File, u64)> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > LOG_TURN_OVER) {
        std::fs::rename(path, path.with_extension("1"))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

/// The end of a file, at most 64 KiB of it, not before `from`.
fn read_from(path: &Path, from: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(from.max(size.saturating_sub(64 << 10))))?;
    let mut bytes = vec![];
    file.take(64 << 10).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn open_pidfd(pid: i32) -> std::io::Result<Arc<OwnedFd>> {
    // SAFETY: takes two integers, returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by the kernel and nobody else owns it.
    Ok(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Field 22 of `/proc/PID/stat`: start time in clock ticks since boot. Fails for a zombie, which
/// nobody can talk to any more.
fn start_time(pid: i32) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let bad = || std::io::Error::other("unexpected /proc stat");
    // The name, in parentheses, may hold anything; what follows the last `)` is plain.
    let rest = text.rsplit_once(')').ok_or_else(bad)?.1;
    let mut fields = rest.split_ascii_whitespace();
    if fields.next() == Some("Z") {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    fields.nth(18).and_then(|f| f.parse().ok()).ok_or_else(bad)
}

/// Reaps the process when it ends and says how it did.
fn watch_exit(pidfd: Arc<OwnedFd>) -> watch::Receiver<Option<Exit>> {
    let (tell, exit) = watch::channel(None);
    tokio::spawn(async move {
        // SAFETY: `pidfd` is owned by this task and so stays open for as long as the registration.
        let registered = unsafe { AsyncFd::register(pidfd.as_fd()) };
        let how = match registered {
            Ok(fd) => {
                let _ = fd.readable().await;
                reap(&pidfd)
            }
            Err(e) => {
                tracing::error!("cannot watch a process: {e}");
                return;
            }
        };
        let _ = tell.send(Some(how));
    });
    exit
}

fn reap(pidfd: &OwnedFd) -> Exit {
    match waitid(
        Id::PIDFd(pidfd.as_fd()),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
    ) {
        Ok(WaitStatus::Exited(_, status)) => Exit::Status(status),
        Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal.to_string()),
        // ECHILD: an earlier axd's child.
        Ok(_) | Err(_) => Exit::Untold,
    }
}

/// Processes, of whatever parent, that were told to run a specification below `vms`.
pub fn running_specs(vms: &Path) -> Vec<(i32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return vec![];
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let spec = spec_of(pid)?;
            spec.starts_with(vms).then_some((pid, spec))
        })
        .collect()
}

fn spec_of(pid: i32) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = cmdline.split(|b| *b == 0);
    words.find(|word| *word == b"--spec")?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(words.next()?)))
}

/// SIGKILL to a process, if it still runs that specification; whether it was sent.
pub fn kill_stray(pid: i32, spec: &Path) -> bool {
    let Ok(pidfd) = open_pidfd(pid) else {
        return false;
    };
    // Checked again under the pidfd: from here the number cannot change hands.
    spec_of(pid).is_some_and(|s| s == spec) && signal_kill(&pidfd)
}

fn signal_kill(pidfd: &OwnedFd) -> bool {
    // SAFETY: the pidfd is open; a null siginfo is allowed; no memory is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        tracing::debug!("kill: {}", std::io::Error::last_os_error());
    }
    result >= 0
}
