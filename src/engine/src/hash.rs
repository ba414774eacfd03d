//! The shard's private hash function.

/// SipHash-1-3 (Aumasson and Bernstein, INDOCRYPT 2012) under a secret 128-bit key, the same on every replica and in every release:
/// hashes travel in the log (victims) and in cursors. Keyed, so that a client cannot choose keys that collide.
///
/// Written for a key that lies in memory as a whole, which is all that is hashed here: a hasher that can be fed piece by piece takes
/// half as many instructions again.
#[derive(Debug, Clone)]
pub(crate) struct KeyHasher {
    /// The state before the first word.
    initial: State,
    /// All ones, except in tests that want collisions.
    mask: u64,
}

#[derive(Debug, Clone, Copy)]
struct State {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl State {
    #[inline]
    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.rotate_left(32).wrapping_add(self.v3);
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.rotate_left(32);
    }

    #[inline]
    fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.v0 ^= word;
    }
}

impl KeyHasher {
    pub(crate) fn new([k0, k1]: [u64; 2], mask: u64) -> Self {
        // "somepseudorandomlygeneratedbytes", as the paper has it.
        let initial = State {
            v0: k0 ^ 0x736f_6d65_7073_6575,
            v1: k1 ^ 0x646f_7261_6e64_6f6d,
            v2: k0 ^ 0x6c79_6765_6e65_7261,
            v3: k1 ^ 0x7465_6462_7974_6573,
        };
        Self { initial, mask }
    }

    #[inline]
    pub(crate) fn hash(&self, key: &[u8]) -> u64 {
        let mut state = self.initial;
        let (words, rest) = key.as_chunks::<8>();
        for word in words {
            state.absorb(u64::from_le_bytes(*word));
        }
        // The last word: what is left, and the length modulo 256 in the highest byte.
        let rest = rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        state.absorb(rest | (key.len() as u64) << 56);
        state.v2 ^= 0xff;
        for _ in 0..3 {
            state.round();
        }
        (state.v0 ^ state.v1 ^ state.v2 ^ state.v3) & self.mask
    }
}

#[cfg(test)]
mod tests {
    use siphasher::sip::SipHasher13;

    use super::*;

    /// Replicas of different releases must agree.
    #[test]
    fn is_siphash_1_3() {
        let seed = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let hasher = KeyHasher::new(seed, u64::MAX);
        // From the reference implementation.
        assert_eq!(hasher.hash(&[]), 0xabac_0158_050f_c4dc);
        let another = SipHasher13::new_with_keys(seed[0], seed[1]);
        let input: Vec<u8> = (0..600_u32).map(|at| (at * 7) as u8).collect();
        for len in 0..input.len() {
            assert_eq!(hasher.hash(&input[..len]), another.hash(&input[..len]), "{len} bytes");
        }
    }
}
