//! The client against a node that misbehaves: what is tried again, what is not, and what is left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use generation_client::{Client, Error, InDoubt, NotSent, RetryPolicy, State};
use generation_proto::options::{Moved, ReplyOptions};
use generation_proto::{Opcode, Status, close_code};

use crate::fake::{Act, Authority, FakeNode, key_of_shard, map_of};
use crate::until;

async fn start() -> (Authority, FakeNode, Client) {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    (authority, node, client)
}

const fn retry_after(ms: u32) -> ReplyOptions<'static> {
    let mut options = ReplyOptions::message("try later");
    options.retry_after_ms = Some(ms);
    options
}

#[tokio::test]
async fn what_is_not_proposed_is_tried_again_when_the_node_says() {
    let (_authority, node, client) = start().await;
    for status in [Status::Busy, Status::NoQuorum, Status::ShuttingDown, Status::Moved] {
        let refusals = Arc::new(AtomicUsize::new(0));
        let counted = refusals.clone();
        node.script(move |_| match counted.fetch_add(1, Ordering::SeqCst) {
            0..3 => Act::Refuse(status, retry_after(20)),
            _ => Act::Serve,
        });
        let begin = Instant::now();
        client.put("k", status.name()).await.unwrap();
        assert_eq!(refusals.load(Ordering::SeqCst), 4, "{status}");
        if status == Status::Busy {
            assert!(begin.elapsed() >= Duration::from_millis(60), "retry-after is a floor");
        }
        assert_eq!(node.stored(b"k").unwrap(), status.name().as_bytes());
    }
}

#[tokio::test]
async fn a_write_in_doubt_is_not_sent_again() {
    let (_authority, node, client) = start().await;
    for (act, n) in [
        (Act::Refuse(Status::InDoubt, retry_after(1)), 1),
        (Act::Refuse(Status::Internal, retry_after(1)), 2),
        (Act::ServeAndClose, 3),
        (Act::Close, 4),
        (Act::Garbage(&[0xff; 64]), 5),
        (Act::WrongOperation, 6),
    ] {
        let first = act.clone();
        let nth = Arc::new(AtomicUsize::new(0));
        node.script(move |_| match nth.fetch_add(1, Ordering::SeqCst) {
            0 => first.clone(),
            _ => Act::Serve,
        });
        let error = client.incr("n", 1).await.unwrap_err();
        assert_eq!(error.state(), State::InDoubt, "{n}: {error}");
        assert!(error.to_string().contains("read the key"), "{error}");
        assert_eq!(node.count(Opcode::Incr), n, "{error}");
    }
    let error = client.put("k", "v").timeout(Duration::from_millis(1)).await;
    assert!(error.is_ok() || error.is_err_and(|error| error.state() != State::Rejected));
}

#[tokio::test]
async fn a_read_is_asked_again_whatever_happened_to_it() {
    let (_authority, node, client) = start().await;
    client.put("k", "v").await.unwrap();
    for act in [
        Act::Refuse(Status::InDoubt, retry_after(1)),
        Act::Refuse(Status::Internal, retry_after(1)),
        Act::ServeAndClose,
        Act::Close,
        Act::Garbage(&[0xff; 64]),
    ] {
        let first = act.clone();
        let nth = Arc::new(AtomicUsize::new(0));
        node.script(move |_| match nth.fetch_add(1, Ordering::SeqCst) {
            0 => first.clone(),
            _ => Act::Serve,
        });
        assert_eq!(client.get("k").await.unwrap().value().unwrap(), "v");
    }
    node.script(|_| Act::WrongOperation);
    assert_eq!(client.get("k").await.unwrap_err().code(), "protocol");
}

#[tokio::test]
async fn bodies_that_cannot_be_read_are_errors_and_never_panics() {
    let (_authority, node, client) = start().await;
    node.script(|_| Act::CutBody);
    assert_eq!(client.incr("n", 1).await.unwrap_err().state(), State::InDoubt);
    assert_eq!(client.ping().await.unwrap_err().code(), "protocol");
    assert!(client.stats().await[0].1.is_err());
    assert_eq!(
        client.multi_get(["a", "b"]).await[1].as_ref().unwrap_err().code(),
        "protocol"
    );
    assert_eq!(
        client.multi_put([("a", "b")]).await[0].as_ref().unwrap_err().state(),
        State::InDoubt
    );
    assert_eq!(
        client
            .keys()
            .page(generation_client::Cursor::START)
            .await
            .unwrap_err()
            .code(),
        "protocol"
    );
}

#[tokio::test]
async fn a_request_that_is_never_answered_ends_at_its_deadline() {
    let (_authority, node, client) = start().await;
    node.script(|_| Act::Never);
    let allowed = Duration::from_millis(100);
    let begin = Instant::now();
    let write = client.put("k", "v").timeout(allowed).await.unwrap_err();
    assert_eq!(write, Error::InDoubt(InDoubt::Timeout { after: allowed }));
    let read = client.get("k").timeout(allowed).await.unwrap_err();
    assert_eq!(read, Error::NotSent(NotSent::Timeout { after: allowed }));
    let large = vec![0; 100_000];
    let alone = client.put("k", large).timeout(allowed).await.unwrap_err();
    assert_eq!(alone, Error::InDoubt(InDoubt::Timeout { after: allowed }));
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(client.in_flight(), 0);
    node.script(|_| Act::Serve);
    client.put("k", "v").await.unwrap();
}

#[tokio::test]
async fn the_node_is_told_how_long_the_client_waits() {
    let (_authority, node, client) = start().await;
    let told = Arc::new(AtomicUsize::new(0));
    let seen = told.clone();
    node.script(move |request| {
        seen.store(request.options.deadline_ms.unwrap() as usize, Ordering::SeqCst);
        Act::Serve
    });
    client.get("k").timeout(Duration::from_millis(800)).await.unwrap();
    let told = told.load(Ordering::SeqCst);
    assert!((1..800).contains(&told), "less than the client itself waits: {told}");
}

#[tokio::test]
async fn replies_overtake_each_other_on_one_lane() {
    let (_authority, node, client) = start().await;
    node.script(|request| match &request.key[..] {
        b"slow" => Act::Delay(Duration::from_millis(200)),
        _ => Act::Serve,
    });
    let slow = client.put("slow", "1");
    let fast = async {
        for n in 0..50 {
            client.put(format!("fast{n}"), "1").await.unwrap();
        }
        Instant::now()
    };
    let (slow, fast) = tokio::join!(
        async {
            slow.await.unwrap();
            Instant::now()
        },
        fast
    );
    assert!(fast < slow);
    assert_eq!(node.connections(), 1);
}

#[tokio::test]
async fn dropped_futures_leave_nothing_behind() {
    let (_authority, node, client) = start().await;
    node.script(|_| Act::Never);
    let large = vec![7; 200_000];
    for n in 0..200 {
        let write = client.put(format!("k{n}"), "v").send();
        let read = client.get(format!("k{n}")).send();
        let alone = client.put(format!("k{n}"), &large).send();
        let multi = client.multi_get(["a", "b", "c"]).send();
        tokio::select! {
            biased;
            _ = write => unreachable!("nothing is answered"),
            _ = read => unreachable!("nothing is answered"),
            _ = alone => unreachable!("nothing is answered"),
            _ = multi => unreachable!("nothing is answered"),
            () = tokio::task::yield_now() => {}
        }
    }
    until("the room of what was dropped is free again", || client.in_flight() == 0).await;
    node.script(|_| Act::Serve);
    client.put("k", "v").await.unwrap();
}

#[tokio::test]
async fn late_replies_reach_nobody() {
    let (_authority, node, client) = start().await;
    client.put("a", "old").await.unwrap();
    client.put("b", "other").await.unwrap();
    node.script(|request| match (&request.key[..], request.nth % 2) {
        (b"a", _) => Act::Delay(Duration::from_millis(60)),
        _ => Act::Serve,
    });
    for _ in 0..20 {
        let early = client.get("a").timeout(Duration::from_millis(5)).await;
        assert_eq!(early.unwrap_err().code(), "timeout");
        assert_eq!(client.get("b").await.unwrap().value().unwrap(), "other");
    }
}

#[tokio::test]
async fn a_lost_connection_is_opened_again() {
    let (_authority, node, client) = start().await;
    for n in 1..10 {
        client.put("k", format!("{n}")).await.unwrap();
        node.drop_connections();
        assert_eq!(
            client.get("k").await.unwrap().value().unwrap(),
            n.to_string().as_bytes()
        );
    }
    assert!(node.connections() >= 10);
}

#[tokio::test]
async fn what_was_answered_before_a_lane_ends_in_good_order_is_received() {
    for (code, in_doubt) in [(close_code::SHUTTING_DOWN, false), (close_code::NONE, true)] {
        let (_authority, node, client) = start().await;
        node.script(move |request| match &request.key[..] {
            b"k99" => Act::ServeAndFinish(code),
            _ => Act::Serve,
        });
        let writes = (0..200).map(|n| client.put(format!("k{n}"), "v").send());
        let results = futures_util::future::join_all(writes).await;
        for (n, result) in results.iter().enumerate() {
            match result {
                Ok(_) => assert!(n < 100 || !in_doubt),
                Err(error) => {
                    assert!(n >= 100 && in_doubt, "{n}: {error}");
                    assert_eq!(error.state(), State::InDoubt, "{error}");
                }
            }
        }
        // A node that is shutting down has not executed what it did not answer, so that was sent again.
        assert_eq!(node.stored(b"k199").is_some(), !in_doubt);
        node.script(|_| Act::Serve);
        client.put("k", "v").await.unwrap();
        assert_eq!(node.connections(), 2);
    }
}

#[tokio::test]
async fn requests_that_were_not_written_when_the_connection_broke_are_sent_again() {
    let (_authority, node, client) = start().await;
    client.put("k", "v").await.unwrap();
    node.drop_connections();
    // Whatever the client knows of the loss by now, nobody's write is reported as failed without having been sent.
    let writes = (0..100).map(|n| client.put(format!("k{n}"), "v").send());
    for write in futures_util::future::join_all(writes).await {
        if let Err(error) = write {
            assert_eq!(error.state(), State::InDoubt, "{error}");
        }
    }
}

#[tokio::test]
async fn redirects_are_followed_and_remembered() {
    let authority = Authority::new();
    let first = FakeNode::start(&authority, 1, 1);
    let second = FakeNode::start_beside(&authority, 2, 2, &first);
    let map = map_of(1, &[(1, first.addr, 1), (2, second.addr, 2)], 1, 1);
    first.set_map(map.clone());
    second.set_map(map);
    let moved = Moved {
        epoch: 1,
        term: 2,
        leader: 2,
        core: 1,
    };
    first.script(move |_| Act::Move(moved));
    let client = authority.builder(&[&first]).connect().await.unwrap();
    let key = key_of_shard(0);
    let reply = client.put(&key, "v").await.unwrap();
    assert_eq!(reply.meta.node, 2);
    for _ in 0..10 {
        client.get(&key).await.unwrap();
    }
    assert_eq!(
        (first.count(Opcode::Put), first.count(Opcode::Get)),
        (1, 0),
        "asked once"
    );
    // A late word from an old term changes nothing.
    let stale = Moved {
        epoch: 1,
        term: 1,
        leader: 1,
        core: 0,
    };
    let nth = Arc::new(AtomicUsize::new(0));
    second.script(move |_| match nth.fetch_add(1, Ordering::SeqCst) {
        0 => Act::Move(stale),
        _ => Act::Serve,
    });
    first.script(move |_| Act::Move(Moved { term: 3, ..moved }));
    assert_eq!(client.get(&key).await.unwrap().meta.node, 2);
}

#[tokio::test]
async fn batches_follow_a_leader_that_moved() {
    let authority = Authority::new();
    let first = FakeNode::start(&authority, 1, 1);
    let second = FakeNode::start_beside(&authority, 2, 2, &first);
    let nodes = [(1, first.addr, 1), (2, second.addr, 2)];
    first.set_map(map_of(1, &nodes, 1, 1));
    let client = authority.builder(&[&first]).connect().await.unwrap();
    first.set_map(map_of(2, &nodes, 2, 2));
    second.set_map(map_of(2, &nodes, 2, 2));
    first.script(|_| Act::Refuse(Status::Moved, ReplyOptions::message("elsewhere")));
    let items: Vec<_> = (0..1000).map(|n| (format!("k{n}"), "v")).collect();
    for result in client.multi_put(&items).await {
        assert_eq!(result.unwrap().meta.node, 2);
    }
}

#[tokio::test]
async fn a_dead_leader_is_left_for_the_one_the_map_names() {
    let authority = Authority::new();
    let first = FakeNode::start(&authority, 1, 1);
    let second = FakeNode::start_beside(&authority, 2, 1, &first);
    let nodes = [(1, first.addr, 1), (2, second.addr, 1)];
    first.set_map(map_of(1, &nodes, 1, 1));
    second.set_map(map_of(1, &nodes, 2, 2));
    let builder = authority
        .builder(&[&first, &second])
        .connect_timeout(Duration::from_millis(300));
    let client = builder.connect().await.unwrap();
    assert_eq!(client.put("k", "v").await.unwrap().meta.node, 1);
    first.stop();
    let read = client.get("k").await.unwrap();
    assert_eq!((read.meta.node, &read.value().unwrap()[..]), (2, &b"v"[..]));
}

#[tokio::test]
async fn the_retry_budget_ends_retries_for_all() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let policy = RetryPolicy {
        budget_capacity: 5,
        budget_percent: 0,
        ..RetryPolicy::default()
    };
    let client = authority.builder(&[&node]).retry(policy).connect().await.unwrap();
    node.script(|_| Act::Refuse(Status::Busy, retry_after(1)));
    for _ in 0..10 {
        let error = client.get("k").await.unwrap_err();
        assert_eq!(
            (error.code(), error.retry_after()),
            ("busy", Some(Duration::from_millis(1)))
        );
    }
    assert_eq!(node.count(Opcode::Get), 10 + 5);
    let metrics = client.metrics();
    assert_eq!((metrics.retries, metrics.nodes[0].requests), (5, metrics.requests));
    assert_eq!(client.retries_left(), 0);
}

#[tokio::test]
async fn more_requests_than_fit_wait_their_turn() {
    let (_authority, node, client) = start().await;
    let gate = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let open = gate.clone();
    node.script(move |_| {
        if open.load(Ordering::SeqCst) {
            Act::Serve
        } else {
            Act::Delay(Duration::from_millis(50))
        }
    });
    let keys: Vec<String> = (0..20_000).map(|n| format!("k{n}")).collect();
    let all = futures_util::future::join_all(keys.iter().map(|key| client.get(key).send()));
    let watch = async {
        until("the connection is full", || client.in_flight() == 8192).await;
        gate.store(true, Ordering::SeqCst);
    };
    let (results, ()) = tokio::join!(all, watch);
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn a_closed_client_says_so() {
    let (_authority, node, client) = start().await;
    node.script(|_| Act::Never);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    until("the request is out", || node.count(Opcode::Get) == 1).await;
    client.close().await;
    assert_eq!(waiting.await.unwrap().unwrap_err(), Error::NotSent(NotSent::Closed));
    assert_eq!(client.put("k", "v").await.unwrap_err(), Error::NotSent(NotSent::Closed));
}

#[tokio::test]
async fn large_requests_on_their_way_fit_what_a_node_keeps_unfinished() {
    let (_authority, node, client) = start().await;
    node.script(|_| Act::Delay(Duration::from_millis(50)));
    let large = vec![7; 900_000];
    let keys: Vec<String> = (0..6).map(|n| format!("{{tag}}{n}")).collect();
    let writes = futures_util::future::join_all(keys.iter().map(|key| client.put(key, &large).send()));
    let watch = async {
        until("the first are there", || node.count(Opcode::Put) == 2).await;
        Instant::now()
    };
    let begin = Instant::now();
    let (results, two_are_there) = tokio::join!(writes, watch);
    assert!(results.iter().all(Result::is_ok));
    // Two fit the longest frame, so six take three turns of 50 ms, one after the other.
    assert!(begin.elapsed() >= Duration::from_millis(150));
    assert!(two_are_there.elapsed() >= Duration::from_millis(50));
    // Small ones do not wait for them.
    let small = client.put("{tag}small", "v").send();
    let large = client.put("{tag}large", &large).send();
    let (large, small) = tokio::join!(large, small);
    assert!(large.is_ok() && small.is_ok());
}
