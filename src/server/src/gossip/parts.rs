//! Messages longer than a datagram travel in parts, so that no path has to fragment what we send: networks drop fragments.
//!
//! All parts but the last have [`PART_BYTES`]. They have consecutive sequence numbers, so a part's index names its message. A receiver
//! keeps one unfinished message a sender; a part of a later one replaces it.

use super::seal::PART_BYTES;

/// Most parts of a message.
pub(super) const MAX_PARTS: usize = 64;

/// Longest message, in bytes.
pub(super) const MAX_MESSAGE_BYTES: usize = MAX_PARTS * PART_BYTES;

/// Which part of its message a datagram is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// From 0.
    pub(super) index: u8,
    /// How many the message has.
    pub(super) count: u8,
    /// The datagram's sequence number.
    pub(super) sequence: u64,
}

impl Part {
    /// Whether there can be such a part with `len` bytes.
    pub(super) fn is_possible(self, len: usize) -> bool {
        let (index, count) = (usize::from(self.index), usize::from(self.count));
        let fits = if index + 1 == count {
            (1..=PART_BYTES).contains(&len)
        } else {
            len == PART_BYTES
        };
        index < count && count <= MAX_PARTS && self.sequence > u64::from(self.index) && fits
    }

    /// Names the message: the sequence number of its first part.
    fn message(self) -> u64 {
        self.sequence - u64::from(self.index)
    }
}

/// A message of which not all parts are there.
#[derive(Debug)]
pub(super) struct Assembly {
    message: u64,
    count: u8,
    /// A bit for each part that is there.
    present: u64,
    bytes: Vec<u8>,
}

const _: () = assert!(MAX_PARTS <= u64::BITS as usize, "`present` has a bit for each part");

impl Assembly {
    /// Adds a part of several to what is there; the whole message once it is complete. `part` is possible, and was not added before.
    pub(super) fn add(unfinished: &mut Option<Self>, part: Part, bytes: &[u8]) -> Option<Vec<u8>> {
        let message = part.message();
        match unfinished {
            Some(assembly) if assembly.message > message => return None,
            // Of one message all parts say the same count: they are one sender's.
            Some(assembly) if assembly.message == message && assembly.count == part.count => {}
            _ => {
                *unfinished = Some(Self {
                    message,
                    count: part.count,
                    present: 0,
                    bytes: vec![0; usize::from(part.count) * PART_BYTES],
                });
            }
        }
        let assembly = unfinished.as_mut()?;
        let start = usize::from(part.index) * PART_BYTES;
        assembly.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        if part.index + 1 == part.count {
            assembly.bytes.truncate(start + bytes.len());
        }
        assembly.present |= 1 << part.index;
        if assembly.present.count_ones() < u32::from(assembly.count) {
            return None;
        }
        unfinished.take().map(|assembly| assembly.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of a message whose first has this sequence number, with the bytes of each.
    fn parts(message: &[u8], first: u64) -> Vec<(Part, Vec<u8>)> {
        let chunks: Vec<&[u8]> = message.chunks(PART_BYTES).collect();
        let count = chunks.len() as u8;
        let part = |(index, bytes): (usize, &&[u8])| {
            let part = Part {
                index: index as u8,
                count,
                sequence: first + index as u64,
            };
            assert!(part.is_possible(bytes.len()));
            (part, bytes.to_vec())
        };
        chunks.iter().enumerate().map(part).collect()
    }

    fn message(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    #[test]
    fn parts_in_any_order_make_the_message() {
        for len in [PART_BYTES + 1, 2 * PART_BYTES, 5 * PART_BYTES - 7, MAX_MESSAGE_BYTES] {
            let message = message(len);
            let mut parts = parts(&message, 100);
            for _ in 0..2 {
                parts.reverse();
                let mut unfinished = None;
                let (last, others) = parts.split_last().unwrap();
                for (part, bytes) in others {
                    assert_eq!(Assembly::add(&mut unfinished, *part, bytes), None);
                }
                assert_eq!(Assembly::add(&mut unfinished, last.0, &last.1), Some(message.clone()));
                assert!(unfinished.is_none());
            }
        }
    }

    #[test]
    fn a_later_message_replaces_an_unfinished_one_and_not_the_other_way_round() {
        let (old, new) = (message(3 * PART_BYTES), message(2 * PART_BYTES));
        let (old_parts, new_parts) = (parts(&old, 10), parts(&new, 20));
        let mut unfinished = None;
        let mut add = |(part, bytes): &(Part, Vec<u8>)| Assembly::add(&mut unfinished, *part, bytes);
        assert_eq!(add(&old_parts[0]), None);
        assert_eq!(add(&old_parts[1]), None);
        assert_eq!(add(&new_parts[1]), None);
        assert_eq!(add(&old_parts[2]), None);
        assert_eq!(add(&new_parts[0]), Some(new));
    }

    #[test]
    fn impossible_parts_are_known() {
        let part = |index, count, sequence| Part { index, count, sequence };
        for (part, len) in [
            (part(0, 0, 5), 1),
            (part(1, 1, 5), 1),
            (part(0, 1, 5), 0),
            (part(0, 1, 5), PART_BYTES + 1),
            (part(0, 2, 5), PART_BYTES - 1),
            (part(1, 2, 1), 1),
            (part(0, 65, 5), PART_BYTES),
            (part(255, 0, 500), 1),
        ] {
            assert!(!part.is_possible(len), "{part:?} of {len} bytes");
        }
    }
}
