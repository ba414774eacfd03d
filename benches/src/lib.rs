//! Criterion benchmarks of the engine, the codec and the QUIC driver.
