//! What a replica knows only grows: its term and its shard's epoch for ever, restarts included, since they are durable; its
//! committed and applied index between two starts of its node. And nothing is applied that is not committed.

use std::collections::HashMap;

use super::Report;
use crate::history::{Event, History};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let mut durable: HashMap<(u32, u16, u64), (u32, u64)> = HashMap::new();
    let mut volatile: HashMap<(u32, u16, u64), (u32, u64, u64)> = HashMap::new();
    for event in &history.events {
        let Event::Replica {
            at,
            node,
            start,
            shard,
            epoch,
            replica,
            term,
            committed,
            applied,
            ..
        } = event
        else {
            continue;
        };
        let place = (*node, *shard, *replica);
        let mut complain = |what: String| {
            report.violation(format!(
                "node {node}, shard {shard}, replica {replica}, at {at} ns: {what}"
            ));
        };
        let before = durable.entry(place).or_default();
        if (*epoch, *term) < *before {
            complain(format!("(epoch, term) fell from {before:?} to {:?}", (epoch, term)));
        }
        *before = (*epoch, *term);
        if applied > committed {
            complain(format!("index {applied} is applied, {committed} is committed"));
        }
        let (started, was_committed, was_applied) = volatile
            .insert(place, (*start, *committed, *applied))
            .unwrap_or_default();
        if started == *start && *committed < was_committed {
            complain(format!("the committed index fell from {was_committed} to {committed}"));
        }
        if started == *start && *applied < was_applied {
            complain(format!("the applied index fell from {was_applied} to {applied}"));
        }
    }
}
