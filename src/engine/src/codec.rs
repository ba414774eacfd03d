//! Reading and writing little-endian fields, shared by the formats of this crate.
//!
//! A [`Reader`] never panics: what is missing comes back as `None`, and the caller, who knows which format and where, turns that
//! into its own error.

use crate::version::Version;

/// Takes fields off the front of a slice.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*taken)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Option<u128> {
        self.array().map(u128::from_le_bytes)
    }

    pub(crate) fn version(&mut self) -> Option<Version> {
        self.u64().map(Version::from)
    }
}

/// The little-endian `u32` at `offset`.
///
/// # Panics
/// If `bytes` is too short: for blocks whose length has been checked.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes[offset..].first_chunk();
    u32::from_le_bytes(*field.expect("invariant: the caller has checked the length of the block"))
}

/// The little-endian `u64` at `offset`.
///
/// # Panics
/// If `bytes` is too short: for blocks whose length has been checked.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes[offset..].first_chunk();
    u64::from_le_bytes(*field.expect("invariant: the caller has checked the length of the block"))
}

/// Overwrites the field at `offset`, which must lie inside `bytes`.
pub(crate) fn put_at<const N: usize>(bytes: &mut [u8], offset: usize, field: [u8; N]) {
    bytes[offset..offset + N].copy_from_slice(&field);
}
