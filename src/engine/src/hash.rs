//! The shard's private hash function.

use siphasher::sip::SipHasher13;

/// SipHash-1-3 under a secret 128-bit key, the same on every replica and in every release: hashes travel in the log (victims)
/// and in cursors. Keyed, so that a client cannot choose keys that collide.
#[derive(Debug, Clone)]
pub(crate) struct KeyHasher {
    sip: SipHasher13,
    /// All ones, except in tests that want collisions.
    mask: u64,
}

impl KeyHasher {
    pub(crate) fn new(seed: [u64; 2], mask: u64) -> Self {
        Self {
            sip: SipHasher13::new_with_keys(seed[0], seed[1]),
            mask,
        }
    }

    #[inline]
    pub(crate) fn hash(&self, key: &[u8]) -> u64 {
        self.sip.hash(key) & self.mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the reference implementation: replicas of different releases must agree.
    #[test]
    fn is_siphash_1_3() {
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let input: Vec<u8> = (0..16).collect();
        let hasher = KeyHasher::new(key, u64::MAX);
        assert_eq!(hasher.hash(&[]), 0xabac_0158_050f_c4dc);
        assert_ne!(hasher.hash(&input), hasher.hash(&input[..15]));
    }
}
