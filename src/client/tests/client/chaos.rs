//! Counters under a node that fails at random: what the client says of each write must agree with what the node executed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use generation_client::{Client, State};
use generation_proto::options::ReplyOptions;
use generation_proto::{Status, close_code};

use crate::fake::{Act, Authority, FakeNode};

/// Tasks, each with a counter of its own, and additions of each.
const TASKS: u64 = 16;
const ADDITIONS: u64 = 150;

/// A step of `SplitMix64`: the order of requests is the scheduler's, but what happens to the n-th one is fixed.
fn mixed(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn act(n: u64) -> Act {
    let options = ReplyOptions {
        retry_after_ms: Some(1),
        ..ReplyOptions::default()
    };
    match mixed(n) % 100 {
        0..4 => Act::Refuse(Status::Busy, options),
        4..6 => Act::Refuse(Status::NoQuorum, options),
        6..8 => Act::Refuse(Status::ShuttingDown, options),
        8..10 => Act::Refuse(Status::Moved, options),
        10 => Act::Refuse(Status::InDoubt, options),
        11 => Act::Close,
        12 => Act::ServeAndClose,
        13 => Act::ServeAndFinish(close_code::SHUTTING_DOWN),
        14 => Act::Garbage(&[0xee; 40]),
        15 => Act::Never,
        16..26 => Act::Delay(Duration::from_millis(mixed(n) % 7)),
        _ => Act::Serve,
    }
}

/// What the client was told of the additions to one counter.
#[derive(Default)]
struct Told {
    done: u64,
    in_doubt: u64,
    highest: i64,
}

async fn count(client: Client, task: u64) -> Told {
    let key = format!("counter{task}");
    let mut told = Told::default();
    for n in 0..ADDITIONS {
        let add = client.incr(&key, 1).timeout(Duration::from_secs(2)).send();
        // Every now and then nobody waits for the reply, which is one more way to be in doubt.
        let result = if mixed(task << 32 | n).is_multiple_of(50) {
            tokio::time::timeout(Duration::from_micros(200), add).await.ok()
        } else {
            Some(add.await)
        };
        match result {
            Some(Ok(reply)) => {
                assert!(reply.counter > told.highest, "a counter never goes back");
                told.highest = reply.counter;
                told.done += 1;
            }
            Some(Err(error)) if error.state() == State::InDoubt => told.in_doubt += 1,
            Some(Err(error)) => assert_eq!(error.state(), State::NotSent, "{error}"),
            None => told.in_doubt += 1,
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_the_client_says_of_a_write_is_true() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 2);
    let client = authority.builder(&[&node]).connect().await.unwrap();
    let requests = Arc::new(AtomicU64::new(0));
    node.script(move |_| act(requests.fetch_add(1, Ordering::SeqCst)));
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| tokio::spawn(count(client.clone(), task)))
        .collect();
    let (mut done, mut in_doubt) = (0, 0);
    for (n, task) in tasks.into_iter().enumerate() {
        let told = task.await.unwrap();
        let stored = node.stored(format!("counter{n}").as_bytes()).unwrap();
        let executed: u64 = String::from_utf8(stored).unwrap().parse().unwrap();
        assert!(
            (told.done..=told.done + told.in_doubt).contains(&executed),
            "counter {n}: {executed} executed, {} reported done and {} in doubt",
            told.done,
            told.in_doubt
        );
        done += told.done;
        in_doubt += told.in_doubt;
    }
    assert!(done > TASKS * ADDITIONS / 2, "most get through: {done}");
    assert!(in_doubt > 0, "and some are in doubt");
    node.script(|_| Act::Serve);
    crate::until("nothing is left behind", || client.in_flight() == 0).await;
}
