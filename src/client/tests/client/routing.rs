//! What the client learns of the cluster's map and leaders, and what it does not believe.

use std::net::SocketAddr;
use std::time::Duration;

use generation_client::{Client, Error, RetryPolicy, State};
use generation_proto::options::Moved;
use generation_proto::{Opcode, ReplyOptions, Status};

use crate::fake::{Act, Authority, FakeNode, key_of_shard, map_of};
use crate::until;

/// Nodes 1 and 2 with the same entries, and a client whose map says that node 1 leads everything in term 5 of epoch 5.
async fn two(authority: &Authority) -> (FakeNode, FakeNode, Client) {
    let first = FakeNode::start(authority, 1, 1);
    let second = FakeNode::start_beside(authority, 2, 1, &first);
    let nodes = [(1, first.addr, 1), (2, second.addr, 1)];
    first.set_map(map_of(5, &nodes, 1, 5));
    second.set_map(map_of(5, &nodes, 1, 5));
    let client = authority.builder(&[&first]).connect().await.unwrap();
    (first, second, client)
}

/// An address at which nobody answers, and what keeps it so.
fn silence() -> (SocketAddr, std::net::UdpSocket) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    (socket.local_addr().unwrap(), socket)
}

const fn moved(term: u64, leader: u64) -> Moved {
    Moved {
        epoch: 1,
        term,
        leader,
        core: 0,
    }
}

#[tokio::test]
async fn an_old_map_after_a_newer_one_is_ignored() {
    let authority = Authority::new();
    let (first, second, client) = two(&authority).await;
    let nodes = [(1, first.addr, 1), (2, second.addr, 1)];
    let newer = map_of(6, &nodes, 2, 6);
    first.set_map(newer.clone());
    second.set_map(newer.clone());
    assert_eq!(client.map().await.unwrap(), newer);
    // Both were restored from a backup, say: the map they offer is older, and so are the leaders in it.
    first.set_map(map_of(4, &nodes, 1, 9));
    second.set_map(map_of(4, &nodes, 1, 9));
    assert_eq!(client.map().await.unwrap(), newer);
    assert_eq!(client.put("k", "v").await.unwrap().meta.node, 2);
    // Of the same epoch, an older term is no news and a newer one is.
    first.set_map(map_of(6, &nodes, 1, 5));
    second.set_map(map_of(6, &nodes, 1, 5));
    assert_eq!(client.map().await.unwrap(), newer);
    first.set_map(map_of(6, &nodes, 1, 7));
    second.set_map(map_of(6, &nodes, 1, 7));
    client.map().await.unwrap();
    assert_eq!(client.put("k", "v").await.unwrap().meta.node, 1);
}

#[tokio::test]
async fn a_newer_map_in_many_replies_is_fetched_once() {
    let authority = Authority::new();
    let (first, second, client) = two(&authority).await;
    client.get("k").await.unwrap();
    let nodes = [(1, first.addr, 1), (2, second.addr, 1)];
    let before = first.count(Opcode::Map) + second.count(Opcode::Map);
    first.set_map(map_of(6, &nodes, 1, 5));
    let keys: Vec<String> = (0..2000).map(|n| format!("k{n}")).collect();
    for read in futures_util::future::join_all(keys.iter().map(|key| client.get(key).send())).await {
        assert_eq!(read.unwrap().meta.map_epoch, 6);
    }
    until("the map is there", || client.known_map().epoch == 6).await;
    // The node that showed it is asked, not one that may not have it yet.
    assert_eq!(first.count(Opcode::Map) + second.count(Opcode::Map), before + 1);
}

#[tokio::test]
async fn a_leader_that_cannot_be_reached_does_not_use_up_the_budget_and_is_named() {
    let authority = Authority::new();
    let (dead, socket) = silence();
    let first = FakeNode::start(&authority, 1, 1);
    first.set_map(map_of(5, &[(1, first.addr, 1), (2, dead, 1)], 1, 5));
    first.script(|_| Act::Move(moved(6, 2)));
    let policy = RetryPolicy {
        budget_capacity: 3,
        budget_percent: 0,
        ..RetryPolicy::default()
    };
    let client = authority
        .builder(&[&first])
        .retry(policy)
        .connect_timeout(Duration::from_millis(50))
        .connect()
        .await
        .unwrap();
    let error = client.put("k", "v").timeout(Duration::from_millis(700)).await;
    let error = error.unwrap_err();
    assert!(first.count(Opcode::Put) > 3, "it was asked again and again");
    assert_eq!(client.retries_left(), 3);
    assert!(error.to_string().contains(&dead.to_string()), "{error}");
    // A write that waits for it is executed when it can be reached after all.
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "v").await }
    });
    let asked = first.count(Opcode::Put);
    until("it waits", || first.count(Opcode::Put) > asked + 1).await;
    drop(socket);
    let second = FakeNode::start_at(&authority, 2, dead, &first).await;
    assert_eq!(waiting.await.unwrap().unwrap().meta.node, 2);
    assert_eq!(second.count(Opcode::Put), 1);
}

#[tokio::test]
async fn a_redirect_to_a_node_that_is_not_in_the_map_waits_for_the_map() {
    let authority = Authority::new();
    let (first, second, client) = two(&authority).await;
    let third = FakeNode::start_beside(&authority, 3, 1, &first);
    first.script(|_| Act::Move(moved(6, 3)));
    second.script(|_| Act::Move(moved(6, 3)));
    let nodes = [(1, first.addr, 1), (2, second.addr, 1), (3, third.addr, 1)];
    first.set_map(map_of(6, &nodes, 3, 6));
    second.set_map(map_of(6, &nodes, 3, 6));
    assert_eq!(client.put("k", "v").await.unwrap().meta.node, 3);
}

#[tokio::test]
async fn a_shard_that_moved_is_looked_for_by_itself_in_a_batch_of_several() {
    let authority = Authority::new();
    let (first, second, client) = two(&authority).await;
    // Of the shards in the batch, the first stays and the last has moved. Both nodes know it and neither of their maps does.
    let (stays, moves) = (key_of_shard(0), key_of_shard(3));
    first.refuse_key(moves.clone(), Status::Moved);
    second.refuse_key(stays.clone(), Status::Moved);
    for round in 0..3 {
        let written = client.multi_put([(&stays, "1"), (&moves, "2")]).await;
        let nodes: Vec<u64> = written.into_iter().map(|result| result.unwrap().meta.node).collect();
        assert_eq!(nodes, [1, 2], "round {round}");
    }
}

#[tokio::test]
async fn a_batch_gives_each_key_its_own_result() {
    let authority = Authority::new();
    let (first, _second, client) = two(&authority).await;
    let keys: Vec<Vec<u8>> = (0..4).map(key_of_shard).collect();
    for key in &keys {
        client.put(key, "v").await.unwrap();
    }
    first.refuse_key(keys[2].clone(), Status::PermissionDenied);
    let results = client.multi_get(&keys).await;
    for (n, result) in results.iter().enumerate() {
        match result {
            Ok(read) => assert!(n != 2 && read.is_found()),
            Err(error) => assert!(n == 2 && error.code() == "permission_denied", "{error}"),
        }
    }
    first.script(|_| Act::Refuse(Status::NoQuorum, ReplyOptions::default()));
    let results = client.multi_get(["a"]).timeout(Duration::from_millis(50)).await;
    assert!(matches!(results[0], Err(Error::NotSent(_))));
}

#[tokio::test]
async fn a_batch_over_two_nodes_tells_what_became_of_each_key_when_one_of_them_dies() {
    let authority = Authority::new();
    let (first, second, client) = two(&authority).await;
    let mut map = map_of(6, &[(1, first.addr, 1), (2, second.addr, 1)], 1, 6);
    map.shards[2].leader = 2;
    map.shards[3].leader = 2;
    first.set_map(map.clone());
    second.set_map(map);
    client.map().await.unwrap();
    second.script(|seen| match seen.opcode {
        Opcode::MultiPut => Act::ServeAndClose,
        _ => Act::Serve,
    });
    let keys: Vec<Vec<u8>> = (0..4).map(key_of_shard).collect();
    let written = client.multi_put(keys.iter().map(|key| (key, "v"))).await;
    for (shard, result) in written.iter().enumerate() {
        match result {
            Ok(written) => assert!(shard < 2 && written.meta.node == 1),
            Err(error) => assert!(shard >= 2 && error.state() == State::InDoubt, "{shard}: {error}"),
        }
    }
    // A read is asked again instead: of the node that comes back, or of another.
    second.script(|seen| match seen.opcode {
        Opcode::MultiGet if seen.nth == 0 => Act::Close,
        _ => Act::Serve,
    });
    for read in client.multi_get(&keys).await {
        assert_eq!(read.unwrap().value().unwrap(), "v");
    }
}
