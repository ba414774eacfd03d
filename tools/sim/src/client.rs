//! A client made of a driver and a decoder: it sends what a test says, well formed or not, and keeps what comes back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use generation_node::env::Datagram;
use generation_proto::options::Moved;
use generation_proto::reply::ReplyMeta;
use generation_proto::request::Hello;
use generation_proto::{Decoder, Frame, Limits, MAJOR, MINOR, Operation, Reply, Request, RequestOptions, Side};
use generation_quic::{
    ClientCrypto, CloseReason, ConnectTarget, ConnectionKey, Driver, DriverConfig, Event, Read, StreamError, StreamId,
};

use crate::pki::SERVER_NAME;

/// A reply a client received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The fixed part.
    pub meta: ReplyMeta,
    /// Milliseconds to wait before trying again.
    pub retry_after_ms: Option<u32>,
    /// When the entry expires, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<u64>,
    /// Age of what was read, in milliseconds.
    pub age_ms: Option<u32>,
    /// Who leads the shard instead.
    pub moved: Option<Moved>,
    /// What the node says to a person.
    pub message: Option<String>,
    /// The body.
    pub body: Bytes,
}

#[derive(Debug)]
struct Stream {
    decoder: Decoder,
    unsent: BytesMut,
    /// Whether what arrives is read.
    reading: bool,
    ended: bool,
}

/// A simulated client. One driver, any number of connections.
#[derive(Debug)]
pub struct Client {
    addr: SocketAddr,
    driver: Driver,
    crypto: ClientCrypto,
    connected: Vec<ConnectionKey>,
    closed: BTreeMap<ConnectionKey, CloseReason>,
    streams: BTreeMap<(ConnectionKey, StreamId), Stream>,
    responses: BTreeMap<(ConnectionKey, u64), Response>,
    next_id: u64,
    /// Whether anything was asked of it since its last turn.
    touched: bool,
}

impl Client {
    pub(crate) fn new(addr: SocketAddr, seed: [u8; 32], limits: generation_quic::Limits, crypto: ClientCrypto) -> Self {
        let driver = Driver::new(DriverConfig {
            core: 0,
            cores: 1,
            seed,
            secret: seed,
            server: None,
            mtu_discovery: true,
            limits,
        });
        Self {
            addr,
            driver,
            crypto,
            connected: Vec::new(),
            closed: BTreeMap::new(),
            streams: BTreeMap::new(),
            responses: BTreeMap::new(),
            next_id: 0,
            touched: false,
        }
    }

    /// Its address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its driver, for what this type does not offer.
    pub fn driver(&mut self) -> &mut Driver {
        self.touched = true;
        &mut self.driver
    }

    /// Begins a connection to a core of the node at `remote`.
    ///
    /// # Panics
    /// When the client's own limits do not allow it.
    pub fn connect(&mut self, now: Instant, remote: SocketAddr, core: u8) -> ConnectionKey {
        let target = ConnectTarget {
            remote,
            server_name: SERVER_NAME.to_owned(),
            core: Some(core),
            crypto: self.crypto.clone(),
        };
        self.touched = true;
        self.driver.connect(now, &target).expect("within the client's limits")
    }

    /// Whether the handshake of a connection is complete.
    pub fn is_connected(&self, key: ConnectionKey) -> bool {
        self.connected.contains(&key)
    }

    /// Why a connection ended, if it has.
    pub fn closed(&self, key: ConnectionKey) -> Option<&CloseReason> {
        self.closed.get(&key)
    }

    /// Gives a connection up.
    pub fn close(&mut self, now: Instant, key: ConnectionKey) {
        self.touched = true;
        self.driver.close(now, key, 0, "");
        self.streams.retain(|(of, _), _| *of != key);
        self.responses.retain(|(of, _), _| *of != key);
        self.connected.retain(|of| *of != key);
        self.closed.remove(&key);
    }

    /// Opens a stream, unless the node allows no more.
    pub fn open(&mut self, key: ConnectionKey) -> Option<StreamId> {
        let stream = self.driver.open(key)?;
        self.streams.insert(
            (key, stream),
            Stream {
                decoder: Decoder::new(Side::Client, Limits::default().max_frame_len()),
                unsent: BytesMut::new(),
                reading: true,
                ended: false,
            },
        );
        Some(stream)
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, key: ConnectionKey, stream: StreamId, bytes: &[u8]) {
        self.touched = true;
        if let Some(stream) = self.streams.get_mut(&(key, stream)) {
            stream.unsent.extend_from_slice(bytes);
        }
    }

    /// Sends a request; returns its id.
    pub fn send(
        &mut self,
        key: ConnectionKey,
        stream: StreamId,
        operation: Operation<'_>,
        options: RequestOptions,
    ) -> u64 {
        self.next_id += 1;
        let mut bytes = BytesMut::new();
        Request {
            id: self.next_id,
            options,
            operation,
        }
        .encode(&mut bytes);
        self.send_raw(key, stream, &bytes);
        self.next_id
    }

    /// Sends `Hello`; returns its id.
    pub fn hello(&mut self, key: ConnectionKey, stream: StreamId) -> u64 {
        let hello = Hello {
            major: MAJOR,
            minor: MINOR,
            name: "sim",
        };
        self.send(key, stream, Operation::Hello(hello), RequestOptions::default())
    }

    /// Ends a stream's requests.
    pub fn finish(&mut self, key: ConnectionKey, stream: StreamId) {
        self.touched = true;
        // A stream the node has given up needs no end.
        let _ = self.driver.finish(key, stream);
    }

    /// Whether a stream's replies are over, in whatever way.
    pub fn has_ended(&self, key: ConnectionKey, stream: StreamId) -> bool {
        self.streams.get(&(key, stream)).is_none_or(|stream| stream.ended)
    }

    /// Reads a stream from now on, or no longer.
    pub fn set_reading(&mut self, key: ConnectionKey, stream: StreamId, reading: bool) {
        self.touched = true;
        if let Some(stream) = self.streams.get_mut(&(key, stream)) {
            stream.reading = reading;
        }
    }

    /// Bytes of requests the transport has not taken.
    pub fn unsent(&self, key: ConnectionKey, stream: StreamId) -> usize {
        self.streams.get(&(key, stream)).map_or(0, |stream| stream.unsent.len())
    }

    /// The response to a request, once it is there.
    pub fn response(&mut self, key: ConnectionKey, id: u64) -> Option<Response> {
        self.responses.remove(&(key, id))
    }

    /// How many responses have not been asked for.
    pub fn responses(&self) -> usize {
        self.responses.len()
    }

    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.driver.next_timeout()
    }

    /// Whether a turn without anything new would do something.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.touched || self.next_timeout().is_some_and(|at| at <= now)
    }

    /// Takes in what has arrived, reads, writes, and gives what is to be sent to `send`.
    pub(crate) fn turn(&mut self, now: Instant, arrived: Vec<Datagram>, mut send: impl FnMut(SocketAddr, &[u8])) {
        self.touched = false;
        for datagram in arrived {
            let result =
                self.driver
                    .handle_datagram(now, datagram.remote, datagram.local_ip, datagram.ecn, datagram.payload);
            debug_assert!(result.is_ok(), "a client has one core");
        }
        self.driver.handle_timeout(now);
        while let Some((key, event)) = self.driver.poll_event() {
            match event {
                Event::Connected => self.connected.push(key),
                Event::Closed(reason) => {
                    self.closed.insert(key, reason);
                }
                _ => {}
            }
        }
        let mut buffer = Vec::new();
        for (&(key, id), stream) in &mut self.streams {
            if !stream.unsent.is_empty() {
                match self.driver.write_slice(key, id, &stream.unsent) {
                    Ok(written) => drop(stream.unsent.split_to(written.bytes)),
                    Err(StreamError::ConnectionClosed | StreamError::Closed | StreamError::Peer(_)) => {
                        stream.unsent.clear();
                    }
                }
            }
            if !stream.reading || stream.ended {
                continue;
            }
            let (decoder, responses) = (&mut stream.decoder, &mut self.responses);
            let outcome = self.driver.read(key, id, usize::MAX, |chunk| {
                decoder.feed(chunk);
                while let Ok(Some(frame)) = decoder.next_frame() {
                    responses.insert((key, frame.request_id), response(&frame));
                }
            });
            stream.ended = !matches!(outcome, Ok(Read::Blocked | Read::Limit));
        }
        while let Some(transmit) = self.driver.poll_transmit(now, &mut buffer) {
            for datagram in buffer.chunks(transmit.segment_size.unwrap_or(buffer.len()).max(1)) {
                send(transmit.remote, datagram);
            }
        }
    }
}

fn response(frame: &Frame) -> Response {
    let reply = Reply::decode(frame).expect("a node's reply can be read");
    Response {
        meta: reply.meta,
        retry_after_ms: reply.options.retry_after_ms,
        expires_at_ms: reply.options.expires_at_ms,
        age_ms: reply.options.age_ms,
        moved: reply.options.moved,
        message: reply.options.message.map(str::to_owned),
        body: Bytes::copy_from_slice(reply.body),
    }
}
