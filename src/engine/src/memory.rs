//! Memory from the operating system, in chunks of 2 MiB: aligned, zeroed, resident only where touched, given back when dropped.
//!
//! Unsafe code here keeps a pointer to the aligned part of a mapping beside the mapping itself, so that reaching a byte takes one
//! load and no arithmetic on the way of every lookup, and asks the kernel for a huge page.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// The size and alignment of a chunk: a huge page of the usual processors.
pub(crate) const CHUNK_BYTES: usize = 2 << 20;

/// The bytes of a chunk.
pub(crate) type Bytes = [u8; CHUNK_BYTES];

/// One chunk. It derefs to its bytes, which start out zero.
pub(crate) struct Chunk {
    /// The aligned bytes inside `map`. Nothing else refers to them as long as this chunk lives.
    bytes: NonNull<Bytes>,
    /// Keeps the bytes mapped; not touched again.
    #[cfg_attr(any(not(target_os = "linux"), miri), expect(dead_code, reason = "held for its drop"))]
    map: Map,
}

// SAFETY: a chunk owns its bytes alone, as a `Box<[u8]>` does, and reaches them through `&self` or `&mut self` only.
unsafe impl Send for Chunk {}

#[cfg(not(miri))]
type Map = memmap2::MmapMut;
/// Miri has no huge pages and maps slowly; what it checks is what is built on top.
#[cfg(miri)]
type Map = Vec<u8>;

impl Chunk {
    /// A zeroed chunk.
    ///
    /// Like every allocation of the standard library, it aborts when the system has no memory: the engine's budget, not the
    /// kernel's refusal, is what bounds a shard.
    pub(crate) fn new() -> Self {
        let mut map = Self::map();
        let start = map.as_ptr().align_offset(CHUNK_BYTES);
        let bytes = <&mut Bytes>::try_from(&mut map[start..start + CHUNK_BYTES]);
        let bytes = NonNull::from(bytes.expect("invariant: the slice has this length"));
        Self { bytes, map }
    }

    /// Lets the kernel put a huge page behind the chunk when it finds the time. Meant for chunks that are touched all over, which
    /// grow by nothing then.
    #[cfg(all(target_os = "linux", not(miri)))]
    pub(crate) fn allow_huge(&self) {
        // Advice: a kernel built without huge pages refuses, and nothing but speed is lost. It is for the whole mapping, so that
        // neighbouring mappings are alike and the kernel joins them: their number is limited (`vm.max_map_count`).
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    #[cfg(any(not(target_os = "linux"), miri))]
    #[allow(clippy::unused_self, reason = "the same signature on every system")]
    pub(crate) fn allow_huge(&self) {}

    /// Puts a huge page behind the chunk, what is in it included: fewer misses of the TLB, but all of it is resident from then on.
    /// It takes as long as copying the chunk, and several milliseconds where a hypervisor has to find the memory first: a step for
    /// when nobody waits. `false` if the kernel has none to give, or does not know how.
    #[cfg(all(target_os = "linux", not(miri)))]
    pub(crate) fn make_huge(&mut self) -> bool {
        /// Since Linux 6.1.
        const MADV_COLLAPSE: libc::c_int = 25;
        let start = self.bytes.as_ptr().cast();
        // SAFETY: the range is mapped, page-aligned and owned by this chunk; collapsing it leaves its contents as they are.
        unsafe { libc::madvise(start, CHUNK_BYTES, MADV_COLLAPSE) == 0 }
    }

    #[cfg(any(not(target_os = "linux"), miri))]
    #[allow(clippy::unused_self, reason = "the same signature on every system")]
    pub(crate) fn make_huge(&mut self) -> bool {
        false
    }

    #[cfg(not(miri))]
    fn map() -> Map {
        // Twice the size, so that an aligned chunk is inside; what is never touched takes address space only.
        let len_bytes = 2 * CHUNK_BYTES;
        memmap2::MmapMut::map_anon(len_bytes).unwrap_or_else(|_| {
            let layout = std::alloc::Layout::from_size_align(CHUNK_BYTES, CHUNK_BYTES);
            std::alloc::handle_alloc_error(layout.expect("invariant: the size of a chunk is a power of two"))
        })
    }

    #[cfg(miri)]
    fn map() -> Map {
        vec![0; 2 * CHUNK_BYTES]
    }
}

impl Deref for Chunk {
    type Target = Bytes;

    #[inline]
    fn deref(&self) -> &Bytes {
        // SAFETY: the mapping is held by this chunk, its bytes are initialised, and only `&mut self` can write to them.
        unsafe { self.bytes.as_ref() }
    }
}

impl DerefMut for Chunk {
    #[inline]
    fn deref_mut(&mut self) -> &mut Bytes {
        // SAFETY: as above, and `&mut self` is the only way to them.
        unsafe { self.bytes.as_mut() }
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_writable() {
        for huge in [false, true] {
            let mut chunk = Chunk::new();
            chunk[1] = 0;
            if huge {
                chunk.make_huge();
            }
            assert_eq!(chunk.as_ptr().align_offset(CHUNK_BYTES), 0);
            assert_eq!(chunk.len(), CHUNK_BYTES);
            assert!(
                chunk[..4096]
                    .iter()
                    .chain(&chunk[CHUNK_BYTES - 4096..])
                    .all(|&byte| byte == 0)
            );
            chunk[CHUNK_BYTES - 1] = 7;
            assert_eq!(chunk[CHUNK_BYTES - 1], 7);
        }
    }
}
