//! What every history must keep to, one property a file.
//!
//! A check takes a history and says what contradicts its property, naming the operations. It never complains about a history
//! that keeps to it; what each can and cannot see is said in its module.

mod bounded_stale;
mod cursors;
mod durability;
mod exactly_once;
mod expiry;
mod leaders;
pub mod linearizability;
mod memory;
mod monotonic;
mod recovery;
mod resurrection;
mod sessions;
mod state_hashes;
mod timeline;

use std::fmt;

use crate::history::History;

/// A property a history does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The property's name, as its file has it.
    pub property: &'static str,
    /// What contradicts it.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.property, self.what)
    }
}

/// A property: its name, and what finds contradictions.
pub struct Property {
    /// Its name.
    pub name: &'static str,
    check: fn(&History, &mut Report),
}

impl fmt::Debug for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Most contradictions of one property that are kept; the first tell the story.
const MAX_VIOLATIONS: usize = 8;

/// Takes down what a check finds.
#[derive(Debug)]
pub struct Report {
    property: &'static str,
    violations: Vec<Violation>,
}

impl Report {
    /// Notes a contradiction.
    pub fn violation(&mut self, what: impl Into<String>) {
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(Violation {
                property: self.property,
                what: what.into(),
            });
        }
    }
}

/// All properties.
pub const PROPERTIES: &[Property] = &[
    Property {
        name: "linearizability",
        check: linearizability::check,
    },
    Property {
        name: "sessions",
        check: sessions::check,
    },
    Property {
        name: "bounded_stale",
        check: bounded_stale::check,
    },
    Property {
        name: "exactly_once",
        check: exactly_once::check,
    },
    Property {
        name: "durability",
        check: durability::check,
    },
    Property {
        name: "resurrection",
        check: resurrection::check,
    },
    Property {
        name: "expiry",
        check: expiry::check,
    },
    Property {
        name: "state_hashes",
        check: state_hashes::check,
    },
    Property {
        name: "monotonic",
        check: monotonic::check,
    },
    Property {
        name: "leaders",
        check: leaders::check,
    },
    Property {
        name: "cursors",
        check: cursors::check,
    },
    Property {
        name: "memory",
        check: memory::check,
    },
    Property {
        name: "recovery",
        check: recovery::check,
    },
];

/// Everything that contradicts any property.
pub fn check(history: &History) -> Vec<Violation> {
    PROPERTIES
        .iter()
        .flat_map(|property| property.violations(history))
        .collect()
}

impl Property {
    /// Everything that contradicts this property.
    pub fn violations(&self, history: &History) -> Vec<Violation> {
        let mut report = Report {
            property: self.name,
            violations: Vec::new(),
        };
        (self.check)(history, &mut report);
        report.violations
    }
}
