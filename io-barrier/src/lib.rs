//! Outputs held until their epoch commits; inputs remembered.
//!
//! The story of one output on the primary:
//!
//! 1. A device calls [`Barrier::hold`]. Unless the VM runs alone, the output waits in the open epoch.
//! 2. With the guest paused, the epoch engine calls [`Barrier::seal`]: the open epoch's outputs are
//!    closed under its number and a copy travels to the shadow (rule 6).
//! 3. The shadow acknowledges the epoch; [`Barrier::release`] hands its outputs to the
//!    [`OutputSink`], each only while the acknowledgement's permission lasts (rule 24).
//!
//! Invariant I1: no output of epoch N leaves before N is committed. There is exactly one function
//! through which a byte leaves, and the gate in front of it opens only for values ([`SoloGrant`],
//! [`FtGrant`]) that stand for an arbiter's answer.
//!
//! On the shadow, [`ShadowOutputs`] keeps the outputs of committed epochs until the primary says
//! they are released, and [`ReceivedLog`] keeps the frames the guest may not have seen yet (rule 7).

mod barrier;
mod clock;
mod grant;
mod received;
mod shadow;

pub use barrier::{
    Barrier, BarrierConfig, Full, Gate, OutputSink, Power, Release, SealError, Sealed,
};
pub use clock::{Boottime, Clock};
pub use grant::{FtGrant, Grant, SoloGrant};
pub use received::{MAX_NICS, ReceivedLog, RxCounts};
pub use shadow::{ShadowOutputs, ShadowOutputsFull};
