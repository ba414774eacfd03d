//! `PROTOCOL.md` says what the code does: its tables are read and compared with the constants and the decoder.

use std::collections::{BTreeMap, BTreeSet};

use bytes::BytesMut;
use generation_proto::cluster::Verb;
use generation_proto::options::{IGNORABLE, request_tag};
use generation_proto::peer::{QuiesceVerb, Refusal};
use generation_proto::request::{Item, ItemList, KeyList, Opcode};
use generation_proto::status::{Class, Status};
use generation_proto::{
    Frame, Hello, Limits, MAJOR, MINOR, Operation, Request, RequestError, Scan, ShardSession, close_code, frame,
    limits, options, peer, reply,
};

const DOCUMENT: &str = include_str!("../PROTOCOL.md");

/// The cells of every table row under the heading `section`, up to the next heading.
fn rows(section: &str) -> Vec<Vec<String>> {
    let body = DOCUMENT
        .split_once(&format!("\n{section}\n"))
        .unwrap_or_else(|| panic!("PROTOCOL.md has no section {section}"))
        .1;
    body.lines()
        .take_while(|line| !line.starts_with('#'))
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| {
            row.split(" | ")
                .map(|cell| cell.trim().trim_matches('`').to_owned())
                .collect()
        })
        .collect()
}

fn number(cell: &str) -> Option<u64> {
    match cell.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => cell.parse().ok(),
    }
}

/// The rows under `section` that begin with a number, as number, name and whole row.
fn numbered(section: &str) -> BTreeMap<u64, (String, Vec<String>)> {
    let mut found = BTreeMap::new();
    for row in rows(section) {
        if let Some(number) = number(&row[0]) {
            let name = row[1].clone();
            assert!(
                found.insert(number, (name, row)).is_none(),
                "{number} stands twice under {section}"
            );
        }
    }
    found
}

fn names(section: &str) -> BTreeMap<u64, String> {
    numbered(section)
        .into_iter()
        .map(|(number, (name, _))| (number, name))
        .collect()
}

#[test]
fn the_title_names_the_version() {
    let title = format!("# The Generation protocol, version {MAJOR}.{MINOR}\n");
    assert!(DOCUMENT.starts_with(&title));
    let alpn = format!("generation/{MAJOR}");
    assert_eq!(generation_proto::ALPN_CLIENT, alpn.as_bytes());
    assert!(DOCUMENT.contains(&format!("ALPN `{alpn}`")));
}

#[test]
fn close_codes_are_listed() {
    let codes = close_code::ALL
        .iter()
        .map(|&(code, name)| (u64::from(code), name.to_owned()));
    assert_eq!(names("## Connection"), codes.collect());
}

#[test]
fn peer_messages_are_listed() {
    assert_eq!(
        peer::ALPN_PEER,
        format!("generation-peer/{}", peer::PEER_VERSION).as_bytes()
    );
    let named = |names: &[(u8, String)]| {
        let names = names.iter().map(|(code, name)| (u64::from(*code), name.clone()));
        names.collect::<BTreeMap<_, _>>()
    };
    let classes: Vec<_> = peer::Class::ALL
        .iter()
        .map(|class| (class.code(), format!("{class:?}")))
        .collect();
    assert_eq!(names("### Classes"), named(&classes));
    let refusals: Vec<_> = Refusal::ALL
        .iter()
        .map(|refusal| (refusal.code(), format!("{refusal:?}")))
        .collect();
    assert_eq!(names("### Refusals"), named(&refusals));
    let controls = [
        (peer::control::HELLO, "hello"),
        (peer::control::PING, "ping"),
        (peer::control::PONG, "pong"),
    ];
    let controls = controls.map(|(kind, name)| (kind, name.to_owned()));
    assert_eq!(names("### Control"), named(&controls));
    let verbs = [
        QuiesceVerb::Propose,
        QuiesceVerb::Accept,
        QuiesceVerb::Decline,
        QuiesceVerb::Wake,
    ];
    let verbs = verbs.map(|verb| (verb as u8, format!("{verb:?}")));
    assert_eq!(names("### Keeping still"), named(&verbs));
    for code in 0..=u8::MAX {
        assert_eq!(
            peer::Class::from_code(code).map(peer::Class::code),
            names("### Classes").contains_key(&u64::from(code)).then_some(code)
        );
        let refusal = Refusal::from_code(code);
        assert!(refusal.code() == code || refusal == Refusal::Unanswered);
    }
}

#[test]
fn operations_are_listed_with_what_they_write() {
    let listed: BTreeMap<u64, (String, bool)> = numbered("## Operations")
        .into_iter()
        .map(|(code, (name, row))| (code, (name, row.iter().any(|cell| cell == "yes"))))
        .collect();
    let known = Opcode::ALL
        .iter()
        .map(|opcode| (u64::from(opcode.code()), (format!("{opcode:?}"), opcode.is_write())));
    assert_eq!(listed, known.collect());
    for code in 0..=u8::MAX {
        let known = Opcode::from_code(code).map(Opcode::code);
        assert_eq!(known, listed.contains_key(&u64::from(code)).then_some(code));
    }
}

#[test]
fn status_codes_are_listed_in_their_ranges() {
    let known = Status::ALL
        .iter()
        .map(|status| (u64::from(status.code()), status.name().to_owned()));
    assert_eq!(names("### Codes"), known.collect());
    let ranges: BTreeMap<String, String> = rows("## Status codes")
        .into_iter()
        .map(|mut row| (row.swap_remove(1), row.swap_remove(0)))
        .collect();
    for (class, range) in [
        (Class::Ok, "0"),
        (Class::Answer, "1-15"),
        (Class::Rejected, "16-31"),
        (Class::NotProposed, "32-47"),
        (Class::InDoubt, "48-63 and above"),
    ] {
        assert_eq!(ranges[&format!("{class:?}")], range);
    }
    for (class, codes) in [
        (Class::Answer, 1..=15),
        (Class::Rejected, 16..=31),
        (Class::NotProposed, 32..=47),
        (Class::InDoubt, 48..=u8::MAX),
    ] {
        for code in codes {
            assert_eq!(Status::class_of_code(code), class, "status {code}");
        }
    }
    assert_eq!(Status::class_of_code(0), Class::Ok);
}

#[test]
fn reply_options_are_listed() {
    use options::reply_tag::{AGE, EXPIRES_AT, MESSAGE, MOVED, RETRY_AFTER};
    let known = [
        (RETRY_AFTER, "retry-after"),
        (MOVED, "moved"),
        (EXPIRES_AT, "expires-at"),
        (AGE, "age"),
        (MESSAGE, "message"),
    ];
    let known = known.map(|(tag, name)| (u64::from(tag), name.to_owned()));
    assert_eq!(names("## Reply options"), BTreeMap::from(known));
}

/// A legal value of each known request option.
fn request_options() -> Vec<(u8, &'static str, Vec<u8>)> {
    let session = [&1_u128.to_le_bytes()[..], &2_u64.to_le_bytes(), &1_u64.to_le_bytes()].concat();
    vec![
        (request_tag::TTL, "ttl", vec![1, 0, 0, 0, 0, 0, 0, 0]),
        (request_tag::IF_ABSENT, "if-absent", vec![]),
        (request_tag::IF_VERSION, "if-version", vec![1, 0, 0, 0, 0, 0, 0, 0]),
        (request_tag::CONSISTENCY, "consistency", vec![2, 1, 0, 0, 0]),
        (request_tag::DEADLINE, "deadline", vec![1, 0, 0, 0]),
        (request_tag::SESSION, "session", session),
        (request_tag::MAP_EPOCH, "map-epoch", vec![1, 0, 0, 0]),
    ]
}

/// The body of some request of each operation.
fn body(opcode: Opcode) -> Vec<u8> {
    let (mut keys, mut items) = (BytesMut::new(), BytesMut::new());
    let keys = KeyList::build([&b"k"[..]], &mut keys);
    let item = Item {
        key: b"k",
        value: b"v",
        ttl_ms: None,
    };
    let items = ItemList::build([item], &mut items);
    let key = b"k";
    let scan = Scan {
        shard: 0,
        limit: 1,
        cursor: 0,
        prefix: b"",
    };
    let operation = match opcode {
        Opcode::Hello => Operation::Hello(Hello {
            major: 1,
            minor: 0,
            name: "",
        }),
        Opcode::Ping => Operation::Ping { payload: b"" },
        Opcode::Map => Operation::Map,
        Opcode::Stats => Operation::Stats,
        Opcode::Get => Operation::Get { key },
        Opcode::Put => Operation::Put { key, value: b"v" },
        Opcode::Delete => Operation::Delete { key },
        Opcode::Incr => Operation::Incr { key, delta: 1 },
        Opcode::Touch => Operation::Touch { key },
        Opcode::MultiGet => Operation::MultiGet(keys),
        Opcode::MultiPut => Operation::MultiPut(items),
        Opcode::MultiDelete => Operation::MultiDelete(keys),
        Opcode::Keys => Operation::Keys(scan),
        Opcode::Entries => Operation::Entries(scan),
        Opcode::OpenSession => Operation::OpenSession(ShardSession { id: 1, shard: 0 }),
        Opcode::CloseSession => Operation::CloseSession(ShardSession { id: 1, shard: 0 }),
        Opcode::TakeSnapshot => Operation::TakeSnapshot { shard: 0 },
        Opcode::Cluster => Operation::Cluster {
            verb: Verb::Describe,
            body: &[],
        },
    };
    let mut out = BytesMut::new();
    Request {
        id: 0,
        options: options::RequestOptions::default(),
        operation,
    }
    .encode(&mut out);
    out[frame::HEADER_LEN..].to_vec()
}

#[test]
fn request_options_are_listed_with_their_operations() {
    let listed = numbered("## Request options");
    let mut known = BTreeMap::new();
    for (tag, name, value) in request_options() {
        let mut with = BTreeSet::new();
        for &opcode in Opcode::ALL {
            let option = [&[tag, value.len() as u8][..], &value].concat();
            let frame = Frame {
                opcode: opcode.code(),
                options_len: option.len() as u16,
                request_id: 0,
                payload: [option, body(opcode)].concat().into(),
            };
            match Request::decode(&frame, &Limits::default()) {
                Ok(_) => _ = with.insert(format!("{opcode:?}")),
                Err(error) => assert_eq!(error, RequestError::OptionNotApplicable { opcode, tag }),
            }
        }
        known.insert(u64::from(tag), (name.to_owned(), with));
    }
    let all: BTreeSet<String> = Opcode::ALL.iter().map(|opcode| format!("{opcode:?}")).collect();
    let listed: BTreeMap<u64, (String, BTreeSet<String>)> = listed
        .into_iter()
        .map(|(tag, (name, row))| {
            let with = row[3]
                .split(' ')
                .map(|name| name.trim_matches('`').to_owned())
                .collect();
            (tag, (name, if row[3] == "all" { all.clone() } else { with }))
        })
        .collect();
    assert_eq!(listed, known);
    assert_eq!(IGNORABLE, 0x80);
}

#[test]
fn limits_are_listed() {
    let listed: BTreeMap<String, usize> = rows("## Limits")
        .into_iter()
        .filter_map(|row| Some((row[2].clone(), row[1].parse().ok()?)))
        .collect();
    let known = [
        ("MAX_KEY_LEN", limits::MAX_KEY_LEN),
        ("DEFAULT_MAX_VALUE_LEN", limits::DEFAULT_MAX_VALUE_LEN),
        ("MAX_VALUE_LEN", limits::MAX_VALUE_LEN),
        ("MAX_BATCH", limits::MAX_BATCH),
        ("MAX_PING_LEN", limits::MAX_PING_LEN),
        ("MAX_NAME_LEN", limits::MAX_NAME_LEN),
        ("FRAME_OVERHEAD", limits::FRAME_OVERHEAD),
        ("MIN_FRAME_LIMIT", limits::MIN_FRAME_LIMIT),
        ("SLOTS", usize::from(limits::SLOTS)),
        ("MAX_SHARDS", limits::MAX_SHARDS),
        ("MAX_NODES", limits::MAX_NODES),
        ("MAX_REPLICAS", limits::MAX_REPLICAS),
        ("SESSION_WINDOW", limits::SESSION_WINDOW as usize),
        ("peer::MAX_PAYLOAD_LEN", peer::MAX_PAYLOAD_LEN),
        ("peer::MAX_PROMPT_LEN", peer::MAX_PROMPT_LEN),
    ];
    assert_eq!(listed, known.map(|(name, limit)| (name.to_owned(), limit)).into());
}

#[test]
fn sizes_that_are_drawn_are_those_of_the_code() {
    assert_eq!(frame::HEADER_LEN, 16);
    assert_eq!(reply::META_LEN, 32);
    assert_eq!(ItemList::ITEM_OVERHEAD, 16);
    assert_eq!(reply::MultiResult::OVERHEAD, 32);
    assert_eq!(reply::Page::LEN, 16);
    assert_eq!(reply::PageEntry::OVERHEAD, 24);
    assert_eq!(peer::HEADER_LEN, 16);
    assert_eq!(peer::PeerHello::FIXED_LEN, 40);
    assert_eq!(peer::Ping::LEN, 16);
    assert_eq!(peer::Quiesce::LEN, 17);
}
