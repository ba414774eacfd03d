//! Deterministic simulator of Generation nodes.
