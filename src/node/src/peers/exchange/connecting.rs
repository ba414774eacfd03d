//! Coming and going of connections: dialling and accepting, who is on the other side, which node has restarted or fallen silent,
//! and what becomes of what waited on a connection that is lost.

use std::time::Duration;

use generation_proto::close_code;
use generation_proto::peer::{PEER_VERSION, PeerHello};
use generation_quic::{CloseReason, ConnectTarget, ConnectionKey, Driver, StreamId};

use super::{Connection, Delivery, Exchange, STRANGERS, was_taken};
use crate::config::Role;
use crate::mesh::PeerLiveness;
use crate::peers::lane::{LANES, Lane, PROMPT};
use crate::peers::{Liveness, PeerError, Routed, SERVER_NAME};

impl Exchange {
    pub(super) fn dial(&mut self, driver: &mut Driver, index: usize) {
        let link = &self.links[index];
        if self.stopped
            || self.nodes[link.node].gone
            || link.dialled.is_some()
            || link.accepted.is_some()
            || !link.may_dial(self.now)
        {
            return;
        }
        let Some(crypto) = self.config.crypto.clone() else {
            return;
        };
        let node = &mut self.nodes[link.node];
        node.stats.dials += 1;
        let target = ConnectTarget {
            remote: node.addr,
            server_name: SERVER_NAME.to_owned(),
            core: Some(link.peer.core as u8),
            crypto,
        };
        match driver.connect(self.now, &target) {
            Ok(key) => {
                let node = link.node;
                self.links[index].dialled = Some(key);
                self.insert(key, node, Some(index));
            }
            Err(error) => {
                tracing::warn!(peer = %link.peer, %error, "cannot dial");
                self.dial_failed(index);
            }
        }
    }

    /// A connection asks for the peer protocol.
    pub(super) fn accept(&mut self, driver: &mut Driver, key: ConnectionKey) -> Routed {
        let named = self.named(driver, key);
        let known = named.and_then(|id| {
            let place = self.place_of(id);
            place.ok_or_else(|| format!("node {id} is not among this node's peers"))
        });
        let verdict = known.and_then(|node| {
            let strangers = self
                .connections
                .iter()
                .filter(|(_, other)| other.node == node && !other.dialled && !other.greeted)
                .count();
            if strangers < STRANGERS + usize::from(self.nodes[node].cores) {
                Ok(node)
            } else {
                Err("too many connections without a hello".to_owned())
            }
        });
        match verdict {
            Ok(node) if !self.stopped => {
                self.insert(key, node, None);
                Routed::Peer
            }
            Ok(_) => {
                driver.close(self.now, key, close_code::SHUTTING_DOWN, "the node is stopping");
                Routed::Peer
            }
            Err(reason) => {
                tracing::info!(remote = ?driver.remote(key), reason, "peer connection refused");
                driver.close(self.now, key, close_code::UNAUTHORIZED, &reason);
                Routed::Refused
            }
        }
    }

    /// The id of the node a connection's certificate names.
    pub(super) fn named(&self, driver: &mut Driver, key: ConnectionKey) -> Result<u64, String> {
        let identity = (self.authorize)(&driver.peer_certificates(key))?;
        match identity.role {
            Role::Node => identity
                .name
                .parse()
                .map_err(|_| format!("`{}` is no node's id", identity.name)),
            Role::Client | Role::Admin => Err(format!(
                "the peer protocol is for nodes; {} is none: use {}",
                identity.name,
                String::from_utf8_lossy(generation_proto::ALPN_CLIENT)
            )),
        }
    }

    pub(super) fn insert(&mut self, key: ConnectionKey, node: usize, link: Option<usize>) {
        let until = self.now + self.config.limits.dial_timeout;
        let place = self.connections.insert(Connection {
            key,
            node,
            link,
            dialled: link.is_some(),
            open: link.is_none(),
            greeted: false,
            incarnation: 0,
            until,
            lanes: [None, None],
            dirty: false,
            flooded: false,
            incoming: 0,
            incoming_bytes: 0,
            last_used: self.now,
        });
        if self.slots.len() <= key.slot() {
            self.slots.resize(key.slot() + 1, u32::MAX);
        }
        self.slots[key.slot()] = place as u32;
        self.wake_by(until);
    }

    /// The handshake of a connection this side dialled is complete.
    pub(super) fn opened(&mut self, driver: &mut Driver, place: usize) {
        let (key, node) = (self.connections[place].key, self.connections[place].node);
        let wanted = self.nodes[node].id;
        let found = match self.named(driver, key) {
            Ok(id) if id == wanted => Ok(()),
            Ok(id) => Err(format!("node {wanted} was dialled, and node {id} answered")),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = found {
            tracing::warn!(node = wanted, addr = %self.nodes[node].addr, reason, "the dialled node is another");
            return self.violation(driver, key, close_code::WRONG_NODE, &reason);
        }
        for lane in 0..LANES {
            let Some(stream) = driver.open(key) else {
                return self.violation(driver, key, close_code::PROTOCOL, "the node allows no lanes");
            };
            // Whatever waits on the lane of long messages, short ones leave first.
            driver.set_priority(key, stream, i32::from(lane == PROMPT));
            self.open_lane(place, lane, stream);
        }
        self.connections[place].open = true;
        if let Some(link) = self.connections[place].link {
            self.send_pending(link);
        }
    }

    /// The other side has opened a stream.
    pub(super) fn lane_opened(&mut self, driver: &mut Driver, place: usize, stream: StreamId) {
        let connection = &self.connections[place];
        let key = connection.key;
        let lane = stream.index() as usize;
        if connection.dialled || lane >= LANES {
            return self.violation(driver, key, close_code::PROTOCOL, "a stream that is no lane");
        }
        if lane == PROMPT {
            driver.set_priority(key, stream, 1);
        }
        self.open_lane(place, lane, stream);
        self.queue_read(place, lane);
    }

    pub(super) fn open_lane(&mut self, place: usize, lane: usize, stream: StreamId) {
        let mut opened = Lane::new(stream, self.config.limits.message_bytes);
        opened.output.append(&self.hello);
        self.connections[place].lanes[lane] = Some(opened);
        self.mark_dirty(place);
    }

    /// Reads the hello a lane begins with.
    pub(super) fn greet(
        &mut self,
        driver: &mut Driver,
        place: usize,
        lane: usize,
        payload: &[u8],
    ) -> Result<(), (u32, String)> {
        let wrong = |reason: String| (close_code::WRONG_NODE, reason);
        let Some(hello) = PeerHello::decode(payload) else {
            return Err((close_code::PROTOCOL, "a hello that cannot be read".to_owned()));
        };
        let connection = &self.connections[place];
        let node = &self.nodes[connection.node];
        if hello.version != PEER_VERSION {
            let reason = format!(
                "this node speaks version {PEER_VERSION} of the peer protocol, not {}",
                hello.version
            );
            return Err((close_code::VERSION, reason));
        }
        if hello.cluster != self.cluster {
            return Err(wrong(format!("cluster `{}`, not `{}`", hello.cluster, self.cluster)));
        }
        if hello.node != node.id {
            return Err(wrong(format!(
                "node {} by its certificate says it is node {}",
                node.id, hello.node
            )));
        }
        if hello.core >= node.cores {
            return Err(wrong(format!(
                "core {} of node {}, which has {} by this node's configuration",
                hello.core, node.id, node.cores
            )));
        }
        let link = node.first_link + usize::from(hello.core);
        if connection.link.is_some_and(|known| known != link) {
            return Err(wrong(format!("core {} answered, which was not dialled", hello.core)));
        }
        if connection.incarnation != 0 && connection.incarnation != hello.incarnation {
            return Err((close_code::PROTOCOL, "two hellos that differ".to_owned()));
        }
        if node.expected.is_some_and(|expected| expected != hello.directory) {
            return Err(wrong(format!(
                "node {} has another data directory than the cluster knows it by: two nodes have its id, or it has lost its disk and must \
                 be taken in again with `generation cluster join`",
                node.id
            )));
        }
        let (key, node, incarnation) = (connection.key, connection.node, hello.incarnation);
        self.nodes[node].directory = Some(hello.directory);
        let connection = &mut self.connections[place];
        connection.link = Some(link);
        connection.incarnation = incarnation;
        let greeted = |lane: &Option<Lane>| lane.as_ref().is_some_and(|lane| lane.greeted);
        if let Some(lane) = &mut connection.lanes[lane] {
            lane.greeted = true;
        }
        if !connection.lanes.iter().all(greeted) {
            return Ok(());
        }
        connection.greeted = true;
        let dialled = connection.dialled;
        self.nodes[node].stats.connects += 1;
        self.links[link].succeeded();
        self.incarnation(driver, node, incarnation);
        if !dialled {
            // Whoever dials again has given the connection before up.
            if let Some(old) = self.links[link].accepted.replace(key) {
                self.close(driver, old, close_code::NONE, "another connection took its place");
                self.links[link].accepted = Some(key);
            }
            self.send_pending(link);
        }
        if self.links[link].dialled.is_some() && self.links[link].accepted.is_some() {
            self.wake_by(self.now + self.config.limits.dial_timeout);
        }
        Ok(())
    }

    /// A node's incarnation, as a hello or core 0 told it. Connections of another are over.
    pub(super) fn incarnation(&mut self, driver: &mut Driver, place: usize, incarnation: u64) {
        let node = &mut self.nodes[place];
        if incarnation == 0 || node.incarnation == incarnation {
            return;
        }
        let restarted = std::mem::replace(&mut node.incarnation, incarnation) != 0;
        let id = node.id;
        if restarted {
            tracing::info!(node = id, "a peer has restarted");
            self.close_all(
                driver,
                place,
                close_code::NONE,
                "the node has restarted",
                |connection| connection.incarnation != 0 && connection.incarnation != incarnation,
            );
            self.deliveries.push(Delivery::Liveness(id, Liveness::Restarted));
        }
        if self.detector.is_some() {
            self.tell(place);
        }
    }

    pub(super) fn set_alive(&mut self, driver: &mut Driver, place: usize, alive: bool) {
        let node = &mut self.nodes[place];
        if std::mem::replace(&mut node.alive, alive) == alive {
            return;
        }
        let id = node.id;
        if alive {
            tracing::info!(node = id, "a peer is up");
        } else {
            tracing::warn!(node = id, "a peer is down");
            node.stats.suspicions += 1;
            self.close_all(
                driver,
                place,
                close_code::TIMEOUT,
                "nothing was heard for too long",
                |_| true,
            );
        }
        let change = if alive { Liveness::Up } else { Liveness::Down };
        self.deliveries.push(Delivery::Liveness(id, change));
        if self.detector.is_some() {
            self.tell(place);
        }
    }

    /// Has the other cores told of a node.
    pub(super) fn tell(&mut self, place: usize) {
        let node = &self.nodes[place];
        self.told.push(PeerLiveness {
            node: node.id,
            alive: node.alive,
            incarnation: node.incarnation,
        });
    }

    /// Closes those connections to a node for which `which` holds.
    pub(super) fn close_all(
        &mut self,
        driver: &mut Driver,
        node: usize,
        code: u32,
        reason: &str,
        which: impl Fn(&Connection) -> bool,
    ) {
        let all = self.connections.iter().map(|(_, connection)| connection);
        let keys: Vec<ConnectionKey> = all
            .filter(|connection| connection.node == node && which(connection))
            .map(|connection| connection.key)
            .collect();
        for key in keys {
            self.close(driver, key, code, reason);
        }
    }

    /// Closes a connection whose other side does not keep to the protocol.
    pub(super) fn violation(&mut self, driver: &mut Driver, key: ConnectionKey, code: u32, reason: &str) {
        if let Some(connection) = self.connection(key) {
            let node = connection.node;
            self.nodes[node].stats.violations += 1;
            tracing::warn!(node = self.nodes[node].id, code, reason, "peer connection closed");
            self.close(driver, key, code, reason);
        }
    }

    pub(super) fn close(&mut self, driver: &mut Driver, key: ConnectionKey, code: u32, reason: &str) {
        driver.close(self.now, key, code, reason);
        self.count_loss(key, code);
        self.gone(key);
    }

    /// The driver says that a connection is over.
    pub(super) fn closed(&mut self, driver: &mut Driver, key: ConnectionKey, reason: &CloseReason) {
        let Some(connection) = self.connection(key) else { return };
        let (node, incarnation) = (connection.node, connection.incarnation);
        tracing::debug!(node = self.nodes[node].id, %reason, "peer connection ended");
        let code = match *reason {
            CloseReason::Application { code, .. } => u32::try_from(code).ok(),
            _ => None,
        };
        self.count_loss(key, code.unwrap_or(close_code::PROTOCOL));
        self.gone(key);
        let Some(code) = code else { return };
        let leaves = [close_code::SHUTTING_DOWN, close_code::STOPPED].contains(&code);
        if leaves
            && incarnation != 0
            && incarnation == self.nodes[node].incarnation
            && self.detector.as_mut().is_some_and(|detector| detector.gone(node))
        {
            self.set_alive(driver, node, false);
        }
    }

    /// Counts the end of a connection, unless it was one in good order.
    fn count_loss(&mut self, key: ConnectionKey, code: u32) {
        if ![close_code::NONE, close_code::SHUTTING_DOWN].contains(&code)
            && let Some(connection) = self.connection(key)
        {
            let node = connection.node;
            self.nodes[node].stats.connections_lost += 1;
        }
    }

    /// Forgets a connection: what waited on it fails.
    pub(super) fn gone(&mut self, key: ConnectionKey) {
        let Some(place) = self.place(key) else { return };
        let connection = self.connections.remove(place);
        self.slots[key.slot()] = u32::MAX;
        let links = &mut self.links;
        let mut lost = 0;
        self.calls.fail(
            |_, placed| {
                let placed = placed.filter(|placed| placed.connection == key)?;
                let maybe_received = was_taken(&connection, placed);
                Some(PeerError::Lost { maybe_received })
            },
            |link| {
                links[link].calls -= 1;
                lost += 1;
            },
        );
        self.nodes[connection.node].stats.calls_lost += lost;
        let Some(index) = connection.link else { return };
        let link = &mut self.links[index];
        if link.accepted == Some(key) {
            link.accepted = None;
        }
        if link.dialled == Some(key) {
            link.dialled = None;
            if !connection.greeted {
                self.dial_failed(index);
            }
        }
        self.keep(index);
    }

    /// A dial has failed: rest, and let those go who waited for it.
    pub(super) fn dial_failed(&mut self, index: usize) {
        let chance = self.chance();
        let link = &mut self.links[index];
        link.failed(self.now, &self.config.limits, chance);
        if link.accepted.is_none() {
            self.let_go(index);
        }
        self.keep(index);
    }

    /// Drops what waits for a connection, and has the calls among it fail.
    pub(super) fn let_go(&mut self, index: usize) {
        drop(self.links[index].take_pending());
        let links = &mut self.links;
        let mut lost = 0;
        self.calls.fail(
            |of, placed| (of == index && placed.is_none()).then_some(PeerError::Unreachable),
            |link| {
                links[link].calls -= 1;
                lost += 1;
            },
        );
        self.nodes[self.links[index].node].stats.calls_lost += lost;
    }

    /// Plans for the connection between two cores 0, which is kept up for the detectors: the node with the larger id leaves the
    /// dialling to the other for a while, so that usually only one is made.
    pub(super) fn keep(&mut self, index: usize) {
        let link = &mut self.links[index];
        if self.own.core != 0 || link.peer.core != 0 || self.nodes[link.node].gone {
            return;
        }
        let patience = self.config.limits.ping_interval * 2;
        let wait = if self.own.node < link.peer.node {
            Duration::ZERO
        } else {
            patience
        };
        link.kept_from = self.now + wait;
        let at = link.keep_at();
        self.wake_by(at);
    }
}
