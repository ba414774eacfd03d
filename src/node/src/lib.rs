//! One Generation node, generic over its environment.

pub mod env;
pub mod mesh;
