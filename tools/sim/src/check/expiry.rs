//! Nothing is served past its time: an entry that is read has longer to live than the clock of whoever serves it says.
//!
//! Clocks of different nodes differ, so only the serving node's own counts, where a history knows it.

use super::Report;
use crate::history::{History, Op};

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    for operation in history.operations() {
        let (Op::Get { key, .. }, Some(reply)) = (&operation.op, operation.reply()) else {
            continue;
        };
        if reply.status == "ok"
            && let (Some(expires_at_ms), Some(clock_ms)) = (reply.expires_at_ms, reply.clock_ms)
            && expires_at_ms <= clock_ms
        {
            report.violation(format!(
                "key `{key}`: operation {} was served an entry whose time had been over for {} ms",
                operation.id,
                clock_ms - expires_at_ms
            ));
        }
    }
}
