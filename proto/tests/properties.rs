//! Properties of the codec over arbitrary messages and arbitrary bytes.

use std::net::{IpAddr, SocketAddr};

use bytes::{Bytes, BytesMut};
use generation_proto::cluster::Verb;
use generation_proto::limits::{MAX_SHARDS, SLOTS};
use generation_proto::map::{Map, Node, NodeState, Replica, Shard, SlotRange};
use generation_proto::options::{Condition, Consistency, Moved, ReplyOptions, RequestOptions, Session};
use generation_proto::reply::{HelloReply, MultiResult, Page, PageEntry, ReplyWriter, Stat};
use generation_proto::request::{Hello, Item, ItemList, KeyList};
use generation_proto::{
    Decoder, Frame, FrameError, Limits, Opcode, Operation, Reply, ReplyMeta, Request, Scan, ShardSession, Side,
    SlotTable, slot,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// A request that owns its parts; [`Owned::with`] lends it as a [`Request`].
#[derive(Debug, Clone)]
struct Owned {
    id: u64,
    opcode: Opcode,
    options: RequestOptions,
    key: Vec<u8>,
    value: Vec<u8>,
    name: String,
    number: i64,
    small: (u16, u16),
    items: Vec<(Vec<u8>, Vec<u8>, Option<u64>)>,
}

impl Owned {
    fn with<T>(&self, take: impl FnOnce(&Request<'_>) -> T) -> T {
        let mut buffer = BytesMut::new();
        let (key, value) = (&self.key[..], &self.value[..]);
        let scan = Scan {
            shard: self.small.0 % MAX_SHARDS as u16,
            limit: u32::from(self.small.1) + 1,
            cursor: self.id,
            prefix: value.get(..value.len().min(300)).unwrap(),
        };
        let session = ShardSession {
            id: u128::from(self.id) << 64 | 1,
            shard: self.small.1 % MAX_SHARDS as u16,
        };
        let keys = || self.items.iter().map(|(key, ..)| &key[..]);
        let operation = match self.opcode {
            Opcode::Hello => Operation::Hello(Hello {
                major: self.small.0,
                minor: self.small.1,
                name: &self.name,
            }),
            Opcode::Ping => Operation::Ping {
                payload: &value[..value.len().min(1024)],
            },
            Opcode::Map => Operation::Map,
            Opcode::Stats => Operation::Stats,
            Opcode::Get => Operation::Get { key },
            Opcode::Put => Operation::Put { key, value },
            Opcode::Delete => Operation::Delete { key },
            Opcode::Incr => Operation::Incr {
                key,
                delta: self.number,
            },
            Opcode::Touch => Operation::Touch { key },
            Opcode::MultiGet => Operation::MultiGet(KeyList::build(keys(), &mut buffer)),
            Opcode::MultiDelete => Operation::MultiDelete(KeyList::build(keys(), &mut buffer)),
            Opcode::MultiPut => {
                let items = self.items.iter().map(|(key, value, ttl_ms)| Item {
                    key,
                    value,
                    ttl_ms: *ttl_ms,
                });
                Operation::MultiPut(ItemList::build(items, &mut buffer))
            }
            Opcode::Keys => Operation::Keys(scan),
            Opcode::Entries => Operation::Entries(scan),
            Opcode::OpenSession => Operation::OpenSession(session),
            Opcode::CloseSession => Operation::CloseSession(session),
            Opcode::TakeSnapshot => Operation::TakeSnapshot { shard: session.shard },
            Opcode::Cluster => Operation::Cluster {
                verb: Verb::ALL[usize::from(session.shard) % Verb::ALL.len()],
                body: &self.value,
            },
        };
        take(&Request {
            id: self.id,
            options: self.options,
            operation,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = BytesMut::new();
        self.with(|request| request.encode(&mut out));
        out.to_vec()
    }
}

fn a_consistency() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        Just(Consistency::Linearizable),
        (any::<u16>(), any::<u32>(), any::<u64>()).prop_map(|(shard, epoch, index)| Consistency::Session {
            shard,
            epoch,
            index
        }),
        any::<u32>().prop_map(|max_age_ms| Consistency::Stale { max_age_ms }),
    ]
}

fn a_session() -> impl Strategy<Value = Session> {
    // Below what is left for the numbers of the keys that follow the first.
    (1_u128.., 1..u64::MAX - 1000, any::<u64>()).prop_map(|(id, seq, below)| Session {
        id,
        seq,
        first_unacked: seq - below % seq,
    })
}

/// Options that go with `opcode`.
fn options(opcode: Opcode) -> impl Strategy<Value = RequestOptions> {
    let condition = prop_oneof![
        Just(Condition::None),
        Just(Condition::IfAbsent),
        (1_u64..).prop_map(Condition::IfVersion)
    ];
    let tuple = (
        option::of(1_u64..),
        condition,
        a_consistency(),
        option::of(any::<u32>()),
        option::of(a_session()),
        option::of(any::<u32>()),
    );
    tuple.prop_map(
        move |(ttl_ms, condition, consistency, deadline_ms, session, map_epoch)| {
            use Opcode::{Delete, Entries, Get, Keys, MultiGet, MultiPut, Put, Touch};
            let may = match condition {
                Condition::None => true,
                Condition::IfAbsent => matches!(opcode, Put | MultiPut),
                Condition::IfVersion(_) => matches!(opcode, Put | Delete),
            };
            let reads = matches!(opcode, Get | MultiGet | Keys | Entries);
            RequestOptions {
                ttl_ms: ttl_ms.filter(|_| matches!(opcode, Put | Touch)),
                condition: if may { condition } else { Condition::None },
                consistency: if reads { consistency } else { Consistency::default() },
                deadline_ms,
                session: session.filter(|_| opcode.changes_entries()),
                map_epoch,
            }
        },
    )
}

fn a_key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![8 => vec(any::<u8>(), 1..40), 1 => vec(any::<u8>(), 65_535)]
}

fn a_request() -> impl Strategy<Value = Owned> {
    let items = vec(
        (vec(any::<u8>(), 1..20), vec(any::<u8>(), 0..30), option::of(1_u64..)),
        1..20,
    );
    select(Opcode::ALL).prop_flat_map(move |opcode| {
        let parts = (
            any::<u64>(),
            options(opcode),
            a_key(),
            vec(any::<u8>(), 0..2000),
            "\\PC{0,60}",
            any::<(i64, u16, u16)>(),
            items.clone(),
        );
        parts.prop_map(
            move |(id, options, key, value, name, (number, major, minor), items)| Owned {
                id,
                opcode,
                options,
                key,
                value,
                name,
                number,
                small: (major, minor),
                items,
            },
        )
    })
}

fn a_meta() -> impl Strategy<Value = ReplyMeta> {
    let parts = (any::<(u64, u64, u64)>(), any::<(u32, u16, u8, u8)>());
    parts.prop_map(
        |((version, index, server_time_ms), (map_epoch, shard, status, consistency))| ReplyMeta {
            version,
            index,
            server_time_ms,
            map_epoch,
            shard,
            status,
            consistency,
        },
    )
}

fn a_map() -> impl Strategy<Value = Map> {
    let state = select(&[NodeState::Up, NodeState::Down, NodeState::Draining]);
    let node = (any::<u64>(), any::<IpAddr>(), any::<(u16, u16)>(), state);
    let node = node.prop_map(|(id, ip, (port, cores), state)| Node {
        id,
        // The one address with two spellings: IPv4 written as IPv6.
        addr: SocketAddr::new(ip.to_canonical(), port),
        cores,
        state,
    });
    let replica = any::<(u64, u64, u16)>().prop_map(|(id, node, core)| Replica { id, node, core });
    let shard = (any::<(u32, u64, u64)>(), vec(replica, 0..=16));
    let shard = shard.prop_map(|((epoch, term, leader), replicas)| Shard {
        epoch,
        term,
        leader,
        replicas,
    });
    let cuts = proptest::collection::btree_set(1..SLOTS, 0..20);
    let parts = (any::<u32>(), "\\PC{0,40}", vec(node, 0..8), vec(shard, 1..12), cuts);
    parts.prop_map(|(epoch, cluster, nodes, shards, cuts)| {
        let starts = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().map(|cut| cut - 1).chain(std::iter::once(SLOTS - 1));
        let ranges = starts.zip(ends).enumerate().map(|(at, (first, last))| SlotRange {
            first,
            last,
            shard: (at % shards.len()) as u16,
        });
        Map {
            epoch,
            cluster,
            nodes,
            ranges: ranges.collect(),
            shards,
        }
    })
}

/// All frames of `bytes` when they arrive in pieces that end at `cuts`, how the stream ended, and whether it may end there.
/// Where `eager` says so the decoder is drained after a piece; it always is at the end.
fn decode(
    side: Side,
    limit: usize,
    bytes: &[u8],
    cuts: &[usize],
    eager: &[bool],
) -> (Vec<Frame>, Result<(), FrameError>) {
    let mut decoder = Decoder::new(side, limit);
    let mut frames = Vec::new();
    let mut drain = |decoder: &mut Decoder| -> Result<(), FrameError> {
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
        Ok(())
    };
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let mut end = Ok(());
    for (at, piece) in cuts.windows(2).enumerate() {
        decoder.feed(Bytes::copy_from_slice(&bytes[piece[0]..piece[1]]));
        if eager.get(at).copied().unwrap_or(true) {
            end = end.and_then(|()| drain(&mut decoder));
        }
    }
    end = end.and_then(|()| drain(&mut decoder));
    if let Err(error) = end {
        // Errors are sticky, whatever comes after them, and nothing is kept.
        decoder.feed(Bytes::from_static(&[0; 64]));
        assert_eq!(decoder.next_frame(), Err(error));
        assert_eq!(decoder.finish(), Err(error));
        assert_eq!(decoder.buffered_len(), 0);
    } else {
        end = decoder.finish();
    }
    (frames, end)
}

fn only_frame(side: Side, bytes: &[u8]) -> Frame {
    let (frames, end) = decode(side, Limits::default().max_frame_len(), bytes, &[], &[]);
    assert_eq!((frames.len(), end), (1, Ok(())));
    frames[0].clone()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_round_trip(owned in a_request()) {
        let frame = only_frame(Side::Server, &owned.encode());
        let decoded = Request::decode(&frame, &Limits::default());
        owned.with(|request| assert_eq!(decoded.as_ref(), Ok(request)));
        let decoded = decoded.unwrap();
        // What is in a list comes out of it.
        match decoded.operation {
            Operation::MultiGet(keys) | Operation::MultiDelete(keys) => {
                prop_assert_eq!(keys.len(), owned.items.len());
                prop_assert!(keys.iter().eq(owned.items.iter().map(|(key, ..)| &key[..])));
            }
            Operation::MultiPut(items) => {
                prop_assert_eq!(items.len(), owned.items.len());
                prop_assert!(items.iter().map(|item| (item.key, item.value, item.ttl_ms))
                    .eq(owned.items.iter().map(|(key, value, ttl_ms)| (&key[..], &value[..], *ttl_ms))));
            }
            _ => {}
        }
    }

    #[test]
    fn replies_round_trip(
        id: u64,
        opcode: u8,
        meta in a_meta(),
        retry_after_ms: Option<u32>,
        moved in option::of(any::<(u32, u64, u64, u16)>()),
        expires_at_ms: Option<u64>,
        age_ms: Option<u32>,
        message in option::of("\\PC{0,120}"),
        body in vec(any::<u8>(), 0..3000),
    ) {
        let moved = moved.map(|(epoch, term, leader, core)| Moved { epoch, term, leader, core });
        let message = message.as_deref();
        let options = ReplyOptions { retry_after_ms, moved, expires_at_ms, age_ms, message };
        let reply = Reply { id, opcode, meta, options, body: &body };
        let mut whole = BytesMut::new();
        reply.encode(&mut whole);
        // A message is cut to what an option holds, at the boundary of a character.
        let cut = message.map(|text| &text[..text.floor_char_boundary(255)]);
        let expected = Reply { options: ReplyOptions { message: cut, ..options }, ..reply };
        let frame = only_frame(Side::Client, &whole);
        prop_assert_eq!(Reply::decode(&frame), Ok(expected));

        // Written piece by piece it is the same, and an abandoned one leaves no trace.
        let mut pieces = BytesMut::new();
        ReplyWriter::begin(&mut pieces, 1, 2, &meta, &options).abandon(&mut pieces);
        prop_assert!(pieces.is_empty());
        let writer = ReplyWriter::begin(&mut pieces, opcode, id, &meta, &options);
        for piece in body.chunks(7) {
            pieces.extend_from_slice(piece);
        }
        prop_assert_eq!(writer.len(&pieces), whole.len());
        writer.end(&mut pieces);
        prop_assert_eq!(pieces, whole);
    }

    #[test]
    fn bodies_of_replies_round_trip(
        numbers: (u16, u16, u64, u16, u16),
        lens: (u32, u32, u32),
        cluster in "\\PC{0,40}",
        server in "\\PC{0,40}",
        results in vec((any::<(u8, u8, u16, u64)>(), any::<(u64, u64)>(), vec(any::<u8>(), 0..40)), 0..20),
        entries in vec((vec(any::<u8>(), 0..40), vec(any::<u8>(), 0..40), any::<(u64, u64)>()), 0..20),
        (next, done) in any::<(u64, bool)>(),
        stats in vec(("[a-z.0-9_]{1,30}", any::<u64>()), 0..20),
        later in vec(any::<u8>(), 0..9),
    ) {
        let (major, minor, node, core, cores) = numbers;
        let (max_key_len, max_value_len, max_frame_len) = lens;
        let hello = HelloReply {
            major, minor, node, core, cores, max_key_len, max_value_len, max_frame_len,
            cluster: &cluster,
            server: &server,
        };
        let mut body = BytesMut::new();
        hello.encode(&mut body);
        body.extend_from_slice(&later);
        prop_assert_eq!(HelloReply::decode(&body), Ok(hello));

        body.clear();
        let results: Vec<MultiResult<'_>> = results.iter().map(|((status, consistency, shard, version), times, value)| {
            let (status, consistency, shard, version) = (*status, *consistency, *shard, *version);
            MultiResult { status, consistency, shard, version, index: times.0, expires_at_ms: times.1, value }
        }).collect();
        for result in &results {
            result.encode(&mut body);
        }
        let decoded: Result<Vec<_>, _> = MultiResult::decode_all(&body).collect();
        prop_assert_eq!(decoded, Ok(results));

        let count = entries.len() as u32;
        let page = Page { next, count, done };
        let entries: Vec<PageEntry<'_>> = entries.iter().map(|(key, value, (version, expires_at_ms))| {
            PageEntry { key, value, version: *version, expires_at_ms: *expires_at_ms }
        }).collect();
        body.clear();
        body.extend_from_slice(&page.to_bytes());
        for entry in &entries {
            entry.encode(&mut body);
        }
        body.extend_from_slice(&later);
        let (decoded, rest) = Page::decode(&body).unwrap();
        prop_assert_eq!(decoded, page);
        prop_assert_eq!(rest.collect::<Result<Vec<_>, _>>(), Ok(entries));

        body.clear();
        for (name, value) in &stats {
            Stat { name, value: *value }.encode(&mut body);
        }
        let decoded: Result<Vec<_>, _> = Stat::decode_all(&body).collect();
        let expected: Vec<_> = stats.iter().map(|(name, value)| Stat { name, value: *value }).collect();
        prop_assert_eq!(decoded, Ok(expected));
    }

    #[test]
    fn maps_round_trip_and_route_every_key(map in a_map(), keys in vec(a_key(), 1..20), later in vec(any::<u8>(), 0..9)) {
        let mut body = BytesMut::new();
        map.encode(&mut body);
        for end in [0, body.len() / 2, body.len() - 1] {
            prop_assert!(Map::decode(&body[..end]).is_err(), "a map cut at {} was read", end);
        }
        body.extend_from_slice(&later);
        let decoded = Map::decode(&body);
        prop_assert_eq!(decoded.as_ref(), Ok(&map));
        let table = SlotTable::new(&map.ranges, map.shards.len()).unwrap();
        for key in &keys {
            let slot = slot::slot_of(key);
            let range = map.ranges.iter().find(|range| (range.first..=range.last).contains(&slot)).unwrap();
            prop_assert_eq!(table.shard_of(key), range.shard);
        }
    }

    #[test]
    fn a_damaged_map_never_panics(map in a_map(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut body = BytesMut::new();
        map.encode(&mut body);
        let at = at.index(body.len());
        body[at] = byte;
        if let Ok(map) = Map::decode(&body) {
            prop_assert!(SlotTable::new(&map.ranges, map.shards.len()).is_ok());
        }
    }

    /// However a stream is cut, and whenever it is drained, the frames and the end are the same.
    #[test]
    fn boundaries_do_not_matter(
        requests in vec(a_request(), 1..8),
        cuts in vec(any::<usize>(), 0..40),
        eager in vec(any::<bool>(), 0..40),
        tail in vec(any::<u8>(), 0..40),
        keep in any::<prop::sample::Index>(),
    ) {
        let limit = Limits::default().max_frame_len();
        let mut stream: Vec<u8> = requests.iter().flat_map(Owned::encode).collect();
        let (frames, end) = decode(Side::Server, limit, &stream, &[], &[]);
        prop_assert_eq!((frames.len(), end), (requests.len(), Ok(())));
        prop_assert_eq!(&decode(Side::Server, limit, &stream, &cuts, &eager), &(frames.clone(), end));
        // Cut off somewhere: the frames before it are there, and the stream may end between frames only.
        let cut_off = &stream[..keep.index(stream.len())];
        let (some, end) = decode(Side::Server, limit, cut_off, &cuts, &eager);
        prop_assert_eq!(&some[..], &frames[..some.len()]);
        let used: usize = some.iter().map(|frame| 16 + frame.payload.len()).sum();
        prop_assert_eq!(end.is_ok(), used == cut_off.len());
        // With rubbish behind it: the same whatever the boundaries.
        stream.extend_from_slice(&tail);
        let whole = decode(Side::Server, limit, &stream, &[], &[]);
        prop_assert_eq!(&decode(Side::Server, limit, &stream, &cuts, &eager), &whole);
        prop_assert!(whole.0.len() >= frames.len());
    }

    /// Arbitrary bytes: no panic, no frame longer than what was there, boundaries do not matter, and what can be read as a
    /// request is one: encoded again it reads the same.
    #[test]
    fn arbitrary_bytes_are_refused_or_understood(
        bytes in vec(prop_oneof![Just(0_u8), Just(1_u8), Just(16_u8), any::<u8>()], 0..200),
        cuts in vec(any::<usize>(), 0..10),
        eager in vec(any::<bool>(), 0..10),
        client: bool,
    ) {
        let side = if client { Side::Client } else { Side::Server };
        let whole = decode(side, 1000, &bytes, &[], &[]);
        prop_assert_eq!(&decode(side, 1000, &bytes, &cuts, &eager), &whole);
        for frame in &whole.0 {
            understand(frame);
        }
    }

    /// A legal request with some bytes changed.
    #[test]
    fn mutated_requests_are_refused_or_understood(
        request in a_request(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = request.encode();
        for (at, byte) in changes {
            // Mostly in the head, where it hurts.
            let at = at.index(bytes.len().min(80));
            bytes[at] = byte;
        }
        for frame in decode(Side::Server, Limits::default().max_frame_len(), &bytes, &[], &[]).0 {
            understand(&frame);
        }
    }

    /// Any body under any opcode.
    #[test]
    fn arbitrary_bodies_never_panic(
        opcode in prop_oneof![4 => select(Opcode::ALL).prop_map(Opcode::code), 1 => any::<u8>()],
        options_len in prop_oneof![4 => 0_u16..20, 1 => any::<u16>()],
        payload in vec(prop_oneof![2 => 0_u8..4, 1 => any::<u8>()], 0..120),
    ) {
        understand(&Frame { opcode, options_len, request_id: 1, payload: payload.into() });
    }

    /// An option that this version does not know: skipped if it may be, else refused, wherever it stands.
    #[test]
    fn unknown_options_are_skipped_or_refused(owned in a_request(), tag: u8, value in vec(any::<u8>(), 0..40), first: bool) {
        prop_assume!(![1, 2, 3, 4, 5, 6, 0x81].contains(&tag));
        let mut bytes = owned.encode();
        let options_len = u16::from_le_bytes([bytes[6], bytes[7]]);
        let at = if first { 16 } else { 16 + usize::from(options_len) };
        let option = [&[tag, value.len() as u8][..], &value].concat();
        let added = option.len();
        bytes.splice(at..at, option);
        bytes[6..8].copy_from_slice(&(options_len + added as u16).to_le_bytes());
        let len = (bytes.len() - 16) as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let frame = only_frame(Side::Server, &bytes);
        let decoded = Request::decode(&frame, &Limits::default());
        if tag < 0x80 {
            prop_assert_eq!(decoded, Err(generation_proto::RequestError::UnknownOption { tag }));
        } else {
            owned.with(|request| assert_eq!(decoded.as_ref(), Ok(request)));
        }
    }

    #[test]
    fn hash_tags_decide_the_slot(prefix in "[a-z]{0,10}", tag in "[^{}]{1,20}", suffix in "[a-z{}]{0,10}") {
        let tagged = format!("{prefix}{{{tag}}}{suffix}");
        prop_assert_eq!(slot::slot_of(tagged.as_bytes()), slot::slot_of(tag.as_bytes()));
    }
}

/// Reads `frame` as everything it could be. What is a request encodes to something that reads the same.
fn understand(frame: &Frame) {
    let limits = Limits {
        max_key_len: 50,
        max_value_len: 60,
    };
    if let Ok(request) = Request::decode(frame, &limits) {
        if let Some(key) = request.operation.key() {
            assert!((1..=50).contains(&key.len()));
        }
        let mut again = BytesMut::new();
        request.encode(&mut again);
        let again = only_frame(Side::Server, &again);
        assert_eq!(Request::decode(&again, &limits), Ok(request));
    }
    if let Ok(reply) = Reply::decode(frame) {
        let mut again = BytesMut::new();
        reply.encode(&mut again);
        assert_eq!(Reply::decode(&only_frame(Side::Client, &again)), Ok(reply));
    }
    let body = &frame.payload[..];
    let _ = HelloReply::decode(body);
    let _ = Map::decode(body);
    assert!(MultiResult::decode_all(body).count() <= body.len() / MultiResult::OVERHEAD + 1);
    assert!(Stat::decode_all(body).count() <= body.len() / 10 + 1);
    if let Ok((_, entries)) = Page::decode(body) {
        assert!(entries.count() <= body.len() / PageEntry::OVERHEAD + 1);
    }
}
