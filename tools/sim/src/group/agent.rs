//! A client of replicas: one operation at a time, asked of the node that is thought to lead.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_engine::batch::{BatchWriter, Operation};
use generation_engine::machine::Reply as Answer;
use generation_engine::session::SessionWrite;
use generation_engine::{Command, Condition, Outcome as Executed, Version};
use generation_node::env::Env;
use generation_node::raft::journal::Space;
use generation_node::raft::replica::{Leader, Outcome as Proposed, ReadError};

use super::Shared;
use super::bus::ask;
use super::node::EPOCH;
use crate::dice::Dice;
use crate::env::SimEnv;
use crate::history::{Op, Outcome, Reply};

/// How long an operation may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long a node is waited for before another one is asked, where asking twice does no harm.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long to wait before somebody is asked again.
const BACKOFF: Duration = Duration::from_millis(20);

/// How often a client without work looks for some.
const IDLE: Duration = Duration::from_millis(50);

/// What a node says.
enum Said {
    Done(Reply),
    /// Not executed; who leads instead, by its number, if that is known.
    Refused(Option<usize>),
    InDoubt,
}

/// A client.
pub(super) struct Agent {
    pub(super) env: SimEnv,
    pub(super) common: Rc<Shared>,
    pub(super) number: u32,
    pub(super) dice: Dice,
    /// Its session and the number of its last write there, where it has one.
    pub(super) session: Option<(u128, u64)>,
    /// The node thought to lead each shard.
    pub(super) leaders: Vec<usize>,
    /// Versions it has seen.
    pub(super) versions: std::collections::BTreeMap<String, u64>,
}

impl Agent {
    /// Works for ever.
    pub(super) async fn work(mut self) {
        loop {
            let Some(op) = self.common.next_op(self.number, &mut self.dice, &self.versions) else {
                self.common.set_idle(self.number, true);
                self.env.sleep_until(self.env.now() + IDLE).await;
                continue;
            };
            self.common.set_idle(self.number, false);
            let id = self.common.call(&self.env, self.number, op.clone());
            let outcome = self.perform(&op).await;
            if let (Some(key), Outcome::Done(reply)) = (op.key(), &outcome)
                && reply.version != 0
            {
                self.versions.insert(key.to_owned(), reply.version);
            }
            self.common.returned(&self.env, id, outcome);
            let pause = Duration::from_nanos(self.dice.below(self.common.pause().as_nanos() as u64 + 1));
            self.env.sleep_until(self.env.now() + pause).await;
        }
    }

    async fn perform(&mut self, op: &Op) -> Outcome {
        let deadline = self.env.now() + TIMEOUT;
        let shard = self
            .common
            .shard_of(op.key().expect("invariant: only keys are asked for"));
        let session = if op.is_write() {
            self.session.as_mut().map(|(session, seq)| {
                *seq += 1;
                SessionWrite {
                    session: *session,
                    seq: *seq,
                    first_unacked: *seq,
                }
            })
        } else {
            None
        };
        let repeatable = !op.is_write() || session.is_some();
        let mut doubt = false;
        let mut code = "timeout";
        while self.env.now() < deadline {
            let nodes = self.common.setup.nodes as u64;
            let leader = self.leaders[usize::from(shard)];
            // Any replica answers reads, so that followers are asked too.
            let to = if !op.is_write() && self.dice.chance(300) {
                self.dice.below(nodes) as usize
            } else {
                leader
            };
            let said = self.once(op, shard, session, to, deadline, repeatable).await;
            match said {
                Some(Said::Done(reply)) => return Outcome::Done(reply),
                Some(Said::Refused(leader)) => {
                    code = "not_leader";
                    self.leaders[usize::from(shard)] = leader.unwrap_or_else(|| self.dice.below(nodes) as usize);
                }
                Some(Said::InDoubt) | None => {
                    self.leaders[usize::from(shard)] = self.dice.below(nodes) as usize;
                    doubt |= op.is_write();
                    if !repeatable {
                        break;
                    }
                }
            }
            self.env.sleep_until(self.env.now() + BACKOFF).await;
        }
        let code = code.to_owned();
        if doubt {
            Outcome::InDoubt { code }
        } else {
            Outcome::Refused { code }
        }
    }

    async fn once(
        &self,
        op: &Op,
        shard: u16,
        session: Option<SessionWrite>,
        to: usize,
        deadline: Instant,
        repeatable: bool,
    ) -> Option<Said> {
        let until = if repeatable {
            deadline.min(self.env.now() + PATIENCE)
        } else {
            deadline
        };
        let (op, common) = (op.clone(), Rc::clone(&self.common));
        let serve = move |env: SimEnv| async move {
            if op.is_write() {
                write(&env, &common, &op, shard, session).await
            } else {
                read(&env, &common, &op, shard).await
            }
        };
        ask(&self.env, to, until, serve).await
    }
}

fn number(leader: Option<Leader>) -> Option<usize> {
    leader.map(|leader| (leader.place.node - 1) as usize)
}

/// Reads on a node.
async fn read(env: &SimEnv, common: &Rc<Shared>, op: &Op, shard: u16) -> Said {
    let (Some(replicas), Op::Get { key, .. }) = (common.hosts.replicas(env.node), op) else {
        return Said::Refused(None);
    };
    let replica = replicas.shards[usize::from(shard)].clone();
    drop(replicas);
    match replica.linearize().await {
        Ok(_) => {}
        Err(ReadError::NotLeader(leader)) => return Said::Refused(number(leader)),
        Err(ReadError::NoQuorum | ReadError::Stopped) => return Said::Refused(None),
    }
    replica.machine().with(|machine| {
        let entry = machine.shard().peek(key.as_bytes());
        Said::Done(Reply {
            status: if entry.is_some() { "ok" } else { "not_found" }.to_owned(),
            version: entry.map_or(0, |entry| entry.version.get()),
            value: entry.map(|entry| String::from_utf8_lossy(entry.value).into_owned()),
            shard,
            epoch: EPOCH,
            index: machine.shard().applied_index(),
            ..Reply::default()
        })
    })
}

/// Writes on a node.
async fn write(env: &SimEnv, common: &Rc<Shared>, op: &Op, shard: u16, session: Option<SessionWrite>) -> Said {
    let Some(replicas) = common.hosts.replicas(env.node) else {
        return Said::Refused(None);
    };
    let replica = replicas.shards[usize::from(shard)].clone();
    if replicas.journal.space() == Space::Low {
        return Said::Refused(Some(env.node));
    }
    drop(replicas);
    let time = replica
        .machine()
        .with(|machine| machine.shard().shard_time_ms())
        .max(env.unix_ms());
    let mut batch = BatchWriter::new();
    let mut push = |operation: &Operation<'_>| batch.push(operation).expect("it fits");
    if let Some(session) = session {
        // Opening an open session changes nothing.
        push(&Operation::OpenSession {
            session: session.session,
        });
    }
    push(&Operation::Command {
        command: command(op),
        session,
    });
    let (sender, receiver) = super::bus::slot();
    replica.propose(Bytes::from(batch.finish(time)), move |outcome| sender.put(outcome));
    match receiver.fetch().await {
        Proposed::Applied { replies, .. } => match replies.replies.last() {
            Some(Answer::Outcome(executed)) => Said::Done(reply(shard, *executed)),
            _ => Said::Refused(Some(env.node)),
        },
        Proposed::NotProposed(leader) => Said::Refused(number(leader)),
        Proposed::InDoubt => Said::InDoubt,
    }
}

fn command(op: &Op) -> Command<'_> {
    let condition = |if_version: Option<u64>| match if_version {
        None => Condition::None,
        Some(0) => Condition::IfAbsent,
        Some(version) => Condition::IfVersion(Version::from(version)),
    };
    match op {
        Op::Put {
            key, value, if_version, ..
        } => Command::Put {
            key: key.as_bytes(),
            value: value.as_bytes(),
            expires_at_ms: 0,
            condition: condition(*if_version),
        },
        Op::Delete { key, if_version } => Command::Delete {
            key: key.as_bytes(),
            condition: condition(*if_version),
        },
        Op::Incr { key, delta } => Command::Incr {
            key: key.as_bytes(),
            delta: *delta,
        },
        Op::Touch { key, .. } => Command::Touch {
            key: key.as_bytes(),
            expires_at_ms: 0,
        },
        Op::Get { .. } | Op::Scan { .. } => unreachable!("invariant: reads are not proposed"),
    }
}

fn reply(shard: u16, executed: Executed) -> Reply {
    let mut reply = Reply {
        shard,
        epoch: EPOCH,
        ..Reply::default()
    };
    let status = match executed {
        Executed::Applied { version } => {
            reply.version = version.get();
            "ok"
        }
        Executed::Counter { version, value } => {
            reply.version = version.get();
            reply.value = Some(value.to_string());
            "ok"
        }
        Executed::NotFound => "not_found",
        Executed::ConditionFailed { current } => {
            reply.version = current.get();
            "condition_failed"
        }
        Executed::NotANumber => "not_a_number",
        Executed::Overflow => "overflow",
        Executed::OutOfMemory | Executed::InvalidSize => "out_of_memory",
    };
    status.clone_into(&mut reply.status);
    reply
}
