//! The socket towards one core of one node, and the QUIC connections that share it.
//!
//! A port moves bytes: datagrams between the socket and the driver, frames between the streams and the buffers of
//! its links. What a frame means is decided in [`super::reply`].

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use generation_proto::request::Hello;
use generation_proto::{Decoder, Limits, Operation, RequestOptions, Side};
use generation_quic::{
    ClientCrypto, CloseReason, ConnectTarget, ConnectionKey, Driver, DriverConfig, Event, Limits as QuicLimits, Read,
    StreamError, StreamId,
};
use mio::net::UdpSocket;
use mio::{Interest, Registry, Token};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};

use super::reply::{Greeting, HELLO_ID, answer};
use crate::target::{CONNECT_TIMEOUT, Completion, TargetError};

/// Socket buffers asked for, in bytes; the kernel may give less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes of one received GRO train.
pub(super) const TRAIN_BYTES: usize = 64 * 1024;
/// Batches received before their replies are looked at.
const RECEIVE_BATCHES: usize = 4;
/// A node whose system answers for so long that nobody listens is gone. A datagram or two are refused by a port that is about to open.
const REFUSED_FOR: Duration = Duration::from_secs(1);

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
pub(super) struct Port {
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

impl Link {
    /// A link that will say hello as soon as it stands.
    fn new(key: ConnectionKey, logical: usize) -> Self {
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
        Self {
            key,
            stream: None,
            greeted: false,
            out,
            backlog: None,
            decoder: Decoder::new(Side::Client, Limits::default().max_frame_len().max(256 << 20)),
            dirty: false,
            logical,
        }
    }
}

impl Port {
    /// A socket with its connections, not yet greeted; `registry` reports it as `token`.
    pub(super) fn open(
        addr: SocketAddr,
        core: u8,
        crypto: &ClientCrypto,
        connections: usize,
        registry: &Registry,
        token: Token,
    ) -> Result<Self, TargetError> {
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
        registry
            .register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)
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
            links.push(Link::new(key, logical));
        }
        Ok(Self {
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
        })
    }

    /// Node and core.
    pub(super) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Number of connections.
    pub(super) fn connections(&self) -> usize {
        self.links.len()
    }

    /// Notes that the socket has something to read.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// How long the socket may be waited for, at most `wait`.
    pub(super) fn patience(&self, now: Instant, wait: Duration) -> Duration {
        if self.readable || self.driver.has_transmits() {
            return Duration::ZERO;
        }
        let timeout = self.driver.next_timeout();
        timeout.map_or(wait, |timeout| wait.min(timeout.saturating_duration_since(now)))
    }

    /// Encodes a request on a connection; it leaves with the next [`Self::flush`].
    #[inline]
    pub(super) fn submit(&mut self, connection: usize, request: &generation_proto::Request<'_>) {
        let link = &mut self.links[connection];
        request.encode(&mut link.out);
        if !link.dirty {
            link.dirty = true;
            self.dirty.push(connection as u32);
        }
    }

    /// Receives, runs the timers, and turns what has come into completions. `buffer` is for the socket's trains.
    pub(super) fn turn(
        &mut self,
        now: Instant,
        buffer: &mut [u8],
        completions: &mut Vec<Completion>,
        greeting: &mut Greeting,
    ) -> Result<(), TargetError> {
        if self.readable {
            self.receive(now, buffer)?;
        }
        if self.driver.next_timeout().is_some_and(|timeout| timeout <= now) {
            self.driver.handle_timeout(now);
        }
        self.events(completions, greeting)?;
        self.check_listened_to(now)
    }

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
    pub(super) fn flush(&mut self) -> Result<(), TargetError> {
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

    /// Ends every connection and tells the node, so that it need not wait for a time-out.
    pub(super) fn close(&mut self) {
        let now = Instant::now();
        for link in &self.links {
            self.driver.close(now, link.key, 0, "done");
        }
        while let Some(transmit) = self.driver.poll_transmit(now, &mut self.train) {
            if !self.send(transmit).unwrap_or(false) {
                break;
            }
        }
    }
}

pub(super) fn protocol_error(addr: SocketAddr, message: String) -> TargetError {
    TargetError::Protocol {
        name: "generation".to_owned(),
        addr,
        message,
    }
}
