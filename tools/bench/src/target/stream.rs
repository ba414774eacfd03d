//! Request and reply over TCP or TLS streams: the part that redis and memcached share.
//!
//! Owns the sockets, the buffers and the order of replies; a [`StreamProtocol`] owns the bytes. Replies
//! come in the order of requests on each stream. A lost stream ends the run.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Events, Interest, Poll};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::{CONNECT_TIMEOUT, Completion, Outcome, Request, Target, TargetError, Token};

/// What a stream still has to bring for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Replies still to come.
    pub replies: u32,
    /// Hits among those that came.
    pub hits: u32,
    /// Misses among those that came.
    pub misses: u32,
    /// Whether the request reads several keys.
    pub multi: bool,
}

impl Expected {
    /// One reply.
    pub const ONE: Self = Self {
        replies: 1,
        hits: 0,
        misses: 0,
        multi: false,
    };
}

/// The bytes of one protocol whose replies come in order.
pub trait StreamProtocol: Send {
    /// Appends a request and says what will come back.
    ///
    /// # Errors
    /// The name of an operation the protocol does not have.
    fn encode(&mut self, request: &Request<'_>, out: &mut Vec<u8>) -> Result<Expected, &'static str>;

    /// One reply from the head of `bytes` with its length, or `None` if it is not all there.
    ///
    /// # Errors
    /// A description of bytes that cannot be a reply.
    fn decode(&mut self, bytes: &[u8]) -> Result<Option<(usize, Outcome)>, String>;
}

/// What a TLS session is opened with: the configuration, and the name in the server's certificate if it is not its address.
pub type Tls = (Arc<ClientConfig>, Option<String>);

/// Bytes read from a socket at once.
const READ_BYTES: usize = 64 * 1024;
/// A reply longer than this is taken for garbage.
const MAX_REPLY_BYTES: usize = 64 * 1024 * 1024;

struct Connection {
    addr: SocketAddr,
    stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
    /// Bytes to send, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// Bytes received and not yet decoded: `start..end`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    expected: VecDeque<(Token, usize, Expected)>,
    dirty: bool,
    /// Whether anything has ever come back.
    answered: bool,
}

/// Streams to one server, or to the masters of a cluster.
pub struct StreamTarget<P> {
    name: String,
    protocol: P,
    poll: Poll,
    events: Events,
    ready: Vec<usize>,
    connections: Vec<Connection>,
    dirty: Vec<usize>,
}

impl<P: StreamProtocol> StreamTarget<P> {
    /// Opens one stream to each of `addrs`, over TLS when given a configuration.
    pub fn connect(name: &str, addrs: &[SocketAddr], tls: Option<&Tls>, protocol: P) -> Result<Self, TargetError> {
        let poll = Poll::new().map_err(TargetError::Loop)?;
        let mut connections = Vec::with_capacity(addrs.len());
        for (index, addr) in addrs.iter().enumerate() {
            let mut connection = open(name, *addr, tls)?;
            poll.registry()
                .register(
                    &mut connection.stream,
                    mio::Token(index),
                    Interest::READABLE | Interest::WRITABLE,
                )
                .map_err(TargetError::Loop)?;
            connections.push(connection);
        }
        Ok(Self {
            name: name.to_owned(),
            protocol,
            poll,
            events: Events::with_capacity(1_024),
            ready: Vec::new(),
            connections,
            dirty: Vec::new(),
        })
    }

    /// The protocol, for what it learned from replies.
    pub fn protocol_mut(&mut self) -> &mut P {
        &mut self.protocol
    }

    /// Encodes a request on a stream; `logical` is the connection that the completion names.
    pub fn submit_on(
        &mut self,
        stream: usize,
        logical: usize,
        token: Token,
        request: &Request<'_>,
    ) -> Result<(), TargetError> {
        let connection = &mut self.connections[stream];
        let expected = self
            .protocol
            .encode(request, &mut connection.out)
            .map_err(|operation| TargetError::Unsupported {
                name: self.name.clone(),
                operation,
            })?;
        connection.expected.push_back((token, logical, expected));
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(stream);
        }
        Ok(())
    }

    fn lost(&self, index: usize, error: &io::Error) -> TargetError {
        let connection = &self.connections[index];
        let hint = if connection.answered || connection.tls.is_some() {
            ""
        } else {
            "; it never answered: does this port want TLS (--ca)?"
        };
        TargetError::Lost {
            name: self.name.clone(),
            addr: connection.addr,
            message: format!("{error}{hint}"),
        }
    }

    /// Reads and decodes all that has arrived on one stream.
    fn receive(&mut self, index: usize, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        loop {
            let connection = &mut self.connections[index];
            let drained = match connection.read() {
                Ok(Received::Closed) => {
                    let closed = io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection");
                    return Err(self.lost(index, &closed));
                }
                Ok(Received::Data { drained }) => drained,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.lost(index, &error)),
            };
            connection
                .decode(&mut self.protocol, completions)
                .map_err(|message| TargetError::Protocol {
                    name: self.name.clone(),
                    addr: connection.addr,
                    message,
                })?;
            if drained {
                return Ok(());
            }
        }
    }
}

impl<P: StreamProtocol> Target for StreamTarget<P> {
    fn connections(&self) -> usize {
        self.connections.len()
    }

    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError> {
        self.submit_on(connection, connection, token, request)
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        while let Some(index) = self.dirty.pop() {
            let connection = &mut self.connections[index];
            connection.dirty = false;
            if let Err(error) = connection.write() {
                // The stream's end is seen and accounted by the next poll; only a failed event loop is worse.
                connection.out.clear();
                connection.sent = 0;
                if error.kind() != io::ErrorKind::BrokenPipe && error.kind() != io::ErrorKind::ConnectionReset {
                    return Err(TargetError::Lost {
                        name: self.name.clone(),
                        addr: connection.addr,
                        message: error.to_string(),
                    });
                }
            }
        }
        Ok(())
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        match self.poll.poll(&mut self.events, Some(wait)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(TargetError::Loop(error)),
        }
        self.ready.clear();
        for event in &self.events {
            let index = event.token().0;
            if event.is_writable() && self.connections[index].has_output() && !self.connections[index].dirty {
                self.connections[index].dirty = true;
                self.dirty.push(index);
            }
            if event.is_readable() || event.is_error() || event.is_read_closed() {
                self.ready.push(index);
            }
        }
        for at in 0..self.ready.len() {
            self.receive(self.ready[at], completions)?;
        }
        if !self.dirty.is_empty() {
            self.flush()?;
        }
        Ok(())
    }
}

/// What one read of a socket brought.
enum Received {
    /// The other end has closed.
    Closed,
    /// Bytes; `drained` when nothing more can be waiting.
    Data { drained: bool },
}

impl Connection {
    /// Reads once into the free part of the input buffer, which it grows when a reply does not fit.
    fn read(&mut self) -> io::Result<Received> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.end < READ_BYTES / 4 {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.input.len() - self.end < READ_BYTES / 4 {
            self.input.resize(self.input.len() * 2, 0);
        }
        let free = &mut self.input[self.end..];
        let (read, drained) = match &mut self.tls {
            None => {
                let read = self.stream.read(free)?;
                (read, read < free.len())
            }
            Some(tls) => loop {
                match tls.reader().read(free) {
                    Ok(read) => break (read, false),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                if tls.read_tls(&mut self.stream)? == 0 {
                    break (0, true);
                }
                tls.process_new_packets()
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            },
        };
        self.end += read;
        self.answered |= read > 0;
        Ok(if read == 0 {
            Received::Closed
        } else {
            Received::Data { drained }
        })
    }

    /// Decodes every whole reply in the input buffer.
    fn decode<P: StreamProtocol>(&mut self, protocol: &mut P, completions: &mut Vec<Completion>) -> Result<(), String> {
        while self.start < self.end {
            let Some((length, outcome)) = protocol.decode(&self.input[self.start..self.end])? else {
                let partial = self.end - self.start;
                return if partial > MAX_REPLY_BYTES {
                    Err(format!("a reply of more than {MAX_REPLY_BYTES} bytes"))
                } else {
                    Ok(())
                };
            };
            self.start += length;
            let Some((token, logical, expected)) = self.expected.front_mut() else {
                return Err("a reply that nothing asked for".to_owned());
            };
            let outcome = if expected.multi {
                expected.fold(outcome)
            } else {
                outcome
            };
            expected.replies -= 1;
            if expected.replies == 0 {
                completions.push(Completion {
                    token: *token,
                    connection: *logical,
                    outcome,
                });
                self.expected.pop_front();
            }
        }
        Ok(())
    }

    fn has_output(&self) -> bool {
        !self.out.is_empty() || self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Writes as much as the socket takes.
    fn write(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            while self.sent < self.out.len() {
                match self.stream.write(&self.out[self.sent..]) {
                    Ok(written) => self.sent += written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.out.clear();
            self.sent = 0;
            return Ok(());
        };
        tls.writer().write_all(&self.out)?;
        self.out.clear();
        while tls.wants_write() {
            match tls.write_tls(&mut self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Expected {
    /// Accounts one of several replies; the last one's return value stands for the request.
    fn fold(&mut self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Hit { .. } => self.hits += 1,
            Outcome::Miss => self.misses += 1,
            other => return other,
        }
        Outcome::Multi {
            hits: self.hits,
            misses: self.misses,
        }
    }
}

/// Opens one stream for requests and replies.
fn open(name: &str, addr: SocketAddr, tls: Option<&Tls>) -> Result<Connection, TargetError> {
    let (stream, tls) = dial(name, addr, tls)?;
    Ok(Connection {
        addr,
        stream,
        tls,
        out: Vec::with_capacity(READ_BYTES),
        sent: 0,
        input: vec![0; READ_BYTES],
        start: 0,
        end: 0,
        expected: VecDeque::new(),
        dirty: false,
        answered: false,
    })
}

/// Connects a socket and finishes its TLS handshake; blocks up to [`CONNECT_TIMEOUT`]. The socket does not block from then on.
pub(super) fn dial(
    name: &str,
    addr: SocketAddr,
    tls: Option<&Tls>,
) -> Result<(TcpStream, Option<Box<ClientConnection>>), TargetError> {
    let unreachable = |error: io::Error| TargetError::Unreachable {
        name: name.to_owned(),
        addr,
        message: error.to_string(),
    };
    let mut stream = std::net::TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT).map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    let session = match tls {
        None => None,
        Some((config, server_name)) => {
            let failed = |message: String| TargetError::Tls {
                name: name.to_owned(),
                addr,
                message: describe_tls(message),
            };
            let server_name = match server_name {
                Some(host) => ServerName::try_from(host.clone()).map_err(|error| failed(error.to_string()))?,
                None => ServerName::IpAddress(addr.ip().into()),
            };
            let mut session =
                ClientConnection::new(Arc::clone(config), server_name).map_err(|error| failed(error.to_string()))?;
            session.set_buffer_limit(None);
            stream.set_read_timeout(Some(CONNECT_TIMEOUT)).map_err(unreachable)?;
            stream.set_write_timeout(Some(CONNECT_TIMEOUT)).map_err(unreachable)?;
            while session.is_handshaking() {
                session.complete_io(&mut stream).map_err(|error| {
                    failed(match error.kind() {
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                            format!("nothing came back within {CONNECT_TIMEOUT:?}; does it speak TLS at this port?")
                        }
                        _ => error.to_string(),
                    })
                })?;
            }
            Some(Box::new(session))
        }
    };
    stream.set_nonblocking(true).map_err(unreachable)?;
    Ok((TcpStream::from_std(stream), session))
}

/// Adds what to do about the handshake failures that users meet.
fn describe_tls(message: String) -> String {
    if message.contains("UnknownIssuer") || message.contains("BadSignature") {
        format!("{message}; the server's certificate is not signed by the authority given with --ca")
    } else if message.contains("NotValidForName") {
        format!("{message}; pass the name in the server's certificate with --server-name")
    } else {
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_replies_fold_into_one_outcome() {
        let mut expected = Expected {
            replies: 3,
            multi: true,
            ..Expected::ONE
        };
        expected.fold(Outcome::Hit { version: 0 });
        expected.fold(Outcome::Miss);
        assert_eq!(
            expected.fold(Outcome::Hit { version: 0 }),
            Outcome::Multi { hits: 2, misses: 1 }
        );
    }
}
