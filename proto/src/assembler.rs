//! A byte stream, in whatever pieces it arrives, taken apart into headers of a fixed size and the payloads they announce.
//!
//! What a header means is the caller's: [`Assembler::next`] asks it, as soon as the header is there and before any payload is
//! kept, how many bytes follow.

use bytes::{Buf, Bytes, BytesMut};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Most bytes reserved for a message of which only a header has arrived. Beyond it memory grows in proportion to what arrives, so
/// a peer cannot make a node reserve megabytes by sending 16 bytes.
const MAX_RESERVE: usize = 4 << 10;

/// Fewest bytes reserved for an unfinished message: most requests fit, so that one cut inside its header is allocated for once.
const MIN_RESERVE: usize = 256;

/// What of a stream has arrived and is not given out.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// What arrived before `piece` and is not given out: the begin of an unfinished message, or more where pieces were fed
    /// without being drained. Empty between messages otherwise.
    partial: BytesMut,
    /// The piece being taken apart.
    piece: Bytes,
}

impl Assembler {
    /// Takes the next piece of the stream.
    pub(crate) fn feed(&mut self, piece: Bytes) {
        // Fed twice without draining: what is there goes first, at the end of a buffer that grows by doubling.
        self.partial.extend_from_slice(&self.piece);
        self.piece = piece;
    }

    /// Bytes held.
    pub(crate) fn buffered_len(&self) -> usize {
        self.partial.len() + self.piece.len()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The next header with its payload, or `None` when more bytes are needed. `payload_len` says for a header how many bytes
    /// follow it, or that it is not legal; it may be asked more than once about the same header.
    #[inline]
    pub(crate) fn next<H, E>(&mut self, payload_len: impl Fn(&H) -> Result<u32, E>) -> Result<Option<(H, Bytes)>, E>
    where
        H: FromBytes + Immutable + KnownLayout + Unaligned + Copy,
    {
        if self.partial.is_empty()
            && let Ok((header, _)) = H::ref_from_prefix(&self.piece)
            && let Ok(len) = payload_len(header)
            && let Some(end) = size_of::<H>().checked_add(len as usize)
            && end <= self.piece.len()
        {
            // The usual case: a message that lies whole in the current piece.
            let header = *header;
            let mut payload = self.piece.split_to(end);
            payload.advance(size_of::<H>());
            return Ok(Some((header, payload)));
        }
        self.next_slow(payload_len)
    }

    /// A message that is not whole in the current piece, or is not legal. Copies what the first message lacks in `partial`, and
    /// no more, so that the messages after it are taken from their piece.
    fn next_slow<H, E>(&mut self, payload_len: impl Fn(&H) -> Result<u32, E>) -> Result<Option<(H, Bytes)>, E>
    where
        H: FromBytes + Immutable + KnownLayout + Unaligned + Copy,
    {
        let header_len = size_of::<H>();
        if self.buffered_len() == 0 || !self.fill_partial(header_len) {
            return Ok(None);
        }
        let Ok((header, _)) = H::read_from_prefix(&self.partial) else {
            unreachable!("it was filled to a header's length");
        };
        let end = header_len + payload_len(&header)? as usize;
        if !self.fill_partial(end) {
            return Ok(None);
        }
        let mut payload = if self.partial.len() == end {
            // The message takes the allocation with it: a stream that is idle from now on keeps nothing.
            std::mem::take(&mut self.partial)
        } else {
            self.partial.split_to(end)
        };
        payload.advance(header_len);
        Ok(Some((header, payload.freeze())))
    }

    /// Moves bytes from the piece until `partial` has `len`; `false` when the piece ran out first.
    fn fill_partial(&mut self, len: usize) -> bool {
        let lacking = len.saturating_sub(self.partial.len()).min(self.piece.len());
        if lacking > 0 {
            let kept = self.partial.len() + lacking;
            if self.partial.capacity() < kept {
                // Twice what is there, so that a message in many pieces is copied a bounded number of times, but no more than
                // the message needs.
                let ahead = (2 * kept).max(MAX_RESERVE).min(len.max(MIN_RESERVE));
                self.partial.reserve(ahead - self.partial.len());
            }
            self.partial.extend_from_slice(&self.piece[..lacking]);
            self.piece.advance(lacking);
        }
        if self.piece.is_empty() {
            // The receive buffer behind it can go.
            self.piece = Bytes::new();
        }
        self.partial.len() >= len
    }
}
