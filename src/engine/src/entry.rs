//! The bytes of one entry in its slot.
//!
//! ```text
//!  0         8       12      16               20
//!  +---------+-------+-------+----------------+-------------+-----+-------+
//!  | version | newer | older | lengths, flags | [expiry: 6] | key | value |
//!  +---------+-------+-------+----------------+-------------+-----+-------+
//!
//!  lengths and flags: 13 bits key length, 13 bits value length, 6 flags
//! ```
//! Little-endian. The expiry is there if the flag says so. If the entry is too large for a slot, its value length is
//! [`ELSEWHERE`], and where the key would be stand the 4-byte number of its extent, which has key and value, and 2 bytes of key
//! length. A free slot has a key length of zero, which no entry has, and in its first two bytes the next free slot of its page.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::classes::{MAX_STRIDE, MIN_STRIDE};

/// Which snapshots have seen it: compared with the store's parity.
pub(crate) const PARITY: u8 = 1 << 2;
/// It was offered for removal.
pub(crate) const OFFERED: u8 = 1 << 3;
/// It has an expiry.
pub(crate) const EXPIRES: u8 = 1 << 4;
/// S3-FIFO: it is in the main queue. LRU: the high bit of its age stamp.
pub(crate) const MAIN: u8 = 1 << 5;
/// S3-FIFO: how often it was asked for, at most 3. LRU: the low bits of its age stamp.
pub(crate) const USES: u8 = 3 << USES_SHIFT;
pub(crate) const USES_SHIFT: u32 = 6;
/// LRU: the same three bits as an age stamp.
pub(crate) const STAMP_SHIFT: u32 = 5;

/// The flags in their byte; the bits below them are the top of the value's length.
const FLAGS: u8 = 0xfc;

const LENGTH_BITS: u32 = 13;
const LENGTH_MASK: u32 = (1 << LENGTH_BITS) - 1;

/// The value length that says that key and value are in an extent.
const ELSEWHERE: u32 = LENGTH_MASK;

const HEADER_BYTES: usize = size_of::<Header>();
const EXPIRY_BYTES: usize = 6;
const EXTENT_BYTES: usize = 6;

const _: () = assert!(HEADER_BYTES == 20);
const _: () = assert!(
    HEADER_BYTES + EXPIRY_BYTES + EXTENT_BYTES <= MIN_STRIDE,
    "an extent's slot is of the first class"
);
const _: () = assert!(
    MAX_STRIDE - HEADER_BYTES < ELSEWHERE as usize,
    "lengths of what fits a slot fit their bits"
);

/// What every entry begins with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) version: U64,
    pub(crate) newer: U32,
    pub(crate) older: U32,
    lengths: [u8; 3],
    flags: u8,
}

impl Header {
    #[inline]
    fn lengths(&self) -> u32 {
        let [a, b, c] = self.lengths;
        u32::from_le_bytes([a, b, c, self.flags])
    }

    /// The length of the key, if it is in the slot.
    #[inline]
    pub(crate) fn key_len(&self) -> usize {
        (self.lengths() & LENGTH_MASK) as usize
    }

    /// The length of the value, if it is in the slot.
    #[inline]
    pub(crate) fn value_len(&self) -> usize {
        (self.lengths() >> LENGTH_BITS & LENGTH_MASK) as usize
    }

    /// Whether key and value are in an extent.
    #[inline]
    pub(crate) fn in_extent(&self) -> bool {
        self.lengths() >> LENGTH_BITS & LENGTH_MASK == ELSEWHERE
    }

    /// Sets the lengths of a key and a value that are in the slot.
    #[inline]
    pub(crate) fn set_lengths(&mut self, key_len: usize, value_len: usize) {
        debug_assert!(inline_bytes(key_len, value_len, false).is_some() && key_len > 0);
        self.put_lengths(key_len as u32, value_len as u32);
    }

    /// Says that key and value are in an extent.
    pub(crate) fn set_in_extent(&mut self) {
        self.put_lengths(1, ELSEWHERE);
    }

    #[inline]
    fn put_lengths(&mut self, key_len: u32, value_len: u32) {
        let [a, b, c, top] = (key_len | value_len << LENGTH_BITS).to_le_bytes();
        self.lengths = [a, b, c];
        self.flags = self.flags & FLAGS | top;
    }

    /// All flags, each in its bit.
    #[inline]
    pub(crate) fn flags(&self) -> u8 {
        self.flags & FLAGS
    }

    #[inline]
    pub(crate) fn set_flags(&mut self, flags: u8) {
        self.flags = self.flags & !FLAGS | flags & FLAGS;
    }

    #[inline]
    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn set(&mut self, flag: u8, on: bool) {
        if on {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
    }

    /// The S3-FIFO use count.
    pub(crate) fn uses(&self) -> u8 {
        self.flags >> USES_SHIFT
    }

    pub(crate) fn set_uses(&mut self, uses: u8) {
        self.flags = self.flags & !USES | uses << USES_SHIFT;
    }

    /// The LRU age stamp, 0 to 7.
    pub(crate) fn stamp(&self) -> u8 {
        self.flags >> STAMP_SHIFT
    }

    pub(crate) fn set_stamp(&mut self, stamp: u8) {
        self.flags = self.flags & ((1 << STAMP_SHIFT) - 1) | stamp << STAMP_SHIFT;
    }

    /// Where the key (or the extent's number) begins.
    #[inline]
    pub(crate) fn body_start(&self) -> usize {
        if self.has(EXPIRES) {
            HEADER_BYTES + EXPIRY_BYTES
        } else {
            HEADER_BYTES
        }
    }
}

#[inline]
pub(crate) fn header(slot: &[u8]) -> &Header {
    let (header, _) = Header::ref_from_prefix(slot).expect("invariant: a slot is larger than a header");
    header
}

#[inline]
pub(crate) fn header_mut(slot: &mut [u8]) -> &mut Header {
    let (header, _) = Header::mut_from_prefix(slot).expect("invariant: a slot is larger than a header");
    header
}

#[inline]
pub(crate) fn is_live(slot: &[u8]) -> bool {
    header(slot).key_len() != 0
}

/// The next free slot of the page, of a free slot.
pub(crate) fn free_next(slot: &[u8]) -> u16 {
    u16::from_le_bytes([slot[0], slot[1]])
}

/// Marks a slot free.
pub(crate) fn set_free(slot: &mut [u8], next: u16) {
    header_mut(slot).put_lengths(0, 0);
    slot[..2].copy_from_slice(&next.to_le_bytes());
}

/// The bytes a slot must have for an entry whose key and value are in it; `None` if they are too large for any slot.
#[inline]
pub(crate) fn inline_bytes(key_len: usize, value_len: usize, expires: bool) -> Option<usize> {
    let len = HEADER_BYTES + if expires { EXPIRY_BYTES } else { 0 } + key_len + value_len;
    (len <= MAX_STRIDE).then_some(len)
}

/// The expiry of an entry, 0 if it has none.
#[inline]
pub(crate) fn expires_at_ms(slot: &[u8]) -> u64 {
    if !header(slot).has(EXPIRES) {
        return 0;
    }
    let mut wide = [0; 8];
    wide[..EXPIRY_BYTES].copy_from_slice(&slot[HEADER_BYTES..HEADER_BYTES + EXPIRY_BYTES]);
    u64::from_le_bytes(wide)
}

/// Writes the expiry of an entry whose flag says that it has one.
pub(crate) fn set_expires_at_ms(slot: &mut [u8], expires_at_ms: u64) {
    slot[HEADER_BYTES..HEADER_BYTES + EXPIRY_BYTES].copy_from_slice(&expires_at_ms.to_le_bytes()[..EXPIRY_BYTES]);
}

/// The number of the extent of an entry that has one, and the length of its key.
#[inline]
pub(crate) fn extent(slot: &[u8]) -> (u32, usize) {
    let start = header(slot).body_start();
    let number = [slot[start], slot[start + 1], slot[start + 2], slot[start + 3]];
    let key_len = [slot[start + 4], slot[start + 5]];
    (u32::from_le_bytes(number), usize::from(u16::from_le_bytes(key_len)))
}

/// Writes the number of an extent, and the length of the key in it, behind a header that has its flags.
pub(crate) fn set_extent(slot: &mut [u8], extent: u32, key_len: usize) {
    let start = header(slot).body_start();
    let key_len = u16::try_from(key_len).expect("invariant: checked against the limit");
    slot[start..start + 4].copy_from_slice(&extent.to_le_bytes());
    slot[start + 4..start + EXTENT_BYTES].copy_from_slice(&key_len.to_le_bytes());
}
