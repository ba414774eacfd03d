//! Election safety (Raft, section 5.2): at most one replica leads a shard in a term.

use std::collections::HashMap;

use super::Report;
use crate::history::{Event, History};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let mut leaders: HashMap<(u16, u32, u64), (u32, u64)> = HashMap::new();
    for event in &history.events {
        let Event::Replica {
            node,
            shard,
            epoch,
            replica,
            term,
            leads: true,
            ..
        } = event
        else {
            continue;
        };
        let (leader, id) = *leaders.entry((*shard, *epoch, *term)).or_insert((*node, *replica));
        if (leader, id) != (*node, *replica) {
            report.violation(format!(
                "shard {shard}, epoch {epoch}, term {term}: led by replica {id} of node {leader} and by replica {replica} of \
                 node {node}"
            ));
        }
    }
}
