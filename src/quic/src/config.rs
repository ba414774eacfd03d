//! What a driver is told at its birth: identity, secrets, limits; and how they become quinn-proto's configuration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use quinn_proto::congestion::CubicConfig;
use quinn_proto::{
    EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TimeSource, TransportConfig, ValidationTokenConfig,
    VarInt,
};
use rand::rngs::StdRng;

use crate::cid::CoreCids;
use crate::tls::ServerCrypto;

/// Smallest UDP payload every path carries (RFC 9000, section 14).
const MIN_MTU: u16 = 1200;
/// Largest payload of one UDP datagram over IPv4, and so of one train.
pub(crate) const MAX_TRAIN_BYTES: usize = 65_507;
/// Initial congestion window in packets (RFC 9002, section 7.2).
const INITIAL_WINDOW_PACKETS: u64 = 10;

/// Bounds on what peers can make one core hold or do.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections of this core, in any state.
    pub connections: usize,
    /// Accepted connections whose handshake has not ended. From there on new ones are not answered.
    pub handshakes: usize,
    /// Accepted connections whose handshake has not ended, from which on a client must first prove its address (Retry).
    pub retry_above: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Bidirectional streams a peer may have open on one connection.
    pub streams: u32,
    /// Received bytes not yet read on one stream.
    pub stream_receive_window_bytes: u32,
    /// Received bytes not yet read on one connection.
    pub receive_window_bytes: u32,
    /// Written bytes not yet acknowledged on one connection: what a peer that reads nothing can make this side keep.
    pub send_window_bytes: u32,
    /// Silence after which a connection is given up.
    pub idle_timeout: Duration,
    /// Silence after which a packet is sent to keep a connection alive. A server leaves that to its clients.
    pub keep_alive: Option<Duration>,
    /// Largest UDP payload accepted, and sent to an address of this machine: loopback carries far more than 1,500 bytes, and a
    /// packet costs what it costs whatever its size. A peer that accepts less is sent less.
    pub max_udp_payload: u16,
    /// Largest UDP payload that is probed for on a path to another machine, at most `max_udp_payload`. Probes are padded to
    /// their size and padding is slow to read, so this is worth raising only where the network is known to carry more.
    pub probed_udp_payload: u16,
    /// Datagrams in one train. The kernel takes at most 64.
    pub max_train: usize,
    /// Whether a peer may change its address. Connection ids name the core, so a connection survives it.
    pub migration: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            handshakes: 1_024,
            retry_above: 64,
            handshake_timeout: Duration::from_secs(5),
            streams: 64,
            stream_receive_window_bytes: 1 << 20,
            receive_window_bytes: 4 << 20,
            send_window_bytes: 4 << 20,
            idle_timeout: Duration::from_secs(30),
            keep_alive: None,
            max_udp_payload: 16_384,
            probed_udp_payload: 1_452,
            max_train: 64,
            migration: true,
        }
    }
}

/// Everything a [`crate::Driver`] needs to know.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// This core, below `cores` and below 256: it is the first byte of every connection id issued.
    pub core: u16,
    /// Cores that share the port, from 1.
    pub cores: u16,
    /// Seed of this driver's random generator. Never the same twice.
    pub seed: [u8; 32],
    /// Key material of address validation tokens and stateless resets. A node that keeps it over a restart lets its peers notice
    /// the restart at once instead of after the idle timeout.
    pub secret: [u8; 32],
    /// TLS of the accepting side; `None` for a driver that only connects.
    pub server: Option<ServerCrypto>,
    /// Whether the socket promises not to fragment, so that the path's MTU can be probed.
    pub mtu_discovery: bool,
    /// Bounds.
    pub limits: Limits,
}

/// The wall clock as the caller last told it, for the age of address validation tokens.
#[derive(Debug, Default)]
pub(crate) struct UnixTime(AtomicU64);

impl UnixTime {
    pub(crate) fn set_ms(&self, unix_ms: u64) {
        self.0.store(unix_ms, Ordering::Relaxed);
    }
}

impl TimeSource for UnixTime {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

pub(crate) fn endpoint(config: &DriverConfig, rng: &Arc<Mutex<StdRng>>) -> Arc<EndpointConfig> {
    let core = u8::try_from(config.core).expect("a core that fits a connection id's first byte");
    let mut endpoint = EndpointConfig::new(Arc::new(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &config.secret)));
    let rng = Arc::clone(rng);
    endpoint.cid_generator(move || Box::new(CoreCids::new(core, Arc::clone(&rng))));
    endpoint.rng_seed(Some(config.seed));
    endpoint
        .max_udp_payload_size(config.limits.max_udp_payload.clamp(MIN_MTU, MAX_TRAIN_BYTES as u16))
        .expect("invariant: clamped to what QUIC allows");
    Arc::new(endpoint)
}

pub(crate) fn server(
    crypto: &ServerCrypto,
    config: &DriverConfig,
    transport: &Arc<TransportConfig>,
    clock: &Arc<UnixTime>,
) -> Arc<ServerConfig> {
    let token_key =
        ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, b"generation address validation").extract(&config.secret);
    let mut server = ServerConfig::new(Arc::clone(&crypto.0) as _, Arc::new(token_key));
    server.transport_config(Arc::clone(transport));
    server.time_source(Arc::clone(clock) as _);
    server.migration(config.limits.migration);
    // Every attempt is accepted, refused or told to retry as it arrives, so none is ever pending.
    server.max_incoming(1);
    server.incoming_buffer_size(0);
    server.incoming_buffer_size_total(0);
    // Retry is asked for under load only; tokens for later connections would have to be remembered to be used once.
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    server.validation_token_config(tokens);
    Arc::new(server)
}

/// The transport's settings for connections to this machine itself, or to others.
pub(crate) fn transport(limits: &Limits, mtu_discovery: bool, loopback: bool) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::try_from(limits.idle_timeout).expect("an idle timeout of at most 2^62 ms");
    transport
        .max_concurrent_bidi_streams(limits.streams.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(idle))
        .stream_receive_window(limits.stream_receive_window_bytes.into())
        .receive_window(limits.receive_window_bytes.into())
        .send_window(limits.send_window_bytes.into())
        .keep_alive_interval(limits.keep_alive)
        .datagram_receive_buffer_size(None)
        .allow_spin(false)
        // The first flight is repeated after three of these. A data centre's round trip is far below the RFC's 333 ms.
        .initial_rtt(Duration::from_millis(50));
    let largest = limits.max_udp_payload.clamp(MIN_MTU, MAX_TRAIN_BYTES as u16);
    let mut mtu = MIN_MTU;
    transport.mtu_discovery_config(None);
    if loopback {
        // There is no path to probe.
        mtu = largest;
        transport.initial_mtu(mtu);
    } else if mtu_discovery {
        mtu = limits.probed_udp_payload.clamp(MIN_MTU, largest);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(mtu);
        transport.mtu_discovery_config(Some(discovery));
    }
    // A window of less than two packets lets nothing out at all.
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_PACKETS * u64::from(mtu));
    transport.congestion_controller_factory(Arc::new(congestion));
    Arc::new(transport)
}
