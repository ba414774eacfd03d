//! A shard of this core and the one way to change it: a batch is proposed, and its replies come back.
//!
//! On a single node there is nobody to agree with, so a batch is applied as it is proposed and its replies are there at once;
//! callers do not rely on that. They collect replies with [`Replica::drain`], by the tokens they proposed with, which is all they
//! will see when a log between nodes stands in between.
//!
//! Invariants:
//! - Everything proposed in one call becomes one log entry: the next index, stamped with the node's clock unless shard time is
//!   ahead. (More than fits one entry goes on in the next.) What is asked in sessions is an entry of its own behind the rest, so that
//!   a batch without sessions is looked up ahead as a whole.
//! - Victims that make room for a batch precede it in its entry, so every replica removes the same entries at the same place.

use generation_engine::batch::Operation;
use generation_engine::machine::{Machine, Reply};
use generation_engine::session::SessionLimits;
use generation_engine::{Command, Shard, ShardConfig, Version, Victim};

/// Most commands in one log entry: a position has 16 bits.
const MAX_ENTRY_COMMANDS: usize = 1 << 16;

/// Sessions ended by one step of the sweep.
const SESSIONS_PER_SWEEP: usize = 256;

/// What a counter written by `Incr` may take, in bytes: the digits of the smallest `i64`.
const MAX_COUNTER_LEN: usize = 20;

/// One shard with its place in the log.
#[derive(Debug)]
pub(crate) struct Replica<T> {
    machine: Machine,
    index: u64,
    /// Commands in the entry being applied.
    position: usize,
    replies: Vec<(T, Reply)>,
    /// Of the commands being applied.
    results: Vec<Reply>,
    victims: Vec<Victim>,
    entries: u64,
}

impl<T> Replica<T> {
    pub(crate) fn new(config: ShardConfig, sessions: SessionLimits) -> Self {
        // Its one replica has the first id.
        let machine = Machine::new(config, sessions, 2);
        let index = machine.shard().applied_index();
        Self {
            machine,
            index,
            position: 0,
            replies: Vec::new(),
            results: Vec::new(),
            victims: Vec::new(),
            entries: 0,
        }
    }

    /// The shard, for reading.
    pub(crate) fn shard(&self) -> &Shard {
        self.machine.shard()
    }

    /// The shard, for reading with recency.
    pub(crate) fn shard_mut(&mut self) -> &mut Shard {
        self.machine.shard_mut()
    }

    /// Log entries applied since the start.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Proposes `batch` (drained), of which these are the hashes ([`Shard::command_hash`]), as one log entry of `now_ms`.
    pub(crate) fn propose(&mut self, now_ms: u64, batch: &mut Vec<(T, Command<'_>)>, mut hashes: &[u64]) {
        self.make_room(batch.iter().map(|(_, command)| command));
        self.begin(now_ms);
        self.evict(now_ms);
        while !batch.is_empty() {
            if self.position == MAX_ENTRY_COMMANDS {
                self.begin(now_ms);
            }
            let count = batch.len().min(MAX_ENTRY_COMMANDS - self.position);
            self.position += count;
            let (shard, results) = (self.machine.shard_mut(), &mut self.results);
            let commands = batch[..count].iter().map(|(_, command)| *command);
            let hashes = hashes.split_off(..count).expect("invariant: a hash for each command");
            shard.apply_batch_hashed(commands, hashes, |_, outcome| results.push(Reply::Outcome(outcome)));
            let tokens = batch.drain(..count).map(|(token, _)| token);
            self.replies.extend(tokens.zip(results.drain(..)));
        }
    }

    /// Proposes what is asked in sessions, and of them (drained), as one log entry of `now_ms`.
    pub(crate) fn propose_in_sessions(&mut self, now_ms: u64, batch: &mut Vec<(T, Operation<'_>)>) {
        self.make_room(batch.iter().filter_map(|(_, operation)| match operation {
            Operation::Command { command, .. } => Some(command),
            _ => None,
        }));
        self.begin(now_ms);
        self.evict(now_ms);
        for (token, operation) in batch.drain(..) {
            let reply = self.apply(now_ms, &operation);
            self.replies.push((token, reply));
        }
    }

    /// Proposes that these entries' time has come, if the clock is past it; shard time follows the clock.
    pub(crate) fn propose_expiry(&mut self, now_ms: u64, expired: &[(u64, Version)]) {
        self.begin(now_ms);
        for &(hash, version) in expired {
            self.apply(now_ms, &Command::Expire { hash, version }.into());
        }
    }

    /// One bounded step of the expiry sweep; whatever is due goes as one log entry.
    pub(crate) fn sweep(&mut self, now_ms: u64, max_work: usize) {
        let mut due = std::mem::take(&mut self.victims);
        let mut sessions = Vec::new();
        self.machine.shard_mut().propose_expired(now_ms, max_work, &mut due);
        self.machine
            .sessions()
            .propose_expired(now_ms, SESSIONS_PER_SWEEP, &mut sessions);
        if !due.is_empty() || !sessions.is_empty() {
            self.begin(now_ms);
            for victim in due.drain(..) {
                let expire = Command::Expire {
                    hash: victim.hash,
                    version: victim.version,
                };
                self.apply(now_ms, &expire.into());
            }
            for session in sessions {
                self.apply(now_ms, &Operation::ExpireSession { session });
            }
        }
        self.victims = due;
    }

    /// Gives every reply that has come since the last call, in the order of proposal.
    pub(crate) fn drain(&mut self, mut each: impl FnMut(&Shard, T, Reply)) {
        for (token, reply) in self.replies.drain(..) {
            each(self.machine.shard(), token, reply);
        }
    }

    fn begin(&mut self, now_ms: u64) {
        self.index += 1;
        self.position = 0;
        self.entries += 1;
        self.machine.shard_mut().begin(self.index, now_ms);
    }

    fn evict(&mut self, now_ms: u64) {
        let mut victims = std::mem::take(&mut self.victims);
        for victim in victims.drain(..) {
            let evict = Command::Evict {
                hash: victim.hash,
                version: victim.version,
            };
            self.apply(now_ms, &evict.into());
        }
        self.victims = victims;
    }

    fn apply(&mut self, now_ms: u64, operation: &Operation<'_>) -> Reply {
        if self.position == MAX_ENTRY_COMMANDS {
            self.begin(now_ms);
        }
        self.position += 1;
        self.machine.apply_operation(operation)
    }

    /// Finds the victims that `commands` need. What a batch adds at most is cheap to add up; only when that would not fit is each
    /// key looked up, so that overwriting what is there evicts nothing.
    fn make_room<'a, 'c: 'a>(&mut self, commands: impl Iterator<Item = &'a Command<'c>> + Clone) {
        let (mut bytes, mut records) = (0, 0);
        for command in commands.clone() {
            if let Some((_, cost)) = self.growth(command) {
                bytes += cost;
                records += 1;
            }
        }
        let shard = self.machine.shard();
        let stats = shard.stats();
        let fits = stats.used_bytes + bytes <= stats.budget_bytes
            && stats
                .max_records
                .is_none_or(|max_records| stats.records + records <= max_records);
        if fits {
            return;
        }
        (bytes, records) = (0, 0);
        for command in commands {
            let Some((key, cost)) = self.growth(command) else {
                continue;
            };
            if let Some(entry) = shard.peek(key) {
                bytes += cost.saturating_sub(shard.cost(key.len(), entry.value.len()));
            } else {
                bytes += cost;
                records += 1;
            }
        }
        self.machine
            .shard_mut()
            .propose_victims(bytes, records, &mut self.victims);
    }

    /// The key and the cost of the entry a command may write.
    fn growth<'a>(&self, command: &Command<'a>) -> Option<(&'a [u8], u64)> {
        let shard = self.machine.shard();
        match *command {
            Command::Put { key, value, .. } => Some((key, shard.cost(key.len(), value.len()))),
            Command::Incr { key, .. } => Some((key, shard.cost(key.len(), MAX_COUNTER_LEN))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use generation_engine::session::SessionWrite;
    use generation_engine::{Condition, Outcome};

    use super::*;

    fn put<'a>(key: &'a [u8], value: &'a [u8]) -> Command<'a> {
        Command::Put {
            key,
            value,
            expires_at_ms: 0,
            condition: Condition::None,
        }
    }

    fn propose(replica: &mut Replica<u32>, commands: &[Command<'_>]) -> Vec<(u32, Outcome)> {
        let mut batch: Vec<_> = commands
            .iter()
            .enumerate()
            .map(|(i, command)| (i as u32, *command))
            .collect();
        let hash = |(_, command): &(u32, Command<'_>)| replica.shard().command_hash(command);
        let hashes: Vec<u64> = batch.iter().map(hash).collect();
        replica.propose(1_000, &mut batch, &hashes);
        let mut outcomes = Vec::new();
        replica.drain(|_, token, reply| match reply {
            Reply::Outcome(outcome) => outcomes.push((token, outcome)),
            other => panic!("{other:?}"),
        });
        outcomes
    }

    #[test]
    fn a_batch_is_one_entry_and_positions_follow_its_order() {
        let mut replica = Replica::new(ShardConfig::default(), SessionLimits::default());
        let outcomes = propose(&mut replica, &[put(b"a", b"1"), put(b"b", b"2")]);
        assert_eq!(
            outcomes[0],
            (
                0,
                Outcome::Applied {
                    version: Version::new(1, 0)
                }
            )
        );
        assert_eq!(
            outcomes[1],
            (
                1,
                Outcome::Applied {
                    version: Version::new(1, 1)
                }
            )
        );
        propose(&mut replica, &[put(b"a", b"3")]);
        assert_eq!(replica.shard().applied_index(), 2);
        assert_eq!(replica.entries(), 2);
    }

    #[test]
    fn more_than_one_entry_holds_goes_on_in_the_next() {
        let mut replica = Replica::new(ShardConfig::default(), SessionLimits::default());
        let commands = vec![put(b"k", b"v"); MAX_ENTRY_COMMANDS + 1];
        let outcomes = propose(&mut replica, &commands);
        let (_, last) = outcomes[MAX_ENTRY_COMMANDS];
        assert_eq!(
            last,
            Outcome::Applied {
                version: Version::new(2, 0)
            }
        );
    }

    #[test]
    fn the_oldest_makes_room_and_overwriting_evicts_nothing() {
        let config = ShardConfig {
            max_records: Some(3),
            ..ShardConfig::default()
        };
        let mut replica = Replica::new(config, SessionLimits::default());
        propose(&mut replica, &[put(b"a", b"1"), put(b"b", b"1"), put(b"c", b"1")]);
        propose(&mut replica, &[put(b"a", b"2"), put(b"b", b"2")]);
        assert_eq!(replica.shard().stats().evictions, 0);
        let outcomes = propose(&mut replica, &[put(b"d", b"1")]);
        // The victim's removal has the first position.
        assert_eq!(
            outcomes[0].1,
            Outcome::Applied {
                version: Version::new(3, 1)
            }
        );
        assert!(replica.shard().peek(b"c").is_none());
        assert_eq!(replica.shard().stats().records, 3);
    }

    #[test]
    fn the_sweep_removes_what_is_due_as_a_log_entry() {
        let mut replica: Replica<u32> = Replica::new(ShardConfig::default(), SessionLimits::default());
        let command = Command::Put {
            key: b"k",
            value: b"v",
            expires_at_ms: 5_000,
            condition: Condition::None,
        };
        propose(&mut replica, &[command]);
        replica.sweep(4_999, 100);
        assert_eq!((replica.entries(), replica.shard().stats().records), (1, 1));
        replica.sweep(5_000, 100);
        replica.sweep(5_000, 100);
        assert_eq!((replica.entries(), replica.shard().stats().records), (2, 0));
        assert_eq!(replica.shard().shard_time_ms(), 5_000);
    }

    #[test]
    fn a_numbered_write_is_executed_once_and_the_sweep_ends_idle_sessions() {
        let mut replica: Replica<u32> = Replica::new(ShardConfig::default(), SessionLimits::default());
        let incr = |session| Operation::Command {
            command: Command::Incr { key: b"n", delta: 5 },
            session: Some(SessionWrite {
                session,
                seq: 1,
                first_unacked: 1,
            }),
        };
        let mut ask = |now_ms, operations: &[Operation<'_>]| {
            let mut batch: Vec<_> = (0..).zip(operations.iter().copied()).collect();
            replica.propose_in_sessions(now_ms, &mut batch);
            let mut replies = Vec::new();
            replica.drain(|_, _, reply| replies.push(reply));
            replica.sweep(now_ms, 100);
            (replies, replica.machine.sessions().len())
        };
        let five = Reply::Outcome(Outcome::Counter {
            version: Version::new(2, 0),
            value: 5,
        });
        let open = Operation::OpenSession { session: 7 };
        assert_eq!(
            ask(1_000, &[incr(7), open]),
            (vec![Reply::SessionExpired, Reply::SessionOpened], 1)
        );
        assert_eq!(
            ask(1_000, &[incr(7), incr(7), incr(8)]),
            (vec![five, five, Reply::SessionExpired], 1)
        );
        let idle_ms = SessionLimits::default().idle_ms;
        assert_eq!(ask(1_000 + idle_ms, &[incr(7)]), (vec![five], 1));
        assert_eq!(ask(10_000 + 3 * idle_ms, &[incr(7)]), (vec![Reply::SessionExpired], 0));
    }
}
