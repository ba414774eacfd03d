//! State machine safety (Raft, section 5.4.3): replicas that have applied a shard's log up to the same index are in the same
//! state.

use std::collections::HashMap;

use super::Report;
use crate::history::{Event, History};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let resets = history.resets();
    let mut states: HashMap<(u16, u32, u64), (&str, u32)> = HashMap::new();
    for event in &history.events {
        let Event::State {
            node,
            shard,
            epoch,
            index,
            hash,
            ..
        } = event
        else {
            continue;
        };
        let place = (*shard, resets.era(*shard, *epoch), *index);
        let (first, by) = *states.entry(place).or_insert((hash, *node));
        if first != hash {
            report.violation(format!(
                "shard {shard} at index {index}: node {by} has state {first}, node {node} has {hash}"
            ));
        }
    }
}
