//! Property tests of the whole shard against a plain reference.

mod model;
mod operations;
