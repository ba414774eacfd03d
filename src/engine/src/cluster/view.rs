//! A node's copy of all records.

mod delta;
#[cfg(test)]
mod tests;

pub use delta::DeltaError;

use std::collections::BTreeMap;

use super::records::{Config, Controller, KeyError, Node, Record, RecordError, RecordKey, Shard, key_of, parse_key};
use crate::version::Version;

/// Longest key of a record, in bytes.
const MAX_KEY_BYTES: usize = 255;

/// Longest value of a record, in bytes: room for kinds that are not there yet.
const MAX_VALUE_BYTES: usize = 1 << 20;

/// A record was not taken in; the copy is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The key names a known kind of record, but not one of it.
    #[error("entry {key:?} of the controller: {source}")]
    Key {
        /// The key, as far as it is text.
        key: String,
        /// What is wrong.
        source: KeyError,
    },
    /// The value is no such record.
    #[error("{key}: {source}")]
    Record {
        /// What the record is of.
        key: RecordKey,
        /// What is wrong.
        source: RecordError,
    },
    /// Key or value are longer than any record's.
    #[error("an entry of the controller is too long for a record")]
    TooLong,
    /// The configuration of another cluster.
    #[error("records of cluster {found:032x}, and this is a node of cluster {own:032x}")]
    Foreign {
        /// The cluster this copy is of.
        own: u128,
        /// The cluster of the record.
        found: u128,
    },
}

/// What taking in a record has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// Nothing: this version or a newer one was there.
    Nothing,
    /// The record of this.
    Record(RecordKey),
    /// A record of a kind that this release does not know. It is kept, and passed on.
    Unknown,
}

/// An entry as the controller has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    value: Vec<u8>,
    version: u64,
}

/// All records with their versions, as one node knows them.
///
/// What is taken in must be *all* records above [`Cluster::version`], in one piece ([`Cluster::apply_delta`]) or in ascending order of
/// versions: the copy asks for what it lacks by the highest version it has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cluster {
    entries: BTreeMap<Vec<u8>, Entry>,
    config: Option<Config>,
    controller: Option<Controller>,
    nodes: BTreeMap<u64, Node>,
    shards: BTreeMap<u16, Shard>,
    version: u64,
    epoch: u32,
}

impl Cluster {
    /// A copy that knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in one entry of the controller. A version that is not above the one known (0, *absent*, never is) changes nothing.
    pub fn apply(&mut self, key: &[u8], value: &[u8], version: u64) -> Result<Changed, ApplyError> {
        if self.entries.get(key).map_or(0, |entry| entry.version) >= version {
            return Ok(Changed::Nothing);
        }
        if key.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES {
            return Err(ApplyError::TooLong);
        }
        let changed = match parse_key(key) {
            Ok(of) => {
                let record = Record::decode(of, value).map_err(|source| ApplyError::Record { key: of, source })?;
                self.replace(record)?;
                if of != RecordKey::Controller {
                    self.epoch = self.epoch.max(epoch_of(version));
                }
                Changed::Record(of)
            }
            Err(KeyError::Unknown) => Changed::Unknown,
            Err(source) => {
                let key = String::from_utf8_lossy(key).into_owned();
                return Err(ApplyError::Key { key, source });
            }
        };
        let value = value.to_vec();
        self.entries.insert(key.to_vec(), Entry { value, version });
        self.version = self.version.max(version);
        Ok(changed)
    }

    fn replace(&mut self, record: Record) -> Result<(), ApplyError> {
        match record {
            Record::Config(config) => {
                if let Some(own) = self.config.as_ref().map(|own| own.id).filter(|own| *own != config.id) {
                    return Err(ApplyError::Foreign { own, found: config.id });
                }
                self.config = Some(config);
            }
            Record::Controller(controller) => self.controller = Some(controller),
            Record::Node(node) => {
                self.nodes.insert(node.id, node);
            }
            Record::Shard(shard) => {
                self.shards.insert(shard.number, shard);
            }
        }
        Ok(())
    }

    /// The highest version of any record; 0 where there is none.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Grows with every change that routing depends on, and is the same on all nodes with the same records.
    ///
    /// It is the log index of the last change of `config`, a node or a shard (the upper 48 bits of its version), so what a client learnt
    /// from one node can be compared with what another says. Group 0's log would have to pass 2^32 entries to hold it at its
    /// maximum; it has an entry for each change and a few for each election.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The entries with a version above `since`, by ascending version: key, value, version.
    pub fn delta(&self, since: u64) -> impl Iterator<Item = (&[u8], &[u8], u64)> {
        let mut newer: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.version > since).collect();
        newer.sort_by_key(|(_, entry)| entry.version);
        newer
            .into_iter()
            .map(|(key, entry)| (key.as_slice(), entry.value.as_slice(), entry.version))
    }

    /// What a change of this record has to expect: its version, 0 where there is none.
    pub fn version_of(&self, key: RecordKey) -> u64 {
        self.entries.get(&key_of(key)).map_or(0, |entry| entry.version)
    }

    /// What is so of the cluster as a whole; `None` before it is founded.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// Group 0; `None` before the cluster is founded.
    pub fn controller(&self) -> Option<&Controller> {
        self.controller.as_ref()
    }

    /// All nodes by ascending id, those that are gone included.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// A node.
    pub fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// All shards by ascending number.
    pub fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.shards.values()
    }

    /// A shard.
    pub fn shard(&self, number: u16) -> Option<&Shard> {
        self.shards.get(&number)
    }
}

/// The epoch that a change with this version begins.
fn epoch_of(version: u64) -> u32 {
    u32::try_from(Version::from(version).index()).unwrap_or(u32::MAX)
}
