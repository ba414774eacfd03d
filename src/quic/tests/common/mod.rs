//! Drivers in one thread, joined by a network made of memory: seeded loss, reordering and delay, and a clock that only moves
//! when nothing is left to do.
#![allow(unreachable_pub, reason = "a module shared by test binaries")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_quic::{
    ClientCrypto, ConnectTarget, ConnectionKey, Driver, DriverConfig, Event, Limits, Read, ServerCrypto, StreamId,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, server::WebPkiClientVerifier};

pub const ALPN: &[u8] = b"generation/1";

/// A certificate authority that lives as long as the test.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate with its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap()).unwrap(),
        }
    }

    pub fn issue(&self, expired: bool) -> Identity {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        if expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        roots
    }

    pub fn server(&self) -> ServerCrypto {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()), Arc::clone(&provider))
            .build()
            .unwrap();
        let identity = self.issue(false);
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain, identity.key)
            .unwrap();
        config.alpn_protocols = vec![ALPN.to_vec()];
        ServerCrypto::new(Arc::new(config)).unwrap()
    }

    pub fn client(&self, identity: Option<Identity>) -> ClientCrypto {
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.roots());
        let mut config = match identity {
            Some(identity) => builder.with_client_auth_cert(identity.chain, identity.key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        ClientCrypto::new(Arc::new(config)).unwrap()
    }
}

/// A splitmix64 generator: the network's dice.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.next() % 1000 < per_mille
    }
}

pub struct Node {
    pub driver: Driver,
    pub events: VecDeque<(ConnectionKey, Event)>,
}

/// Some drivers and the datagrams between them.
pub struct Net {
    pub now: Instant,
    pub nodes: Vec<Node>,
    pub loss_per_mille: u64,
    pub jitter: Duration,
    pub sent: u64,
    pub trains: u64,
    dice: Dice,
    sequence: u64,
    in_flight: BTreeMap<(Instant, u64), (SocketAddr, usize, BytesMut)>,
}

pub fn address(node: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 0, 0, 1 + node as u8).into(), 7400)
}

pub fn config(core: u16, cores: u16, seed: u8, server: Option<ServerCrypto>, limits: Limits) -> DriverConfig {
    DriverConfig {
        core,
        cores,
        seed: [seed; 32],
        secret: [9; 32],
        server,
        mtu_discovery: true,
        limits,
    }
}

pub fn target(node: usize, core: Option<u8>, crypto: ClientCrypto) -> ConnectTarget {
    ConnectTarget {
        remote: address(node),
        server_name: "localhost".to_owned(),
        core,
        crypto,
    }
}

impl Net {
    pub fn new(seed: u64, drivers: Vec<Driver>) -> Self {
        Self {
            now: Instant::now(),
            nodes: drivers
                .into_iter()
                .map(|driver| Node {
                    driver,
                    events: VecDeque::new(),
                })
                .collect(),
            loss_per_mille: 0,
            jitter: Duration::ZERO,
            sent: 0,
            trains: 0,
            dice: Dice(seed),
            sequence: 0,
            in_flight: BTreeMap::new(),
        }
    }

    /// Hands a datagram to a node as if `remote` had sent it.
    pub fn inject(&mut self, to: usize, remote: SocketAddr, payload: &[u8]) {
        let _ = self.nodes[to]
            .driver
            .handle_datagram(self.now, remote, None, 0, BytesMut::from(payload));
    }

    /// Lets every driver send, then moves to the next moment at which something happens. `false`: nothing ever will.
    pub fn step(&mut self) -> bool {
        let mut buffer = Vec::new();
        for from in 0..self.nodes.len() {
            loop {
                let node = &mut self.nodes[from];
                while let Some(event) = node.driver.poll_event() {
                    node.events.push_back(event);
                }
                let Some(transmit) = node.driver.poll_transmit(self.now, &mut buffer) else {
                    break;
                };
                self.trains += 1;
                for datagram in buffer.chunks(transmit.segment_size.unwrap_or(buffer.len())) {
                    self.sent += 1;
                    if self.dice.chance(self.loss_per_mille) {
                        continue;
                    }
                    let to = (0..self.nodes.len()).find(|&node| address(node) == transmit.remote);
                    let Some(to) = to else { continue };
                    let mut at = self.now + Duration::from_millis(1);
                    if !self.jitter.is_zero() {
                        at += Duration::from_nanos(self.dice.next() % self.jitter.as_nanos() as u64);
                    }
                    self.sequence += 1;
                    self.in_flight
                        .insert((at, self.sequence), (address(from), to, BytesMut::from(datagram)));
                }
            }
        }
        let timeouts = self.nodes.iter().filter_map(|node| node.driver.next_timeout());
        let arrival = self.in_flight.keys().next().map(|&(at, _)| at);
        let Some(next) = timeouts.chain(arrival).min() else {
            return false;
        };
        self.now = self.now.max(next);
        while let Some(entry) = self.in_flight.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let (remote, to, payload) = entry.remove();
            let result = self.nodes[to]
                .driver
                .handle_datagram(self.now, remote, None, 0, payload);
            assert!(result.is_ok(), "misrouted");
        }
        for node in &mut self.nodes {
            node.driver.handle_timeout(self.now);
        }
        true
    }

    /// Steps until `done` gives something; panics after a simulated minute.
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let limit = self.now + Duration::from_mins(1);
        loop {
            if let Some(found) = done(self) {
                return found;
            }
            if !self.step() {
                return done(self).expect("nothing is left to happen");
            }
            assert!(self.now < limit, "not within a minute");
        }
    }

    /// The next event of a node that `wanted` picks; others are dropped.
    pub fn event<T>(&mut self, node: usize, mut wanted: impl FnMut(ConnectionKey, &Event) -> Option<T>) -> T {
        self.until(|net| {
            while let Some((key, event)) = net.nodes[node].events.pop_front() {
                if let Some(found) = wanted(key, &event) {
                    return Some(found);
                }
            }
            None
        })
    }

    pub fn connected(&mut self, node: usize) -> ConnectionKey {
        self.event(node, |key, event| matches!(event, Event::Connected).then_some(key))
    }

    pub fn opened(&mut self, node: usize) -> (ConnectionKey, StreamId) {
        self.event(node, |key, event| match event {
            Event::Opened(stream) => Some((key, *stream)),
            _ => None,
        })
    }

    /// Reads a stream until it has given `len` bytes or its end.
    pub fn read(&mut self, node: usize, key: ConnectionKey, stream: StreamId, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        self.until(|net| {
            let read = net.nodes[node]
                .driver
                .read(key, stream, usize::MAX, |chunk| data.extend_from_slice(&chunk))
                .unwrap();
            (data.len() >= len || read == Read::Finished).then_some(())
        });
        data
    }

    /// Writes all of `data`, however long the peer's windows take to open.
    pub fn write(&mut self, node: usize, key: ConnectionKey, stream: StreamId, data: &[u8]) {
        let mut at = 0;
        self.until(|net| {
            at += net.nodes[node]
                .driver
                .write_slice(key, stream, &data[at..])
                .unwrap()
                .bytes;
            (at == data.len()).then_some(())
        });
    }
}

/// A server (node 0) and a client (node 1) with good certificates, connected.
pub fn pair(seed: u64, server_limits: Limits, client_limits: Limits) -> (Net, ConnectionKey, ConnectionKey) {
    let authority = Authority::new();
    let server = Driver::new(config(0, 1, 1, Some(authority.server()), server_limits));
    let client = Driver::new(config(0, 1, 2, None, client_limits));
    let mut net = Net::new(seed, vec![server, client]);
    let now = net.now;
    let crypto = authority.client(Some(authority.issue(false)));
    net.nodes[1].driver.connect(now, &target(0, None, crypto)).unwrap();
    let client_key = net.connected(1);
    let server_key = net.connected(0);
    (net, server_key, client_key)
}
