//! The driver: endpoint, connections, timers and the lists of what is to be done.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, EcnCodepoint, Endpoint, EndpointEvent, FinishError,
    Incoming, ReadError, ServerConfig, Side, StreamEvent, StreamId, TransportConfig, VarInt, WriteError,
};
use rand::rngs::StdRng;
use rustls::pki_types::CertificateDer;

use crate::cid;
use crate::config::{self, DriverConfig, Limits, MAX_TRAIN_BYTES, UnixTime};
use crate::error::{CloseReason, ConnectError, Misrouted, StreamError};
use crate::steer;
use crate::timers::Timers;
use crate::tls::{ClientCrypto, ServerCrypto};
use crate::trains::Trains;

/// Answers of the endpoint itself (Retry, refusals, version negotiation, resets) that may wait to be sent. Under a flood more are
/// dropped: their senders ask again.
const MAX_RESPONSES: usize = 256;

/// Names one connection of one driver, for ever: keys are not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    slot: u32,
    generation: u32,
}

impl ConnectionKey {
    /// A small number no two connections alive at the same time share: an index for the caller's own tables.
    pub fn slot(self) -> usize {
        self.slot as usize
    }
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The handshake is complete, the peer's certificate accepted.
    Connected,
    /// The peer opened this bidirectional stream; it may be readable.
    Opened(StreamId),
    /// The stream has data, or has ended or was reset: read it until it blocks.
    Readable(StreamId),
    /// A stream on which a write was cut short may take more now.
    Writable(StreamId),
    /// All that was written on a finished stream has been acknowledged.
    Finished(StreamId),
    /// The peer does not want more of what is written on this stream.
    Stopped(StreamId, u64),
    /// Streams can be opened again after [`Driver::open`] gave none.
    Available,
    /// The connection is over. The last event of a connection. A connection closed by [`Driver::close`] has none.
    Closed(CloseReason),
}

/// How a read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Nothing more has arrived; [`Event::Readable`] will say when it has.
    Blocked,
    /// The limit of this call was reached; there may be more.
    Limit,
    /// The peer has finished the stream.
    Finished,
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes taken.
    pub bytes: usize,
    /// Whether all was taken. If not, [`Event::Writable`] will say when to go on.
    pub complete: bool,
}

/// Where and how a buffer of datagrams goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Destination of every datagram.
    pub remote: SocketAddr,
    /// The local address to send from, if known.
    pub local_ip: Option<IpAddr>,
    /// The two ECN bits of the IP header.
    pub ecn: u8,
    /// `Some(n)`: the buffer is a train of datagrams of `n` bytes, the last may be shorter. `None`: one datagram.
    pub segment_size: Option<usize>,
}

/// Whom to connect to.
#[derive(Debug, Clone)]
pub struct ConnectTarget {
    /// Address of the server's port.
    pub remote: SocketAddr,
    /// Name its certificate is checked against.
    pub server_name: String,
    /// The server's core that shall hold the connection, if it matters.
    pub core: Option<u8>,
    /// TLS with our own certificate.
    pub crypto: ClientCrypto,
}

/// Counters since the driver's birth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DriverStats {
    /// Datagrams handed in.
    pub datagrams_received: u64,
    /// Datagrams of other cores, given back.
    pub misrouted: u64,
    /// Connections accepted, whether or not their handshake ended well.
    pub accepted: u64,
    /// Handshakes completed, in either role.
    pub connected: u64,
    /// Attempts told to prove their address first.
    pub retried: u64,
    /// Attempts refused with an answer: the driver is closing, or holds as many connections as it may.
    pub refused: u64,
    /// Attempts not answered: too many handshakes under way, or a malformed first packet.
    pub ignored: u64,
    /// Handshakes given up because they took too long.
    pub handshake_timeouts: u64,
    /// Connections that ended for a reason of the peer's or the network's.
    pub lost: u64,
    /// Endpoint answers dropped because too many were waiting.
    pub responses_dropped: u64,
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "membership in two lists and three points passed once, all independent"
)]
struct Slot {
    connection: Connection,
    generation: u32,
    /// Set until the handshake ends.
    handshake_deadline: Option<Instant>,
    accepted: bool,
    /// In `ready`: may have events.
    ready: bool,
    /// In `dirty`: may have something to send.
    dirty: bool,
    /// `Event::Closed` was given, or the caller closed it.
    over: bool,
    /// `Event::Connected` was given: stream events may follow.
    connected: bool,
    /// The driver itself closed it; the caller has yet to hear of it.
    closing: Option<CloseReason>,
    /// The connection has nothing left to say; its slot goes as soon as its last event is given.
    drained: bool,
}

/// One core's QUIC. See the crate's documentation.
///
/// A turn: [`handle_datagram`](Self::handle_datagram) for each that arrived and [`handle_timeout`](Self::handle_timeout), then
/// [`poll_event`](Self::poll_event) until `None` with reads and writes in between, then
/// [`poll_transmit`](Self::poll_transmit) until `None`, then wait for a datagram or [`next_timeout`](Self::next_timeout).
pub struct Driver {
    endpoint: Endpoint,
    slots: Vec<Option<Box<Slot>>>,
    timers: Timers,
    ready: VecDeque<u32>,
    dirty: VecDeque<u32>,
    responses: VecDeque<(Transmit, Vec<u8>)>,
    trains: Trains,
    scratch: Vec<u8>,
    config: DriverConfig,
    /// For peers on other machines, and on this one.
    transports: [Arc<TransportConfig>; 2],
    servers: Option<[Arc<ServerConfig>; 2]>,
    clock: Arc<UnixTime>,
    rng: Arc<Mutex<StdRng>>,
    connections: usize,
    handshakes: usize,
    generation: u32,
    refusing: bool,
    stats: DriverStats,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("core", &self.config.core)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// A driver without connections.
    ///
    /// # Panics
    /// When `config.core` is not below `config.cores` or not below 256, or the idle timeout is beyond 2^62 ms.
    pub fn new(config: DriverConfig) -> Self {
        assert!(
            config.core < config.cores && config.core < 256,
            "core {} of {}",
            config.core,
            config.cores
        );
        let rng = cid::generator(config.seed);
        let transport = |loopback| config::transport(&config.limits, config.mtu_discovery, loopback);
        let transports = [transport(false), transport(true)];
        let clock = Arc::new(UnixTime::default());
        let servers = config.server.as_ref().map(|crypto| {
            transports
                .each_ref()
                .map(|transport| config::server(crypto, &config, transport, &clock))
        });
        let first = servers.as_ref().map(|[network, _]| Arc::clone(network));
        let endpoint = Endpoint::new(config::endpoint(&config, &rng), first, config.mtu_discovery, None);
        Self {
            endpoint,
            slots: Vec::new(),
            timers: Timers::default(),
            ready: VecDeque::new(),
            dirty: VecDeque::new(),
            responses: VecDeque::new(),
            trains: Trains::default(),
            scratch: Vec::new(),
            config,
            transports,
            servers,
            clock,
            rng,
            connections: 0,
            handshakes: 0,
            generation: 0,
            refusing: false,
            stats: DriverStats::default(),
        }
    }

    /// Tells the wall clock, for the age of address validation tokens. Once a turn is plenty.
    pub fn set_unix_ms(&mut self, unix_ms: u64) {
        self.clock.set_ms(unix_ms);
    }

    /// Replaces the TLS configuration of connections accepted from now on (renewed certificates).
    pub fn set_server_crypto(&mut self, crypto: ServerCrypto) {
        let servers = self
            .transports
            .each_ref()
            .map(|transport| config::server(&crypto, &self.config, transport, &self.clock));
        self.endpoint.set_server_config(Some(Arc::clone(&servers[0])));
        self.config.server = Some(crypto);
        self.servers = Some(servers);
    }

    /// From now on refuses every new connection attempt.
    pub fn refuse_new(&mut self) {
        self.refusing = true;
    }

    /// Feeds one received UDP payload.
    ///
    /// # Errors
    /// The datagram carries the connection id of another core; it is given back to be forwarded there.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        remote: SocketAddr,
        local_ip: Option<IpAddr>,
        ecn: u8,
        payload: BytesMut,
    ) -> Result<(), Misrouted> {
        if self.config.cores > 1
            && let Some(core) = steer::core_of(&payload, self.config.cores)
            && core != self.config.core
        {
            self.stats.misrouted += 1;
            return Err(Misrouted { core, payload });
        }
        self.stats.datagrams_received += 1;
        let mut buffer = std::mem::take(&mut self.scratch);
        buffer.clear();
        match self.endpoint.handle(
            now,
            remote,
            local_ip,
            EcnCodepoint::from_bits(ecn),
            payload,
            &mut buffer,
        ) {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if let Some(slot) = self.slots.get_mut(handle.0).and_then(Option::as_mut) {
                    slot.connection.handle_event(event);
                    self.touch(handle.0 as u32);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.admit(now, incoming, &mut buffer),
            Some(DatagramEvent::Response(transmit)) => self.respond(&transmit, &mut buffer),
            None => {}
        }
        self.scratch = buffer;
        Ok(())
    }

    /// When [`handle_timeout`](Self::handle_timeout) is due, at the latest.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(index) = self.timers.pop_due(now) {
            let Some(slot) = self.slots[index as usize].as_mut() else {
                continue;
            };
            if slot.handshake_deadline.is_some_and(|deadline| deadline <= now) {
                slot.handshake_deadline = None;
                if slot.accepted {
                    self.handshakes -= 1;
                }
                self.stats.handshake_timeouts += 1;
                slot.connection.close(
                    now,
                    VarInt::from_u32(0),
                    Bytes::from_static(b"the handshake did not end in time"),
                );
                slot.closing = Some(CloseReason::HandshakeTimeout);
            } else if slot.connection.poll_timeout().is_some_and(|at| at <= now) {
                slot.connection.handle_timeout(now);
            } else {
                // The heap held an earlier deadline of this connection.
                self.rearm(index);
                continue;
            }
            self.touch(index);
        }
    }

    /// What happened next, if anything did. To be called until it gives `None` after datagrams or timeouts.
    pub fn poll_event(&mut self) -> Option<(ConnectionKey, Event)> {
        while let Some(&index) = self.ready.front() {
            if let Some(found) = self.poll_slot(index) {
                return Some(found);
            }
            self.ready.pop_front();
            if let Some(slot) = self.slots[index as usize].as_mut() {
                slot.ready = false;
                if slot.drained {
                    self.remove(index);
                }
            }
        }
        None
    }

    /// Starts a connection. [`Event::Connected`] or [`Event::Closed`] follows.
    pub fn connect(&mut self, now: Instant, target: &ConnectTarget) -> Result<ConnectionKey, ConnectError> {
        if self.connections >= self.config.limits.connections {
            return Err(ConnectError::TooManyConnections(self.connections));
        }
        let mut client = ClientConfig::new(Arc::clone(&target.crypto.0) as _);
        client.transport_config(Arc::clone(
            &self.transports[usize::from(target.remote.ip().is_loopback())],
        ));
        let initial = cid::initial(target.core, &self.rng);
        client.initial_dst_cid_provider(Arc::new(move || initial));
        // Tokens are not remembered between connections: servers of ours send none.
        client.token_store(Arc::new(quinn_proto::NoneTokenStore));
        let (handle, connection) = self
            .endpoint
            .connect(now, client, target.remote, &target.server_name)
            .map_err(|error| match error {
                quinn_proto::ConnectError::InvalidServerName(name) => ConnectError::InvalidServerName(name),
                quinn_proto::ConnectError::InvalidRemoteAddress(address) => ConnectError::InvalidAddress(address),
                other => ConnectError::Refused(other.to_string()),
            })?;
        Ok(self.insert(now, handle, connection, false))
    }

    /// Opens a bidirectional stream, unless the peer allows no more at present ([`Event::Available`] will say when).
    pub fn open(&mut self, key: ConnectionKey) -> Option<StreamId> {
        self.slot(key)?.connection.streams().open(Dir::Bi)
    }

    /// Which streams are sent first when several have something: those of the highest priority. 0 unless it is set.
    pub fn set_priority(&mut self, key: ConnectionKey, stream: StreamId, priority: i32) {
        if let Some(slot) = self.slot(key) {
            // A stream that is closed sends nothing.
            let _ = slot.connection.send_stream(stream).set_priority(priority);
        }
    }

    /// Reads what has arrived on a stream, in order, about `limit` bytes at most, into `sink`.
    pub fn read(
        &mut self,
        key: ConnectionKey,
        stream: StreamId,
        limit: usize,
        mut sink: impl FnMut(Bytes),
    ) -> Result<Read, StreamError> {
        let slot = self.slot(key).ok_or(StreamError::ConnectionClosed)?;
        let mut receive = slot.connection.recv_stream(stream);
        let mut chunks = receive.read(true).map_err(|_| StreamError::Closed)?;
        let mut left = limit;
        let outcome = loop {
            if left == 0 {
                break Ok(Read::Limit);
            }
            match chunks.next(left) {
                Ok(Some(chunk)) => {
                    left -= chunk.bytes.len();
                    sink(chunk.bytes);
                }
                Ok(None) => break Ok(Read::Finished),
                Err(ReadError::Blocked) => break Ok(Read::Blocked),
                Err(ReadError::Reset(code)) => break Err(StreamError::Peer(code.into_inner())),
            }
        };
        // Flow control credit that became due travels with this turn's flush.
        if chunks.finalize().should_transmit() {
            self.mark_dirty(key.slot);
        }
        outcome
    }

    /// Writes `chunks`, taken from its front as far as flow control and the send window allow; what is left in it was not taken.
    pub fn write(
        &mut self,
        key: ConnectionKey,
        stream: StreamId,
        chunks: &mut [Bytes],
    ) -> Result<Written, StreamError> {
        let mut bytes = 0;
        let mut next = 0;
        let mut blocked = false;
        let slot = self.slot(key).ok_or(StreamError::ConnectionClosed)?;
        while next < chunks.len() && !blocked {
            match slot.connection.send_stream(stream).write_chunks(&mut chunks[next..]) {
                Ok(written) => {
                    bytes += written.bytes;
                    next += written.chunks;
                }
                Err(error) => blocked = write_error(&error)?,
            }
        }
        if bytes > 0 || blocked {
            self.mark_dirty(key.slot);
        }
        Ok(Written {
            bytes,
            complete: next == chunks.len(),
        })
    }

    /// Writes a copy of `data` from its beginning, as far as flow control and the send window allow.
    pub fn write_slice(&mut self, key: ConnectionKey, stream: StreamId, data: &[u8]) -> Result<Written, StreamError> {
        let mut bytes = 0;
        let mut blocked = false;
        let slot = self.slot(key).ok_or(StreamError::ConnectionClosed)?;
        while bytes < data.len() && !blocked {
            match slot.connection.send_stream(stream).write(&data[bytes..]) {
                Ok(written) => bytes += written,
                Err(error) => blocked = write_error(&error)?,
            }
        }
        if bytes > 0 || blocked {
            self.mark_dirty(key.slot);
        }
        Ok(Written {
            bytes,
            complete: bytes == data.len(),
        })
    }

    /// Ends the sending side of a stream after what was written. [`Event::Finished`] follows when all has arrived.
    pub fn finish(&mut self, key: ConnectionKey, stream: StreamId) -> Result<(), StreamError> {
        let slot = self.slot(key).ok_or(StreamError::ConnectionClosed)?;
        match slot.connection.send_stream(stream).finish() {
            Ok(()) => {
                self.mark_dirty(key.slot);
                Ok(())
            }
            Err(FinishError::Stopped(code)) => Err(StreamError::Peer(code.into_inner())),
            Err(FinishError::ClosedStream) => Err(StreamError::Closed),
        }
    }

    /// Gives up the sending side of a stream.
    pub fn reset(&mut self, key: ConnectionKey, stream: StreamId, code: u32) {
        if let Some(slot) = self.slot(key)
            && slot
                .connection
                .send_stream(stream)
                .reset(VarInt::from_u32(code))
                .is_ok()
        {
            self.mark_dirty(key.slot);
        }
    }

    /// Gives up the receiving side of a stream: the peer is told to stop, what has arrived is discarded.
    pub fn stop(&mut self, key: ConnectionKey, stream: StreamId, code: u32) {
        if let Some(slot) = self.slot(key)
            && slot.connection.recv_stream(stream).stop(VarInt::from_u32(code)).is_ok()
        {
            self.mark_dirty(key.slot);
        }
    }

    /// Closes a connection at once; data not yet acknowledged may not arrive. No event follows.
    pub fn close(&mut self, now: Instant, key: ConnectionKey, code: u32, reason: &str) {
        if let Some(slot) = self.slot(key) {
            slot.over = true;
            slot.connection
                .close(now, VarInt::from_u32(code), Bytes::copy_from_slice(reason.as_bytes()));
            self.touch(key.slot);
        }
    }

    /// Whether all data written on any stream of the connection has been acknowledged; `true` when the connection is gone.
    pub fn is_flushed(&mut self, key: ConnectionKey) -> bool {
        self.slot(key)
            .is_none_or(|slot| slot.connection.streams().send_streams() == 0)
    }

    /// The certificates the peer presented, its own first. Empty before [`Event::Connected`] and for a peer without.
    pub fn peer_certificates(&mut self, key: ConnectionKey) -> Vec<CertificateDer<'static>> {
        self.slot(key)
            .and_then(|slot| slot.connection.crypto_session().peer_identity())
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
            .map(|certificates| *certificates)
            .unwrap_or_default()
    }

    /// The application protocol agreed on in the handshake.
    pub fn alpn(&mut self, key: ConnectionKey) -> Option<Vec<u8>> {
        let data = self.slot(key)?.connection.crypto_session().handshake_data()?;
        data.downcast::<HandshakeData>().ok()?.protocol
    }

    /// The peer's address at present.
    pub fn remote(&mut self, key: ConnectionKey) -> Option<SocketAddr> {
        Some(self.slot(key)?.connection.remote_address())
    }

    /// The largest UDP payload the path is known to carry.
    pub fn mtu(&mut self, key: ConnectionKey) -> Option<u16> {
        Some(self.slot(key)?.connection.current_mtu())
    }

    /// Whether this side opened the stream.
    pub fn is_local_stream(&mut self, key: ConnectionKey, stream: StreamId) -> bool {
        self.slot(key)
            .is_some_and(|slot| stream.initiator() == slot.connection.side())
    }

    /// Connections in any state, closing ones included.
    pub fn connections(&self) -> usize {
        self.connections
    }

    /// Whether some connection may have something to send.
    pub fn has_transmits(&self) -> bool {
        !self.dirty.is_empty() || !self.responses.is_empty() || !self.trains.is_empty()
    }

    /// Counters.
    pub fn stats(&self) -> DriverStats {
        self.stats
    }

    /// Fills `buffer` (cleared first) with the next train of datagrams to send, if there is one. Connections take turns, one
    /// train each, so that one with much to send does not hold up the others. Small datagrams of several connections to one
    /// address leave together, after everything else.
    pub fn poll_transmit(&mut self, now: Instant, buffer: &mut Vec<u8>) -> Option<Transmit> {
        buffer.clear();
        if let Some((transmit, mut response)) = self.responses.pop_front() {
            buffer.append(&mut response);
            return Some(transmit);
        }
        while let Some(index) = self.dirty.pop_front() {
            let live = self.endpoint_events(index);
            let Some(slot) = self.slots[index as usize].as_mut() else {
                continue;
            };
            if !live {
                slot.dirty = false;
                continue;
            }
            let fitting = MAX_TRAIN_BYTES / usize::from(slot.connection.current_mtu());
            let train = self.config.limits.max_train.clamp(1, fitting.max(1));
            if let Some(transmit) = slot.connection.poll_transmit(now, train, buffer) {
                buffer.truncate(transmit.size);
                self.dirty.push_back(index);
                let limit = self.config.limits.max_train;
                if let Some(transmit) = self.trains.add(from_quinn(&transmit), buffer, limit) {
                    return Some(transmit);
                }
            } else {
                slot.dirty = false;
                self.rearm(index);
            }
        }
        self.trains.next(buffer)
    }

    /// One event of one connection, or `None` when it has no more.
    fn poll_slot(&mut self, index: u32) -> Option<(ConnectionKey, Event)> {
        loop {
            let slot = self.slots[index as usize].as_mut()?;
            let key = ConnectionKey {
                slot: index,
                generation: slot.generation,
            };
            if slot.connected
                && !slot.over
                && let Some(stream) = slot.connection.streams().accept(Dir::Bi)
            {
                return Some((key, Event::Opened(stream)));
            }
            if let Some(reason) = slot.closing.take()
                && !slot.over
            {
                slot.over = true;
                return Some((key, Event::Closed(reason)));
            }
            let event = match slot.connection.poll()? {
                quinn_proto::Event::Connected => {
                    slot.connected = true;
                    if slot.handshake_deadline.take().is_some() && slot.accepted {
                        self.handshakes -= 1;
                    }
                    self.stats.connected += 1;
                    Event::Connected
                }
                quinn_proto::Event::ConnectionLost { reason } => {
                    if slot.over {
                        continue;
                    }
                    slot.over = true;
                    if slot.handshake_deadline.take().is_some() && slot.accepted {
                        self.handshakes -= 1;
                    }
                    self.stats.lost += 1;
                    Event::Closed(reason.into())
                }
                quinn_proto::Event::Stream(event) => match event {
                    StreamEvent::Readable { id } => Event::Readable(id),
                    StreamEvent::Writable { id } => Event::Writable(id),
                    StreamEvent::Finished { id } => Event::Finished(id),
                    StreamEvent::Stopped { id, error_code } => Event::Stopped(id, error_code.into_inner()),
                    StreamEvent::Available { dir: Dir::Bi } => Event::Available,
                    // Opened streams are accepted above; there are no unidirectional ones.
                    StreamEvent::Opened { .. } | StreamEvent::Available { .. } => continue,
                },
                quinn_proto::Event::HandshakeDataReady
                | quinn_proto::Event::DatagramReceived
                | quinn_proto::Event::DatagramsUnblocked => continue,
            };
            if slot.over && !matches!(event, Event::Closed(_)) {
                continue;
            }
            return Some((key, event));
        }
    }

    /// Decides about a connection attempt: accept it, ask for proof of the address, refuse or ignore it.
    fn admit(&mut self, now: Instant, incoming: Incoming, buffer: &mut Vec<u8>) {
        let limits: &Limits = &self.config.limits;
        if self.refusing || self.connections >= limits.connections {
            self.stats.refused += 1;
            let transmit = self.endpoint.refuse(incoming, buffer);
            self.respond(&transmit, buffer);
        } else if !incoming.remote_address_validated() && self.handshakes >= limits.retry_above {
            self.stats.retried += 1;
            match self.endpoint.retry(incoming, buffer) {
                Ok(transmit) => self.respond(&transmit, buffer),
                Err(error) => self.endpoint.ignore(error.into_incoming()),
            }
        } else if self.handshakes >= limits.handshakes {
            self.stats.ignored += 1;
            self.endpoint.ignore(incoming);
        } else {
            let loopback = usize::from(incoming.remote_address().ip().is_loopback());
            let server = self.servers.as_ref().map(|servers| Arc::clone(&servers[loopback]));
            match self.endpoint.accept(incoming, now, buffer, server) {
                Ok((handle, connection)) => {
                    self.stats.accepted += 1;
                    self.handshakes += 1;
                    self.insert(now, handle, connection, true);
                }
                Err(error) => {
                    self.stats.ignored += 1;
                    if let Some(transmit) = error.response {
                        self.respond(&transmit, buffer);
                    }
                }
            }
        }
    }

    fn insert(
        &mut self,
        now: Instant,
        handle: ConnectionHandle,
        connection: Connection,
        accepted: bool,
    ) -> ConnectionKey {
        debug_assert_eq!(connection.side() == Side::Server, accepted);
        let index = u32::try_from(handle.0).expect("invariant: fewer connections than 2^32");
        if self.slots.len() <= handle.0 {
            self.slots.resize_with(handle.0 + 1, || None);
        }
        self.generation = self.generation.wrapping_add(1);
        self.connections += 1;
        self.slots[handle.0] = Some(Box::new(Slot {
            connection,
            generation: self.generation,
            handshake_deadline: Some(now + self.config.limits.handshake_timeout),
            accepted,
            ready: false,
            dirty: false,
            over: false,
            connected: false,
            closing: None,
            drained: false,
        }));
        self.touch(index);
        ConnectionKey {
            slot: index,
            generation: self.generation,
        }
    }

    /// The connection `key` names, unless it is over.
    fn slot(&mut self, key: ConnectionKey) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(key.slot as usize)?.as_deref_mut()?;
        (slot.generation == key.generation && !slot.over).then_some(slot)
    }

    /// The connection may have events and something to send.
    fn touch(&mut self, index: u32) {
        if let Some(slot) = self.slots[index as usize].as_mut()
            && !slot.ready
        {
            slot.ready = true;
            self.ready.push_back(index);
        }
        self.mark_dirty(index);
    }

    fn mark_dirty(&mut self, index: u32) {
        if let Some(slot) = self.slots[index as usize].as_mut()
            && !slot.dirty
        {
            slot.dirty = true;
            self.dirty.push_back(index);
        }
    }

    /// Carries messages between a connection and the endpoint. `false` when the connection has nothing left to do.
    fn endpoint_events(&mut self, index: u32) -> bool {
        let Some(slot) = self.slots[index as usize].as_mut() else {
            return false;
        };
        while let Some(event) = slot.connection.poll_endpoint_events() {
            if event.is_drained() {
                slot.drained = true;
            } else if let Some(event) = self.endpoint.handle_event(ConnectionHandle(index as usize), event) {
                slot.connection.handle_event(event);
            }
        }
        if slot.drained && !slot.ready {
            self.remove(index);
            return false;
        }
        !slot.drained
    }

    /// Forgets a drained connection. Only now may the endpoint reuse its handle.
    fn remove(&mut self, index: u32) {
        let Some(mut slot) = self.slots[index as usize].take() else {
            return;
        };
        if slot.handshake_deadline.take().is_some() && slot.accepted {
            self.handshakes -= 1;
        }
        self.connections -= 1;
        self.timers.disarm(index);
        let answer = self
            .endpoint
            .handle_event(ConnectionHandle(index as usize), EndpointEvent::drained());
        debug_assert!(answer.is_none(), "a drained connection is told nothing");
    }

    fn rearm(&mut self, index: u32) {
        let Some(slot) = self.slots[index as usize].as_mut() else {
            return;
        };
        let timeout = slot.connection.poll_timeout();
        let at = match (timeout, slot.handshake_deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        match at {
            Some(at) => self.timers.arm(index, at),
            None => self.timers.disarm(index),
        }
    }

    fn respond(&mut self, transmit: &quinn_proto::Transmit, buffer: &mut Vec<u8>) {
        if self.responses.len() >= MAX_RESPONSES {
            self.stats.responses_dropped += 1;
        } else {
            buffer.truncate(transmit.size);
            self.responses.push_back((from_quinn(transmit), std::mem::take(buffer)));
        }
        buffer.clear();
    }
}

/// `Ok(true)`: blocked for now.
fn write_error(error: &WriteError) -> Result<bool, StreamError> {
    match error {
        WriteError::Blocked => Ok(true),
        WriteError::Stopped(code) => Err(StreamError::Peer(code.into_inner())),
        WriteError::ClosedStream => Err(StreamError::Closed),
    }
}

fn from_quinn(transmit: &quinn_proto::Transmit) -> Transmit {
    Transmit {
        remote: transmit.destination,
        local_ip: transmit.src_ip,
        ecn: transmit.ecn.map_or(0, |codepoint| codepoint as u8),
        segment_size: transmit.segment_size,
    }
}
