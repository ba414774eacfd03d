//! Records as one message: between nodes, and in a node's file.
//!
//! # Format, version 1
//! Numbers are little-endian.
//! ```text
//!    0  u8×4  magic "GNCR"
//!    4  u8    format version, 1
//!    5  u8×3  reserved, 0
//!    8  u64   since: every record with a version above it is here; 0 where all are
//!   16  u32   number of records
//!   20  the records, each once, by ascending version:
//!        0  u64  version
//!        8  u32  length of the value
//!       12  u8   length of the key
//!       13  key, value
//!    …  u32   CRC-32C of everything before
//! ```

use std::collections::BTreeSet;

use super::{ApplyError, Changed, Cluster, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::cluster::records::RecordKey;
use crate::codec::{Reader, u32_at};

const MAGIC: &[u8; 4] = b"GNCR";
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 4;

const _: () = assert!(
    MAX_KEY_BYTES <= u8::MAX as usize && MAX_VALUE_BYTES <= u32::MAX as usize,
    "keys have one byte of length, values four"
);

/// Why bytes were not taken for records; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// No records at all.
    #[error("not the records of a cluster")]
    Magic,
    /// Written by a newer release.
    #[error("records in a message of version {0}, this release reads {VERSION}: upgrade this node")]
    UnsupportedVersion(u8),
    /// Flipped bits, or torn.
    #[error("records with a wrong checksum")]
    Checksum,
    /// The lengths in it do not add up, versions do not ascend, or a record is there twice.
    #[error("malformed records")]
    Structure,
    /// Records between what is here and what came are missing.
    #[error("records above version {since}, and what is above {own} is missing: ask for it")]
    Gap {
        /// What came begins above this.
        since: u64,
        /// The highest version here.
        own: u64,
    },
    /// A record that cannot be taken in.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl Cluster {
    /// All records.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_delta(0)
    }

    /// Reads what [`Cluster::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DeltaError> {
        let mut cluster = Self::new();
        cluster.apply_delta(bytes)?;
        Ok(cluster)
    }

    /// The records with a version above `since`.
    pub fn encode_delta(&self, since: u64) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend([VERSION, 0, 0, 0]);
        out.extend(since.to_le_bytes());
        let count_at = out.len();
        out.extend(0_u32.to_le_bytes());
        let mut count = 0_u32;
        for (key, value, version) in self.delta(since) {
            out.extend(version.to_le_bytes());
            out.extend((value.len() as u32).to_le_bytes());
            out.push(key.len() as u8);
            out.extend(key);
            out.extend(value);
            count += 1;
        }
        crate::codec::put_at(&mut out, count_at, count.to_le_bytes());
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }

    /// Takes in what [`Cluster::encode_delta`] wrote, all of it or, with an error, nothing; what was changed, by ascending version.
    pub fn apply_delta(&mut self, bytes: &[u8]) -> Result<Vec<RecordKey>, DeltaError> {
        let (since, records) = parse(bytes)?;
        if since > self.version {
            return Err(DeltaError::Gap {
                since,
                own: self.version,
            });
        }
        let mut next = self.clone();
        let mut changed = Vec::new();
        for (key, value, version) in records {
            if let Changed::Record(key) = next.apply(key, value, version)? {
                changed.push(key);
            }
        }
        *self = next;
        Ok(changed)
    }
}

/// Key, value, version.
type RawRecord<'a> = (&'a [u8], &'a [u8], u64);

/// Since when, and the records.
fn parse(bytes: &[u8]) -> Result<(u64, Vec<RawRecord<'_>>), DeltaError> {
    if !bytes.starts_with(MAGIC) {
        return Err(DeltaError::Magic);
    }
    match bytes.get(MAGIC.len()) {
        Some(&VERSION) => {}
        Some(&other) => return Err(DeltaError::UnsupportedVersion(other)),
        None => return Err(DeltaError::Structure),
    }
    let body_len = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(DeltaError::Structure)?;
    let (body, checksum) = bytes.split_at(body_len);
    if crc32c::crc32c(body) != u32_at(checksum, 0) {
        return Err(DeltaError::Checksum);
    }
    fields(body).ok_or(DeltaError::Structure)
}

fn fields(body: &[u8]) -> Option<(u64, Vec<RawRecord<'_>>)> {
    let mut rest = Reader::new(body);
    rest.take(MAGIC.len() + 1)?;
    if rest.take(3)? != [0; 3] {
        return None;
    }
    let since = rest.u64()?;
    let count = rest.u32()?;
    let mut records = Vec::new();
    let mut keys = BTreeSet::new();
    let mut last = since;
    for _ in 0..count {
        let version = rest.u64()?;
        let value_len = usize::try_from(rest.u32()?).ok()?;
        let key_len = usize::from(rest.u8()?);
        if version <= last {
            return None;
        }
        last = version;
        let key = rest.take(key_len)?;
        if !keys.insert(key) {
            return None;
        }
        records.push((key, rest.take(value_len)?, version));
    }
    (rest.remaining() == 0).then_some((since, records))
}
