//! Keys to slots, exactly as Redis Cluster does it, so that keys with one `{tag}` stay together and users' habits carry over.
//!
//! Source: the Redis Cluster specification, "Key distribution model" and "Hash tags".

use crc::{CRC_16_XMODEM, Crc, Table};

use crate::limits::SLOTS;

static CRC16: Crc<u16, Table<16>> = Crc::<u16, Table<16>>::new(&CRC_16_XMODEM);

/// The slot of `key`, in `0..16384`: CRC16 (XMODEM) of the key, or of the part between the first `{` and the next `}` when
/// that part is not empty, modulo [`SLOTS`].
///
/// ```
/// use generation_proto::slot::slot_of;
/// assert_eq!(slot_of(b"123456789"), 0x31c3 % 16384);
/// assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
/// ```
pub fn slot_of(key: &[u8]) -> u16 {
    CRC16.checksum(hash_tag(key)) % SLOTS
}

/// The part of `key` that decides its slot.
#[inline]
fn hash_tag(key: &[u8]) -> &[u8] {
    // Most keys have no tag.
    if has_brace(key) { tag_within(key) } else { key }
}

/// Whether there is a `{` in `key`: eight bytes are looked at at a time, the last ones perhaps twice.
#[inline]
fn has_brace(key: &[u8]) -> bool {
    let Some(last) = key.last_chunk::<8>() else {
        return key.contains(&b'{');
    };
    let (words, _) = key.as_chunks::<8>();
    words.iter().fold(braces(*last), |found, word| found | braces(*word)) != 0
}

/// Not zero if one of the bytes is a `{`: there is a zero among them without those of `{`, and only a zero borrows from its highest bit.
#[inline]
fn braces(word: [u8; 8]) -> u64 {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const BRACES: u64 = u64::from_le_bytes([b'{'; 8]);
    let word = u64::from_le_bytes(word) ^ BRACES;
    word.wrapping_sub(ONES) & !word & (ONES << 7)
}

#[cold]
fn tag_within(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&byte| byte == b'{') else {
        return key;
    };
    let rest = &key[open + 1..];
    match rest.iter().position(|&byte| byte == b'}') {
        Some(0) | None => key,
        Some(close) => &rest[..close],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_follow_the_redis_cluster_specification() {
        assert_eq!(hash_tag(b"foo{}{bar}"), b"foo{}{bar}");
        assert_eq!(hash_tag(b"foo{{bar}}zap"), b"{bar");
        assert_eq!(hash_tag(b"foo{bar}{zap}"), b"bar");
        assert_eq!(hash_tag(b"foo{bar"), b"foo{bar");
        assert_eq!(hash_tag(b"{}"), b"{}");
    }

    #[test]
    fn a_brace_is_found_wherever_it_is() {
        for len in 0..70 {
            let mut key = vec![b'x'; len];
            assert!(!has_brace(&key));
            for at in 0..len {
                key[at] = b'{';
                assert!(has_brace(&key), "{at} of {len}");
                key[at] = b'x';
            }
        }
    }

    #[test]
    fn slots_equal_those_of_redis_cluster() {
        // From `redis-cli cluster keyslot`.
        assert_eq!(slot_of(b"foo"), 12_182);
        assert_eq!(slot_of(b"bar"), 5_061);
        assert_eq!(slot_of(b"hello"), 866);
        assert_eq!(slot_of(b"somekey"), 11_058);
        assert_eq!(slot_of(b"foo{hash_tag}"), 2_515);
        assert_eq!(slot_of(b""), 0);
    }
}
