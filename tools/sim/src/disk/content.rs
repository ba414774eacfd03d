//! The bytes of a file: sparse, in blocks that copies share until one of them changes.

use std::collections::BTreeMap;
use std::rc::Rc;

use generation_node::env::disk::BLOCK_BYTES;

/// What a disk writes whole or not at all.
pub(crate) const SECTOR_BYTES: usize = 512;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(SECTOR_BYTES), "a block is torn at sectors");

/// A file's bytes. What was never written reads as zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Content {
    len: u64,
    blocks: BTreeMap<u64, Rc<[u8; BLOCK_BYTES]>>,
}

impl Content {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Makes the file longer, or cuts it.
    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.blocks.split_off(&len.div_ceil(BLOCK_BYTES as u64));
            let rest = (len % BLOCK_BYTES as u64) as usize;
            if rest > 0
                && let Some(block) = self.blocks.get_mut(&(len / BLOCK_BYTES as u64))
            {
                Rc::make_mut(block)[rest..].fill(0);
            }
        }
        self.len = len;
    }

    /// Reads `len` bytes from `offset`, fewer where the file ends.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = self.len.min(offset.saturating_add(len as u64));
        let mut bytes = Vec::with_capacity(end.saturating_sub(offset) as usize);
        let mut at = offset;
        while at < end {
            let (number, inside) = place(at);
            let take = (BLOCK_BYTES - inside).min((end - at) as usize);
            match self.blocks.get(&number) {
                Some(block) => bytes.extend_from_slice(&block[inside..inside + take]),
                None => bytes.resize(bytes.len() + take, 0),
            }
            at += take as u64;
        }
        bytes
    }

    /// Writes `bytes` at `offset`; the file grows if they end past it.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (number, inside) = place(offset + done as u64);
            let take = (BLOCK_BYTES - inside).min(bytes.len() - done);
            let block = self.blocks.entry(number).or_insert_with(|| Rc::new([0; BLOCK_BYTES]));
            Rc::make_mut(block)[inside..inside + take].copy_from_slice(&bytes[done..done + take]);
            done += take;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }
}

/// The block of an offset, and the place in it.
fn place(offset: u64) -> (u64, usize) {
    (offset / BLOCK_BYTES as u64, (offset % BLOCK_BYTES as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Dice;

    #[test]
    fn reads_and_writes_as_a_plain_vector_does() {
        let mut dice = Dice::new(1);
        for _ in 0..50 {
            let (mut content, mut model) = (Content::default(), Vec::new());
            for _ in 0..40 {
                let offset = dice.below(20_000);
                let len = dice.below(9_000) as usize;
                match dice.below(4) {
                    0 => {
                        content.set_len(offset);
                        model.resize(offset as usize, 0);
                    }
                    1 if len > 0 => {
                        let mut bytes = vec![0; len];
                        dice.fill(&mut bytes);
                        content.write(offset, &bytes);
                        let end = offset as usize + len;
                        model.resize(model.len().max(end), 0);
                        model[offset as usize..end].copy_from_slice(&bytes);
                    }
                    _ => {
                        let end = model.len().min(offset as usize + len);
                        let expected = model.get(offset as usize..end).unwrap_or_default();
                        assert_eq!(content.read(offset, len), expected);
                    }
                }
                assert_eq!(content.len(), model.len() as u64);
            }
            assert_eq!(content.read(0, usize::MAX >> 1), model);
        }
    }
}
