//! Hosts on one machine: network namespaces and what joins them.
//!
//! ```text
//!            business network 10.77.0.0/24 (bridge in namespace `lan`)
//!     ┌──────────────┬───────────────────┬──────────────────┐
//!  uplink          uplink              uplink             uplink
//!  ┌─┴─ host a ──┐ ┌─┴─ host b ──┐ ┌───┴─ witness ─┐ ┌─────┴─ client ─┐
//!  │ br0 10.77.0.1│ │ br0 10.77.0.2│ │ 10.77.0.3     │ │ 10.77.0.4      │
//!  │ ├ axtap0 …   │ │ ├ axtap0 …   │ └───────────────┘ └────────────────┘
//!  │ link0────────┼─┼─link0        │
//!  └ 10.99.0.1/30 ┘ └ 10.99.0.2/30 ┘     dedicated links
//! ```
//!
//! Each host is also a PID namespace, so that one SIGKILL to its init takes every process at
//! once, daemons with sessions of their own included ([`Host::kill_all`]); a mount namespace
//! with a matching `/proc`; and a time namespace, so that no two hosts agree on
//! CLOCK_MONOTONIC or CLOCK_BOOTTIME, as two real ones would not. Everything hangs on file
//! descriptors and pipes of the process that made it: when it dies, by SIGKILL too, the kernel
//! takes all of it away.
//!
//! As root this works directly; an ordinary user gets the same in a user namespace of their
//! own, which a process can only enter while it has one thread: see [`isolate`].

mod capture;
mod cut;
mod frames;
mod host;
mod init;
pub mod isolate;
mod lab;
mod netlink;
mod netns;
mod senders;

pub use capture::{Capture, Captured};
pub use cut::{Cable, Toward};
pub use frames::{Filter, FrameCable, Shape};
pub use host::{Host, KillReport};
pub use lab::{GUEST, Lab, LabSpec, addr};
pub use netns::NetNs;
pub use senders::{Late, Senders, Sent, late};

/// Returns from the calling test, listed as skipped, when no test hosts can be made here; as an
/// ordinary user, runs the same test again inside namespaces of its own and returns with its
/// result.
#[macro_export]
macro_rules! require_lab {
    () => {
        match $crate::net::isolate::enter_test() {
            $crate::net::isolate::Entered::Here => {}
            $crate::net::isolate::Entered::RanElsewhere { success } => {
                assert!(
                    success,
                    "the test failed inside its own namespaces, see above"
                );
                return;
            }
            $crate::net::isolate::Entered::Unavailable(why) => {
                $crate::skip::report("no namespaces", &why, &$crate::skip::test_name());
                return;
            }
        }
    };
}
