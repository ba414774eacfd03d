//! The client of programs that are not asynchronous.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use generation_client::{ConnectError, Cursor, Error, NotSent, blocking};
use generation_proto::Opcode;

use crate::fake::{Act, Authority, FakeNode, beside};

/// A node on a runtime of its own, and a client that waits.
fn start() -> (tokio::runtime::Runtime, FakeNode, blocking::Client) {
    let authority = Authority::new();
    let (runtime, node) = beside(&authority);
    let client = authority.builder(&[&node]).connect_blocking().unwrap();
    (runtime, node, client)
}

#[test]
fn every_operation_waits_for_its_reply() {
    let (_runtime, node, client) = start();
    let minute = Duration::from_mins(1);
    let written = client.put("k", "1").ttl(minute).send().unwrap();
    assert_eq!(client.get("k").send().unwrap().version(), written.version());
    let error = client.put("k", "2").if_absent().send().unwrap_err();
    assert_eq!(error.code(), "condition_failed");
    assert_eq!(client.incr("k", 41).send().unwrap().counter, 42);
    assert!(client.touch("k").send().unwrap().ttl().is_none());
    let stale = client.get("k").stale(minute).timeout(minute).send().unwrap();
    assert_eq!(stale.value().unwrap(), "42");
    assert!(client.delete("k").send().unwrap().found);
    assert!(
        client
            .multi_put([("a", "1"), ("b", "2"), ("c", "3")])
            .send()
            .iter()
            .all(Result::is_ok)
    );
    let read = client.multi_get(["a", "x"]).send();
    assert!(read[0].as_ref().unwrap().is_found() && !read[1].as_ref().unwrap().is_found());
    let once = client.exactly_once();
    assert_eq!(once.incr("n", 1).send().unwrap().counter, 1);
    assert!(client.ping().unwrap() > Duration::ZERO && client.ping_node(1).is_ok());
    assert_eq!(client.map().unwrap(), client.known_map());
    assert!(client.stats()[0].1.is_ok());
    let removed = client.multi_delete(["a", "n"]).send();
    assert!(removed.iter().all(|result| result.as_ref().unwrap().found));
    once.close();
    assert_eq!(node.sessions(), 0);
}

#[test]
fn scans_are_iterators_that_can_be_resumed() {
    let (_runtime, _node, client) = start();
    client
        .multi_put((0..100).map(|n| (format!("key{n}"), format!("value{n}"))))
        .send();
    let mut entries = client.entries().page_size(7).iter();
    let mut keys: Vec<_> = entries.by_ref().take(50).map(|entry| entry.unwrap().key).collect();
    let cursor = entries.cursor().unwrap();
    keys.extend(
        client
            .keys()
            .page_size(7)
            .resume(cursor)
            .iter()
            .map(|entry| entry.unwrap().key),
    );
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 100);
    let page = client.keys().shard(1).page_size(3).page(Cursor::START);
    assert!(page.unwrap().entries.len() <= 3);
}

#[test]
fn threads_share_a_client_and_its_connections() {
    let (_runtime, node, client) = start();
    client.put("k", "v").send().unwrap();
    let connections = node.connections();
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            thread::spawn(move || {
                for _ in 0..50 {
                    client.incr("{k}n", 1).send().unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(client.get("{k}n").send().unwrap().value().unwrap(), "400");
    assert!(node.connections() <= connections + 1);
}

#[test]
fn inside_a_runtime_it_says_so_and_does_not_panic() {
    let (runtime, node, client) = start();
    let builder = blocking::Client::builder();
    let asked = node.count(Opcode::Get);
    let check = async |client: &blocking::Client| {
        let is_refusal = |error: &Error| matches!(error, Error::NotSent(NotSent::Connect(cause)) if **cause == ConnectError::InAsync);
        let error = client.get("k").send().unwrap_err();
        assert!(
            is_refusal(&error) && error.to_string().contains("generation_client::Client"),
            "{error}"
        );
        assert_eq!(error.code(), "in_async");
        let errors = client.multi_get(["a", "b"]).send();
        assert!(errors.len() == 2 && errors.iter().all(|result| is_refusal(result.as_ref().unwrap_err())));
        assert!(client.keys().iter().next().unwrap().is_err());
        assert!(client.ping().is_err() && client.map().is_err() && client.stats()[0].1.is_err());
        client.close();
    };
    runtime.block_on(async {
        check(&client).await;
        assert_eq!(builder.connect_blocking().unwrap_err(), ConnectError::InAsync);
    });
    let other = client.clone();
    runtime.block_on(runtime.spawn(async move { drop(other) })).unwrap();
    assert_eq!(node.count(Opcode::Get), asked);
    client.put("k", "v").send().unwrap();
}

#[test]
fn a_client_that_is_dropped_takes_its_connections_with_it() {
    let (_runtime, node, client) = start();
    node.script(|_| Act::Never);
    let (sent, waits) = mpsc::channel();
    let other = client.clone();
    let waiting = thread::spawn(move || {
        sent.send(()).unwrap();
        other.get("k").send().unwrap_err()
    });
    waits.recv().unwrap();
    while node.count(Opcode::Get) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    client.close();
    assert_eq!(waiting.join().unwrap(), Error::NotSent(NotSent::Closed));
    drop(client);
    while node.open_connections() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
}
