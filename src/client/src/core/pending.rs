//! Requests that wait for their replies, by request id.

use slab::Slab;

/// A table of unanswered requests.
///
/// An id is a slot (low 32 bits) and a generation (high 32 bits) that differs each time the slot is used, so a reply that comes
/// after its request was given up finds nothing, even when the slot is in use again. A generation comes back after 2³² uses of
/// the table, which no reply outlives.
#[derive(Debug)]
pub struct Pending<T> {
    slots: Slab<(u32, T)>,
    generation: u32,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Self {
            slots: Slab::new(),
            generation: 0,
        }
    }
}

impl<T> Pending<T> {
    /// The id the next [`Pending::insert`] will give. Far fewer than 2³² requests are unanswered at a time.
    pub fn next_id(&self) -> u64 {
        let slot = self.slots.vacant_key() as u32;
        u64::from(self.generation) << 32 | u64::from(slot)
    }

    /// Adds a request and gives its id.
    pub fn insert(&mut self, request: T) -> u64 {
        let id = self.next_id();
        self.slots.insert((self.generation, request));
        self.generation = self.generation.wrapping_add(1);
        id
    }

    /// The request of an id, if it is still there.
    pub fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        match self.slots.get_mut(slot_of(id)) {
            Some((generation, request)) if *generation == generation_of(id) => Some(request),
            _ => None,
        }
    }

    /// Takes the request of an id out, if it is still there.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        self.get_mut(id)?;
        Some(self.slots.remove(slot_of(id)).1)
    }

    /// All requests.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().map(|(_, (_, request))| request)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

const fn slot_of(id: u64) -> usize {
    id as u32 as usize
}

const fn generation_of(id: u64) -> u32 {
    (id >> 32) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a map from id to request, in which an id that was removed stays unknown.
        #[test]
        fn requests_are_found_by_their_id_until_they_are_removed(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200)) {
            let mut pending = Pending::default();
            let mut model = BTreeMap::new();
            let mut given = Vec::new();
            for (n, (insert, which)) in steps.into_iter().enumerate() {
                if insert || given.is_empty() {
                    let id = pending.insert(n);
                    prop_assert_eq!(model.insert(id, n), None, "an id is given once");
                    given.push(id);
                } else {
                    let id = *which.get(&given);
                    prop_assert_eq!(pending.get_mut(id).copied(), model.get(&id).copied());
                    prop_assert_eq!(pending.remove(id), model.remove(&id));
                }
                prop_assert_eq!(pending.len(), model.len());
            }
        }
    }

    #[test]
    fn a_late_reply_finds_nothing_even_when_the_slot_is_in_use_again() {
        let mut pending = Pending::default();
        let first = pending.insert("first");
        assert_eq!(pending.remove(first), Some("first"));
        assert_eq!(pending.next_id() as u32, first as u32, "the slot is used again");
        let second = pending.insert("second");
        assert_eq!(pending.get_mut(first), None);
        assert_eq!(pending.remove(first), None);
        assert_eq!(pending.get_mut(second), Some(&mut "second"));
        assert_eq!(pending.get_mut(u64::MAX), None);
        assert_eq!(pending.len(), 1);
    }
}
