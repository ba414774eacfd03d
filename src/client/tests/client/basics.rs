//! Every operation against a node that behaves.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use generation_client::{Client, Consistency, Cursor, Error, Item, Rejected};
use generation_proto::Opcode;

use crate::fake::{Authority, FakeNode, key_of_shard, map_of};

async fn start() -> (Authority, FakeNode, Client) {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 2);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    (authority, node, client)
}

#[tokio::test]
async fn a_value_is_written_read_and_removed() {
    let (_authority, _node, client) = start().await;
    let written = client.put("k", "v").await.unwrap();
    assert!(written.found && written.version() > 0 && written.ttl().is_none());
    let read = client.get("k").await.unwrap();
    assert_eq!(read.value().unwrap(), "v");
    assert_eq!(read.version(), written.version());
    assert_eq!(read.meta.consistency(), "linearizable");
    assert_eq!((read.meta.node, read.meta.index), (1, 1));
    assert!(client.delete("k").await.unwrap().found);
    assert!(!client.delete("k").await.unwrap().found);
    let read = client.get("k").await.unwrap();
    assert!(!read.is_found() && read.version() == 0);
}

#[tokio::test]
async fn conditions_fail_with_the_current_version() {
    let (_authority, _node, client) = start().await;
    let first = client.put("k", "1").if_absent().await.unwrap().version();
    let error = client.put("k", "2").if_absent().await.unwrap_err();
    assert_eq!(error, Error::Rejected(Rejected::ConditionFailed { current: first }));
    let second = client.put("k", "2").if_version(first).await.unwrap().version();
    let error = client.delete("k").if_version(first).await.unwrap_err();
    assert_eq!(error.current_version(), Some(second));
    let error = client.put("k", "3").if_version(0).await.unwrap_err();
    assert_eq!(error.current_version(), Some(second), "version 0 means absent");
    assert!(client.delete("k").if_version(0).await.is_err());
    assert!(client.delete("k").if_version(second).await.unwrap().found);
}

#[tokio::test]
async fn times_to_live_are_set_and_removed() {
    let (_authority, _node, client) = start().await;
    let minute = Duration::from_mins(1);
    client.put("k", "v").ttl(minute).await.unwrap();
    let ttl = client.get("k").await.unwrap().ttl().unwrap();
    assert!(ttl <= minute && ttl > minute / 2, "{ttl:?}");
    assert!(client.touch("k").await.unwrap().found);
    assert_eq!(client.get("k").await.unwrap().ttl(), None);
    assert!(client.touch("k").ttl(minute).await.unwrap().ttl().is_some());
    assert!(!client.touch("absent").ttl(minute).await.unwrap().found);
    let shortest = client.put("k", "v").ttl(Duration::from_nanos(1)).await;
    assert!(shortest.is_ok(), "at least a millisecond is asked for: {shortest:?}");
}

#[tokio::test]
async fn counters_count() {
    let (_authority, _node, client) = start().await;
    assert_eq!(client.incr("n", 5).await.unwrap().counter, 5);
    assert_eq!(client.incr("n", -7).await.unwrap().counter, -2);
    client.put("n", i64::MAX.to_string()).await.unwrap();
    assert_eq!(
        client.incr("n", 1).await.unwrap_err(),
        Error::Rejected(Rejected::Overflow)
    );
    client.put("n", "x").await.unwrap();
    assert_eq!(
        client.incr("n", 1).await.unwrap_err(),
        Error::Rejected(Rejected::NotANumber)
    );
}

#[tokio::test]
async fn keys_and_values_out_of_bounds_are_refused_before_they_are_sent() {
    let (_authority, node, client) = start().await;
    assert_eq!(client.get("").await.unwrap_err(), Error::Rejected(Rejected::EmptyKey));
    let long = vec![b'k'; 65_536];
    assert_eq!(client.put(&long, "v").await.unwrap_err().code(), "key_too_large");
    assert_eq!(node.count(Opcode::Get) + node.count(Opcode::Put), 0);
    assert!(client.put(&long[1..], "v").await.is_ok());
    let large = vec![b'v'; (1 << 20) + 1];
    let error = client.put("k", &large).await.unwrap_err();
    assert_eq!(error.code(), "value_too_large", "the limit is the node's: {error}");
    let results = client.multi_put([("", "v"), ("k", "v")]).await;
    assert_eq!(results[0], Err(Error::Rejected(Rejected::EmptyKey)));
    assert!(results[1].is_ok());
}

#[tokio::test]
async fn large_values_go_and_come_whole_and_off_the_lane() {
    let (_authority, node, client) = start().await;
    let lanes = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = lanes.clone();
    node.script(move |request| {
        seen.lock()
            .unwrap()
            .push((request.opcode, request.len > 64 << 10, request.on_lane));
        crate::fake::Act::Serve
    });
    let large: Vec<u8> = (0..1 << 20).map(|n: u32| n as u8).collect();
    client.put("large", &large).await.unwrap();
    client.put("small", "v").await.unwrap();
    assert_eq!(client.get("large").await.unwrap().value().unwrap(), &large[..]);
    let seen = lanes.lock().unwrap();
    assert_eq!(
        seen[..],
        [
            (Opcode::Put, true, false),
            (Opcode::Put, false, true),
            (Opcode::Get, false, true)
        ]
    );
}

#[tokio::test]
async fn many_keys_are_scattered_and_gathered_in_order() {
    let (_authority, node, client) = start().await;
    let items: Vec<(String, String)> = (0..10_000).map(|n| (format!("key{n}"), format!("value{n}"))).collect();
    for result in client.multi_put(&items).await {
        result.unwrap();
    }
    let keys: Vec<&str> = items.iter().map(|(key, _)| key.as_str()).chain(["absent"]).collect();
    let read = client.multi_get(&keys).await;
    for ((_, value), read) in items.iter().zip(&read) {
        assert_eq!(read.as_ref().unwrap().value().unwrap(), value);
    }
    assert!(!read[10_000].as_ref().unwrap().is_found());
    assert!(node.count(Opcode::MultiPut) >= 4, "batches are bounded");
    assert!(node.count(Opcode::MultiGet) < 100, "and they are batches");
    let deleted = client.multi_delete(&keys[9_999..]).await;
    assert_eq!(
        deleted
            .iter()
            .map(|deleted| deleted.as_ref().unwrap().found)
            .collect::<Vec<_>>(),
        [true, false]
    );
    assert!(client.multi_get(Vec::<String>::new()).await.is_empty());
}

#[tokio::test]
async fn items_of_a_batch_succeed_and_fail_each_by_itself() {
    let (_authority, _node, client) = start().await;
    let items = [
        Item::new("a", "1").ttl(Duration::from_mins(1)),
        Item::new("b", "refuse"),
        Item::new("c", "3"),
    ];
    let results = client.multi_put(&items).await;
    assert!(results[0].is_ok() && results[2].is_ok());
    assert_eq!(results[1], Err(Error::Rejected(Rejected::OutOfMemory)));
    assert!(client.get("a").await.unwrap().ttl().is_some());
    let results = client.multi_put([("a", "x"), ("d", "x")]).if_absent().await;
    assert_eq!(results[0].as_ref().unwrap_err().code(), "condition_failed");
    assert!(results[1].is_ok());
}

#[tokio::test]
async fn scans_see_every_shard_and_can_be_resumed_anywhere() {
    let (_authority, _node, client) = start().await;
    let keys: BTreeSet<String> = (0..500).map(|n| format!("scan{n}")).collect();
    client.multi_put(keys.iter().map(|key| (key, key))).await;
    client.put("other", "x").await.unwrap();
    let listed: Vec<_> = client
        .keys()
        .prefix("scan")
        .page_size(7)
        .stream()
        .try_collect()
        .await
        .unwrap();
    let names: BTreeSet<String> = listed
        .iter()
        .map(|entry| String::from_utf8(entry.key.to_vec()).unwrap())
        .collect();
    assert_eq!((names, listed.len()), (keys.clone(), 500));
    assert!(listed.iter().all(|entry| entry.value.is_empty()));

    let mut stream = client.entries().prefix("scan").page_size(10).stream();
    let mut seen = BTreeSet::new();
    for _ in 0..123 {
        let entry = stream.next().await.unwrap().unwrap();
        assert_eq!(entry.key, entry.value);
        seen.insert(String::from_utf8(entry.key.to_vec()).unwrap());
    }
    let cursor: Cursor = stream.cursor().unwrap().to_string().parse().unwrap();
    let rest = client.entries().prefix("scan").page_size(10).resume(cursor).stream();
    let rest: Vec<_> = rest.try_collect().await.unwrap();
    assert!(
        rest.len() < 500 - 123 + 10,
        "at most the page under way is listed again"
    );
    seen.extend(rest.iter().map(|entry| String::from_utf8(entry.key.to_vec()).unwrap()));
    assert_eq!(seen, keys);

    let shard: Vec<_> = client.keys().shard(2).stream().try_collect().await.unwrap();
    assert!(!shard.is_empty() && shard.iter().all(|entry| entry.shard == 2));
    assert_eq!(
        client
            .keys()
            .shard(9)
            .stream()
            .try_collect::<Vec<_>>()
            .await
            .unwrap_err()
            .code(),
        "invalid_argument"
    );
    assert_eq!(
        client.keys().page_size(0).page(Cursor::START).await.unwrap_err().code(),
        "invalid_argument"
    );
}

#[tokio::test]
async fn consistency_and_tokens_travel() {
    let (_authority, node, client) = start().await;
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = asked.clone();
    node.script(move |request| {
        if request.opcode == Opcode::Get {
            seen.lock().unwrap().push(request.options.consistency);
        }
        crate::fake::Act::Serve
    });
    let key = key_of_shard(3);
    let written = client.put(&key, "v").await.unwrap();
    let stale = client.get(&key).stale(Duration::from_millis(500)).await.unwrap();
    assert_eq!(stale.meta.consistency(), "stale");
    client.get(&key).read_your_writes().await.unwrap();
    client.get(&key).session(written.meta.token()).await.unwrap();
    client
        .get(&key)
        .consistency("linearizable".parse::<Consistency>().unwrap())
        .await
        .unwrap();
    let session = generation_proto::Consistency::Session {
        shard: 3,
        epoch: 1,
        index: 1,
    };
    assert_eq!(
        asked.lock().unwrap()[..],
        [
            generation_proto::Consistency::Stale { max_age_ms: 500 },
            session,
            session,
            generation_proto::Consistency::Linearizable
        ]
    );
    assert_eq!(client.session_token().to_string(), "3.1.1");
}

#[tokio::test]
async fn each_core_has_its_own_connection_opened_when_needed() {
    let (_authority, node, client) = start().await;
    assert_eq!(node.connections(), 1, "one to learn the map from");
    let cores = std::sync::Arc::new(std::sync::Mutex::new(BTreeSet::new()));
    let seen = cores.clone();
    node.script(move |request| {
        seen.lock().unwrap().insert((request.key.clone(), request.core));
        crate::fake::Act::Serve
    });
    for shard in 0..4 {
        client.put(key_of_shard(shard), "v").await.unwrap();
    }
    assert_eq!(node.connections(), 2, "one for each core");
    let expected = (0..4).map(|shard| (key_of_shard(shard), shard % 2)).collect();
    assert_eq!(*cores.lock().unwrap(), expected);
}

#[tokio::test]
async fn nodes_are_asked_for_counters_a_sign_of_life_and_the_map() {
    let (_authority, node, client) = start().await;
    let stats = client.stats().await;
    assert_eq!(stats.len(), 1);
    assert_eq!(stats[0].1.as_ref().unwrap().get("node.cores"), Some(2));
    client.ping().await.unwrap();
    client.ping_node(1).await.unwrap();
    assert_eq!(client.ping_node(9).await.unwrap_err().code(), "invalid_argument");
    node.set_map(map_of(2, &[(1, node.addr, 2)], 1, 1));
    assert_eq!(client.map().await.unwrap().epoch, 2);
    assert_eq!(client.known_map().epoch, 2);
}

#[tokio::test]
async fn a_reply_with_a_newer_epoch_makes_the_client_fetch_the_map() {
    let (_authority, node, client) = start().await;
    node.set_map(map_of(5, &[(1, node.addr, 2)], 1, 1));
    client.get("k").await.unwrap();
    crate::until("the new map is known", || client.known_map().epoch == 5).await;
}

#[tokio::test]
async fn requests_can_be_spawned_and_the_client_shared() {
    let (_authority, _node, client) = start().await;
    let tasks: Vec<_> = (0..100u8)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.put(format!("k{n}"), [n]).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn batches_keep_to_the_nodes_limits() {
    let authority = Authority::new();
    let node = FakeNode::start_limited(&authority, 10_000);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    let items: Vec<_> = (0..500).map(|n| (format!("k{n}"), vec![7; 10_000])).collect();
    for result in client.multi_put(&items).await {
        result.unwrap();
    }
    let error = client.multi_put([("k", vec![7; 10_001])]).await.remove(0).unwrap_err();
    assert_eq!(error.code(), "value_too_large");
    assert_eq!(node.connections(), 2, "no frame was so large that the node hung up");
}

#[tokio::test]
async fn values_that_do_not_fit_one_reply_come_in_several() {
    let (_authority, node, client) = start().await;
    let items: Vec<_> = (0..40u8).map(|n| (format!("{{tag}}{n}"), vec![n; 900_000])).collect();
    for result in client.multi_put(&items).await {
        result.unwrap();
    }
    let before = client.retries_left();
    let read = client.multi_get(items.iter().map(|(key, _)| key)).await;
    for ((_, value), read) in items.iter().zip(read) {
        assert_eq!(read.unwrap().value().unwrap(), value);
    }
    assert!(node.count(Opcode::MultiGet) >= 10, "a few at a time");
    assert_eq!(client.retries_left(), before, "that is no failure");
}
