//! Session guarantees (Terry et al., PDIS 1994), by shard, for reads that ask for them: a client's read sees at least the log
//! index of everything the client has seen of the shard before: its own writes (read your writes) and its own reads (monotonic
//! reads). And what it sees is what was there at the index it names.
//!
//! What a read of any freshness must show at its index is checked with [linearizability](super::linearizability).

use std::collections::BTreeMap;

use super::Report;
use crate::history::{Freshness, History, Op};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let resets = history.resets();
    let mut operations = history.operations();
    // A client has one operation at a time, so the order of its calls is the order of its returns.
    operations.sort_by_key(|operation| operation.called);
    let mut seen: BTreeMap<(u32, u16), ((u32, u64), u64)> = BTreeMap::new();
    for operation in &operations {
        let Some(reply) = operation.reply() else { continue };
        let place = (
            resets.era(reply.shard, reply.epoch),
            reply.index.max(reply.version >> 16),
        );
        let (before, by) = seen.get(&(operation.client, reply.shard)).copied().unwrap_or_default();
        let asked = matches!(
            operation.op,
            Op::Get {
                freshness: Freshness::Session,
                ..
            }
        );
        if asked && reply.index != 0 && (place.0, reply.index) < before {
            report.violation(format!(
                "client {} read shard {} at index {} (operation {}) after it had seen index {} (operation {by})",
                operation.client, reply.shard, reply.index, operation.id, before.1
            ));
        }
        let asks_less = matches!(
            operation.op,
            Op::Get {
                freshness: Freshness::Stale(_),
                ..
            }
        );
        if place > before && !(asks_less && reply.index == 0) {
            seen.insert((operation.client, reply.shard), (place, operation.id));
        }
    }
}
