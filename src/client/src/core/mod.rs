//! The client without its sockets: routing, fetching of the map, unanswered requests, retries, sessions and the
//! sorting of errors.
//!
//! Everything here is a state machine that takes time and randomness as arguments and says what to do next. It reads no clock,
//! starts no task and opens no socket, and it compiles without tokio (`default-features = false`), so that the simulator
//! drives the same decisions as the real front. Time is a [`std::time::Duration`] since an origin of the caller's.
//!
//! Invariants:
//! - A request whose fate is unknown is never sent again outside a session ([`retry::Attempts`]).
//! - A routing hint is replaced only by one of a higher (epoch, term) ([`routing::Routes`]).
//! - A reply finds the request it was sent for or nobody: request ids are not used twice ([`pending::Pending`]).

pub mod breaker;
pub mod choice;
pub mod consistency;
pub mod error;
pub mod hedge;
pub mod load;
pub mod metrics;
pub mod pending;
pub mod refresh;
pub mod reply;
pub mod retry;
pub mod routing;
pub mod session;
