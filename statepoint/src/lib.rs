//! Epochs: trigger, capture, ship, stage, check, acknowledge, commit, apply.
//!
//! Knows nothing of KVM. A guest is anything that implements [`guest::Guest`]; the copy of
//! it on the other host is anything that implements [`guest::ShadowGuest`]. The same engines
//! drive the real machine and the simulated one of the tests.

pub mod guest;
pub mod pair;
