//! ax-vmm

fn main() {}
