//! What happened, as a file: calls and returns of clients, and what nodes did that clients must be able to explain.
//!
//! The format is NDJSON, version 1, described in the crate's README: a header, then one event a line in order of time. Anything
//! that writes it can be judged by [`crate::check`], and anything that reads it can judge ours.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// What the header's `format` says.
pub const FORMAT: &str = "generation-history";

/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;

/// The first line of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Where it comes from.
    #[serde(default)]
    pub scenario: String,
    /// The seed it comes from, in decimal.
    #[serde(default)]
    pub seed: String,
    /// Whether entries may vanish without an event that says so, as under memory pressure where removals are not noted.
    #[serde(default)]
    pub pressure: bool,
}

impl Header {
    /// The header of a run.
    pub fn new(scenario: &str, seed: u64) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            scenario: scenario.to_owned(),
            seed: seed.to_string(),
            pressure: false,
        }
    }
}

/// How fresh a read was asked to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freshness {
    /// It sees every write acknowledged before it began.
    #[default]
    Linearizable,
    /// It sees what its client has seen of the shard.
    Session,
    /// It sees a state at most this old, in milliseconds.
    Stale(u64),
}

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Reads an entry.
    Get {
        /// Its key.
        key: String,
        /// How fresh.
        #[serde(default)]
        freshness: Freshness,
    },
    /// Writes an entry.
    Put {
        /// Its key.
        key: String,
        /// Its value. No two writes of a history have the same, so that a read names its write.
        value: String,
        /// Only if it has this version; only if it is absent when 0.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "decimal_option")]
        if_version: Option<u64>,
        /// Time to live.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl_ms: Option<u64>,
    },
    /// Removes an entry.
    Delete {
        /// Its key.
        key: String,
        /// Only if it has this version.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "decimal_option")]
        if_version: Option<u64>,
    },
    /// Adds to a counter.
    Incr {
        /// Its key.
        key: String,
        /// What is added.
        delta: i64,
    },
    /// Sets or clears an entry's time to live.
    Touch {
        /// Its key.
        key: String,
        /// The time to live.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl_ms: Option<u64>,
    },
    /// Reads the keys of a shard, page by page, to the end.
    Scan {
        /// The shard.
        shard: u16,
    },
}

impl Op {
    /// The key it is about.
    pub fn key(&self) -> Option<&str> {
        match self {
            Self::Get { key, .. }
            | Self::Put { key, .. }
            | Self::Delete { key, .. }
            | Self::Incr { key, .. }
            | Self::Touch { key, .. } => Some(key),
            Self::Scan { .. } => None,
        }
    }

    /// Whether it may change anything.
    pub fn is_write(&self) -> bool {
        !matches!(self, Self::Get { .. } | Self::Scan { .. })
    }
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The status's name: `ok`, `not_found`, `condition_failed`, `not_a_number`, `overflow`, `out_of_memory`.
    pub status: String,
    /// The entry's version; 0 where there is none. Of a deletion, its own; of a condition that failed, the entry's.
    #[serde(default, with = "decimal", skip_serializing_if = "is_zero")]
    pub version: u64,
    /// The value read, or the number a counter has now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The shard that answered.
    #[serde(default)]
    pub shard: u16,
    /// Its epoch.
    #[serde(default)]
    pub epoch: u32,
    /// Log index of the state that was read; 0 where it is not known.
    #[serde(default, with = "decimal", skip_serializing_if = "is_zero")]
    pub index: u64,
    /// Age of the state that was read, as the reply tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// When the entry's time is over, in milliseconds since the Unix epoch, as the reply tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<u64>,
    /// The clock of whoever answered, in milliseconds since the Unix epoch, at some moment before it did: known only where no clock
    /// was set in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ms: Option<u64>,
    /// The keys a scan found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
}

impl Default for Reply {
    fn default() -> Self {
        Self {
            status: "ok".to_owned(),
            version: 0,
            value: None,
            shard: 0,
            epoch: 0,
            index: 0,
            age_ms: None,
            expires_at_ms: None,
            clock_ms: None,
            keys: Vec::new(),
        }
    }
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Outcome {
    /// It was executed; this is the answer.
    Done(Reply),
    /// It was not executed and will not be.
    Refused {
        /// Why.
        code: String,
    },
    /// It may have been executed, or may be at any later time. A call without a return counts as this.
    InDoubt {
        /// Why.
        code: String,
    },
}

/// Why an entry went without a client's asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// It made room.
    Evicted,
    /// Its time was over.
    Expired,
}

/// One line after the header. `at` is the time in nanoseconds since the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A client begins an operation.
    Call {
        /// When.
        at: u64,
        /// Names the operation.
        id: u64,
        /// The client. It has one operation at a time.
        client: u32,
        /// What it asks for.
        #[serde(flatten)]
        op: Op,
    },
    /// An operation ends.
    Return {
        /// When.
        at: u64,
        /// The operation.
        id: u64,
        /// How it ended.
        #[serde(flatten)]
        outcome: Outcome,
    },
    /// A shard begins empty in a new epoch: what it held is lost, by permission.
    Reset {
        /// When.
        at: u64,
        /// The shard.
        shard: u16,
        /// The epoch.
        epoch: u32,
    },
    /// The log removed an entry.
    Gone {
        /// When it was first applied.
        at: u64,
        /// The shard.
        shard: u16,
        /// Its epoch.
        epoch: u32,
        /// The version of the removal: index and position.
        #[serde(with = "decimal")]
        by: u64,
        /// The entry's version.
        #[serde(with = "decimal")]
        version: u64,
        /// Why.
        cause: Cause,
    },
    /// A replica has applied its log up to an index.
    State {
        /// When.
        at: u64,
        /// The node.
        node: u32,
        /// The shard.
        shard: u16,
        /// Its epoch.
        epoch: u32,
        /// The log index applied.
        #[serde(with = "decimal")]
        index: u64,
        /// The state hash at that index, in hexadecimal.
        hash: String,
    },
    /// How a replica sees its group.
    Replica {
        /// When.
        at: u64,
        /// The node.
        node: u32,
        /// Starts of the node so far.
        start: u32,
        /// The shard.
        shard: u16,
        /// Its epoch.
        epoch: u32,
        /// The replica's id: another one on the same node begins anew.
        replica: u64,
        /// Its term.
        #[serde(with = "decimal")]
        term: u64,
        /// Whether it believes to lead in that term.
        leads: bool,
        /// The log index it knows to be committed.
        #[serde(with = "decimal")]
        committed: u64,
        /// The log index applied.
        #[serde(with = "decimal")]
        applied: u64,
    },
    /// What a replica holds.
    Memory {
        /// When.
        at: u64,
        /// The node.
        node: u32,
        /// The shard.
        shard: u16,
        /// Bytes used, as accounted.
        used: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// Something was done to the cluster.
    Fault {
        /// When.
        at: u64,
        /// What.
        what: String,
    },
    /// From now on nothing is done to the cluster any more, and whatever was is undone.
    Calm {
        /// When.
        at: u64,
    },
}

/// An operation with its return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Its name.
    pub id: u64,
    /// Who asked.
    pub client: u32,
    /// For what.
    pub op: Op,
    /// When it began.
    pub called: u64,
    /// When it ended, and how. `None`: it never did.
    pub returned: Option<(u64, Outcome)>,
}

impl Operation {
    /// The answer, if there was one.
    pub fn reply(&self) -> Option<&Reply> {
        match &self.returned {
            Some((_, Outcome::Done(reply))) => Some(reply),
            _ => None,
        }
    }

    /// When the answer came; the end of time if there was none.
    pub fn answered(&self) -> u64 {
        match &self.returned {
            Some((at, Outcome::Done(_))) => *at,
            _ => u64::MAX,
        }
    }

    /// Whether it may have been executed though there is no answer.
    pub fn in_doubt(&self) -> bool {
        !matches!(self.returned, Some((_, Outcome::Done(_) | Outcome::Refused { .. })))
    }
}

/// A history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// Its first line.
    pub header: Header,
    /// The others.
    pub events: Vec<Event>,
}

/// A text is not a history.
#[derive(Debug, thiserror::Error)]
pub enum ParseHistoryError {
    /// There is no header.
    #[error("the history has no first line: it must be {{\"format\":\"{FORMAT}\",\"version\":{VERSION}}}")]
    Empty,
    /// A line cannot be read.
    #[error("line {line} of the history cannot be read: {error}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// The format is another one.
    #[error("this is `{format}` version {version}, not {FORMAT} version {VERSION}")]
    Format {
        /// What the header says.
        format: String,
        /// Its version.
        version: u32,
    },
    /// Events contradict each other.
    #[error("line {line} of the history: {what}")]
    Order {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
}

impl History {
    /// An empty one.
    pub fn new(header: Header) -> Self {
        Self {
            header,
            events: Vec::new(),
        }
    }

    /// Reads a history.
    pub fn parse(text: &str) -> Result<Self, ParseHistoryError> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let (_, first) = lines.next().ok_or(ParseHistoryError::Empty)?;
        let header: Header = serde_json::from_str(first).map_err(|error| ParseHistoryError::Line { line: 1, error })?;
        if (header.format.as_str(), header.version) != (FORMAT, VERSION) {
            return Err(ParseHistoryError::Format {
                format: header.format,
                version: header.version,
            });
        }
        let mut events = Vec::new();
        let mut open = BTreeMap::new();
        for (number, line) in lines {
            let line_number = number + 1;
            let event = serde_json::from_str(line).map_err(|error| ParseHistoryError::Line {
                line: line_number,
                error,
            })?;
            let order = |what| ParseHistoryError::Order {
                line: line_number,
                what,
            };
            match &event {
                Event::Call { id, at, .. } if open.insert(*id, Some(*at)).is_some() => {
                    return Err(order("this id was called before"));
                }
                Event::Return { id, at, .. } => match open.get_mut(id).and_then(Option::take) {
                    None => return Err(order("this id is not open")),
                    Some(called) if called > *at => return Err(order("it returns before it was called")),
                    Some(_) => {}
                },
                _ => {}
            }
            events.push(event);
        }
        Ok(Self { header, events })
    }

    /// The history as text.
    ///
    /// # Panics
    /// Never: every event has a text.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let line = |value: serde_json::Result<String>| value.expect("invariant: events have a text");
        let _ = writeln!(text, "{}", line(serde_json::to_string(&self.header)));
        for event in &self.events {
            let _ = writeln!(text, "{}", line(serde_json::to_string(event)));
        }
        text
    }

    /// The operations, in the order they were called.
    pub fn operations(&self) -> Vec<Operation> {
        let mut operations: Vec<Operation> = Vec::new();
        let mut places = BTreeMap::new();
        for event in &self.events {
            match event {
                Event::Call { at, id, client, op } => {
                    places.insert(*id, operations.len());
                    operations.push(Operation {
                        id: *id,
                        client: *client,
                        op: op.clone(),
                        called: *at,
                        returned: None,
                    });
                }
                Event::Return { at, id, outcome } => {
                    if let Some(&place) = places.get(id) {
                        operations[place].returned = Some((*at, outcome.clone()));
                    }
                }
                _ => {}
            }
        }
        operations
    }

    /// For each shard the epochs in which it began empty, ascending.
    pub fn resets(&self) -> Resets {
        let mut resets: BTreeMap<u16, Vec<(u32, u64)>> = BTreeMap::new();
        for event in &self.events {
            if let Event::Reset { at, shard, epoch } = event {
                resets.entry(*shard).or_default().push((*epoch, *at));
            }
        }
        for epochs in resets.values_mut() {
            epochs.sort_unstable();
        }
        Resets(resets)
    }
}

/// Where shards began empty. Versions and indexes are ordered within an era: the time between two resets of a shard.
#[derive(Debug, Clone)]
pub struct Resets(BTreeMap<u16, Vec<(u32, u64)>>);

impl Resets {
    /// The era an epoch of a shard lies in; 0 before the first reset.
    pub fn era(&self, shard: u16, epoch: u32) -> u32 {
        let resets = self.0.get(&shard).map_or(&[][..], |resets| &resets[..]);
        resets.partition_point(|&(reset, _)| reset <= epoch) as u32
    }

    /// Whether any shard lost what it held.
    pub fn any(&self) -> bool {
        self.0.values().any(|resets| resets.len() > 1)
    }

    /// The eras of a shard that begin empty, with the times they began at.
    pub fn of(&self, shard: u16) -> impl Iterator<Item = (u32, u64)> {
        let resets = self.0.get(&shard).map_or(&[][..], |resets| &resets[..]);
        resets
            .iter()
            .enumerate()
            .map(|(place, &(_, at))| (place as u32 + 1, at))
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A 64-bit number as a decimal string, which survives programs whose numbers have 53 bits.
mod decimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

mod decimal_option {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::ref_option, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(number: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.collect_str(number),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_survives_its_text() {
        let mut history = History::new(Header::new("test", u64::MAX));
        let key = "k".to_owned();
        history.events = vec![
            Event::Call {
                at: 1,
                id: 1,
                client: 0,
                op: Op::Put {
                    key: key.clone(),
                    value: "v".to_owned(),
                    if_version: Some(u64::MAX),
                    ttl_ms: None,
                },
            },
            Event::Return {
                at: 2,
                id: 1,
                outcome: Outcome::Done(Reply {
                    version: u64::MAX - 1,
                    index: 7,
                    ..Reply::default()
                }),
            },
            Event::Call {
                at: 3,
                id: 2,
                client: 0,
                op: Op::Get {
                    key,
                    freshness: Freshness::Stale(500),
                },
            },
            Event::Return {
                at: 4,
                id: 2,
                outcome: Outcome::InDoubt {
                    code: "timeout".to_owned(),
                },
            },
            Event::Calm { at: 5 },
        ];
        let text = history.to_text();
        assert_eq!(History::parse(&text).unwrap(), history, "{text}");
        assert!(text.contains(r#""version":"18446744073709551614""#));
    }

    #[test]
    fn what_is_no_history_is_said_to_be_none() {
        let header = r#"{"format":"generation-history","version":1}"#;
        let fails = |text: &str| History::parse(text).unwrap_err().to_string();
        assert!(fails("").contains("no first line"));
        assert!(fails(r#"{"format":"generation-history","version":2}"#).contains("version 2"));
        assert!(fails(&format!("{header}\n{{}}")).contains("line 2"));
        let back = r#"{"type":"return","at":1,"id":9,"state":"refused","code":"busy"}"#;
        assert!(fails(&format!("{header}\n{back}")).contains("not open"));
    }
}
