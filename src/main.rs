//! The `postbox` program.
fn main() {}
