//! Who is asked what any replica may answer, and what becomes of nodes that do not answer.

use std::time::{Duration, Instant};

use generation_client::{BreakerState, Client, Consistency, Error, RetryPolicy, State};
use generation_proto::options::{Moved, ReplyOptions};
use generation_proto::{Opcode, Status};

use crate::fake::{Act, Authority, FakeNode, key_of_shard, map_of};
use crate::until;

const AGE: Duration = Duration::from_secs(1);

/// Three nodes with the same entries, of which the first leads everything, and a client without a single retry.
async fn three(authority: &Authority) -> (Vec<FakeNode>, Client) {
    let first = FakeNode::start(authority, 1, 1);
    let second = FakeNode::start_beside(authority, 2, 1, &first);
    let third = FakeNode::start_beside(authority, 3, 1, &first);
    let nodes = vec![first, second, third];
    let map = map_of(
        1,
        &[(1, nodes[0].addr, 1), (2, nodes[1].addr, 1), (3, nodes[2].addr, 1)],
        1,
        1,
    );
    for node in &nodes {
        node.set_map(map.clone());
    }
    let policy = RetryPolicy {
        budget_capacity: 0,
        ..RetryPolicy::default()
    };
    let client = authority.builder(&[&nodes[0]]).retry(policy).connect().await.unwrap();
    client.put("k", "v").await.unwrap();
    (nodes, client)
}

fn counts(nodes: &[FakeNode], opcode: Opcode) -> Vec<usize> {
    nodes.iter().map(|node| node.count(opcode)).collect()
}

#[tokio::test]
async fn relaxed_reads_are_spread_over_the_replicas_and_linearizable_ones_go_to_the_leader() {
    let authority = Authority::new();
    let (nodes, client) = three(&authority).await;
    for _ in 0..100 {
        assert_eq!(client.get("k").await.unwrap().meta.node, 1);
    }
    assert_eq!(counts(&nodes, Opcode::Get), [100, 0, 0]);
    let spread = async {
        for n in 0.. {
            let read = match n % 3 {
                0 => client.get("k").stale(AGE).await,
                1 => client.get("k").read_your_writes().await,
                _ => client.get("k").session(client.session_token()).await,
            };
            assert_eq!(read.unwrap().value().unwrap(), "v");
            if counts(&nodes, Opcode::Get).iter().all(|&count| count > 10) {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), spread).await.unwrap();
}

#[tokio::test]
async fn a_slow_replica_is_asked_seldom() {
    let authority = Authority::new();
    let (nodes, client) = three(&authority).await;
    nodes[2].script(|_| Act::Delay(Duration::from_millis(40)));
    for _ in 0..200 {
        client.get("k").stale(AGE).await.unwrap();
    }
    let counts = counts(&nodes, Opcode::Get);
    assert!(counts[2] < 20 && counts[0] > 20 && counts[1] > 20, "{counts:?}");
}

#[tokio::test]
async fn what_a_replica_cannot_tell_is_asked_of_the_leader_at_no_cost() {
    let authority = Authority::new();
    let (nodes, client) = three(&authority).await;
    let moved = Moved {
        epoch: 1,
        term: 1,
        leader: 1,
        core: 0,
    };
    nodes[1].script(|_| Act::Refuse(Status::TooStale, ReplyOptions::default()));
    nodes[2].script(move |_| Act::Move(moved));
    let maps = counts(&nodes, Opcode::Map);
    for _ in 0..100 {
        assert_eq!(client.get("k").stale(AGE).await.unwrap().meta.node, 1);
    }
    let asked = counts(&nodes, Opcode::Get);
    assert!(asked[0] == 100 && asked[1] > 0 && asked[2] > 0, "{asked:?}");
    assert_eq!(counts(&nodes, Opcode::Map), maps, "there is nothing to learn from that");
    let metrics = client.metrics();
    assert_eq!((metrics.redirects as usize, metrics.retries), (asked[1] + asked[2], 0));
    // Whoever leads is as fresh as can be, so what it refuses is refused.
    nodes[0].script(|_| Act::Refuse(Status::TooStale, ReplyOptions::default()));
    let error = client.get("k").stale(AGE).await.unwrap_err();
    assert_eq!((error.code(), error.state()), ("too_stale", State::NotSent));
}

#[tokio::test]
async fn batches_of_relaxed_reads_are_spread_and_fall_back_too() {
    let authority = Authority::new();
    let (nodes, client) = three(&authority).await;
    let keys: Vec<Vec<u8>> = (0..4).map(key_of_shard).collect();
    for key in &keys {
        client.put(key, "v").await.unwrap();
    }
    for node in &nodes[1..] {
        node.refuse_key(keys[3].clone(), Status::TooStale);
    }
    for consistency in [Consistency::Stale(AGE), Consistency::ReadYourWrites] {
        for _ in 0..20 {
            for read in client.multi_get(&keys).consistency(consistency.clone()).await {
                assert!(read.unwrap().is_found());
            }
        }
    }
    let counts = counts(&nodes, Opcode::MultiGet);
    assert!(counts.iter().all(|&count| count > 0), "{counts:?}");
}

#[tokio::test]
async fn a_replica_without_a_connection_is_passed_over_and_no_read_fails_for_it() {
    let authority = Authority::new();
    let (nodes, _) = three(&authority).await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let dead = silent.local_addr().unwrap();
    nodes[0].set_map(map_of(
        1,
        &[(1, nodes[0].addr, 1), (2, nodes[1].addr, 1), (3, dead, 1)],
        1,
        1,
    ));
    nodes[1].stop();
    // Longer than the test takes: a read that waits for one of them shows.
    let client = authority.builder(&[&nodes[0]]).connect().await.unwrap();
    let begin = Instant::now();
    for _ in 0..200 {
        assert_eq!(client.get("k").stale(AGE).await.unwrap().meta.node, 1);
    }
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "no read waits for a connection"
    );
    let impatient = authority
        .builder(&[&nodes[0]])
        .connect_timeout(Duration::from_millis(20));
    let client = impatient.connect().await.unwrap();
    let error = loop {
        client.get("k").stale(AGE).await.unwrap();
        match client.ping_node(3).await.unwrap_err() {
            error if error.code() == "node_down" => break error,
            error => assert_eq!(error.code(), "no_answer", "{error}"),
        }
    };
    assert_eq!(error.state(), State::NotSent);
    let told = error.to_string();
    assert!(
        told.contains("node 3") && told.contains(&dead.to_string()) && told.contains("has not answered for"),
        "{told}"
    );
}

#[tokio::test]
async fn a_replica_that_keeps_silent_is_left_alone_until_a_probe_finds_it_well() {
    let authority = Authority::new();
    let (nodes, client) = three(&authority).await;
    nodes[2].script(|_| Act::Never);
    let read = || client.get("k").stale(AGE).send();
    while nodes[2].count(Opcode::Get) < 3 {
        let in_a_hurry = client.get("k").stale(AGE).timeout(Duration::from_millis(300));
        drop(in_a_hurry.await);
    }
    let asked = nodes[2].count(Opcode::Get);
    let seen = client.metrics().nodes[2].clone();
    assert_eq!((seen.node, seen.breaker, seen.failures), (3, BreakerState::Open, 3));
    assert!(seen.silent_for.unwrap() > Duration::ZERO && seen.requests >= 3 && seen.outstanding == 0);
    for _ in 0..200 {
        read().await.unwrap();
    }
    assert_eq!(nodes[2].count(Opcode::Get), asked, "nobody has to wait for it");
    nodes[2].script(|_| Act::Serve);
    let found_well = async {
        while nodes[2].count(Opcode::Get) == asked {
            read().await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found_well).await.unwrap();
    assert!(nodes[2].count(Opcode::Ping) > 0);
    let seen = client.metrics().nodes[2].clone();
    assert_eq!(
        (seen.breaker, seen.failures, seen.silent_for),
        (BreakerState::Closed, 0, None)
    );
    assert!(seen.latency.is_some());
}

#[tokio::test]
async fn with_no_replica_left_relaxed_reads_fail_at_once_and_linearizable_requests_go_on() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    node.script(|_| Act::Never);
    for _ in 0..3 {
        let lost = client.put("k", "v").timeout(Duration::from_millis(260)).await;
        assert_eq!(lost.unwrap_err().state(), State::InDoubt);
    }
    let error = client.get("k").stale(AGE).await.unwrap_err();
    assert_eq!(error.code(), "node_down");
    assert!(matches!(
        client.multi_get(["k"]).stale(AGE).await[0],
        Err(Error::NotSent(_))
    ));
    let asked = node.count(Opcode::Get);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    until("it was sent all the same", || node.count(Opcode::Get) > asked).await;
    node.script(|_| Act::Serve);
    // Its answer is as good as that of a probe.
    client.put("k", "v").await.unwrap();
    client.get("k").stale(AGE).await.unwrap();
    waiting.abort();
}

#[tokio::test]
async fn a_linearizable_read_that_its_leader_does_not_answer_is_asked_of_a_follower() {
    let authority = Authority::new();
    let (nodes, _) = three(&authority).await;
    let client = authority.builder(&[&nodes[0]]).connect().await.unwrap();
    client.put("k", "v").await.unwrap();
    nodes[0].script(|_| Act::Never);
    let (one, several) = (client.get("k").send(), client.multi_get(["k", "l"]).send());
    let (one, several) = tokio::join!(one, several);
    assert_ne!(one.unwrap().meta.node, 1);
    assert_ne!(several[0].as_ref().unwrap().meta.node, 1);
    assert_eq!((nodes[0].count(Opcode::Get), nodes[0].count(Opcode::MultiGet)), (1, 1));
    // A write is the leader's alone: what became of it is unknown, and it is not sent again.
    let written = client.put("k", "w").timeout(Duration::from_millis(1500)).await;
    assert_eq!(written.unwrap_err().state(), State::InDoubt);
    assert_eq!(counts(&nodes, Opcode::Put), [3, 0, 0]);
}

#[tokio::test]
async fn without_budget_or_another_replica_a_slow_read_is_waited_for() {
    let authority = Authority::new();
    let (nodes, without_budget) = three(&authority).await;
    let alone = FakeNode::start(&authority, 1, 1);
    let single = authority.builder(&[&alone]).connect().await.unwrap();
    for node in [&nodes[0], &alone] {
        node.script(|_| Act::Delay(Duration::from_millis(1300)));
    }
    let (first, second) = tokio::join!(without_budget.get("k").send(), single.get("k").send());
    assert_eq!((first.unwrap().meta.node, second.unwrap().meta.node), (1, 1));
    assert_eq!(
        (counts(&nodes, Opcode::Get), alone.count(Opcode::Get)),
        (vec![1, 0, 0], 1)
    );
}
