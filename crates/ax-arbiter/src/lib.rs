//! ax-arbiter
