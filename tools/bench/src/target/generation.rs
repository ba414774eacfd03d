//! Generation over QUIC, driven without tokio: one thread, one UDP socket for each core of each node.
//!
//! Each connection of the benchmark stands for one QUIC connection to every core that leads shards; a request
//! goes to the core that owns its key's shard, as the native client does. The core is chosen through the
//! first byte of the initial destination connection id. Requests travel on one bidirectional stream a
//! connection; all that a turn has submitted leaves in one train of datagrams (GSO).

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use generation_client::{ClientConfig, Refused};
use generation_proto::map::Shard;
use generation_proto::reply::MultiResult;
use generation_proto::request::{Hello, KeyList};
use generation_proto::{
    Condition, Decoder, Frame, Limits, Map, Opcode, Operation, Reply, RequestOptions, Side, SlotTable, Status,
};
use generation_quic::{
    ClientCrypto, CloseReason, ConnectTarget, ConnectionKey, Driver, DriverConfig, Event, Limits as QuicLimits, Read,
    StreamError, StreamId,
};
use mio::net::UdpSocket;
use mio::{Events, Interest, Poll};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};

use super::cluster::{Cluster, Layout, Place, SLOTS};
use super::{CONNECT_TIMEOUT, Completion, Connector, Failure, Outcome, Request, Target, TargetError, Token, resolve};

/// Socket buffers asked for, in bytes; the kernel may give less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes of one received GRO train.
const TRAIN_BYTES: usize = 64 * 1024;
/// Batches received before their replies are looked at.
const RECEIVE_BATCHES: usize = 4;
/// A node whose system answers for so long that nobody listens is gone. A datagram or two are refused by a port that is about to open.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// Request id of `Hello`; tokens of the engine are 32 bits wide.
const HELLO_ID: u64 = u64::MAX;
/// Request id of `Map`.
const MAP_ID: u64 = u64::MAX - 1;

/// Where a cluster is: its `client.toml`.
#[derive(Clone, Debug)]
pub struct GenerationConnector {
    /// The configuration file that `generation dev` writes.
    pub config: PathBuf,
}

/// The cluster as its `client.toml` describes it, read and checked.
struct Credentials {
    seeds: Vec<String>,
    crypto: ClientCrypto,
    /// Why a node's certificate was refused.
    refused: Refused,
}

impl Credentials {
    fn read(config: &Path) -> Result<Self, TargetError> {
        let unusable = |message: String| TargetError::Certificate {
            path: config.display().to_string(),
            message,
        };
        let client = ClientConfig::load(config).map_err(|error| TargetError::Settings(error.to_string()))?;
        let (tls, refused) = client.tls().map_err(|error| unusable(error.to_string()))?;
        let crypto = ClientCrypto::new(Arc::new(tls)).map_err(|error| unusable(error.to_string()))?;
        Ok(Self {
            seeds: client.seeds,
            crypto,
            refused,
        })
    }

    /// Puts the verifier's reason in the place of TLS's alert number.
    fn explain(&self, error: TargetError) -> TargetError {
        let reason = self.refused.lock().ok().and_then(|mut reason| reason.take());
        match (error, reason) {
            (TargetError::Tls { name, addr, .. }, Some(reason)) => TargetError::Tls {
                name,
                addr,
                message: format!("the node's certificate was refused: {reason}"),
            },
            (error, _) => error,
        }
    }
}

impl Connector for GenerationConnector {
    fn name(&self) -> String {
        "generation".to_owned()
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let mut last = TargetError::Settings(format!("{}: no seeds", self.config.display()));
        for seed in &cluster.seeds {
            match resolve(seed).and_then(|addr| GenerationTarget::connect(addr, &cluster.crypto, connections)) {
                Ok(target) => return Ok(Box::new(target)),
                Err(error) => last = cluster.explain(error),
            }
        }
        Err(last)
    }
}

impl Cluster for GenerationConnector {
    fn name(&self) -> String {
        Connector::name(self)
    }

    fn nodes(&self) -> Vec<SocketAddr> {
        let seeds = ClientConfig::load(&self.config).map_or_else(|_| Vec::new(), |config| config.seeds);
        seeds.iter().filter_map(|seed| resolve(seed).ok()).collect()
    }

    fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let map = GenerationTarget::empty(1)?
            .scout(node, &cluster.crypto)
            .map_err(|error| cluster.explain(error))?;
        let mut places = Vec::new();
        let owners: Vec<Option<u16>> = map
            .shards
            .iter()
            .map(|shard| place_of(&map, shard, &mut places))
            .collect();
        let mut owner = vec![None; SLOTS];
        for range in &map.ranges {
            let slots = usize::from(range.first)..=usize::from(range.last);
            owner[slots].fill(owners.get(usize::from(range.shard)).copied().flatten());
        }
        Ok(Layout {
            // Epochs and terms only grow, so their sum orders the maps of one cluster.
            version: map.shards.iter().map(|shard| u64::from(shard.epoch) + shard.term).sum(),
            places,
            owner,
        })
    }

    fn connect_to(&self, place: Place, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let mut target = GenerationTarget::empty(connections)?;
        target.open(place.addr, place.core as u8, &cluster.crypto, connections)?;
        target.greet(false).map_err(|error| cluster.explain(error))?;
        Ok(Box::new(target))
    }
}

/// Index of the place that leads a shard, which is added when it is new; `None` for a shard without a leader.
fn place_of(map: &Map, shard: &Shard, places: &mut Vec<Place>) -> Option<u16> {
    let replica = shard.replicas.iter().find(|replica| replica.node == shard.leader)?;
    let place = Place {
        addr: map.node(replica.node)?.addr,
        core: replica.core,
    };
    let index = places.iter().position(|known| *known == place).unwrap_or_else(|| {
        places.push(place);
        places.len() - 1
    });
    Some(index as u16)
}

/// One QUIC connection and its stream.
struct Link {
    key: ConnectionKey,
    /// Set when the connection stands.
    stream: Option<StreamId>,
    greeted: bool,
    /// Encoded and not yet taken by QUIC.
    out: BytesMut,
    /// Taken from `out` while QUIC's window was full.
    backlog: Option<Bytes>,
    decoder: Decoder,
    dirty: bool,
    logical: usize,
}

/// The socket towards one core of one node.
struct Port {
    addr: SocketAddr,
    socket: UdpSocket,
    state: UdpSocketState,
    driver: Driver,
    /// By logical connection.
    links: Vec<Link>,
    /// Link of a driver's slot.
    by_slot: Vec<Option<u32>>,
    dirty: Vec<u32>,
    readable: bool,
    /// Since when the node's system has answered that nobody listens there, and nothing else has come.
    refused_since: Option<Instant>,
    /// A train the socket did not take.
    unsent: Option<generation_quic::Transmit>,
    train: Vec<u8>,
}

/// A cluster seen from one generator thread.
pub struct GenerationTarget {
    poll: Poll,
    events: Events,
    ports: Vec<Port>,
    connections: usize,
    /// Port by shard, and shard by slot; absent while there is one port.
    route: Option<(Vec<u16>, SlotTable)>,
    receive: Vec<u8>,
    keys: BytesMut,
}

/// What a link's frames say apart from completions, while connecting.
#[derive(Default)]
struct Greeting {
    greeted: usize,
    map: Option<Map>,
}

impl GenerationTarget {
    fn connect(seed: SocketAddr, crypto: &ClientCrypto, connections: usize) -> Result<Self, TargetError> {
        let mut target = Self::empty(connections)?;
        let map = target.scout(seed, crypto)?;
        let mut cores = Vec::new();
        let mut port_of_shard = Vec::new();
        for shard in &map.shards {
            let Some(port) = place_of(&map, shard, &mut cores) else {
                return Err(TargetError::Unreachable {
                    name: "generation".to_owned(),
                    addr: seed,
                    message: "the map has a shard without a leader".to_owned(),
                });
            };
            port_of_shard.push(port);
        }
        target.ports.clear();
        for place in &cores {
            target.open(place.addr, place.core as u8, crypto, connections)?;
        }
        target.greet(false)?;
        if cores.len() > 1 {
            let slots = SlotTable::new(&map.ranges, map.shards.len())
                .map_err(|error| protocol_error(seed, format!("the map cannot be used: {error}")))?;
            target.route = Some((port_of_shard, slots));
        }
        Ok(target)
    }

    /// A target without sockets yet.
    fn empty(connections: usize) -> Result<Self, TargetError> {
        Ok(Self {
            poll: Poll::new().map_err(TargetError::Loop)?,
            events: Events::with_capacity(64),
            ports: Vec::new(),
            connections,
            route: None,
            receive: vec![0; TRAIN_BYTES * BATCH_SIZE],
            keys: BytesMut::new(),
        })
    }

    /// Asks one node for the map, over a connection of its own.
    fn scout(&mut self, seed: SocketAddr, crypto: &ClientCrypto) -> Result<Map, TargetError> {
        self.open(seed, 0, crypto, 1)?;
        let link = &mut self.ports[0].links[0];
        let options = RequestOptions::default();
        generation_proto::Request {
            id: MAP_ID,
            options,
            operation: Operation::Map,
        }
        .encode(&mut link.out);
        self.greet(true)?
            .map
            .ok_or_else(|| protocol_error(seed, "no map came".to_owned()))
    }

    /// A socket with its connections, not yet greeted.
    fn open(
        &mut self,
        addr: SocketAddr,
        core: u8,
        crypto: &ClientCrypto,
        connections: usize,
    ) -> Result<(), TargetError> {
        let failed = |error: io::Error| TargetError::Unreachable {
            name: "generation".to_owned(),
            addr,
            message: error.to_string(),
        };
        let any: SocketAddr = match addr {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let mut socket = UdpSocket::bind(any).map_err(failed)?;
        // Only a connected socket is told that nobody listens at the other end.
        socket.connect(addr).map_err(failed)?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket)).map_err(failed)?;
        // Best effort: the kernel's limits may be lower.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_BYTES);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_BYTES);
        self.poll
            .registry()
            .register(
                &mut socket,
                mio::Token(self.ports.len()),
                Interest::READABLE | Interest::WRITABLE,
            )
            .map_err(TargetError::Loop)?;
        let mut driver = Driver::new(DriverConfig {
            core: 0,
            cores: 1,
            seed: rand::random(),
            secret: rand::random(),
            server: None,
            mtu_discovery: !state.may_fragment(),
            limits: QuicLimits {
                connections: connections.max(1),
                stream_receive_window_bytes: 16 << 20,
                receive_window_bytes: 16 << 20,
                send_window_bytes: 16 << 20,
                keep_alive: Some(Duration::from_secs(10)),
                max_train: state.max_gso_segments(),
                handshake_timeout: CONNECT_TIMEOUT,
                ..QuicLimits::default()
            },
        });
        let now = Instant::now();
        let mut links = Vec::with_capacity(connections);
        let mut by_slot = Vec::new();
        for logical in 0..connections {
            let target = ConnectTarget {
                remote: addr,
                server_name: "generation".to_owned(),
                core: Some(core),
                crypto: crypto.clone(),
            };
            let key = driver
                .connect(now, &target)
                .map_err(|error| TargetError::Settings(format!("cannot connect to {addr}: {error}")))?;
            if by_slot.len() <= key.slot() {
                by_slot.resize(key.slot() + 1, None);
            }
            by_slot[key.slot()] = Some(logical as u32);
            let mut out = BytesMut::with_capacity(16 * 1024);
            let hello = Hello {
                major: generation_proto::MAJOR,
                minor: generation_proto::MINOR,
                name: "generation-bench",
            };
            let options = RequestOptions::default();
            generation_proto::Request {
                id: HELLO_ID,
                options,
                operation: Operation::Hello(hello),
            }
            .encode(&mut out);
            links.push(Link {
                key,
                stream: None,
                greeted: false,
                out,
                backlog: None,
                decoder: Decoder::new(Side::Client, Limits::default().max_frame_len().max(256 << 20)),
                dirty: false,
                logical,
            });
        }
        self.ports.push(Port {
            addr,
            socket,
            state,
            driver,
            links,
            by_slot,
            dirty: Vec::new(),
            readable: true,
            refused_since: None,
            unsent: None,
            train: Vec::with_capacity(TRAIN_BYTES),
        });
        Ok(())
    }

    /// Waits until every link of every port has been greeted, and for the map if it was asked for.
    fn greet(&mut self, with_map: bool) -> Result<Greeting, TargetError> {
        let wanted: usize = self.ports.iter().map(|port| port.links.len()).sum();
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut greeting = Greeting::default();
        let mut completions = Vec::new();
        loop {
            self.flush()?;
            self.turn(Duration::from_millis(5), &mut completions, &mut greeting)?;
            if greeting.greeted >= wanted && (!with_map || greeting.map.is_some()) {
                return Ok(greeting);
            }
            if Instant::now() > deadline {
                let addr = self.ports[0].addr;
                let message = format!("{} of {wanted} connections answered within 5 s", greeting.greeted);
                return Err(TargetError::Unreachable {
                    name: "generation".to_owned(),
                    addr,
                    message,
                });
            }
        }
    }

    /// One turn of every port: receive, timers, events.
    fn turn(
        &mut self,
        wait: Duration,
        completions: &mut Vec<Completion>,
        greeting: &mut Greeting,
    ) -> Result<(), TargetError> {
        let mut wait = wait;
        if !wait.is_zero() {
            let now = Instant::now();
            for port in &self.ports {
                if port.readable || port.driver.has_transmits() {
                    wait = Duration::ZERO;
                } else if let Some(timeout) = port.driver.next_timeout() {
                    wait = wait.min(timeout.saturating_duration_since(now));
                }
            }
        }
        match self.poll.poll(&mut self.events, Some(wait)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(TargetError::Loop(error)),
        }
        for event in &self.events {
            if event.is_readable() {
                self.ports[event.token().0].readable = true;
            }
        }
        let now = Instant::now();
        for port in &mut self.ports {
            if port.readable {
                port.receive(now, &mut self.receive)?;
            }
            if port.driver.next_timeout().is_some_and(|timeout| timeout <= now) {
                port.driver.handle_timeout(now);
            }
            port.events(completions, greeting)?;
            port.check_listened_to(now)?;
        }
        Ok(())
    }
}

fn protocol_error(addr: SocketAddr, message: String) -> TargetError {
    TargetError::Protocol {
        name: "generation".to_owned(),
        addr,
        message,
    }
}

impl Port {
    fn lost(&self, message: String) -> TargetError {
        TargetError::Lost {
            name: "generation".to_owned(),
            addr: self.addr,
            message,
        }
    }

    /// Fails when nobody listens at the address: QUIC alone would find out after its idle time-out, and a benchmark would go on against
    /// a dead server until then.
    fn check_listened_to(&self, now: Instant) -> Result<(), TargetError> {
        let gone = |since: Instant| now.saturating_duration_since(since) > REFUSED_FOR;
        if !self.refused_since.is_some_and(gone) {
            return Ok(());
        }
        let message = "nobody listens there".to_owned();
        if self.links.iter().any(|link| link.greeted) {
            return Err(self.lost(message));
        }
        Err(TargetError::Unreachable {
            name: "generation".to_owned(),
            addr: self.addr,
            message,
        })
    }

    /// Takes what the socket holds, up to a bound, into the driver.
    fn receive(&mut self, now: Instant, buffer: &mut [u8]) -> Result<(), TargetError> {
        for _ in 0..RECEIVE_BATCHES {
            let mut metas = [RecvMeta::default(); BATCH_SIZE];
            let mut chunks = buffer.chunks_exact_mut(TRAIN_BYTES);
            let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            let received = match self.state.recv(UdpSockRef::from(&self.socket), &mut slices, &mut metas) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // An ICMP error of an earlier datagram.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    self.refused_since.get_or_insert(now);
                    continue;
                }
                Err(error) => return Err(self.lost(error.to_string())),
            };
            self.refused_since = None;
            for (meta, slice) in metas[..received].iter().zip(&slices) {
                let ecn = meta.ecn.map_or(0, |ecn| ecn as u8);
                let train = BytesMut::from(&slice[..meta.len]);
                self.datagrams(now, meta, ecn, train);
            }
            if received < BATCH_SIZE {
                // The kernel had no more; the next arrival is a new edge.
                self.readable = false;
                return Ok(());
            }
        }
        Ok(())
    }

    fn datagrams(&mut self, now: Instant, meta: &RecvMeta, ecn: u8, mut train: BytesMut) {
        while !train.is_empty() {
            let datagram = train.split_to(meta.stride.clamp(1, train.len()));
            // With one core nothing can be misrouted.
            let _ = self.driver.handle_datagram(now, meta.addr, meta.dst_ip, ecn, datagram);
        }
    }

    fn events(&mut self, completions: &mut Vec<Completion>, greeting: &mut Greeting) -> Result<(), TargetError> {
        while let Some((key, event)) = self.driver.poll_event() {
            let Some(index) = self.by_slot.get(key.slot()).copied().flatten() else {
                continue;
            };
            match event {
                Event::Connected => {
                    let stream = self.driver.open(key);
                    if stream.is_none() {
                        return Err(protocol_error(self.addr, "it allows no stream".to_owned()));
                    }
                    self.links[index as usize].stream = stream;
                    self.mark(index);
                }
                Event::Readable(_) => self.read(index, completions, greeting)?,
                Event::Writable(_) => self.mark(index),
                Event::Closed(reason) => return Err(self.closed(index, &reason)),
                Event::Opened(_) | Event::Finished(_) | Event::Stopped(..) | Event::Available => {}
            }
        }
        Ok(())
    }

    fn closed(&self, index: u32, reason: &CloseReason) -> TargetError {
        let (name, addr, message) = ("generation".to_owned(), self.addr, reason.to_string());
        match reason {
            _ if self.links[index as usize].greeted => TargetError::Lost { name, addr, message },
            CloseReason::TimedOut | CloseReason::HandshakeTimeout => TargetError::Unreachable { name, addr, message },
            _ => TargetError::Tls { name, addr, message },
        }
    }

    fn mark(&mut self, index: u32) {
        let link = &mut self.links[index as usize];
        if !link.dirty && link.stream.is_some() {
            link.dirty = true;
            self.dirty.push(index);
        }
    }

    /// Reads what a stream has brought and turns its frames into completions.
    fn read(
        &mut self,
        index: u32,
        completions: &mut Vec<Completion>,
        greeting: &mut Greeting,
    ) -> Result<(), TargetError> {
        let addr = self.addr;
        let link = &mut self.links[index as usize];
        let Some(stream) = link.stream else { return Ok(()) };
        let (decoder, greeted, logical) = (&mut link.decoder, &mut link.greeted, link.logical);
        let mut failed = None;
        let read = self.driver.read(link.key, stream, usize::MAX, |bytes| {
            decoder.feed(bytes);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        if let Err(message) = answer(&frame, logical, greeted, completions, greeting) {
                            failed.get_or_insert(message);
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        failed.get_or_insert(error.to_string());
                        break;
                    }
                }
            }
        });
        match (failed, read) {
            (Some(message), _) => Err(protocol_error(addr, message)),
            (None, Ok(Read::Finished)) => Err(self.lost("the node has ended the stream".to_owned())),
            // A closed connection has an event of its own.
            (None, Ok(_) | Err(StreamError::ConnectionClosed)) => Ok(()),
            (None, Err(error)) => Err(self.lost(error.to_string())),
        }
    }

    /// Hands what was encoded to QUIC, and QUIC's datagrams to the socket.
    fn flush(&mut self) -> Result<(), TargetError> {
        while let Some(index) = self.dirty.pop() {
            let link = &mut self.links[index as usize];
            link.dirty = false;
            let Some(stream) = link.stream else { continue };
            // `Event::Writable` marks the link again when there is room.
            let mut chunks = [link.backlog.take().unwrap_or_default(), link.out.split().freeze()];
            let first = usize::from(chunks[0].is_empty());
            match self.driver.write(link.key, stream, &mut chunks[first..]) {
                Ok(written) if written.complete => {}
                Ok(_) => {
                    let mut rest = BytesMut::with_capacity(chunks[0].len() + chunks[1].len());
                    rest.extend_from_slice(&chunks[0]);
                    rest.extend_from_slice(&chunks[1]);
                    link.backlog = Some(rest.freeze());
                }
                // The connection's end has an event of its own.
                Err(StreamError::ConnectionClosed) => {}
                Err(error) => return Err(self.lost(error.to_string())),
            }
        }
        if let Some(transmit) = self.unsent.take()
            && !self.send(transmit)?
        {
            return Ok(());
        }
        while let Some(transmit) = self.driver.poll_transmit(Instant::now(), &mut self.train) {
            if !self.send(transmit)? {
                break;
            }
        }
        Ok(())
    }

    /// Sends the train; `false` when the socket is full, and the train waits for its turn.
    fn send(&mut self, transmit: generation_quic::Transmit) -> Result<bool, TargetError> {
        let datagrams = quinn_udp::Transmit {
            destination: transmit.remote,
            ecn: EcnCodepoint::from_bits(transmit.ecn),
            contents: &self.train,
            segment_size: transmit.segment_size,
            src_ip: transmit.local_ip,
        };
        match self.state.try_send(UdpSockRef::from(&self.socket), &datagrams) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.unsent = Some(transmit);
                Ok(false)
            }
            // An ICMP error of an earlier datagram, answered here: this one is lost, which QUIC repairs.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.refused_since.get_or_insert_with(Instant::now);
                Ok(true)
            }
            // A probe for a larger MTU that the path does not carry: lost, as the probe expects.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) => Ok(true),
            Err(error) => Err(self.lost(error.to_string())),
        }
    }
}

/// Turns a reply into a completion, or into what a greeting waits for.
#[inline]
fn answer(
    frame: &Frame,
    logical: usize,
    greeted: &mut bool,
    completions: &mut Vec<Completion>,
    greeting: &mut Greeting,
) -> Result<(), String> {
    let reply = Reply::decode(frame).map_err(|error| error.to_string())?;
    let Ok(token) = Token::try_from(reply.id) else {
        if reply.meta.status() != Some(Status::Ok) {
            let status = reply.meta.status().map_or("an unknown status", Status::name);
            return Err(format!(
                "it answered {status} to the greeting: {}",
                reply.options.message.unwrap_or_default()
            ));
        }
        if reply.id == HELLO_ID {
            *greeted = true;
            greeting.greeted += 1;
        } else {
            greeting.map = Some(Map::decode(reply.body).map_err(|error| error.to_string())?);
        }
        return Ok(());
    };
    completions.push(Completion {
        token,
        connection: logical,
        outcome: outcome(&reply)?,
    });
    Ok(())
}

#[inline]
fn outcome(reply: &Reply<'_>) -> Result<Outcome, String> {
    let Some(status) = reply.meta.status() else {
        return Ok(Outcome::Failed(Failure::Rejected));
    };
    Ok(match status {
        Status::Ok if reply.opcode == Opcode::Get.code() => Outcome::Hit {
            version: reply.meta.version,
        },
        Status::Ok if reply.opcode == Opcode::MultiGet.code() => {
            let (mut hits, mut misses) = (0, 0);
            for result in MultiResult::decode_all(reply.body) {
                let result = result.map_err(|error| error.to_string())?;
                match Status::from_code(result.status) {
                    Some(Status::Ok) => hits += 1,
                    Some(Status::NotFound) => misses += 1,
                    _ => return Ok(Outcome::Failed(Failure::Unavailable)),
                }
            }
            Outcome::Multi { hits, misses }
        }
        Status::Ok => Outcome::Stored,
        Status::NotFound => Outcome::Miss,
        Status::ConditionFailed => Outcome::Conflict,
        Status::OutOfMemory => Outcome::Failed(Failure::OutOfMemory),
        Status::Busy => Outcome::Failed(Failure::Busy),
        Status::Moved
        | Status::NoQuorum
        | Status::TooStale
        | Status::DeadlineExceeded
        | Status::ShuttingDown
        | Status::ReadOnly => Outcome::Failed(Failure::Unavailable),
        Status::InDoubt | Status::Internal => Outcome::Failed(Failure::InDoubt),
        _ => Outcome::Failed(Failure::Rejected),
    })
}

impl Target for GenerationTarget {
    fn connections(&self) -> usize {
        self.connections
    }

    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError> {
        let mut options = RequestOptions::default();
        let (key, operation) = match *request {
            Request::Get { key, .. } => (key, Operation::Get { key }),
            Request::Put { key, value, ttl_ms } => {
                options.ttl_ms = (ttl_ms > 0).then_some(ttl_ms);
                (key, Operation::Put { key, value })
            }
            Request::PutIfVersion { key, value, version } => {
                options.condition = Condition::IfVersion(version);
                (key, Operation::Put { key, value })
            }
            Request::Incr { key } => (key, Operation::Incr { key, delta: 1 }),
            Request::MultiGet { keys, key_len } => {
                self.keys.clear();
                (
                    &keys[..key_len],
                    Operation::MultiGet(KeyList::build(keys.chunks_exact(key_len), &mut self.keys)),
                )
            }
        };
        // A multi-get goes to the core of its first key; the node fetches the others.
        let port = match &self.route {
            None => 0,
            Some((ports, slots)) => usize::from(ports[usize::from(slots.shard_of(key))]),
        };
        let port = &mut self.ports[port];
        let link = &mut port.links[connection];
        generation_proto::Request {
            id: u64::from(token),
            options,
            operation,
        }
        .encode(&mut link.out);
        if !link.dirty {
            link.dirty = true;
            port.dirty.push(connection as u32);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        self.ports.iter_mut().try_for_each(Port::flush)
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        self.turn(wait, completions, &mut Greeting::default())
    }
}

impl Drop for GenerationTarget {
    /// Tells the nodes, so that they need not wait for a time-out.
    fn drop(&mut self) {
        let now = Instant::now();
        for port in &mut self.ports {
            for link in &port.links {
                port.driver.close(now, link.key, 0, "done");
            }
            while let Some(transmit) = port.driver.poll_transmit(now, &mut port.train) {
                if !port.send(transmit).unwrap_or(false) {
                    break;
                }
            }
        }
    }
}
