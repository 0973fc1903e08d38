//! One thread of a process stands still, the others run on: a disk that takes its time, say.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::{Error, Result};

/// Attempts to find the thread where it holds no lock.
const TRIES: u32 = 200;

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

/// Stops the thread; the caller is its tracer.
fn stop(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_INTERRUPT, tid)?;
    let mut status = 0;
    // SAFETY: `status` is writable and outlives the call.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// True when a stopped thread was in a file's system call or waiting, so that it holds no lock that
/// others need.
fn holds_nothing(tid: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap_or_default();
    let mut words = call.split_whitespace();
    let number: Option<i64> = words.next().and_then(|n| n.parse().ok());
    let operation = words.nth(1).and_then(|w| w.strip_prefix("0x"));
    let operation = operation.and_then(|w| i32::from_str_radix(w, 16).ok());
    match number {
        Some(libc::SYS_pwrite64 | libc::SYS_fsync | libc::SYS_fdatasync) => true,
        Some(libc::SYS_futex) => operation.is_some_and(|operation| {
            matches!(
                operation & libc::FUTEX_CMD_MASK,
                libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET
            )
        }),
        _ => false,
    }
}

fn stop_where_it_holds_nothing(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid)?;
    for _ in 0..TRIES {
        stop(tid)?;
        if holds_nothing(tid) {
            return Ok(());
        }
        ptrace(libc::PTRACE_CONT, tid)?;
        thread::sleep(Duration::from_millis(1));
    }
    Err(io::ErrorKind::TimedOut.into())
}

impl StoppedThread {
    /// Stops the thread called `name` of the process whose command line speaks of `dir`, at a place
    /// where the process's other threads don't wait for it.
    ///
    /// # Errors
    /// There is no such thread, or the kernel refuses.
    pub fn stop(dir: &Path, name: &str) -> Result<StoppedThread> {
        let what = format!("stop thread {name} of the process of {}", dir.display());
        let tid = find(dir, name)
            .ok_or_else(|| Error::os(what.clone())(io::ErrorKind::NotFound.into()))?;
        let (lifeline, end) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        // A thread is traced by one thread, and goes on when that ends.
        let trace = move || {
            let stopped = stop_where_it_holds_nothing(tid);
            let worked = stopped.is_ok();
            if tell.send(stopped).is_ok() && worked {
                let _: std::result::Result<(), _> = end.recv();
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
    use std::process::{Command, Stdio};

    #[test]
    fn a_stopped_thread_stands_still_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let (ticks, word) = (dir.path().join("ticks"), dir.path().display());
        let script = format!("while :; do echo x >> {word}/ticks; sleep 0.01; done");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let size = || fs::metadata(&ticks).map_or(0, |m| m.len());
        while size() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(StoppedThread::stop(dir.path(), "no-such").is_err());
        let tid = find(dir.path(), "sh").unwrap();
        assert_eq!(tid, child.id() as i32);
        // A shell waits for its children: not where the others of a process would not miss it.
        assert!(StoppedThread::stop(dir.path(), "sh").is_err());
        let before = size();
        while size() == before {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
