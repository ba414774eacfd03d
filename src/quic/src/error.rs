//! What can go wrong, sorted by whose fault it is.

use bytes::{Bytes, BytesMut};
use quinn_proto::ConnectionError;

/// A datagram whose connection id belongs to another core: nothing was done with it.
#[derive(Debug)]
pub struct Misrouted {
    /// The core that owns it.
    pub core: u16,
    /// The datagram, untouched, to be forwarded.
    pub payload: BytesMut,
}

/// A connection could not be started. Nothing was sent and no connection exists.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server's name is not a DNS name or an IP address.
    #[error("\"{0}\" is not a server name")]
    InvalidServerName(String),
    /// The address cannot be connected to (port 0, wrong family).
    #[error("cannot connect to {0}")]
    InvalidAddress(std::net::SocketAddr),
    /// As many connections exist as [`crate::Limits::connections`] allows.
    #[error("{0} connections exist already, which is the limit")]
    TooManyConnections(usize),
    /// The transport refuses for another reason.
    #[error("the transport refused: {0}")]
    Refused(String),
}

/// An operation on a stream did not take place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The connection is gone, or was closed.
    #[error("the connection is closed")]
    ConnectionClosed,
    /// The stream does not exist (any more) in that direction.
    #[error("the stream is closed")]
    Closed,
    /// The peer gave the stream up with this code.
    #[error("the peer reset or stopped the stream with code {0}")]
    Peer(u64),
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The peer's application closed it.
    #[error("closed by the peer's application with code {code}: {}", String::from_utf8_lossy(.reason))]
    Application {
        /// The peer's application error code.
        code: u64,
        /// The peer's words, unchecked.
        reason: Bytes,
    },
    /// The peer's transport, or its TLS stack, closed it.
    #[error("closed by the peer's transport: {0}")]
    PeerTransport(String),
    /// The peer broke the protocol, or its certificate was not accepted.
    #[error("closed by our transport: {0}")]
    Transport(String),
    /// The peer has forgotten the connection, as after a restart.
    #[error("reset by the peer")]
    Reset,
    /// Nothing was heard for the idle timeout.
    #[error("timed out")]
    TimedOut,
    /// The handshake did not end in time.
    #[error("the handshake did not end in time")]
    HandshakeTimeout,
}

impl From<ConnectionError> for CloseReason {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::Application {
                code: close.error_code.into_inner(),
                reason: close.reason,
            },
            ConnectionError::ConnectionClosed(close) => Self::PeerTransport(close.to_string()),
            ConnectionError::Reset => Self::Reset,
            ConnectionError::TimedOut => Self::TimedOut,
            other => Self::Transport(other.to_string()),
        }
    }
}
