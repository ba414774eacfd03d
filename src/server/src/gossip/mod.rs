//! Gossip between nodes: chitchat behind [`generation_node::gossip::Gossip`], sealed, supervised, on a thread of its own.
//!
//! ```text
//! cores ─ publish ─▶ told ─▶ supervisor ─▶ chitchat ─▶ transport ─ seal ─▶ UDP
//! core 0 ◀─ poll ── changes ◀─ view ◀─ facts ◀─ chitchat ◀─ vetting ◀─ open ─ UDP
//! ```
//!
//! # What holds
//! - Nothing of it is on the way of a request, and nothing that happens to it touches the node: its task is started again when it ends.
//! - Nothing but what was sealed with a key of the cluster's key file is read, and each datagram once ([`seal`] says what that covers).
//! - What waits for the node is bounded by the number of nodes, not by time.
//!
//! Not here: what the hints mean (the node's), who belongs to the cluster (its records).

mod facts;
pub mod keys;
mod parts;
mod replay;
pub mod seal;
mod seeds;
pub mod stats;
mod supervisor;
#[cfg(test)]
mod tests;
mod transport;
mod vetting;
mod view;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io};

use generation_node::gossip::{Changes, Event, Gossip, Update};
use tokio::sync::Notify;

use crate::net::port::{self, PortError};
use keys::{KeyFile, KeyFileError};
use stats::GossipStats;
use transport::Keys;

/// What gossip needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Names the cluster: only nodes with the same text hear each other.
    pub cluster: String,
    /// This node.
    pub node: u64,
    /// This start of it; larger than that of any start before, with room for the starts that the supervisor adds.
    pub generation: u64,
    /// Where to listen (UDP). With port 0, any.
    pub listen: SocketAddr,
    /// Where the others are to answer; `None`: where it listens.
    pub advertise: Option<SocketAddr>,
    /// How often it gossips, with three nodes each time.
    pub interval: Duration,
    /// The cluster's gossip keys.
    pub key_file: PathBuf,
    /// Addresses and names, with ports, of nodes to begin with.
    pub seeds: Vec<String>,
}

/// Why gossip did not start.
#[derive(Debug, thiserror::Error)]
pub enum GossipError {
    /// The keys.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The port.
    #[error("gossip: {0}; it is set by `gossip.listen`")]
    Port(#[from] PortError),
    /// A thread.
    #[error("the thread for gossip cannot be started: {0}")]
    Thread(io::Error),
}

/// What the gossip's thread and the node's cores share.
struct Shared {
    /// Where it listens.
    address: SocketAddr,
    /// Where it is told to be.
    advertise: SocketAddr,
    keys: Arc<Keys>,
    stats: Arc<GossipStats>,
    own: Mutex<Own>,
    /// Something of `own` has changed, or it is to stop.
    wanted: Notify,
    stopping: AtomicBool,
    changes: Mutex<Changes>,
    /// Whether there are any, so that a poll that finds none takes no lock.
    arrived: AtomicBool,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// What this node has given to its gossip.
#[derive(Default)]
struct Own {
    told: BTreeMap<String, String>,
    seeds: Vec<SocketAddr>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn told(&self) -> Vec<(String, String)> {
        let own = lock(&self.own);
        own.told
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    fn seeds(&self) -> Vec<SocketAddr> {
        lock(&self.own).seeds.clone()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits; whether it is to stop. Only the gossip's thread waits.
    fn stops_within(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        while !self.is_stopping() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            std::thread::park_timeout(left);
        }
        true
    }

    fn record(&self, event: Option<Event>) {
        let Some(event) = event else { return };
        lock(&self.changes).record(event);
        // After what it stands for: who sees it finds the change.
        self.arrived.store(true, Ordering::Release);
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }
}

/// A node's gossip over UDP. It ends when this is dropped.
pub struct UdpGossip {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for UdpGossip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpGossip")
            .field("address", &self.shared.address)
            .finish_non_exhaustive()
    }
}

impl UdpGossip {
    /// Reads the keys, opens the port and begins.
    pub fn start(settings: Settings) -> Result<Self, GossipError> {
        let (key_file, ring) = KeyFile::open(&settings.key_file)?;
        let socket = port::open_one(settings.listen)?;
        let address = socket
            .local_addr()
            .map_err(|error| PortError::new(settings.listen, error))?;
        let shared = Arc::new(Shared {
            address,
            advertise: settings.advertise.unwrap_or(address),
            keys: Arc::new(Keys::new(ring)),
            stats: Arc::default(),
            own: Mutex::default(),
            wanted: Notify::new(),
            stopping: AtomicBool::new(false),
            changes: Mutex::default(),
            arrived: AtomicBool::new(false),
            wake: OnceLock::new(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("gossip".into())
            .spawn(move || supervisor::run(&of_thread, &settings, socket, key_file))
            .map_err(GossipError::Thread)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// What it has done so far.
    pub fn stats(&self) -> &Arc<GossipStats> {
        &self.shared.stats
    }

    /// Has `wake` called, on the gossip's thread, whenever there is something to poll. The first call counts.
    pub fn wake_with(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.shared.wake.set(Box::new(wake));
        // What came before would otherwise wait for what comes next.
        if self.shared.arrived.load(Ordering::Acquire)
            && let Some(wake) = self.shared.wake.get()
        {
            wake();
        }
    }
}

impl Gossip for UdpGossip {
    fn publish(&self, update: Update) {
        let mut own = lock(&self.shared.own);
        match update {
            Update::Tell(fact) => {
                let (key, value) = facts::encode(&fact);
                if own.told.get(&key) == Some(&value) {
                    return;
                }
                own.told.insert(key, value);
            }
            Update::Seeds(seeds) => own.seeds = seeds,
        }
        drop(own);
        self.shared.wanted.notify_one();
    }

    fn poll(&self, events: &mut Vec<Event>) {
        if self.shared.arrived.load(Ordering::Relaxed) && self.shared.arrived.swap(false, Ordering::Acquire) {
            lock(&self.shared.changes).drain(events);
        }
    }
}

impl Drop for UdpGossip {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wanted.notify_one();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panics nowhere that is not caught; if it did, gossip has ended all the same.
            let _ = thread.join();
        }
    }
}
