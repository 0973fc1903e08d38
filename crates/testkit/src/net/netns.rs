//! One network namespace, held by a file descriptor.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::{Error, Result, panic_text};

/// A network namespace. Clones are handles to the same one; it lives until the last is dropped
/// and nothing runs in it any more.
#[derive(Debug, Clone)]
pub struct NetNs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
}

impl NetNs {
    /// Makes an empty network namespace; `name` appears in errors only.
    ///
    /// # Errors
    /// [`Error::NoNamespaces`] when this process may not.
    pub fn new(name: &str) -> Result<NetNs> {
        // Namespaces belong to threads: a short-lived one makes it, the descriptor keeps it.
        let made = thread::scope(|s| {
            s.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|e| Error::NoNamespaces {
                    why: format!("network: {e}"),
                })?;
                File::open("/proc/thread-self/ns/net")
                    .map_err(Error::os(format!("open the network namespace of {name}")))
            })
            .join()
        });
        let file = made.map_err(|p| Error::Panicked(panic_text(&*p)))??;
        let ns = NetNs(Arc::new(Inner {
            name: name.to_string(),
            file,
        }));
        ns.quiet_ipv6()?;
        Ok(ns)
    }

    /// The name given at [`NetNs::new`].
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs `f` on a thread inside this namespace and waits for it. Sockets opened there stay in
    /// the namespace wherever they are used later.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `f` panicked.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|s| {
            s.spawn(|| {
                self.enter()?;
                Ok(f())
            })
            .join()
        })
        .map_err(|p| Error::Panicked(panic_text(&*p)))?
    }

    /// Moves the calling thread into this namespace, for good; threads it starts follow.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        setns(self.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| {
            Error::os(format!("enter the network namespace of {}", self.name()))(e.into())
        })
    }

    /// No router solicitations and duplicate-address probes among the frames a test counts.
    fn quiet_ipv6(&self) -> Result<()> {
        self.run(|| {
            for scope in ["all", "default"] {
                // Absent in a kernel without IPv6, read-only in some containers: then the
                // network is merely a little louder.
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                if let Err(e) = std::fs::write(&path, "1") {
                    tracing::debug!("{path}: {e}");
                }
            }
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl AsRawFd for NetNs {
    fn as_raw_fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }
}
