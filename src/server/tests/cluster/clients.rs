//! What a client does about nodes that die: its reads, its scans and what it thinks of each node.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use generation_client::{BreakerState, Client, Cursor};

use crate::load::{block_on, connect};
use crate::processes::{Cluster, PATIENCE};

const KEYS: usize = 1_000;
const AGE: Duration = Duration::from_secs(30);

fn key(n: usize) -> String {
    format!("key-{n}")
}

/// Reads each key at its ease until `done`; every read must find its entry.
async fn read_until(client: &Client, what: &str, done: impl Fn(&Client) -> bool) {
    let start = Instant::now();
    for n in (0..KEYS).cycle() {
        if done(client) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "in vain: {what}: {:?}", client.metrics());
        let read = if n % 2 == 0 {
            client.get(key(n)).stale(AGE).await
        } else {
            client.get(key(n)).read_your_writes().await
        };
        assert!(read.unwrap().is_found(), "{}", key(n));
    }
}

#[test]
fn relaxed_reads_and_scans_go_on_when_a_node_dies_and_return_to_it() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "4"]);
    cluster.wait_until_alike(3);
    block_on(async {
        let client = connect(&cluster.config()).await;
        let written = client.multi_put((0..KEYS).map(|n| (key(n), "v"))).await;
        assert!(written.iter().all(Result::is_ok));
        read_until(&client, "all three to serve reads", |client| {
            client.metrics().nodes.iter().all(|node| node.requests > 100)
        })
        .await;

        let mut scan = client.keys().page_size(50).stream();
        let mut listed = BTreeSet::new();
        for _ in 0..120 {
            listed.insert(scan.next().await.unwrap().unwrap().key);
        }
        let victim = cluster.leader(0);
        cluster.kill(&[victim]);
        let is = |client: &Client, state| client.metrics().nodes[victim - 1].breaker == state;
        read_until(&client, "the dead node to be left alone", |client| {
            is(client, BreakerState::Open)
        })
        .await;
        for _ in 0..400 {
            listed.insert(scan.next().await.unwrap().unwrap().key);
        }
        // Another program goes on.
        let cursor: Cursor = scan.cursor().unwrap().to_string().parse().unwrap();
        let other = connect(&cluster.config()).await;
        let mut rest = other.keys().page_size(50).resume(cursor).stream();
        while let Some(entry) = rest.next().await {
            listed.insert(entry.unwrap().key);
        }
        for n in 0..KEYS {
            assert!(listed.contains(key(n).as_bytes()), "{}", key(n));
        }
        other.close().await;

        cluster.restart_well(victim);
        let before = client.metrics().nodes[victim - 1].requests;
        read_until(&client, "the node to serve reads again", |client| {
            is(client, BreakerState::Closed) && client.metrics().nodes[victim - 1].requests > before + 50
        })
        .await;
        client.close().await;
    });
    cluster.stop();
}
