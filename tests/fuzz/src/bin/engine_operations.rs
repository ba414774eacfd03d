//! A shard under arbitrary sequences of operations agrees with a map, and is valid after every one of them.
#![no_main]

use std::collections::BTreeMap;

use generation_engine::{Command, Condition, Cursor, Outcome, Policy, Progress, Shard, ShardConfig, Version, Victim};
use libfuzzer_sys::fuzz_target;

/// What the map holds of an entry: value, version, expiry.
type Record = (Vec<u8>, Version, u64);

fuzz_target!(|data: &[u8]| {
    let Some((&[setup, budget], operations)) = data.split_first_chunk::<2>() else {
        return;
    };
    let policy = [Policy::Lru, Policy::S3Fifo, Policy::NoEvict][usize::from(setup % 3)];
    let config = ShardConfig {
        budget_bytes: 200 + u64::from(budget) * 400,
        max_records: (setup & 8 != 0).then_some(1 + u64::from(setup >> 4)),
        policy,
        max_value_bytes: 10_000,
        ..ShardConfig::default()
    };
    // Good hashes, few different ones, and only one.
    let mask = [u64::MAX, 0xff << 56, 3, 0][usize::from(setup >> 6)];
    let mut shard = Shard::with_hash_mask(config, mask);
    let mut map: BTreeMap<Vec<u8>, Record> = BTreeMap::new();
    let mut image: Option<BTreeMap<Vec<u8>, Record>> = None;
    let mut index = 0;
    for operation in operations.chunks_exact(4).take(400) {
        let [kind, number, size, extra] = [operation[0], operation[1], operation[2], operation[3]];
        let key = vec![number; 1 + usize::from(number % 8) * usize::from(number % 5) * 9];
        let len = usize::from(size) * [1, 1, 7, 39][usize::from(extra % 4)];
        let time_ms = shard.shard_time_ms() + u64::from(kind >> 6);
        let expires_at_ms = if extra & 16 == 0 {
            0
        } else {
            time_ms + u64::from(size % 8)
        };
        index += 1;
        shard.begin(index, time_ms);
        let now = shard.shard_time_ms();
        let present = map.get(&key).filter(|record| record.2 == 0 || record.2 > now).cloned();
        match kind % 10 {
            0..4 => {
                let mut victims = Vec::new();
                if extra & 32 != 0 {
                    shard.propose_victims(shard.cost(key.len(), len), 1, &mut victims);
                }
                for Victim { hash, version } in victims {
                    assert!(matches!(
                        shard.apply(&Command::Evict { hash, version }),
                        Outcome::Applied { .. }
                    ));
                    let before = map.len();
                    map.retain(|_, record| record.1 != version);
                    assert_eq!(map.len() + 1, before, "a victim is an entry");
                }
                let value = vec![extra; len];
                let condition = if extra & 64 != 0 {
                    Condition::IfAbsent
                } else {
                    Condition::None
                };
                let present = map.get(&key).filter(|record| record.2 == 0 || record.2 > now);
                let current = present.map_or(Version::ABSENT, |record| record.1);
                let outcome = shard.apply(&Command::Put {
                    key: &key,
                    value: &value,
                    expires_at_ms,
                    condition,
                });
                match outcome {
                    Outcome::Applied { version } => {
                        assert!(condition == Condition::None || current.is_absent());
                        map.insert(key, (value, version, expires_at_ms));
                    }
                    Outcome::ConditionFailed { current: told } => {
                        assert!(told == current && !current.is_absent() && condition == Condition::IfAbsent);
                    }
                    // What has expired is removed before the write is refused.
                    Outcome::OutOfMemory if current.is_absent() => drop(map.remove(&key)),
                    Outcome::OutOfMemory => {}
                    other => panic!("a put answered {other:?}"),
                }
            }
            4 => {
                let outcome = shard.apply(&Command::Delete {
                    key: &key,
                    condition: Condition::None,
                });
                assert_eq!(matches!(outcome, Outcome::Applied { .. }), present.is_some());
                map.remove(&key);
            }
            5 => {
                let outcome = shard.apply(&Command::Touch {
                    key: &key,
                    expires_at_ms,
                });
                match (outcome, present) {
                    (Outcome::Applied { version }, Some((value, ..))) => {
                        map.insert(key, (value, version, expires_at_ms));
                    }
                    (Outcome::NotFound, None) => drop(map.remove(&key)),
                    (outcome, present) => panic!("a touch of {present:?} answered {outcome:?}"),
                }
            }
            6 => {
                let keys = [key.clone(), vec![size], key.clone(), vec![extra], vec![number]];
                let mut seen = 0;
                shard.get_batch(&keys, |at, entry| {
                    assert_eq!(at, seen);
                    seen += 1;
                    let expected = map.get(&keys[at]).filter(|record| record.2 == 0 || record.2 > now);
                    let found = entry.map(|entry| (entry.value.to_vec(), entry.version, entry.expires_at_ms));
                    assert_eq!(found.as_ref(), expected);
                });
                assert_eq!(seen, keys.len());
            }
            7 => {
                let mut expired = Vec::new();
                shard.propose_expired(now, usize::from(size), &mut expired);
                for Victim { hash, version } in expired {
                    assert!(matches!(
                        shard.apply(&Command::Expire { hash, version }),
                        Outcome::Applied { .. }
                    ));
                    map.retain(|_, record| record.1 != version || record.2 == 0 || record.2 > now);
                }
                if extra & 32 != 0 {
                    shard.forget_proposals();
                }
            }
            8 => {
                if image.is_none() && shard.snapshot_begin().is_ok() {
                    image = Some(map.clone());
                }
                let progress = shard.snapshot_slice(usize::from(size), |entry| {
                    let expected = image.as_mut().and_then(|image| image.remove(entry.key));
                    assert_eq!(
                        expected,
                        Some((entry.value.to_vec(), entry.version, entry.expires_at_ms))
                    );
                });
                if progress == Progress::Done {
                    assert_eq!(
                        image.take().map_or(0, |image| image.len()),
                        0,
                        "the snapshot missed entries"
                    );
                }
                if extra & 64 != 0 {
                    shard.snapshot_abandon();
                    image = None;
                }
            }
            _ => {
                let mut scanned = BTreeMap::new();
                let mut cursor = Some(Cursor::START);
                while let Some(at) = cursor {
                    cursor = shard.scan(at, b"", 1 + usize::from(size), 5_000, 1, |key, entry| {
                        let record = (entry.value.to_vec(), entry.version, entry.expires_at_ms);
                        assert!(scanned.insert(key.to_vec(), record).is_none(), "returned twice");
                    });
                }
                let live = map.iter().filter(|(_, record)| record.2 == 0 || record.2 > now);
                assert!(scanned.iter().eq(live), "a scan differs");
                if extra & 64 != 0 {
                    shard.set_budget(200 + u64::from(size) * 100, None);
                }
            }
        }
        shard.check();
        assert_eq!(shard.stats().records, map.len() as u64);
    }
});
