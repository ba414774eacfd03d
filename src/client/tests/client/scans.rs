//! Scans that outlive nodes and the program that began them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::StreamExt as _;
use generation_client::{Client, Consistency, Cursor, Scan, ScanEntry};
use generation_proto::{Opcode, ReplyOptions, Status};

use crate::fake::{Act, Authority, FakeNode, map_of};

/// Three nodes with the same entries; who leads is in their maps.
fn three(authority: &Authority) -> Vec<FakeNode> {
    let first = FakeNode::start(authority, 1, 1);
    let second = FakeNode::start_beside(authority, 2, 1, &first);
    let third = FakeNode::start_beside(authority, 3, 1, &first);
    let nodes = vec![first, second, third];
    lead(&nodes, 1, 1);
    nodes
}

/// From now on every map says that this node leads.
fn lead(nodes: &[FakeNode], leader: u64, term: u64) {
    let members: Vec<_> = nodes.iter().zip(1..).map(|(node, id)| (id, node.addr, 1)).collect();
    for node in nodes {
        node.set_map(map_of(1, &members, leader, term));
    }
}

async fn connect(authority: &Authority, nodes: &[FakeNode]) -> Client {
    let all: Vec<&FakeNode> = nodes.iter().collect();
    let builder = authority.builder(&all).connect_timeout(Duration::from_millis(200));
    builder.connect().await.unwrap()
}

fn text(entry: &ScanEntry) -> String {
    String::from_utf8(entry.key.to_vec()).unwrap()
}

/// Scans in three parts: until the first leader is dead, until the second one is, and to the end in a new program that has nothing but the
/// cursor's text. Meanwhile other keys come and go.
async fn scan_through_deaths(authority: &Authority, begin: impl Fn(&Client) -> Scan) -> Vec<ScanEntry> {
    let nodes = three(authority);
    let client = connect(authority, &nodes).await;
    let written = client
        .multi_put((0..900).map(|n| (format!("key{n}"), format!("value{n}"))))
        .await;
    assert!(written.iter().all(Result::is_ok));
    let mut listed = Vec::new();
    let mut stream = begin(&client).stream();
    for taken in 0..600 {
        listed.push(stream.next().await.unwrap().unwrap());
        match taken {
            200 => {
                nodes[0].stop();
                lead(&nodes, 2, 2);
            }
            400 => {
                nodes[1].stop();
                lead(&nodes, 3, 3);
            }
            _ => {}
        }
        if taken % 10 == 0 {
            // What is sent to a node that is just dying is in doubt.
            drop(client.put(format!("coming{taken}"), "x").await);
            drop(client.delete(format!("coming{}", taken / 2)).await);
        }
    }
    let cursor = stream.cursor().unwrap().to_string();
    drop((stream, client));
    let client = connect(authority, &nodes).await;
    let cursor: Cursor = cursor.parse().unwrap();
    let mut rest = begin(&client).resume(cursor).stream();
    while let Some(entry) = rest.next().await {
        listed.push(entry.unwrap());
    }
    assert_eq!(rest.cursor(), None, "nothing is left");
    listed
}

#[tokio::test]
async fn keys_that_are_there_throughout_are_listed_whoever_dies_meanwhile() {
    let authority = Authority::new();
    let listed = scan_through_deaths(&authority, |client| client.keys().page_size(25)).await;
    let names: BTreeSet<String> = listed.iter().map(text).collect();
    for n in 0..900 {
        assert!(names.contains(&format!("key{n}")), "key{n}");
    }
    let repeated = listed.len() - names.len();
    assert!(repeated <= 25, "no more than the page that was being taken: {repeated}");
}

#[tokio::test]
async fn entries_are_listed_with_their_values_whoever_dies_meanwhile() {
    let authority = Authority::new();
    for consistency in [Consistency::ReadYourWrites, Consistency::Stale(Duration::from_secs(5))] {
        let begin = |client: &Client| {
            client
                .entries()
                .prefix("key")
                .page_size(40)
                .consistency(consistency.clone())
        };
        let listed = scan_through_deaths(&authority, begin).await;
        let entries: BTreeMap<String, _> = listed.iter().map(|entry| (text(entry), entry.value.clone())).collect();
        assert_eq!(entries.len(), 900);
        for n in 0..900 {
            assert_eq!(entries[&format!("key{n}")], format!("value{n}"));
        }
    }
}

#[tokio::test]
async fn a_stream_that_failed_says_where_to_go_on() {
    let authority = Authority::new();
    let nodes = three(&authority);
    let client = connect(&authority, &nodes).await;
    client.multi_put((0..400).map(|n| (format!("key{n}"), "v"))).await;
    let mut stream = client.keys().page_size(10).timeout(Duration::from_millis(300)).stream();
    let mut names = BTreeSet::new();
    for _ in 0..100 {
        names.insert(text(&stream.next().await.unwrap().unwrap()));
    }
    for node in &nodes {
        node.script(|_| Act::Refuse(Status::NoQuorum, ReplyOptions::default()));
    }
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(entry) => drop(names.insert(text(&entry))),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), "no_quorum");
    assert!(stream.next().await.is_none(), "it is over");
    for node in &nodes {
        node.script(|_| Act::Serve);
    }
    let mut rest = client.keys().page_size(10).resume(stream.cursor().unwrap()).stream();
    while let Some(entry) = rest.next().await {
        assert!(
            names.insert(text(&entry.unwrap())),
            "nothing is listed twice where nothing was under way"
        );
    }
    assert_eq!(names.len(), 400);
}

#[tokio::test]
async fn pages_of_relaxed_scans_come_from_more_than_the_leader() {
    let authority = Authority::new();
    let nodes = three(&authority);
    let client = connect(&authority, &nodes).await;
    client.multi_put((0..400).map(|n| (format!("key{n}"), "v"))).await;
    for node in 1..=3 {
        client.ping_node(node).await.unwrap();
    }
    let mut stream = client.keys().page_size(10).stale(Duration::from_secs(1)).stream();
    while let Some(entry) = stream.next().await {
        entry.unwrap();
    }
    let pages: Vec<usize> = nodes.iter().map(|node| node.count(Opcode::Keys)).collect();
    assert!(pages.iter().filter(|&&count| count > 0).count() > 1, "{pages:?}");
}

#[tokio::test]
async fn a_page_asked_for_ahead_is_asked_for_again_when_it_is_needed() {
    let authority = Authority::new();
    let nodes = three(&authority);
    let client = connect(&authority, &nodes).await;
    client.multi_put((0..40).map(|n| (format!("{{tag}}{n}"), "v"))).await;
    for node in &nodes {
        node.script(|seen| {
            if seen.opcode == Opcode::Keys && seen.nth == 1 {
                Act::Never
            } else {
                Act::Serve
            }
        });
    }
    let scan = client
        .keys()
        .prefix("{tag}")
        .page_size(10)
        .timeout(Duration::from_millis(100));
    let mut stream = scan.shard(client.get("{tag}").await.unwrap().meta.shard).stream();
    let mut listed = 0;
    while let Some(entry) = stream.next().await {
        entry.unwrap();
        listed += 1;
        if listed == 1 {
            // Longer than the next page has, which was asked for just now.
            tokio::time::sleep(Duration::from_millis(800)).await;
        }
    }
    assert_eq!(listed, 40);
}
