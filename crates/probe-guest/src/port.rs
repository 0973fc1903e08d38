//! Ports of the guest's services.

/// Echo, UDP and TCP.
pub const ECHO: u16 = 7;
/// `GET /` over HTTP, TCP.
pub const HTTP: u16 = 80;
/// RESP (Redis), TCP.
pub const RESP: u16 = 6379;
/// Durable ledger, TCP.
pub const LEDGER: u16 = 7000;
/// Control, TCP.
pub const CONTROL: u16 = 7001;
/// Nonce oracle, UDP.
pub const NONCE: u16 = 7002;
