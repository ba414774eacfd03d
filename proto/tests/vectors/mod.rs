//! One message of every kind, as values. Their encodings are in `golden/`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;
use generation_proto::cluster::{NodeInfo, Progress, Verb, encode_setting};
use generation_proto::map::{Map, Node, NodeState, Replica, Shard, SlotRange};
use generation_proto::options::{Condition, Consistency, Moved, ReplyOptions, RequestOptions, Session};
use generation_proto::peer::{Class, Message, PeerHello, Ping, Quiesce, QuiesceVerb, Refusal, control};
use generation_proto::reply::{self, HelloReply, MultiResult, Page, PageEntry, Reply, ReplyMeta, Stat};
use generation_proto::request::{Hello, Item, ItemList, KeyList, Opcode, Operation, Request, Scan, ShardSession};
use generation_proto::status::Status;

/// Every request of the golden vectors, with its name.
pub(crate) fn each_request(mut visit: impl FnMut(&str, &Request<'_>)) {
    let plain = RequestOptions::default();
    let mut request = |name: &str, options: RequestOptions, operation| {
        let id = 0x0102_0304_0506_0708;
        visit(name, &Request { id, options, operation });
    };
    let (mut keys, mut items) = (BytesMut::new(), BytesMut::new());
    let keys = KeyList::build([&b"alpha"[..], b"beta", b"\x00"], &mut keys);
    let item = |key, value, ttl_ms| Item { key, value, ttl_ms };
    let items = ItemList::build(
        [item(&b"alpha"[..], &b"one"[..], None), item(b"beta", b"", Some(60_000))],
        &mut items,
    );
    let scan = Scan {
        shard: 5,
        limit: 1000,
        cursor: 0x1122_3344_5566_7788,
        prefix: b"user:",
    };
    let session = Session {
        id: 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff,
        seq: 300,
        first_unacked: 299,
    };

    let hello = Hello {
        major: 1,
        minor: 0,
        name: "caf\u{e9}/1.0",
    };
    request("hello", plain, Operation::Hello(hello));
    request("ping", plain, Operation::Ping { payload: b"echo" });
    request("map", plain, Operation::Map);
    request("stats", plain, Operation::Stats);
    request("get", plain, Operation::Get { key: b"{user1}.name" });
    let options = RequestOptions {
        consistency: Consistency::Session {
            shard: 5,
            epoch: 6,
            index: 7,
        },
        deadline_ms: Some(250),
        map_epoch: Some(9),
        ..plain
    };
    request("get-session", options, Operation::Get { key: b"k" });
    let consistency = Consistency::Stale { max_age_ms: 500 };
    request(
        "get-stale",
        RequestOptions { consistency, ..plain },
        Operation::Get { key: b"k" },
    );
    let put = Operation::Put {
        key: b"key",
        value: b"value",
    };
    request("put", plain, put);
    let options = RequestOptions {
        ttl_ms: Some(30_000),
        condition: Condition::IfAbsent,
        deadline_ms: Some(1000),
        session: Some(session),
        map_epoch: Some(9),
        ..plain
    };
    request("put-if-absent", options, put);
    let condition = Condition::IfVersion(0x0000_0000_002a_0001);
    request("put-if-version", RequestOptions { condition, ..plain }, put);
    request("put-empty", plain, Operation::Put { key: b"k", value: b"" });
    request("delete", plain, Operation::Delete { key: b"key" });
    request("incr", plain, Operation::Incr { key: b"key", delta: -2 });
    let ttl_ms = Some(u64::MAX);
    request(
        "touch",
        RequestOptions { ttl_ms, ..plain },
        Operation::Touch { key: b"key" },
    );
    request("multi-get", plain, Operation::MultiGet(keys));
    request("multi-put", plain, Operation::MultiPut(items));
    request("multi-delete", plain, Operation::MultiDelete(keys));
    request("keys", plain, Operation::Keys(scan));
    request("entries", plain, Operation::Entries(Scan { prefix: b"", ..scan }));
    let numbered = RequestOptions {
        session: Some(session),
        ..plain
    };
    request("multi-put-in-session", numbered, Operation::MultiPut(items));
    let session = ShardSession {
        id: session.id,
        shard: 5,
    };
    request("open-session", plain, Operation::OpenSession(session));
    request("close-session", plain, Operation::CloseSession(session));
    request("take-snapshot", plain, Operation::TakeSnapshot { shard: 5 });
    let cluster = |verb, body| Operation::Cluster { verb, body };
    request("cluster-describe", plain, cluster(Verb::Describe, &[]));
    let node = 7_u64.to_le_bytes();
    request("cluster-drain", plain, cluster(Verb::Drain, &node));
    let mut setting = BytesMut::new();
    encode_setting("replication-factor", "5", &mut setting);
    request("cluster-configure", plain, cluster(Verb::Configure, &setting));
}

/// The map of the golden vectors.
pub(crate) fn map() -> Map {
    let node = |id, addr, cores, state| Node { id, addr, cores, state };
    let replica = |id, node, core| Replica { id, node, core };
    Map {
        epoch: 12,
        cluster: "main".to_owned(),
        nodes: vec![
            node(
                1,
                SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 7400)),
                2,
                NodeState::Up,
            ),
            node(
                2,
                SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2), 7401)),
                4,
                NodeState::Down,
            ),
            node(3, SocketAddr::from((Ipv4Addr::LOCALHOST, 7402)), 1, NodeState::Draining),
        ],
        ranges: vec![
            SlotRange {
                first: 0,
                last: 8191,
                shard: 1,
            },
            SlotRange {
                first: 8192,
                last: 16383,
                shard: 0,
            },
        ],
        shards: vec![
            Shard {
                epoch: 3,
                term: 8,
                leader: 1,
                replicas: vec![replica(11, 1, 1), replica(12, 2, 3)],
            },
            Shard::default(),
        ],
    }
}

/// Every reply of the golden vectors, with its name.
#[expect(clippy::too_many_lines, reason = "a list, one entry per kind of reply")]
pub(crate) fn each_reply(mut visit: impl FnMut(&str, &Reply<'_>)) {
    let meta = ReplyMeta {
        version: 0x0000_0000_002a_0001,
        index: 42,
        server_time_ms: 1_700_000_000_000,
        map_epoch: 12,
        shard: 5,
        status: Status::Ok.code(),
        consistency: Consistency::Linearizable.code(),
    };
    let plain = ReplyOptions::default();
    let mut reply = |name: &str, opcode: Opcode, meta: ReplyMeta, options: ReplyOptions<'_>, body: &[u8]| {
        let id = 0x0102_0304_0506_0708;
        let opcode = opcode.code();
        visit(
            name,
            &Reply {
                id,
                opcode,
                meta,
                options,
                body,
            },
        );
    };
    let status = |status: Status| ReplyMeta {
        status: status.code(),
        ..meta
    };

    let mut body = BytesMut::new();
    let hello = HelloReply {
        major: 1,
        minor: 0,
        node: 3,
        core: 1,
        cores: 4,
        max_key_len: 65_535,
        max_value_len: 8 << 20,
        max_frame_len: 8_458_239,
        cluster: "main",
        server: "generation/0.1.0",
    };
    hello.encode(&mut body);
    reply("hello", Opcode::Hello, meta, plain, &body);
    let options = ReplyOptions::message("this node speaks version 1.0");
    reply(
        "hello-version",
        Opcode::Hello,
        status(Status::UnsupportedVersion),
        options,
        &body,
    );
    reply("ping", Opcode::Ping, meta, plain, b"echo");
    body.clear();
    map().encode(&mut body);
    reply("map", Opcode::Map, meta, plain, &body);
    body.clear();
    for (name, value) in [("node.connections", 50), ("shard.3.used_bytes", u64::MAX)] {
        Stat { name, value }.encode(&mut body);
    }
    reply("stats", Opcode::Stats, meta, plain, &body);

    reply("get", Opcode::Get, meta, plain, b"value");
    let options = ReplyOptions {
        expires_at_ms: Some(1_700_000_030_000),
        age_ms: Some(120),
        ..plain
    };
    let stale = Consistency::Stale { max_age_ms: 0 }.code();
    let consistency = ReplyMeta {
        consistency: stale,
        ..meta
    };
    reply("get-stale", Opcode::Get, consistency, options, b"value");
    let absent = ReplyMeta {
        version: 0,
        ..status(Status::NotFound)
    };
    reply("get-not-found", Opcode::Get, absent, plain, b"");
    reply("put", Opcode::Put, meta, plain, b"");
    reply(
        "put-condition-failed",
        Opcode::Put,
        status(Status::ConditionFailed),
        plain,
        b"",
    );
    reply("delete", Opcode::Delete, meta, plain, b"");
    reply("incr", Opcode::Incr, meta, plain, &(-5_i64).to_le_bytes());
    reply("touch", Opcode::Touch, meta, plain, b"");
    body.clear();
    let result = MultiResult {
        status: Status::Ok.code(),
        consistency: 0,
        shard: 5,
        version: 0x0000_0000_002a_0001,
        index: 42,
        expires_at_ms: 1_700_000_030_000,
        value: b"one",
    };
    let absent = MultiResult {
        status: Status::NotFound.code(),
        shard: 6,
        index: 43,
        ..MultiResult::default()
    };
    result.encode(&mut body);
    absent.encode(&mut body);
    reply("multi-get", Opcode::MultiGet, meta, plain, &body);
    body.clear();
    MultiResult { value: b"", ..result }.encode(&mut body);
    reply("multi-put", Opcode::MultiPut, meta, plain, &body);
    reply("multi-delete", Opcode::MultiDelete, meta, plain, &body);
    let entry = PageEntry {
        key: b"user:1",
        value: b"",
        version: 0x0000_0000_002a_0001,
        expires_at_ms: 0,
    };
    let page = Page {
        next: 0x1122_3344_5566_7788,
        count: 1,
        done: false,
    };
    body.clear();
    body.extend_from_slice(&page.to_bytes());
    entry.encode(&mut body);
    reply("keys", Opcode::Keys, meta, plain, &body);
    body.clear();
    let last = Page {
        next: 0,
        count: 2,
        done: true,
    };
    body.extend_from_slice(&last.to_bytes());
    PageEntry {
        value: b"one",
        expires_at_ms: 1_700_000_030_000,
        ..entry
    }
    .encode(&mut body);
    PageEntry {
        key: b"user:2",
        ..entry
    }
    .encode(&mut body);
    reply("entries", Opcode::Entries, meta, plain, &body);

    let options = ReplyOptions {
        retry_after_ms: Some(10),
        moved: Some(Moved {
            epoch: 3,
            term: 8,
            leader: 2,
            core: 1,
        }),
        message: Some("led by node 2"),
        ..plain
    };
    let no_version = ReplyMeta { version: 0, ..meta };
    reply("open-session", Opcode::OpenSession, no_version, plain, b"");
    let expired = ReplyMeta {
        version: 0,
        ..status(Status::SessionExpired)
    };
    let unknown = ReplyOptions::message("the session is unknown or has expired");
    reply("close-session-expired", Opcode::CloseSession, expired, unknown, b"");
    reply("take-snapshot", Opcode::TakeSnapshot, no_version, plain, b"");
    let mut body = BytesMut::new();
    NodeInfo {
        node: 7,
        directory: 0x1112_1314_1516_1718_191a_1b1c_1d1e_1f20,
        cluster_id: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        cluster: "main".to_owned(),
        records: 3 << 16,
        addr: SocketAddr::from(([10, 0, 0, 7], 7400)),
        zone: "b".to_owned(),
        cores: 4,
        shards: 16,
        is_managed: true,
    }
    .encode(&mut body);
    reply("cluster-described", Opcode::Cluster, no_version, plain, &body);
    body.clear();
    Progress {
        leader: 7,
        steps: vec!["shard 1: node 4 for node 2".to_owned()],
        stuck: vec!["shard 2: it has no leader".to_owned()],
    }
    .encode(&mut body);
    reply("cluster-progress", Opcode::Cluster, no_version, plain, &body);
    let full = ReplyMeta {
        version: 0,
        ..status(Status::DiskFailed)
    };
    let message = ReplyOptions::message("no space left on device");
    reply("take-snapshot-failed", Opcode::TakeSnapshot, full, message, b"");
    reply("moved", Opcode::Put, status(Status::Moved), options, b"");
    let refusal = reply::refusal(
        Opcode::Put.code(),
        0x0102_0304_0506_0708,
        Status::Malformed,
        "cut short",
    );
    visit("refusal", &refusal);
}

/// The hello of the golden vectors.
pub(crate) const PEER_HELLO: PeerHello<'_> = PeerHello {
    version: 1,
    core: 1,
    cores: 2,
    node: 3,
    directory: 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff,
    incarnation: 0x0102_0304_0506_0708,
    cluster: "main",
};

/// The ping of the golden vectors.
pub(crate) const PING: Ping = Ping {
    echo: 0x1122_3344_5566_7788,
    unix_ms: 1_700_000_000_000,
};

/// The proposal of the golden vectors.
pub(crate) const QUIESCE: Quiesce = Quiesce {
    verb: QuiesceVerb::Propose,
    term: 8,
    index: 42,
};

/// Every message between nodes of the golden vectors, with its name and encoding.
pub(crate) fn each_peer_message(mut visit: impl FnMut(&str, &[u8])) {
    let mut message = |name: &str, class: Class, kind: u8, id: u64, payload: &[u8]| {
        let mut encoded = BytesMut::new();
        Message {
            class,
            kind,
            shard: 5,
            id,
            payload: payload.to_vec().into(),
        }
        .encode(&mut encoded);
        visit(name, &encoded);
    };
    let id = 0x0102_0304_0506_0708;
    message("request", Class::Request, 7, id, b"append");
    message("reply", Class::Reply, 7, id, b"");
    message("one-way", Class::OneWay, 7, 0, b"hint");
    message("refusal", Class::Refusal, 7, id, &[Refusal::Busy.code()]);
    message("quiesce", Class::OneWay, 7, 0, &QUIESCE.to_bytes());
    message("ping", Class::Control, control::PING, 0, &PING.to_bytes());
    message("pong", Class::Control, control::PONG, 0, &PING.to_bytes());
    let mut encoded = BytesMut::new();
    PEER_HELLO.encode(&mut encoded);
    visit("hello", &encoded);
}
