//! Whose journal lies in a directory: a file of one block, written once.
//!
//! # Format, version 1
//! All numbers are little-endian.
//! ```text
//!    0  u8×8  magic "GNJOURNL"
//!    8  u8    format version, 1
//!    9  u8×3  reserved, 0
//!   12  u32   checksum (CRC-32C) of the block with this field as 0
//!   16  u128  cluster
//!   32  u128  journal id, drawn at random when the journal was made
//!   48  u64   node
//!   56  u16   core
//!   58  u16   cores of the node: shards belong to cores by this number
//!   60  u16   shards of the cluster
//!   62  zeros to 4096
//! ```

use crate::env::disk::BLOCK_BYTES;

const MAGIC: &[u8; 8] = b"GNJOURNL";
const VERSION: u8 = 1;
const FIELDS_END: usize = 62;

/// Whose journal it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: u128,
    /// The journal, drawn at random when it is made. Not compared: the one found counts.
    pub journal: u128,
    /// The node.
    pub node: u64,
    /// The core.
    pub core: u16,
    /// How many cores the node has.
    pub cores: u16,
    /// How many shards the cluster has.
    pub shards: u16,
}

/// A journal that cannot be used as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No identity, or a damaged one.
    #[error("the journal's identity file is damaged: restore it, or let this node join again with an empty directory")]
    Damaged,
    /// Written by a newer release.
    #[error("the journal has format version {0}, this release reads {VERSION}: start the newer release")]
    UnsupportedVersion(u8),
    /// Another cluster, node or core, or other numbers of cores or shards.
    #[error("the journal belongs to {found}, not to {expected}: give this node its own directory")]
    Foreign {
        /// Whose it is.
        found: Identity,
        /// Who asked.
        expected: Identity,
    },
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            cluster,
            node,
            core,
            cores,
            shards,
            ..
        } = self;
        write!(
            f,
            "core {core} of {cores} of node {node} in cluster {cluster:032x} of {shards} shards"
        )
    }
}

impl Identity {
    /// The file's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        block.extend(MAGIC);
        block.extend([VERSION, 0, 0, 0, 0, 0, 0, 0]);
        block.extend(self.cluster.to_le_bytes());
        block.extend(self.journal.to_le_bytes());
        block.extend(self.node.to_le_bytes());
        block.extend(self.core.to_le_bytes());
        block.extend(self.cores.to_le_bytes());
        block.extend(self.shards.to_le_bytes());
        block.resize(BLOCK_BYTES, 0);
        let checksum = crc32c::crc32c(&block);
        block[12..16].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    fn decode(bytes: &[u8]) -> Result<Self, IdentityError> {
        let mut block = bytes.get(..BLOCK_BYTES).ok_or(IdentityError::Damaged)?.to_vec();
        let checksum: [u8; 4] = block[12..16].try_into().expect("invariant: four bytes");
        block[12..16].fill(0);
        if block[..8] != *MAGIC || crc32c::crc32c(&block) != u32::from_le_bytes(checksum) {
            return Err(IdentityError::Damaged);
        }
        if block[8] != VERSION || block[FIELDS_END..].iter().any(|byte| *byte != 0) {
            return Err(IdentityError::UnsupportedVersion(block[8]));
        }
        let word = |at: usize, len: usize| {
            let bytes = block[at..at + len].iter().rev();
            bytes.fold(0, |word: u128, byte| word << 8 | u128::from(*byte))
        };
        Ok(Self {
            cluster: word(16, 16),
            journal: word(32, 16),
            node: word(48, 8) as u64,
            core: word(56, 2) as u16,
            cores: word(58, 2) as u16,
            shards: word(60, 2) as u16,
        })
    }

    /// Checks that the file of these bytes is this one's; returns the journal's id.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<u128, IdentityError> {
        let found = Self::decode(bytes)?;
        let expected = Self {
            journal: found.journal,
            ..*self
        };
        if found != expected {
            return Err(IdentityError::Foreign { found, expected });
        }
        Ok(found.journal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        cluster: 1 << 100,
        journal: 0x1234,
        node: 3,
        core: 1,
        cores: 2,
        shards: 16,
    };

    #[test]
    fn an_identity_is_read_back_and_compared() {
        let bytes = IDENTITY.encode();
        let asked = Identity { journal: 0, ..IDENTITY };
        assert_eq!(asked.check(&bytes), Ok(0x1234));
        let other = Identity { node: 4, ..asked };
        assert!(matches!(other.check(&bytes), Err(IdentityError::Foreign { .. })));
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let bytes = IDENTITY.encode();
        for at in 0..80 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(IDENTITY.check(&bytes), Err(IdentityError::Damaged), "byte {at}");
        }
        assert_eq!(IDENTITY.check(&bytes[..4000]), Err(IdentityError::Damaged));
    }
}
