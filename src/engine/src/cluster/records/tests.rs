use std::net::SocketAddr;

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;

fn later() -> impl Strategy<Value = Later> {
    prop_oneof![Just(Later::default()), vec(any::<u8>(), 0..20).prop_map(Later)]
}

fn targets() -> impl Strategy<Value = Vec<u64>> {
    btree_set(1..=u64::MAX, 0..=MAX_TARGETS).prop_map(|ids| ids.into_iter().collect())
}

fn addr() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from),
        (any::<[u8; 16]>(), any::<u16>()).prop_map(SocketAddr::from),
    ]
}

fn cause() -> impl Strategy<Value = Cause> {
    any::<u8>().prop_map(Cause::from_code)
}

pub(in crate::cluster) fn record() -> impl Strategy<Value = Record> {
    let config = (
        (
            "[a-z]{1,20}",
            any::<u128>(),
            1..=MAX_SHARDS,
            prop::sample::select(&REPLICATION_FACTORS[..]),
        ),
        (any::<u64>(), 1..u16::MAX, 1..u16::MAX, later()),
    );
    let config = config.prop_map(
        |((name, id, shards, replication), (after, per_node, total, later))| Config {
            name,
            id,
            shards,
            replication,
            replace_after_ms: after,
            moves_per_node: per_node,
            moves_total: total,
            later,
        },
    );
    let node = (
        (1..=u64::MAX, addr(), "\\PC{0,20}", 1..u16::MAX),
        (
            any::<u128>(),
            any::<u64>(),
            prop::sample::select(&NodeState::ALL[..]),
            later(),
        ),
    );
    let node = node.prop_map(
        |((id, addr, zone, cores), (directory, generation, state, later))| Node {
            id,
            addr,
            zone,
            cores,
            directory,
            generation,
            state,
            later,
        },
    );
    let home = prop::option::of(1..=u64::MAX);
    let shard = (
        0..MAX_SHARDS,
        any::<u32>(),
        targets(),
        cause(),
        any::<u8>(),
        home,
        later(),
    );
    let shard = shard.prop_map(|(number, epoch, targets, cause, load, home, later)| Shard {
        number,
        epoch,
        targets,
        cause,
        load,
        home,
        later,
    });
    let controller = (targets(), cause(), later());
    let controller = controller.prop_map(|(targets, cause, later)| Controller { targets, cause, later });
    prop_oneof![
        config.prop_map(Record::Config),
        node.prop_map(Record::Node),
        shard.prop_map(Record::Shard),
        controller.prop_map(Record::Controller),
    ]
}

/// The length of a record without what later releases have added.
fn own_len(record: &Record) -> usize {
    let later = match record {
        Record::Config(config) => &config.later,
        Record::Controller(controller) => &controller.later,
        Record::Node(node) => &node.later,
        Record::Shard(shard) => &shard.later,
    };
    record.encode().unwrap().len() - later.bytes().len()
}

proptest! {
    #[test]
    fn records_and_keys_come_back(record in record()) {
        let key = record.key();
        prop_assert_eq!(parse_key(&key_of(key)), Ok(key));
        prop_assert_eq!(Record::decode(key, &record.encode().unwrap()), Ok(record));
    }

    #[test]
    fn a_record_cut_anywhere_is_an_error(record in record()) {
        let value = record.encode().unwrap();
        for len in 0..own_len(&record) {
            let found = Record::decode(record.key(), &value[..len]);
            prop_assert!(matches!(found, Err(RecordError::Short(_))), "{} of {} bytes: {:?}", len, value.len(), found);
        }
    }

    #[test]
    fn a_flipped_bit_never_panics_and_what_decodes_encodes_to_the_same(record in record()) {
        let value = record.encode().unwrap();
        for bit in 0..value.len() * 8 {
            let mut flipped = value.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = Record::decode(record.key(), &flipped) {
                prop_assert_ne!(&other, &record);
                prop_assert_eq!(other.encode().unwrap(), flipped);
            }
        }
    }

    #[test]
    fn any_bytes_are_a_record_or_an_error(
        key in prop::sample::select(vec![RecordKey::Config, RecordKey::Controller, RecordKey::Node(1), RecordKey::Shard(1)]),
        mut value in vec(any::<u8>(), 0..80),
        versioned in any::<bool>(),
    ) {
        if let (true, Some(first)) = (versioned, value.first_mut()) {
            *first = RECORD_VERSION;
        }
        if let Ok(record) = Record::decode(key, &value) {
            prop_assert_eq!(record.encode().unwrap(), value);
        }
    }

    #[test]
    fn any_bytes_are_a_key_or_an_error(key in "(node|shard|config|controller|other)?/?[0-9+ ]{0,6}") {
        if let Ok(parsed) = parse_key(key.as_bytes()) {
            prop_assert_eq!(key_of(parsed), key.as_bytes());
        }
    }
}

#[test]
fn keys_have_one_spelling() {
    assert_eq!(parse_key(b"shard/0"), Ok(RecordKey::Shard(0)));
    assert_eq!(parse_key(b"node/18446744073709551615"), Ok(RecordKey::Node(u64::MAX)));
    for key in [
        &b"node/01"[..],
        b"node/0",
        b"node/+1",
        b"node/",
        b"node/18446744073709551616",
    ] {
        assert_eq!(parse_key(key), Err(KeyError::Number("node")));
    }
    for key in [&b"shard/16384"[..], b"shard/65537", b"shard/-1"] {
        assert_eq!(parse_key(key), Err(KeyError::Number("shard")));
    }
    for key in [&b""[..], b"Config", b"access/x", b"node", b"\xff"] {
        assert_eq!(parse_key(key), Err(KeyError::Unknown));
    }
}

#[test]
fn bytes_are_as_the_header_says() {
    let mut node = Node::new(7, "10.1.2.3:7400".parse().unwrap(), "ab", 4, 5);
    node.state = NodeState::Draining;
    let expected = [
        &[1, 2, 4, 10, 1, 2, 3, 0xe8, 0x1c, 2, b'a', b'b', 4, 0][..],
        &5_u128.to_le_bytes(),
        &1_u64.to_le_bytes(),
    ];
    assert_eq!(node.encode().unwrap(), expected.concat());
    let mut shard = Shard::new(3, 9, [2, 1]);
    shard.home = Some(2);
    let [one, two] = [1_u64, 2].map(u64::to_le_bytes);
    let expected = [&[1, 9, 0, 0, 0, 0, 0][..], &two, &[2], &one, &two];
    assert_eq!(shard.encode().unwrap(), expected.concat());
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let config = |change: fn(&mut Config)| {
        let mut config = Config::new("test", 1, 16, 3);
        change(&mut config);
        config.encode()
    };
    assert!(config(|_| {}).is_ok());
    for change in [
        (|config| config.name.clear()) as fn(&mut Config),
        |config| config.name = "x".repeat(256),
        |config| config.shards = 0,
        |config| config.shards = MAX_SHARDS + 1,
        |config| config.replication = 2,
        |config| config.moves_per_node = 0,
        |config| config.moves_total = 0,
        |config| config.later = Later(vec![0; MAX_LATER_BYTES + 1]),
    ] {
        assert!(matches!(config(change), Err(RecordError::Field { .. })));
    }
    let mut shard = Shard::new(0, 1, 1..20);
    assert!(shard.encode().is_err(), "too many targets");
    shard.targets = vec![0, 1];
    assert!(shard.encode().is_err(), "node 0");
    shard.targets = vec![2, 1];
    assert!(shard.encode().is_err(), "not ascending");
}

#[test]
fn a_newer_version_is_refused_and_additions_are_kept() {
    let mut value = Shard::new(0, 1, [1]).encode().unwrap();
    value.extend(b"more");
    let mut shard = Shard::decode(0, &value).unwrap();
    shard.targets = vec![2];
    assert!(shard.encode().unwrap().ends_with(b"more"));
    value[0] = 2;
    assert_eq!(Shard::decode(0, &value), Err(RecordError::UnsupportedVersion(2)));
}

#[test]
fn states_have_names() {
    for state in NodeState::ALL {
        assert_eq!(state.name().parse(), Ok(state));
    }
    let error = "dead".parse::<NodeState>().unwrap_err();
    assert!(error.to_string().contains("draining"), "{error}");
}
