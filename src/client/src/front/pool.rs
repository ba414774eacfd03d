//! Connections by (address, core): opened when first needed, shared by all requests, opened again after a loss with a growing
//! wait between attempts.
//!
//! There is one UDP socket for each server core: a train of datagrams that the kernel coalesces must not mix connection ids that
//! belong to different cores. The core is chosen through the first byte of the initial destination connection id.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use generation_proto::reply::HelloReply;
use generation_proto::request::Hello;
use generation_proto::{Decoder, Limits, Operation, Reply, Request, RequestOptions, Side, Status, close_code};
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionId, Endpoint, EndpointConfig, MtuDiscoveryConfig, TokioRuntime, TransportConfig, VarInt};
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::{Connection, NoFrame, Peer, describe, next_frame};
use super::health::Health;
use super::tls::{Identity, Refused};
use crate::core::error::{ConnectError, Error, NotSent};
use crate::core::retry::{RetryPolicy, backoff, jittered};
use crate::core::routing::Target;

/// Bytes of an initial destination connection id; RFC 9000 section 7.2 asks for 8 unpredictable ones at least.
const CID_LEN: usize = 16;
/// What a node may send ahead on one stream, in bytes: the largest page or value should not need many round trips.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// What a node may send ahead on a connection, in bytes; bounds what a slow caller makes this process hold.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// What is kept for retransmission on a connection, in bytes.
const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// Silence after which a connection is given up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which a connection is probed, so that an idle one stays open and a dead node is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Round-trip time assumed before one is measured: a lost first packet is sent again after three of them.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Largest UDP payload that is probed for and accepted. Loopback and jumbo networks carry far more than 1,500 bytes, and a
/// packet costs what it costs whatever its size.
const MAX_UDP_PAYLOAD: u16 = 16_384;
/// Largest payload probed for on a path to another machine: what Ethernet carries.
const PROBED_UDP_PAYLOAD: u16 = 1_452;
/// Initial congestion window in packets (RFC 9002, section 7.2).
const INITIAL_WINDOW_PACKETS: u64 = 10;
/// The name in TLS's server name indication. Nodes are known by their certificates' URI, so it carries no meaning.
const SERVER_NAME: &str = "generation";

/// A connection's place in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) addr: SocketAddr,
    pub(crate) core: u16,
}

impl Key {
    /// The place of the connection to a target.
    pub(crate) const fn of(target: Target) -> Self {
        Self {
            addr: target.addr,
            core: target.core,
        }
    }
}

pub(crate) struct Pool {
    identity: Identity,
    cluster: String,
    name: String,
    connect_timeout: Duration,
    health: Arc<Health>,
    /// Pace of reconnecting.
    pace: RetryPolicy,
    random: Box<dyn Fn() -> u64 + Send + Sync>,
    state: Mutex<State>,
    /// What the node that was connected to last accepts, and its longest frame: the nodes of a cluster have the same.
    limits: Mutex<(Limits, usize)>,
}

#[derive(Default)]
struct State {
    /// The keys come from the cluster's own map, so nobody can choose them to collide.
    links: FxHashMap<Key, Link>,
    /// By core, and whether for IPv6.
    endpoints: HashMap<(u16, bool), Endpoint>,
    closed: bool,
}

type Outcome = Option<Result<Arc<Connection>, ConnectError>>;

enum Link {
    /// Somebody connects; whoever else needs it waits for the same outcome.
    Connecting(watch::Receiver<Outcome>),
    Open(Arc<Connection>),
    /// The last attempt failed; until then nobody tries again.
    Failed {
        error: ConnectError,
        failures: u32,
        until: Instant,
    },
}

impl Pool {
    pub(crate) fn new(
        identity: Identity,
        cluster: String,
        name: String,
        connect_timeout: Duration,
        health: Arc<Health>,
        random: Box<dyn Fn() -> u64 + Send + Sync>,
    ) -> Self {
        let pace = RetryPolicy {
            initial_backoff: Duration::from_millis(20),
            max_backoff: Duration::from_secs(2),
            ..RetryPolicy::default()
        };
        Self {
            identity,
            cluster,
            name,
            connect_timeout,
            health,
            pace,
            random,
            state: Mutex::new(State::default()),
            limits: Mutex::new((Limits::default(), Limits::default().max_frame_len())),
        }
    }

    /// Fills `bytes` with random ones that nobody can guess.
    pub(crate) fn fill_random(&self, bytes: &mut [u8]) -> Result<(), ConnectError> {
        self.identity.random(bytes)
    }

    /// What the nodes accept, and their longest frame in bytes.
    pub(crate) fn limits(&self) -> (Limits, usize) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection to `key`, opened if need be; `node` is who should be there, if that is known. Another caller's attempt is
    /// shared, and goes on when this future is dropped.
    pub(crate) async fn get(
        self: &Arc<Self>,
        key: Key,
        node: Option<u64>,
        deadline: Instant,
    ) -> Result<Arc<Connection>, Error> {
        let mut outcome = match self.lookup(key, node)? {
            Found::Open(connection) => return Ok(connection),
            Found::Connecting(outcome) => outcome,
        };
        let waited = timeout_at(deadline, outcome.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(outcome)) => outcome.clone().unwrap_or(Err(interrupted(key))).map_err(Error::from),
            Ok(Err(_)) => Err(interrupted(key).into()),
            Err(_) => Err(ConnectError::NoAnswer {
                peer: key.addr.to_string(),
                after: self.connect_timeout,
            }
            .into()),
        }
    }

    /// The connection to `key`, if it is open.
    pub(crate) fn open_at(&self, key: Key) -> Option<Arc<Connection>> {
        match self.lock().links.get(&key) {
            Some(Link::Open(connection)) if connection.is_open() => Some(connection.clone()),
            _ => None,
        }
    }

    /// Whether the connection to `key` is open; if not, it is opened in the background.
    pub(crate) fn is_ready(self: &Arc<Self>, key: Key, node: u64) -> bool {
        // Whoever needs it learns why it cannot be opened.
        matches!(self.lookup(key, Some(node)), Ok(Found::Open(_)))
    }

    /// Where there are open connections: for questions that every node answers.
    pub(crate) fn open_keys(&self) -> Vec<Key> {
        let is_open = |link: &Link| matches!(link, Link::Open(connection) if connection.is_open());
        let state = self.lock();
        let links = state.links.iter().filter(|(_, link)| is_open(link));
        links.map(|(key, _)| *key).collect()
    }

    /// Permits taken on all connections.
    pub(crate) fn permits_taken(&self) -> usize {
        let taken = |link: &Link| match link {
            Link::Open(connection) if connection.is_open() => connection.permits_taken(),
            _ => 0,
        };
        self.lock().links.values().map(taken).sum()
    }

    /// Sends nothing new over a connection whose node is stopping. What is under way on it goes on.
    pub(crate) fn retire(&self, key: Key, connection: &Arc<Connection>) {
        let mut state = self.lock();
        if matches!(state.links.get(&key), Some(Link::Open(open)) if Arc::ptr_eq(open, connection)) {
            state.links.remove(&key);
        }
    }

    /// Has the next request connect at once, whatever came of the last attempt.
    pub(crate) fn forgive(&self, key: Key) {
        if let Some(Link::Failed { until, .. }) = self.lock().links.get_mut(&key) {
            *until = Instant::now();
        }
    }

    /// Closes what leads to addresses that `keep` refuses.
    pub(crate) fn prune(&self, keep: impl Fn(SocketAddr) -> bool) {
        let mut closed = Vec::new();
        self.lock().links.retain(|key, link| {
            let keep = keep(key.addr) || matches!(link, Link::Connecting(_));
            if let (false, Link::Open(connection)) = (keep, &*link) {
                closed.push(connection.clone());
            }
            keep
        });
        for connection in closed {
            connection.close("the node has left the cluster");
        }
    }

    /// Closes everything. Connections under way are closed when they open.
    pub(crate) fn close(&self) -> Vec<Arc<Connection>> {
        let mut state = self.lock();
        state.closed = true;
        let open: Vec<_> = state
            .links
            .drain()
            .filter_map(|(_, link)| match link {
                Link::Open(connection) => Some(connection),
                _ => None,
            })
            .collect();
        let endpoints: Vec<_> = state.endpoints.drain().map(|(_, endpoint)| endpoint).collect();
        drop(state);
        for connection in &open {
            connection.close("the client was closed");
        }
        for endpoint in endpoints {
            endpoint.close(VarInt::from_u32(0), b"");
        }
        open
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lookup(self: &Arc<Self>, key: Key, node: Option<u64>) -> Result<Found, Error> {
        let mut state = self.lock();
        if state.closed {
            return Err(NotSent::Closed.into());
        }
        let failures = match state.links.get(&key) {
            Some(Link::Open(connection)) if connection.is_open() => return Ok(Found::Open(connection.clone())),
            Some(Link::Connecting(outcome)) => return Ok(Found::Connecting(outcome.clone())),
            Some(Link::Failed { error, until, .. }) if *until > Instant::now() => return Err(error.clone().into()),
            Some(Link::Failed { failures, .. }) => *failures,
            Some(Link::Open(_)) | None => 0,
        };
        let (report, outcome) = watch::channel(None);
        state.links.insert(key, Link::Connecting(outcome.clone()));
        drop(state);
        let pool = self.clone();
        // A task of its own: the caller may go away, and others may be waiting for the same connection.
        tokio::spawn(async move {
            let result = pool.connect(key, node).await;
            pool.settle(key, node, failures, &result);
            let _ = report.send(Some(result));
        });
        Ok(Found::Connecting(outcome))
    }

    fn settle(&self, key: Key, node: Option<u64>, failures: u32, result: &Result<Arc<Connection>, ConnectError>) {
        if let (Some(node), Err(error)) = (node, result) {
            // Once an attempt, however many wait for it.
            self.health.of(node).failed(error, (self.random)());
        }
        let mut state = self.lock();
        match result {
            Ok(connection) if state.closed => connection.close("the client was closed"),
            Ok(connection) => {
                state.links.insert(key, Link::Open(connection.clone()));
            }
            Err(_) if state.closed => {}
            Err(error) => {
                tracing::debug!(addr = %key.addr, core = key.core, %error, "cannot connect");
                let wait = jittered(backoff(&self.pace, failures), (self.random)());
                state.links.insert(
                    key,
                    Link::Failed {
                        error: error.clone(),
                        failures: failures.saturating_add(1),
                        until: Instant::now() + wait,
                    },
                );
            }
        }
    }

    async fn connect(&self, key: Key, node: Option<u64>) -> Result<Arc<Connection>, ConnectError> {
        let peer = key.addr.to_string();
        let no_answer = ConnectError::NoAnswer {
            peer: peer.clone(),
            after: self.connect_timeout,
        };
        let refused = Refused::default();
        let opening = self.open(key, node, &peer, &refused);
        let opened = timeout(self.connect_timeout, opening).await.unwrap_or(Err(no_answer));
        opened.map_err(
            |error| match refused.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(reason) => ConnectError::ServerCertificate { peer, reason },
                None => error,
            },
        )
    }

    async fn open(
        &self,
        key: Key,
        node: Option<u64>,
        peer: &str,
        refused: &Refused,
    ) -> Result<Arc<Connection>, ConnectError> {
        let failed = |error: quinn::ConnectionError| explain(peer, &error);
        let config = self.quic_config(key, node, refused.clone())?;
        let connecting = self
            .endpoint(key)
            .map_err(|error| ConnectError::Unreachable {
                peer: peer.to_owned(),
                reason: error.to_string(),
            })?
            .connect_with(config, key.addr, SERVER_NAME)
            .map_err(|error| ConnectError::Unreachable {
                peer: peer.to_owned(),
                reason: error.to_string(),
            })?;
        let quic = connecting.await.map_err(failed)?;
        let (mut send, mut recv) = quic.open_bi().await.map_err(failed)?;
        let mut hello = BytesMut::new();
        Request {
            id: 0,
            options: RequestOptions::default(),
            operation: Operation::Hello(Hello {
                major: generation_proto::MAJOR,
                minor: generation_proto::MINOR,
                name: &self.name,
            }),
        }
        .encode(&mut hello);
        let exchange = async {
            let written = send.write_chunk(hello.freeze()).await;
            written.map_err(|error| NoFrame::Broken(error.to_string()))?;
            let mut decoder = Decoder::new(Side::Client, Limits::default().max_frame_len());
            let frame = next_frame(&mut recv, &mut decoder).await?;
            Ok::<_, NoFrame>((frame, decoder))
        };
        // A node that refuses the client's certificate says so after the client's side of the handshake is over.
        let (frame, decoder) = match exchange.await {
            Ok(answer) => answer,
            // Why is in the packet that closes the connection, which follows.
            Err(NoFrame::Ended) => return Err(explain(peer, &quic.closed().await)),
            Err(NoFrame::Broken(reason)) => {
                return Err(match quic.close_reason() {
                    Some(error) => explain(peer, &error),
                    None => ConnectError::Handshake {
                        peer: peer.to_owned(),
                        reason,
                    },
                });
            }
        };
        let answer = self.read_hello(peer, &frame);
        let peer = match answer {
            Ok(peer) => peer,
            Err(error) => {
                quic.close(VarInt::from_u32(0), error.code().as_bytes());
                return Err(error);
            }
        };
        // From here on the node's own limits hold; it has nothing under way yet.
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = (peer.limits, peer.max_frame_len);
        let decoder = if decoder.buffered_len() == 0 {
            Decoder::new(Side::Client, peer.longest_reply())
        } else {
            decoder
        };
        tracing::debug!(peer = %peer.addr, node = peer.node, core = peer.core, cores = peer.cores, "connected");
        let health = self.health.of(peer.node);
        Ok(Connection::start(peer, health, quic, send, recv, decoder))
    }

    fn read_hello(&self, peer: &str, frame: &generation_proto::Frame) -> Result<Peer, ConnectError> {
        let handshake = |reason: String| ConnectError::Handshake {
            peer: peer.to_owned(),
            reason,
        };
        let reply = Reply::decode(frame).map_err(|error| handshake(error.to_string()))?;
        let message = || reply.options.message.unwrap_or_default().to_owned();
        match reply.meta.status() {
            Some(Status::Ok) => {}
            Some(Status::UnsupportedVersion) => {
                return Err(ConnectError::Version {
                    peer: peer.to_owned(),
                    reason: message(),
                });
            }
            Some(Status::ShuttingDown) => return Err(handshake("the node is shutting down".to_owned())),
            Some(status) => return Err(handshake(format!("{status}: {}", message()))),
            None => return Err(handshake(format!("status {}: {}", reply.meta.status, message()))),
        }
        let hello = HelloReply::decode(reply.body).map_err(|error| handshake(error.to_string()))?;
        if hello.major != generation_proto::MAJOR {
            return Err(ConnectError::Version {
                peer: peer.to_owned(),
                reason: format!("it speaks version {}.{}", hello.major, hello.minor),
            });
        }
        if hello.cluster != self.cluster {
            return Err(ConnectError::WrongCluster {
                peer: peer.to_owned(),
                expected: self.cluster.clone(),
                found: hello.cluster.to_owned(),
            });
        }
        let limits = Limits {
            max_key_len: (hello.max_key_len as usize).min(generation_proto::limits::MAX_KEY_LEN),
            max_value_len: (hello.max_value_len as usize).min(generation_proto::limits::MAX_VALUE_LEN),
        };
        Ok(Peer {
            addr: peer.to_owned(),
            node: hello.node,
            core: hello.core,
            cores: hello.cores.max(1),
            limits,
            max_frame_len: hello.max_frame_len as usize,
        })
    }

    fn quic_config(&self, key: Key, node: Option<u64>, refused: Refused) -> Result<quinn::ClientConfig, ConnectError> {
        let tls = self.identity.tls(node, refused)?;
        let tls = QuicClientConfig::try_from(tls).map_err(|error| ConnectError::Config(error.to_string()))?;
        let mut cid = [0; CID_LEN];
        self.identity.random(&mut cid)?;
        // Byte 0 modulo the node's cores is the core; a node of more than 256 cores has none beyond reach of its neighbours.
        cid[0] = key.core as u8;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(&cid)));
        config.transport_config(Arc::new(transport(key.addr.ip().is_loopback())));
        Ok(config)
    }

    /// The socket for one core of the nodes.
    fn endpoint(&self, key: Key) -> std::io::Result<Endpoint> {
        let mut state = self.lock();
        let place = (key.core, key.addr.is_ipv6());
        if let Some(endpoint) = state.endpoints.get(&place) {
            return Ok(endpoint.clone());
        }
        let local: SocketAddr = if key.addr.is_ipv6() {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        };
        let socket = std::net::UdpSocket::bind(local)?;
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(MAX_UDP_PAYLOAD)
            .expect("invariant: QUIC allows payloads from 1,200 bytes");
        let endpoint = Endpoint::new(config, None, socket, Arc::new(TokioRuntime))?;
        state.endpoints.insert(place, endpoint.clone());
        Ok(endpoint)
    }
}

enum Found {
    Open(Arc<Connection>),
    Connecting(watch::Receiver<Outcome>),
}

fn transport(loopback: bool) -> TransportConfig {
    let mut probing = MtuDiscoveryConfig::default();
    let mut transport = TransportConfig::default();
    if loopback {
        // There is no path to probe, and probes are padding, which is slow to read. Discovery stays on for its other half: an
        // address of this machine may be forwarded to one that carries less, and that shows as a black hole.
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW_PACKETS * u64::from(MAX_UDP_PAYLOAD));
        transport
            .initial_mtu(MAX_UDP_PAYLOAD)
            .congestion_controller_factory(Arc::new(congestion));
        probing.upper_bound(MAX_UDP_PAYLOAD);
    } else {
        probing.upper_bound(PROBED_UDP_PAYLOAD);
    }
    transport
        .mtu_discovery_config(Some(probing))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(
            IDLE_TIMEOUT.try_into().expect("invariant: 10 s fit a QUIC time-out"),
        ));
    transport
}

fn interrupted(key: Key) -> ConnectError {
    ConnectError::Handshake {
        peer: key.addr.to_string(),
        reason: "the attempt was interrupted: the runtime is stopping".to_owned(),
    }
}

/// What went wrong while connecting, as the one who has to mend it needs to hear it. TLS alerts: RFC 8446 section 6.2, carried
/// as QUIC error 0x100 + alert (RFC 9001 section 4.8).
fn explain(peer: &str, error: &quinn::ConnectionError) -> ConnectError {
    use quinn::ConnectionError as E;
    let peer = peer.to_owned();
    match error {
        E::VersionMismatch => ConnectError::Version {
            peer,
            reason: "no common version of QUIC".to_owned(),
        },
        E::TimedOut => ConnectError::NoAnswer {
            peer,
            after: IDLE_TIMEOUT,
        },
        E::ApplicationClosed(close) if is_code(close, close_code::UNAUTHORIZED) => ConnectError::ClientCertificate {
            peer,
            reason: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        E::ApplicationClosed(close) if is_code(close, close_code::VERSION) => ConnectError::Version {
            peer,
            reason: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        E::ConnectionClosed(close) => {
            let code = u64::from(close.error_code);
            let Some(alert) = code.checked_sub(0x100).filter(|alert| *alert <= 0xff) else {
                return ConnectError::Handshake {
                    peer,
                    reason: describe(error),
                };
            };
            if alert == 120 {
                return ConnectError::Version {
                    peer,
                    reason: "it knows no application protocol that this client offers".to_owned(),
                };
            }
            match client_certificate_alert(alert) {
                Some(reason) => ConnectError::ClientCertificate {
                    peer,
                    reason: reason.to_owned(),
                },
                None => ConnectError::Handshake {
                    peer,
                    reason: format!("TLS alert {alert}: {close}"),
                },
            }
        }
        E::TransportError(local) if u64::from(local.code) == 0x178 => ConnectError::Version {
            peer,
            reason: "no common application protocol".to_owned(),
        },
        other => ConnectError::Handshake {
            peer,
            reason: describe(other),
        },
    }
}

fn is_code(close: &quinn::ApplicationClose, code: u32) -> bool {
    close.error_code == VarInt::from_u32(code)
}

fn client_certificate_alert(alert: u64) -> Option<&'static str> {
    Some(match alert {
        42 => "it is not acceptable: make it with `generation certs client` for this cluster",
        43 => "it is of a kind the node does not support: make it with `generation certs client`",
        44 => "it was revoked",
        45 => "it has expired: renew it with `generation certs client`",
        46 => "the node cannot accept it: make it with `generation certs client` for this cluster",
        // Decrypt error is what a signature by another authority of the same name comes out as; that certificate and key belong
        // together has been checked before.
        48 | 51 => {
            "it was not signed by the cluster's authority: make it with `generation certs client` and that authority"
        }
        49 => "the node denies it access: check its name and the cluster's access policy",
        116 => "none was shown: name one as `certificate` and `key`",
        _ => return None,
    })
}
