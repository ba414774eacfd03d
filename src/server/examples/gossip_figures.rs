//! What gossip costs and how fast it is, for nodes in one process on the loopback interface.
//!
//! `cargo run --release -p generation-server --example gossip_figures -- [INTERVAL_MS [NODES…]]` prints, for each number of nodes, a
//! node's datagrams, bytes and CPU, how long until everybody knows everybody, how long until a change has reached the last node (median
//! and worst), and how long until everybody takes a dead node for dead.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use generation_node::gossip::{Change, Event, Fact, Gossip as _, LeaderHint, Update};
use generation_server::gossip::{Settings, UdpGossip};

/// How long costs are measured.
const MEASURED: Duration = Duration::from_secs(4);
/// Changes whose way is timed.
const CHANGES: u64 = 20;
/// How often nodes are polled; what is timed is off by as much.
const STEP: Duration = Duration::from_millis(1);

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let interval = arguments
        .next()
        .map_or(200, |number| number.expect("the interval in milliseconds"));
    let mut counts: Vec<u64> = arguments.map(|number| number.expect("numbers of nodes")).collect();
    if counts.is_empty() {
        counts = vec![3, 10, 30];
    }
    println!("interval {interval} ms");
    for count in counts {
        println!("{}", figures(count, Duration::from_millis(interval)));
    }
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn start(id: u64, interval: Duration, keys: &Path, seeds: &[SocketAddr]) -> UdpGossip {
    let gossip = UdpGossip::start(Settings {
        cluster: "figures".into(),
        node: id,
        generation: 1,
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        interval,
        key_file: keys.to_owned(),
        seeds: Vec::new(),
    })
    .expect("gossip starts on a free port");
    gossip.publish(Update::Seeds(seeds.to_vec()));
    gossip.publish(Update::Tell(Fact::Leaders {
        core: 0,
        leads: (0..8)
            .map(|shard| LeaderHint {
                shard,
                epoch: 1,
                term: id,
            })
            .collect(),
    }));
    gossip.publish(Update::Tell(Fact::Release("generation 0.1.0".into())));
    gossip
}

/// Polls until each node has had an event that counts, and returns how long that took.
fn until_all(nodes: &[UdpGossip], counts: impl Fn(usize, &Event) -> bool) -> Duration {
    let began = Instant::now();
    let mut missing: BTreeSet<usize> = (0..nodes.len()).collect();
    let mut events = Vec::new();
    while !missing.is_empty() {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "nodes {missing:?} heard nothing"
        );
        missing.retain(|&place| {
            nodes[place].poll(&mut events);
            !events.drain(..).any(|event| counts(place, &event))
        });
        thread::sleep(STEP);
    }
    began.elapsed()
}

fn figures(count: u64, interval: Duration) -> String {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let keys = directory.path().join("gossip.keys");
    fs::write(&keys, format!("1: {}\n", "5a".repeat(32))).expect("a key file");
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).expect("a key file");
    let began = Instant::now();
    let first = start(1, interval, &keys, &[]);
    let seed = first.address();
    let mut nodes = vec![first];
    nodes.extend((2..=count).map(|id| start(id, interval, &keys, &[seed])));
    let mut living = vec![BTreeSet::new(); nodes.len()];
    let mut events = Vec::new();
    while living.iter().any(|living| living.len() + 1 < nodes.len()) {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the nodes do not find each other"
        );
        for (living, node) in living.iter_mut().zip(&nodes) {
            node.poll(&mut events);
            for event in events.drain(..) {
                if event.change == Change::Liveness(true) {
                    living.insert(event.node);
                }
            }
        }
        thread::sleep(STEP);
    }
    let found = began.elapsed();

    let sum = |counter: fn(&UdpGossip) -> u64| nodes.iter().map(counter).sum::<u64>() as f64;
    let sent = |node: &UdpGossip| node.stats().sent_bytes();
    let datagrams = |node: &UdpGossip| node.stats().sent_datagrams();
    let before = (sum(sent), sum(datagrams), cpu());
    thread::sleep(MEASURED);
    let after = (sum(sent), sum(datagrams), cpu());
    let a_node_and_second = count as f64 * MEASURED.as_secs_f64();
    let bytes = (after.0 - before.0) / a_node_and_second;
    let rate = (after.1 - before.1) / a_node_and_second;
    let busy = after.2.saturating_sub(before.2).as_secs_f64() / a_node_and_second;

    let mut ways: Vec<Duration> = (1..=CHANGES)
        .map(|version| {
            nodes[0].publish(Update::Tell(Fact::RecordsVersion(version)));
            let news = Change::Told(Fact::RecordsVersion(version));
            until_all(&nodes[1..], |_, event| event.change == news)
        })
        .collect();
    ways.sort_unstable();

    let gone = nodes.pop();
    drop(gone);
    let dead = until_all(&nodes, |_, event| {
        event.node == count && event.change == Change::Liveness(false)
    });
    format!(
        "{count:>4} nodes: {rate:>6.1} datagrams/s, {:>7.2} KB/s, {:>6.3} % of a core a node; found {found:>8.1?}; a change {:>8.1?}, worst {:>8.1?}; \
         a death {dead:>8.1?}",
        bytes / 1e3,
        busy * 100.0,
        ways[ways.len() / 2],
        ways[ways.len() - 1],
    )
}
