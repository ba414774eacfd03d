//! A leader's writes: what a turn asks of a shard becomes log entries, and what came of them finds its way back by token.
//!
//! # What holds
//! - All writes of one call are one log entry (more than fits one goes on in the next), stamped with the clock or shard time, whichever is
//!   ahead; victims that make room for them stand before them in the same entry.
//! - **Every token comes back exactly once**: with its reply, or that nothing was proposed, or in doubt, at the latest when the
//!   patience of its entry is over.
//! - What was proposed and not applied yet counts as there when room is made.
//!
//! Not here: who asks, what a token means, and whether this replica should be asked at all.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use generation_engine::batch::{BatchWriter, Operation, PushError};
use generation_engine::machine::Reply;
use generation_engine::{Command, Shard, Version, Victim};

use super::network::Transport;
use super::replica::{Leader, Outcome, Replica};
use crate::env::disk::Disk;

/// What a counter written by `Incr` may take, in bytes: the digits of the smallest `i64`.
const MAX_COUNTER_LEN: usize = 20;

/// Sessions ended by one step of the sweep.
const SESSIONS_PER_SWEEP: usize = 256;

/// A write and who wants to know what came of it.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a, K> {
    /// Comes back with the answer.
    pub token: K,
    /// What to do.
    pub operation: Operation<'a>,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It was applied, by the entry at this index.
    Applied {
        /// The entry.
        index: u64,
        /// What it answers.
        reply: Reply,
    },
    /// Nothing of it was appended anywhere.
    NotProposed(Option<Leader>),
    /// It cannot be part of a log entry; nothing of it was appended.
    Refused(PushError),
    /// It may have been applied, may be yet, or never will be.
    InDoubt,
}

/// An entry that was proposed.
#[derive(Debug)]
struct Flight<K> {
    /// With the ordinal of each one's operation.
    tokens: Vec<(K, u32)>,
    bytes: u64,
    records: u64,
    deadline: Instant,
}

/// Outcomes that nobody has looked at yet, by number of the entry.
type Outcomes = Rc<RefCell<Vec<(u64, Outcome)>>>;

/// The proposing end of one shard's replica.
#[derive(Debug)]
pub struct Proposer<K> {
    flights: BTreeMap<u64, Flight<K>>,
    next: u64,
    /// Of everything in flight.
    bytes: u64,
    records: u64,
    outcomes: Outcomes,
    /// Answers that need no entry.
    answers: Vec<(K, Answer)>,
    victims: Vec<Victim>,
    patience: Duration,
    led: bool,
}

impl<K> Proposer<K> {
    /// What was proposed is in doubt after `patience`.
    pub fn new(patience: Duration) -> Self {
        Self {
            flights: BTreeMap::new(),
            next: 0,
            bytes: 0,
            records: 0,
            outcomes: Outcomes::default(),
            answers: Vec::new(),
            victims: Vec::new(),
            patience,
            led: false,
        }
    }

    /// Entries proposed and not answered.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Proposes `writes` (drained). `wake` is called when there is something to [drain](Proposer::drain) later.
    ///
    /// # Panics
    /// Never: fewer victims are offered at once than an entry holds.
    pub fn propose<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now: Instant,
        now_ms: u64,
        writes: &mut Vec<Write<'_, K>>,
        wake: &Rc<dyn Fn()>,
    ) {
        if writes.is_empty() {
            return;
        }
        let mut room = self.make_room(replica, writes);
        let mut batch = BatchWriter::new();
        let mut flight = self.flight(now);
        for victim in self.victims.drain(..) {
            let evict = Command::Evict {
                hash: victim.hash,
                version: victim.version,
            };
            let pushed = batch.push(&Operation::from(evict));
            pushed.expect("invariant: fewer victims are offered at once than an entry holds");
        }
        for Write { token, operation } in writes.drain(..) {
            let mut pushed = batch.push(&operation);
            if pushed == Err(PushError::Full) {
                let full = std::mem::take(&mut batch);
                let next = self.flight(now);
                let full_flight = std::mem::replace(&mut flight, next);
                self.send(replica, now_ms, full, full_flight, std::mem::take(&mut room), wake);
                pushed = batch.push(&operation);
            }
            match pushed {
                Ok(ordinal) => flight.tokens.push((token, ordinal)),
                Err(error) => self.answers.push((token, Answer::Refused(error))),
            }
        }
        self.send(replica, now_ms, batch, flight, room, wake);
    }

    /// Proposes that the time of these entries (by hash and version) has come. The tokens come back when that has been applied.
    pub fn propose_expiry<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now: Instant,
        now_ms: u64,
        expired: impl Iterator<Item = (K, (u64, Version))>,
        wake: &Rc<dyn Fn()>,
    ) {
        let mut batch = BatchWriter::new();
        let mut flight = self.flight(now);
        for (token, (hash, version)) in expired {
            match batch.push(&Operation::from(Command::Expire { hash, version })) {
                Ok(ordinal) => flight.tokens.push((token, ordinal)),
                Err(error) => self.answers.push((token, Answer::Refused(error))),
            }
        }
        self.send(replica, now_ms, batch, flight, (0, 0), wake);
    }

    /// One bounded step of the sweep over entries and sessions whose time has come, if this replica leads.
    pub fn sweep<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now: Instant,
        now_ms: u64,
        max_work: usize,
        wake: &Rc<dyn Fn()>,
    ) {
        if !replica.leads() {
            return;
        }
        let (mut due, mut sessions) = (Vec::new(), Vec::new());
        replica.machine().with(|machine| {
            machine.shard_mut().propose_expired(now_ms, max_work, &mut due);
            machine
                .sessions()
                .propose_expired(now_ms, SESSIONS_PER_SWEEP, &mut sessions);
        });
        if due.is_empty() && sessions.is_empty() {
            return;
        }
        let mut batch = BatchWriter::new();
        let due = due.iter().map(|victim| {
            Operation::from(Command::Expire {
                hash: victim.hash,
                version: victim.version,
            })
        });
        let sessions = sessions.iter().map(|&session| Operation::ExpireSession { session });
        for operation in due.chain(sessions) {
            // What does not fit is due again.
            if batch.push(&operation).is_err() {
                break;
            }
        }
        let flight = self.flight(now);
        self.send(replica, now_ms, batch, flight, (0, 0), wake);
    }

    /// Gives back every token whose answer is known.
    ///
    /// # Panics
    /// If an entry was applied and not all of its operations were answered, which the state machine never does.
    pub fn drain<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now: Instant,
        mut each: impl FnMut(K, Answer),
    ) {
        for (token, answer) in self.answers.drain(..) {
            each(token, answer);
        }
        for (number, outcome) in self.outcomes.take() {
            // One that was given up is in doubt, whatever comes of it.
            let Some(flight) = self.land(number) else { continue };
            match outcome {
                Outcome::Applied { log_id, replies } => {
                    let index = log_id.index;
                    for (token, ordinal) in flight.tokens {
                        let reply = replies.replies.get(ordinal as usize);
                        let reply = *reply.expect("invariant: each operation of an entry is answered");
                        each(token, Answer::Applied { index, reply });
                    }
                }
                Outcome::NotProposed(leader) => {
                    for (token, _) in flight.tokens {
                        each(token, Answer::NotProposed(leader));
                    }
                }
                Outcome::InDoubt => flight
                    .tokens
                    .into_iter()
                    .for_each(|(token, _)| each(token, Answer::InDoubt)),
            }
        }
        while let Some((&number, flight)) = self.flights.first_key_value()
            && flight.deadline <= now
        {
            let flight = self.land(number).expect("invariant: it was looked at just now");
            flight
                .tokens
                .into_iter()
                .for_each(|(token, _)| each(token, Answer::InDoubt));
        }
        let leads = replica.leads();
        if self.led && !leads {
            // What was offered for removal will not be removed by us.
            replica.machine().with(|machine| machine.shard_mut().forget_proposals());
        }
        self.led = leads;
    }

    /// When something in flight is in doubt, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.flights.first_key_value().map(|(_, flight)| flight.deadline)
    }

    fn flight(&self, now: Instant) -> Flight<K> {
        Flight {
            tokens: Vec::new(),
            bytes: 0,
            records: 0,
            deadline: now + self.patience,
        }
    }

    fn send<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now_ms: u64,
        batch: BatchWriter,
        mut flight: Flight<K>,
        (bytes, records): (u64, u64),
        wake: &Rc<dyn Fn()>,
    ) {
        (flight.bytes, flight.records) = (bytes, records);
        self.bytes += bytes;
        self.records += records;
        let number = self.next;
        self.next += 1;
        self.flights.insert(number, flight);
        let time_ms = replica
            .machine()
            .with(|machine| machine.shard().shard_time_ms().max(now_ms));
        let (outcomes, wake) = (Rc::clone(&self.outcomes), Rc::clone(wake));
        replica.propose(batch.finish(time_ms).into(), move |outcome| {
            outcomes.borrow_mut().push((number, outcome));
            wake();
        });
    }

    fn land(&mut self, number: u64) -> Option<Flight<K>> {
        let flight = self.flights.remove(&number)?;
        self.bytes -= flight.bytes;
        self.records -= flight.records;
        Some(flight)
    }

    /// Finds the victims that `writes` need beside what is in flight; returns what they may add. What they add at most is cheap to add
    /// up; only when that would not fit is each key looked up, so that overwriting what is there evicts nothing.
    fn make_room<D: Disk, T: Transport>(&mut self, replica: &Replica<D, T>, writes: &[Write<'_, K>]) -> (u64, u64) {
        replica.machine().with(|machine| {
            let shard = machine.shard_mut();
            let most = writes.iter().filter_map(|write| growth(shard, &write.operation));
            let (mut bytes, mut records) = most.fold((0, 0), |(bytes, records), (_, cost)| (bytes + cost, records + 1));
            let stats = shard.stats();
            let fits = stats.used_bytes + self.bytes + bytes <= stats.budget_bytes
                && stats
                    .max_records
                    .is_none_or(|max_records| stats.records + self.records + records <= max_records);
            if fits {
                return (bytes, records);
            }
            (bytes, records) = (0, 0);
            for write in writes {
                let Some((key, cost)) = growth(shard, &write.operation) else {
                    continue;
                };
                if let Some(entry) = shard.peek(key) {
                    bytes += cost.saturating_sub(shard.cost(key.len(), entry.value.len()));
                } else {
                    bytes += cost;
                    records += 1;
                }
            }
            shard.propose_victims(self.bytes + bytes, self.records + records, &mut self.victims);
            (bytes, records)
        })
    }
}

/// The key and the cost of the entry an operation may write.
fn growth<'a>(shard: &Shard, operation: &Operation<'a>) -> Option<(&'a [u8], u64)> {
    let Operation::Command { command, .. } = operation else {
        return None;
    };
    match *command {
        Command::Put { key, value, .. } => Some((key, shard.cost(key.len(), value.len()))),
        Command::Incr { key, .. } => Some((key, shard.cost(key.len(), MAX_COUNTER_LEN))),
        Command::Delete { .. } | Command::Touch { .. } | Command::Evict { .. } | Command::Expire { .. } => None,
    }
}
