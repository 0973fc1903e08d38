//! AX: any virtual machine survives the death of its host.
//!
//! This package holds no code of its own: `tests/` drives the whole product from outside
//! and `benches/` measures it. The rooms are described in `docs/architecture.md`.
