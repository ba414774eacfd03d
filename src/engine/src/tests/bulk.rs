//! Many entries: splits and joins of the index, migration between pages, huge swings of size, and memory given back.

use std::collections::BTreeMap;

use crate::{Command, Condition, Cursor, Outcome, Policy, Progress, Shard, ShardConfig, Victim};

/// A small generator with a fixed sequence (Steele et al., `SplitMix`, OOPSLA '14).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Spread over a factor of ten around `median`.
    fn size(&mut self, median: u64) -> usize {
        let spread = [1, 2, 2, 3, 3, 3, 4, 4, 5, 10][self.below(10) as usize];
        (median * spread / 3 + self.below(median / 4 + 1)) as usize
    }
}

/// A leader without replicas: every write is preceded by the victims it needs.
struct Leader {
    shard: Shard,
    index: u64,
    victims: Vec<Victim>,
}

impl Leader {
    fn new(config: ShardConfig) -> Self {
        Self {
            shard: Shard::new(config),
            index: 0,
            victims: Vec::new(),
        }
    }

    fn put(&mut self, key: &[u8], value: &[u8], expires_at_ms: u64) -> Outcome {
        self.index += 1;
        self.shard.begin(self.index, 0);
        let cost = self.shard.cost(key.len(), value.len());
        self.shard.propose_victims(cost, 1, &mut self.victims);
        for Victim { hash, version } in self.victims.drain(..) {
            let outcome = self.shard.apply(&Command::Evict { hash, version });
            assert!(matches!(outcome, Outcome::Applied { .. }));
        }
        self.shard.apply(&Command::Put {
            key,
            value,
            expires_at_ms,
            condition: Condition::None,
        })
    }

    fn delete(&mut self, key: &[u8]) -> Outcome {
        self.index += 1;
        self.shard.begin(self.index, 0);
        self.shard.apply(&Command::Delete {
            key,
            condition: Condition::None,
        })
    }
}

/// Fill, churn with changing sizes, empty: against a map, with the whole state validated on the way.
#[test]
fn grows_and_shrinks() {
    for policy in [Policy::NoEvict, Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::new(ShardConfig {
            budget_bytes: 1 << 40,
            policy,
            ..ShardConfig::default()
        });
        let mut map = BTreeMap::new();
        let mut random = Random(7);
        let full = if cfg!(miri) { 200 } else { 12_000 };
        for (phase, median) in [(0, 40), (1, 400), (2, 20), (3, 3_000), (4, 10)] {
            for step in 0..full {
                let key = random.below(full).to_le_bytes();
                if random.below(10) < [1, 1, 2, 9, 2][phase] {
                    let outcome = leader.delete(&key);
                    let removed = map.remove(&key).is_some();
                    assert_eq!(matches!(outcome, Outcome::Applied { .. }), removed);
                } else {
                    let value = vec![step as u8; random.size(median)];
                    let expires_at_ms = random.below(2) * 1_000;
                    assert!(matches!(
                        leader.put(&key, &value, expires_at_ms),
                        Outcome::Applied { .. }
                    ));
                    map.insert(key, value);
                }
            }
            leader.shard.check();
            assert_eq!(leader.shard.stats().records, map.len() as u64);
            let mut cursor = Some(Cursor::START);
            let mut scanned = BTreeMap::new();
            while let Some(at) = cursor {
                cursor = leader.shard.scan(at, b"", 100, usize::MAX, usize::MAX, |key, entry| {
                    let key: [u8; 8] = key.try_into().expect("a key of this test");
                    assert!(
                        scanned.insert(key, entry.value.to_vec()).is_none(),
                        "an idle scan returns nothing twice"
                    );
                });
            }
            assert!(scanned == map, "a scan differs from the reference");
        }
        while let Some((key, _)) = map.pop_first() {
            leader.delete(&key);
        }
        leader.shard.check();
        let stats = leader.shard.stats();
        assert_eq!((stats.records, stats.used_bytes), (0, 0));
        assert!(
            stats.resident_bytes < 5 << 20,
            "{} bytes are held for nothing",
            stats.resident_bytes
        );
    }
}

/// Sizes drift under a fixed budget; memory stays near it, and no cost is lost or gained.
#[test]
fn memory_follows_the_budget_while_sizes_drift() {
    let budget_bytes = 24 << 20;
    for policy in [Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::new(ShardConfig {
            budget_bytes,
            policy,
            ..ShardConfig::default()
        });
        let mut random = Random(11);
        let mut value = vec![0; 100_000];
        random
            .next()
            .to_le_bytes()
            .iter()
            .zip(&mut value)
            .for_each(|(from, to)| *to = *from);
        let mut worst = 0;
        for median in [100, 300, 60, 1_000, 100] {
            let steps = 3 * budget_bytes / (median + 80);
            for step in 0..steps {
                let key = random.below(1 << 40).to_le_bytes();
                let len = random.size(median);
                assert!(matches!(leader.put(&key, &value[..len], 0), Outcome::Applied { .. }));
                if step % 256 == 0 {
                    let stats = leader.shard.stats();
                    assert!(stats.used_bytes <= budget_bytes);
                    worst = worst.max(stats.resident_bytes);
                }
            }
            leader.shard.check();
        }
        assert!(
            worst <= budget_bytes * 5 / 4,
            "{policy:?}: {worst} bytes resident for a budget of {budget_bytes}"
        );

        // A budget cut to a quarter gives memory back, to the system.
        leader.shard.set_budget(budget_bytes / 4, None);
        for _ in 0..20_000 {
            assert!(matches!(leader.put(b"one more", b"", 0), Outcome::Applied { .. }));
        }
        leader.shard.check();
        let stats = leader.shard.stats();
        assert!(stats.used_bytes <= budget_bytes / 4);
        assert!(
            stats.resident_bytes <= budget_bytes / 2,
            "{policy:?}: {} bytes resident after the cut",
            stats.resident_bytes
        );
    }
}

/// Very many entries come due at once: each call does a bounded part of them, and a full round finds every one.
#[test]
fn expiry_of_everything_at_once_is_bounded_per_call() {
    let mut leader = Leader::new(ShardConfig {
        budget_bytes: 1 << 40,
        ..ShardConfig::default()
    });
    let entries = 20_000u64;
    for key in 0..entries {
        let expires_at_ms = if key % 4 == 0 { 0 } else { 5_000 };
        leader.put(&key.to_le_bytes(), b"value", expires_at_ms);
    }
    let mut expired = Vec::new();
    assert_eq!(
        leader.shard.propose_expired(4_999, usize::MAX, &mut expired),
        Progress::Done
    );
    assert_eq!(expired.len(), 0);
    let mut calls = 0;
    loop {
        let before = expired.len();
        let progress = leader.shard.propose_expired(5_000, 500, &mut expired);
        assert!(
            expired.len() - before <= 500 + 256,
            "a call found {}",
            expired.len() - before
        );
        calls += 1;
        if progress == Progress::Done {
            break;
        }
    }
    assert!(calls > 20);
    assert_eq!(expired.len() as u64, entries / 4 * 3);
    // Shard time decides what is served, removed or not.
    leader.shard.begin(leader.index + 1, 5_000);
    leader.index += 1;
    assert!(leader.shard.get(&1u64.to_le_bytes()).is_none());
    assert!(leader.shard.get(&4u64.to_le_bytes()).is_some());
    for victim in expired.chunks(1_000) {
        leader.index += 1;
        leader.shard.begin(leader.index, 5_000);
        for &Victim { hash, version } in victim {
            let outcome = leader.shard.apply(&Command::Expire { hash, version });
            assert!(matches!(outcome, Outcome::Applied { .. }));
        }
    }
    leader.shard.check();
    assert_eq!(leader.shard.stats().records, entries / 4);
}

/// A snapshot taken in small slices while everything changes is the state at its beginning.
#[test]
fn a_snapshot_is_a_point_in_time() {
    let entries = if cfg!(miri) { 100u64 } else { 5_000 };
    let mut leader = Leader::new(ShardConfig {
        budget_bytes: 1 << 40,
        ..ShardConfig::default()
    });
    let mut random = Random(3);
    for key in 0..entries {
        let value = vec![key as u8; random.size(200)];
        leader.put(&key.to_le_bytes(), &value, 0);
    }
    for round in 0..3 {
        let mut image = BTreeMap::new();
        let mut cursor = Some(Cursor::START);
        while let Some(at) = cursor {
            cursor = leader
                .shard
                .scan(at, b"", usize::MAX, usize::MAX, usize::MAX, |key, entry| {
                    image.insert(key.to_vec(), (entry.value.to_vec(), entry.version));
                });
        }
        let head = leader.shard.snapshot_begin().expect("none is under way");
        assert_eq!(head.records, image.len() as u64);
        assert!(leader.shard.snapshot_begin().is_err());
        loop {
            for _ in 0..random.below(300) {
                let key = random.below(entries * 2).to_le_bytes();
                if random.below(3) == 0 {
                    leader.delete(&key);
                } else {
                    let value = vec![round; random.size(if round == 1 { 30 } else { 500 })];
                    leader.put(&key, &value, 0);
                }
            }
            let progress = leader.shard.snapshot_slice(64, |entry| {
                let expected = image.remove(entry.key).expect("an entry of the image, once");
                assert_eq!((entry.value, entry.version), (expected.0.as_slice(), expected.1));
            });
            if progress == Progress::Done {
                break;
            }
        }
        assert!(image.is_empty(), "{} entries are missing", image.len());
        assert_eq!(leader.shard.stats().snapshot_bytes, 0);
        leader.shard.check();
    }
}

/// A shard restored from a snapshot is the same replicated state, and gives up much the same entries first.
#[test]
fn a_restored_shard_is_the_same_state() {
    for policy in [Policy::Lru, Policy::S3Fifo, Policy::NoEvict] {
        let config = ShardConfig {
            budget_bytes: 1 << 40,
            policy,
            ..ShardConfig::default()
        };
        let mut leader = Leader::new(config);
        let mut random = Random(3);
        let entries = 4_000u64;
        for key in 0..entries {
            let value = vec![key as u8; random.size(200)];
            leader.put(&key.to_le_bytes(), &value, random.below(2) * 99);
        }
        // A hot tenth.
        for _ in 0..entries {
            leader.shard.get(&random.below(entries / 10).to_le_bytes());
        }
        let head = leader.shard.snapshot_begin().expect("none is under way");
        let mut restore = Shard::restore(config, head);
        let mut first: Option<Vec<u8>> = None;
        while leader.shard.snapshot_slice(100, |entry| {
            assert_eq!(restore.push(&entry), Ok(()));
            first.get_or_insert_with(|| entry.key.to_vec());
        }) == Progress::More
        {}
        let mut restored = restore.finish().expect("a complete snapshot");
        restored.check();
        assert_eq!(restored.state_hash(), leader.shard.state_hash());
        assert_eq!(restored.applied_index(), leader.shard.applied_index());
        if policy != Policy::NoEvict {
            let mut victims = Vec::new();
            restored.set_budget(restored.stats().used_bytes / 2, None);
            restored.propose_victims(0, 0, &mut victims);
            let hot: Vec<u64> = (0..entries / 10).map(|key| restored.hash(&key.to_le_bytes())).collect();
            let lost = victims.iter().filter(|victim| hot.contains(&victim.hash)).count();
            assert!(
                lost * 20 < hot.len(),
                "{policy:?}: {lost} of {} hot entries are given up first",
                hot.len()
            );
        }

        // What does not add up is refused.
        let key = first.expect("entries");
        let entry = |key| crate::SnapshotEntry {
            key,
            value: b"",
            version: crate::Version::new(1, 0),
            expires_at_ms: 0,
            recency: 9,
        };
        let mut restore = Shard::restore(config, head);
        assert_eq!(restore.push(&entry(&key)), Ok(()));
        assert_eq!(restore.push(&entry(&key)), Err(crate::RestoreError::Duplicate));
        assert_eq!(restore.push(&entry(b"")), Err(crate::RestoreError::Entry));
        assert!(matches!(restore.finish(), Err(crate::RestoreError::Mismatch)));
    }
}

/// The limits of sizes, and one more.
#[test]
fn extreme_sizes() {
    let mut leader = Leader::new(ShardConfig {
        budget_bytes: 1 << 30,
        ..ShardConfig::default()
    });
    let longest_key = vec![7; crate::MAX_KEY_BYTES];
    let longest_value = vec![9; 8 << 20];
    assert!(matches!(
        leader.put(&longest_key, &longest_value, 1),
        Outcome::Applied { .. }
    ));
    assert!(matches!(leader.put(b"k", b"", 0), Outcome::Applied { .. }));
    assert!(matches!(leader.put(b"l", &longest_value, 0), Outcome::Applied { .. }));
    assert_eq!(leader.put(b"", b"", 0), Outcome::InvalidSize);
    assert_eq!(
        leader.put(&vec![7; crate::MAX_KEY_BYTES + 1], b"", 0),
        Outcome::InvalidSize
    );
    assert_eq!(leader.put(b"k", &vec![9; (8 << 20) + 1], 0), Outcome::InvalidSize);
    assert_eq!(
        leader.shard.peek(&longest_key).map(|entry| entry.value.len()),
        Some(8 << 20)
    );
    assert!(
        leader
            .shard
            .peek(b"l")
            .is_some_and(|entry| entry.value == longest_value)
    );
    assert_eq!(leader.shard.peek(b"k").map(|entry| entry.value.len()), Some(0));
    leader.shard.check();
    // Around the largest slot, back and forth, with and without an expiry.
    for len in (8_100..8_200).chain((8_100..8_200).rev()) {
        for expires_at_ms in [0, u64::MAX] {
            assert!(matches!(
                leader.put(b"k", &longest_value[..len], expires_at_ms),
                Outcome::Applied { .. }
            ));
            leader.index += 1;
            leader.shard.begin(leader.index, 0);
            leader.shard.apply(&Command::Touch {
                key: b"k",
                expires_at_ms: 7 - expires_at_ms.min(7),
            });
            assert!(
                leader
                    .shard
                    .peek(b"k")
                    .is_some_and(|entry| entry.value == &longest_value[..len])
            );
        }
    }
    leader.shard.check();
}
