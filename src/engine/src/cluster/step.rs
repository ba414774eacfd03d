//! A change of one record.

use super::records::{Record, RecordError, key_of};
use super::view::Cluster;

/// One compare-and-swap in group 0: the entry `key` gets `value` if its version is `expected_version`.
///
/// A step that comes too late, or twice, is refused by the version and does no harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The entry.
    pub key: Vec<u8>,
    /// The version that the step was made for; 0 where there must be no such entry.
    pub expected_version: u64,
    /// The record.
    pub value: Vec<u8>,
    /// What it does and why, for people.
    pub text: String,
}

impl Step {
    /// The step from what `cluster` knows to `record`.
    pub fn new(cluster: &Cluster, record: &Record, text: impl Into<String>) -> Result<Self, RecordError> {
        let key = record.key();
        Ok(Self {
            key: key_of(key),
            expected_version: cluster.version_of(key),
            value: record.encode()?,
            text: text.into(),
        })
    }
}
