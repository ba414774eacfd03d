//! What must not hurt a node: broken frames, absurd sizes, silence, floods, peers that take nothing, strangers.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use common::*;
use generation_node::{NodeLimits, close_code};
use generation_proto::frame::HEADER_LEN;
use generation_proto::request::Scan;
use generation_proto::{ALPN_CLIENT, Limits, Opcode, Operation, Request, RequestOptions, Status};
use generation_quic::{CloseReason, ConnectTarget, Driver, DriverConfig};
use generation_sim::{Authority, ClientIdentity, Dice, NodeSetup, Sim, Weather};

/// A node's worth of trouble and, on a connection of its own, somebody who must not notice.
struct Scene {
    sim: Sim,
    bad: Lane,
    good: Lane,
}

fn scene_with(setup: &NodeSetup) -> Scene {
    let mut sim = Sim::new(11, Weather::default());
    sim.node(setup);
    let client = sim.client(generation_quic::Limits {
        keep_alive: Some(Duration::from_secs(5)),
        ..generation_quic::Limits::default()
    });
    let bad = lane(&mut sim, client, 0);
    let good = lane(&mut sim, client, 0);
    Scene { sim, bad, good }
}

fn scene() -> Scene {
    scene_with(&NodeSetup::default())
}

impl Scene {
    fn raw(&mut self, bytes: &[u8]) {
        self.sim.clients[self.bad.client].send_raw(self.bad.key, self.bad.stream, bytes);
    }

    /// The bad connection is closed with this code; the good one goes on.
    fn closed_with(&mut self, code: u32) {
        assert_eq!(close_code_of(&mut self.sim, self.bad), u64::from(code));
        self.good_goes_on();
    }

    fn good_goes_on(&mut self) {
        put(&mut self.sim, self.good, b"still", b"served");
        assert_eq!(get(&mut self.sim, self.good, b"still").unwrap(), b"served");
    }
}

fn close_code_of(sim: &mut Sim, lane: Lane) -> u64 {
    close_code(sim, lane.client, lane.key)
}

fn header(len: u32, opcode: u8, flags: u8, options_len: u16, id: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&[opcode, flags]);
    bytes.extend_from_slice(&options_len.to_le_bytes());
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes
}

fn encoded(operation: Operation<'_>) -> BytesMut {
    let mut bytes = BytesMut::new();
    Request {
        id: 77,
        options: RequestOptions::default(),
        operation,
    }
    .encode(&mut bytes);
    bytes
}

/// A frame that cannot be read is answered with this status and ends the connection.
fn ends_with(bytes: &[u8], status_expected: Status) {
    let mut scene = scene();
    scene.raw(bytes);
    let response = wait(&mut scene.sim, scene.bad, 77);
    assert_eq!(status(&response), status_expected);
    assert!(response.message.is_some_and(|message| !message.is_empty()));
    scene.closed_with(close_code::PROTOCOL);
    assert_eq!(stat(&mut scene.sim, scene.good, "node.connections_malformed"), 1);
}

/// A frame that can be read and asks for nonsense is answered with this status, and the connection goes on.
fn refused_with(bytes: &[u8], status_expected: Status) {
    let mut scene = scene();
    scene.raw(bytes);
    let response = wait(&mut scene.sim, scene.bad, 77);
    assert_eq!(status(&response), status_expected);
    assert!(response.message.is_some_and(|message| !message.is_empty()));
    put(&mut scene.sim, scene.bad, b"k", b"v");
    assert_eq!(stat(&mut scene.sim, scene.good, "node.requests_rejected"), 1);
}

#[test]
fn a_frame_over_the_limit() {
    let len = Limits::default().max_frame_len() as u32 + 1;
    ends_with(&header(len, Opcode::Put.code(), 0, 0, 77), Status::FrameTooLarge);
    ends_with(&header(u32::MAX, Opcode::Get.code(), 0, 0, 77), Status::FrameTooLarge);
}

#[test]
fn reserved_bits() {
    for bit in 1..8 {
        ends_with(&header(0, Opcode::Ping.code(), 1 << bit, 0, 77), Status::Malformed);
    }
}

#[test]
fn a_reply_sent_to_a_node() {
    ends_with(&header(64, Opcode::Get.code(), 1, 0, 77), Status::Malformed);
}

#[test]
fn options_that_overlap_what_follows() {
    ends_with(&header(4, Opcode::Get.code(), 0, 5, 77), Status::Malformed);
    // Options that end inside one, and an item list that reaches over the frame's end.
    let mut cut = header(6, Opcode::Get.code(), 0, 5, 77);
    cut.extend_from_slice(&[0x05, 200, 1, 2, 3, b'k']);
    refused_with(&cut, Status::Malformed);
    let mut list = header(6 + 8, Opcode::MultiGet.code(), 0, 0, 77);
    list.extend_from_slice(&2_u32.to_le_bytes());
    list.extend_from_slice(&2_u16.to_le_bytes());
    list.extend_from_slice(b"ab");
    list.extend_from_slice(&60_000_u16.to_le_bytes());
    list.extend_from_slice(b"abcd");
    refused_with(&list, Status::Malformed);
}

#[test]
fn a_stream_that_ends_inside_a_frame() {
    let mut scene = scene();
    let whole = encoded(Operation::Put {
        key: b"k",
        value: &[7; 500],
    });
    scene.raw(&whole[..whole.len() - 1]);
    // What is not sent yet must leave before the end of the stream.
    scene
        .sim
        .until(|sim| (sim.clients[scene.bad.client].unsent(scene.bad.key, scene.bad.stream) == 0).then_some(()));
    scene.sim.clients[scene.bad.client].finish(scene.bad.key, scene.bad.stream);
    scene.closed_with(close_code::PROTOCOL);
    assert_eq!(
        get(&mut scene.sim, scene.good, b"k"),
        None,
        "half a request was executed"
    );
}

#[test]
fn a_frame_begun_and_not_finished() {
    let mut scene = scene();
    let whole = encoded(Operation::Put {
        key: b"k",
        value: &[7; 500],
    });
    scene.raw(&whole[..100]);
    let before = scene.sim.now();
    scene.closed_with(close_code::TIMEOUT);
    let waited = scene.sim.now() - before;
    assert!(
        waited >= NodeLimits::default().patience && waited < 2 * NodeLimits::default().patience,
        "{waited:?}"
    );
}

#[test]
fn unknown_operations_and_options() {
    refused_with(&header(0, 0x7f, 0, 0, 77), Status::UnknownOperation);
    let mut option = header(4, Opcode::Get.code(), 0, 3, 77);
    option.extend_from_slice(&[0x3f, 1, 0, b'k']);
    refused_with(&option, Status::UnsupportedOption);
    // One that may be ignored is.
    let mut scene = scene();
    let mut option = header(4, Opcode::Get.code(), 0, 3, 77);
    option.extend_from_slice(&[0xbf, 1, 0, b'k']);
    scene.raw(&option);
    assert_eq!(status(&wait(&mut scene.sim, scene.bad, 77)), Status::NotFound);
}

#[test]
fn keys_and_values_over_the_limit() {
    let setup = NodeSetup {
        limits: Limits {
            max_key_len: 100,
            max_value_len: 1_000,
        },
        ..NodeSetup::default()
    };
    let mut scene = scene_with(&setup);
    let (sim, bad) = (&mut scene.sim, scene.bad);
    let key = [b'k'; 101];
    assert_eq!(
        status(&call(sim, bad, Operation::Get { key: &key })),
        Status::KeyTooLarge
    );
    assert_eq!(
        status(&call(
            sim,
            bad,
            Operation::Put {
                key: b"k",
                value: &[0; 1_001]
            }
        )),
        Status::ValueTooLarge
    );
    assert_eq!(
        status(&call(
            sim,
            bad,
            Operation::Put {
                key: b"k",
                value: &[0; 1_000]
            }
        )),
        Status::Ok
    );
    assert_eq!(
        status(&call(sim, bad, Operation::Get { key: b"" })),
        Status::InvalidArgument
    );
    let scan = Scan {
        shard: 0,
        limit: 0,
        cursor: 0,
        prefix: b"",
    };
    assert_eq!(status(&call(sim, bad, Operation::Keys(scan))), Status::InvalidArgument);
    scene.good_goes_on();
}

#[test]
fn random_bytes() {
    let mut dice = Dice::new(4);
    let mut sim = Sim::new(12, Weather::default());
    sim.node(&NodeSetup::default());
    let client = sim.client(generation_quic::Limits::default());
    let good = lane(&mut sim, client, 1);
    for _ in 0..100 {
        let bad = lane(&mut sim, client, 0);
        let mut noise = vec![0; 1 + dice.below(4_000) as usize];
        dice.fill(&mut noise);
        if dice.chance(700) {
            // Frames with sound headers get further.
            let body = noise.len().saturating_sub(HEADER_LEN) as u32;
            let opcode = Opcode::ALL[dice.below(Opcode::ALL.len() as u64) as usize];
            let options_len = if dice.chance(500) {
                0
            } else {
                dice.below(u64::from(body) + 1) as u16
            };
            noise.splice(
                ..HEADER_LEN.min(noise.len()),
                header(body, opcode.code(), 0, options_len, dice.roll()),
            );
        }
        sim.clients[client].send_raw(bad.key, bad.stream, &noise);
        sim.run_for(Duration::from_millis(5));
        let now = sim.now();
        sim.clients[client].driver().close(now, bad.key, 0, "");
    }
    put(&mut sim, good, b"still", b"served");
}

#[test]
fn a_stream_opened_and_never_written() {
    let mut scene = scene();
    let first = sibling(&mut scene.sim, scene.bad);
    let second = sibling(&mut scene.sim, scene.bad);
    // Writing on the second opens the first as well (RFC 9000, section 3.2).
    put(&mut scene.sim, second, b"k", b"v");
    assert_eq!(stat(&mut scene.sim, scene.good, "node.streams"), 4);
    let (client, key) = (first.client, first.key);
    scene
        .sim
        .until(|sim| sim.clients[client].has_ended(key, first.stream).then_some(()));
    assert_eq!(stat(&mut scene.sim, scene.good, "node.streams"), 3);
    // Its neighbours, idle but used, live on.
    put(&mut scene.sim, second, b"k", b"w");
    put(&mut scene.sim, scene.bad, b"k", b"x");
}

#[test]
fn a_connection_without_hello() {
    let mut scene = scene();
    let silent = silent_lane(&mut scene.sim, scene.bad.client, 0);
    let chatty = silent_lane(&mut scene.sim, scene.bad.client, 1);
    let before = scene.sim.now();
    let response = call(&mut scene.sim, chatty, Operation::Ping { payload: b"" });
    assert_eq!(status(&response), Status::HelloRequired);
    for lane in [silent, chatty] {
        assert_eq!(close_code_of(&mut scene.sim, lane), u64::from(close_code::TIMEOUT));
    }
    assert!(scene.sim.now() - before < 2 * NodeLimits::default().patience);
    scene.good_goes_on();
}

#[test]
fn a_peer_that_reads_nothing() {
    let setup = NodeSetup {
        cores: 1,
        ..NodeSetup::default()
    };
    let mut scene = scene_with(&setup);
    put(&mut scene.sim, scene.good, b"large", &vec![7; 100_000]);
    scene.sim.clients[scene.bad.client].set_reading(scene.bad.key, scene.bad.stream, false);
    for _ in 0..2_000 {
        send(
            &mut scene.sim,
            scene.bad,
            Operation::Get { key: b"large" },
            RequestOptions::default(),
        );
    }
    // 200 MB are asked for; the node makes what fits its own windows and the peer's, then reads no more.
    scene.sim.run_for(Duration::from_secs(20));
    assert_eq!(stat(&mut scene.sim, scene.good, "node.streams_paused"), 1);
    let reads = stat(&mut scene.sim, scene.good, "node.reads");
    assert!(reads < 200, "{reads} replies were made");
    for _ in 0..100 {
        let before = scene.sim.now();
        scene.good_goes_on();
        assert!(scene.sim.now() - before < Duration::from_millis(5), "others are slowed");
    }
    // It may change its mind.
    scene.sim.clients[scene.bad.client].set_reading(scene.bad.key, scene.bad.stream, true);
    scene
        .sim
        .until(|sim| (sim.clients[scene.bad.client].responses() == 2_000).then_some(()));
}

#[test]
fn a_stop_that_cannot_deliver_every_reply_does_not_claim_to() {
    let mut scene = scene();
    put(&mut scene.sim, scene.good, b"large", &vec![7; 100_000]);
    scene.sim.clients[scene.bad.client].set_reading(scene.bad.key, scene.bad.stream, false);
    for _ in 0..200 {
        let get = Operation::Get { key: b"large" };
        send(&mut scene.sim, scene.bad, get, RequestOptions::default());
    }
    scene.sim.run_for(Duration::from_secs(1));
    assert_eq!(stat(&mut scene.sim, scene.good, "node.streams_paused"), 1);
    scene.sim.stop(0);
    let (good, bad) = (scene.good, scene.bad);
    assert_eq!(close_code_of(&mut scene.sim, bad), u64::from(close_code::STOPPED));
    assert_eq!(
        close_code_of(&mut scene.sim, good),
        u64::from(close_code::SHUTTING_DOWN)
    );
}

/// Begins eight large requests, each on a stream of its own, and leaves ten bytes of each unsent.
fn begin_large(scene: &mut Scene) -> (Vec<Lane>, BytesMut) {
    let whole = encoded(Operation::Put {
        key: b"k",
        value: &vec![7; 4 << 20],
    });
    let mut lanes = Vec::new();
    for _ in 0..8 {
        let lane = sibling(&mut scene.sim, scene.bad);
        scene.sim.clients[lane.client].send_raw(lane.key, lane.stream, &whole[..whole.len() - 10]);
        lanes.push(lane);
    }
    (lanes, whole)
}

#[test]
fn large_requests_side_by_side() {
    let mut scene = scene();
    let (lanes, whole) = begin_large(&mut scene);
    scene.sim.run_for(Duration::from_secs(2));
    scene.good_goes_on();
    for lane in &lanes {
        scene.sim.clients[lane.client].send_raw(lane.key, lane.stream, &whole[whole.len() - 10..]);
    }
    let writes = |scene: &mut Scene| stat(&mut scene.sim, scene.good, "node.writes");
    while writes(&mut scene) < 9 {
        scene.sim.run_for(Duration::from_millis(10));
    }
    assert_eq!(get(&mut scene.sim, scene.good, b"k").unwrap().len(), 4 << 20);
}

#[test]
fn too_many_large_requests_left_unfinished() {
    let node_limits = NodeLimits {
        unfinished_bytes: 16 << 20,
        ..NodeLimits::default()
    };
    let mut scene = scene_with(&NodeSetup {
        node_limits,
        ..NodeSetup::default()
    });
    begin_large(&mut scene);
    scene.closed_with(close_code::UNFINISHED);
    assert_eq!(get(&mut scene.sim, scene.good, b"k"), None);
}

#[test]
fn strangers() {
    for (identity, word) in [
        (ClientIdentity::Missing, "certificate"),
        (ClientIdentity::Foreign, "certificate"),
        (ClientIdentity::Expired, "xpired"),
    ] {
        let mut sim = Sim::new(13, Weather::default());
        sim.node(&NodeSetup::default());
        let client = sim.client_with(generation_quic::Limits::default(), identity);
        let (now, addr) = (sim.now(), sim.addr(0));
        let key = sim.clients[client].connect(now, addr, 0);
        let reason = sim.until(|sim| sim.clients[client].closed(key).cloned());
        assert!(
            matches!(&reason, CloseReason::PeerTransport(text) if text.contains(word)),
            "{identity:?}: {reason:?}"
        );
        let good = sim.client(generation_quic::Limits::default());
        let lane = lane(&mut sim, good, 0);
        put(&mut sim, lane, b"k", b"v");
        assert_eq!(stat(&mut sim, lane, "node.connections_established"), 1);
    }
}

/// 10,000 first packets within a second, each of another address, none of which is ever followed up.
#[test]
fn a_flood_of_handshakes() {
    let setup = NodeSetup {
        cores: 1,
        quic_limits: generation_quic::Limits {
            retry_above: 16,
            ..generation_quic::Limits::default()
        },
        ..NodeSetup::default()
    };
    let mut sim = Sim::new(14, Weather::default());
    sim.node(&setup);
    let client = sim.client(generation_quic::Limits::default());
    let good = lane(&mut sim, client, 0);
    let attackers = Authority::new().client(ClientIdentity::Missing, ALPN_CLIENT);
    let mut attacker = Driver::new(DriverConfig {
        core: 0,
        cores: 1,
        seed: [3; 32],
        secret: [3; 32],
        server: None,
        mtu_discovery: false,
        limits: generation_quic::Limits {
            connections: 20_000,
            ..generation_quic::Limits::default()
        },
    });
    let target = ConnectTarget {
        remote: sim.addr(0),
        server_name: "localhost".to_owned(),
        core: None,
        crypto: attackers,
    };
    let mut packet = Vec::new();
    for second in 0..10 {
        for attempt in 0..1_000_u16 {
            attacker.connect(sim.now(), &target).unwrap();
            attacker.poll_transmit(sim.now(), &mut packet).unwrap();
            let from = SocketAddr::from(([172, 16 + second, (attempt >> 8) as u8, attempt as u8], 5_000));
            sim.inject(0, from, &packet);
            if attempt % 10 == 0 {
                sim.run_for(Duration::from_millis(1));
            }
        }
        let before = sim.now();
        put(&mut sim, good, b"k", &[second]);
        assert!(
            sim.now() - before < Duration::from_millis(5),
            "an established connection is slowed"
        );
    }
    let newcomer = lane(&mut sim, client, 0);
    put(&mut sim, newcomer, b"k", b"in spite of it all");
    let name = |name: &str| format!("node.{name}");
    let retried = stat(&mut sim, good, &name("connections_retried"));
    assert!(retried > 9_900, "{retried}");
    let open = stat(&mut sim, good, &name("connections"));
    assert!(open <= 2 + 16, "{open} connections are kept");
}

#[test]
fn an_address_has_so_many_connections_and_others_take_their_place() {
    let node_limits = NodeLimits {
        connections_per_address: 2,
        ..NodeLimits::default()
    };
    // The two of the scene are of one address.
    let Scene { mut sim, bad, good } = scene_with(&NodeSetup {
        node_limits,
        ..NodeSetup::default()
    });
    let (now, addr) = (sim.now(), sim.addr(0));
    let third = sim.clients[bad.client].connect(now, addr, 0);
    let (code, reason) = sim.until(|sim| match sim.clients[bad.client].closed(third)? {
        CloseReason::Application { code, reason } => Some((*code, String::from_utf8_lossy(reason).into_owned())),
        other => panic!("{other}"),
    });
    assert_eq!(code, u64::from(close_code::CROWDED));
    assert!(reason.contains("2 connections of 10.1.0.1"), "{reason}");
    put(&mut sim, good, b"still", b"served");
    assert_eq!(stat(&mut sim, good, "node.connections_crowded"), 1);
    // Another core's connections are counted there.
    let elsewhere = lane(&mut sim, bad.client, 1);
    put(&mut sim, elsewhere, b"still", b"served");
    let now = sim.now();
    sim.clients[bad.client].close(now, bad.key);
    sim.run_for(Duration::from_secs(1));
    let next = lane(&mut sim, bad.client, 0);
    assert_eq!(get(&mut sim, next, b"still").unwrap(), b"served");
}
