//! Whether wall clocks are right, by each other: a clock that is far from the median of all of them is wrong, whoever's it is.
//!
//! A leader stamps what it writes with its clock, and shard time never goes back: one that is ahead ends times to live too early for
//! everybody, for good. So a node whose clock is off does not lead (`leadership`).
//!
//! # What holds
//! - **Two clocks that differ accuse nobody**: a clock is wrong only by the word of more than half of all that are known.
//! - A clock that was wrong is right again only well within the bound, so that one at the bound does not go back and forth.
//!
//! Pure: offsets come in, a verdict comes out.

/// Milliseconds by which a clock may differ from the median.
pub(crate) const TOLERATED_MS: u64 = 1_000;

/// Milliseconds within which one that was wrong counts as right again.
const RIGHT_MS: u64 = 750;

/// What is known of the clocks of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clocks {
    /// How far this node's clock is ahead of the median (negative: behind), in milliseconds.
    pub skew_ms: i64,
    /// The nodes whose clocks are wrong, this one's own among them if it is.
    pub wrong: Vec<u64>,
}

impl Clocks {
    /// Judges by how far the clocks of other nodes are ahead of that of node `own`, in milliseconds.
    pub(crate) fn judge(&mut self, own: u64, offsets: &[(u64, i64)]) {
        let mut all: Vec<(u64, i64)> = offsets.to_vec();
        all.push((own, 0));
        let mut sorted: Vec<i64> = all.iter().map(|(_, offset)| *offset).collect();
        sorted.sort_unstable();
        // Of an even number of clocks either middle one may be right: everybody is judged by the nearer.
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        let skew = |offset: i64| offset.saturating_sub(offset.clamp(low, high));
        self.skew_ms = skew(0);
        let before = std::mem::take(&mut self.wrong);
        let wrong = all.iter().filter(|(node, offset)| {
            let bound = if before.contains(node) { RIGHT_MS } else { TOLERATED_MS };
            skew(*offset).unsigned_abs() > bound
        });
        self.wrong = wrong.map(|(node, _)| *node).collect();
        self.wrong.sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(offsets: &[(u64, i64)]) -> Clocks {
        let mut clocks = Clocks::default();
        clocks.judge(1, offsets);
        clocks
    }

    fn clocks(skew_ms: i64, wrong: &[u64]) -> Clocks {
        let wrong = wrong.to_vec();
        Clocks { skew_ms, wrong }
    }

    #[test]
    fn the_one_that_differs_from_the_others_is_wrong_and_all_of_them_say_so() {
        for off in [5_000, -5_000] {
            // As the one that is off sees it, and as one of the others does.
            let accused = judged(&[(2, -off), (3, -off)]);
            assert_eq!(accused, clocks(off, &[1]));
            assert_eq!(judged(&[(2, 0), (3, off)]), clocks(0, &[3]));
        }
        assert_eq!(judged(&[(2, 400), (3, -400)]), clocks(0, &[]));
        assert_eq!(judged(&[(2, 1_000), (3, 0)]), clocks(0, &[]));
        assert_eq!(judged(&[(2, 1_001), (3, 0)]), clocks(0, &[2]));
    }

    #[test]
    fn fewer_than_three_clocks_accuse_nobody() {
        assert_eq!(judged(&[]), clocks(0, &[]));
        assert_eq!(judged(&[(2, 90_000)]), clocks(0, &[]));
        // Nor do two pairs.
        assert_eq!(judged(&[(2, 0), (3, 9_000), (4, 9_000)]), clocks(0, &[]));
        assert_eq!(judged(&[(2, 0), (3, 0), (4, 9_000), (5, 9_000)]), clocks(0, &[4, 5]));
    }

    #[test]
    fn one_at_the_bound_does_not_go_back_and_forth() {
        let mut clocks = judged(&[(2, -1_100), (3, -1_100)]);
        for (offset, is_wrong) in [(-900, true), (-751, true), (-750, false), (-900, false), (-1_001, true)] {
            clocks.judge(1, &[(2, offset), (3, offset)]);
            assert_eq!(clocks.wrong.contains(&1), is_wrong, "{offset}");
            assert_eq!(clocks.skew_ms, -offset);
        }
    }

    #[test]
    fn clocks_at_the_ends_of_time_are_only_wrong() {
        let clocks = judged(&[(2, i64::MIN), (3, i64::MAX), (4, 0)]);
        assert_eq!(clocks.wrong, [2, 3]);
    }
}
