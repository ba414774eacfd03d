//! Property tests of the whole shard against a plain reference.

mod bulk;
mod model;
mod operations;
