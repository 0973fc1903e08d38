//! Namespaces for an ordinary user.
//!
//! Without privileges, network namespaces may be made only inside a user namespace of one's own,
//! and a process may enter one only while it has a single thread; a test never has. So
//! [`enter_test`] (or [`enter_program`]) runs the same test once more in a child process that enters before its first
//! thread starts, and [`command`] does that for any program. Inside, the user is root over their
//! own namespaces and themselves everywhere else: files belong to them, `/dev/kvm` opens if it
//! did outside.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::unistd::{getegid, geteuid};

/// Set inside the namespaces.
const INSIDE_VAR: &str = "AX_TESTKIT_ISOLATED";

/// Where the calling test or program is to go on.
#[derive(Debug)]
pub enum Entered {
    /// Here: this process may make test hosts.
    Here,
    /// It ran in a child process.
    RanElsewhere {
        /// Whether it passed there.
        success: bool,
    },
    /// Test hosts cannot be made; why.
    Unavailable(String),
}

/// Whether this process itself may make test hosts.
pub fn privileged() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| super::NetNs::new("probe").is_ok())
}

/// Whether test hosts can be made, by this process or by one that [`command`] starts.
///
/// # Errors
/// [`crate::Error::NoNamespaces`] with what the kernel refuses.
pub fn possible() -> crate::Result<()> {
    if privileged() {
        return Ok(());
    }
    let mut probe = command("/proc/self/exe");
    // SAFETY: `unshare` and `_exit` are plain system calls in a process with one thread. The program
    // is never run: this asks only what the kernel allows.
    unsafe {
        probe.pre_exec(|| {
            let all = libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWPID;
            match libc::unshare(all) {
                0 => libc::_exit(0),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    probe
        .status()
        .map(drop)
        .map_err(|e| crate::Error::NoNamespaces { why: e.to_string() })
}

/// Whether taps can be made: opens `/dev/net/tun`.
///
/// # Errors
/// What the kernel says, and what to do about it.
pub fn tun_opens() -> std::result::Result<(), String> {
    let tun = "/dev/net/tun";
    let e = match std::fs::OpenOptions::new().read(true).write(true).open(tun) {
        Ok(_) => return Ok(()),
        Err(e) => e,
    };
    let remedy = match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV) => "load the module (modprobe tun)",
        Some(libc::EACCES | libc::EPERM) => {
            "let this user open it (chmod 0666 /dev/net/tun, as udev does), or run as root"
        }
        _ => "see dmesg",
    };
    Err(format!("cannot open {tun}: {e}; {remedy}"))
}

/// Whether this process was started by [`command`].
pub fn inside() -> bool {
    std::env::var_os(INSIDE_VAR).is_some()
}

/// For [`require_lab!`](crate::require_lab): goes on here if this process may make test hosts,
/// otherwise runs the calling libtest test in a child process that may. Taps need `/dev/net/tun`
/// either way.
pub fn enter_test() -> Entered {
    let test = crate::skip::test_name();
    enter([
        "--exact",
        &test,
        "--nocapture",
        "--include-ignored",
        "--test-threads=1",
    ])
}

/// As [`enter_test`] for a whole program, which is run again with the same arguments.
pub fn enter_program() -> Entered {
    enter(std::env::args_os().skip(1))
}

fn enter<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Entered {
    if let Err(why) = tun_opens() {
        return Entered::Unavailable(why);
    }
    if privileged() {
        return Entered::Here;
    }
    if inside() {
        return Entered::Unavailable("not even inside a user namespace".into());
    }
    let ran = std::env::current_exe().and_then(|exe| command(exe).args(args).status());
    match ran {
        Ok(status) => Entered::RanElsewhere {
            success: status.success(),
        },
        Err(e) => Entered::Unavailable(format!("no user namespace: {e}")),
    }
}

/// A command that starts `program` as root of a new user namespace; spawning fails when the
/// kernel or its administrator does not allow that.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let map = |id: u32| CString::new(format!("0 {id} 1")).unwrap_or_default();
    let (uid, gid) = (map(geteuid().as_raw()), map(getegid().as_raw()));
    let mut command = Command::new(program);
    command.env(INSIDE_VAR, "1");
    let enter = move || {
        // SAFETY: a plain system call in a process with one thread.
        if unsafe { libc::unshare(libc::CLONE_NEWUSER) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Groups cannot be mapped before setgroups is given up (user_namespaces(7)).
        write(c"/proc/self/setgroups", c"deny")?;
        write(c"/proc/self/uid_map", &uid)?;
        write(c"/proc/self/gid_map", &gid)
    };
    // SAFETY: `enter` makes system calls on strings made before the fork.
    unsafe { command.pre_exec(enter) };
    command
}

fn write(path: &std::ffi::CStr, text: &std::ffi::CStr) -> io::Result<()> {
    let bytes = text.to_bytes();
    // SAFETY: open, write and close on a descriptor of our own, with NUL-terminated strings.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let wrote = libc::write(fd, bytes.as_ptr().cast(), bytes.len());
        let result = if wrote < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        };
        libc::close(fd);
        result
    }
}
