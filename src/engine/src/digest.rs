//! The digest of one entry, summed into the shard's state hash.

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

/// Mixes one word into a 128-bit state by folded multiplication.
const fn mix(state: u128, word: u64) -> u128 {
    let low = state as u64 ^ word;
    let high = (state >> 64) as u64 ^ word.rotate_left(32);
    let a = ((low | 1) as u128).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    let b = ((high | 1) as u128).wrapping_mul(0xd1b5_4a32_d192_ed03_5851_f42d_4c95_7f2d);
    a ^ b.rotate_left(64) ^ ((low as u128) << 64)
}

/// The digest of entries of one key, as far as the key decides it: a write needs it of the entry before and after.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    state: u128,
    len: u64,
}

impl Key {
    #[inline]
    pub(crate) fn new(key: &[u8]) -> Self {
        let hash = rapidhash_v3_seeded(key, &DEFAULT_RAPID_SECRETS);
        Self {
            state: mix(0x2545_f491_4f6c_dd1d_8c2f_5a93_1b7e_64b5, hash),
            len: key.len() as u64,
        }
    }

    /// The digest of the key's entry.
    pub(crate) fn entry(self, value: &[u8], version: u64, expires_at_ms: u64) -> u128 {
        let value_hash = rapidhash_v3_seeded(value, &DEFAULT_RAPID_SECRETS);
        let mut state = mix(self.state, value_hash);
        state = mix(state, version);
        state = mix(state, expires_at_ms);
        mix(state, self.len << 32 | value.len() as u64)
    }
}

/// The 128-bit digest of one entry. It depends on nothing but its arguments: not on the shard's seed, nor on layout. Made to find
/// replicas that differ by a bug or a broken memory module, not to resist an adversary.
pub(crate) fn entry(key: &[u8], value: &[u8], version: u64, expires_at_ms: u64) -> u128 {
    Key::new(key).entry(value, version, expires_at_ms)
}

/// The digest of what is not in entries.
pub(crate) fn shard(sum: u128, shard_time_ms: u64) -> u128 {
    mix(sum, shard_time_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_counts() {
        let base = entry(b"key", b"value", 7, 9);
        assert_ne!(base, entry(b"kez", b"value", 7, 9));
        assert_ne!(base, entry(b"key", b"valuf", 7, 9));
        assert_ne!(base, entry(b"key", b"value", 8, 9));
        assert_ne!(base, entry(b"key", b"value", 7, 8));
        assert_ne!(base, entry(b"keyv", b"alue", 7, 9));
        assert_ne!(shard(base, 0), shard(base, 1));
    }

    /// Replicas of different releases compare state hashes, so the function is frozen.
    #[test]
    fn is_frozen() {
        assert_eq!(
            entry(b"key", b"value", 7, 9),
            330_597_190_506_938_240_611_595_470_933_113_815_494
        );
    }
}
