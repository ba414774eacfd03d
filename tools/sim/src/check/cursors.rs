//! A scan returns every key that was there throughout, and no key that nobody wrote.
//!
//! Judged are keys of the scanned shard that somebody is known to have written before the scan began and nobody can have removed
//! before it ended: no delete was under way or in doubt, nothing with a time to live, no removal by the log, no reset.

use std::collections::{BTreeMap, BTreeSet};

use super::Report;
use super::timeline::{State, Timeline, timelines};
use crate::history::{History, Op, Operation};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let operations = history.operations();
    let scans: Vec<&Operation> = operations
        .iter()
        .filter(|operation| matches!(operation.op, Op::Scan { .. }))
        .collect();
    if scans.is_empty() {
        return;
    }
    let written: BTreeSet<&str> = operations
        .iter()
        .filter(|operation| operation.op.is_write())
        .filter_map(|operation| operation.op.key())
        .collect();
    let mut by_key: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in &operations {
        if let Some(key) = operation.op.key() {
            by_key.entry(key).or_default().push(operation);
        }
    }
    let timelines = timelines(history);
    for scan in scans {
        let (Op::Scan { shard }, Some(reply)) = (&scan.op, scan.reply()) else {
            continue;
        };
        let found: BTreeSet<&str> = reply.keys.iter().map(String::as_str).collect();
        if let Some(key) = found.difference(&written).next() {
            report.violation(format!(
                "operation {} found the key `{key}`, which nobody wrote",
                scan.id
            ));
        }
        if history.header.pressure {
            continue;
        }
        for timeline in timelines.iter().filter(|timeline| timeline.shard == *shard) {
            let key = timeline.key.as_str();
            if !found.contains(key) && was_there(timeline, &by_key[key], scan) {
                report.violation(format!(
                    "operation {} did not find the key `{key}`, which was there throughout",
                    scan.id
                ));
            }
        }
    }
}

/// Whether a key was certainly there from before a scan began until it ended.
fn was_there(timeline: &Timeline, operations: &[&Operation], scan: &Operation) -> bool {
    let put_before = operations.iter().any(|operation| {
        let present = matches!(operation.op, Op::Put { .. } | Op::Incr { .. });
        present && operation.reply().is_some_and(|reply| reply.status == "ok") && operation.answered() < scan.called
    });
    let perishable = operations.iter().any(|operation| match &operation.op {
        Op::Put { ttl_ms, .. } | Op::Touch { ttl_ms, .. } => ttl_ms.is_some(),
        _ => false,
    });
    if !put_before || perishable {
        return false;
    }
    // The states from the last one that was certainly complete before the scan began, up to the scan's end.
    let absent = |place: usize| timeline.entries[place].state == State::Absent;
    let last_before = (0..timeline.entries.len())
        .rev()
        .find(|&place| timeline.entries[place].answered < scan.called);
    let Some(first) = last_before else { return false };
    let removed =
        (first..timeline.entries.len()).any(|place| absent(place) && timeline.entries[place].called <= scan.answered());
    let doubtful = timeline
        .doubts
        .iter()
        .any(|doubt| matches!(doubt.op, Op::Delete { .. }) && doubt.called <= scan.answered());
    !removed && !doubtful
}
