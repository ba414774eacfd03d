//! Sans-IO QUIC: datagrams and time in, datagrams and stream events out.
//!
//! [`Driver`] owns everything one core needs of QUIC: quinn-proto's endpoint, its connections, one timer heap, and the list of
//! connections that have something to say or to send. It is the server side (mutual TLS, address validation under load, limits)
//! and the client side (a connection to a chosen core of a peer) of the same socket.
//!
//! Invariants:
//! - Every connection id this endpoint issues begins with its core ([`steer`]), followed by [`cid::RANDOM_BYTES`] unpredictable
//!   bytes, so that a datagram finds its core whatever address it came from.
//! - A [`ConnectionKey`] names one connection for ever: after that connection is gone, calls with its key do nothing.
//! - Nothing is sent between turns: a caller feeds what has arrived, reads and writes streams, and then asks
//!   [`Driver::poll_transmit`] once for all dirty connections, so that one turn costs a connection one train of datagrams.
//! - All memory a peer can make this crate hold is bounded by [`Limits`].
//!
//! Not here: sockets, clocks, tasks, and any knowledge of what flows over the streams. Randomness comes from the seed in
//! [`DriverConfig`] (TLS key shares come from the TLS provider).

pub mod cid;
mod config;
mod driver;
mod error;
pub mod steer;
mod timers;
mod tls;
mod trains;

pub use config::{DriverConfig, Limits};
pub use driver::{ConnectTarget, ConnectionKey, Driver, DriverStats, Event, Read, Transmit, Written};
pub use error::{CloseReason, ConnectError, Misrouted, StreamError};
pub use quinn_proto::StreamId;
pub use tls::{ClientCrypto, ServerCrypto, TlsError};
