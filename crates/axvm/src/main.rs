//! axvm

fn main() {}
