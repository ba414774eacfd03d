//! chitchat's transport, over a UDP socket on which everything is sealed.
//!
//! What does not open, was there before or makes no sense is counted and dropped, and nobody is answered. What the kernel refuses to send
//! counts as lost. Only a socket that has become unusable is an error, which ends chitchat's task.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use async_trait::async_trait;
use chitchat::transport::{Socket, Transport};
use chitchat::{ChitchatMessage, Serializable as _};

use super::keys::KeyRing;
use super::seal::{DATAGRAM_BYTES, Opener, Refusal, Sealer, Start};
use super::stats::GossipStats;
use super::vetting;

/// The keys in use, exchanged while everything runs.
#[derive(Debug)]
pub(super) struct Keys(RwLock<Arc<KeyRing>>);

impl Keys {
    pub(super) fn new(ring: KeyRing) -> Self {
        Self(RwLock::new(Arc::new(ring)))
    }

    pub(super) fn current(&self) -> Arc<KeyRing> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace(&self, ring: KeyRing) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    }
}

/// The transport of one start of a node's gossip. It is opened once.
pub(super) struct SealedTransport {
    cluster: String,
    start: Start,
    keys: Arc<Keys>,
    stats: Arc<GossipStats>,
    socket: Mutex<Option<UdpSocket>>,
}

impl SealedTransport {
    /// Over a socket that is bound and does not block.
    pub(super) fn new(
        cluster: String,
        start: Start,
        keys: Arc<Keys>,
        stats: Arc<GossipStats>,
        socket: UdpSocket,
    ) -> Self {
        Self {
            cluster,
            start,
            keys,
            stats,
            socket: Mutex::new(Some(socket)),
        }
    }

    /// As [`Transport::open`], with the address that answers are to be sent to.
    pub(super) fn connect(&self, advertise: SocketAddr) -> anyhow::Result<SealedSocket> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        let socket = tokio::net::UdpSocket::from_std(socket.context("the socket was taken already")?)?;
        let is_v6 = socket.local_addr()?.is_ipv6();
        Ok(SealedSocket {
            socket,
            is_v6,
            advertise,
            sealer: Sealer::new(self.cluster.clone(), self.start, advertise),
            opener: Opener::new(self.cluster.clone(), self.start.node),
            keys: Arc::clone(&self.keys),
            stats: Arc::clone(&self.stats),
            message: Vec::new(),
            datagrams: Vec::new(),
            received: vec![0; DATAGRAM_BYTES + 1].into(),
            said: [None; Refusal::ALL.len()],
        })
    }
}

#[async_trait]
impl Transport for SealedTransport {
    async fn open(&self, advertise: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        Ok(Box::new(self.connect(advertise)?))
    }
}

/// The open socket.
pub(super) struct SealedSocket {
    socket: tokio::net::UdpSocket,
    is_v6: bool,
    /// Where this node is told to be.
    advertise: SocketAddr,
    sealer: Sealer,
    opener: Opener,
    keys: Arc<Keys>,
    stats: Arc<GossipStats>,
    message: Vec<u8>,
    datagrams: Vec<u8>,
    /// One byte more than a datagram may have: what is longer is seen to be.
    received: Box<[u8]>,
    /// When each refusal was said last.
    said: [Option<Instant>; Refusal::ALL.len()],
}

/// How often a refusal is said: whoever sends what is refused must not fill the log.
const SAY_EVERY: Duration = Duration::from_mins(1);

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// Whether a failed receive says something of another datagram or of the moment, and not of the socket.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
            | ErrorKind::Interrupted
            | ErrorKind::OutOfMemory
            | ErrorKind::PermissionDenied
    )
}

impl SealedSocket {
    /// The message of a datagram of `len` bytes in the buffer.
    fn take(&mut self, len: usize) -> Result<Option<(SocketAddr, ChitchatMessage)>, Refusal> {
        let datagram = self.received.get_mut(..len).ok_or(Refusal::Format)?;
        if len > DATAGRAM_BYTES {
            return Err(Refusal::Format);
        }
        let opened = self.opener.open(&self.keys.current(), unix_ms(), datagram)?;
        let Some(opened) = opened else { return Ok(None) };
        let message = vetting::read(&opened.message).map_err(|_| Refusal::Malformed)?;
        Ok(Some((opened.from, message)))
    }

    /// Counts a datagram that is not taken. A wrong key or clock shows nowhere else, so it is said too.
    fn refuse(&mut self, refusal: Refusal, from: SocketAddr) {
        self.stats.refused[refusal as usize].add(1);
        let (now, last) = (Instant::now(), &mut self.said[refusal as usize]);
        if last.is_none_or(|last| now.duration_since(last) >= SAY_EVERY) {
            *last = Some(now);
            let so_far = self.stats.refused(refusal);
            tracing::warn!(%from, so_far, "a gossip datagram was dropped: {refusal}");
        }
    }

    /// As the socket wants it: one of IPv6 reaches IPv4 by mapped addresses.
    fn destination(&self, to: SocketAddr) -> SocketAddr {
        match to {
            SocketAddr::V4(v4) if self.is_v6 => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into(),
            to => to,
        }
    }
}

#[async_trait]
impl Socket for SealedSocket {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        if to == self.advertise {
            // For chitchat a former start of this node is another node.
            return Ok(());
        }
        self.message.clear();
        message.serialize(&mut self.message);
        let sealed = self
            .sealer
            .seal(&self.keys.current(), unix_ms(), &self.message, &mut self.datagrams);
        if sealed.is_err() {
            self.stats.unsent.add(1);
            tracing::warn!(
                bytes = self.message.len(),
                "gossip that is too long was not sent: there are too many nodes"
            );
            return Ok(());
        }
        let to = self.destination(to);
        for datagram in self.datagrams.chunks(DATAGRAM_BYTES) {
            if let Err(error) = self.socket.send_to(datagram, to).await {
                self.stats.unsent.add(1);
                tracing::debug!(%to, %error, "gossip was not sent");
                break;
            }
            self.stats.sent_datagrams.add(1);
            self.stats.sent_bytes.add(datagram.len() as u64);
        }
        Ok(())
    }

    /// May be dropped at its only wait, at which nothing was taken yet.
    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        loop {
            let (len, from) = match self.socket.recv_from(&mut self.received).await {
                Ok(received) => received,
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(error).context("the gossip socket cannot be read"),
            };
            self.stats.received_datagrams.add(1);
            self.stats.received_bytes.add(len as u64);
            match self.take(len) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(refusal) => self.refuse(refusal, from),
            }
        }
    }
}
