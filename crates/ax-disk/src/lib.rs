//! ax-disk
