//! The UDP port of a node: one socket per core on one address, and the kernel program that steers datagrams among them.

pub mod port;
pub mod steering;
