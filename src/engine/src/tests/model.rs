//! The plain reference: a map and a list, written from the documentation of the commands and nothing else.

use std::collections::BTreeMap;

use crate::{Command, Condition, Outcome, Policy, Version};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) value: Vec<u8>,
    pub(super) version: Version,
    pub(super) expires_at_ms: u64,
    pub(super) offered: bool,
}

/// What a shard must look like from outside.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) records: BTreeMap<Vec<u8>, Record>,
    /// Keys, the least recently used first.
    pub(super) recency: Vec<Vec<u8>>,
    /// Keys offered for removal and so out of that order, the first offered first.
    pub(super) offered: Vec<Vec<u8>>,
    pub(super) budget_bytes: u64,
    pub(super) max_records: Option<u64>,
    pub(super) policy: Policy,
    pub(super) max_value_bytes: usize,
    pub(super) time_ms: u64,
    /// Bytes and records that a cut of the budget left behind.
    pub(super) tolerated: (u64, u64),
    pub(super) next: u64,
}

pub(super) fn cost(key: &[u8], value: &[u8]) -> u64 {
    let payload = (key.len() + value.len()) as u64;
    payload + payload / 32 + 40
}

impl Model {
    pub(super) fn used_bytes(&self) -> u64 {
        self.records.iter().map(|(key, record)| cost(key, &record.value)).sum()
    }

    pub(super) fn begin(&mut self, index: u64, time_ms: u64) {
        self.next = index << 16;
        self.time_ms = self.time_ms.max(time_ms);
        self.tolerated.0 = self.tolerated.0.min(self.used_bytes());
        self.tolerated.1 = self.tolerated.1.min(self.records.len() as u64);
    }

    pub(super) fn expired(&self, record: &Record) -> bool {
        record.expires_at_ms != 0 && record.expires_at_ms <= self.time_ms
    }

    pub(super) fn live(&self, key: &[u8]) -> Option<&Record> {
        self.records.get(key).filter(|record| !self.expired(record))
    }

    /// A read of the key.
    pub(super) fn touch(&mut self, key: &[u8]) {
        if let Some(at) = self.recency.iter().position(|held| held == key) {
            let key = self.recency.remove(at);
            self.recency.push(key);
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        self.records.remove(key);
        self.recency.retain(|held| held != key);
        self.offered.retain(|held| held != key);
    }

    pub(super) fn offer(&mut self, key: &[u8]) {
        self.records.get_mut(key).expect("present").offered = true;
        self.recency.retain(|held| held != key);
        self.offered.push(key.to_vec());
    }

    pub(super) fn forget_offers(&mut self) {
        self.records.values_mut().for_each(|record| record.offered = false);
        let kept = std::mem::take(&mut self.recency);
        self.recency = std::mem::take(&mut self.offered);
        self.recency.extend(kept);
    }

    /// A write of the key.
    fn keep(&mut self, key: &[u8]) {
        self.recency.retain(|held| held != key);
        self.offered.retain(|held| held != key);
        self.recency.push(key.to_vec());
    }

    /// `hash` tells which key a victim is.
    pub(super) fn apply(&mut self, command: &Command<'_>, hash: impl Fn(&[u8]) -> u64) -> Outcome {
        let version = Version::from(self.next);
        self.next += 1;
        let key = match *command {
            Command::Put { key, .. }
            | Command::Delete { key, .. }
            | Command::Incr { key, .. }
            | Command::Touch { key, .. } => key,
            Command::Evict {
                hash: wanted,
                version: expected,
            }
            | Command::Expire {
                hash: wanted,
                version: expected,
            } => {
                let Some((key, record)) = self
                    .records
                    .iter()
                    .find(|(key, record)| record.version == expected && hash(key) == wanted)
                else {
                    return Outcome::NotFound;
                };
                if matches!(command, Command::Expire { .. }) && !self.expired(record) {
                    return Outcome::NotFound;
                }
                let key = key.clone();
                self.remove(&key);
                return Outcome::Applied { version };
            }
        };
        if key.is_empty() || key.len() > 65_535 {
            return Outcome::InvalidSize;
        }
        if let Command::Put { value, .. } = command
            && value.len() > self.max_value_bytes
        {
            return Outcome::InvalidSize;
        }
        if self.records.get(key).is_some_and(|record| self.expired(record)) {
            self.remove(key);
        }
        let current = self.records.get(key).map_or(Version::ABSENT, |record| record.version);
        let condition = match *command {
            Command::Put { condition, .. } | Command::Delete { condition, .. } => condition,
            _ => Condition::None,
        };
        let holds = match condition {
            Condition::None => true,
            Condition::IfAbsent => current.is_absent(),
            Condition::IfVersion(expected) => current == expected,
        };
        if !holds {
            return Outcome::ConditionFailed { current };
        }
        match *command {
            Command::Put {
                value, expires_at_ms, ..
            } => self.write(key, value, version, expires_at_ms),
            Command::Delete { .. } => {
                if current.is_absent() {
                    return Outcome::NotFound;
                }
                self.remove(key);
                Outcome::Applied { version }
            }
            Command::Incr { delta, .. } => {
                let (text, expires_at_ms) = self.records.get(key).map_or((b"0".to_vec(), 0), |record| {
                    (record.value.clone(), record.expires_at_ms)
                });
                let number = str::from_utf8(&text).ok().and_then(|text| text.parse::<i64>().ok());
                let Some(number) = number.filter(|number| number.to_string().as_bytes() == text) else {
                    return Outcome::NotANumber;
                };
                let Some(value) = number.checked_add(delta) else {
                    return Outcome::Overflow;
                };
                match self.write(key, value.to_string().as_bytes(), version, expires_at_ms) {
                    Outcome::Applied { version } => Outcome::Counter { version, value },
                    other => other,
                }
            }
            Command::Touch { expires_at_ms, .. } => {
                let Some(record) = self.records.get_mut(key) else {
                    return Outcome::NotFound;
                };
                record.version = version;
                record.expires_at_ms = expires_at_ms;
                record.offered = false;
                self.keep(key);
                Outcome::Applied { version }
            }
            Command::Evict { .. } | Command::Expire { .. } => unreachable!("answered above"),
        }
    }

    fn write(&mut self, key: &[u8], value: &[u8], version: Version, expires_at_ms: u64) -> Outcome {
        let slack = |limit: u64, tolerated: u64| match self.policy {
            Policy::NoEvict => limit,
            _ => limit.max(tolerated) + limit / 50,
        };
        let old = self.records.get(key).map(|record| cost(key, &record.value));
        let new = cost(key, value);
        if new > old.unwrap_or(0)
            && self.used_bytes() - old.unwrap_or(0) + new > slack(self.budget_bytes, self.tolerated.0)
        {
            return Outcome::OutOfMemory;
        }
        if old.is_none()
            && self
                .max_records
                .is_some_and(|max| self.records.len() as u64 >= slack(max, self.tolerated.1))
        {
            return Outcome::OutOfMemory;
        }
        let record = Record {
            value: value.to_vec(),
            version,
            expires_at_ms,
            offered: false,
        };
        self.records.insert(key.to_vec(), record);
        self.keep(key);
        Outcome::Applied { version }
    }

    /// The keys that strict recency gives up for `bytes` and `records` to come.
    pub(super) fn victims(&self, bytes: u64, records: u64) -> Vec<Vec<u8>> {
        let mut victims = Vec::new();
        if self.policy == Policy::NoEvict {
            return victims;
        }
        let kept = self.records.iter().filter(|(_, record)| !record.offered);
        let (mut used, mut count) = kept.fold((0, 0), |(b, n), (key, record)| (b + cost(key, &record.value), n + 1));
        for key in &self.recency {
            if used + bytes <= self.budget_bytes && self.max_records.is_none_or(|max| count + records <= max) {
                break;
            }
            used -= cost(key, &self.records[key].value);
            count -= 1;
            victims.push(key.clone());
        }
        victims
    }
}
