//! Generation.
fn main() {}
