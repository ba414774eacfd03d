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
fn hash_tag(key: &[u8]) -> &[u8] {
    // Most keys have no tag, and `contains` looks at eight bytes at a time where `position` looks at one.
    if key.contains(&b'{') { tag_within(key) } else { key }
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
