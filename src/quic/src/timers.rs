//! One timer per connection, all of a core in one binary heap.
//!
//! A connection's deadline moves with every packet, almost always to later. So the heap is allowed to hold a deadline that is
//! too early: it is corrected when it comes up. Each connection has at most one entry, whose place is kept, so an earlier
//! deadline moves it up instead of adding a second one and the heap never holds garbage.

use std::time::Instant;

const ABSENT: u32 = u32::MAX;

#[derive(Debug, Default)]
pub(crate) struct Timers {
    /// Binary heap by deadline.
    heap: Vec<(Instant, u32)>,
    /// Slot to place in the heap, or `ABSENT`.
    places: Vec<u32>,
}

impl Timers {
    /// The earliest deadline held, which may be earlier than its connection's real one.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.first().map(|&(at, _)| at)
    }

    /// Makes sure that `slot` comes up at `at` or before.
    pub(crate) fn arm(&mut self, slot: u32, at: Instant) {
        if self.places.len() <= slot as usize {
            self.places.resize(slot as usize + 1, ABSENT);
        }
        let place = self.places[slot as usize];
        if place == ABSENT {
            let place = self.heap.len();
            self.heap.push((at, slot));
            self.places[slot as usize] = place as u32;
            self.up(place);
        } else if at < self.heap[place as usize].0 {
            self.heap[place as usize].0 = at;
            self.up(place as usize);
        }
    }

    /// Forgets `slot`.
    pub(crate) fn disarm(&mut self, slot: u32) {
        let Some(&place) = self.places.get(slot as usize) else {
            return;
        };
        if place != ABSENT {
            self.remove(place as usize);
        }
    }

    /// Takes out one slot whose entry is due at `now`.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<u32> {
        let &(at, slot) = self.heap.first()?;
        if at > now {
            return None;
        }
        self.remove(0);
        Some(slot)
    }

    fn remove(&mut self, place: usize) {
        let (_, slot) = self.heap.swap_remove(place);
        self.places[slot as usize] = ABSENT;
        if place < self.heap.len() {
            self.places[self.heap[place].1 as usize] = place as u32;
            self.down(place);
            self.up(place);
        }
    }

    fn up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.heap[parent].0 <= self.heap[place].0 {
                break;
            }
            self.swap(place, parent);
            place = parent;
        }
    }

    fn down(&mut self, mut place: usize) {
        loop {
            let left = 2 * place + 1;
            let right = left + 1;
            let mut least = place;
            if left < self.heap.len() && self.heap[left].0 < self.heap[least].0 {
                least = left;
            }
            if right < self.heap.len() && self.heap[right].0 < self.heap[least].0 {
                least = right;
            }
            if least == place {
                break;
            }
            self.swap(place, least);
            place = least;
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.places[self.heap[a].1 as usize] = a as u32;
        self.places[self.heap[b].1 as usize] = b as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Arm(u32, u64),
        Disarm(u32),
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..24_u32, 0..200_u64).prop_map(|(slot, at)| Step::Arm(slot, at)),
            (0..24_u32).prop_map(Step::Disarm),
            (0..40_u64).prop_map(Step::Advance),
        ]
    }

    #[allow(clippy::disallowed_methods, reason = "a test's clock has to begin somewhere")]
    fn base() -> Instant {
        Instant::now()
    }

    proptest! {
        /// Against a plain map: what is due comes out, in order, nothing else does.
        #[test]
        fn behaves_like_a_map(steps in prop::collection::vec(step(), 0..200)) {
            let base = base();
            let mut now = 0;
            let mut timers = Timers::default();
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Arm(slot, after) => {
                        let at = now + after;
                        timers.arm(slot, base + Duration::from_millis(at));
                        let held = model.entry(slot).or_insert(at);
                        *held = at.min(*held);
                    }
                    Step::Disarm(slot) => {
                        timers.disarm(slot);
                        model.remove(&slot);
                    }
                    Step::Advance(by) => {
                        now += by;
                        let mut last = 0;
                        while let Some(slot) = timers.pop_due(base + Duration::from_millis(now)) {
                            let at = model.remove(&slot).expect("armed");
                            prop_assert!(at <= now && at >= last);
                            last = at;
                        }
                        prop_assert!(model.values().all(|&at| at > now));
                    }
                }
                let least = model.values().min().map(|&at| base + Duration::from_millis(at));
                prop_assert_eq!(timers.next(), least);
            }
        }
    }
}
