//! QUIC application error codes with which a node closes a connection (RFC 9000, section 20.2). The numbers are stable.

/// The connection is closed in good order.
pub const NONE: u32 = 0;
/// The peer sent what cannot be read as frames; what follows cannot be trusted.
pub const PROTOCOL: u32 = 1;
/// The peer's certificate names nobody this node serves.
pub const UNAUTHORIZED: u32 = 2;
/// The peer did not say `Hello`, or did not finish what it began, in time.
pub const TIMEOUT: u32 = 3;
/// The node is stopping. Every request it had read is answered and its reply acknowledged: what is unanswered was not executed.
pub const SHUTTING_DOWN: u32 = 4;
/// The peer speaks another major version of the protocol.
pub const VERSION: u32 = 5;
/// The peer has left more bytes of unfinished requests here than any other when they became too many.
pub const UNFINISHED: u32 = 6;
/// The node has stopped before every request was answered and every reply acknowledged: an unanswered write is in doubt.
pub const STOPPED: u32 = 7;
/// The peer left too much of what it was answered unread.
pub const UNREAD: u32 = 8;
/// A node said to be another one, or of another cluster or core, than it was taken for.
pub const WRONG_NODE: u32 = 9;
/// The peer's address has as many connections already as one address may have.
pub const CROWDED: u32 = 10;

/// Every code with its name, in order.
pub const ALL: &[(u32, &str)] = &[
    (NONE, "none"),
    (PROTOCOL, "protocol"),
    (UNAUTHORIZED, "unauthorized"),
    (TIMEOUT, "timeout"),
    (SHUTTING_DOWN, "shutting down"),
    (VERSION, "version"),
    (UNFINISHED, "unfinished"),
    (STOPPED, "stopped"),
    (UNREAD, "unread"),
    (WRONG_NODE, "wrong node"),
    (CROWDED, "crowded"),
];
