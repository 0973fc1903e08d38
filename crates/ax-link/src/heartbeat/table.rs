//! A thread's own file table, and its place in the queue for a CPU.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread a file table of its own that holds nothing but standard input,
/// output and error and the descriptors numbered in `keep`, which are returned as owned.
///
/// Everything else is closed *in this table only*: the process keeps its own. So the thread never
/// keeps a tap, a KVM descriptor or another channel alive (rule 10). The three standard
/// descriptors stay, so that no socket ever gets their numbers, to which anything may print.
///
/// The thread must not touch any descriptor of the process afterwards, nor drop a value that owns
/// one: the number means something else here, or nothing.
///
/// # Errors
/// The system's; the thread must end then.
pub(super) fn own_table<const N: usize>(keep: [RawFd; N]) -> io::Result<[OwnedFd; N]> {
    unshare(CloneFlags::CLONE_FILES)?;
    let mut sorted = keep;
    sorted.sort_unstable();
    let mut from = 3;
    for fd in sorted {
        close_range(from, fd - 1)?;
        from = fd + 1;
    }
    close_range(from, RawFd::MAX)?;
    // SAFETY: unshare copied the process's table, in which the caller holds these descriptors
    // open; the copies at the same numbers are this table's alone, and are owned nowhere else.
    Ok(keep.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes no pointers. It closes descriptors of this thread's own, fresh table, whose
    // copies nobody owns yet; flags 0.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A busy host must not look like a dead one: this thread sleeps nearly always, and is due when it is
/// due. Where real-time scheduling is not allowed (an ordinary user) it goes on as it is.
pub(super) fn go_first() {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: `param` is valid for the call; 0 names the calling thread.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
}
