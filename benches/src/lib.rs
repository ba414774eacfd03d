//! Criterion benchmarks of the engine, the codec and the QUIC driver; here is what they share.

pub mod engine;
