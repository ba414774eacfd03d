//! A replica keeps to its budget: applying may pass it by a fiftieth, never more.

use super::Report;
use crate::history::{Event, History};

/// What applying may pass the budget by: one part of this many.
const SLACK: u64 = 50;

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    for event in &history.events {
        if let Event::Memory {
            at,
            node,
            shard,
            used,
            budget,
        } = event
            && *used > budget + budget / SLACK
        {
            report.violation(format!(
                "node {node}, shard {shard}, at {at} ns: {used} bytes used of {budget}"
            ));
        }
    }
}
