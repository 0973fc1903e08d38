//! The first process of a test host, and how further ones join it.
//!
//! The init is PID 1 of its own PID namespace and does nothing but hold it: the kernel kills
//! every process of a PID namespace when its init dies, and no session, process group or double
//! fork escapes. It ends when a pipe from the process that made it closes, so a host never
//! outlives its test.
//!
//! Everything here runs between fork and exec of a process with several threads, where only
//! system calls are allowed: no allocation, no lock, no panic.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::{Error, Result};

const JOIN: libc::c_int =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWUTS;

/// A running init: while it lives, the host is switched on.
#[derive(Debug)]
pub(super) struct Init {
    pub(super) pid: u32,
    pidfd: OwnedFd,
    time: Option<File>,
    /// Closing it ends the init.
    _lifeline: OwnedFd,
}

/// What the child needs, made before the fork because it may not allocate.
struct Plan {
    hostname: CString,
    offsets: CString,
    boot_id: CString,
    lifeline: RawFd,
    report: RawFd,
}

impl Init {
    /// Starts the init of host `name` in the calling thread's network namespace, with
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME `ahead` of the machine's, and a boot id of its own.
    pub(super) fn start(name: &str, ahead: Duration) -> Result<Init> {
        let nul = |e: std::ffi::NulError| Error::os(format!("host name {name:?}"))(e.into());
        let (lifeline_read, lifeline) = pipe()?;
        let (report_read, report) = pipe()?;
        let boot_id = boot_id()?;
        let path = boot_id.path().as_os_str().as_bytes();
        let offset = format!("{} {}", ahead.as_secs(), ahead.subsec_nanos());
        let plan = Plan {
            hostname: CString::new(name).map_err(nul)?,
            offsets: CString::new(format!("monotonic {offset}\nboottime {offset}\n"))
                .map_err(nul)?,
            boot_id: CString::new(path).map_err(nul)?,
            lifeline: lifeline_read.as_raw_fd(),
            report: report.as_raw_fd(),
        };
        let mut pidfd: RawFd = -1;
        // SAFETY: clone_args is plain old data; all zeroes is a value of it.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags =
            (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_PIDFD)
                as u64;
        args.pidfd = (&raw mut pidfd) as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        // SAFETY: without CLONE_VM this is a fork; the child calls `serve`, which makes system
        // calls only and never returns. The arguments outlive the call.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                size_of::<libc::clone_args>(),
            )
        };
        if pid == 0 {
            serve(&plan);
        }
        if pid < 0 {
            let why = io::Error::last_os_error();
            return Err(Error::NoNamespaces {
                why: format!("process and mount: {why}"),
            });
        }
        // SAFETY: the kernel just stored this new descriptor, and nobody else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        drop((lifeline_read, report));
        let mut answer = Vec::new();
        File::from(report_read)
            .read_to_end(&mut answer)
            .map_err(Error::os(format!("hear from the init of host {name}")))?;
        let pid = pid as u32;
        let mut init = Init {
            pid,
            pidfd,
            time: None,
            _lifeline: lifeline,
        };
        match answer.as_slice() {
            [STARTED, clocks] => {
                if *clocks == 1 {
                    let path = format!("/proc/{pid}/ns/time_for_children");
                    init.time = Some(File::open(&path).map_err(Error::os(path))?);
                }
                Ok(init)
            }
            [step, errno] => {
                let what = match *step {
                    1 => "make its mounts private",
                    2 => "mount its own /proc",
                    3 => "have a boot id of its own",
                    _ => "start",
                };
                Err(Error::NoNamespaces {
                    why: format!(
                        "host {name} could not {what}: {}",
                        io::Error::from_raw_os_error((*errno).into())
                    ),
                })
            }
            _ => Err(Error::NoNamespaces {
                why: format!("the init of host {name} died"),
            }),
        }
    }

    pub(super) fn pidfd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }

    pub(super) fn time_fd(&self) -> Option<RawFd> {
        self.time.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sends SIGKILL; the kernel passes it on to every process of the host.
    pub(super) fn kill(&self) -> io::Result<()> {
        // SAFETY: pidfd_send_signal takes a descriptor we own, no siginfo, no flags.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd(),
                libc::SIGKILL,
                0usize,
                0,
            )
        };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Waits until the init, and so every process of the host, is gone.
    pub(super) fn wait(&self) -> io::Result<()> {
        loop {
            // SAFETY: siginfo_t is plain old data; waitid writes one, which outlives the call.
            let rc = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let id = self.pidfd.as_raw_fd() as libc::id_t;
                libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED)
            };
            if rc == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(()),
                _ => return Err(e),
            }
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        // Already dead is fine; nothing can be done about another refusal here.
        let _ = self.kill();
        let _ = self.wait();
    }
}

const STARTED: u8 = 0;

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| Error::os("make a pipe")(e.into()))
}

/// What `/proc/sys/kernel/random/boot_id` is to say on a host: every start of it is another boot. The
/// mount keeps the file when its name is gone.
fn boot_id() -> Result<tempfile::NamedTempFile> {
    let failed = || Error::os("make a boot id");
    let id = std::fs::read("/proc/sys/kernel/random/uuid").map_err(failed())?;
    let mut file = tempfile::NamedTempFile::new().map_err(failed())?;
    file.write_all(&id).map_err(failed())?;
    Ok(file)
}

/// The init's whole life, in the forked child.
fn serve(plan: &Plan) -> ! {
    // SAFETY: system calls only, on descriptors and strings that the fork copied; the process
    // has one thread and leaves by _exit.
    unsafe {
        libc::setsid();
        // Orphans of the host are handed to us; ignoring SIGCHLD reaps them.
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let (low, high) = (
            plan.lifeline.min(plan.report) as u32,
            plan.lifeline.max(plan.report) as u32,
        );
        if low > 0 {
            libc::close_range(0, low - 1, 0);
        }
        if high - low > 1 {
            libc::close_range(low + 1, high - 1, 0);
        }
        libc::close_range(high + 1, u32::MAX, 0);
        let name = plan.hostname.as_bytes();
        libc::sethostname(name.as_ptr().cast(), name.len());

        let fail = |step: u8| -> ! {
            let errno = *libc::__errno_location() as u8;
            let answer = [step, errno];
            libc::write(plan.report, answer.as_ptr().cast(), answer.len());
            libc::_exit(1)
        };
        let null = std::ptr::null();
        if libc::mount(
            null,
            c"/".as_ptr(),
            null,
            libc::MS_REC | libc::MS_SLAVE,
            null.cast(),
        ) != 0
        {
            fail(1);
        }
        let proc = c"proc".as_ptr();
        if libc::mount(proc, c"/proc".as_ptr(), proc, 0, null.cast()) != 0 {
            fail(2);
        }
        let target = c"/proc/sys/kernel/random/boot_id".as_ptr();
        let bind = libc::MS_BIND;
        if libc::mount(plan.boot_id.as_ptr(), target, null, bind, null.cast()) != 0 {
            fail(3);
        }
        // A kernel without time namespaces gives a host whose clocks agree with the others'.
        let clocks = u8::from(libc::unshare(libc::CLONE_NEWTIME) == 0 && set_clocks(plan));
        let answer = [STARTED, clocks];
        libc::write(plan.report, answer.as_ptr().cast(), answer.len());
        libc::close(plan.report);
        let mut byte = 0u8;
        while libc::read(plan.lifeline, (&raw mut byte).cast(), 1) != 0 {
            // Only EINTR: nobody writes. End of file is the end of the host.
        }
        libc::_exit(0)
    }
}

/// # Safety
/// Only in the forked child, after its own `/proc` is mounted.
unsafe fn set_clocks(plan: &Plan) -> bool {
    // SAFETY: plain system calls; the string was made before the fork.
    unsafe {
        let fd = libc::open(c"/proc/self/timens_offsets".as_ptr(), libc::O_WRONLY);
        if fd < 0 {
            return false;
        }
        let text = plan.offsets.as_bytes();
        let wrote = libc::write(fd, text.as_ptr().cast(), text.len());
        libc::close(fd);
        wrote == text.len() as isize
    }
}

/// Makes the calling process's only child-to-be a member of the host: for `pre_exec`.
///
/// A process enters a PID namespace only by being born there, so this forks: the child goes on
/// to exec, the parent stays outside, passes signals on and ends as the child ends, so that
/// [`std::process::Child`] waits, kills and reports as usual. Killing that parent kills the
/// child.
///
/// # Errors
/// ESRCH when the host is switched off; what the kernel said otherwise.
///
/// # Safety
/// Only between fork and exec. The descriptors must be open.
pub(super) unsafe fn join(pidfd: RawFd, time: Option<RawFd>) -> io::Result<()> {
    let check = |rc: libc::c_int| {
        if rc < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(rc)
        }
    };
    // SAFETY: system calls on open descriptors and local buffers that outlive them, in a process
    // with one thread.
    unsafe {
        // Entering a mount namespace moves to its root; the caller's directory is wanted back.
        let mut cwd = [0u8; 4096];
        let has_cwd = !libc::getcwd(cwd.as_mut_ptr().cast(), cwd.len()).is_null();
        if let Some(time) = time {
            check(libc::setns(time, libc::CLONE_NEWTIME))?;
        }
        check(libc::setns(pidfd, JOIN))?;
        if has_cwd {
            check(libc::chdir(cwd.as_ptr().cast()))?;
        }
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &raw const all,
            &raw mut before,
        ))?;
        let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            check(libc::sigprocmask(
                libc::SIG_SETMASK,
                &raw const before,
                std::ptr::null_mut(),
            ))?;
            return Ok(());
        }
        relay(child as libc::pid_t, &all)
    }
}

/// # Safety
/// Only in the process [`join`] leaves outside, with every signal blocked.
unsafe fn relay(child: libc::pid_t, all: &libc::sigset_t) -> ! {
    // SAFETY: system calls only, on our own child.
    unsafe {
        // No pipe may stay open because of us.
        libc::close_range(0, u32::MAX, 0);
        loop {
            let signal = libc::sigwaitinfo(all, std::ptr::null_mut());
            if signal == libc::SIGCHLD {
                let mut status = 0;
                if libc::waitpid(child, &raw mut status, libc::WNOHANG) != child {
                    continue;
                }
                if libc::WIFSIGNALED(status) {
                    let signal = libc::WTERMSIG(status);
                    let no_core = libc::rlimit {
                        rlim_cur: 0,
                        rlim_max: 0,
                    };
                    libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
                    libc::signal(signal, libc::SIG_DFL);
                    libc::kill(libc::getpid(), signal);
                    libc::sigprocmask(libc::SIG_UNBLOCK, all, std::ptr::null_mut());
                    libc::_exit(128 + signal);
                }
                if libc::WIFEXITED(status) {
                    libc::_exit(libc::WEXITSTATUS(status));
                }
            } else if signal > 0 {
                libc::kill(child, signal);
            }
        }
    }
}
