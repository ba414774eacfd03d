//! Reading fixed-size little-endian parts off the front of a byte slice.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Takes a `T` off the front of `bytes`, borrowed in place. `None` when there are too few bytes.
pub(crate) fn take<'a, T>(bytes: &mut &'a [u8]) -> Option<&'a T>
where
    T: FromBytes + Immutable + KnownLayout + Unaligned,
{
    let (value, rest) = T::ref_from_prefix(bytes).ok()?;
    *bytes = rest;
    Some(value)
}

/// Takes `len` bytes off the front of `bytes`. `None` when there are too few.
pub(crate) fn take_bytes<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(head)
}
