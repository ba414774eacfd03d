//! A read that asks for a state at most so old sees every write that was acknowledged longer than that before the read began:
//! the index it names is at least that write's. And the age it tells is no greater than what was asked for.

use std::collections::BTreeMap;

use super::Report;
use crate::history::{Freshness, History, Op};

/// Nanoseconds in a millisecond.
const MS: u64 = 1_000_000;

/// A time, the greatest place in the log (era, index) acknowledged by then, and the operation it belongs to.
type Acknowledged = (u64, (u32, u64), u64);

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let resets = history.resets();
    let operations = history.operations();
    // For each shard the greatest place of any write acknowledged by a time.
    let mut acknowledged: BTreeMap<u16, Vec<Acknowledged>> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.op.is_write()) {
        if let Some(reply) = operation.reply()
            && reply.status == "ok"
        {
            let place = (resets.era(reply.shard, reply.epoch), reply.version >> 16);
            acknowledged
                .entry(reply.shard)
                .or_default()
                .push((operation.answered(), place, operation.id));
        }
    }
    for writes in acknowledged.values_mut() {
        writes.sort_unstable();
        let mut greatest = ((0, 0), 0);
        for (_, place, id) in writes {
            greatest = greatest.max((*place, *id));
            (*place, *id) = greatest;
        }
    }
    for operation in &operations {
        let (
            Op::Get {
                freshness: Freshness::Stale(max_age_ms),
                ..
            },
            Some(reply),
        ) = (&operation.op, operation.reply())
        else {
            continue;
        };
        if let Some(age_ms) = reply.age_ms
            && age_ms > *max_age_ms
        {
            let id = operation.id;
            report.violation(format!(
                "operation {id} was answered {age_ms} ms old, {max_age_ms} ms were allowed"
            ));
        }
        let Some(oldest) = operation.called.checked_sub(max_age_ms * MS) else {
            continue;
        };
        let writes = acknowledged.get(&reply.shard).map_or(&[][..], |writes| &writes[..]);
        let count = writes.partition_point(|(at, ..)| *at < oldest);
        let Some(&(at, place, id)) = count.checked_sub(1).map(|last| &writes[last]) else {
            continue;
        };
        let read = (resets.era(reply.shard, reply.epoch), reply.index);
        if reply.index != 0 && read < place {
            report.violation(format!(
                "operation {} read shard {} at index {}, though operation {id} was acknowledged at index {} by {} ms before",
                operation.id,
                reply.shard,
                reply.index,
                place.1,
                (operation.called - at) / MS
            ));
        }
    }
}
