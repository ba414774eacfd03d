//! Sequences of operations on a shard and on the reference, compared after every step.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::model::{Model, Record};
use crate::{Command, Condition, Cursor, Outcome, Policy, Progress, Shard, ShardConfig, SnapshotBusy, Version, Victim};

/// An operation, with keys by number and sizes that mean something to the layouts.
#[derive(Debug, Clone)]
enum Op {
    Put {
        key: u8,
        len: usize,
        ttl_ms: u64,
        condition: Check,
    },
    Number {
        key: u8,
        value: i64,
    },
    Delete {
        key: u8,
        condition: Check,
    },
    Incr {
        key: u8,
        delta: i64,
    },
    Touch {
        key: u8,
        ttl_ms: u64,
    },
    Get {
        key: u8,
    },
    GetBatch {
        keys: Vec<u8>,
    },
    Peek {
        key: u8,
    },
    /// Puts (of a length) and deletes, in one log entry.
    ApplyBatch {
        commands: Vec<(u8, Option<usize>)>,
    },
    Tidy,
    Advance {
        ms: u64,
    },
    /// Proposes victims; applies all but every `skip`th of them.
    Evict {
        bytes: u64,
        records: u64,
        skip: usize,
    },
    Expire {
        ahead_ms: u64,
        work: usize,
    },
    ForgetProposals,
    SnapshotBegin,
    SnapshotSlice {
        records: usize,
    },
    SnapshotAbandon,
    ScanStep {
        entries: usize,
        bytes: usize,
    },
    SetBudget {
        bytes: u64,
        records: Option<u64>,
    },
}

#[derive(Debug, Clone, Copy)]
enum Check {
    None,
    IfAbsent,
    IfCurrent,
    IfOther,
}

fn check() -> impl Strategy<Value = Check> {
    prop_oneof![6 => Just(Check::None), 1 => Just(Check::IfAbsent), 1 => Just(Check::IfCurrent), 1 => Just(Check::IfOther)]
}

fn value_len() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..64usize, 8 => 64..400usize, 2 => 400..5_000usize, 1 => 5_000..40_000usize, 1 => 8_000..8_400usize]
}

fn ttl() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0u64), 2 => 1..200u64]
}

fn op() -> impl Strategy<Value = Op> {
    let key = any::<u8>();
    prop_oneof![
        12 => (key, value_len(), ttl(), check())
            .prop_map(|(key, len, ttl_ms, condition)| Op::Put { key, len, ttl_ms, condition }),
        2 => (key, prop_oneof![any::<i64>(), -5..5i64]).prop_map(|(key, value)| Op::Number { key, value }),
        4 => (key, check()).prop_map(|(key, condition)| Op::Delete { key, condition }),
        2 => (key, prop_oneof![any::<i64>(), -5..5i64]).prop_map(|(key, delta)| Op::Incr { key, delta }),
        2 => (key, ttl()).prop_map(|(key, ttl_ms)| Op::Touch { key, ttl_ms }),
        6 => key.prop_map(|key| Op::Get { key }),
        2 => prop::collection::vec(key, 0..160).prop_map(|keys| Op::GetBatch { keys }),
        1 => key.prop_map(|key| Op::Peek { key }),
        2 => prop::collection::vec((key, prop::option::weighted(0.8, value_len())), 0..40)
            .prop_map(|commands| Op::ApplyBatch { commands }),
        1 => Just(Op::Tidy),
        1 => (0..100u64).prop_map(|ms| Op::Advance { ms }),
        3 => (0..3_000u64, 0..4u64, 1..6usize).prop_map(|(bytes, records, skip)| Op::Evict { bytes, records, skip }),
        2 => (0..50u64, 1..80usize).prop_map(|(ahead_ms, work)| Op::Expire { ahead_ms, work }),
        1 => Just(Op::ForgetProposals),
        2 => Just(Op::SnapshotBegin),
        2 => (1..40usize).prop_map(|records| Op::SnapshotSlice { records }),
        1 => Just(Op::SnapshotAbandon),
        4 => (1..20usize, 1..2_000usize).prop_map(|(entries, bytes)| Op::ScanStep { entries, bytes }),
        1 => (prop_oneof![500..3_000u64, 3_000..200_000u64], prop::option::of(1..60u64))
            .prop_map(|(bytes, records)| Op::SetBudget { bytes, records }),
    ]
}

fn key_bytes(key: u8) -> Vec<u8> {
    match key % 16 {
        15 => vec![key; 300 + key as usize],
        n => [b"k".as_slice(), &vec![key; n as usize]].concat(),
    }
}

/// A shard, its reference, and a scan in progress.
struct Pair {
    shard: Shard,
    model: Model,
    index: u64,
    salt: u8,
    cursor: Cursor,
    /// Keys present since the scan began, and keys it has returned.
    expected: BTreeSet<Vec<u8>>,
    seen: BTreeSet<Vec<u8>>,
    /// What the snapshot under way must contain, less what it has returned; `None` if none is.
    image: Option<BTreeMap<Vec<u8>, Record>>,
    /// A snapshot was given up and may not have been walked to its end.
    abandoned: bool,
}

impl Pair {
    fn new(config: ShardConfig, mask: u64) -> Self {
        Self {
            shard: Shard::with_hash_mask(config, mask),
            model: Model {
                budget_bytes: config.budget_bytes,
                max_records: config.max_records,
                policy: config.policy,
                max_value_bytes: config.max_value_bytes,
                ..Model::default()
            },
            index: 0,
            salt: 0,
            cursor: Cursor::START,
            expected: BTreeSet::new(),
            seen: BTreeSet::new(),
            image: None,
            abandoned: false,
        }
    }

    fn begin(&mut self, ms: u64) {
        self.index += 1;
        let time = self.model.time_ms + ms;
        self.shard.begin(self.index, time);
        self.model.begin(self.index, time);
    }

    fn apply(&mut self, command: &Command<'_>) -> Outcome {
        self.begin(0);
        let model = self.model.apply(command, |key| self.shard.hash(key));
        let shard = self.shard.apply(command);
        assert_eq!(shard, model, "{command:?}");
        let model = &self.model;
        self.expected.retain(|key| model.live(key).is_some());
        shard
    }

    fn condition(&self, check: Check, key: &[u8]) -> Condition {
        let current = self.model.live(key).map_or(Version::ABSENT, |record| record.version);
        match check {
            Check::None => Condition::None,
            Check::IfAbsent => Condition::IfAbsent,
            Check::IfCurrent => Condition::IfVersion(current),
            Check::IfOther => Condition::IfVersion(Version::from(current.get() + 1)),
        }
    }

    #[allow(clippy::too_many_lines, reason = "one arm per operation")]
    fn run(&mut self, op: &Op) {
        match *op {
            Op::Put {
                key,
                len,
                ttl_ms,
                condition,
            } => {
                let key = key_bytes(key);
                self.salt = self.salt.wrapping_add(1);
                let value = vec![self.salt; len];
                let expires_at_ms = if ttl_ms == 0 { 0 } else { self.model.time_ms + ttl_ms };
                let condition = self.condition(condition, &key);
                self.apply(&Command::Put {
                    key: &key,
                    value: &value,
                    expires_at_ms,
                    condition,
                });
            }
            Op::Number { key, value } => {
                let value = value.to_string();
                let value = value.as_bytes();
                self.apply(&Command::Put {
                    key: &key_bytes(key),
                    value,
                    expires_at_ms: 0,
                    condition: Condition::None,
                });
            }
            Op::Delete { key, condition } => {
                let key = key_bytes(key);
                let condition = self.condition(condition, &key);
                self.apply(&Command::Delete { key: &key, condition });
            }
            Op::Incr { key, delta } => {
                self.apply(&Command::Incr {
                    key: &key_bytes(key),
                    delta,
                });
            }
            Op::Touch { key, ttl_ms } => {
                let expires_at_ms = if ttl_ms == 0 { 0 } else { self.model.time_ms + ttl_ms };
                self.apply(&Command::Touch {
                    key: &key_bytes(key),
                    expires_at_ms,
                });
            }
            Op::Get { key } => {
                let key = key_bytes(key);
                let got = self
                    .shard
                    .get(&key)
                    .map(|entry| (entry.value.to_vec(), entry.version, entry.expires_at_ms));
                self.compare(&key, got.as_ref());
                if self.model.live(&key).is_some() {
                    self.model.touch(&key);
                }
            }
            Op::GetBatch { ref keys } => {
                let keys: Vec<_> = keys.iter().map(|&key| key_bytes(key)).collect();
                let mut got = Vec::new();
                self.shard.get_batch(&keys, |position, entry| {
                    assert_eq!(position, got.len());
                    got.push(entry.map(|entry| (entry.value.to_vec(), entry.version, entry.expires_at_ms)));
                });
                assert_eq!(got.len(), keys.len());
                for (key, got) in keys.iter().zip(got) {
                    self.compare(key, got.as_ref());
                    if self.model.live(key).is_some() {
                        self.model.touch(key);
                    }
                }
            }
            Op::Peek { key } => {
                let key = key_bytes(key);
                let got = self
                    .shard
                    .peek(&key)
                    .map(|entry| (entry.value.to_vec(), entry.version, entry.expires_at_ms));
                self.compare(&key, got.as_ref());
            }
            Op::Advance { ms } => {
                self.begin(ms);
                let model = &self.model;
                self.expected.retain(|key| model.live(key).is_some());
            }
            Op::Evict { bytes, records, skip } => {
                let mut victims = Vec::new();
                self.shard.propose_victims(bytes, records, &mut victims);
                if self.model.policy != Policy::S3Fifo {
                    let expected = self.model.victims(bytes, records);
                    let named: Vec<_> = expected.iter().map(|key| self.name(key)).collect();
                    assert_eq!(victims, named, "victims are not the least recently used");
                }
                self.remove_offered(&victims, skip, |victim| Command::Evict {
                    hash: victim.hash,
                    version: victim.version,
                });
            }
            Op::Expire { ahead_ms, work } => {
                let now_ms = self.model.time_ms + ahead_ms;
                let mut expired = Vec::new();
                self.shard.propose_expired(now_ms, work, &mut expired);
                for &victim in &expired {
                    let expires_at_ms = self.mark_offered(victim);
                    assert!(expires_at_ms != 0 && expires_at_ms <= now_ms, "offered before its time");
                }
                self.begin(ahead_ms);
                let model = &self.model;
                self.expected.retain(|key| model.live(key).is_some());
                for victim in expired {
                    let command = Command::Expire {
                        hash: victim.hash,
                        version: victim.version,
                    };
                    assert!(matches!(self.apply(&command), Outcome::Applied { .. }));
                }
            }
            Op::ForgetProposals => {
                self.shard.forget_proposals();
                self.model.forget_offers();
            }
            Op::SnapshotBegin => {
                let begun = self.shard.snapshot_begin();
                if self.image.is_some() {
                    assert_eq!(begun, Err(SnapshotBusy));
                } else if let Ok(head) = begun {
                    assert_eq!(
                        (head.index, head.records),
                        (self.index, self.model.records.len() as u64)
                    );
                    assert_eq!(head.state_hash, self.shard.state_hash());
                    self.image = Some(self.model.records.clone());
                    self.abandoned = false;
                } else {
                    assert!(self.abandoned, "nothing is under way");
                }
            }
            Op::SnapshotSlice { records } => {
                let image = &mut self.image;
                let progress = self.shard.snapshot_slice(records, |entry| {
                    let image = image.as_mut().expect("only a snapshot under way returns entries");
                    let record = image.remove(entry.key).expect("an entry of the image, once");
                    assert_eq!(entry.value, record.value);
                    assert_eq!(
                        (entry.version, entry.expires_at_ms),
                        (record.version, record.expires_at_ms)
                    );
                });
                if progress == Progress::Done {
                    assert_eq!(
                        self.image.take().unwrap_or_default().len(),
                        0,
                        "the snapshot missed entries"
                    );
                    self.abandoned = false;
                }
            }
            Op::SnapshotAbandon => {
                self.shard.snapshot_abandon();
                self.abandoned |= self.image.take().is_some();
            }
            Op::ApplyBatch { ref commands } => self.apply_batch(commands),
            Op::Tidy => {
                self.shard.tidy();
            }
            Op::ScanStep { entries, bytes } => self.scan_step(entries, bytes),
            Op::SetBudget { bytes, records } => {
                self.shard.set_budget(bytes, records);
                self.model.budget_bytes = bytes;
                self.model.max_records = records;
                self.model.tolerated = (self.model.used_bytes(), self.model.records.len() as u64);
            }
        }
        self.shard.check();
        let stats = self.shard.stats();
        assert_eq!(stats.used_bytes, self.model.used_bytes());
        assert_eq!(stats.records, self.model.records.len() as u64);
        assert_eq!(
            stats.offered,
            self.model.records.values().filter(|record| record.offered).count() as u64
        );
    }

    fn apply_batch(&mut self, commands: &[(u8, Option<usize>)]) {
        self.begin(0);
        self.salt = self.salt.wrapping_add(1);
        let value = vec![self.salt; commands.iter().filter_map(|&(_, len)| len).max().unwrap_or(0)];
        let keys: Vec<_> = commands.iter().map(|&(key, _)| key_bytes(key)).collect();
        let commands = keys.iter().zip(commands).map(|(key, &(_, len))| match len {
            Some(len) => Command::Put {
                key,
                value: &value[..len],
                expires_at_ms: 0,
                condition: Condition::None,
            },
            None => Command::Delete {
                key,
                condition: Condition::None,
            },
        });
        let mut outcomes = Vec::new();
        let each = |number, outcome| {
            assert_eq!(number, outcomes.len());
            outcomes.push(outcome);
        };
        if self.salt.is_multiple_of(2) {
            self.shard.apply_batch(commands.clone(), each);
        } else {
            let hashes: Vec<u64> = commands
                .clone()
                .map(|command| self.shard.command_hash(&command))
                .collect();
            self.shard.prefetch_index(&hashes);
            self.shard.prefetch_entries(&hashes);
            self.shard.apply_batch_hashed(commands.clone(), &hashes, each);
        }
        assert_eq!(outcomes.len(), keys.len());
        for (command, outcome) in commands.zip(outcomes) {
            let model = self.model.apply(&command, |key| self.shard.hash(key));
            assert_eq!(outcome, model, "{command:?}");
        }
        let model = &self.model;
        self.expected.retain(|key| model.live(key).is_some());
    }

    fn name(&self, key: &[u8]) -> Victim {
        Victim {
            hash: self.shard.hash(key),
            version: self.model.records[key].version,
        }
    }

    fn mark_offered(&mut self, victim: Victim) -> u64 {
        let records = &self.model.records;
        let found = records.iter().find(|(_, record)| record.version == victim.version);
        let (key, record) = found.expect("only what is there is offered");
        assert_eq!(self.shard.hash(key), victim.hash);
        assert!(!record.offered, "an entry is offered twice");
        let (key, expires_at_ms) = (key.clone(), record.expires_at_ms);
        self.model.offer(&key);
        expires_at_ms
    }

    fn remove_offered(&mut self, victims: &[Victim], skip: usize, command: impl Fn(Victim) -> Command<'static>) {
        for &victim in victims {
            self.mark_offered(victim);
        }
        for (position, &victim) in victims.iter().enumerate() {
            if position % skip != skip - 1 || skip == 1 {
                assert!(matches!(self.apply(&command(victim)), Outcome::Applied { .. }));
                assert_eq!(
                    self.apply(&command(victim)),
                    Outcome::NotFound,
                    "a victim is removed once"
                );
            }
        }
    }

    fn compare(&self, key: &[u8], got: Option<&(Vec<u8>, Version, u64)>) {
        let expected = self.model.live(key);
        let expected = expected.map(|record| (record.value.clone(), record.version, record.expires_at_ms));
        assert_eq!(got, expected.as_ref());
    }

    fn scan_step(&mut self, entries: usize, bytes: usize) {
        if self.cursor == Cursor::START {
            let model = &self.model;
            self.expected = model
                .records
                .keys()
                .filter(|key| model.live(key).is_some())
                .cloned()
                .collect();
            self.seen.clear();
        }
        let (model, seen) = (&self.model, &mut self.seen);
        let mut previous = self.cursor.get();
        let shard = &self.shard;
        let next = shard.scan(self.cursor, b"k", entries, bytes, usize::MAX, |key, entry| {
            let record = model.live(key).expect("a scan returns what is there");
            assert_eq!((entry.value, entry.version), (record.value.as_slice(), record.version));
            let hash = shard.hash(key);
            assert!(hash >= previous, "a scan goes in hash order");
            previous = hash;
            seen.insert(key.to_vec());
        });
        if let Some(next) = next {
            assert!(next > self.cursor, "a scan makes progress");
            self.cursor = next;
            return;
        }
        self.cursor = Cursor::START;
        let missed: Vec<_> = self
            .expected
            .iter()
            .filter(|key| key.starts_with(b"k") && !self.seen.contains(*key))
            .collect();
        assert!(missed.is_empty(), "a scan missed {missed:?}");
    }
}

fn config() -> impl Strategy<Value = ShardConfig> {
    let policy = prop_oneof![3 => Just(Policy::Lru), 2 => Just(Policy::S3Fifo), 1 => Just(Policy::NoEvict)];
    let budget = prop_oneof![300..2_000u64, 2_000..300_000u64];
    (policy, budget, prop::option::of(1..100u64), any::<[u64; 2]>()).prop_map(
        |(policy, budget_bytes, max_records, seed)| ShardConfig {
            budget_bytes,
            max_records,
            policy,
            seed,
            max_value_bytes: 30_000,
        },
    )
}

fn mask() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(u64::MAX), 1 => Just(0), 1 => Just(7), 1 => Just(0xff << 56), 1 => Just(u64::MAX << 1)]
}

proptest! {
    #[test]
    fn behaves_like_the_reference(config in config(), mask in mask(), ops in prop::collection::vec(op(), 1..200)) {
        let mut pair = Pair::new(config, mask);
        for op in &ops {
            pair.run(op);
        }
    }

    /// Two shards of different seed, and so of different layout and order, that apply the same log agree on everything
    /// replicated, whatever one of them reads or proposes in between.
    #[test]
    fn replicas_agree(config in config(), seed in any::<[u64; 2]>(), ops in prop::collection::vec(op(), 1..120)) {
        let mut one = Shard::new(config);
        let mut two = Shard::new(ShardConfig { seed, ..config });
        for (index, op) in (1..).zip(&ops) {
            let time = index * 20;
            one.begin(index, time);
            two.begin(index, time);
            let (key, value);
            let command = match *op {
                Op::Put { key: k, len, ttl_ms, .. } => {
                    (key, value) = (key_bytes(k), vec![k; len]);
                    let expires_at_ms = if ttl_ms == 0 { 0 } else { time + ttl_ms };
                    Command::Put { key: &key, value: &value, expires_at_ms, condition: Condition::None }
                }
                Op::Delete { key: k, .. } => {
                    key = key_bytes(k);
                    Command::Delete { key: &key, condition: Condition::None }
                }
                Op::Incr { key: k, delta } => {
                    key = key_bytes(k);
                    Command::Incr { key: &key, delta }
                }
                Op::Get { key: k } => {
                    let _ = one.get(&key_bytes(k));
                    continue;
                }
                Op::Expire { ahead_ms, work } => {
                    let mut expired = Vec::new();
                    while one.propose_expired(time + ahead_ms, work, &mut expired) == Progress::More {}
                    continue;
                }
                _ => continue,
            };
            prop_assert_eq!(one.apply(&command), two.apply(&command));
            prop_assert_eq!(one.state_hash(), two.state_hash());
            prop_assert_eq!(one.stats().used_bytes, two.stats().used_bytes);
            prop_assert_eq!(one.stats().records, two.stats().records);
        }
    }
}
