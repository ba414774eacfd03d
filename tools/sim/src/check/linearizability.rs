//! Each key is a linearizable register: its operations take effect one after another, each between its call and its return
//! (Herlihy and Wing, TOPLAS 1990). Keys are independent, so each is checked alone (locality, ibid.).
//!
//! In general that is a search (Gibbons and Korach, SIAM J. Comput. 1997: NP-complete); with versions it is not. The order of
//! states is given by the [timeline](super::timeline), and what is left is one pass that puts every state at its earliest
//! possible moment: a state begins when the one before it has been seen by all who saw it, and no later than its writer's
//! return and its readers' returns. If the earliest moments do not fit, none do. Cost: sorting.
//!
//! Beside real time, what the replies say must fit together: a conditional write follows the version it names, a counter the
//! sum, a read at log index i what was there at i. A read that finds nothing needs a reason: nothing was ever there, a delete
//! (acknowledged or in doubt), a removal by the log, or a history under `pressure`, where entries may vanish unseen.
//!
//! Not seen: contradictions that any write in doubt might explain are let pass where telling would need a search.

use std::collections::{BTreeMap, BTreeSet};

use super::Report;
use super::timeline::{Before, Doubt, Entry, Miss, State, Timeline, timelines};
use crate::history::{Freshness, History, Op};

/// Most counter steps in doubt whose sums are tried out; with more anything is believed.
const MAX_DOUBTFUL_SUMS: usize = 12;

/// See the module.
pub(super) fn check(history: &History, report: &mut Report) {
    for timeline in timelines(history) {
        let key = timeline.key.clone();
        for what in (Checker {
            timeline,
            pressure: history.header.pressure,
        })
        .contradictions()
        {
            report.violation(format!("key `{key}`: {what}"));
        }
    }
}

struct Checker {
    timeline: Timeline,
    pressure: bool,
}

impl Checker {
    fn contradictions(mut self) -> Vec<String> {
        let mut found = std::mem::take(&mut self.timeline.contradictions);
        let mut gaps: BTreeMap<usize, Vec<Miss>> = BTreeMap::new();
        self.follow(&mut found, &mut gaps);
        self.fit_indexes(&mut found);
        let lazy = self.place_misses(&mut found, &mut gaps);
        self.open_gaps(&mut found, gaps);
        if found.is_empty() {
            self.fit_time(&mut found, lazy);
        }
        found
    }

    /// Whether a write in doubt that began by `by` could have made a difference.
    fn doubtful(&self, by: u64, matters: impl Fn(&Op) -> bool) -> bool {
        self.timeline
            .doubts
            .iter()
            .any(|doubt| doubt.called <= by && matters(&doubt.op))
    }

    /// Every state follows the one before it as its write says.
    fn follow(&mut self, found: &mut Vec<String>, gaps: &mut BTreeMap<usize, Vec<Miss>>) {
        for place in 1..self.timeline.entries.len() {
            let (before, entry) = (&self.timeline.entries[place - 1], &self.timeline.entries[place]);
            let anything = |_: &Op| true;
            let complaint = match entry.before {
                Before::Absent => {
                    if before.state != State::Absent {
                        gaps.entry(place - 1).or_default();
                    }
                    None
                }
                Before::Present | Before::Same if before.state == State::Absent => {
                    let writes = |op: &Op| matches!(op, Op::Put { .. } | Op::Incr { .. });
                    (!self.doubtful(entry.answered, writes)).then(|| "needs an entry and follows".to_owned())
                }
                Before::Any | Before::Present | Before::Same => None,
                Before::Version(version) if before.stamp == (entry.stamp.0, version) => None,
                Before::Version(version) => {
                    let unseen = version > before.stamp.1 && self.doubtful(entry.answered, anything);
                    let name = format!("{}.{}", version >> 16, version & 0xffff);
                    (!unseen).then(|| format!("was to replace version {name} and follows"))
                }
                Before::Plus(delta) => self.sum(before, entry, delta),
            };
            if let Some(complaint) = complaint {
                found.push(format!("{} {complaint} {}", entry.name(), before.name()));
            }
            if entry.before == Before::Same && self.timeline.doubts.is_empty() {
                let (kept, name) = (before.state.clone(), before.name());
                let entry = &mut self.timeline.entries[place];
                match (&kept, &entry.state) {
                    (State::Value(_), State::Unknown) => entry.state = kept,
                    (State::Value(kept), State::Value(now)) if kept != now => {
                        found.push(format!("{} keeps the value of {name} and has another", entry.name()));
                    }
                    _ => {}
                }
            }
        }
    }

    /// What is wrong with a counter's step, if anything.
    fn sum(&self, before: &Entry, entry: &Entry, delta: i64) -> Option<String> {
        let base = match &before.state {
            State::Absent => 0,
            State::Unknown => return None,
            State::Value(value) => value.parse::<i64>().ok()?,
        };
        let State::Value(now) = &entry.state else { return None };
        let now: i64 = now.parse().ok()?;
        let missing = now.wrapping_sub(base).wrapping_sub(delta);
        // An entry that may have vanished counts from nothing again.
        if missing == 0
            || (self.pressure && now == delta)
            || self.doubtful(entry.answered, |op| !matches!(op, Op::Incr { .. }))
        {
            return None;
        }
        let steps: Vec<i64> = self
            .timeline
            .doubts
            .iter()
            .filter(|doubt| doubt.called <= entry.answered)
            .filter_map(|doubt| match doubt.op {
                Op::Incr { delta, .. } => Some(delta),
                _ => None,
            })
            .collect();
        if steps.len() > MAX_DOUBTFUL_SUMS {
            return None;
        }
        let sums = (0..1_u32 << steps.len()).map(|subset| {
            let chosen = steps.iter().enumerate().filter(|(place, _)| subset >> place & 1 == 1);
            chosen.fold(0_i64, |sum, (_, step)| sum.wrapping_add(*step))
        });
        let explained = sums.into_iter().any(|sum| sum == missing);
        (!explained).then(|| format!("is {now}, which is not {base} and {delta}, and follows"))
    }

    /// A read at a log index saw what was there at that index.
    fn fit_indexes(&self, found: &mut Vec<String>) {
        let entries = &self.timeline.entries;
        for (place, entry) in entries.iter().enumerate() {
            for read in entry.reads.iter().filter(|read| read.index != 0) {
                if read.index < entry.index() {
                    let what = format!("operation {} at index {} saw {}", read.id, read.index, entry.name());
                    found.push(what);
                }
                if let Some(next) = entries.get(place + 1)
                    && next.stamp.0 == entry.stamp.0
                    && next.index() <= read.index
                {
                    found.push(format!(
                        "operation {} at index {} saw {}, though {} was applied by then",
                        read.id,
                        read.index,
                        entry.name(),
                        next.name()
                    ));
                }
            }
        }
    }

    /// Puts every miss whose index is known where it belongs; gives back the others.
    fn place_misses(&mut self, found: &mut Vec<String>, gaps: &mut BTreeMap<usize, Vec<Miss>>) -> Vec<Miss> {
        let mut lazy = Vec::new();
        for miss in std::mem::take(&mut self.timeline.misses) {
            if miss.read.index == 0 {
                lazy.push(miss);
                continue;
            }
            let stamp = (miss.era, miss.read.index << 16 | 0xffff);
            let place = self.timeline.entries.partition_point(|entry| entry.stamp <= stamp) - 1;
            let entry = &mut self.timeline.entries[place];
            if entry.state == State::Absent {
                entry.reads.push(miss.read);
                continue;
            }
            if let Some(later) = entry.reads.iter().find(|read| read.index >= miss.read.index) {
                found.push(format!(
                    "operation {} at index {} found nothing, and operation {} at index {} saw {} again",
                    miss.read.id,
                    miss.read.index,
                    later.id,
                    later.index,
                    entry.name()
                ));
                continue;
            }
            gaps.entry(place).or_default().push(miss);
        }
        lazy
    }

    /// Explains absent states that no acknowledged operation made by deletes in doubt, the oldest first.
    fn open_gaps(&mut self, found: &mut Vec<String>, gaps: BTreeMap<usize, Vec<Miss>>) {
        let mut opened = Vec::new();
        for (place, misses) in gaps {
            let entry = &self.timeline.entries[place];
            let next = self.timeline.entries.get(place + 1);
            let by = misses
                .iter()
                .map(|miss| miss.read.answered)
                .chain(next.map(|next| next.answered))
                .min()
                .unwrap_or(u64::MAX);
            let mut gap = Entry {
                stamp: entry.stamp,
                id: None,
                called: 0,
                answered: u64::MAX,
                state: State::Absent,
                before: Before::Any,
                reads: misses.iter().map(|miss| miss.read).collect(),
                cause: None,
            };
            if !self.pressure {
                let Some(doubt) = take_delete(&mut self.timeline.doubts, by) else {
                    let reader = misses
                        .first()
                        .map(|miss| miss.read.id)
                        .or(next.and_then(|next| next.id));
                    let reader = reader.unwrap_or_default();
                    found.push(format!(
                        "operation {reader} found nothing after {}, which nothing removed",
                        entry.name()
                    ));
                    continue;
                };
                gap.called = doubt.called;
                gap.id = Some(doubt.id);
            }
            opened.push((place, gap));
        }
        for (place, gap) in opened.into_iter().rev() {
            self.timeline.entries.insert(place + 1, gap);
        }
    }

    /// Every state has a moment between its writer's call and return that fits its readers' and its neighbours'.
    fn fit_time(&self, found: &mut Vec<String>, mut lazy: Vec<Miss>) {
        // Where a delete in doubt may be the reason, which misses it explains would be a search.
        let deletes = self
            .timeline
            .doubts
            .iter()
            .filter(|doubt| matches!(doubt.op, Op::Delete { .. }));
        let first_delete = deletes.map(|doubt| doubt.called).min().unwrap_or(u64::MAX);
        // Under pressure every moment is one at which there may have been nothing.
        let first_delete = if self.pressure { 0 } else { first_delete };
        lazy.retain(|miss| miss.read.freshness == Freshness::Linearizable && miss.read.answered < first_delete);
        let entries = &self.timeline.entries;
        // The end of the state before: when its last reader at the earliest had read it.
        let mut end = 0;
        for (place, entry) in entries.iter().enumerate() {
            let step = step(end, entry);
            if step.begin > entry.answered {
                let before = &entries[place.saturating_sub(1)];
                found.push(format!(
                    "{} had returned before {} ended: {}",
                    entry.name(),
                    before.name(),
                    span(entry)
                ));
                return;
            }
            if let Some(read) = linearizable(entry).find(|read| read.answered < step.begin) {
                found.push(format!(
                    "operation {} returned {} ns before {} can have been there",
                    read.id,
                    step.begin - read.answered,
                    entry.name()
                ));
                return;
            }
            end = step.end;
            if entry.state != State::Absent {
                continue;
            }
            // Whoever found nothing and cannot have done so at the next absence did so at this one, and this one lasted.
            loop {
                let next = next_absence(end, &entries[place + 1..]);
                let due: BTreeSet<usize> = (0..lazy.len())
                    .filter(|&number| next.is_none_or(|next| lazy[number].read.answered < next))
                    .collect();
                if due.is_empty() {
                    break;
                }
                let mut number = 0;
                let mut late = None;
                lazy.retain(|miss| {
                    let placed = due.contains(&number);
                    number += 1;
                    if placed {
                        if miss.read.answered < step.begin {
                            late = late.or(Some(*miss));
                        } else {
                            end = end.max(miss.read.called);
                        }
                    }
                    !placed
                });
                if let Some(miss) = late {
                    found.push(format!(
                        "operation {} found nothing while there was an entry",
                        miss.read.id
                    ));
                    return;
                }
                if next.is_none() {
                    break;
                }
            }
        }
    }
}

/// When a state begins at the earliest, and when it can end.
struct Step {
    begin: u64,
    end: u64,
}

fn step(end: u64, entry: &Entry) -> Step {
    let begin = end.max(entry.called);
    let end = linearizable(entry).map(|read| read.called).fold(begin, u64::max);
    Step { begin, end }
}

fn linearizable(entry: &Entry) -> impl Iterator<Item = &super::timeline::Read> {
    entry
        .reads
        .iter()
        .filter(|read| read.freshness == Freshness::Linearizable)
}

/// When the next absent state begins at the earliest.
fn next_absence(mut end: u64, entries: &[Entry]) -> Option<u64> {
    for entry in entries {
        let step = step(end, entry);
        if entry.state == State::Absent {
            return Some(step.begin);
        }
        end = step.end;
    }
    None
}

/// The oldest delete in doubt that began by `by`.
fn take_delete(doubts: &mut Vec<Doubt>, by: u64) -> Option<Doubt> {
    let deletes = doubts
        .iter()
        .enumerate()
        .filter(|(_, doubt)| matches!(doubt.op, Op::Delete { .. }));
    let (place, doubt) = deletes.min_by_key(|(_, doubt)| doubt.called)?;
    if doubt.called > by {
        return None;
    }
    Some(doubts.remove(place))
}

fn span(entry: &Entry) -> String {
    format!("it took from {} to {} ns", entry.called, entry.answered)
}

#[cfg(test)]
#[path = "linearizability_tests.rs"]
mod tests;
