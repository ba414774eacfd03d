//! What is known of the other nodes, and what of it is news.
//!
//! chitchat knows a node once for each of its starts. Here a node is its highest generation that anything was heard of.

use std::collections::{BTreeMap, BTreeSet};

use generation_node::gossip::{Change, Event};

use super::facts;

/// A start of a node, as chitchat names it.
pub(super) type Named = (u64, u64);

/// What is known of the other nodes.
#[derive(Debug)]
pub(super) struct View {
    own: u64,
    nodes: BTreeMap<u64, Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    generation: u64,
    /// What was said last of its liveness.
    alive: bool,
}

impl View {
    /// Of node `own`, which has heard nothing.
    pub(super) fn new(own: u64) -> Self {
        Self {
            own,
            nodes: BTreeMap::new(),
        }
    }

    /// A start has told something. `None`: it is nothing that can be read, or nothing of another node's current start.
    pub(super) fn told(&mut self, (node, generation): Named, key: &str, value: &str) -> Option<Event> {
        if node == self.own || !self.is_current((node, generation)) {
            return None;
        }
        let fact = facts::decode(key, value)?;
        let seen = self.nodes.entry(node).or_default();
        if seen.generation != generation {
            // Whether this start lives is still to be heard.
            *seen = Seen {
                generation,
                alive: false,
            };
        }
        Some(Event {
            node,
            generation,
            change: Change::Told(fact),
        })
    }

    fn is_current(&self, (node, generation): Named) -> bool {
        self.nodes.get(&node).is_none_or(|seen| seen.generation <= generation)
    }

    /// Takes the starts that are alive, of those that are known at all. Who is not among the living is dead, unless this is said too
    /// early to know (`beginning`).
    pub(super) fn live(&mut self, live: &BTreeSet<Named>, known: &BTreeSet<Named>, beginning: bool) -> Vec<Event> {
        let mut events = Vec::new();
        for &(node, generation) in live {
            if node == self.own || !self.is_current((node, generation)) {
                continue;
            }
            let seen = self.nodes.entry(node).or_default();
            if !seen.alive || seen.generation != generation {
                *seen = Seen {
                    generation,
                    alive: true,
                };
                events.push(liveness(node, generation, true));
            }
        }
        if beginning {
            return events;
        }
        for (&node, seen) in &mut self.nodes {
            if seen.alive && !live.contains(&(node, seen.generation)) {
                seen.alive = false;
                events.push(liveness(node, seen.generation, false));
            }
        }
        self.nodes
            .retain(|&node, seen| seen.alive || known.contains(&(node, seen.generation)));
        events
    }
}

fn liveness(node: u64, generation: u64, alive: bool) -> Event {
    Event {
        node,
        generation,
        change: Change::Liveness(alive),
    }
}

#[cfg(test)]
mod tests {
    use generation_node::gossip::Fact;

    use super::*;

    fn set(starts: &[Named]) -> BTreeSet<Named> {
        starts.iter().copied().collect()
    }

    #[test]
    fn a_node_lives_and_dies_and_is_forgotten_with_its_start() {
        let mut view = View::new(1);
        let all = set(&[(1, 9), (2, 5)]);
        assert_eq!(view.live(&all, &all, false), [liveness(2, 5, true)]);
        assert_eq!(view.live(&all, &all, false), []);
        let own = set(&[(1, 9)]);
        // Gossip that has just begun knows nothing of anybody's death.
        assert_eq!(view.live(&own, &own, true), []);
        assert_eq!(view.live(&own, &all, false), [liveness(2, 5, false)]);
        assert_eq!(view.live(&all, &all, false), [liveness(2, 5, true)]);
        assert_eq!(view.live(&own, &own, false), [liveness(2, 5, false)]);
        assert!(view.nodes.is_empty());
    }

    #[test]
    fn a_new_start_is_not_alive_because_the_one_before_was() {
        let mut view = View::new(1);
        let (old, both) = (set(&[(2, 5)]), set(&[(2, 5), (2, 6)]));
        assert_eq!(view.live(&old, &old, false), [liveness(2, 5, true)]);
        assert!(view.told((2, 6), "v", "3").is_some());
        assert_eq!(view.live(&old, &both, false), []);
        assert_eq!(view.live(&both, &both, false), [liveness(2, 6, true)]);
    }

    #[test]
    fn of_a_node_only_the_highest_generation_is_heard() {
        let mut view = View::new(1);
        let told = |generation| {
            Some(Event {
                node: 2,
                generation,
                change: Change::Told(Fact::RecordsVersion(3)),
            })
        };
        assert_eq!(view.told((2, 5), "v", "3"), told(5));
        assert_eq!(view.told((2, 6), "v", "3"), told(6));
        assert_eq!(view.told((2, 5), "v", "3"), None);
        assert_eq!(view.told((1, 5), "v", "3"), None);
        assert_eq!(view.told((2, 6), "v", "three"), None);
        // Both starts seem alive for a while: the older one's detector has not noticed.
        let both = set(&[(2, 5), (2, 6)]);
        assert_eq!(view.live(&set(&[(2, 5)]), &both, false), []);
        assert_eq!(view.live(&both, &both, false), [liveness(2, 6, true)]);
        assert_eq!(view.live(&set(&[(2, 5)]), &both, false), [liveness(2, 6, false)]);
        // Back under a third one while the second was never declared dead.
        assert_eq!(view.live(&set(&[(2, 6)]), &both, false), [liveness(2, 6, true)]);
        assert_eq!(view.live(&set(&[(2, 6), (2, 7)]), &both, false), [liveness(2, 7, true)]);
    }
}
