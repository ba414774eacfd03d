//! What the processor can do beyond the language: compare 16 bytes at once, and fetch memory ahead of its use. Elsewhere
//! than on x86-64 the unsafe code here is not needed.

/// A cache line of the usual processors.
const LINE_BYTES: usize = 64;

/// What [`prefetch_bytes`] asks for at most.
const PREFETCHED_BYTES: usize = 3 * LINE_BYTES;

/// Asks for the cache line that holds the first byte of `target`. It changes nothing but timing.
#[inline]
pub(crate) fn prefetch<T>(target: &T) {
    prefetch_at(std::ptr::from_ref(target).cast());
}

/// Asks for all cache lines of `bytes`, at most the first [`PREFETCHED_BYTES`] of them.
#[inline]
pub(crate) fn prefetch_bytes(bytes: &[u8]) {
    let last = bytes.len().clamp(1, PREFETCHED_BYTES) - 1;
    for at in [0, LINE_BYTES, 2 * LINE_BYTES, last] {
        prefetch_at(bytes.as_ptr().wrapping_add(at.min(last)));
    }
}

#[inline]
fn prefetch_at(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, whatever the address, and reads nothing the program can see; the instruction is part of
        // SSE, which every x86-64 processor has.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// A mask of the bytes of `low` (8) and `high` (4) that equal `byte`, the first in the lowest bit.
#[inline]
pub(crate) fn equal_bytes(low: u64, high: u32, byte: u8) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};
        // SAFETY: these read and write registers only; SSE2 is part of every x86-64 processor.
        let mask = unsafe {
            let bytes = _mm_set_epi64x(i64::from(high), low.cast_signed());
            _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte.cast_signed())))
        };
        // The four bytes above `high` are zero.
        mask.cast_unsigned() & 0xfff
    }
    #[cfg(not(target_arch = "x86_64"))]
    portable(low, high, byte)
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn portable(low: u64, high: u32, byte: u8) -> u32 {
    let bytes = low.to_le_bytes().into_iter().chain(high.to_le_bytes());
    (0..)
        .zip(bytes)
        .fold(0, |mask, (at, held)| mask | u32::from(held == byte) << at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_equal_bytes() {
        let mut state = 1u64;
        for _ in 0..2_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Few different bytes, so that many are equal.
            let (low, high) = (state >> 7 & 0x0303_0303_0303_0303, (state >> 40) as u32 & 0x0303_0303);
            for byte in [0, 1, 2, 3, 0xff] {
                assert_eq!(
                    equal_bytes(low, high, byte),
                    portable(low, high, byte),
                    "{low:x} {high:x} {byte}"
                );
            }
        }
        prefetch(&state);
        prefetch_bytes(&[]);
        prefetch_bytes(&[0; 500]);
    }
}
