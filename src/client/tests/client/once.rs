//! Writes of a client that was asked for exactly once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use generation_client::{Client, State};
use generation_proto::{Opcode, ReplyOptions, Status};

use crate::fake::{Act, Authority, FakeNode, Seen, key_of_shard};

async fn start() -> (Authority, FakeNode, Client) {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 2);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    let client = client.exactly_once();
    (authority, node, client)
}

fn is(seen: &Seen, opcode: Opcode, nth: usize) -> bool {
    seen.opcode == opcode && seen.nth == nth
}

#[tokio::test]
async fn a_write_whose_reply_was_lost_counts_once() {
    let (_authority, node, client) = start().await;
    let key = key_of_shard(0);
    node.script(|seen| match seen.nth {
        1 if seen.opcode == Opcode::Incr => Act::ServeAndClose,
        _ => Act::Serve,
    });
    assert_eq!(client.incr(&key, 1).await.unwrap().counter, 1);
    let second = client.incr(&key, 1).await.unwrap();
    assert_eq!(second.counter, 2);
    assert_eq!(node.stored(&key).unwrap(), b"2");
    assert_eq!((node.count(Opcode::Incr), node.count(Opcode::OpenSession)), (3, 1));
    client.close().await;
    assert_eq!(node.sessions(), 0);
}

#[tokio::test]
async fn a_node_that_keeps_silent_is_asked_again_under_the_same_number() {
    let (_authority, node, client) = start().await;
    node.script(|seen| {
        if is(seen, Opcode::Incr, 0) {
            Act::Never
        } else {
            Act::Serve
        }
    });
    assert_eq!(client.incr("n", 7).await.unwrap().counter, 7);
    assert_eq!(node.count(Opcode::Incr), 2);
    assert_eq!(node.stored(b"n").unwrap(), b"7");
}

#[tokio::test]
async fn an_expired_session_is_replaced_for_new_writes_and_leaves_old_ones_in_doubt() {
    let (_authority, node, client) = start().await;
    let node = Arc::new(node);
    assert_eq!(client.incr("n", 1).await.unwrap().counter, 1);
    node.expire_sessions();
    assert_eq!(client.incr("n", 1).await.unwrap().counter, 2);
    assert_eq!(node.count(Opcode::OpenSession), 2);
    // One that may have been executed is not given a new number.
    let expiring = Arc::clone(&node);
    let sent = AtomicUsize::new(0);
    node.script(move |seen| match seen.opcode {
        Opcode::Incr if sent.fetch_add(1, Ordering::SeqCst) == 0 => Act::ServeAndClose,
        Opcode::Incr => {
            expiring.expire_sessions();
            Act::Serve
        }
        _ => Act::Serve,
    });
    let error = client.incr("n", 1).await.unwrap_err();
    assert_eq!(error.state(), State::InDoubt, "{error}");
    assert_eq!(node.stored(b"n").unwrap(), b"3");
    node.script(|_| Act::Serve);
    assert_eq!(client.incr("n", 1).await.unwrap().counter, 4);
}

#[tokio::test]
async fn an_id_is_opened_once_and_a_failed_opening_sends_no_write() {
    let (_authority, node, client) = start().await;
    // The node asserts that no id comes twice.
    node.script(|seen| {
        if is(seen, Opcode::OpenSession, 0) {
            Act::ServeAndClose
        } else {
            Act::Serve
        }
    });
    assert_eq!(client.incr("n", 1).await.unwrap().counter, 1);
    assert_eq!((node.count(Opcode::OpenSession), node.sessions()), (2, 2));
    let other = client.exactly_once();
    node.script(|seen| match seen.opcode {
        Opcode::OpenSession => Act::Refuse(Status::Busy, ReplyOptions::default()),
        _ => Act::Serve,
    });
    let incr = other.incr("n", 1).timeout(Duration::from_millis(100));
    let error = incr.await.unwrap_err();
    assert_eq!(error.state(), State::NotSent, "{error}");
    assert_eq!(node.stored(b"n").unwrap(), b"1");
}

#[tokio::test]
async fn batches_are_repeated_whole_and_written_once() {
    let (_authority, node, client) = start().await;
    let keys: Vec<String> = (0..2_000).map(|n| format!("k{n}")).collect();
    node.script(|seen| match seen.opcode {
        Opcode::MultiPut if seen.nth % 3 == 1 => Act::ServeAndClose,
        _ => Act::Serve,
    });
    let items = keys.iter().map(|key| (key, "v"));
    let written = client.multi_put(items).if_absent().await;
    // Executed twice, the condition would fail.
    for (key, result) in keys.iter().zip(written) {
        assert!(result.is_ok(), "{key}: {result:?}");
    }
    node.script(|_| Act::Serve);
    node.expire_sessions();
    for result in client.multi_delete(&keys).await {
        assert!(result.unwrap().found);
    }
    let refused = client.multi_put([("", "v"), ("k", "v")]).await;
    assert!(refused[0].is_err() && refused[1].is_ok());
}

#[tokio::test]
async fn many_writes_at_once_share_a_session_and_its_window() {
    let (_authority, node, client) = start().await;
    let key = key_of_shard(1);
    let counts = (0..1_500).map(|_| {
        let (client, key) = (client.clone(), key.clone());
        async move { client.incr(&key, 1).await.unwrap().counter }
    });
    let mut counts = futures_util::future::join_all(counts).await;
    counts.sort_unstable();
    assert!(counts.into_iter().eq(1..=1_500));
    assert_eq!(node.count(Opcode::OpenSession), 1);
}
