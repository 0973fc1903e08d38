//! ax-daemon

fn main() {}
