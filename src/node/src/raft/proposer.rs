//! A leader's writes: what a turn asks of a shard becomes log entries, and what came of them finds its way back by token.
//!
//! # What holds
//! - All writes of one call are one log entry (more than fits one, or half a megabyte, goes on in the next), stamped with the clock or shard time, whichever is
//!   ahead; victims that make room for them stand before them in the same entry.
//! - **Every token comes back exactly once**: with its reply, or that nothing was proposed, or in doubt, at the latest when the
//!   patience of its entry is over.
//! - What was proposed and not applied yet counts as there when room is made.
//! - At most [`PIPELINE`] entries are on their way. What comes meanwhile gathers in the next ones, so that entries grow with the load: an
//!   entry costs the same with one operation or with hundreds. What gathers and does not get to be proposed has not been.
//! - An entry waits for company where that is likely to come: whoever has just been answered usually asks again, so what gathered
//!   while the last entry was on its way would leave without them, and entries would only ever be half as large as they could be. It
//!   waits for half as long as that entry took at most, and not at all if nobody else is expected.
//! - What the journal would not take is refused before anything of it is proposed.
//! - A leader that no majority has heard of lately asks one first.
//!
//! Not here: who asks, what a token means, and whether this replica should be asked at all.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use generation_engine::batch::{Batch, BatchWriter, Operation, PushError};
use generation_engine::machine::Reply;
use generation_engine::{Command, Condition, Outcome as Executed, Shard, Version, Victim};
use openraft_rt::AsyncRuntime as _;

use super::network::Transport;
use super::replica::{Leader, Outcome, Replica};
use super::runtime::Runtime;
use super::types::{LogId, Replies};
use crate::env::disk::Disk;
use crate::points;
use generation_engine::mutants::{Mutant, active};

/// What a counter written by `Incr` may take, in bytes: the digits of the smallest `i64`.
const MAX_COUNTER_LEN: usize = 20;

/// Sessions ended by one step of the sweep.
const SESSIONS_PER_SWEEP: usize = 256;

/// Bytes of an entry above which what comes goes on in the next: an entry is written whole, and sent whole.
const ENTRY_BYTES: usize = 512 << 10;

/// Entries of a shard on their way at once.
pub const PIPELINE: usize = 1;

/// Longest wait for company.
const COMPANY: Duration = Duration::from_millis(3);

/// Bytes of entries that may gather.
const GATHERED_BYTES: usize = 32 << 20;

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
    /// Nothing of it was appended anywhere, because no majority answers.
    NoQuorum,
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
    proposed: Instant,
}

/// An entry that gathers.
#[derive(Debug)]
struct Gathering<K> {
    batch: BatchWriter,
    flight: Flight<K>,
}

/// Whether a majority is being asked whether this replica still leads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Confirmation {
    #[default]
    None,
    UnderWay,
    Failed,
}

/// Outcomes that nobody has looked at yet, by number of the entry.
type Outcomes = Rc<RefCell<Vec<(u64, Outcome)>>>;

/// The proposing end of one shard's replica.
#[derive(Debug)]
pub struct Proposer<K> {
    flights: BTreeMap<u64, Flight<K>>,
    next: u64,
    /// What is proposed next, in order.
    gathering: VecDeque<Gathering<K>>,
    gathered_bytes: usize,
    /// Of everything in flight or gathering.
    bytes: u64,
    records: u64,
    outcomes: Outcomes,
    confirmation: Rc<Cell<Confirmation>>,
    /// How many writes were under way when an entry was last applied, and until when the next entry waits for about as many.
    company: usize,
    company_until: Option<Instant>,
    /// Answers that need no entry.
    answers: Vec<(K, Answer)>,
    victims: Vec<Victim>,
    patience: Duration,
    /// The longest entry the journal takes.
    entry_bytes: usize,
    /// Nothing is proposed for the moment.
    held: bool,
    led: bool,
}

impl<K> Proposer<K> {
    /// What was proposed is in doubt after `patience`.
    pub fn new(patience: Duration) -> Self {
        Self {
            flights: BTreeMap::new(),
            next: 0,
            gathering: VecDeque::new(),
            gathered_bytes: 0,
            bytes: 0,
            records: 0,
            outcomes: Outcomes::default(),
            confirmation: Rc::default(),
            company: 0,
            company_until: None,
            answers: Vec::new(),
            victims: Vec::new(),
            patience,
            entry_bytes: usize::MAX,
            held: false,
            led: false,
        }
    }

    /// Entries proposed or gathering, and not answered.
    pub fn in_flight(&self) -> usize {
        self.flights.len() + self.gathering.len()
    }

    /// Entries proposed, and not answered.
    pub fn on_their_way(&self) -> usize {
        self.flights.len()
    }

    /// Has what comes gather and nothing be proposed, or goes on: so that nothing is in doubt when leadership is handed over.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether so much gathers that nothing more is taken.
    pub fn is_full(&self) -> bool {
        self.gathered_bytes >= GATHERED_BYTES
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
        self.entry_bytes = replica.entry_bytes();
        let (bytes, records) = self.make_room(replica, writes);
        let mut victims = std::mem::take(&mut self.victims);
        for victim in victims.drain(..) {
            let evict = Command::Evict {
                hash: victim.hash,
                version: victim.version,
            };
            let pushed = self.push(now, &Operation::from(evict));
            pushed.expect("invariant: an eviction fits an entry");
        }
        self.victims = victims;
        for Write { token, operation } in writes.drain(..) {
            self.push_for(now, token, &operation);
        }
        if let Some(last) = self.gathering.back_mut() {
            last.flight.bytes += bytes;
            last.flight.records += records;
            self.bytes += bytes;
            self.records += records;
        }
        self.send(replica, now, now_ms, wake);
    }

    /// Puts an operation into the entry that gathers; its ordinal there.
    fn push(&mut self, now: Instant, operation: &Operation<'_>) -> Result<u32, PushError> {
        if let Some(last) = self.gathering.back_mut()
            && last.batch.len_bytes() < ENTRY_BYTES
        {
            let before = last.batch.len_bytes();
            let pushed = last.batch.push(operation);
            self.gathered_bytes += last.batch.len_bytes() - before;
            if pushed != Err(PushError::Full) {
                return pushed;
            }
        }
        let mut batch = BatchWriter::within(self.entry_bytes);
        let pushed = batch.push(operation)?;
        self.gathered_bytes += batch.len_bytes();
        let flight = self.flight(now);
        self.gathering.push_back(Gathering { batch, flight });
        Ok(pushed)
    }

    /// The same for somebody, who is answered at once if it is no good.
    fn push_for(&mut self, now: Instant, token: K, operation: &Operation<'_>) {
        match (self.push(now, operation), self.gathering.back_mut()) {
            (Ok(ordinal), Some(last)) => last.flight.tokens.push((token, ordinal)),
            (Ok(_), None) => self.answers.push((token, Answer::NotProposed(None))),
            (Err(error), _) => self.answers.push((token, Answer::Refused(error))),
        }
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
        self.entry_bytes = replica.entry_bytes();
        for (token, (hash, version)) in expired {
            self.push_for(now, token, &Operation::from(Command::Expire { hash, version }));
        }
        if self.gathering.is_empty() {
            // An entry without operations stamps the time.
            let (batch, flight) = (BatchWriter::new(), self.flight(now));
            self.gathered_bytes += batch.len_bytes();
            self.gathering.push_back(Gathering { batch, flight });
        }
        self.send(replica, now, now_ms, wake);
    }

    /// One bounded step of the sweep over entries and sessions whose time has come, if this replica leads.
    ///
    /// # Panics
    /// Never: an expiry fits an entry.
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
        self.entry_bytes = replica.entry_bytes();
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
        let due = due.iter().map(|victim| {
            Operation::from(Command::Expire {
                hash: victim.hash,
                version: victim.version,
            })
        });
        let sessions = sessions.iter().map(|&session| Operation::ExpireSession { session });
        for operation in due.chain(sessions) {
            let pushed = self.push(now, &operation);
            pushed.expect("invariant: an expiry fits an entry");
        }
        self.send(replica, now, now_ms, wake);
    }

    /// Gives back every token whose answer is known, and proposes what has gathered.
    ///
    /// # Panics
    /// If an entry was applied and not all of its operations were answered, which the state machine never does.
    pub fn drain<D: Disk, T: Transport>(
        &mut self,
        replica: &Replica<D, T>,
        now: Instant,
        now_ms: u64,
        wake: &Rc<dyn Fn()>,
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
                    self.expect_company(now, &flight);
                    let index = log_id.index;
                    for (token, ordinal) in flight.tokens {
                        let place = if active(Mutant::AnswersSwapped) {
                            replies.replies.len() - 1 - ordinal as usize
                        } else {
                            ordinal as usize
                        };
                        let reply = replies.replies.get(place);
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
        if self.confirmation.get() == Confirmation::Failed {
            self.confirmation.set(Confirmation::None);
            while leads && let Some(never) = self.take_gathered() {
                self.release(&never.flight);
                let tokens = never.flight.tokens.into_iter();
                tokens.for_each(|(token, _)| each(token, Answer::NoQuorum));
            }
        }
        while let Some(front) = self.gathering.front()
            && (!leads || front.flight.deadline <= now)
        {
            let Some(never) = self.take_gathered() else { break };
            self.release(&never.flight);
            let leader = replica.leader();
            let tokens = never.flight.tokens.into_iter();
            tokens.for_each(|(token, _)| each(token, Answer::NotProposed(leader)));
        }
        if self.led && !leads {
            // What was offered for removal will not be removed by us.
            replica.machine().with(|machine| machine.shard_mut().forget_proposals());
        }
        self.led = leads;
        self.send(replica, now, now_ms, wake);
    }

    /// When something in flight is in doubt, or something that gathers is proposed or given up, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let flying = self.flights.first_key_value().map(|(_, flight)| flight.deadline);
        let gathering = self.gathering.front().map(|front| front.flight.deadline);
        let waits = self.flights.is_empty() && !self.held && self.confirmation.get() == Confirmation::None;
        let company = self.company_until.filter(|_| waits && !self.gathering.is_empty());
        [flying, gathering, company].into_iter().flatten().min()
    }

    fn flight(&self, now: Instant) -> Flight<K> {
        Flight {
            tokens: Vec::new(),
            bytes: 0,
            records: 0,
            deadline: now + self.patience,
            proposed: now,
        }
    }

    /// Who was answered by an entry may ask again, and join those who gathered meanwhile.
    fn expect_company(&mut self, now: Instant, landed: &Flight<K>) {
        let gathered: usize = self
            .gathering
            .iter()
            .map(|gathering| gathering.flight.tokens.len())
            .sum();
        self.company = landed.tokens.len() + gathered;
        let took = now.saturating_duration_since(landed.proposed);
        self.company_until = Some(now + COMPANY.min(took / 2));
    }

    /// Whether what gathers should wait for more.
    fn waits_for_company(&self, now: Instant) -> bool {
        let Some(front) = self.gathering.front().filter(|_| self.gathering.len() == 1) else {
            return false;
        };
        // Most of those expected will do.
        front.flight.tokens.len() * 8 < self.company * 7 && self.company_until.is_some_and(|until| now < until)
    }

    /// Proposes what has gathered, as far as it may.
    fn send<D: Disk, T: Transport>(&mut self, replica: &Replica<D, T>, now: Instant, now_ms: u64, wake: &Rc<dyn Fn()>) {
        if self.gathering.is_empty() || self.held || self.confirmation.get() == Confirmation::UnderWay {
            return;
        }
        if self.flights.is_empty() && self.waits_for_company(now) {
            return;
        }
        if replica.leads() && !replica.is_confirmed() {
            self.confirmation.set(Confirmation::UnderWay);
            let (confirmation, wake, replica) = (Rc::clone(&self.confirmation), Rc::clone(wake), replica.clone());
            drop(Runtime::spawn(async move {
                let confirmed = replica.renew().await;
                confirmation.set(if confirmed {
                    Confirmation::None
                } else {
                    Confirmation::Failed
                });
                wake();
            }));
            return;
        }
        while self.flights.len() < PIPELINE
            && let Some(Gathering { batch, mut flight }) = self.take_gathered()
        {
            flight.proposed = now;
            let number = self.next;
            self.next += 1;
            self.flights.insert(number, flight);
            let time_ms = replica
                .machine()
                .with(|machine| machine.shard().shard_time_ms().max(now_ms));
            let time_ms = if active(Mutant::TimeBackwards) { now_ms } else { time_ms };
            let (outcomes, wake) = (Rc::clone(&self.outcomes), Rc::clone(wake));
            let entry = batch.finish(time_ms);
            if active(Mutant::ReplyBeforeCommit) {
                outcomes.borrow_mut().extend(guess(number, replica, &entry));
                wake();
            }
            replica.propose(entry.into(), move |outcome| {
                outcomes.borrow_mut().push((number, outcome));
                wake();
            });
            D::point(points::ENTRY_PROPOSED);
        }
    }

    fn take_gathered(&mut self) -> Option<Gathering<K>> {
        let front = self.gathering.pop_front()?;
        self.gathered_bytes -= front.batch.len_bytes();
        Some(front)
    }

    fn land(&mut self, number: u64) -> Option<Flight<K>> {
        let flight = self.flights.remove(&number)?;
        self.release(&flight);
        Some(flight)
    }

    fn release(&mut self, flight: &Flight<K>) {
        self.bytes -= flight.bytes;
        self.records -= flight.records;
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
            if !active(Mutant::BudgetIgnored) {
                shard.propose_victims(self.bytes + bytes, self.records + records, &mut self.victims);
            }
            if active(Mutant::EvictionUnlogged) {
                for Victim { hash, version } in self.victims.drain(..) {
                    shard.apply(&Command::Evict { hash, version });
                }
            }
            (bytes, records)
        })
    }
}

/// For [`Mutant::ReplyBeforeCommit`]: what an entry that puts without conditions will come to, if it is the next one and is committed.
fn guess<D: Disk, T: Transport>(number: u64, replica: &Replica<D, T>, entry: &[u8]) -> Option<(u64, Outcome)> {
    let batch = Batch::parse(entry).ok()?;
    let index = replica.last_index() + 1;
    let replies = (0..)
        .zip(batch.operations())
        .map(|(position, operation)| match operation {
            Operation::Command {
                command:
                    Command::Put {
                        condition: Condition::None,
                        ..
                    },
                ..
            } => {
                let version = Version::new(index, position);
                Some(Reply::Outcome(Executed::Applied { version }))
            }
            _ => None,
        });
    let replies = Replies {
        replies: replies.collect::<Option<_>>()?,
    };
    let log_id = LogId {
        index,
        ..replica.machine().applied()?
    };
    Some((number, Outcome::Applied { log_id, replies }))
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
