//! How the client finds the cluster by names, and finds it again when it has moved.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use generation_client::{ConnectError, Resolve, Resolving};
use generation_proto::Opcode;

use crate::fake::{Authority, FakeNode, map_of};
use crate::until;

/// A resolver that says what the test wants.
#[derive(Clone, Default)]
struct Names {
    /// `None`: it fails.
    addresses: Arc<Mutex<Option<Vec<SocketAddr>>>>,
    asked: Arc<AtomicUsize>,
}

impl Names {
    fn say(&self, addresses: Option<&[SocketAddr]>) {
        *self.addresses.lock().unwrap() = addresses.map(<[_]>::to_vec);
    }

    fn of(addresses: &[SocketAddr]) -> Self {
        let names = Self::default();
        names.say(Some(addresses));
        names
    }
}

impl Resolve for Names {
    fn resolve<'r>(&'r self, seed: &'r str) -> Resolving<'r> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let addresses = self.addresses.lock().unwrap().clone();
        Box::pin(async move { addresses.ok_or_else(|| io::Error::other(format!("{seed} is not known"))) })
    }
}

fn silent() -> (SocketAddr, UdpSocket) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    (socket.local_addr().unwrap(), socket)
}

#[tokio::test]
async fn every_address_of_a_name_is_tried_without_waiting_for_the_silent_ones() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let (dead, _socket) = silent();
    let names = Names::of(&[dead, dead, node.addr]);
    let builder = authority.builder(&[]).seed("nodes:7400").resolver(names);
    let begin = Instant::now();
    let client = builder
        .connect_timeout(Duration::from_secs(10))
        .connect()
        .await
        .unwrap();
    assert!(begin.elapsed() < Duration::from_secs(9));
    client.put("k", "v").await.unwrap();
}

#[tokio::test]
async fn a_name_of_the_system_is_resolved() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let seed = format!("localhost:{}", node.addr.port());
    let client = authority.builder(&[]).seed(seed).connect().await.unwrap();
    client.put("k", "v").await.unwrap();
}

#[tokio::test]
async fn a_cluster_that_has_moved_is_found_by_its_name() {
    let authority = Authority::new();
    let old = FakeNode::start(&authority, 1, 1);
    let names = Names::of(&[old.addr]);
    let client = authority
        .builder(&[])
        .seed("nodes:7400")
        .resolver(names.clone())
        .connect_timeout(Duration::from_millis(100))
        .connect()
        .await
        .unwrap();
    client.put("k", "v").await.unwrap();
    let new = FakeNode::start_beside(&authority, 1, 1, &old);
    new.set_map(map_of(2, &[(1, new.addr, 1)], 1, 2));
    old.stop();
    names.say(Some(&[new.addr]));
    assert_eq!(client.get("k").await.unwrap().value().unwrap(), "v");
    assert_eq!(new.count(Opcode::Get), 1);
}

#[tokio::test]
async fn a_resolver_that_fails_does_not_take_away_what_it_said() {
    let authority = Authority::new();
    let first = FakeNode::start(&authority, 1, 1);
    let second = FakeNode::start_beside(&authority, 2, 1, &first);
    // The seed is a node that is in no map.
    second.set_map(map_of(1, &[(1, first.addr, 1)], 1, 1));
    let names = Names::of(&[second.addr]);
    let client = authority
        .builder(&[])
        .seed("nodes:7400")
        .resolver(names.clone())
        .connect_timeout(Duration::from_millis(100))
        .connect()
        .await
        .unwrap();
    client.put("k", "v").await.unwrap();
    // From here on the client has no connection to the seed, which is no member.
    client.map().await.unwrap();
    names.say(None);
    second.set_map(map_of(2, &[(2, second.addr, 1)], 2, 2));
    first.stop();
    assert_eq!(client.get("k").await.unwrap().meta.node, 2);
    assert!(names.asked.load(Ordering::SeqCst) > 1);
}

#[tokio::test]
async fn names_and_map_are_looked_at_now_and_then() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let names = Names::of(&[node.addr]);
    let builder = authority.builder(&[]).seed("nodes:7400").resolver(names.clone());
    let client = builder
        .refresh_interval(Duration::from_millis(20))
        .connect()
        .await
        .unwrap();
    until("names were resolved again", || names.asked.load(Ordering::SeqCst) >= 3).await;
    node.set_map(map_of(7, &[(1, node.addr, 1)], 1, 7));
    until("the newer map is there", || client.known_map().epoch == 7).await;
    drop(client);
    until("nobody asks any more", || Arc::strong_count(&names.asked) == 1).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_name_is_said() {
    let authority = Authority::new();
    let (dead, _socket) = silent();
    let (other, _other) = silent();
    let connect = async |names: Names| {
        let builder = authority.builder(&[]).seed("nodes:7400").resolver(names);
        let connecting = builder.connect_timeout(Duration::from_millis(100)).connect();
        connecting.await.unwrap_err()
    };
    let unknown = connect(Names::default()).await;
    assert!(matches!(&unknown, ConnectError::Resolve { .. }), "{unknown}");
    assert!(unknown.to_string().contains("nodes:7400"), "{unknown}");
    let empty = connect(Names::of(&[])).await;
    assert!(matches!(&empty, ConnectError::Resolve { .. }), "{empty}");
    let nobody = connect(Names::of(&[dead, other])).await;
    assert!(
        matches!(&nobody, ConnectError::NoAddress { errors, .. } if errors.len() == 2),
        "{nobody}"
    );
    let told = nobody.to_string();
    assert!(
        told.contains("2 addresses") && told.contains(&other.to_string()),
        "{told}"
    );
    let foreign = FakeNode::start_as(&authority, 1, 1, authority.issue("other", "node/1"));
    let foreign = connect(Names::of(&[foreign.addr])).await;
    assert!(foreign.to_string().contains("cluster `other`, not `test`"), "{foreign}");
}
