//! The native Rust client of Generation.
