//! The states of one key in the order of their versions, as all clients together saw them.
//!
//! Every acknowledged write names the version it made, and every read the version it found, so the order of a key's states is
//! known from the replies alone: no search. A write in doubt enters when a read shows what it wrote. What a log removed by itself
//! and where a shard began empty are events of the history and enter as absent states.

use std::collections::{BTreeMap, HashMap, btree_map};

use crate::history::{Cause, Event, Freshness, History, Op, Operation, Reply, Resets};

/// A place in the order of a key's states: the era, and the version.
pub(super) type Stamp = (u32, u64);

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing.
    Absent,
    /// This value.
    Value(String),
    /// Some value.
    Unknown,
}

/// What a write requires of the state before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// Nothing.
    Any,
    /// That there is no entry.
    Absent,
    /// That there is one.
    Present,
    /// That it has this version.
    Version(u64),
    /// That adding this to it gives the new state.
    Plus(i64),
    /// That it has the same value.
    Same,
}

/// A read of one state: when it began and ended, and the log index it names, 0 where it names none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) id: u64,
    pub(super) called: u64,
    pub(super) answered: u64,
    pub(super) index: u64,
    pub(super) freshness: Freshness,
}

/// One state of a key: who made it, and who saw it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) stamp: Stamp,
    /// The operation that made it; `None` for the beginning, a reset, and what the log removed.
    pub(super) id: Option<u64>,
    pub(super) called: u64,
    pub(super) answered: u64,
    pub(super) state: State,
    pub(super) before: Before,
    pub(super) reads: Vec<Read>,
    /// Why it went, where the log removed it.
    pub(super) cause: Option<Cause>,
}

/// A read that found nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Miss {
    pub(super) era: u32,
    pub(super) read: Read,
}

/// A write whose effect nobody has shown yet.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    pub(super) id: u64,
    pub(super) called: u64,
    pub(super) op: Op,
}

/// All that is known of one key.
#[derive(Debug, Clone)]
pub(super) struct Timeline {
    pub(super) key: String,
    pub(super) shard: u16,
    /// By stamp.
    pub(super) entries: Vec<Entry>,
    pub(super) misses: Vec<Miss>,
    pub(super) doubts: Vec<Doubt>,
    /// Contradictions that show while it is put together.
    pub(super) contradictions: Vec<String>,
}

impl Entry {
    /// What was there before the first write of an era.
    fn empty(era: u32, since: u64) -> Self {
        Self {
            stamp: (era, 0),
            id: None,
            called: since,
            answered: u64::MAX,
            state: State::Absent,
            before: Before::Any,
            reads: Vec::new(),
            cause: None,
        }
    }

    /// A name for messages.
    pub(super) fn name(&self) -> String {
        let (era, version) = self.stamp;
        let version = format!("{}.{}", version >> 16, version & 0xffff);
        match (self.id, self.cause) {
            (Some(id), _) => format!("version {version} by operation {id}"),
            (None, Some(Cause::Evicted)) => format!("version {version}, an eviction"),
            (None, Some(Cause::Expired)) => format!("version {version}, an expiry"),
            (None, None) if era == 0 => "the beginning".to_owned(),
            (None, None) => format!("the empty beginning of era {era}"),
        }
    }

    /// The log index that made it.
    pub(super) fn index(&self) -> u64 {
        self.stamp.1 >> 16
    }
}

/// Puts together the timelines of all keys.
pub(super) fn timelines(history: &History) -> Vec<Timeline> {
    let operations = history.operations();
    let resets = history.resets();
    let mut by_key: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in &operations {
        if let Some(key) = operation.op.key() {
            by_key.entry(key).or_default().push(operation);
        }
    }
    let mut removals: HashMap<(u16, Stamp), Vec<&Event>> = HashMap::new();
    for event in &history.events {
        if let Event::Gone {
            shard, epoch, version, ..
        } = event
        {
            let stamp = (resets.era(*shard, *epoch), *version);
            removals.entry((*shard, stamp)).or_default().push(event);
        }
    }
    by_key
        .into_iter()
        .map(|(key, operations)| Builder::new(key, &operations, &resets).build(&operations, &removals))
        .collect()
}

struct Builder<'a> {
    resets: &'a Resets,
    timeline: Timeline,
    entries: BTreeMap<Stamp, Entry>,
}

impl<'a> Builder<'a> {
    fn new(key: &str, operations: &[&Operation], resets: &'a Resets) -> Self {
        let shard = operations
            .iter()
            .find_map(|operation| operation.reply())
            .map_or(0, |reply| reply.shard);
        let eras = std::iter::once((0, 0)).chain(resets.of(shard));
        Self {
            resets,
            timeline: Timeline {
                key: key.to_owned(),
                shard,
                entries: Vec::new(),
                misses: Vec::new(),
                doubts: Vec::new(),
                contradictions: Vec::new(),
            },
            entries: eras.map(|(era, since)| ((era, 0), Entry::empty(era, since))).collect(),
        }
    }

    fn build(mut self, operations: &[&Operation], removals: &HashMap<(u16, Stamp), Vec<&Event>>) -> Timeline {
        for operation in operations {
            match operation.reply() {
                Some(reply) if operation.op.is_write() && reply.status == "ok" => self.write(operation, reply),
                None if operation.op.is_write() && operation.in_doubt() => self.timeline.doubts.push(Doubt {
                    id: operation.id,
                    called: operation.called,
                    op: operation.op.clone(),
                }),
                _ => {}
            }
        }
        // Values name their writes, so they go first; what is left for a version seen without its value is a guess.
        let (named, nameless): (Vec<_>, Vec<_>) = operations
            .iter()
            .filter_map(|operation| Some((*operation, operation.reply()?)))
            .partition(|(_, reply)| reply.value.is_some());
        for (operation, reply) in named {
            self.observe(operation, reply);
        }
        let seen: Vec<Stamp> = nameless
            .iter()
            .filter_map(|(operation, reply)| self.seen(operation, reply))
            .collect();
        for stamp in seen {
            if let btree_map::Entry::Vacant(place) = self.entries.entry(stamp)
                && let Some(state) = resolve(&mut self.timeline.doubts, stamp, None)
            {
                place.insert(state);
            }
        }
        for (operation, reply) in nameless {
            self.observe(operation, reply);
        }
        self.remove(removals);
        let Self {
            mut timeline, entries, ..
        } = self;
        timeline.entries = entries.into_values().collect();
        timeline
    }

    fn stamp(&self, reply: &Reply) -> Stamp {
        (self.resets.era(reply.shard, reply.epoch), reply.version)
    }

    /// An acknowledged write makes a state.
    fn write(&mut self, operation: &Operation, reply: &Reply) {
        let stamp = self.stamp(reply);
        if reply.version == 0 {
            let what = format!("operation {} was acknowledged without a version", operation.id);
            self.timeline.contradictions.push(what);
            return;
        }
        let (state, before) = effect(&operation.op, reply.value.as_ref());
        let entry = Entry {
            stamp,
            id: Some(operation.id),
            called: operation.called,
            answered: operation.answered(),
            state,
            before,
            reads: Vec::new(),
            cause: None,
        };
        if let Some(other) = self.entries.insert(stamp, entry) {
            let what = format!(
                "operation {} was given {}, which was there already",
                operation.id,
                other.name()
            );
            self.timeline.contradictions.push(what);
        }
    }

    /// The version a reply shows to have been there without saying what it was.
    fn seen(&self, operation: &Operation, reply: &Reply) -> Option<Stamp> {
        let era = self.resets.era(reply.shard, reply.epoch);
        let version = match (&operation.op, reply.status.as_str()) {
            (_, "condition_failed") => Some(reply.version),
            (Op::Put { if_version, .. } | Op::Delete { if_version, .. }, "ok") => *if_version,
            _ => None,
        };
        version.filter(|version| *version != 0).map(|version| (era, version))
    }

    /// What a reply says about a state that was there.
    fn observe(&mut self, operation: &Operation, reply: &Reply) {
        let mut read = Read {
            id: operation.id,
            called: operation.called,
            answered: operation.answered(),
            index: 0,
            freshness: Freshness::Linearizable,
        };
        if let Op::Get { freshness, .. } = operation.op {
            // Only reads are answered at the index they saw; a write's reply may come with later ones.
            read.index = reply.index;
            read.freshness = freshness;
        }
        let stamp = self.stamp(reply);
        match (&operation.op, reply.status.as_str()) {
            (Op::Get { .. }, "ok") => self.hit(stamp, read, reply.value.as_ref()),
            (_, "condition_failed") if reply.version != 0 => self.hit(stamp, read, None),
            (_, "not_found" | "condition_failed") => self.timeline.misses.push(Miss { era: stamp.0, read }),
            _ => {}
        }
    }

    fn hit(&mut self, stamp: Stamp, read: Read, value: Option<&String>) {
        if !self.entries.contains_key(&stamp) {
            let Some(entry) = resolve(&mut self.timeline.doubts, stamp, value) else {
                let name = format!("{}.{}", stamp.1 >> 16, stamp.1 & 0xffff);
                let what = match value {
                    Some(value) => format!(
                        "operation {} read `{value}`, version {name}, which nobody wrote",
                        read.id
                    ),
                    None => format!("operation {} saw version {name}, which nobody wrote", read.id),
                };
                self.timeline.contradictions.push(what);
                return;
            };
            self.entries.insert(stamp, entry);
        }
        let entry = self
            .entries
            .get_mut(&stamp)
            .expect("invariant: it was there or was inserted");
        match (&entry.state, value) {
            (State::Absent, _) => {
                let what = format!("operation {} found an entry at {}", read.id, entry.name());
                self.timeline.contradictions.push(what);
                return;
            }
            (State::Value(written), Some(found)) if written != found => {
                let what = format!(
                    "operation {} read `{found}` at {}, which is `{written}`",
                    read.id,
                    entry.name()
                );
                self.timeline.contradictions.push(what);
                return;
            }
            (State::Unknown, Some(found)) => entry.state = State::Value(found.clone()),
            _ => {}
        }
        entry.reads.push(read);
    }

    /// What the log removed becomes absent.
    fn remove(&mut self, removals: &HashMap<(u16, Stamp), Vec<&Event>>) {
        let stamps: Vec<_> = self.entries.keys().copied().collect();
        for stamp in stamps {
            for event in removals.get(&(self.timeline.shard, stamp)).into_iter().flatten() {
                let Event::Gone { by, cause, version, .. } = event else {
                    continue;
                };
                let entry = Entry {
                    stamp: (stamp.0, *by),
                    id: None,
                    called: 0,
                    answered: u64::MAX,
                    state: State::Absent,
                    before: Before::Version(*version),
                    reads: Vec::new(),
                    cause: Some(*cause),
                };
                self.entries.entry(entry.stamp).or_insert(entry);
            }
        }
    }
}

/// The state a write makes, and what it requires.
fn effect(op: &Op, reply_value: Option<&String>) -> (State, Before) {
    match op {
        Op::Put { value, if_version, .. } => {
            let before = match if_version {
                None => Before::Any,
                Some(0) => Before::Absent,
                Some(version) => Before::Version(*version),
            };
            (State::Value(value.clone()), before)
        }
        Op::Delete { if_version, .. } => (State::Absent, if_version.map_or(Before::Present, Before::Version)),
        Op::Incr { delta, .. } => {
            let state = reply_value.map_or(State::Unknown, |value| State::Value(value.clone()));
            (state, Before::Plus(*delta))
        }
        Op::Touch { .. } => (State::Unknown, Before::Same),
        Op::Get { .. } | Op::Scan { .. } => unreachable!("invariant: reads make no state"),
    }
}

/// The write in doubt that made a state which was seen. Its value names it. Without one, or for a value that nobody put, any that
/// may have made it will do, and if there are several, none is used up, since another may have been the one.
fn resolve(doubts: &mut Vec<Doubt>, stamp: Stamp, value: Option<&String>) -> Option<Entry> {
    let put = |doubt: &Doubt| matches!(&doubt.op, Op::Put { value: put, .. } if Some(put) == value);
    let named = doubts.iter().position(put);
    let may_have = |doubt: &&Doubt| match &doubt.op {
        Op::Put { .. } => value.is_none(),
        Op::Incr { .. } => value.is_none_or(|value| value.parse::<i64>().is_ok()),
        Op::Touch { .. } => true,
        _ => false,
    };
    let candidates = doubts.iter().filter(may_have).count();
    let place = named.or_else(|| doubts.iter().position(|doubt| may_have(&doubt)))?;
    let doubt = if named.is_some() || candidates == 1 {
        doubts.remove(place)
    } else {
        doubts[place].clone()
    };
    let (state, before) = if named.is_some() {
        effect(&doubt.op, value)
    } else {
        (State::Unknown, Before::Any)
    };
    Some(Entry {
        stamp,
        id: Some(doubt.id),
        called: doubt.called,
        answered: u64::MAX,
        state,
        before,
        reads: Vec::new(),
        cause: None,
    })
}
