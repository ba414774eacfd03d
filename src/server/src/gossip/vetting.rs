//! What a message of chitchat must look like before chitchat reads it.
//!
//! chitchat decompresses as many blocks as a message has, each to 64 KiB, and some of its assertions do not hold for messages that are too
//! large; both are checked here on the bytes. The layout is that of chitchat 0.11.2, whose (de)serialisation this stands in front of:
//!
//! ```text
//! message   magic u16, version u8, type u8: 0 digest, cluster | 1 digest, delta | 2 delta | 3 nothing
//! digest    count u16, then for each node: id (length u16, text), generation u64, address, heartbeat u64, two versions u64
//! address   4, 4 bytes | 6, 16 bytes; port u16
//! delta     blocks: 1 (compressed) or 2, length u16, bytes; ended by 0
//! ```
//!
//! It does not look into the blocks: what chitchat makes of their content is its own affair, and its task is supervised.

use chitchat::{ChitchatMessage, Deserializable as _};

/// Most nodes of a digest. A message with a digest of all and something to tell must fit into 65,507 bytes, or chitchat fails.
pub(super) const MAX_NODES: usize = 1_000;

/// Longest id of a node: a number.
const MAX_ID_BYTES: usize = 20;

/// Most blocks of a delta, each of at most 64 KiB decompressed. chitchat fills one with 16 KiB, so a megabyte of news fits.
const MAX_BLOCKS: usize = 64;

/// Bytes of a message before its digest or delta.
const PREFIX_BYTES: usize = 4;

/// A message is not one that chitchat should read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Reads a message that passes.
pub(super) fn read(bytes: &[u8]) -> Result<ChitchatMessage, Malformed> {
    check(bytes)?;
    ChitchatMessage::deserialize(&mut &bytes[..]).map_err(|_| Malformed)
}

fn check(bytes: &[u8]) -> Result<(), Malformed> {
    let (prefix, mut rest) = bytes.split_at_checked(PREFIX_BYTES).ok_or(Malformed)?;
    match prefix[PREFIX_BYTES - 1] {
        0 => digest(&mut rest),
        1 => digest(&mut rest).and_then(|()| delta(&mut rest)),
        2 => delta(&mut rest),
        3 => Ok(()),
        _ => Err(Malformed),
    }
}

fn digest(rest: &mut &[u8]) -> Result<(), Malformed> {
    let count = usize::from(number(rest)?);
    if count > MAX_NODES {
        return Err(Malformed);
    }
    for _ in 0..count {
        let id = usize::from(number(rest)?);
        if id > MAX_ID_BYTES {
            return Err(Malformed);
        }
        skip(rest, id + size_of::<u64>())?;
        let ip = match take(rest, 1)? {
            [4] => 4,
            [6] => 16,
            _ => return Err(Malformed),
        };
        skip(rest, ip + size_of::<u16>() + 3 * size_of::<u64>())?;
    }
    Ok(())
}

fn delta(rest: &mut &[u8]) -> Result<(), Malformed> {
    for _ in 0..=MAX_BLOCKS {
        match take(rest, 1)? {
            [0] => return Ok(()),
            [1 | 2] => {
                let len = usize::from(number(rest)?);
                skip(rest, len)?;
            }
            _ => return Err(Malformed),
        }
    }
    Err(Malformed)
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], Malformed> {
    let (taken, left) = rest.split_at_checked(len).ok_or(Malformed)?;
    *rest = left;
    Ok(taken)
}

fn skip(rest: &mut &[u8], len: usize) -> Result<(), Malformed> {
    take(rest, len).map(drop)
}

fn number(rest: &mut &[u8]) -> Result<u16, Malformed> {
    let (number, left) = rest.split_first_chunk().ok_or(Malformed)?;
    *rest = left;
    Ok(u16::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use chitchat::Serializable as _;

    use super::*;

    /// A message of this type with this in it.
    fn message(kind: u8, content: &[&[u8]]) -> Vec<u8> {
        [&45_139_u16.to_le_bytes()[..], &[0, kind], &content.concat()].concat()
    }

    fn node(id: &str, v6: bool) -> Vec<u8> {
        let mut node = (id.len() as u16).to_le_bytes().to_vec();
        node.extend(id.as_bytes());
        node.extend(9_u64.to_le_bytes());
        if v6 {
            node.push(6);
            node.extend([0; 16]);
        } else {
            node.push(4);
            node.extend([127, 0, 0, 1]);
        }
        node.extend(1_u16.to_le_bytes());
        node.extend([0; 24]);
        node
    }

    fn digest_of(count: usize, v6: bool) -> Vec<u8> {
        let mut digest = (count as u16).to_le_bytes().to_vec();
        for id in 0..count {
            digest.extend(node(&id.to_string(), v6));
        }
        digest
    }

    fn block(kind: u8, bytes: &[u8]) -> Vec<u8> {
        [&[kind][..], &(bytes.len() as u16).to_le_bytes(), bytes].concat()
    }

    /// News of one node that says its highest version.
    fn news() -> Vec<u8> {
        let mut operations = vec![0];
        operations.extend(node("7", false));
        // A digest has one number more than a delta.
        operations.truncate(operations.len() - 8);
        operations.push(2);
        operations.extend(3_u64.to_le_bytes());
        operations
    }

    #[test]
    fn what_chitchat_writes_is_read_back() {
        let cluster = [&1_u16.to_le_bytes()[..], b"c"].concat();
        for bytes in [
            message(0, &[&digest_of(0, false), &cluster]),
            message(0, &[&digest_of(3, true), &cluster]),
            message(0, &[&digest_of(MAX_NODES, true), &cluster]),
            message(1, &[&digest_of(2, false), &block(2, &news()), &[0]]),
            message(2, &[&[0]]),
            message(3, &[]),
        ] {
            let read = read(&bytes).unwrap();
            assert_eq!(read.serialized_len(), bytes.len(), "{read:?}");
        }
    }

    #[test]
    fn a_message_cut_off_anywhere_is_malformed() {
        let bytes = message(1, &[&digest_of(2, true), &block(2, &news()), &[0]]);
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn what_would_cost_too_much_is_not_read() {
        let cluster = [&1_u16.to_le_bytes()[..], b"c"].concat();
        let crowd = message(0, &[&digest_of(MAX_NODES + 1, false), &cluster]);
        assert_eq!(check(&crowd), Err(Malformed));
        // A bomb: each of these few bytes becomes 64 KiB. Blocks are checked before any is decompressed.
        let bomb = block(1, &[0x28, 0xb5, 0x2f, 0xfd]);
        assert_eq!(
            check(&message(2, &[&bomb.repeat(MAX_BLOCKS + 1), &[0]])),
            Err(Malformed)
        );
        assert_eq!(check(&message(2, &[&bomb.repeat(MAX_BLOCKS), &[0]])), Ok(()));
        assert!(read(&message(2, &[&bomb, &[0]])).is_err());
        let long = "9".repeat(MAX_ID_BYTES + 1);
        let digest = [&1_u16.to_le_bytes()[..], &node(&long, false)].concat();
        assert_eq!(check(&message(0, &[&digest, &cluster])), Err(Malformed));
    }

    #[test]
    fn other_types_and_magics_are_malformed() {
        assert!(read(&message(4, &[])).is_err());
        assert!(read(&[0, 0, 0, 3]).is_err());
        assert!(read(&[0x53, 0xb0, 1, 3]).is_err());
        assert!(read(&message(2, &[&[3]])).is_err());
    }
}
