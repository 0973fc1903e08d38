//! Control API types shared by axd, axvm and ax-vmm.
//!
//! - [`vm`]: what a user defines: one VM.
//! - [`process`]: what axd hands one `ax-vmm` process, and how they talk afterwards.
//! - [`host`]: what axvm asks axd, and one axd the other.
//! - [`report`]: how a VM is, taken over both hosts.
//! - [`trace`]: what a protected VM's process tells of its epochs.
//! - [`check`]: what a check of a host found.
//! - [`units`]: sizes and hardware addresses as people write them.
//!
//! All of it travels as JSON, one document a line, over Unix sockets (and between the axds over
//! the authenticated link).

pub mod check;
pub mod host;
pub mod process;
pub mod report;
pub mod trace;
pub mod units;
pub mod vm;

/// What a build speaks that does not say it: wire version 1.
pub(crate) fn first_wire() -> u16 {
    ax_wire::Version::FIRST.number()
}
