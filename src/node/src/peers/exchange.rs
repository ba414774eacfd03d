//! One core's side of all its connections to other nodes: who is on them, what is read off them and what is written to them.
//!
//! Nothing here calls the replica layer: what has arrived is left in [`Exchange::deliveries`], and calls that have ended leave
//! their wakers in [`Calls::wakers`].

mod connecting;
mod reading;
mod writing;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use generation_proto::close_code;
use generation_proto::peer::{ALPN_PEER, Class, Message, PEER_VERSION, PeerHello, Ping, Refusal, control};
use generation_proto::reply::Stat;
use generation_quic::{ConnectionKey, Driver, Event, StreamId};
use slab::Slab;

use super::calls::{Calls, Placed};
use super::config::{PeerNode, PeersConfig};
use super::detector::{Detector, Finding};
use super::lane::{LANES, Lane};
use super::link::{Link, Pending};
use super::{Liveness, PeerError, PeerId, PeerStats, Routed};
use crate::config::{Authorize, CoreConfig};
use crate::env::CoreId;
use crate::mesh::PeerLiveness;

/// Connections of one node that have not said which core they are of, beyond one for each of its cores.
const STRANGERS: usize = 16;

/// How often every node that lives is asked for the time.
const CLOCK_INTERVAL: Duration = Duration::from_secs(2);

/// How long an answer to that is worth something.
const CLOCK_STALE: Duration = Duration::from_secs(15);

/// What a request must be answered to.
#[derive(Debug)]
pub(super) struct Asked {
    key: ConnectionKey,
    pub(super) shard: u16,
    pub(super) kind: u8,
    id: u64,
    /// Bytes of its payload, which count until it is answered.
    bytes: usize,
}

#[derive(Debug)]
pub(super) struct RequestHead {
    pub(super) from: PeerId,
    pub(super) asked: Asked,
}

/// What the replica layer is to be told.
#[derive(Debug)]
pub(super) enum Delivery {
    Request(RequestHead, Bytes),
    Message(PeerId, u16, u8, Bytes),
    Liveness(u64, Liveness),
}

#[derive(Debug)]
struct Node {
    id: u64,
    addr: std::net::SocketAddr,
    cores: CoreId,
    /// The link to its core 0; the others follow.
    first_link: usize,
    alive: bool,
    /// It belongs to the cluster no more, or has other cores by now and stands in the list again.
    gone: bool,
    /// 0: not known.
    incarnation: u64,
    directory: Option<u128>,
    /// The directory it must have.
    expected: Option<u128>,
    /// How far its clock was ahead, in milliseconds, and when.
    clock_offset: Option<(i64, Instant)>,
    stats: PeerStats,
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "two steps of coming up, who dialled, and two lists, all independent"
)]
#[derive(Debug)]
struct Connection {
    key: ConnectionKey,
    /// The node on the other side: the one dialled, or the one the certificate names.
    node: usize,
    /// Known from the beginning if this side dialled, else from the hello.
    link: Option<usize>,
    dialled: bool,
    /// TLS is done and the other side is who it must be: it can be written to if this side dialled.
    open: bool,
    /// Every lane was greeted.
    greeted: bool,
    incarnation: u64,
    /// By when it must have been greeted.
    until: Instant,
    lanes: [Option<Lane>; LANES],
    /// In the list of connections to be written.
    dirty: bool,
    /// Too much is left unread by the other side.
    flooded: bool,
    /// Requests of the other side without an answer, and their bytes.
    incoming: usize,
    incoming_bytes: usize,
    last_used: Instant,
}

/// See the module's documentation.
pub(super) struct Exchange {
    own: PeerId,
    config: PeersConfig,
    authorize: Authorize,
    cluster: String,
    /// What each lane begins with.
    hello: Bytes,
    nodes: Vec<Node>,
    links: Vec<Link>,
    connections: Slab<Connection>,
    /// Places in `connections` by the driver's slots.
    slots: Vec<u32>,
    pub(super) calls: Calls,
    pub(super) deliveries: Vec<Delivery>,
    readable: VecDeque<(ConnectionKey, usize)>,
    dirty: Vec<ConnectionKey>,
    wanted: Vec<usize>,
    /// Nodes whose connections are to be closed.
    leaving: Vec<usize>,
    /// Connections with something that waits for company, and until when.
    along: Vec<ConnectionKey>,
    along_until: Option<Instant>,
    /// On core 0.
    detector: Option<Detector>,
    /// What the other cores are to be told.
    told: Vec<PeerLiveness>,
    start: Instant,
    now: Instant,
    /// When the other nodes are asked for the time again.
    next_clock: Instant,
    random: u64,
    /// When connections, links and the detector are to be looked at.
    timer: Option<Instant>,
    /// The reactor will take a turn before it rests.
    awake: bool,
    stopped: bool,
    messages: Vec<Message>,
}

impl Exchange {
    pub(super) fn new(config: &CoreConfig, core: CoreId, cores: CoreId, random: u64, now: Instant) -> Self {
        let own = PeerId {
            node: config.node,
            core,
        };
        let peers = config.peers.clone();
        let limits = &peers.limits;
        let detector = (core == 0).then(|| Detector::new(now, limits.ping_interval, limits.suspect_after));
        let mut hello = BytesMut::new();
        PeerHello {
            version: PEER_VERSION,
            core,
            cores,
            node: own.node,
            directory: peers.directory,
            incarnation: peers.incarnation,
            cluster: &config.cluster,
        }
        .encode(&mut hello);
        let mut exchange = Self {
            own,
            authorize: config.authorize.clone(),
            cluster: config.cluster.clone(),
            hello: hello.freeze(),
            nodes: Vec::new(),
            links: Vec::new(),
            connections: Slab::new(),
            slots: Vec::new(),
            calls: Calls::default(),
            deliveries: Vec::new(),
            readable: VecDeque::new(),
            dirty: Vec::new(),
            wanted: Vec::new(),
            leaving: Vec::new(),
            along: Vec::new(),
            along_until: None,
            detector,
            told: Vec::new(),
            start: now,
            now,
            next_clock: now,
            random,
            timer: None,
            awake: true,
            stopped: false,
            messages: Vec::new(),
            config: peers,
        };
        let nodes = std::mem::take(&mut exchange.config.nodes);
        exchange.set_nodes(&nodes, now);
        exchange
    }

    /// Has these be the other nodes from now on. Connections to those that were and are not listed are closed with the next flush.
    pub(super) fn set_nodes(&mut self, nodes: &[PeerNode], now: Instant) {
        self.now = now;
        for place in 0..self.nodes.len() {
            let node = &self.nodes[place];
            let stays = |other: &&PeerNode| other.id == node.id && other.cores == node.cores;
            match nodes.iter().find(stays) {
                _ if node.gone => {}
                Some(other) => {
                    let node = &mut self.nodes[place];
                    (node.addr, node.expected) = (other.addr, other.directory);
                    let is_another = node.directory.zip(node.expected).is_some_and(|(is, must)| is != must);
                    if is_another {
                        self.leaving.push(place);
                    }
                }
                None => self.dismiss(place),
            }
        }
        for (place, node) in nodes.iter().enumerate() {
            assert!(
                node.id != 0 && node.id != self.own.node,
                "node {} among the others",
                node.id
            );
            assert!(
                (1..=256).contains(&node.cores),
                "node {} of {} cores",
                node.id,
                node.cores
            );
            let twice = nodes[..place].iter().any(|other| other.id == node.id);
            assert!(!twice, "node {} twice", node.id);
            if self.node(node.id).is_none() {
                self.add(node);
            }
        }
        if self.detector.is_some() && !self.nodes.is_empty() {
            self.wake_by(now);
        }
    }

    fn add(&mut self, node: &PeerNode) {
        let (place, first_link) = (self.nodes.len(), self.links.len());
        let link = |core| Link::new(PeerId { node: node.id, core }, place, self.now);
        self.links.extend((0..node.cores).map(link));
        if let Some(detector) = &mut self.detector {
            detector.watch(self.own.node < node.id);
        }
        self.nodes.push(Node {
            id: node.id,
            addr: node.addr,
            cores: node.cores,
            first_link,
            alive: false,
            gone: false,
            incarnation: 0,
            directory: None,
            expected: node.directory,
            clock_offset: None,
            stats: PeerStats::default(),
        });
        for link in first_link..self.links.len() {
            self.keep(link);
        }
    }

    fn dismiss(&mut self, place: usize) {
        let node = &mut self.nodes[place];
        node.gone = true;
        if std::mem::take(&mut node.alive) {
            self.deliveries.push(Delivery::Liveness(node.id, Liveness::Down));
        }
        if let Some(detector) = &mut self.detector {
            detector.dismiss(place);
        }
        for link in self.links_of(place) {
            self.let_go(link);
        }
        self.leaving.push(place);
    }

    /// The links to a node's cores.
    fn links_of(&self, place: usize) -> Range<usize> {
        let node = &self.nodes[place];
        node.first_link..node.first_link + usize::from(node.cores)
    }

    pub(super) fn call(
        &mut self,
        to: PeerId,
        shard: u16,
        kind: u8,
        payload: Bytes,
        deadline: Instant,
        now: Instant,
    ) -> Result<u64, PeerError> {
        let link = self.link_of(to)?;
        let stats = &mut self.nodes[self.links[link].node].stats;
        stats.calls += 1;
        if self.links[link].calls >= self.config.limits.calls {
            stats.busy += 1;
            return Err(PeerError::Busy);
        }
        let id = self.calls.insert(link, deadline);
        self.links[link].calls += 1;
        let message = Pending {
            class: Class::Request,
            kind,
            shard,
            id,
            payload,
            along: false,
        };
        if let Err(error) = self.submit(link, message, now) {
            self.forget(id);
            return Err(error);
        }
        Ok(id)
    }

    pub(super) fn send(
        &mut self,
        to: PeerId,
        shard: u16,
        kind: u8,
        payload: Bytes,
        along: bool,
        now: Instant,
    ) -> Result<(), PeerError> {
        let link = self.link_of(to)?;
        let message = Pending {
            class: Class::OneWay,
            kind,
            shard,
            id: 0,
            payload,
            along,
        };
        self.submit(link, message, now)
    }

    /// A call is waited for no more.
    pub(super) fn forget(&mut self, id: u64) {
        if let Some(link) = self.calls.forget(id) {
            self.links[link].calls -= 1;
        }
    }

    pub(super) fn answer(&mut self, asked: &Asked, outcome: Result<Bytes, Refusal>) {
        let limit = self.config.limits.message_bytes;
        let Some(connection) = self.connection(asked.key) else {
            return;
        };
        connection.incoming -= 1;
        connection.incoming_bytes -= asked.bytes;
        let outcome = match outcome {
            Ok(payload) if payload.len() > limit => {
                tracing::error!(len = payload.len(), limit, "a reply to a peer is too long to be sent");
                Err(Refusal::Unanswered)
            }
            outcome => outcome,
        };
        let (class, payload) = match outcome {
            Ok(payload) => (Class::Reply, payload),
            Err(refusal) => (Class::Refusal, Bytes::copy_from_slice(&[refusal.code()])),
        };
        self.enqueue(asked.key, class, asked.kind, asked.shard, asked.id, payload);
    }

    pub(super) fn is_alive(&self, node: u64) -> bool {
        self.node(node).is_some_and(|node| node.alive)
    }

    pub(super) fn clock_offset_ms(&self, node: u64) -> Option<i64> {
        self.node(node)?.clock_offset.map(|(offset_ms, _)| offset_ms)
    }

    /// The nodes that live and were asked for the time lately, with how far their clocks are ahead of this one's.
    pub(super) fn clock_offsets(&self, now: Instant) -> Vec<(u64, i64)> {
        let fresh = self.nodes.iter().filter(|node| node.alive).filter_map(|node| {
            let (offset_ms, at) = node.clock_offset?;
            (now.saturating_duration_since(at) < CLOCK_STALE).then_some((node.id, offset_ms))
        });
        fresh.collect()
    }

    pub(super) fn directory(&self, node: u64) -> Option<u128> {
        self.node(node)?.directory
    }

    pub(super) fn stats(&self, node: u64) -> Option<PeerStats> {
        let place = self.place_of(node)?;
        let mut stats = self.nodes[place].stats;
        let links = self.links.iter().filter(|link| link.node == place);
        for link in links {
            stats.calls_in_flight += link.calls as u64;
            stats.queued_bytes += link.pending_bytes.iter().sum::<usize>() as u64;
        }
        for (_, connection) in self.connections.iter().filter(|(_, other)| other.node == place) {
            stats.connections += u64::from(connection.greeted);
            stats.connecting += u64::from(!connection.greeted);
            let lanes = connection.lanes.iter().flatten();
            stats.queued_bytes += lanes.map(|lane| lane.output.waiting() as u64).sum::<u64>();
        }
        Some(stats)
    }

    pub(super) fn encode_stats(&self, core: CoreId, out: &mut BytesMut) {
        for node in self.nodes.iter().filter(|node| !node.gone) {
            let stats = self.stats(node.id).expect("invariant: the node is listed");
            for (name, value) in PeerStats::NAMES.iter().zip(stats.values()) {
                Stat {
                    name: &format!("core.{core}.peer.{}.{name}", node.id),
                    value,
                }
                .encode(out);
            }
        }
    }

    /// Whether the reactor must be woken for what was queued.
    pub(super) fn needs_wake(&mut self) -> bool {
        let work = !self.dirty.is_empty() || !self.wanted.is_empty() || !self.leaving.is_empty();
        work && !std::mem::replace(&mut self.awake, true)
    }

    pub(super) fn event(&mut self, now: Instant, driver: &mut Driver, key: ConnectionKey, event: &Event) -> Routed {
        self.now = now;
        let Some(place) = self.place(key) else {
            return match event {
                Event::Connected if driver.alpn(key).as_deref() == Some(ALPN_PEER) => self.accept(driver, key),
                _ => Routed::Other,
            };
        };
        match *event {
            Event::Connected => self.opened(driver, place),
            Event::Opened(id) => self.lane_opened(driver, place, id),
            Event::Readable(id) => {
                if let Some(lane) = self.lane(place, id) {
                    self.queue_read(place, lane);
                }
            }
            Event::Writable(_) => self.mark_dirty(place),
            Event::Stopped(..) | Event::Finished(_) => {
                self.violation(driver, key, close_code::PROTOCOL, "a lane was ended");
            }
            Event::Closed(ref reason) => self.closed(driver, key, reason),
            Event::Available => {}
        }
        Routed::Peer
    }

    /// Core 0 of this node has found something out.
    pub(super) fn told(&mut self, now: Instant, driver: &mut Driver, liveness: PeerLiveness) {
        self.now = now;
        let Some(place) = self.place_of(liveness.node) else {
            return;
        };
        self.incarnation(driver, place, liveness.incarnation);
        self.set_alive(driver, place, liveness.alive);
    }

    /// Reads the lanes that have something. `true`: there is more.
    pub(super) fn receive(&mut self, now: Instant, now_ms: u64, driver: &mut Driver) -> bool {
        self.now = now;
        self.awake = true;
        for _ in 0..self.readable.len() {
            let Some((key, lane)) = self.readable.pop_front() else {
                break;
            };
            if let Some(place) = self.place(key) {
                self.read(now_ms, driver, place, lane);
            }
        }
        !self.readable.is_empty()
    }

    /// Does what is due, and hands everything queued to the transport. `true`: there is more to do at once.
    pub(super) fn flush(
        &mut self,
        now: Instant,
        now_ms: u64,
        driver: &mut Driver,
        tell: impl FnMut(PeerLiveness),
    ) -> bool {
        self.now = now;
        self.expire();
        for place in std::mem::take(&mut self.leaving) {
            self.close_all(driver, place, close_code::NONE, "the node is no peer any more", |_| {
                true
            });
        }
        if self.timer.is_some_and(|timer| timer <= now) {
            self.tend(now_ms, driver);
        }
        for link in std::mem::take(&mut self.wanted) {
            self.links[link].wanted = false;
            self.dial(driver, link);
        }
        self.send_along();
        let mut dirty = std::mem::take(&mut self.dirty);
        for key in dirty.drain(..) {
            self.write(driver, key);
        }
        if self.dirty.is_empty() {
            // The memory is used again.
            self.dirty = dirty;
        }
        let more = !self.told.is_empty() || !self.deliveries.is_empty() || !self.dirty.is_empty();
        self.told.drain(..).for_each(tell);
        self.awake = more;
        more
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let timers = [self.timer, self.along_until, self.calls.next_deadline()];
        timers.into_iter().flatten().min()
    }

    pub(super) fn recycle(&mut self, deliveries: Vec<Delivery>) {
        if self.deliveries.is_empty() {
            self.deliveries = deliveries;
        }
    }

    pub(super) fn shut_down(&mut self, now: Instant, driver: &mut Driver) {
        self.now = now;
        self.stopped = true;
        let keys: Vec<ConnectionKey> = self.connections.iter().map(|(_, connection)| connection.key).collect();
        for key in keys {
            self.write(driver, key);
            self.close(driver, key, close_code::SHUTTING_DOWN, "the node is stopping");
        }
        let links = &mut self.links;
        self.calls
            .fail(|_, _| Some(PeerError::Stopped), |link| links[link].calls -= 1);
    }

    /// Looks at the connections, links and the detector, and says when to do so next.
    fn tend(&mut self, now_ms: u64, driver: &mut Driver) {
        let now = self.now;
        self.timer = None;
        let late: Vec<ConnectionKey> = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.greeted && connection.until <= now)
            .map(|(_, connection)| connection.key)
            .collect();
        for key in late {
            self.close(driver, key, close_code::TIMEOUT, "no hello in time");
        }
        self.detect(now_ms, driver);
        for index in 0..self.links.len() {
            self.tend_link(driver, index);
        }
        let waiting = self.connections.iter().filter(|(_, connection)| !connection.greeted);
        let next = waiting.map(|(_, connection)| connection.until).min();
        let detector = self.detector.as_ref().map(Detector::next);
        self.timer = [self.timer, next, detector].into_iter().flatten().min();
    }

    fn tend_link(&mut self, driver: &mut Driver, index: usize) {
        let link = &self.links[index];
        if self.nodes[link.node].gone {
            return;
        }
        let patience = self.config.limits.dial_timeout;
        match (link.dialled, link.accepted) {
            (None, None) if self.own.core == 0 && link.peer.core == 0 => {
                let at = link.keep_at();
                if at <= self.now {
                    self.dial(driver, index);
                } else {
                    self.wake_by(at);
                }
            }
            (Some(key), Some(_)) if self.own.node > link.peer.node => {
                // Both sides send on the other one by now.
                let unused = self.place(key).is_some_and(|place| {
                    let connection = &self.connections[place];
                    let mut lanes = connection.lanes.iter().flatten();
                    connection.greeted
                        && connection.last_used + patience <= self.now
                        && connection.incoming == 0
                        && lanes.all(|lane| lane.output.waiting() == 0)
                });
                if unused && !self.calls.any_on(key) {
                    self.close(driver, key, close_code::NONE, "the other connection is used");
                } else {
                    self.wake_by(self.now + patience);
                }
            }
            _ => {}
        }
    }

    /// A step of the failure detector.
    fn detect(&mut self, now_ms: u64, driver: &mut Driver) {
        let Some(detector) = &mut self.detector else { return };
        let mut findings = Vec::new();
        detector.step(self.now, |finding| findings.push(finding));
        if self.next_clock <= self.now {
            // Pings for signs of life come from one side of a pair, and only where it is silent.
            self.next_clock = self.now + CLOCK_INTERVAL;
            let alive = (0..self.nodes.len()).filter(|node| self.nodes[*node].alive);
            let ask = alive.map(Finding::Ping).filter(|ping| !findings.contains(ping));
            let ask: Vec<Finding> = ask.collect();
            findings.extend(ask);
        }
        for finding in findings {
            match finding {
                Finding::Suspected(node) => self.set_alive(driver, node, false),
                Finding::Ping(node) => {
                    let echo = (self.now - self.start).as_nanos() as u64;
                    if let Some(key) = self.preferred(self.nodes[node].first_link) {
                        self.say(key, control::PING, Ping { echo, unix_ms: now_ms });
                    }
                }
            }
        }
    }

    fn expire(&mut self) {
        let (connections, slots, links, nodes) = (&self.connections, &self.slots, &mut self.links, &mut self.nodes);
        let taken = |placed: &Placed| {
            let place = slots.get(placed.connection.slot()).map(|&place| place as usize);
            let connection = place.and_then(|place| connections.get(place));
            connection.is_none_or(|connection| was_taken(connection, placed))
        };
        self.calls.expire(self.now, taken, |link| {
            links[link].calls -= 1;
            nodes[links[link].node].stats.calls_timed_out += 1;
        });
    }

    fn mark_dirty(&mut self, place: usize) {
        let connection = &mut self.connections[place];
        if !std::mem::replace(&mut connection.dirty, true) {
            self.dirty.push(connection.key);
        }
    }

    fn queue_read(&mut self, place: usize, lane: usize) {
        let connection = &mut self.connections[place];
        if let Some(read) = &mut connection.lanes[lane]
            && !std::mem::replace(&mut read.queued, true)
        {
            self.readable.push_back((connection.key, lane));
        }
    }

    fn link_of(&self, to: PeerId) -> Result<usize, PeerError> {
        let node = self.node(to.node).filter(|node| to.core < node.cores);
        let node = node.ok_or(PeerError::Unknown)?;
        Ok(node.first_link + usize::from(to.core))
    }

    fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id && !node.gone)
    }

    fn place_of(&self, id: u64) -> Option<usize> {
        self.nodes.iter().position(|node| node.id == id && !node.gone)
    }

    fn lane(&self, place: usize, stream: StreamId) -> Option<usize> {
        let mut lanes = self.connections[place].lanes.iter();
        lanes.position(|lane| lane.as_ref().is_some_and(|lane| lane.stream == stream))
    }

    fn place(&self, key: ConnectionKey) -> Option<usize> {
        let place = *self.slots.get(key.slot())? as usize;
        let connection = self.connections.get(place)?;
        (connection.key == key).then_some(place)
    }

    fn connection(&mut self, key: ConnectionKey) -> Option<&mut Connection> {
        let place = self.place(key)?;
        self.connections.get_mut(place)
    }

    fn wake_by(&mut self, at: Instant) {
        self.timer = Some(self.timer.map_or(at, |timer| timer.min(at)));
    }

    /// The next random number (splitmix64; Steele, Lea, Flood, OOPSLA '14).
    fn chance(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Whether the transport took a message whole: if not, the other side cannot have it.
fn was_taken(connection: &Connection, placed: &Placed) -> bool {
    let lane = connection.lanes[placed.lane].as_ref();
    lane.is_some_and(|lane| lane.output.taken() >= placed.end)
}
