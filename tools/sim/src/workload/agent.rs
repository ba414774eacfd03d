//! One client: an operation at a time, its attempts, and its notes.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use generation_client::SessionToken;
use generation_client::core::error::{Error, InDoubt, NotSent, Refusal, Rejected, State};
use generation_client::core::retry::{Attempts, Doubt};
use generation_client::core::routing::Target;
use generation_client::core::session::WriteSession;
use generation_proto::reply::Page;
use generation_proto::request::Scan;
use generation_proto::status::Class;
use generation_proto::{Condition, Consistency, Operation, RequestOptions, Session, ShardSession, Status};
use generation_quic::ConnectionKey;

use super::endpoint::{Endpoint, Way};
use super::{Log, WorkloadSetup};
use crate::client::Response;
use crate::dice::Dice;
use crate::history::{Freshness, Op, Outcome, Reply};
use crate::sim::Sim;

/// How long a read, or a write in a session, waits for one node before it asks another.
const PATIENCE: Duration = Duration::from_millis(400);

/// Keys asked for with one page of a scan: few, so that scans have pages.
const PAGE_KEYS: u32 = 3;

/// The bound of reads that may be stale.
const STALE_MS: u64 = 500;

/// An ordinary key.
pub(super) fn key(number: u64) -> String {
    format!("key-{number}")
}

/// A key that is only ever added to.
pub(super) fn counter(number: u64) -> String {
    format!("counter-{number}")
}

/// A linearizable read.
pub(super) fn read(key: String) -> Op {
    Op::Get {
        key,
        freshness: Freshness::Linearizable,
    }
}

/// An operation under way.
#[derive(Debug)]
struct Current {
    id: u64,
    op: Op,
    attempts: Attempts,
    stage: Stage,
    /// What the next target depends on.
    tries: u32,
    /// Whether it is a write of a session, and then its number there, once it has one.
    in_session: bool,
    session: Option<(u16, Session)>,
    /// The session that is being opened for it.
    opening: Option<ShardSession>,
    /// What earlier attempts may have done.
    doubt: Doubt,
    /// A scan's keys so far, and where it goes on.
    found: Vec<String>,
    cursor: u64,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// It is to be sent, now that this moment has come.
    Ready(Instant),
    /// It waits for an answer, until then.
    Sent {
        node: usize,
        core: u16,
        key: ConnectionKey,
        request: u64,
        until: Instant,
        /// The node's wall clock then, and how often it had been set.
        clock: (u64, u64),
    },
}

/// A client.
#[derive(Debug)]
pub(super) struct Agent {
    number: u32,
    endpoint: usize,
    idle_until: Instant,
    current: Option<Current>,
    queue: VecDeque<Op>,
    token: SessionToken,
    /// A write session for each shard.
    sessions: BTreeMap<u16, WriteSession>,
    /// Versions it has seen, for conditions.
    versions: BTreeMap<String, u64>,
    dice: Dice,
}

/// What came of an attempt.
enum Attempt {
    Done(Reply),
    /// It failed; where the node named another leader, whether that was news.
    Failed(Error, bool),
    /// There is more to ask: another page of a scan, or the write itself once its session is open.
    More,
}

impl Agent {
    pub(super) fn new(number: u32, endpoint: usize, now: Instant, seed: u64) -> Self {
        Self {
            number,
            endpoint,
            idle_until: now,
            current: None,
            queue: VecDeque::new(),
            token: SessionToken::new(),
            sessions: BTreeMap::new(),
            versions: BTreeMap::new(),
            dice: Dice::new(seed),
        }
    }

    pub(super) fn endpoint(&self) -> usize {
        self.endpoint
    }

    pub(super) fn enqueue(&mut self, op: Op) {
        self.queue.push_back(op);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.current.is_none() && self.queue.is_empty()
    }

    /// Does what can be done at the present moment.
    pub(super) fn turn(&mut self, sim: &mut Sim, endpoint: &mut Endpoint, setup: &WorkloadSetup, log: &mut Log) {
        let now = sim.now();
        if self.current.is_none() && now >= self.idle_until {
            self.begin(sim, endpoint, setup, log);
        }
        let Some(mut current) = self.current.take() else { return };
        let attempt = match current.stage {
            Stage::Ready(at) if now < at => None,
            Stage::Ready(_) => self.send(sim, endpoint, &mut current),
            Stage::Sent {
                node,
                core,
                key,
                request,
                until,
                ..
            } => match sim.clients[endpoint.client].response(key, request) {
                Some(response) => Some(self.answer(sim, endpoint, setup, &mut current, key, &response)),
                None if !endpoint.is_alive(sim, key) => {
                    Some(Attempt::Failed(lost(&current.op, node, "it is closed"), false))
                }
                None if now >= until => {
                    // Nothing else is told of a node that keeps silent, so its connection is given up too.
                    endpoint.give_up(sim, node, core);
                    if let Some(routes) = &mut endpoint.routes {
                        let shard = shard_of(routes, &current.op);
                        routes.suspect(shard, 1 + node as u64);
                    }
                    Some(Attempt::Failed(lost(&current.op, node, "it does not answer"), false))
                }
                None => None,
            },
        };
        let elapsed = sim.elapsed();
        match attempt {
            None if elapsed < current.attempts.deadline() => self.current = Some(current),
            // Not even sent within the time.
            None => {
                let error = NotSent::Timeout { after: setup.timeout }.into();
                self.fail(sim, log, current, error);
            }
            Some(Attempt::More) => {
                current.stage = Stage::Ready(now);
                current.tries = 0;
                self.current = Some(current);
                // The next page is asked for with the next turn, which is at once.
                sim.wake_at(now);
            }
            Some(Attempt::Done(reply)) => self.finish(sim, log, &current, Outcome::Done(reply)),
            Some(Attempt::Failed(error, redirected)) => {
                current.tries += 1;
                if current.opening.is_some() {
                    if error.state() != State::NotSent {
                        // Whether that id was opened or not: an id is opened once.
                        current.opening = None;
                    }
                } else if let (Error::Rejected(Rejected::SessionExpired), Some((shard, _))) = (&error, current.session)
                    && current.doubt.is_none()
                {
                    // Nothing of it was executed, so it may have a number in another session.
                    self.sessions.remove(&shard);
                    current.session = None;
                    current.stage = Stage::Ready(now);
                    sim.wake_at(now);
                    self.current = Some(current);
                    return;
                } else {
                    current.doubt.note(&error);
                }
                let random = self.dice.roll();
                let (policy, budget) = (&endpoint.policy, &endpoint.budget);
                match current
                    .attempts
                    .after(&error, redirected, elapsed, policy, budget, random)
                {
                    Some(delay) => {
                        current.stage = Stage::Ready(now + delay);
                        sim.wake_at(now + delay);
                        self.current = Some(current);
                    }
                    None => self.fail(sim, log, current, error),
                }
            }
        }
    }

    fn begin(&mut self, sim: &mut Sim, endpoint: &mut Endpoint, setup: &WorkloadSetup, log: &mut Log) {
        let op = match self.queue.pop_front() {
            Some(op) => op,
            None if log.left > 0 => {
                log.left -= 1;
                self.choose(endpoint, setup, log)
            }
            None => return,
        };
        let elapsed = sim.elapsed();
        let id = log.call(elapsed.as_nanos() as u64, self.number, op.clone());
        endpoint.budget.deposit();
        let deadline = elapsed + setup.timeout;
        sim.wake_at(sim.now() + setup.timeout);
        self.current = Some(Current {
            id,
            attempts: Attempts::new(deadline, setup.sessions && op.is_write()),
            in_session: setup.sessions && op.is_write(),
            op,
            stage: Stage::Ready(sim.now()),
            tries: 0,
            session: None,
            opening: None,
            doubt: Doubt::default(),
            found: Vec::new(),
            cursor: 0,
        });
    }

    /// An operation by chance.
    fn choose(&mut self, endpoint: &Endpoint, setup: &WorkloadSetup, log: &mut Log) -> Op {
        let dice = &mut log.dice;
        if setup.counters > 0 && dice.chance(200) {
            let key = counter(dice.below(setup.counters));
            return if dice.chance(700) {
                Op::Incr {
                    key,
                    delta: 1 + dice.below(1_000).cast_signed(),
                }
            } else {
                read(key)
            };
        }
        if setup.scans
            && dice.chance(15)
            && let Some(routes) = &endpoint.routes
        {
            let shard = dice.below(u64::from(routes.shards())) as u16;
            return Op::Scan { shard };
        }
        let key = key(dice.below(setup.keys));
        let seen = self.versions.get(&key).copied();
        let ttl_ms = dice.chance(setup.perishable_per_mille).then(|| 1 + dice.below(4_000));
        match dice.below(100) {
            0..45 => {
                let freshness = match dice.below(2) {
                    _ if !dice.chance(setup.relaxed_per_mille) => Freshness::Linearizable,
                    0 => Freshness::Session,
                    _ => Freshness::Stale(STALE_MS),
                };
                Op::Get { key, freshness }
            }
            45..85 => {
                let if_version = match dice.below(4) {
                    0 => Some(0),
                    1 => seen,
                    _ => None,
                };
                let padding = "x".repeat(dice.below(setup.value_bytes + 1) as usize);
                Op::Put {
                    key,
                    value: format!("{}-{padding}", log.next_id + 1),
                    if_version,
                    ttl_ms,
                }
            }
            85..95 => Op::Delete {
                key,
                if_version: seen.filter(|_| dice.chance(500)),
            },
            _ => Op::Touch { key, ttl_ms },
        }
    }

    /// Sends the current operation, as far as a connection is there.
    fn send(&mut self, sim: &mut Sim, endpoint: &mut Endpoint, current: &mut Current) -> Option<Attempt> {
        let routes = endpoint.routes.as_ref()?;
        let shard = shard_of(routes, &current.op);
        let Some(Target { node, core, .. }) = endpoint.target(shard, current.tries) else {
            return Some(Attempt::Failed(NotSent::NoLeader { shard }.into(), false));
        };
        let number = (node - 1) as usize;
        let (key, stream) = match endpoint.way(sim, number, core) {
            Way::Open(key, stream) => (key, stream),
            Way::Pending => return None,
            Way::Failed => {
                if let Some(routes) = &mut endpoint.routes {
                    routes.suspect(shard, node);
                }
                let (peer, reason) = (peer(number), "no connection".to_owned());
                return Some(Attempt::Failed(NotSent::ConnectionLost { peer, reason }.into(), false));
            }
        };
        let now = sim.now();
        let left = current.attempts.deadline().saturating_sub(sim.elapsed());
        let patience = if current.op.is_write() && !current.in_session {
            left
        } else {
            left.min(PATIENCE)
        };
        let mut options = RequestOptions {
            deadline_ms: Some((left.as_millis() as u32).max(1)),
            ..RequestOptions::default()
        };
        if current.in_session {
            let session = match (&current.session, self.sessions.get_mut(&shard)) {
                (Some((_, session)), Some(sessions)) => Some(sessions.again(session)),
                (None, Some(sessions)) => Some(sessions.begin(1).expect("invariant: one write at a time")),
                (_, None) => None,
            };
            current.session = session.map(|session| (shard, session));
            options.session = session;
        }
        current.opening = (current.in_session && current.session.is_none()).then(|| {
            current.opening.unwrap_or_else(|| ShardSession {
                id: u128::from(self.dice.roll()) << 64 | u128::from(self.dice.roll()) | 1,
                shard,
            })
        });
        let operation = match current.opening {
            Some(session) => Operation::OpenSession(session),
            None => operation(&current.op, &self.token, shard, current.cursor, &mut options),
        };
        let request = sim.clients[endpoint.client].send(key, stream, operation, options);
        sim.wake_at(now + patience);
        current.stage = Stage::Sent {
            node: number,
            core,
            key,
            request,
            until: now + patience,
            clock: sim.wall_clock(number),
        };
        None
    }

    /// Understands an answer.
    fn answer(
        &mut self,
        sim: &mut Sim,
        endpoint: &mut Endpoint,
        setup: &WorkloadSetup,
        current: &mut Current,
        key: ConnectionKey,
        response: &Response,
    ) -> Attempt {
        let meta = &response.meta;
        endpoint.note_epoch(sim, key, meta.map_epoch);
        let Some(routes) = &mut endpoint.routes else {
            unreachable!("invariant: it was sent by the routes")
        };
        let epoch = routes.shard_epoch(meta.shard);
        let status = meta.status();
        let class = Status::class_of_code(meta.status);
        if let (Class::Ok | Class::Answer, Some(status)) = (class, status) {
            self.token.observe(meta.shard, epoch, meta.index);
            if let Some(ShardSession { id, shard }) = current.opening.take() {
                self.sessions.insert(shard, WriteSession::new(id));
                return Attempt::More;
            }
            if let Op::Scan { .. } = current.op {
                return page(current, response);
            }
            let value = match current.op {
                Op::Get { .. } if status == Status::Ok => Some(String::from_utf8_lossy(&response.body).into_owned()),
                Op::Incr { .. } if status == Status::Ok => {
                    let bytes = response.body[..].try_into().expect("a counter has eight bytes");
                    Some(i64::from_le_bytes(bytes).to_string())
                }
                _ => None,
            };
            if let Some(key) = current.op.key()
                && meta.version != 0
            {
                self.versions.insert(key.to_owned(), meta.version);
            }
            let clock_ms = match current.stage {
                Stage::Sent { node, clock, .. } if sim.wall_clock(node).1 == clock.1 => Some(clock.0),
                _ => None,
            };
            return Attempt::Done(Reply {
                status: snake(status),
                version: meta.version,
                value,
                shard: meta.shard,
                epoch: meta.map_epoch,
                index: meta.index,
                age_ms: response.age_ms.map(u64::from),
                expires_at_ms: response.expires_at_ms,
                clock_ms: clock_ms.filter(|_| response.expires_at_ms.is_some()),
                keys: Vec::new(),
            });
        }
        let mut redirected = false;
        if let Some(moved) = &response.moved {
            redirected = routes.learn(meta.shard, moved);
        }
        let Stage::Sent { node, .. } = current.stage else {
            unreachable!("invariant: an answer follows a request")
        };
        if status == Some(Status::Moved) && !redirected {
            routes.suspect(meta.shard, 1 + node as u64);
        }
        let error = Refusal {
            status: meta.status,
            shard: meta.shard,
            version: meta.version,
            peer: &peer(node),
            message: response.message.as_deref().unwrap_or_default(),
            retry_after: response.retry_after_ms.map(|ms| Duration::from_millis(u64::from(ms))),
            age: response.age_ms.map(|ms| Duration::from_millis(u64::from(ms))),
            is_write: current.op.is_write(),
            timeout: setup.timeout,
        };
        Attempt::Failed(error.error(), redirected)
    }

    /// The operation ends with an error. What an earlier attempt may have done outweighs what the last one did not.
    fn fail(&mut self, sim: &mut Sim, log: &mut Log, mut current: Current, error: Error) {
        let error = std::mem::take(&mut current.doubt).outweighs(error);
        let code = error.code().to_owned();
        let outcome = match error.state() {
            // Without a number it was never sent: what is in doubt is the opening of its session.
            State::InDoubt if current.in_session && current.session.is_none() => Outcome::Refused { code },
            State::InDoubt => Outcome::InDoubt { code },
            State::NotSent | State::Rejected => Outcome::Refused { code },
        };
        self.finish(sim, log, &current, outcome);
    }

    fn finish(&mut self, sim: &mut Sim, log: &mut Log, current: &Current, outcome: Outcome) {
        if let Some((shard, session)) = &current.session
            && let Some(sessions) = self.sessions.get_mut(shard)
        {
            sessions.end(session);
        }
        log.returned(sim.elapsed().as_nanos() as u64, current.id, outcome);
        let pause = if self.queue.is_empty() {
            Duration::from_nanos(log.dice.below(log.think.as_nanos() as u64 + 1))
        } else {
            Duration::ZERO
        };
        self.idle_until = sim.now() + pause;
        sim.wake_at(self.idle_until);
    }
}

/// Takes a page of a scan.
fn page(current: &mut Current, response: &Response) -> Attempt {
    if response.meta.status() != Some(Status::Ok) {
        return Attempt::Done(Reply {
            status: "not_found".to_owned(),
            shard: response.meta.shard,
            epoch: response.meta.map_epoch,
            ..Reply::default()
        });
    }
    let (page, entries) = Page::decode(&response.body).expect("a node's page can be read");
    for entry in entries {
        let entry = entry.expect("a node's page can be read");
        current.found.push(String::from_utf8_lossy(entry.key).into_owned());
    }
    current.cursor = page.next;
    if !page.done {
        return Attempt::More;
    }
    Attempt::Done(Reply {
        shard: response.meta.shard,
        epoch: response.meta.map_epoch,
        keys: std::mem::take(&mut current.found),
        ..Reply::default()
    })
}

/// An operation on the wire.
fn operation<'a>(
    op: &'a Op,
    token: &SessionToken,
    shard: u16,
    cursor: u64,
    options: &mut RequestOptions,
) -> Operation<'a> {
    match op {
        Op::Get { key, freshness } => {
            options.consistency = match freshness {
                Freshness::Linearizable => Consistency::Linearizable,
                Freshness::Session => {
                    let (epoch, index) = token.seen(shard);
                    Consistency::Session { shard, epoch, index }
                }
                Freshness::Stale(max_age_ms) => Consistency::Stale {
                    max_age_ms: *max_age_ms as u32,
                },
            };
            Operation::Get { key: key.as_bytes() }
        }
        Op::Put {
            key,
            value,
            if_version,
            ttl_ms,
        } => {
            options.ttl_ms = *ttl_ms;
            options.condition = match if_version {
                None => Condition::None,
                Some(0) => Condition::IfAbsent,
                Some(version) => Condition::IfVersion(*version),
            };
            Operation::Put {
                key: key.as_bytes(),
                value: value.as_bytes(),
            }
        }
        Op::Delete { key, if_version } => {
            options.condition = if_version.map_or(Condition::None, Condition::IfVersion);
            Operation::Delete { key: key.as_bytes() }
        }
        Op::Incr { key, delta } => Operation::Incr {
            key: key.as_bytes(),
            delta: *delta,
        },
        Op::Touch { key, ttl_ms } => {
            options.ttl_ms = *ttl_ms;
            Operation::Touch { key: key.as_bytes() }
        }
        Op::Scan { shard } => Operation::Keys(Scan {
            shard: *shard,
            limit: PAGE_KEYS,
            cursor,
            prefix: b"",
        }),
    }
}

fn shard_of(routes: &generation_client::core::routing::Routes, op: &Op) -> u16 {
    match op {
        Op::Scan { shard } => *shard,
        _ => routes.shard_of(op.key().expect("invariant: all but scans have a key").as_bytes()),
    }
}

/// The answer will not come.
fn lost(op: &Op, node: usize, reason: &str) -> Error {
    let (peer, reason) = (peer(node), reason.to_owned());
    if op.is_write() {
        InDoubt::ConnectionLost { peer, reason }.into()
    } else {
        NotSent::ConnectionLost { peer, reason }.into()
    }
}

fn peer(node: usize) -> String {
    format!("node {node}")
}

/// A status as histories spell it.
fn snake(status: Status) -> String {
    match status {
        Status::Ok => "ok",
        Status::NotFound => "not_found",
        Status::ConditionFailed => "condition_failed",
        Status::NotANumber => "not_a_number",
        Status::Overflow => "overflow",
        _ => "out_of_memory",
    }
    .to_owned()
}
