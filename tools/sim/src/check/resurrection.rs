//! What is gone stays gone: after the log has removed an entry, no read at that log index or a later one sees it, on any replica
//! and at any freshness; nor does a linearizable read that began after somebody had learned of the removal.

use std::collections::HashMap;

use super::Report;
use crate::history::{Event, Freshness, History, Op};

/// A removal: the log index, and when a client first knew.
#[derive(Debug, Clone, Copy)]
struct Removal {
    index: u64,
    known: u64,
}

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let resets = history.resets();
    let operations = history.operations();
    let mut removed: HashMap<(u16, u32, u64), Removal> = HashMap::new();
    for event in &history.events {
        if let Event::Gone {
            shard,
            epoch,
            by,
            version,
            ..
        } = event
        {
            let removal = Removal {
                index: by >> 16,
                known: u64::MAX,
            };
            removed.insert((*shard, resets.era(*shard, *epoch), *version), removal);
        }
    }
    // A delete under a condition names its victim. So does a read of nothing at an index from which on a version was gone.
    for operation in &operations {
        if let (
            Op::Delete {
                if_version: Some(version),
                ..
            },
            Some(reply),
        ) = (&operation.op, operation.reply())
            && reply.status == "ok"
        {
            let removal = Removal {
                index: reply.version >> 16,
                known: operation.answered(),
            };
            removed.insert((reply.shard, resets.era(reply.shard, reply.epoch), *version), removal);
        }
    }
    for operation in &operations {
        let (Op::Get { freshness, key }, Some(reply)) = (&operation.op, operation.reply()) else {
            continue;
        };
        if reply.status != "ok" {
            continue;
        }
        let era = resets.era(reply.shard, reply.epoch);
        let Some(removal) = removed.get(&(reply.shard, era, reply.version)) else {
            continue;
        };
        let linearizable = *freshness == Freshness::Linearizable;
        if (reply.index != 0 && reply.index >= removal.index) || (linearizable && operation.called > removal.known) {
            report.violation(format!(
                "key `{key}`: operation {} saw version {}.{} at index {}, though it was removed at index {}",
                operation.id,
                reply.version >> 16,
                reply.version & 0xffff,
                reply.index,
                removal.index
            ));
        }
    }
}
