//! One thread of a process stands still, the others run on: before it makes a file durable, as with a disk
//! that takes its time, or wherever it is.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::{Error, Result};

/// How often the tracer looks whether its thread has been killed.
const TICK: Duration = Duration::from_millis(10);

/// A stopped thread; it goes on when this is dropped.
#[derive(Debug)]
pub struct StoppedThread {
    lifeline: Option<mpsc::Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

/// The id of the thread called `name` in the one process whose command line speaks of `dir`.
fn find(dir: &Path, name: &str) -> Option<i32> {
    let dir = dir.to_string_lossy().into_owned();
    let processes = fs::read_dir("/proc")
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()));
    processes
        .filter(|process| {
            let words = fs::read(process.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words).contains(&dir)
        })
        .filter_map(|process| fs::read_dir(process.join("task")).ok())
        .flatten()
        .filter_map(|task| Some(task.ok()?.path()))
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name))
        .and_then(|task| task.file_name()?.to_str()?.parse().ok())
}

fn ptrace(request: libc::c_uint, tid: i32) -> io::Result<()> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: the requests used take no memory of this process.
    match unsafe { libc::ptrace(request, tid, nothing, nothing) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Waits until the thread stops as asked; the caller is its tracer.
fn stopped(tid: i32) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: `status` is writable and outlives the call.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ if libc::WIFSTOPPED(status) => Ok(()),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// True when a stopped thread is about to make a file durable. It holds no lock there that the others
/// need, as it may elsewhere: also one that waits can be handed a lock.
fn at_fsync(tid: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap_or_default();
    let number = call.split_whitespace().next().and_then(|n| n.parse().ok());
    matches!(number, Some(libc::SYS_fsync | libc::SYS_fdatasync))
}

/// True when the thread was killed. Its process is not gone before the tracer has looked.
fn is_dead(tid: i32) -> bool {
    let mut status = 0;
    // SAFETY: `status` is writable and outlives the call.
    let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    found != 0 && !libc::WIFSTOPPED(status)
}

fn stop(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid)?;
    ptrace(libc::PTRACE_INTERRUPT, tid)?;
    stopped(tid)
}

fn stop_at_fsync(tid: i32) -> io::Result<()> {
    stop(tid)?;
    loop {
        // To the beginning, or the end, of its next system call.
        ptrace(libc::PTRACE_SYSCALL, tid)?;
        stopped(tid)?;
        if at_fsync(tid) {
            return Ok(());
        }
    }
}

impl StoppedThread {
    /// Stops the thread called `name`, of the process whose command line speaks of `dir`, the next time
    /// it is about to make a file durable (blocks until then).
    ///
    /// # Errors
    /// There is no such thread, or the kernel refuses.
    pub fn before_fsync(dir: &Path, name: &str) -> Result<StoppedThread> {
        StoppedThread::with(dir, name, stop_at_fsync)
    }

    /// Stops the thread called `name`, of the process whose command line speaks of `dir`, where it is now; it
    /// may hold any lock.
    ///
    /// # Errors
    /// As [`StoppedThread::before_fsync`].
    pub fn anywhere(dir: &Path, name: &str) -> Result<StoppedThread> {
        StoppedThread::with(dir, name, stop)
    }

    fn with(dir: &Path, name: &str, stop: fn(i32) -> io::Result<()>) -> Result<StoppedThread> {
        let what = format!("stop thread {name} of the process of {}", dir.display());
        let tid = find(dir, name)
            .ok_or_else(|| Error::os(what.clone())(io::ErrorKind::NotFound.into()))?;
        let (lifeline, end) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        // A thread is traced by one thread, and goes on when that ends.
        let trace = move || {
            let stopped = stop(tid);
            let worked = stopped.is_ok();
            let mut alive = tell.send(stopped).is_ok() && worked;
            while alive && end.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                alive = !is_dead(tid);
            }
            // Fails when the process is gone meanwhile.
            let _ = ptrace(libc::PTRACE_DETACH, tid);
        };
        let tracer = thread::Builder::new()
            .name("tracer".into())
            .spawn(trace)
            .map_err(Error::os(what.clone()))?;
        let stopped = told.recv().unwrap_or(Err(io::ErrorKind::Other.into()));
        stopped.map_err(Error::os(what))?;
        Ok(StoppedThread {
            lifeline: Some(lifeline),
            tracer: Some(tracer),
        })
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        if let Some(tracer) = self.tracer.take() {
            // A panic in it has been printed.
            let _ = tracer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// The other end of the next test: one thread writes and makes durable, another only writes.
    #[test]
    #[ignore = "started by a_thread_stands_still_before_its_file_is_durable_and_the_others_run_on"]
    fn child() {
        let dir = std::path::PathBuf::from(std::env::var_os("AX_TEST_STOP").expect("AX_TEST_STOP"));
        let count = |name: &'static str, durable: bool| {
            let mut file = File::create(dir.join(name)).unwrap();
            let run = move || loop {
                file.write_all(b"x").unwrap();
                if durable {
                    file.sync_data().unwrap();
                }
                thread::sleep(Duration::from_millis(1));
            };
            thread::Builder::new().name(name.into()).spawn(run).unwrap();
        };
        count("durable", true);
        count("other", false);
        thread::sleep(Duration::from_secs(600));
    }

    #[test]
    fn a_thread_stands_still_before_its_file_is_durable_and_the_others_run_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "thread_stop::tests::child"])
            .arg(dir.path()) // a second filter, that matches nothing
            .env("AX_TEST_STOP", dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let size = |name: &str| fs::metadata(dir.path().join(name)).map_or(0, |m| m.len());
        let grows = |name: &str| {
            let before = size(name);
            while size(name) <= before {
                thread::sleep(Duration::from_millis(1));
            }
        };
        ["durable", "other"].iter().for_each(|name| grows(name));
        assert!(StoppedThread::before_fsync(dir.path(), "no-such").is_err());
        let stopped = StoppedThread::before_fsync(dir.path(), "durable").unwrap();
        let before = size("durable");
        (0..20).for_each(|_| grows("other"));
        assert_eq!(size("durable"), before);
        drop(stopped);
        grows("durable");
        let stopped = StoppedThread::anywhere(dir.path(), "other").unwrap();
        let before = size("other");
        (0..20).for_each(|_| grows("durable"));
        assert_eq!(size("other"), before);
        drop(stopped);
        grows("other");
        // One that is killed while it stands still does not keep its process from ending.
        let stopped = StoppedThread::before_fsync(dir.path(), "durable").unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        drop(stopped);
    }
}
