//! No acknowledged write is lost: whatever a replica has applied later holds everything acknowledged.
//!
//! Three traces of a loss that clients' reads may not meet: a leader that has committed less than was acknowledged, long after
//! the last fault; two acknowledged writes of a shard under one version; and versions of a shard that run backwards in real
//! time. Within an era: a reset loses by permission.

use std::collections::BTreeMap;

use super::Report;
use crate::history::{Event, History};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let resets = history.resets();
    let mut writes: BTreeMap<(u16, u32), Vec<Write>> = BTreeMap::new();
    for operation in history.operations() {
        if let Some(reply) = operation.reply()
            && operation.op.is_write()
            && reply.status == "ok"
        {
            let era = resets.era(reply.shard, reply.epoch);
            writes.entry((reply.shard, era)).or_default().push(Write {
                answered: operation.answered(),
                called: operation.called,
                version: reply.version,
                id: operation.id,
            });
        }
    }
    for (&(shard, _), writes) in &mut writes {
        check_order(shard, writes, report);
    }
    check_leaders(history, &writes, report);
}

#[derive(Debug, Clone, Copy)]
struct Write {
    answered: u64,
    called: u64,
    version: u64,
    id: u64,
}

/// A write called after another returned has the greater version, in the whole shard: its log has one order.
fn check_order(shard: u16, writes: &mut [Write], report: &mut Report) {
    writes.sort_by_key(|write| write.version);
    for pair in writes.windows(2) {
        if pair[0].version == pair[1].version {
            report.violation(format!(
                "shard {shard}: operations {} and {} were both given version {}.{}",
                pair[0].id,
                pair[1].id,
                pair[0].version >> 16,
                pair[0].version & 0xffff
            ));
        }
    }
    let mut latest: Option<Write> = None;
    for write in writes.iter() {
        if let Some(latest) = latest.filter(|latest| write.answered < latest.called) {
            report.violation(format!(
                "shard {shard}: operation {} was called after operation {} had returned, and has the lower version",
                latest.id, write.id
            ));
        }
        if latest.is_none_or(|latest| write.called > latest.called) {
            latest = Some(*write);
        }
    }
}

/// Once everything serves again, a leader has committed whatever was acknowledged before.
fn check_leaders(history: &History, writes: &BTreeMap<(u16, u32), Vec<Write>>, report: &mut Report) {
    let resets = history.resets();
    let Some(settled) = super::recovery::deadline(history) else {
        return;
    };
    for event in &history.events {
        let Event::Replica {
            at,
            node,
            shard,
            epoch,
            term,
            leads: true,
            committed,
            ..
        } = event
        else {
            continue;
        };
        let place = (*shard, resets.era(*shard, *epoch));
        let before = writes
            .get(&place)
            .into_iter()
            .flatten()
            .filter(|write| write.answered < *at);
        let Some(last) = before.max_by_key(|write| write.version) else {
            continue;
        };
        if *at >= settled && *committed < last.version >> 16 {
            report.violation(format!(
                "shard {shard}: node {node} leads term {term} with everything up to index {committed} committed, though \
                 operation {} was acknowledged at index {} before",
                last.id,
                last.version >> 16
            ));
        }
    }
}
