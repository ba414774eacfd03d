//! Reads that are asked of a second replica.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use generation_client::{BreakerState, Client, ClientBuilder, HedgeDelay, HedgePolicy, RetryPolicy};
use generation_proto::Opcode;

use crate::fake::{Act, Authority, FakeNode, map_of};
use crate::until;

const AGE: Duration = Duration::from_secs(1);
const SOON: HedgePolicy = HedgePolicy {
    delay: HedgeDelay::Fixed(Duration::from_millis(20)),
    linearizable: false,
};

/// Two nodes with the same entries, the first of which leads, and a client that is connected to both.
async fn two(authority: &Authority, build: impl FnOnce(ClientBuilder) -> ClientBuilder) -> (Vec<FakeNode>, Client) {
    let first = FakeNode::start(authority, 1, 1);
    let second = FakeNode::start_beside(authority, 2, 1, &first);
    let map = map_of(1, &[(1, first.addr, 1), (2, second.addr, 1)], 1, 1);
    first.set_map(map.clone());
    second.set_map(map);
    let client = build(authority.builder(&[&first])).connect().await.unwrap();
    client.put("k", "v").await.unwrap();
    client.ping_node(2).await.unwrap();
    (vec![first, second], client)
}

fn gets(nodes: &[FakeNode]) -> usize {
    nodes.iter().map(|node| node.count(Opcode::Get)).sum()
}

#[tokio::test]
async fn a_slow_read_is_asked_again_elsewhere_and_the_slow_request_is_dropped() {
    let authority = Authority::new();
    let policy = RetryPolicy {
        budget_percent: 0,
        ..RetryPolicy::default()
    };
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON)).retry(policy)).await;
    // Of each pair of requests, whoever gets the first never answers it.
    let nth = Arc::new(AtomicUsize::new(0));
    for node in &nodes {
        let nth = nth.clone();
        node.script(move |_| match nth.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => Act::Never,
            _ => Act::Serve,
        });
    }
    for _ in 0..30 {
        assert_eq!(client.get("k").stale(AGE).await.unwrap().value().unwrap(), "v");
    }
    // On a busy machine a node that was given up often enough is left alone for a while, so how many there were is not certain.
    let metrics = client.metrics();
    assert!(metrics.hedges > 0 && metrics.hedges_won > 0, "{metrics:?}");
    assert!(gets(&nodes) > 30);
    assert_eq!(
        u64::from(client.retries_left()),
        1000 - metrics.hedges - metrics.retries,
        "each is paid for"
    );
    until("nothing is left of the losers", || client.in_flight() == 0).await;
}

#[tokio::test]
async fn a_read_that_is_answered_in_time_is_asked_once() {
    let authority = Authority::new();
    let patient = HedgePolicy {
        delay: HedgeDelay::Fixed(Duration::from_secs(10)),
        ..SOON
    };
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(patient))).await;
    for _ in 0..100 {
        client.get("k").stale(AGE).await.unwrap();
    }
    assert_eq!((gets(&nodes), client.retries_left()), (100, 1000));
}

#[tokio::test]
async fn hedges_take_no_more_than_half_of_the_budget() {
    let authority = Authority::new();
    let policy = RetryPolicy {
        budget_capacity: 8,
        budget_percent: 0,
        ..RetryPolicy::default()
    };
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON)).retry(policy)).await;
    for node in &nodes {
        node.script(|_| Act::Delay(Duration::from_millis(60)));
    }
    for _ in 0..10 {
        client.get("k").stale(AGE).await.unwrap();
    }
    assert_eq!((gets(&nodes), client.retries_left()), (10 + 4, 4));
}

#[tokio::test]
async fn writes_are_never_hedged_and_linearizable_reads_only_on_demand() {
    let authority = Authority::new();
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON))).await;
    nodes[0].script(|_| Act::Delay(Duration::from_millis(80)));
    client.put("k", "v").await.unwrap();
    assert_eq!(client.get("k").await.unwrap().meta.node, 1);
    assert_eq!((nodes[1].count(Opcode::Put), nodes[1].count(Opcode::Get)), (0, 0));
    let everything = HedgePolicy {
        linearizable: true,
        ..SOON
    };
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(everything))).await;
    nodes[0].script(|_| Act::Never);
    assert_eq!(client.get("k").await.unwrap().meta.node, 2);
    assert_eq!((nodes[0].count(Opcode::Get), nodes[1].count(Opcode::Get)), (1, 1));
    let put = client.put("k", "v").timeout(Duration::from_millis(100)).await;
    assert!(put.is_err() && nodes[1].count(Opcode::Put) == 0);
}

#[tokio::test]
async fn without_hedges_one_replica_is_waited_for() {
    let authority = Authority::new();
    let (nodes, client) = two(&authority, |builder| builder.hedge(None)).await;
    for node in &nodes {
        node.script(|_| Act::Delay(Duration::from_millis(60)));
    }
    for _ in 0..5 {
        client.get("k").stale(AGE).await.unwrap();
    }
    assert_eq!(gets(&nodes), 5);
}

#[tokio::test]
async fn a_hedge_that_fails_leaves_the_first_request_alone() {
    let authority = Authority::new();
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON))).await;
    let nth = Arc::new(AtomicUsize::new(0));
    for node in &nodes {
        let nth = nth.clone();
        node.script(move |_| match nth.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => Act::Delay(Duration::from_millis(100)),
            _ => Act::Close,
        });
    }
    assert_eq!(client.get("k").stale(AGE).await.unwrap().value().unwrap(), "v");
    assert_eq!(gets(&nodes), 2);
}

#[tokio::test]
async fn a_replica_that_never_answers_is_left_alone_though_nobody_waits_for_it() {
    let authority = Authority::new();
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON))).await;
    nodes[1].script(|_| Act::Never);
    let left_alone = async {
        while client.metrics().nodes[1].breaker == BreakerState::Closed {
            client.get("k").stale(AGE).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_mins(2), left_alone).await.unwrap();
}

#[tokio::test]
async fn a_replica_that_is_only_slow_is_not_taken_for_silent() {
    let authority = Authority::new();
    let (nodes, client) = two(&authority, |builder| builder.hedge(Some(SOON))).await;
    // The second loses every race, and its answers reach nobody. The first is not so much quicker that the second is hardly ever chosen.
    nodes[0].script(|_| Act::Delay(Duration::from_millis(15)));
    nodes[1].script(|_| Act::Delay(Duration::from_millis(60)));
    let begin = Instant::now();
    while nodes[1].count(Opcode::Get) < 10 || begin.elapsed() < Duration::from_secs(1) {
        client.get("k").stale(AGE).await.unwrap();
        assert_eq!(client.metrics().nodes[1].breaker, BreakerState::Closed);
        assert!(
            begin.elapsed() < Duration::from_mins(1),
            "it is not asked any more: {:?}",
            client.metrics()
        );
    }
}
