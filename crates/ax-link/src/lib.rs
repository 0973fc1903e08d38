//! ax-link
