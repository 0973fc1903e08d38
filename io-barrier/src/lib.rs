//! io-barrier
