//! Named points of a node's code at which a simulation strikes.
//!
//! The node tells its environment when it passes a point ([`Env::point`](generation_node::env::Env::point)); production does
//! nothing there. A simulation counts the points, and kills or freezes the node at the one a test or a seed has chosen.

use std::collections::BTreeMap;

use crate::dice::Dice;

/// How a node dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// The process ends; what it has written stays with the operating system.
    Process,
    /// The machine loses power: what was not synced is kept, lost or torn by chance.
    Power,
}

/// What happens to a node at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// It dies there: nothing after the point runs.
    Kill(Kill),
    /// It is frozen when the step it is in has ended.
    Freeze,
}

/// A strike that waits for a node at a point.
#[derive(Debug, Clone)]
pub struct Ambush {
    /// The node, by number; any if `None`.
    pub node: Option<usize>,
    /// The point's name; any if `None`.
    pub point: Option<String>,
    /// How often the point is passed unharmed.
    pub skip: u64,
    /// What happens then.
    pub strike: Strike,
}

/// All ambushes, and how often each point was passed.
#[derive(Debug, Default)]
pub(crate) struct Ambushes {
    waiting: Vec<Ambush>,
    passed: BTreeMap<&'static str, u64>,
    struck: BTreeMap<&'static str, u64>,
    /// Chance of a strike at each point, of a million.
    pub(crate) per_million: u64,
}

impl Ambushes {
    pub(crate) fn lay(&mut self, ambush: Ambush) {
        self.waiting.push(ambush);
    }

    /// Takes those at a point away.
    pub(crate) fn lift(&mut self, point: &str) {
        self.waiting.retain(|ambush| ambush.point.as_deref() != Some(point));
    }

    /// Takes all of them away.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.per_million = 0;
    }

    /// A node passes a point; what happens to it there.
    pub(crate) fn pass(&mut self, dice: &mut Dice, node: usize, point: &'static str) -> Option<Strike> {
        *self.passed.entry(point).or_default() += 1;
        let strike = self.choose(dice, node, point)?;
        *self.struck.entry(point).or_default() += 1;
        Some(strike)
    }

    fn choose(&mut self, dice: &mut Dice, node: usize, point: &'static str) -> Option<Strike> {
        let concerned = |ambush: &Ambush| {
            ambush.node.is_none_or(|of| of == node) && ambush.point.as_ref().is_none_or(|name| name == point)
        };
        let mut due = None;
        for (place, ambush) in self.waiting.iter_mut().enumerate() {
            if !concerned(ambush) {
                continue;
            }
            if ambush.skip > 0 {
                ambush.skip -= 1;
            } else if due.is_none() {
                due = Some(place);
            }
        }
        if let Some(place) = due {
            return Some(self.waiting.remove(place).strike);
        }
        if self.per_million > 0 && dice.below(1_000_000) < self.per_million {
            let kill = if dice.chance(500) { Kill::Power } else { Kill::Process };
            return Some(Strike::Kill(kill));
        }
        None
    }

    /// How often a node was struck at each point.
    pub(crate) fn struck(&self) -> &BTreeMap<&'static str, u64> {
        &self.struck
    }

    /// How often each point was passed.
    pub(crate) fn passed(&self) -> &BTreeMap<&'static str, u64> {
        &self.passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ambush_waits_for_its_node_at_its_point_and_strikes_once() {
        let (mut ambushes, mut dice) = (Ambushes::default(), Dice::new(1));
        ambushes.lay(Ambush {
            node: Some(1),
            point: Some("b".to_owned()),
            skip: 2,
            strike: Strike::Freeze,
        });
        let mut pass = |node, point| ambushes.pass(&mut dice, node, point);
        assert_eq!([pass(1, "a"), pass(0, "b"), pass(1, "b"), pass(1, "b")], [None; 4]);
        assert_eq!(pass(1, "b"), Some(Strike::Freeze));
        assert_eq!(pass(1, "b"), None);
        assert_eq!((ambushes.passed()["b"], ambushes.struck()["b"]), (5, 1));
    }
}
