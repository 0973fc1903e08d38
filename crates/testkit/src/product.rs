//! The real programs: built on demand, started on test hosts, listened to.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::net::Host;
use crate::{Error, Result};

/// Packages whose programs make up the product.
const PACKAGES: [&str; 3] = ["ax-daemon", "axvm", "ax-vmm"];

/// Where the product's programs are, all in one folder as an installation has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// The daemon.
    pub axd: PathBuf,
    /// The command line.
    pub axvm: PathBuf,
    /// The process that is one VM.
    pub ax_vmm: PathBuf,
}

static PROFILE: OnceLock<String> = OnceLock::new();

/// From now on [`Product::get`] builds in this cargo profile instead of the running program's
/// own, and lets cargo show its progress on standard error.
///
/// # Errors
/// When another one has been chosen already.
pub fn use_profile(profile: &str) -> Result<()> {
    PROFILE
        .set(profile.into())
        .map_err(|_| Error::Product("the product's build profile is chosen already".into()))
}

impl Product {
    /// The programs as built from this workspace in the running program's own profile (or that
    /// of [`use_profile`]); builds them first, once per process. `AX_PRODUCT_DIR` names a folder to take them from instead.
    ///
    /// # Errors
    /// What cargo said, or the program that is missing.
    pub fn get() -> Result<&'static Product> {
        static PRODUCT: OnceLock<std::result::Result<Product, String>> = OnceLock::new();
        PRODUCT
            .get_or_init(|| Product::find().map_err(|e| e.to_string()))
            .as_ref()
            .map_err(|e| Error::Product(e.clone()))
    }

    fn find() -> Result<Product> {
        if let Some(dir) = std::env::var_os("AX_PRODUCT_DIR") {
            return Product::within(Path::new(&dir));
        }
        let own = profile_dir()?;
        let dir = match PROFILE.get().map(String::as_str) {
            None => own,
            Some(profile) => own.with_file_name(if profile == "dev" { "debug" } else { profile }),
        };
        build(&dir)?;
        Product::within(&dir)
    }

    pub(crate) fn within(dir: &Path) -> Result<Product> {
        let program = |name: &str| {
            let path = dir.join(name);
            if path.is_file() {
                Ok(path)
            } else {
                Err(Error::Product(format!(
                    "there is no program {name} in {}",
                    dir.display()
                )))
            }
        };
        Ok(Product {
            axd: program("axd")?,
            axvm: program("axvm")?,
            ax_vmm: program("ax-vmm")?,
        })
    }
}

/// The folder cargo puts this profile's programs into: tests run from its `deps`, benches and
/// programs from there or itself.
fn profile_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().map_err(Error::os("find the running program"))?;
    exe.ancestors()
        .skip(1)
        .find(|d| d.file_name() != Some(OsStr::new("deps")))
        .map(Path::to_path_buf)
        .ok_or_else(|| Error::Product(format!("{} is in no folder", exe.display())))
}

fn build(dir: &Path) -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let workspace = workspace.ok_or_else(|| Error::Product("no workspace".into()))?;
    let profile = match dir.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let target = dir.parent().unwrap_or(dir);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace)
        .args(["build", "--profile", profile]);
    cargo.arg("--target-dir").arg(target);
    for package in PACKAGES {
        cargo.args(["--package", package]);
    }
    if PROFILE.get().is_some() {
        cargo.stderr(Stdio::inherit());
    }
    let output = cargo
        .stdin(Stdio::null())
        .output()
        .map_err(Error::os("run cargo build"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Product(format!(
        "cargo build of {} failed\n{said}",
        PACKAGES.join(", ")
    )))
}

/// A program running in the background, its output kept in a file. Dropping it kills it; if the
/// thread is panicking, its log is printed first.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with standard output and error going to `log`, which is appended to.
    ///
    /// # Errors
    /// When the log cannot be made or the program not started.
    pub fn start(name: impl Into<String>, mut command: Command, log: PathBuf) -> Result<Daemon> {
        let name = name.into();
        let open = || File::options().create(true).append(true).open(&log);
        let what = format!("make the log {}", log.display());
        let out = open().map_err(Error::os(what.clone()))?;
        let err = open().map_err(Error::os(what))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(Error::os(format!("start {name}")))?;
        Ok(Daemon { name, child, log })
    }

    /// [`Daemon::start`] of `program args…` on a test host.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn on<A: AsRef<OsStr>>(
        host: &Host,
        program: &Path,
        args: impl IntoIterator<Item = A>,
        log_dir: &Path,
    ) -> Result<Daemon> {
        let short = program
            .file_name()
            .map(|n| n.to_string_lossy())
            .unwrap_or_default();
        let mut command = host.command(program);
        command.args(args);
        let log = log_dir.join(format!("{}-{short}.log", host.name()));
        Daemon::start(format!("{short} on host {}", host.name()), command, log)
    }

    /// Everything it printed so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until its log contains `wanted`.
    ///
    /// # Errors
    /// [`Error::NotReady`] with the log, at once when the program ends, else after `patience`.
    pub fn wait_for(&mut self, wanted: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            // Asked before the log is read, so that last words are not missed.
            let ended = self.exit_status()?.is_some();
            let log = self.log();
            if log.contains(wanted) {
                return Ok(());
            }
            if ended || Instant::now() > deadline {
                return Err(Error::NotReady {
                    program: self.name.clone(),
                    wanted: wanted.into(),
                    seconds: patience.as_secs(),
                    log,
                });
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .map_err(Error::os(format!("look after {}", self.name)))
    }

    /// Its process id as this process sees it; signals sent there are passed on.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        let what = format!("kill {}", self.name);
        self.child.kill().map_err(Error::os(what.clone()))?;
        self.child.wait().map_err(Error::os(what))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of {} ---\n{}--- end ---", self.name, self.log());
        }
        // Gone already is as good.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Daemon) {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let daemon = Daemon::start("shell", command, dir.path().join("log")).unwrap();
        (dir, daemon)
    }

    #[test]
    fn readiness_is_waited_for() {
        let (_dir, mut daemon) =
            shell("echo starting; sleep 0.05; echo ready >&2; exec sleep 1000");
        daemon.wait_for("ready", Duration::from_secs(20)).unwrap();
        assert_eq!(daemon.log(), "starting\nready\n");
        assert!(daemon.exit_status().unwrap().is_none());
        daemon.kill().unwrap();
        assert!(daemon.exit_status().unwrap().is_some());
    }

    #[test]
    fn a_program_that_ends_instead_is_told_with_its_log() {
        let (_dir, mut daemon) = shell("echo no such file; exit 2");
        let e = daemon
            .wait_for("ready", Duration::from_secs(1000))
            .unwrap_err();
        assert!(e.to_string().contains("no such file"), "{e}");
        assert_eq!(daemon.exit_status().unwrap().unwrap().code(), Some(2));
    }

    #[test]
    fn the_profile_folder_is_found() {
        let dir = profile_dir().unwrap();
        assert!(dir.join("deps").is_dir(), "{dir:?}");
    }
}
