//! What this client has seen of each node: how quick it answers, and whether it does.
//!
//! The decisions are the core's ([`crate::core::load`], [`crate::core::breaker`]). Answers of a node that is well touch atomics and no
//! lock: the breaker is looked at only when there is something in it that an answer changes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::time::Instant;

use crate::core::breaker::{Admission, Breaker, BreakerState};
use crate::core::error::ConnectError;
use crate::core::load::Load;
use crate::core::metrics::NodeMetrics;

/// Silence that is shorter says nothing of a node: its callers were in a hurry.
const TELLING_SILENCE: Duration = Duration::from_millis(250);

/// All nodes that the client has had to do with.
pub(crate) struct Health {
    origin: Instant,
    /// The ids come from the cluster's own map, so nobody can choose them to collide.
    nodes: RwLock<FxHashMap<u64, Arc<NodeHealth>>>,
    /// Requests sent to nodes that have left.
    sent_to_others: AtomicU64,
}

/// One node.
pub(crate) struct NodeHealth {
    node: u64,
    origin: Instant,
    load: Load,
    answered_ns: AtomicU64,
    /// When the first request was sent that it was not waited for any longer, if it has not answered since; 0: none.
    silent_ns: AtomicU64,
    /// Whether there are failures that an answer would wipe out.
    in_trouble: AtomicBool,
    circuit: Mutex<Circuit>,
}

#[derive(Default)]
struct Circuit {
    breaker: Breaker,
    /// The last failure.
    last: Option<ConnectError>,
}

impl Health {
    pub(crate) fn new(origin: Instant) -> Self {
        Self {
            origin,
            nodes: RwLock::default(),
            sent_to_others: AtomicU64::new(0),
        }
    }

    /// What is known of a node.
    pub(crate) fn of(&self, node: u64) -> Arc<NodeHealth> {
        let known = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(health) = known.get(&node) {
            return Arc::clone(health);
        }
        drop(known);
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let health = nodes.entry(node).or_insert_with(|| {
            Arc::new(NodeHealth {
                node,
                origin: self.origin,
                load: Load::default(),
                answered_ns: AtomicU64::new(0),
                silent_ns: AtomicU64::new(0),
                in_trouble: AtomicBool::new(false),
                circuit: Mutex::default(),
            })
        });
        Arc::clone(health)
    }

    /// Forgets the nodes that are not in the map any more.
    pub(crate) fn retain(&self, is_member: impl Fn(u64) -> bool) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.retain(|&node, health| {
            let keep = is_member(node);
            if !keep {
                self.sent_to_others.fetch_add(health.load.sent(), Ordering::Relaxed);
            }
            keep
        });
    }

    /// Requests sent to all nodes, those that have left included.
    pub(crate) fn sent(&self) -> u64 {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        let sent: u64 = nodes.values().map(|health| health.load.sent()).sum();
        sent + self.sent_to_others.load(Ordering::Relaxed)
    }
}

impl NodeHealth {
    pub(crate) const fn load(&self) -> &Load {
        &self.load
    }

    /// The time, as the core counts it.
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The node answered what was sent at `sent`. `is_measured`: the time it took says how quick it is.
    pub(crate) fn answered(&self, sent: Instant, is_measured: bool) {
        let now = Instant::now();
        let at = now.saturating_duration_since(self.origin);
        self.answered_ns.store(at.as_nanos() as u64, Ordering::Relaxed);
        if is_measured {
            self.load.measure(now.saturating_duration_since(sent), at);
        }
        if self.in_trouble.load(Ordering::Relaxed) {
            self.is_well();
        }
    }

    fn is_well(&self) {
        let mut circuit = self.circuit();
        circuit.last = None;
        if circuit.breaker.answered() {
            tracing::info!(node = self.node, "the node answers again");
        }
        self.in_trouble.store(false, Ordering::Relaxed);
    }

    /// The node answered something that nobody waits for any more: it is slow, and not silent.
    pub(crate) fn answered_late(&self) {
        self.answered_ns
            .store(self.since_origin_ns(Instant::now()), Ordering::Relaxed);
    }

    /// What was sent at `sent` is not waited for any longer. `true`: the node is left alone from now on.
    pub(crate) fn unanswered(&self, peer: SocketAddr, sent: Instant, random: u64) -> bool {
        let now = Instant::now();
        let sent_ns = self.since_origin_ns(sent).max(1);
        let answered_ns = self.answered_ns.load(Ordering::Relaxed);
        if answered_ns >= sent_ns {
            return false;
        }
        let mut silent_ns = self.silent_ns.load(Ordering::Relaxed);
        if silent_ns <= answered_ns {
            silent_ns = sent_ns;
            self.silent_ns.store(sent_ns, Ordering::Relaxed);
        }
        let silence = Duration::from_nanos(self.since_origin_ns(now).saturating_sub(silent_ns));
        if silence < TELLING_SILENCE {
            return false;
        }
        let error = ConnectError::NoAnswer {
            peer: peer.to_string(),
            after: silence,
        };
        self.failed(&error, random)
    }

    fn since_origin_ns(&self, time: Instant) -> u64 {
        time.saturating_duration_since(self.origin).as_nanos() as u64
    }

    /// There is no connection to the node to be had, or a probe failed. `true`: it is left alone from now on.
    pub(crate) fn failed(&self, error: &ConnectError, random: u64) -> bool {
        let now = self.now();
        let mut circuit = self.circuit();
        circuit.last = Some(error.clone());
        let has_opened = circuit.breaker.failed(now, random);
        self.in_trouble.store(true, Ordering::Relaxed);
        drop(circuit);
        if has_opened {
            tracing::warn!(node = self.node, %error, "the node does not answer: reads go to others where they can");
        }
        has_opened
    }

    /// Whether to send it what another can answer as well.
    pub(crate) fn admit(&self) -> Admission {
        if !self.in_trouble.load(Ordering::Relaxed) {
            return Admission::Pass;
        }
        let now = self.now();
        self.circuit().breaker.admit(now)
    }

    /// Whether it is thought not to answer.
    pub(crate) fn is_down(&self) -> bool {
        self.in_trouble.load(Ordering::Relaxed) && self.circuit().breaker.state() != BreakerState::Closed
    }

    /// Why it is left alone and since when; `None`: it is not.
    pub(crate) fn down(&self, peer: &str) -> Option<ConnectError> {
        if !self.is_down() {
            return None;
        }
        let now = self.now();
        let circuit = self.circuit();
        Some(ConnectError::Down {
            node: self.node,
            peer: peer.to_owned(),
            since: now.saturating_sub(circuit.breaker.since()?),
            last: Box::new(circuit.last.clone()?),
        })
    }

    /// What is known of it, for people; `addr` is its address.
    pub(crate) fn metrics(&self, addr: String) -> NodeMetrics {
        let now = self.now();
        let circuit = self.circuit();
        NodeMetrics {
            node: self.node,
            addr,
            requests: self.load.sent(),
            outstanding: self.load.outstanding(),
            latency: self.load.latency(),
            breaker: circuit.breaker.state(),
            failures: circuit.breaker.failures(),
            silent_for: circuit.breaker.since().map(|since| now.saturating_sub(since)),
        }
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
