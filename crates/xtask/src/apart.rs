//! The demo, the campaign and the comparison run in a child process, so that nothing of them is left behind,
//! whatever ends it.
//!
//! Its hosts are namespaces and processes that end with the child by themselves. But an interrupted
//! child waits for none of them and takes no file away. This process does both: everything the child
//! started becomes its child (it is a subreaper, prctl(2)), and all files are in one folder of its own.
//! An ordinary user's child is root of namespaces of its own: see [`isolate`].

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use testkit::net::isolate;

use crate::Error;

/// Set in the child.
const APART_VAR: &str = "AX_DEMO_APART";
/// Names the folder the product's programs are in, see [`testkit::product::Product::get`].
const PRODUCT_VAR: &str = "AX_PRODUCT_DIR";

/// Whether this process is the child.
pub fn inside() -> bool {
    std::env::var_os(APART_VAR).is_some()
}

/// Runs this command once more in a child that takes the product's programs from `product`, and
/// returns as it ends. With `keep` its files stay.
///
/// # Errors
/// The child can't be started, or its files not be removed.
pub fn run(product: &Path, keep: bool) -> Result<ExitCode, Error> {
    let failed = |what: &'static str| move |e: Errno| Error::Failed(format!("{what}: {e}"));
    // Before any thread starts: they would get the signals this thread waits for.
    let signals: SigSet = [
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
    ]
    .into_iter()
    .collect();
    signals.thread_block().map_err(failed("block signals"))?;
    prctl::set_child_subreaper(true).map_err(failed("become a subreaper"))?;
    let dir = tempfile::Builder::new()
        .prefix("ax-demo-")
        .tempdir()
        .map_err(|e| Error::Failed(format!("cannot make a folder for it: {e}")))?;
    let child = start(product, dir.path(), signals)?;
    let ended = wait(child, &signals).map_err(failed("wait for the child that does it"))?;
    if keep {
        let _ = dir.keep();
    } else {
        dir.close()
            .map_err(|e| Error::Failed(format!("cannot remove its files: {e}")))?;
    }
    if let Some(signal) = ended.asked {
        eprintln!("ended by {signal}; nothing of it is left");
        // A shell tells a command that was interrupted from one that failed.
        let _ = raise(signal);
        let _ = signals.thread_unblock();
    }
    Ok(match ended.status {
        Some(WaitStatus::Exited(_, code)) => {
            u8::try_from(code).map_or(ExitCode::FAILURE, Into::into)
        }
        Some(WaitStatus::Signaled(_, signal, _)) => {
            return Err(Error::Failed(format!("it was ended by {signal}")));
        }
        _ => ExitCode::FAILURE,
    })
}

fn start(product: &Path, dir: &Path, signals: SigSet) -> Result<Pid, Error> {
    let exe = std::env::current_exe()
        .map_err(|e| Error::Failed(format!("cannot find this program: {e}")))?;
    let mut command = if isolate::privileged() {
        Command::new(exe)
    } else {
        isolate::command(exe)
    };
    command
        .args(std::env::args_os().skip(1))
        .env(APART_VAR, "1")
        .env(PRODUCT_VAR, product)
        .env("TMPDIR", dir);
    let follow = move || {
        // A program inherits what is blocked.
        signals.thread_unblock()?;
        // After entering a user namespace, which would forget it.
        prctl::set_pdeathsig(Signal::SIGTERM)?;
        // What it mounts goes with it. Where that is not allowed, neither is mounting.
        if unshare(CloneFlags::CLONE_NEWNS).is_ok() {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        }
        Ok(())
    };
    // SAFETY: system calls only, allowed between fork and exec.
    unsafe { command.pre_exec(follow) };
    let child = command
        .spawn()
        .map_err(|e| Error::Failed(format!("cannot start its child: {e}")))?;
    i32::try_from(child.id())
        .map(Pid::from_raw)
        .map_err(|e| Error::Failed(format!("the child's process id: {e}")))
}

/// How the child ended.
struct Ended {
    status: Option<WaitStatus>,
    /// The signal that asked this process to end.
    asked: Option<Signal>,
}

/// Waits for the child and then for everything it left; passes signals on to it.
fn wait(child: Pid, signals: &SigSet) -> nix::Result<Ended> {
    let mut ended = Ended {
        status: None,
        asked: None,
    };
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(status) if status.pid() == Some(child) => ended.status = Some(status),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return Ok(ended),
                Err(e) => return Err(e),
            }
        }
        match signals.wait()? {
            Signal::SIGCHLD => {}
            signal => {
                ended.asked = Some(signal);
                if ended.status.is_none() {
                    kill(child, signal)?;
                }
            }
        }
    }
}
