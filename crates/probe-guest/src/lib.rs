//! The embedded guest: a freestanding program that boots in milliseconds on any KVM and does
//! real work with real clients (see the README beside this crate).
//!
//! [`ELF`] is the image, built by this crate's build script from the nested package `guest/`.
//! The other modules are the guest's pure parts, compiled here as well, so that hosts speak the
//! same formats and the formats are tested apart from the machine:
//!
//! - [`port`]: where its services listen
//! - [`acpi`]: the power button, found through the ACPI tables
//! - [`checksum`]: checksums that the network device computes
//! - [`cmdline`]: the kernel command line the guest understands
//! - [`command`]: the control protocol (TCP 7001 and the console)
//! - [`resp`], [`keyspace`]: the RESP parser and the data behind it (TCP 6379)
//! - [`ledger`]: the on-disk record of the ledger (TCP 7000)
//! - [`digest`]: the digest that `HASH` and `DISKHASH` answer with
//! - [`sequence`]: the generator behind `WORK`

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod checksum;
pub mod cmdline;
pub mod command;
pub mod digest;
pub mod keyspace;
pub mod ledger;
pub mod port;
pub mod resp;
pub mod sequence;

/// The guest's image: a static 64-bit ELF with a PVH entry note, loaded at 1 MiB.
pub const ELF: &[u8] = include_bytes!(env!("PROBE_GUEST_ELF"));
