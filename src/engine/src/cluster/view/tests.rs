use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::cluster::records::{self, NodeState};

/// A history of group 0: each entry's key and value, under ascending versions.
fn history() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>, u64)>> {
    let record = records::tests::record().prop_map(|mut record| {
        match &mut record {
            Record::Config(config) => config.id = 1,
            Record::Node(node) => node.id = node.id % 5 + 1,
            Record::Shard(shard) => shard.number %= 5,
            Record::Controller(_) => {}
        }
        (key_of(record.key()), record.encode().unwrap())
    });
    let entry = prop_oneof![
        9 => record,
        1 => vec(any::<u8>(), 0..9).prop_map(|value| (b"access/policy".to_vec(), value)),
    ];
    vec((entry, 1_u64..200_000), 0..40).prop_map(|entries| {
        let mut version = 0;
        let numbered = entries.into_iter().map(|((key, value), step)| {
            version += step;
            (key, value, version)
        });
        numbered.collect()
    })
}

fn replay<'a>(history: impl IntoIterator<Item = &'a (Vec<u8>, Vec<u8>, u64)>) -> Cluster {
    let mut cluster = Cluster::new();
    for (key, value, version) in history {
        cluster.apply(key, value, *version).unwrap();
    }
    cluster
}

proptest! {
    #[test]
    fn a_copy_brought_up_to_date_by_deltas_is_the_whole(history in history(), stops in vec(0_usize..41, 0..5)) {
        let whole = replay(&history);
        let mut copy = Cluster::new();
        let mut stops = stops;
        stops.sort_unstable();
        stops.push(history.len());
        for stop in stops {
            let source = replay(&history[..stop.min(history.len())]);
            let known: Vec<RecordKey> = source
                .delta(copy.version())
                .filter_map(|(key, _, _)| parse_key(key).ok())
                .collect();
            let delta = source.encode_delta(copy.version());
            prop_assert_eq!(copy.apply_delta(&delta), Ok(known));
            prop_assert_eq!(&copy, &source);
            prop_assert_eq!(copy.apply_delta(&delta), Ok(Vec::new()), "twice is once");
        }
        prop_assert_eq!(&copy, &whole);
        prop_assert_eq!(Cluster::decode(&whole.encode()), Ok(whole));
    }

    #[test]
    fn the_epoch_never_falls_and_depends_on_the_records_alone(history in history()) {
        let mut cluster = Cluster::new();
        for (key, value, version) in &history {
            let before = cluster.epoch();
            let changed = cluster.apply(key, value, *version).unwrap();
            let routing = matches!(changed, Changed::Record(of) if of != RecordKey::Controller);
            prop_assert!(cluster.epoch() >= before);
            prop_assert_eq!(cluster.epoch() == epoch_of(*version) || !routing, true);
            prop_assert_eq!(cluster.version(), *version);
        }
        prop_assert_eq!(Cluster::decode(&cluster.encode()).unwrap().epoch(), cluster.epoch());
    }

    #[test]
    fn older_versions_are_passed_over(history in history()) {
        let whole = replay(&history);
        let mut again = whole.clone();
        for (key, value, version) in history.iter().rev() {
            prop_assert_eq!(again.apply(key, value, *version), Ok(Changed::Nothing));
        }
        prop_assert_eq!(again, whole);
    }

    #[test]
    fn a_message_cut_or_flipped_is_an_error(history in history(), bit in any::<prop::sample::Index>()) {
        let message = replay(&history).encode();
        for len in 0..message.len() {
            prop_assert!(Cluster::decode(&message[..len]).is_err());
        }
        let mut flipped = message.clone();
        let bit = bit.index(message.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Cluster::decode(&flipped).is_err());
    }

    #[test]
    fn a_message_with_the_right_checksum_is_still_looked_at(
        history in history(),
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut message = replay(&history).encode();
        message.truncate(message.len() - 4);
        let place = place.index(message.len());
        message[place] = byte;
        let checksum = crc32c::crc32c(&message);
        message.extend(checksum.to_le_bytes());
        if let Ok(cluster) = Cluster::decode(&message) {
            prop_assert_eq!(cluster.encode(), message);
        }
    }
}

fn founded() -> Cluster {
    let mut cluster = Cluster::new();
    let config = Config::new("test", 7, 2, 3);
    let records = [
        Record::Config(config),
        Record::Node(Node::new(1, "127.0.0.1:7400".parse().unwrap(), "", 1, 1)),
        Record::Shard(Shard::new(0, 1, [1])),
        Record::Shard(Shard::new(1, 1, [1])),
        Record::Controller(Controller::new([1])),
    ];
    for (place, record) in (0_u16..).zip(records) {
        let version = Version::new(4, place).get();
        cluster
            .apply(&key_of(record.key()), &record.encode().unwrap(), version)
            .unwrap();
    }
    cluster
}

#[test]
fn what_is_wrong_with_an_entry_is_said_and_changes_nothing() {
    let cluster = founded();
    let mut copy = cluster.clone();
    let foreign = Config::new("test", 8, 2, 3).encode().unwrap();
    let version = 5 << 16;
    assert_eq!(
        copy.apply(b"config", &foreign, version),
        Err(ApplyError::Foreign { own: 7, found: 8 })
    );
    assert!(matches!(
        copy.apply(b"node/01", b"", version),
        Err(ApplyError::Key { .. })
    ));
    assert!(matches!(
        copy.apply(b"node/1", b"\x02", version),
        Err(ApplyError::Record { .. })
    ));
    assert_eq!(
        copy.apply(b"other", &vec![0; MAX_VALUE_BYTES + 1], version),
        Err(ApplyError::TooLong)
    );
    assert_eq!(copy, cluster);
}

#[test]
fn a_delta_is_taken_whole_or_not_at_all_and_never_over_a_gap() {
    let cluster = founded();
    let mut newer = cluster.clone();
    let mut node = newer.node(1).unwrap().clone();
    node.state = NodeState::Draining;
    newer.apply(b"node/1", &node.encode().unwrap(), 9 << 16).unwrap();
    let mut empty = Cluster::new();
    let delta = newer.encode_delta(cluster.version());
    assert_eq!(
        empty.apply_delta(&delta),
        Err(DeltaError::Gap {
            since: cluster.version(),
            own: 0
        })
    );
    assert_eq!(empty, Cluster::new());
    let mut copy = cluster;
    assert_eq!(copy.apply_delta(&delta), Ok(vec![RecordKey::Node(1)]));
    assert_eq!(copy, newer);
    assert_eq!(copy.epoch(), 9);
    assert_eq!(copy.version_of(RecordKey::Node(1)), 9 << 16);
    assert_eq!(copy.version_of(RecordKey::Node(2)), 0);
}

#[test]
fn a_change_of_group_0_begins_no_epoch() {
    let mut cluster = founded();
    assert_eq!(cluster.epoch(), 4);
    let controller = Controller::new([1, 2]).encode().unwrap();
    cluster.apply(b"controller", &controller, 9 << 16).unwrap();
    assert_eq!(cluster.epoch(), 4);
    assert_eq!(cluster.version(), 9 << 16);
}
