//! A file system of this process, mounted, and unmounted whatever uses it.
//!
//! Its threads have a file table of their own, which holds the connection to the kernel and nothing else.
//! When they end, however that comes, the connection ends with them, and nobody waits for an answer any
//! more: else a killed process that uses its own disk would hold the connection open itself, waiting.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use fuser::{Config, Filesystem, Session, SessionACL};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted file system; dropping it unmounts it.
#[derive(Debug)]
pub(super) struct Mounted {
    point: PathBuf,
    thread: Option<JoinHandle<()>>,
}

/// Leaves this thread, and those it starts, with standard input, output and error alone.
fn own_file_table() -> io::Result<()> {
    // SAFETY: what is closed is a copy that this thread alone has, and nothing in it is used by it.
    let done = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE as libc::c_int) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn begin<F: Filesystem>(filesystem: F, point: &Path) -> io::Result<Session<F>> {
    own_file_table()?;
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let fd = device.as_raw_fd();
    // mount.fuse(8): the root folder is a folder, and only root may look inside.
    let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let (name, kind) = (Some("ax-disk"), Some("fuse.ax-disk"));
    mount(name, point, kind, flags, Some(options.as_str()))?;
    let session = Session::from_fd(
        filesystem,
        device.into(),
        SessionACL::Owner,
        Config::default(),
    );
    session.inspect_err(|_| unmount(point))
}

fn unmount(point: &Path) {
    // Ends everything that is under way there, also for hosts that have a mount of their own of it.
    // Fails where it is in use, which the second one does not mind.
    let _ = umount2(point, MntFlags::MNT_FORCE);
    if let Err(e) = umount2(point, MntFlags::MNT_DETACH) {
        tracing::debug!("unmount {}: {e}", point.display());
    }
}

impl Mounted {
    /// Mounts it on the folder `point`.
    pub(super) fn new(filesystem: impl Filesystem, point: &Path) -> io::Result<Mounted> {
        let point = point.canonicalize()?;
        let (tell, told) = mpsc::channel();
        let at = point.clone();
        let serve = move || match begin(filesystem, &at) {
            Ok(session) => {
                let _ = tell.send(Ok(()));
                if let Err(e) = session.run() {
                    tracing::warn!("the disk on {}: {e}", at.display());
                }
            }
            Err(e) => {
                let _ = tell.send(Err(e));
            }
        };
        let thread = std::thread::Builder::new().name("disk".into());
        let thread = thread.spawn(serve)?;
        told.recv().unwrap_or(Err(io::ErrorKind::Other.into()))?;
        Ok(Mounted {
            point,
            thread: Some(thread),
        })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.point);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}
