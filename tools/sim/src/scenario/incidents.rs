//! Incidents by chance.

use std::time::Duration;

use super::{Incident, IncidentKind};
use crate::dice::Dice;
use crate::network::Host;
use crate::points::Kill;

/// Draws `count` incidents, all over by `calm`.
pub(super) fn draw(
    dice: &mut Dice,
    count: u64,
    calm: Duration,
    mut kind: impl FnMut(&mut Dice) -> IncidentKind,
) -> Vec<Incident> {
    let mut incidents: Vec<_> = (0..count)
        .map(|_| {
            let at = Duration::from_millis(dice.below(calm.as_millis() as u64 - 200));
            let longest = calm.saturating_sub(at).as_millis() as u64;
            // Short ones are as likely as long ones.
            let scale = [60, 400, 2_500, 8_000][dice.below(4) as usize];
            let lasts = Duration::from_millis((1 + dice.below(scale)).min(longest));
            let kind = kind(dice);
            Incident { at, lasts, kind }
        })
        .collect();
    incidents.sort_by_key(|incident| incident.at);
    incidents
}

/// The hosts of a run, in two groups by chance. Neither is empty.
pub(super) fn split(dice: &mut Dice, nodes: usize, clients: usize) -> (Vec<Host>, Vec<Host>) {
    let mut hosts: Vec<_> = (0..nodes)
        .map(Host::Node)
        .chain((0..clients).map(Host::Client))
        .collect();
    for place in (1..hosts.len()).rev() {
        hosts.swap(place, dice.below(place as u64 + 1) as usize);
    }
    let at = 1 + dice.below(hosts.len() as u64 - 1) as usize;
    let other = hosts.split_off(at);
    (hosts, other)
}

/// A process kill or a power cut.
pub(super) fn any_kill(dice: &mut Dice) -> Kill {
    if dice.chance(500) { Kill::Power } else { Kill::Process }
}

/// Loss and duplication.
pub(super) fn storm(dice: &mut Dice) -> IncidentKind {
    IncidentKind::Storm {
        loss_per_mille: dice.below(400),
        duplicate_per_mille: dice.below(200),
    }
}

/// One of these kinds by chance.
pub(super) fn one_of(kinds: &[fn(&mut Dice) -> IncidentKind], dice: &mut Dice) -> IncidentKind {
    kinds[dice.below(kinds.len() as u64) as usize](dice)
}
