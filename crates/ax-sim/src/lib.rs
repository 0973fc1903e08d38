//! A whole pair in a seeded, deterministic simulation.
//!
//! The product's own engines, barrier, state machine, disks and arbiter's rules run in threads of one
//! [`ax_sync::sim::World`], with a simulated guest, simulated disks that lose what was not made durable, networks,
//! clocks and an arbiter that fail as a seed says. What is seen from outside is judged by [`oracle`]; the guest looks at its
//! own memory and disk.
//!
//! - [`seed`]: one life of a pair under the faults of one seed
//! - [`process`], [`protecting`], [`following`]: a side's process around the real parts
//! - [`universe`], [`net`], [`disk`], [`guest`]: what is simulated
//! - [`run`]: many seeds, in processes of their own

pub mod disk;
pub mod following;
pub mod guest;
pub mod net;
pub mod oracle;
pub mod process;
pub mod protecting;
pub mod run;
pub mod seed;
pub mod universe;
