//! Memory from the operating system, in chunks of 2 MiB: aligned, zeroed, resident only where touched, given back when dropped.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// The size and alignment of a chunk: a huge page of the usual processors.
pub(crate) const CHUNK_BYTES: usize = 2 << 20;

/// One chunk. It derefs to its bytes, which start out zero.
pub(crate) struct Chunk {
    map: Map,
    /// Where the aligned bytes begin inside the mapping.
    start: usize,
}

#[cfg(not(miri))]
type Map = memmap2::MmapMut;
/// Miri has no huge pages and maps slowly; what it checks is what is built on top.
#[cfg(miri)]
type Map = Vec<u8>;

impl Chunk {
    /// A zeroed chunk. `huge` asks the kernel for a huge page behind it: fewer misses of the TLB, but all of it is resident from
    /// the first touch.
    ///
    /// Like every allocation of the standard library, it aborts when the system has no memory: the engine's budget, not the
    /// kernel's refusal, is what bounds a shard.
    pub(crate) fn new(huge: bool) -> Self {
        let map = Self::map();
        let start = map.as_ptr().align_offset(CHUNK_BYTES);
        let chunk = Self { map, start };
        if huge {
            chunk.advise_huge();
        }
        chunk
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

    #[cfg(all(target_os = "linux", not(miri)))]
    fn advise_huge(&self) {
        // Advice: a kernel built without huge pages refuses, and nothing but speed is lost. It is for the whole mapping, so that
        // neighbouring mappings are alike and the kernel joins them: their number is limited (`vm.max_map_count`).
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    #[cfg(any(not(target_os = "linux"), miri))]
    #[allow(clippy::unused_self, reason = "the same signature on every system")]
    fn advise_huge(&self) {}
}

impl Deref for Chunk {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + CHUNK_BYTES]
    }
}

impl DerefMut for Chunk {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + CHUNK_BYTES]
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
            let mut chunk = Chunk::new(huge);
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
