//! The product under faults that strike at chosen moments: links cut with both sides alive, processes
//! killed between two steps of an epoch, lost acknowledgements, failed captures, the steps into FT.
//!
//! A test sets up one site and plays several scenes on it, each with a VM of its own. Where chance
//! decides, the seed is printed; `AX_SEED` plays it again, and `AX_ROUNDS` (default 1) plays so many
//! rounds with different seeds.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod scene;

mod acks;
mod captures;
mod cuts;
mod entering;
mod kills;
mod pairings;
