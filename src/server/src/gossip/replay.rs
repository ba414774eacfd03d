//! Which datagrams of a sender's start were seen before: a window of sequence numbers (RFC 6479).

/// Words of the bitmap.
const WORDS: u64 = 16;
/// Sequence numbers a word covers.
const WORD_BITS: u64 = u64::BITS as u64;

/// How far behind the highest sequence number a datagram may be: what is older counts as seen.
pub(super) const WINDOW: u64 = (WORDS - 1) * WORD_BITS;

/// The sequence numbers seen, as far as that matters. They begin at 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReplayWindow {
    highest: u64,
    /// A ring: the word of a sequence number is its number of words modulo [`WORDS`].
    seen: [u64; WORDS as usize],
}

impl ReplayWindow {
    /// Nothing was seen yet.
    pub(super) const fn new() -> Self {
        Self {
            highest: 0,
            seen: [0; WORDS as usize],
        }
    }

    const fn place(sequence: u64) -> (usize, u64) {
        (((sequence / WORD_BITS) % WORDS) as usize, 1 << (sequence % WORD_BITS))
    }

    /// Whether it was not seen and is not too old to tell.
    pub(super) fn is_new(&self, sequence: u64) -> bool {
        if sequence == 0 {
            return false;
        }
        if sequence > self.highest {
            return true;
        }
        let (word, bit) = Self::place(sequence);
        // Within the window a word of the ring stands for one word of numbers only.
        self.highest - sequence <= WINDOW && self.seen[word] & bit == 0
    }

    /// Takes note of one that was new. Only for what is authentic: a forged number would move the window past genuine ones.
    pub(super) fn see(&mut self, sequence: u64) {
        debug_assert!(self.is_new(sequence), "sequence {sequence} was seen before");
        let (before, after) = (self.highest / WORD_BITS, sequence / WORD_BITS);
        for word in before.saturating_add(1)..=after.min(before.saturating_add(WORDS)) {
            self.seen[(word % WORDS) as usize] = 0;
        }
        self.highest = self.highest.max(sequence);
        let (word, bit) = Self::place(sequence);
        self.seen[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_new_twice_and_nothing_within_the_window_is_refused(
            steps in prop::collection::vec((0_u64..3_000, any::<bool>(), any::<bool>()), 1..400),
            start in prop_oneof![Just(0), Just(u64::MAX - 600_000), 0_u64..1 << 40],
        ) {
            let mut window = ReplayWindow::new();
            let mut seen = BTreeSet::new();
            let mut highest = 0;
            for (step, back, near) in steps {
                let step = if near { step % 80 } else { step };
                let base = highest.max(start);
                let sequence = if back { base.saturating_sub(step) } else { base + step };
                let new = window.is_new(sequence);
                prop_assert!(!(new && seen.contains(&sequence)), "{sequence} was new twice");
                if sequence > 0 && !seen.contains(&sequence) && sequence + WINDOW >= highest {
                    prop_assert!(new, "{sequence} is within the window of {highest} and was refused");
                }
                if new {
                    window.see(sequence);
                    seen.insert(sequence);
                    highest = highest.max(sequence);
                }
            }
        }
    }

    #[test]
    fn a_jump_past_the_window_leaves_nothing_of_it() {
        let mut window = ReplayWindow::new();
        assert!(!window.is_new(0));
        for sequence in 1..=64 {
            window.see(sequence);
        }
        window.see(1 << 40);
        assert!(!window.is_new(64) && !window.is_new(1 << 40));
        assert!(window.is_new((1 << 40) - 63) && window.is_new((1 << 40) + 1));
    }
}
