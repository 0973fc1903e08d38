//! Who may run: the arbiter's rules, the witness that keeps them, and how a host asks.
//!
//! - [`rules`]: pure functions from record and request to decision (rules 20–27);
//! - [`message`]: what a host and a witness say to each other;
//! - [`store`], [`witness`]: the durable server (`axd witness`);
//! - [`client`]: a host's side, with a warm connection;
//! - [`change`]: from one arbiter to another, while the pair runs;
//! - [`etcd`]: an etcd cluster that keeps the records; [`third`]: what it and a witness have in common;
//! - [`word`], [`manual`]: no third party: an operator, or both hosts together, decide.
//!
//! The record itself is [`ax_wire::record`]. A grant is the only thing that lets a side of a pair
//! release output (I3); no observation about the peer, however convincing, replaces one.

pub mod change;
mod clerk;
pub mod client;
pub mod etcd;
pub mod manual;
pub mod message;
pub mod rules;
pub mod store;
pub mod third;
pub mod witness;
pub mod word;

pub use client::{AskError, Client};
pub use etcd::Etcd;
pub use manual::Manual;
pub use third::ThirdParty;
pub use witness::Witness;
