//! What nodes do to those who speak the peer protocol and should not, or speak it badly: the connection ends with a code that says
//! why, and nothing else is touched.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use generation_node::peers::{Handler, Liveness, PeerError, PeerId, PeerStats, Request};
use generation_proto::peer::{ALPN_PEER, Class, Message, PEER_VERSION, PeerHello, Ping, control};
use generation_proto::{ALPN_CLIENT, close_code};
use generation_quic::{CloseReason, ConnectionKey, Limits, StreamId};
use generation_sim::{ClientIdentity, Dice, NodeSetup, Sim, Weather};

/// Answers everything with itself, or keeps it.
#[derive(Default)]
struct Echo {
    held: RefCell<Option<Vec<Request>>>,
}

impl Handler for Echo {
    fn request(&self, request: Request) {
        if let Some(held) = &mut *self.held.borrow_mut() {
            held.push(request);
        } else {
            let payload = request.payload.clone();
            request.reply(payload);
        }
    }

    fn message(&self, _from: PeerId, _shard: u16, _kind: u8, _payload: Bytes) {}

    fn liveness(&self, _node: u64, _change: Liveness) {}
}

/// Two nodes that know three: the third, and whoever claims to be it, is played by a client.
fn world(setup: &NodeSetup) -> (Sim, Vec<Rc<Echo>>) {
    let mut sim = Sim::new(1, Weather::default());
    let mut echoes = Vec::new();
    for node in 0..2 {
        sim.node(setup);
        let echo = Rc::new(Echo::default());
        sim.peers(node, 0).set_handler(Rc::clone(&echo) as _);
        echoes.push(echo);
    }
    sim.until(|sim| (sim.peers(0, 0).is_alive(2) && sim.peers(1, 0).is_alive(1)).then_some(()));
    (sim, echoes)
}

fn setup() -> NodeSetup {
    NodeSetup {
        cores: 1,
        nodes: 3,
        ..NodeSetup::default()
    }
}

fn third(sim: &mut Sim) -> usize {
    sim.client_of(
        Limits::default(),
        ClientIdentity::Named("generation://sim/node/3"),
        ALPN_PEER,
    )
}

/// A connection to node 1 (number 0) whose handshake is complete on the client's side.
fn connect(sim: &mut Sim, client: usize) -> ConnectionKey {
    let (now, addr) = (sim.now(), sim.addr(0));
    let key = sim.clients[client].connect(now, addr, 0);
    sim.until(|sim| {
        let client = &sim.clients[client];
        (client.is_connected(key) || client.closed(key).is_some()).then_some(())
    });
    key
}

fn closed(sim: &mut Sim, client: usize, key: ConnectionKey) -> CloseReason {
    sim.until(|sim| sim.clients[client].closed(key).cloned())
}

fn code(sim: &mut Sim, client: usize, key: ConnectionKey) -> u32 {
    match closed(sim, client, key) {
        CloseReason::Application { code, .. } => code as u32,
        other => panic!("{other}"),
    }
}

fn good_hello() -> PeerHello<'static> {
    PeerHello {
        version: PEER_VERSION,
        core: 0,
        cores: 1,
        node: 3,
        directory: 7,
        incarnation: 9,
        cluster: "sim",
    }
}

fn hello(hello: &PeerHello<'_>) -> Bytes {
    let mut out = BytesMut::new();
    hello.encode(&mut out);
    out.freeze()
}

/// Opens a lane and says hello on it.
fn lane(sim: &mut Sim, client: usize, key: ConnectionKey) -> StreamId {
    let stream = sim.clients[client].open(key).unwrap();
    sim.clients[client].set_reading(key, stream, false);
    sim.clients[client].send_raw(key, stream, &hello(&good_hello()));
    stream
}

fn message(class: Class, kind: u8, id: u64, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    Message {
        class,
        kind,
        shard: 0,
        id,
        payload: Bytes::copy_from_slice(payload),
    }
    .encode(&mut out);
    out.freeze()
}

/// That the two nodes go on as if nothing had happened.
fn check_unharmed(sim: &mut Sim) {
    let deadline = sim.now() + Duration::from_secs(1);
    for (from, to) in [(0, 2), (1, 1)] {
        let to = PeerId { node: to, core: 0 };
        let call = sim.peers(from, 0).call(to, 0, 1, Bytes::from_static(b"x"), deadline);
        let outcome = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&outcome);
        sim.spawn(from, async move {
            let ended = call.await;
            *slot.borrow_mut() = Some(ended);
        });
        assert_eq!(sim.until(|_| outcome.borrow_mut().take()), Ok(Bytes::from_static(b"x")));
    }
    for (node, other) in [(0, 2), (1, 1)] {
        let stats = sim.peers(node, 0).stats(other).unwrap();
        assert_eq!(
            (stats.connects, stats.connections, stats.violations),
            (1, 1, 0),
            "between the two nodes: {stats:?}"
        );
    }
}

fn of_third(sim: &Sim) -> PeerStats {
    sim.peers(0, 0).stats(3).unwrap()
}

#[test]
fn only_known_nodes_of_the_cluster_are_let_in() {
    let (mut sim, _) = world(&setup());
    for uri in [
        "generation://sim/client/app",
        "generation://sim/admin/ops",
        "generation://other/node/3",
        "generation://sim/node/4",
        "generation://sim/node/1",
        "generation://sim/node/x",
    ] {
        let client = sim.client_of(Limits::default(), ClientIdentity::Named(uri), ALPN_PEER);
        let key = connect(&mut sim, client);
        assert_eq!(code(&mut sim, client, key), close_code::UNAUTHORIZED, "{uri}");
    }
    let client = sim.client_of(Limits::default(), ClientIdentity::Good, ALPN_PEER);
    let key = connect(&mut sim, client);
    match closed(&mut sim, client, key) {
        CloseReason::Application { code, reason } => {
            assert_eq!(code, u64::from(close_code::UNAUTHORIZED));
            let reason = String::from_utf8(reason.to_vec()).unwrap();
            assert!(reason.contains("for nodes"), "{reason}");
        }
        other => panic!("{other}"),
    }
    // TLS itself turns those away whom the authority does not vouch for.
    for identity in [
        ClientIdentity::Missing,
        ClientIdentity::Foreign,
        ClientIdentity::Expired,
    ] {
        let client = sim.client_of(Limits::default(), identity, ALPN_PEER);
        let key = connect(&mut sim, client);
        let reason = closed(&mut sim, client, key);
        assert!(
            matches!(reason, CloseReason::PeerTransport(_)),
            "{identity:?}: {reason}"
        );
    }
    // Clients are served beside all that.
    let client = sim.client_of(Limits::default(), ClientIdentity::Good, ALPN_CLIENT);
    let key = connect(&mut sim, client);
    assert!(sim.clients[client].closed(key).is_none());
    assert_eq!(of_third(&sim).connections, 0);
    check_unharmed(&mut sim);
}

#[test]
fn a_dialled_node_must_be_the_one_dialled() {
    for uri in [
        "generation://sim/node/3",
        "generation://other/node/2",
        "generation://sim/client/app",
        "generation://sim/admin/ops",
    ] {
        let mut sim = Sim::new(2, Weather::default());
        sim.node(&setup());
        sim.node(&NodeSetup {
            uri: Some(uri.to_owned()),
            ..setup()
        });
        let impostor = Rc::new(Echo::default());
        *impostor.held.borrow_mut() = Some(Vec::new());
        sim.peers(1, 0).set_handler(Rc::clone(&impostor) as _);
        let deadline = sim.now() + Duration::from_secs(10);
        let call = sim.peers(0, 0).call(
            PeerId { node: 2, core: 0 },
            0,
            1,
            Bytes::from_static(b"secret"),
            deadline,
        );
        let outcome = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&outcome);
        sim.spawn(0, async move {
            let ended = call.await;
            *slot.borrow_mut() = Some(ended);
        });
        let error = sim.until(|_| outcome.borrow_mut().take()).unwrap_err();
        assert_eq!(error, PeerError::Unreachable, "{uri}");
        sim.run_for(Duration::from_secs(5));
        assert!(!sim.peers(0, 0).is_alive(2), "{uri}");
        assert_eq!(impostor.held.borrow().as_ref().map(Vec::len), Some(0), "{uri}");
        let stats = sim.peers(0, 0).stats(2).unwrap();
        // It is tried again, with pauses that grow to a second.
        assert!((5..25).contains(&stats.dials), "{} dials in five seconds", stats.dials);
        assert_eq!(stats.connects, 0);
    }
}

#[test]
fn a_hello_must_agree_with_the_certificate_and_the_configuration() {
    let good = good_hello();
    for (bad, expected) in [
        (PeerHello { node: 2, ..good }, close_code::WRONG_NODE),
        (
            PeerHello {
                cluster: "other",
                ..good
            },
            close_code::WRONG_NODE,
        ),
        (PeerHello { core: 1, ..good }, close_code::WRONG_NODE),
        (PeerHello { version: 2, ..good }, close_code::VERSION),
    ] {
        let (mut sim, _) = world(&setup());
        let client = third(&mut sim);
        let key = connect(&mut sim, client);
        let stream = sim.clients[client].open(key).unwrap();
        sim.clients[client].send_raw(key, stream, &hello(&bad));
        assert_eq!(code(&mut sim, client, key), expected, "{bad:?}");
        assert_eq!(of_third(&sim).violations, 1);
        check_unharmed(&mut sim);
    }
}

#[test]
fn malformed_input_ends_the_connection_and_nothing_else() {
    let long = {
        let mut bytes = message(Class::Request, 1, 1, b"").to_vec();
        bytes[..4].copy_from_slice(&(65_u32 << 20).to_le_bytes());
        bytes
    };
    let unknown_class = {
        let mut bytes = message(Class::Request, 1, 1, b"").to_vec();
        bytes[5] = 9;
        bytes
    };
    let unreadable_hello = {
        let mut bytes = hello(&good_hello()).to_vec();
        bytes[16 + 2..16 + 4].copy_from_slice(&999_u16.to_le_bytes());
        bytes
    };
    for (what, after_hello, bytes) in [
        ("an oversized message", true, &long[..]),
        ("an unknown class", true, &unknown_class[..]),
        ("a second hello", true, &hello(&good_hello())[..]),
        (
            "a one-way message with an id",
            true,
            &message(Class::OneWay, 1, 4, b"")[..],
        ),
        (
            "a refusal of two bytes",
            true,
            &message(Class::Refusal, 1, 4, b"xx")[..],
        ),
        (
            "a ping of three bytes",
            true,
            &message(Class::Control, control::PING, 0, b"abc")[..],
        ),
        (
            "a long message before hello",
            false,
            &message(Class::Request, 1, 1, &[0; 5000])[..4000],
        ),
        ("no hello", false, &message(Class::Request, 1, 1, b"early")[..]),
        ("a hello that cannot be read", false, &unreadable_hello[..]),
        (
            "a client's request",
            false,
            b"\x00\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00",
        ),
    ] {
        let (mut sim, _) = world(&setup());
        let client = third(&mut sim);
        let key = connect(&mut sim, client);
        let stream = if after_hello {
            lane(&mut sim, client, key)
        } else {
            sim.clients[client].open(key).unwrap()
        };
        sim.clients[client].send_raw(key, stream, bytes);
        assert_eq!(code(&mut sim, client, key), close_code::PROTOCOL, "{what}");
        assert_eq!(of_third(&sim).violations, 1, "{what}");
        assert_eq!(of_third(&sim).connections, 0, "{what}");
        check_unharmed(&mut sim);
    }
}

#[test]
fn a_third_stream_and_a_lane_that_ends_are_refused() {
    let (mut sim, _) = world(&setup());
    let client = third(&mut sim);
    let key = connect(&mut sim, client);
    for _ in 0..3 {
        lane(&mut sim, client, key);
    }
    assert_eq!(code(&mut sim, client, key), close_code::PROTOCOL);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    sim.run_for(Duration::from_millis(10));
    sim.clients[client].finish(key, stream);
    assert_eq!(code(&mut sim, client, key), close_code::PROTOCOL);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    sim.run_for(Duration::from_millis(10));
    sim.clients[client].driver().stop(key, stream, 0);
    assert_eq!(code(&mut sim, client, key), close_code::PROTOCOL);
    assert_eq!(of_third(&sim).violations, 3);
    check_unharmed(&mut sim);
}

#[test]
fn answers_nobody_asked_for_and_unknown_signs_are_passed_over() {
    let (mut sim, _) = world(&setup());
    let client = third(&mut sim);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    lane(&mut sim, client, key);
    let ping = Ping { echo: 1, unix_ms: 2 };
    for bytes in [
        message(Class::Reply, 1, 0, b"x"),
        message(Class::Reply, 1, u64::MAX, b"x"),
        message(Class::Refusal, 1, 1 << 32, b"\x01"),
        message(Class::Control, 200, 0, b"of a later version"),
        message(Class::Control, control::PONG, 0, &ping.to_bytes()),
        message(
            Class::Control,
            control::PONG,
            0,
            &Ping {
                echo: u64::MAX,
                unix_ms: 0,
            }
            .to_bytes(),
        ),
    ] {
        sim.clients[client].send_raw(key, stream, &bytes);
    }
    sim.run_for(Duration::from_millis(50));
    assert!(sim.clients[client].closed(key).is_none());
    let stats = of_third(&sim);
    assert_eq!((stats.violations, stats.connections, stats.connects), (0, 1, 1));
    assert_eq!(stats.messages_received, 8);
    check_unharmed(&mut sim);
}

#[test]
fn who_dials_must_say_who_it_is_in_time() {
    let (mut sim, _) = world(&setup());
    let client = third(&mut sim);
    let key = connect(&mut sim, client);
    let before = sim.now();
    // The first lane alone is not enough, nor is it for ever to begin a hello.
    let stream = lane(&mut sim, client, key);
    let half = sim.clients[client].open(key).unwrap();
    sim.clients[client].send_raw(key, half, &hello(&good_hello())[..20]);
    assert_eq!(code(&mut sim, client, key), close_code::TIMEOUT);
    assert!(sim.now() - before <= setup().peer_limits.dial_timeout + Duration::from_millis(200));
    let _ = stream;
    // And there is no more than so many at a time who have not said it.
    let mut refused = 0;
    for _ in 0..40 {
        let key = connect(&mut sim, client);
        sim.run_for(Duration::from_micros(200));
        refused += u32::from(sim.clients[client].closed(key).is_some());
    }
    assert!((20..=25).contains(&refused), "{refused} of 40");
    // One more is this node's own attempt to reach the third.
    assert!(of_third(&sim).connecting <= 18);
    check_unharmed(&mut sim);
}

#[test]
fn another_connection_of_the_same_core_takes_the_place_of_the_first() {
    let (mut sim, _) = world(&setup());
    let client = third(&mut sim);
    let keys: Vec<ConnectionKey> = (0..5)
        .map(|_| {
            let key = connect(&mut sim, client);
            lane(&mut sim, client, key);
            lane(&mut sim, client, key);
            sim.run_for(Duration::from_millis(5));
            key
        })
        .collect();
    for &key in &keys[..4] {
        assert_eq!(code(&mut sim, client, key), close_code::NONE);
    }
    assert!(sim.clients[client].closed(keys[4]).is_none());
    assert_eq!(of_third(&sim).connections, 1);
    check_unharmed(&mut sim);
}

#[test]
fn a_flood_of_requests_is_refused_beyond_the_bound() {
    let mut setup = setup();
    setup.peer_limits.incoming = 100;
    let (mut sim, echoes) = world(&setup);
    *echoes[0].held.borrow_mut() = Some(Vec::new());
    let client = third(&mut sim);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    lane(&mut sim, client, key);
    for id in 0..10_000 {
        sim.clients[client].send_raw(key, stream, &message(Class::Request, 1, id, b"x"));
    }
    sim.until(|sim| (of_third(sim).requests == 10_000).then_some(()));
    let stats = of_third(&sim);
    assert_eq!(stats.requests_refused, 9_900);
    assert_eq!(echoes[0].held.borrow().as_ref().map(Vec::len), Some(100));
    // By bytes too.
    echoes[0].held.borrow_mut().replace(Vec::new());
    let echo = Rc::clone(&echoes[0]);
    echo.held.borrow_mut().take();
    check_unharmed(&mut sim);
}

#[test]
fn requests_are_bounded_by_their_bytes_too() {
    let mut setup = setup();
    setup.peer_limits.incoming_bytes = 1 << 20;
    let (mut sim, echoes) = world(&setup);
    *echoes[0].held.borrow_mut() = Some(Vec::new());
    let client = third(&mut sim);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    lane(&mut sim, client, key);
    let payload = vec![1; 50_000];
    for id in 0..100 {
        sim.clients[client].send_raw(key, stream, &message(Class::Request, 1, id, &payload));
    }
    sim.until(|sim| (of_third(sim).requests == 100).then_some(()));
    assert_eq!(of_third(&sim).requests_refused, 80, "20 of 50 kB are within a megabyte");
    echoes[0].held.borrow_mut().take();
    check_unharmed(&mut sim);
}

#[test]
fn a_node_that_asks_and_reads_nothing_is_disconnected() {
    let mut setup = setup();
    setup.peer_limits.unread_bytes = 1 << 20;
    let (mut sim, _) = world(&setup);
    let limits = Limits {
        stream_receive_window_bytes: 16 << 10,
        ..Limits::default()
    };
    let client = sim.client_of(limits, ClientIdentity::Named("generation://sim/node/3"), ALPN_PEER);
    let key = connect(&mut sim, client);
    let stream = lane(&mut sim, client, key);
    lane(&mut sim, client, key);
    let payload = vec![1; 20_000];
    for id in 0..100 {
        sim.clients[client].send_raw(key, stream, &message(Class::Request, 1, id, &payload));
    }
    assert_eq!(code(&mut sim, client, key), close_code::UNREAD);
    assert_eq!(of_third(&sim).violations, 1);
    check_unharmed(&mut sim);
}

#[test]
fn arbitrary_bytes_harm_nobody() {
    let (mut sim, _) = world(&setup());
    let mut dice = Dice::new(9);
    let client = third(&mut sim);
    for round in 0..60 {
        let key = connect(&mut sim, client);
        let stream = if round % 3 == 0 {
            sim.clients[client].open(key).unwrap()
        } else {
            lane(&mut sim, client, key)
        };
        let mut bytes = vec![0; 1 + dice.below(300) as usize];
        dice.fill(&mut bytes);
        if round % 3 == 2 {
            // Headers that are legal more often: short, of a known class.
            for header in bytes.chunks_mut(40) {
                let len = header.len().min(16);
                header[..len].fill(0);
                header[0] = 24;
                if let Some(class) = header.get_mut(5) {
                    *class = dice.below(5) as u8;
                }
            }
        }
        sim.clients[client].send_raw(key, stream, &bytes);
        sim.run_for(Duration::from_millis(3));
    }
    sim.run_for(Duration::from_secs(2));
    check_unharmed(&mut sim);
}
