//! What all tasks of a simulation share: time, chance, the network, and what each node has.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_node::env::{CoreId, Datagram};
use generation_node::mesh::MeshMessage;
use generation_quic::steer;

use crate::clock::NodeClock;
use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::disk::storage::Storage;
use crate::executor::Task;
use crate::network::{Host, Links, Weather};
use crate::points::{Ambushes, Kill};

/// The port every node serves on.
const PORT: u16 = 7400;

/// The first port of a client.
const CLIENT_PORT: u16 = 40_000;

/// What the world holds for one core.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) datagrams: VecDeque<Datagram>,
    pub(crate) messages: VecDeque<(CoreId, MeshMessage)>,
    pub(crate) stop_seen: bool,
    /// A task of the core wants it to take a turn.
    pub(crate) woken: bool,
    pub(crate) waker: Option<Waker>,
}

impl Inbox {
    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A node as the world sees it.
#[derive(Debug)]
pub(crate) struct NodeState {
    pub(crate) addr: SocketAddr,
    pub(crate) cores: Vec<Inbox>,
    pub(crate) up: bool,
    pub(crate) frozen: bool,
    pub(crate) stopping: bool,
    /// Cores that have not ended.
    pub(crate) running: Rc<Cell<CoreId>>,
    /// Starts so far.
    pub(crate) incarnation: u32,
    pub(crate) clock: NodeClock,
    pub(crate) disk: DiskWeather,
    pub(crate) storage: Storage,
    /// Datagrams that reached its sockets.
    pub(crate) received: u64,
    /// How it is about to die, in the middle of a poll.
    pub(crate) dying: Option<Kill>,
}

/// A timer: whose it is and whom it wakes.
#[derive(Debug)]
struct Timer {
    node: Option<usize>,
    waker: Waker,
}

/// Names a timer until it has fired.
pub(crate) type TimerKey = (Instant, u64);

/// A datagram on its way.
#[derive(Debug)]
struct Flight {
    from: SocketAddr,
    to: SocketAddr,
    payload: BytesMut,
}

/// What has happened, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that did not arrive: lost, cut off, or for a node that is down or does not read.
    pub lost: u64,
    /// Datagrams that arrived twice.
    pub duplicated: u64,
    /// Nodes killed.
    pub kills: u64,
    /// Nodes frozen.
    pub freezes: u64,
    /// Nodes killed at a named point of their code.
    pub ambushes: u64,
}

/// Everything that is shared.
pub(crate) struct World {
    pub(crate) start: Instant,
    pub(crate) now: Instant,
    pub(crate) dice: Dice,
    pub(crate) weather: Weather,
    pub(crate) links: Links,
    pub(crate) nodes: Vec<NodeState>,
    pub(crate) clients: Vec<Vec<Datagram>>,
    pub(crate) spawned: Vec<(usize, Task)>,
    pub(crate) ambushes: Ambushes,
    /// Nodes struck at a point, to be frozen when the task that passed it has been polled.
    pub(crate) freezing: Vec<usize>,
    pub(crate) counters: Counters,
    sequence: u64,
    in_flight: BTreeMap<(Instant, u64), Flight>,
    timers: BTreeMap<TimerKey, Timer>,
    pub(crate) trace: u64,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("now", &(self.now - self.start))
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl World {
    pub(crate) fn new(seed: u64, weather: Weather) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: start,
            dice: Dice::new(seed),
            weather,
            links: Links::default(),
            nodes: Vec::new(),
            clients: Vec::new(),
            spawned: Vec::new(),
            ambushes: Ambushes::default(),
            freezing: Vec::new(),
            counters: Counters::default(),
            sequence: 0,
            in_flight: BTreeMap::new(),
            timers: BTreeMap::new(),
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    /// Monotonic time as a node has it.
    pub(crate) fn node_now(&self, node: usize) -> Instant {
        self.nodes[node].clock.now(self.now)
    }

    /// Wakes `waker` at `at` in the world's time; for a node, also when its clock changes.
    pub(crate) fn wake_at(&mut self, node: Option<usize>, at: Instant, waker: Waker) -> TimerKey {
        self.sequence += 1;
        let key = (at, self.sequence);
        self.timers.insert(key, Timer { node, waker });
        key
    }

    /// Wakes `waker` when a node's clock shows `deadline`, or changes.
    pub(crate) fn wake_at_node_time(&mut self, node: usize, deadline: Instant, waker: Waker) -> TimerKey {
        /// When a timer on a clock that stands still is looked at, unless the clock goes on before.
        const NEVER: Duration = Duration::from_hours(24 * 365);
        let at = self.nodes[node].clock.when(deadline).unwrap_or(self.now + NEVER);
        self.wake_at(Some(node), at.max(self.now + Duration::from_nanos(1)), waker)
    }

    /// Forgets a timer, if it has not fired.
    pub(crate) fn cancel(&mut self, key: TimerKey) {
        self.timers.remove(&key);
    }

    /// Changes a node's clock; whatever waits for it looks again.
    pub(crate) fn change_clock(&mut self, node: usize, change: impl FnOnce(&mut NodeClock, Instant)) {
        change(&mut self.nodes[node].clock, self.now);
        self.timers.retain(|_, timer| {
            let concerned = timer.node == Some(node);
            if concerned {
                timer.waker.wake_by_ref();
            }
            !concerned
        });
    }

    /// When the next thing happens: a timer, or an arrival.
    pub(crate) fn next_event(&self) -> Option<Instant> {
        let network = self.in_flight.keys().next().map(|&(at, _)| at);
        let timer = self.timers.keys().next().map(|&(at, _)| at);
        network.into_iter().chain(timer).min()
    }

    /// Moves time to `to` and does what is due by then.
    pub(crate) fn advance(&mut self, to: Instant) {
        self.now = self.now.max(to);
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            entry.remove().waker.wake();
        }
        while let Some(entry) = self.in_flight.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let Flight { from, to, payload } = entry.remove();
            self.deliver(from, to, payload);
        }
    }

    pub(crate) fn send(&mut self, sender: Host, to: SocketAddr, payload: &[u8]) {
        self.counters.sent += 1;
        let (number, from) = match sender {
            Host::Node(node) => (node as u64, node_addr(node)),
            Host::Client(client) => (1_000_000 + client as u64, client_addr(client)),
        };
        self.note(&[number, u64::from(to.port()), payload.len() as u64]);
        let fate = self.links.fate(&self.weather, &mut self.dice, sender, host_of(to));
        match fate {
            [None, _] => self.counters.lost += 1,
            [Some(_), Some(_)] => self.counters.duplicated += 1,
            _ => {}
        }
        for time in fate.into_iter().flatten() {
            self.sequence += 1;
            let payload = BytesMut::from(payload);
            self.in_flight
                .insert((self.now + time, self.sequence), Flight { from, to, payload });
        }
    }

    pub(crate) fn trace_mesh(&mut self, from: CoreId, to: CoreId, message: &MeshMessage) {
        let (kind, size) = match message {
            MeshMessage::Datagram(datagram) => (1, datagram.payload.len()),
            MeshMessage::Requests(requests) => (2, requests.len()),
            MeshMessage::Replies(replies) => (3, replies.bytes.len()),
            MeshMessage::Drained => (4, 0),
            MeshMessage::Peer(liveness) => (5, liveness.node as usize),
            MeshMessage::Shards(views) => (6, views.len()),
            MeshMessage::Clocks(clocks) => (7, clocks.wrong.len()),
            MeshMessage::Cluster(cluster) => (8, cluster.epoch() as usize),
            MeshMessage::Hints(hints) => (9, hints.len()),
        };
        self.note(&[u64::from(from), u64::from(to), kind, size as u64]);
    }

    /// Mixes an event into the trace, with its time.
    pub(crate) fn note(&mut self, words: &[u64]) {
        let nanos = (self.now - self.start).as_nanos() as u64;
        for &word in std::iter::once(&nanos).chain(words) {
            self.trace = (self.trace ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        }
    }

    pub(crate) fn deliver(&mut self, from: SocketAddr, to: SocketAddr, payload: BytesMut) {
        let datagram = Datagram {
            remote: from,
            local_ip: None,
            ecn: 0,
            payload,
        };
        match host_of(to) {
            Some(Host::Node(node)) if self.nodes.get(node).is_some_and(|node| node.up) => {
                let node = &mut self.nodes[node];
                let cores = node.cores.len() as CoreId;
                let steered = if self.weather.steering {
                    steer::core_of(&datagram.payload, cores)
                } else {
                    None
                };
                let inbox = &mut node.cores[usize::from(steered.unwrap_or(from.port() % cores))];
                if inbox.datagrams.len() < self.weather.socket_capacity {
                    inbox.datagrams.push_back(datagram);
                    inbox.wake();
                    node.received += 1;
                    return;
                }
            }
            Some(Host::Client(client)) if client < self.clients.len() => {
                self.clients[client].push(datagram);
                return;
            }
            _ => {}
        }
        self.counters.lost += 1;
    }
}

/// The address of a node.
pub(crate) fn node_addr(node: usize) -> SocketAddr {
    let number = 1 + node as u16;
    let [high, low] = number.to_be_bytes();
    SocketAddr::new(Ipv4Addr::new(10, 0, high, low).into(), PORT)
}

/// The address of a client.
pub(crate) fn client_addr(client: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 1, 0, 1).into(), CLIENT_PORT + client as u16)
}

/// Whose address this is.
fn host_of(addr: SocketAddr) -> Option<Host> {
    let IpAddr::V4(ip) = addr.ip() else { return None };
    match ip.octets() {
        [10, 0, high, low] if addr.port() == PORT => {
            let number = u16::from_be_bytes([high, low]);
            Some(Host::Node(usize::from(number.checked_sub(1)?)))
        }
        [10, 1, 0, 1] => Some(Host::Client(usize::from(addr.port().checked_sub(CLIENT_PORT)?))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_their_hosts() {
        for number in [0, 1, 254, 255, 999] {
            assert_eq!(host_of(node_addr(number)), Some(Host::Node(number)));
            assert_eq!(host_of(client_addr(number)), Some(Host::Client(number)));
        }
        assert_eq!(host_of("10.0.0.0:7400".parse().unwrap()), None);
        assert_eq!(host_of("10.9.9.9:7400".parse().unwrap()), None);
    }
}
