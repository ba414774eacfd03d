//! Deterministic simulator of Generation nodes: the real node over an [`Env`](generation_node::env::Env) made of memory.
//!
//! Everything runs in one thread on virtual time. The network delays, loses and reorders datagrams by a seeded generator; the
//! mesh between cores is a bounded queue; the clock moves only when nothing is left to do at the present moment. One seed is one
//! run: [`Sim::trace`] hashes when which datagram of which size went where, and two runs of a seed have the same.
//!
//! What is not simulated: the bytes of the TLS handshake (its keys come from the operating system), which no one looks at.

pub mod check;
mod client;
mod clock;
mod dice;
mod disk;
mod env;
mod executor;
mod group;
pub mod history;
#[cfg(feature = "mutants")]
pub mod mutants;
mod network;
mod observer;
mod pki;
mod points;
pub mod runner;
pub mod scenario;
mod sim;
mod workload;
mod world;

pub use client::{Client, Response};
pub use dice::Dice;
pub use disk::{DiskImage, DiskWeather, SimDisk, SimFile};
pub use env::SimEnv;
pub use group::GroupSetup;
pub use network::{Host, Weather};
pub use pki::{Authority, ClientIdentity};
pub use points::{Ambush, Kill, Strike};
pub use sim::{NodeSetup, Sim};
pub use workload::{Counts, Workload, WorkloadSetup};
pub use world::Counters;
