//! The keys of records.

use std::fmt;

use super::MAX_SHARDS;

/// What a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// The cluster as a whole.
    Config,
    /// Group 0.
    Controller,
    /// A node, by its id, from 1.
    Node(u64),
    /// A shard, by its number.
    Shard(u16),
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config => f.write_str("config"),
            Self::Controller => f.write_str("controller"),
            Self::Node(id) => write!(f, "node/{id}"),
            Self::Shard(number) => write!(f, "shard/{number}"),
        }
    }
}

/// The key of a record's entry.
pub fn key_of(key: RecordKey) -> Vec<u8> {
    key.to_string().into_bytes()
}

/// Why a key is none of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A kind of record that this release does not know. A later one may have written it.
    #[error("no kind of record that this release knows")]
    Unknown,
    /// A known kind, but what follows is not the number that belongs there.
    #[error("no number of a {0}")]
    Number(&'static str),
}

/// What an entry's key is the key of.
pub fn parse_key(key: &[u8]) -> Result<RecordKey, KeyError> {
    let text = std::str::from_utf8(key).map_err(|_| KeyError::Unknown)?;
    match text {
        "config" => return Ok(RecordKey::Config),
        "controller" => return Ok(RecordKey::Controller),
        _ => {}
    }
    let (kind, number) = text.split_once('/').ok_or(KeyError::Unknown)?;
    match kind {
        "node" => decimal(number)
            .filter(|id| *id != 0)
            .map(RecordKey::Node)
            .ok_or(KeyError::Number("node")),
        "shard" => decimal(number)
            .and_then(|number| u16::try_from(number).ok())
            .filter(|number| *number < MAX_SHARDS)
            .map(RecordKey::Shard)
            .ok_or(KeyError::Number("shard")),
        _ => Err(KeyError::Unknown),
    }
}

/// A number as [`key_of`] writes it, and no other spelling of it.
fn decimal(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}
