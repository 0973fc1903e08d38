//! Every byte that crosses hosts: identities, headers, blocks, versions, CRC.
//!
//! The modules tell the story in the order a pair lives it:
//!
//! - [`ids`]: who speaks (pair, side, generation, incarnation, epoch);
//! - [`record`]: who may run, as the arbiter knows it; [`word`]: what the hosts agree on without one;
//! - [`version`]: which versions of all this a build speaks;
//! - [`records`]: what travels with an epoch besides memory;
//! - [`state`]: a machine's saved state as tagged, versioned blocks;
//! - [`frame`], [`channel`], [`hello`]: how a connection opens: what it is for, and whether the
//!   two hosts can be a pair;
//! - [`stream`]: the epoch stream and what comes back; [`runs`]: pages in it;
//! - [`peer`]: what the two processes of a pair tell each other besides epochs;
//! - [`offload`]: what a frame leaves to be done by who carries it;
//! - [`heartbeat`]: that the other side lives, and how far it has come;
//! - [`PageAligned`]: where pages are kept on their way.
//!
//! Nothing here does I/O. Everything read from a peer is hostile until parsed: a parser returns
//! a value that is right by its type, or an error that says what was wrong and where.

mod aligned;
pub mod channel;
pub mod frame;
pub mod heartbeat;
pub mod hello;
pub mod ids;
pub mod offload;
pub mod peer;
pub mod record;
pub mod records;
pub mod resync;
pub mod runs;
pub mod state;
pub mod stream;
pub mod version;
pub mod word;

pub use aligned::PageAligned;
pub use ids::{EpochId, Generation, Incarnation, MachineId, PairId, Session, Side};
pub use version::{Since, Version, Versions};

/// Size of a guest page, bytes. The handshake refuses a host that uses another size.
pub const PAGE_SIZE: usize = 4096;

/// The newest wire version of this source. What a build speaks is [`Versions::ours`].
pub const WIRE_VERSION: Version = Version::SECOND;
