//! Gossip on real sockets of the loopback interface.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use generation_node::gossip::{Change, Event, Fact, Gossip as _, LeaderHint, Load, Place, Update};
use tempfile::TempDir;

use super::keys::{KEY_BYTES, KeyRing};
use super::seal::{DATAGRAM_BYTES, Refusal, Sealer, Start};
use super::{GossipError, Settings, UdpGossip};
use crate::net::port::PortError;

/// How long anything may take. What is waited for is a condition; this only ends a test that has failed.
const PATIENCE: Duration = Duration::from_mins(1);

const CLUSTER: &str = "test";

/// Waits until it holds.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "it never came to this: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A directory with a key file.
struct Keys {
    directory: TempDir,
}

fn line(id: u16) -> String {
    let byte = id as u8;
    format!("{id}: {}\n", format!("{byte:02x}").repeat(KEY_BYTES))
}

impl Keys {
    fn new(ids: &[u16]) -> Self {
        let keys = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        keys.write(ids);
        keys
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("gossip.keys")
    }

    /// Puts another file in the place of the one before.
    fn write(&self, ids: &[u16]) {
        let text: String = ids.iter().copied().map(line).collect();
        self.write_text(&text);
    }

    fn write_text(&self, text: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(new, self.path()).unwrap();
    }
}

/// What a node has heard of another.
#[derive(Debug, Default, Clone, PartialEq)]
struct Heard {
    generation: u64,
    alive: bool,
    facts: Vec<Fact>,
}

struct Node {
    id: u64,
    gossip: UdpGossip,
    heard: BTreeMap<u64, Heard>,
}

fn settings(id: u64, generation: u64, keys: &Path) -> Settings {
    Settings {
        cluster: CLUSTER.into(),
        node: id,
        generation,
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        interval: Duration::from_millis(50),
        key_file: keys.to_owned(),
        seeds: Vec::new(),
    }
}

impl Node {
    fn with(settings: Settings) -> Self {
        Self {
            id: settings.node,
            gossip: UdpGossip::start(settings).unwrap(),
            heard: BTreeMap::new(),
        }
    }

    fn start(id: u64, keys: &Keys) -> Self {
        Self::with(settings(id, 1_000, &keys.path()))
    }

    fn address(&self) -> SocketAddr {
        self.gossip.address()
    }

    fn look_for(&self, seeds: &[SocketAddr]) {
        self.gossip.publish(Update::Seeds(seeds.to_vec()));
    }

    fn tell(&self, fact: Fact) {
        self.gossip.publish(Update::Tell(fact));
    }

    fn poll(&mut self) {
        let mut events = Vec::new();
        self.gossip.poll(&mut events);
        for Event {
            node,
            generation,
            change,
        } in events
        {
            assert_ne!(node, self.id, "a node hears nothing of itself");
            let heard = self.heard.entry(node).or_default();
            assert!(generation >= heard.generation, "a generation came back");
            if generation > heard.generation {
                *heard = Heard {
                    generation,
                    ..Heard::default()
                };
            }
            match change {
                Change::Liveness(alive) => heard.alive = alive,
                Change::Told(fact) => {
                    heard.facts.retain(|old| match (old, &fact) {
                        (Fact::Leaders { core: old, .. }, Fact::Leaders { core: new, .. }) => old != new,
                        _ => std::mem::discriminant(old) != std::mem::discriminant(&fact),
                    });
                    heard.facts.push(fact);
                }
            }
        }
    }

    fn hears(&mut self, node: u64, fact: &Fact) -> bool {
        self.poll();
        self.heard.get(&node).is_some_and(|heard| heard.facts.contains(fact))
    }

    fn living(&mut self) -> usize {
        self.poll();
        self.heard.values().filter(|heard| heard.alive).count()
    }

    fn refused(&self, refusal: Refusal) -> u64 {
        self.gossip.stats().refused(refusal)
    }
}

fn leads(node: u64, term: u64) -> Fact {
    let hint = |shard| LeaderHint { shard, epoch: 1, term };
    Fact::Leaders {
        core: 0,
        leads: vec![hint(node as u16), hint(node as u16 + 1_000)],
    }
}

/// Nodes 1 to `count` that look for the first.
fn cluster(count: u64, keys: &Keys, interval: Duration) -> Vec<Node> {
    let start = |id| {
        Node::with(Settings {
            interval,
            ..settings(id, 1_000, &keys.path())
        })
    };
    let nodes: Vec<Node> = (1..=count).map(start).collect();
    let seed = nodes[0].address();
    for node in &nodes {
        node.look_for(&[seed]);
        node.tell(leads(node.id, 1));
    }
    nodes
}

fn converge(nodes: &mut [Node], term: u64) {
    let ids: Vec<u64> = nodes.iter().map(|node| node.id).collect();
    for node in nodes {
        let own = node.id;
        for &other in ids.iter().filter(|other| **other != own) {
            wait_until(&format!("node {own} hears what {other} leads"), || {
                node.hears(other, &leads(other, term))
            });
        }
        let others = ids.len() - 1;
        wait_until(&format!("node {own} knows that all live"), || node.living() == others);
    }
}

fn everybody_hears_everybody(count: u64, interval: Duration) {
    let keys = Keys::new(&[1]);
    let mut nodes = cluster(count, &keys, interval);
    converge(&mut nodes, 1);
    for node in &nodes {
        node.tell(leads(node.id, 2));
    }
    converge(&mut nodes, 2);
    for node in &nodes {
        for refusal in Refusal::ALL {
            assert_eq!(node.refused(refusal), 0, "{refusal:?}");
        }
        assert_eq!(node.gossip.stats().restarts(), 0);
    }
}

#[test]
fn three_nodes_hear_each_other() {
    everybody_hears_everybody(3, Duration::from_millis(50));
}

#[test]
fn ten_nodes_hear_each_other() {
    everybody_hears_everybody(10, Duration::from_millis(50));
}

#[test]
fn thirty_nodes_hear_each_other() {
    everybody_hears_everybody(30, Duration::from_millis(100));
}

#[test]
fn a_node_that_ends_is_seen_dead_and_comes_back_under_a_higher_generation() {
    let keys = Keys::new(&[1]);
    let mut nodes = cluster(3, &keys, Duration::from_millis(50));
    converge(&mut nodes, 1);
    let gone = nodes.pop().unwrap();
    let address = gone.address();
    drop(gone);
    for node in &mut nodes {
        wait_until("node 3 is dead", || node.living() == 1);
    }
    let back = Node::with(Settings {
        listen: address,
        ..settings(3, 2_000, &keys.path())
    });
    // Nobody has to be told where: the others go on trying where it was.
    back.tell(leads(3, 7));
    nodes.push(back);
    for node in &mut nodes[..2] {
        wait_until("node 3 is back", || node.hears(3, &leads(3, 7)) && node.living() == 2);
        assert_eq!(node.heard[&3].generation, 2_000);
        assert_eq!(node.heard[&3].facts, [leads(3, 7)]);
    }
}

#[test]
fn every_fact_arrives_and_a_waiting_core_is_woken() {
    let keys = Keys::new(&[1]);
    let (one, mut two) = (Node::start(1, &keys), Node::start(2, &keys));
    let woken = Arc::new(AtomicU64::new(0));
    let of_two = Arc::clone(&woken);
    two.gossip.wake_with(move || {
        of_two.fetch_add(1, Ordering::Release);
    });
    let facts = [
        leads(1, 9),
        Fact::RecordsVersion(17),
        Fact::Load(Load {
            busy_permille: 250,
            memory_permille: 990,
            connections: 12,
        }),
        Fact::Place(Place {
            addr: "10.1.2.3:7400".parse().unwrap(),
            zone: "north".into(),
        }),
        Fact::Release("generation 9.9.9".into()),
    ];
    for fact in &facts {
        one.tell(fact.clone());
    }
    one.look_for(&[two.address()]);
    wait_until("the core was woken", || woken.load(Ordering::Acquire) > 0);
    for fact in &facts {
        wait_until("the fact is there", || two.hears(1, fact));
    }
}

#[test]
fn seeds_are_found_by_name() {
    let keys = Keys::new(&[1]);
    let mut one = Node::start(1, &keys);
    let port = one.address().port();
    let mut two = Node::with(Settings {
        seeds: vec!["no-such-host.invalid:1".into(), format!("localhost:{port}")],
        ..settings(2, 1_000, &keys.path())
    });
    wait_until("both know that the other lives", || {
        one.living() == 1 && two.living() == 1
    });
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Somebody without a node behind it.
struct Stranger {
    socket: UdpSocket,
    sealer: Sealer,
    ring: Arc<KeyRing>,
}

impl Stranger {
    fn new(cluster: &str, node: u64, ids: &[u16]) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let start = Start {
            node,
            generation: 1,
            salt: 1,
        };
        let text: String = ids.iter().copied().map(line).collect();
        Self {
            sealer: Sealer::new(cluster.into(), start, socket.local_addr().unwrap()),
            ring: Arc::new(KeyRing::parse(Path::new("keys"), &text).unwrap()),
            socket,
        }
    }

    fn seal_at(&mut self, unix_ms: u64, message: &[u8]) -> Vec<u8> {
        let mut datagrams = Vec::new();
        self.sealer.seal(&self.ring, unix_ms, message, &mut datagrams).unwrap();
        assert!(datagrams.len() <= DATAGRAM_BYTES);
        datagrams
    }

    fn seal(&mut self, message: &[u8]) -> Vec<u8> {
        self.seal_at(unix_ms(), message)
    }

    fn send(&self, to: &Node, datagram: &[u8]) {
        self.socket.send_to(datagram, to.address()).unwrap();
    }
}

/// A message of chitchat, of type `kind`.
fn message(kind: u8, content: &[&[u8]]) -> Vec<u8> {
    [&45_139_u16.to_le_bytes()[..], &[0, kind], &content.concat()].concat()
}

/// Node `id`, its start 1, as a digest (with heartbeat) or a delta (without) has it.
fn entry(id: u64, address: SocketAddr, numbers: &[u64]) -> Vec<u8> {
    let id = id.to_string();
    let SocketAddr::V4(address) = address else {
        panic!("the tests use IPv4")
    };
    let mut entry = (id.len() as u16).to_le_bytes().to_vec();
    entry.extend(id.as_bytes());
    entry.extend(1_u64.to_le_bytes());
    entry.push(4);
    entry.extend(address.ip().octets());
    entry.extend(address.port().to_le_bytes());
    entry.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    entry
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A question with a digest of node `id` alone.
fn syn(id: u64, address: SocketAddr, heartbeat: u64) -> Vec<u8> {
    let digest = [&1_u16.to_le_bytes()[..], &entry(id, address, &[heartbeat, 0, 0])].concat();
    message(0, &[&digest, &text(CLUSTER)])
}

/// News that node `id` has set a key.
fn news(id: u64, address: SocketAddr, key: &str, value: &str) -> Vec<u8> {
    let mut operations = vec![0];
    operations.extend(entry(id, address, &[0, 0]));
    operations.push(1);
    operations.extend([text(key), text(value)].concat());
    operations.extend(1_u64.to_le_bytes());
    operations.push(0);
    let length = (operations.len() as u16).to_le_bytes();
    message(2, &[&[2], &length, &operations, &[0]])
}

#[test]
fn what_is_not_the_clusters_is_dropped_and_counted_and_changes_nothing() {
    let keys = Keys::new(&[1]);
    let mut nodes = cluster(2, &keys, Duration::from_millis(50));
    converge(&mut nodes, 1);
    let target = &mut nodes[0];
    let before = target.heard.clone();
    let mut counted = BTreeMap::new();
    let mut refused = |target: &Node, refusal: Refusal| {
        let count = counted.entry(refusal.name()).or_insert(0);
        *count += 1;
        let want = *count;
        wait_until(&format!("it is refused: {refusal}"), || target.refused(refusal) == want);
    };
    let mut good = Stranger::new(CLUSTER, 9, &[1]);
    let address = good.socket.local_addr().unwrap();
    let spoken = syn(9, address, 5);

    // Noise, and what is cut short or too long.
    for noise in [&b"junk"[..], &[1; 100], &[0; 2_000], &[]] {
        good.send(target, noise);
        refused(target, Refusal::Format);
    }
    let datagram = good.seal(&spoken);
    for cut in [30, 60] {
        good.send(target, &datagram[..cut]);
        refused(target, Refusal::Format);
    }
    good.send(target, &datagram[..datagram.len() - 1]);
    refused(target, Refusal::Forged);
    // A bit changed in the content.
    let mut forged = datagram.clone();
    *forged.last_mut().unwrap() ^= 1;
    good.send(target, &forged);
    refused(target, Refusal::Forged);
    // Of another cluster, under the same key; under another key with the same id; under an unknown id.
    let mut other_key = Stranger::new(CLUSTER, 9, &[1]);
    other_key.ring = Arc::new(KeyRing::parse(Path::new("keys"), &line(2).replace("2:", "1:")).unwrap());
    let datagram = other_key.seal(&spoken);
    other_key.send(target, &datagram);
    refused(target, Refusal::Forged);
    let mut foreign = Stranger::new("another", 9, &[1]);
    let datagram = foreign.seal(&spoken);
    foreign.send(target, &datagram);
    refused(target, Refusal::Forged);
    let mut unknown = Stranger::new(CLUSTER, 9, &[2]);
    let datagram = unknown.seal(&spoken);
    unknown.send(target, &datagram);
    refused(target, Refusal::UnknownKey);
    // In this node's name, and from another time.
    let mut twin = Stranger::new(CLUSTER, 1, &[1]);
    let datagram = twin.seal(&spoken);
    twin.send(target, &datagram);
    refused(target, Refusal::Own);
    for unix_ms in [unix_ms() - 31_000, unix_ms() + 32_000] {
        let datagram = good.seal_at(unix_ms, &spoken);
        good.send(target, &datagram);
        refused(target, Refusal::Clock);
    }
    // Sealed well, and senseless.
    for senseless in [&b""[..], b"hello", &spoken[..spoken.len() - 1], &message(9, &[])] {
        let datagram = good.seal(senseless);
        good.send(target, &datagram);
        refused(target, Refusal::Malformed);
    }

    target.poll();
    assert_eq!(target.heard, before);
    assert_eq!(target.gossip.stats().restarts(), 0);
    // It goes on: the other node is heard as before.
    nodes[1].tell(leads(2, 5));
    wait_until("node 2 is heard", || nodes[0].hears(2, &leads(2, 5)));
}

#[test]
fn a_replay_is_dropped_and_nobody_is_answered_where_it_comes_from() {
    let keys = Keys::new(&[1]);
    let target = Node::start(1, &keys);
    let mut sender = Stranger::new(CLUSTER, 9, &[1]);
    let datagram = sender.seal(&syn(9, sender.socket.local_addr().unwrap(), 5));
    // Somebody repeats what the sender says, from another address, before it arrives by itself.
    let thief = Stranger::new(CLUSTER, 8, &[1]);
    thief.send(&target, &datagram);
    let mut buffer = [0; DATAGRAM_BYTES];
    // The answer goes to whom it was from.
    sender.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (_, from) = sender.socket.recv_from(&mut buffer).unwrap();
    assert_eq!(from, target.address());
    for repeater in [&thief, &sender] {
        let before = target.refused(Refusal::Replayed);
        repeater.send(&target, &datagram);
        wait_until("the replay is refused", || {
            target.refused(Refusal::Replayed) == before + 1
        });
    }
    thief.socket.set_nonblocking(true).unwrap();
    assert!(thief.socket.recv_from(&mut buffer).is_err(), "the thief was answered");
}

#[test]
fn keys_are_exchanged_step_by_step_without_a_moment_apart() {
    let keys: Vec<Keys> = (0..3).map(|_| Keys::new(&[1])).collect();
    let mut nodes: Vec<Node> = (1..).zip(&keys).map(|(id, keys)| Node::start(id, keys)).collect();
    let seed = nodes[0].address();
    for node in &nodes {
        node.look_for(&[seed]);
        node.tell(leads(node.id, 1));
    }
    converge(&mut nodes, 1);
    let mut changes = 0;
    for step in [&[1, 2][..], &[2, 1], &[2]] {
        changes += 1;
        for place in 0..nodes.len() {
            keys[place].write(step);
            wait_until("the file is read", || {
                nodes[place].gossip.stats().key_changes() == changes
            });
            // Between two nodes' changes everybody hears everybody.
            let term = changes * 10 + place as u64;
            for node in &nodes {
                node.tell(leads(node.id, term));
            }
            converge(&mut nodes, term);
        }
    }
    // A file that cannot be used changes nothing.
    keys[0].write_text("2: not a key\n");
    wait_until("the error is counted", || nodes[0].gossip.stats().key_errors() == 1);
    nodes[0].tell(leads(1, 99));
    wait_until("node 1 is heard", || nodes[1].hears(1, &leads(1, 99)));
    for node in &nodes {
        assert_eq!(node.refused(Refusal::UnknownKey), 0);
        assert_eq!(node.refused(Refusal::Forged), 0);
    }
}

#[test]
fn gossip_that_panics_starts_again_under_a_higher_generation_and_tells_everything_again() {
    let keys = Keys::new(&[1]);
    let mut nodes = cluster(2, &keys, Duration::from_millis(50));
    converge(&mut nodes, 1);
    // Who has the key can make chitchat panic: it takes the first byte of a key for a character.
    let mut hostile = Stranger::new(CLUSTER, 9, &[1]);
    let address = hostile.socket.local_addr().unwrap();
    for message in [syn(9, address, 5), news(9, address, "é", "1")] {
        let datagram = hostile.seal(&message);
        hostile.send(&nodes[0], &datagram);
    }
    wait_until("it has started again", || nodes[0].gossip.stats().restarts() == 1);
    wait_until("the other node hears the new start", || {
        nodes[1].hears(1, &leads(1, 1)) && nodes[1].heard[&1].generation == 1_001 && nodes[1].heard[&1].alive
    });
    nodes[1].tell(leads(2, 4));
    wait_until("the new start hears the other node", || nodes[0].hears(2, &leads(2, 4)));
    nodes[0].tell(leads(1, 4));
    wait_until("the new start is heard", || nodes[1].hears(1, &leads(1, 4)));
}

#[test]
fn what_keeps_gossip_from_starting_is_said() {
    let keys = Keys::new(&[1]);
    let one = Node::start(1, &keys);
    let taken = UdpGossip::start(Settings {
        listen: one.address(),
        ..settings(2, 1, &keys.path())
    });
    let error = taken.unwrap_err();
    assert!(matches!(error, GossipError::Port(PortError::InUse { .. })), "{error}");
    assert!(error.to_string().contains("gossip.listen"), "{error}");
    let error = UdpGossip::start(settings(2, 1, Path::new("no-such-file"))).unwrap_err();
    assert!(error.to_string().contains("generation certs gossip-key"), "{error}");
}
