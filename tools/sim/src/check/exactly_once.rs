//! Every write was executed at most once, and every acknowledged one exactly once. Counters show it: whoever reads a counter
//! that was only ever added to finds at least the sum of what was acknowledged before, and at most that of all that was begun.
//! Only keys are judged whose every write is an `incr` of a positive number.

use std::collections::BTreeMap;

use super::Report;
use crate::history::{Freshness, History, Op, Operation};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    if history.header.pressure || history.resets().any() {
        // An entry that vanished takes its sum along.
        return;
    }
    let operations = history.operations();
    let mut by_key: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in &operations {
        if let Some(key) = operation.op.key() {
            by_key.entry(key).or_default().push(operation);
        }
    }
    for (key, operations) in by_key {
        let additive = |operation: &&Operation| match operation.op {
            Op::Incr { delta, .. } => delta > 0,
            Op::Touch { ttl_ms, .. } => ttl_ms.is_none(),
            _ => !operation.op.is_write(),
        };
        if operations.iter().all(additive) {
            check_counter(key, &operations, report);
        }
    }
}

fn check_counter(key: &str, operations: &[&Operation], report: &mut Report) {
    let steps: Vec<(&Operation, i64)> = operations
        .iter()
        .filter_map(|operation| match operation.op {
            Op::Incr { delta, .. } => Some((*operation, delta)),
            _ => None,
        })
        .collect();
    for operation in operations {
        let Some(reply) = operation.reply() else { continue };
        let fresh = !matches!(&operation.op, Op::Get { freshness, .. } if *freshness != Freshness::Linearizable);
        let Some(value) = reply.value.as_ref().filter(|_| reply.status == "ok") else {
            continue;
        };
        let Ok(value) = value.parse::<i64>() else { continue };
        let certain = |(step, _): &&(&Operation, i64)| {
            step.reply().is_some_and(|reply| reply.status == "ok") && step.answered() < operation.called
        };
        let possible = |(step, _): &&(&Operation, i64)| {
            let executed = step.in_doubt() || step.reply().is_some_and(|reply| reply.status == "ok");
            executed && step.called <= operation.answered()
        };
        let least: i64 = steps.iter().filter(certain).map(|(_, delta)| delta).sum();
        let most: i64 = steps.iter().filter(possible).map(|(_, delta)| delta).sum();
        if (fresh && value < least) || value > most {
            report.violation(format!(
                "key `{key}`: operation {} found {value}; what was acknowledged before adds up to {least}, what was begun to \
                 {most}",
                operation.id
            ));
        }
    }
}
