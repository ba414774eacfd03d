//! After the last fault everything serves again within five seconds: whatever is called from then on is answered.

use super::Report;
use crate::history::{Event, History, Outcome};

/// How long everything may take to serve again, in nanoseconds.
const LIMIT: u64 = 5_000_000_000;

/// From when on everything must serve; `None` where a history does not say when its faults ended.
pub(super) fn deadline(history: &History) -> Option<u64> {
    let calm = |event: &Event| match event {
        Event::Calm { at } => Some(*at),
        _ => None,
    };
    history.events.iter().find_map(calm).map(|at| at + LIMIT)
}

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    let Some(deadline) = deadline(history) else { return };
    let operations = history.operations();
    let mut asked = false;
    for operation in operations.iter().filter(|operation| operation.called >= deadline) {
        asked = true;
        let why = match &operation.returned {
            Some((_, Outcome::Done(_))) => continue,
            Some((_, Outcome::Refused { code })) => format!("was refused ({code})"),
            Some((_, Outcome::InDoubt { code })) => format!("was left in doubt ({code})"),
            None => "never returned".to_owned(),
        };
        report.violation(format!(
            "operation {} of client {} {why}",
            operation.id, operation.client
        ));
    }
    if !asked {
        report.violation("nothing was asked once everything had to serve: the history ends too early");
    }
}
