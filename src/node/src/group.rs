//! A shard of this core whose replica belongs to a Raft group: what waits for the group to decide, and for whom.
//!
//! ```text
//! writes of a turn ─▶ leads? room? a majority alive? ─▶ proposer ─▶ … ─▶ outcomes by token ─▶ replies
//! reads of a turn  ─▶ waiting ─▶ one confirmation ─▶ ready ─▶ the state ─▶ replies
//! ```
//!
//! # What holds
//! - Whoever reads is answered within the patience of the replica, twice its longest election time-out, whatever happens to the group;
//!   whoever writes, within [`WRITE_PATIENCE`].
//! - Nothing is acknowledged before a majority of the replicas that the group is to have votes in it.
//! - `Moved`, `Busy`, `ReadOnly` and `NoQuorum` are answers to what was not proposed.
//! - A replica that has ended sends whoever asks to the others, where there are any.
//! - A read waits for a confirmation that begins after the read has arrived. One that asks for less is served as soon as the state
//!   here is as fresh as it wants.
//!
//! Not here: how replies are encoded, and which requests there are.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use generation_engine::batch::Configuration;
use generation_proto::Consistency;
use generation_proto::map::{Replica as MapReplica, Shard as MapShard};
use generation_proto::options::Moved;
use openraft_rt::AsyncRuntime as _;

use crate::controller::report::Led;
use crate::controller::{Controller, led_by};
use crate::env::disk::Disk;
use crate::leadership::{Leadership, Ticket};
use crate::quiescer::Quiescer;
use crate::raft::network::Transport as _;
use crate::raft::proposer::Proposer;
use crate::raft::replica::{self, Leader, ReadError, SnapshotError};
use crate::raft::runtime::Runtime;
use crate::raft::shards::{Shards, Space};
use crate::raft::transport::PeerTransport;
use crate::raft::types::{LogId, ReplicaId};
use crate::replies::Origin;
use crate::stats;
use crate::view::Views;
use generation_engine::mutants::{Mutant, active};

/// How long a proposal may take before it is in doubt: far longer than any election, for disks that stall.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);

/// Reads of a shard that wait, above which more are `Busy`.
const READS_WAITING: usize = 16_384;

/// Requests for a snapshot of a shard that wait, above which more are `Busy`.
const SNAPSHOTS_WAITING: usize = 64;

/// A replica as this core uses it.
pub(crate) type Replica<D> = replica::Replica<D, PeerTransport>;

/// Which shards have news for the reactor, and how it is woken.
pub(crate) struct News {
    shards: RefCell<Vec<u16>>,
    wake: Box<dyn Fn()>,
}

impl News {
    pub(crate) fn new(wake: impl Fn() + 'static) -> Rc<Self> {
        Rc::new(Self {
            shards: RefCell::default(),
            wake: Box::new(wake),
        })
    }

    fn tell(&self, shard: u16) {
        let mut shards = self.shards.borrow_mut();
        if !shards.contains(&shard) {
            shards.push(shard);
        }
        drop(shards);
        (self.wake)();
    }

    /// Takes the shards there are news of.
    pub(crate) fn take(&self, into: &mut Vec<u16>) {
        into.append(&mut self.shards.borrow_mut());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shards.borrow().is_empty()
    }
}

/// Who waits for an entry of the log.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Token {
    /// Whoever asked for a write.
    Write(Origin),
    /// Nobody: the leader says by what limits the shard works.
    Configured,
    /// Whoever asked for an entry whose time has come, and is told that it is absent when no replica can serve it any more.
    Expired(Origin),
}

/// What is to be read.
#[derive(Debug, Clone)]
pub(crate) enum What {
    Entry(Bytes),
    Page {
        values: bool,
        limit: u32,
        cursor: u64,
        prefix: Bytes,
    },
}

/// A read that outlives its turn.
#[derive(Debug, Clone)]
pub(crate) struct Read {
    pub(crate) origin: Origin,
    pub(crate) what: What,
    pub(crate) consistency: Consistency,
    /// From when on it is too late.
    pub(crate) deadline: Option<Instant>,
}

/// A read that waits until this replica has applied an entry.
#[derive(Debug)]
struct Behind {
    index: u64,
    until: Instant,
    read: Read,
}

/// How long handing leadership over may take.
const LEAVING: Duration = Duration::from_secs(1);

/// How often it is looked whether it is done.
const LEAVING_STEP: Duration = Duration::from_millis(5);

/// Leadership that is being handed over.
#[derive(Debug)]
struct Leaving {
    heir: ReplicaId,
    until: Instant,
    /// Everything that was proposed has come to an end, and the heir was told.
    told: bool,
    /// Ends with it.
    _ticket: Ticket,
}

/// Whoever asked for a snapshot, and what came of it.
pub(crate) type Snapshots = Vec<(Origin, Result<u64, SnapshotError>)>;

/// What a confirmation came to.
type Confirmed = Rc<RefCell<Option<Result<LogId, ReadError>>>>;

/// Why a request cannot be proposed here now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Moved(Moved),
    /// Nobody leads at the moment, for not so long that it is worrying.
    Leaderless,
    NoQuorum,
    Busy,
    ReadOnly,
    /// No state as late as was asked for will come here.
    TooStale,
}

/// Whether a read may be served.
pub(crate) enum Readiness {
    /// It may; what it reads may be this old, in milliseconds.
    Now(Read, u32),
    /// It waits here.
    Later,
    /// Its turn does not come.
    Never(Origin, Refused),
}

/// What became of a read that had to be confirmed.
pub(crate) enum Outcome {
    /// It may be served, from a state that was the newest at that instant.
    Fresh(Instant, Vec<Read>),
    /// It cannot.
    Failed(ReadError, Vec<Read>),
}

/// A shard of this core with a replica in a group.
pub(crate) struct Group<D: Disk> {
    shard: u16,
    node: u64,
    core: u16,
    epoch: u32,
    shards: Shards<D, PeerTransport>,
    transport: PeerTransport,
    quiescer: Rc<Quiescer<D>>,
    leadership: Rc<Leadership>,
    leaving: Option<Leaving>,
    pub(crate) proposer: Proposer<Token>,
    news: Rc<News>,
    wake: Rc<dyn Fn()>,
    patience: Duration,
    views: Views,
    hints: Hints,
    /// The term in which this leader has said by what limits the shard works.
    configured_in: u64,
    /// Since when nobody has led, as far as it is known here.
    leaderless_since: Option<Instant>,
    waiting: Vec<Read>,
    /// The reads whose confirmation is under way, with when it was asked for.
    asked: Option<(Instant, Vec<Read>)>,
    confirmed: Confirmed,
    /// When the state at an index was the newest there was.
    fresh: Option<(Instant, u64)>,
    behind: Vec<Behind>,
    /// How many wait for a snapshot, and those for whom that is over.
    snapshots_waiting: usize,
    snapshots: Rc<RefCell<Snapshots>>,
    /// Reads that may be served, and whose replies have not found room yet.
    pub(crate) unserved: Vec<Read>,
}

impl<D: Disk> std::fmt::Debug for Group<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
}

/// What the groups of a core have in common.
pub(crate) struct Common<D: Disk> {
    pub(crate) node: u64,
    pub(crate) core: u16,
    pub(crate) epoch: u32,
    pub(crate) shards: Shards<D, PeerTransport>,
    pub(crate) transport: PeerTransport,
    pub(crate) quiescer: Rc<Quiescer<D>>,
    pub(crate) leadership: Rc<Leadership>,
    pub(crate) news: Rc<News>,
    pub(crate) patience: Duration,
    pub(crate) views: Views,
    pub(crate) hints: Hints,
    pub(crate) controller: Option<Rc<Controller<D>>>,
}

/// By shard: who leads it on another node, and in which term, as that node says.
pub(crate) type Hints = Rc<RefCell<BTreeMap<u16, (u64, u64)>>>;

impl<D: Disk> Group<D> {
    pub(crate) fn new(shard: u16, common: &Common<D>) -> Self {
        let news = Rc::clone(&common.news);
        let wake = move || news.tell(shard);
        Self {
            shard,
            node: common.node,
            core: common.core,
            epoch: common.epoch,
            shards: common.shards.clone(),
            transport: common.transport.clone(),
            quiescer: Rc::clone(&common.quiescer),
            leadership: Rc::clone(&common.leadership),
            leaving: None,
            proposer: Proposer::new(WRITE_PATIENCE),
            news: Rc::clone(&common.news),
            wake: Rc::new(wake),
            patience: common.patience,
            views: common.views.clone(),
            hints: Rc::clone(&common.hints),
            configured_in: 0,
            leaderless_since: None,
            waiting: Vec::new(),
            asked: None,
            confirmed: Confirmed::default(),
            fresh: None,
            behind: Vec::new(),
            snapshots_waiting: 0,
            snapshots: Rc::default(),
            unserved: Vec::new(),
        }
    }

    /// The replica, unless this node has not been let in yet.
    pub(crate) fn replica(&self) -> Option<Replica<D>> {
        self.shards.replica(self.shard)
    }

    /// What has the reactor come back to this shard.
    pub(crate) fn wake(&self) -> Rc<dyn Fn()> {
        Rc::clone(&self.wake)
    }

    /// Has the reactor come back to this shard in its next turn.
    pub(crate) fn come_back(&self) {
        self.news.tell(self.shard);
    }

    /// Whether nobody waits for anything.
    pub(crate) fn is_idle(&self) -> bool {
        self.proposer.in_flight() == 0
            && self.waiting.is_empty()
            && self.asked.is_none()
            && self.behind.is_empty()
            && self.snapshots_waiting == 0
            && self.unserved.is_empty()
    }

    /// Where a leader is, in the words of the protocol.
    pub(crate) fn moved(&self, leader: &Leader) -> Moved {
        let node = leader.place.node;
        let core = if node == self.node {
            self.core
        } else {
            self.transport.at(node, self.shard).map_or(0, |peer| peer.core)
        };
        Moved {
            epoch: self.epoch,
            term: leader.term,
            leader: node,
            core,
        }
    }

    /// Whether a write may be proposed.
    pub(crate) fn may_propose(&mut self, now: Instant) -> Result<Replica<D>, Refused> {
        let Some(replica) = self.replica() else {
            return Err(self.not_here(now));
        };
        if !replica.leads() {
            return Err(self.not_leading(now, &replica));
        }
        if replica.voters() < self.views.with(|view| view.least_voters(self.shard)) && !active(Mutant::FewVoters) {
            // What its founder alone has would be lost with it.
            return Err(self.leaderless(now));
        }
        self.leaderless_since = None;
        if self.shards.failure().is_some() || !replica.has_quorum(|node| self.transport.is_alive(node)) {
            return Err(Refused::NoQuorum);
        }
        if self.shards.space() == Space::Low {
            return Err(Refused::ReadOnly);
        }
        if self.proposer.is_full() {
            return Err(Refused::Busy);
        }
        self.quiescer.asked(self.shard, now);
        Ok(replica)
    }

    /// What stands in front of the first writes of each term: the limits that this leader's node is configured to, which every replica
    /// takes from the log. So they are the same on all of them whatever their own nodes' files say.
    pub(crate) fn configuration(&mut self, replica: &Replica<D>) -> Option<Configuration> {
        let term = replica.term();
        if std::mem::replace(&mut self.configured_in, term) == term {
            return None;
        }
        let machine = &replica.config().machine;
        Some(Configuration {
            policy: machine.shard_config.policy,
            budget_bytes: machine.shard_config.budget_bytes,
            max_records: machine.shard_config.max_records,
            sessions: machine.sessions,
        })
    }

    /// What stood in front was not proposed.
    pub(crate) fn not_configured(&mut self) {
        self.configured_in = 0;
    }

    /// What to say when this replica does not lead.
    pub(crate) fn not_leading(&mut self, now: Instant, replica: &Replica<D>) -> Refused {
        if replica.has_ended() {
            if replica.members().all.len() < 2 {
                return Refused::NoQuorum;
            }
            // Who leads now is the others' to say.
            return Refused::Moved(Moved {
                epoch: self.epoch,
                term: replica.term(),
                leader: 0,
                core: 0,
            });
        }
        match replica.leader() {
            Some(leader) if leader.place.node != self.node && self.transport.is_alive(leader.place.node) => {
                self.leaderless_since = None;
                Refused::Moved(self.moved(&leader))
            }
            _ => self.leaderless(now),
        }
    }

    /// What to say where this node has no replica: where the leader is said to be, or, where there is to be none here, that others know.
    fn not_here(&mut self, now: Instant) -> Refused {
        if let Some(moved) = self.hinted() {
            return Refused::Moved(moved);
        }
        let elsewhere = self.views.with(|view| !view.targets(self.shard).contains(&self.node));
        if elsewhere {
            return Refused::Moved(Moved {
                epoch: self.epoch,
                term: 0,
                leader: 0,
                core: 0,
            });
        }
        self.leaderless(now)
    }

    /// Who leads the shard on another node that lives.
    fn hinted(&self) -> Option<Moved> {
        let (term, leader) = *self.hints.borrow().get(&self.shard)?;
        let there = leader != self.node && self.transport.is_alive(leader);
        there.then(|| Moved {
            epoch: self.epoch,
            term,
            leader,
            core: self.transport.at(leader, self.shard).map_or(0, |peer| peer.core),
        })
    }

    fn leaderless(&mut self, now: Instant) -> Refused {
        let since = *self.leaderless_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.patience {
            Refused::Leaderless
        } else {
            Refused::NoQuorum
        }
    }

    /// Whether a read that arrives now may be served at once. Otherwise it waits.
    pub(crate) fn read_now(&mut self, now: Instant, read: Read) -> Readiness {
        let Some(replica) = self.replica() else {
            return Readiness::Never(read.origin, self.not_here(now));
        };
        if self.waiting.len() + self.behind.len() >= READS_WAITING {
            return Readiness::Never(read.origin, Refused::Busy);
        }
        let applied = replica.machine().applied().map_or(0, |applied| applied.index);
        match read.consistency {
            Consistency::Session { shard, epoch, index } => {
                // A token of another shard asks nothing of this one.
                if shard != self.shard || (epoch, index) <= (self.epoch, applied) || active(Mutant::TokenIgnored) {
                    return Readiness::Now(read, 0);
                }
                if epoch > self.epoch {
                    return Readiness::Never(read.origin, Refused::TooStale);
                }
                self.wait_for(&replica, now, index, read);
            }
            Consistency::Stale { max_age_ms } => {
                if replica.alone().is_some() {
                    return Readiness::Now(read, 0);
                }
                if let Some(age) = self.age(now, applied)
                    && age <= Duration::from_millis(max_age_ms.into())
                {
                    // Rounded up: never younger than it is.
                    return Readiness::Now(read, age.as_millis() as u32 + 1);
                }
                self.waiting.push(read);
            }
            Consistency::Linearizable if replica.alone().is_some() => return Readiness::Now(read, 0),
            Consistency::Linearizable => self.waiting.push(read),
        }
        Readiness::Later
    }

    /// For how long what has been applied here may not have been the newest.
    pub(crate) fn age(&self, now: Instant, applied: u64) -> Option<Duration> {
        let (at, index) = self.fresh?;
        let age = now.saturating_duration_since(at);
        (applied >= index).then_some(if active(Mutant::AgeForgotten) {
            Duration::ZERO
        } else {
            age
        })
    }

    fn wait_for(&mut self, replica: &Replica<D>, now: Instant, index: u64, read: Read) {
        let reached = replica.machine().reached(index);
        let wake = self.wake();
        self.shards.spawn(async move {
            // Lost with the replica, which the deadline sees to.
            let _ = reached.await;
            wake();
        });
        let until = now + self.patience;
        self.behind.push(Behind { index, until, read });
    }

    /// Asks for a confirmation for all that wait for one, unless one is under way.
    pub(crate) fn confirm(&mut self, now: Instant) {
        if self.waiting.is_empty() || self.asked.is_some() {
            return;
        }
        let Some(replica) = self.replica() else { return };
        self.quiescer.asked(self.shard, now);
        self.asked = Some((now, std::mem::take(&mut self.waiting)));
        let (confirmed, wake) = (Rc::clone(&self.confirmed), self.wake());
        self.shards.spawn(async move {
            let unconfirmed = replica.machine().applied().filter(|_| active(Mutant::ReadUnconfirmed));
            let result = match unconfirmed {
                Some(applied) => Ok(applied),
                None => replica.linearize().await,
            };
            confirmed.replace(Some(result));
            wake();
        });
    }

    /// What became of the reads whose confirmation was under way.
    pub(crate) fn confirmed(&mut self) -> Option<Outcome> {
        let result = self.confirmed.take()?;
        let (at, reads) = self.asked.take()?;
        Some(match result {
            Ok(log_id) => {
                self.leaderless_since = None;
                self.fresh = Some((at, log_id.index));
                Outcome::Fresh(at, reads)
            }
            Err(error) => Outcome::Failed(error, reads),
        })
    }

    /// Takes the reads whose entry has been applied into `served`, and those that have waited too long into `late`.
    pub(crate) fn caught_up(&mut self, now: Instant, served: &mut Vec<Read>, late: &mut Vec<Read>) {
        if self.behind.is_empty() {
            return;
        }
        let applied = self
            .replica()
            .and_then(|replica| replica.machine().applied())
            .map_or(0, |applied| applied.index);
        for behind in std::mem::take(&mut self.behind) {
            if behind.index <= applied {
                served.push(behind.read);
            } else if behind.until <= now {
                late.push(behind.read);
            } else {
                self.behind.push(behind);
            }
        }
    }

    /// Has a snapshot of this replica taken for somebody who is told when it is durable. The error says why not now.
    pub(crate) fn take_snapshot(&mut self, origin: Origin) -> Result<(), &'static str> {
        let Some(replica) = self.replica() else {
            return Err("this node has no replica of the shard yet");
        };
        if self.snapshots_waiting >= SNAPSHOTS_WAITING {
            return Err("too many wait for a snapshot of the shard");
        }
        self.snapshots_waiting += 1;
        let (snapshots, wake) = (Rc::clone(&self.snapshots), self.wake());
        self.shards.spawn(async move {
            let taken = replica.take_snapshot().await;
            snapshots.borrow_mut().push((origin, taken));
            wake();
        });
        Ok(())
    }

    /// Those whose snapshot is durable, or was not taken.
    pub(crate) fn snapshots_taken(&mut self) -> Snapshots {
        let taken = self.snapshots.take();
        self.snapshots_waiting -= taken.len();
        taken
    }

    /// What is to be known of the shard where this node leads it.
    pub(crate) fn led(&self) -> Option<Led> {
        let replica = self.replica().filter(Replica::leads)?;
        let bytes = replica.machine().with(|machine| machine.shard().stats().used_bytes);
        // Roughly, so that it is not told anew with every write.
        let bytes = (bytes >> 20) << 20;
        Some(led_by(self.shard, &replica, bytes))
    }

    /// The shard as the map shows it.
    pub(crate) fn view(&self) -> Option<MapShard> {
        let Some(replica) = self.replica() else {
            return self.view_from_afar();
        };
        let leader = replica.leader();
        let moved = leader.map(|leader| self.moved(&leader));
        let at = |node| {
            if node == self.node {
                return self.core;
            }
            self.transport.at(node, self.shard).map_or(0, |peer| peer.core)
        };
        let members = replica.members();
        let replicas = members.all.iter().map(|(id, place)| MapReplica {
            id: *id,
            node: place.node,
            core: at(place.node),
        });
        Some(MapShard {
            epoch: self.epoch,
            term: replica.term(),
            leader: moved.map_or(0, |moved| moved.leader),
            replicas: replicas.collect(),
        })
    }

    /// The same where this node has no replica: what is said of it.
    fn view_from_afar(&self) -> Option<MapShard> {
        let view = self.views.get();
        if !view.managed {
            return None;
        }
        let hinted = self.hinted();
        let replicas = view.targets(self.shard).iter().map(|node| MapReplica {
            id: 0,
            node: *node,
            core: view.core(*node, self.shard).unwrap_or(0),
        });
        Some(MapShard {
            epoch: self.epoch,
            term: hinted.map_or(0, |moved| moved.term),
            leader: hinted.map_or(0, |moved| moved.leader),
            replicas: replicas.collect(),
        })
    }

    /// Of all replicas of the core: whether what is acknowledged is on disks, whether the journal has failed, and how far the node's
    /// clock is off the others', in milliseconds.
    pub(crate) fn flags(&self) -> [u64; 3] {
        [
            u64::from(self.shards.journal().is_durable()),
            u64::from(self.shards.failure().is_some()),
            self.leadership.clocks().skew_ms.unsigned_abs(),
        ]
    }

    /// Hands leadership over where another node should have it. To be called now and then.
    pub(crate) fn tend_leadership(&mut self, now: Instant) {
        let Some(replica) = self.replica() else { return };
        if let Some(leaving) = &self.leaving {
            if leaving.until <= now || !replica.leads() {
                self.stay();
            }
        } else if let Some((heir, ticket)) = self.leadership.heir(self.shard, &replica, now) {
            tracing::info!(shard = self.shard, heir, "leadership is handed over");
            self.quiescer.asked(self.shard, now);
            self.proposer.hold(true);
            self.leaving = Some(Leaving {
                heir,
                until: now + LEAVING,
                told: false,
                _ticket: ticket,
            });
        }
        self.leave_when_quiet(&replica);
    }

    /// Tells the heir, once everything that was proposed has come to an end, so that nothing is in doubt; ends it when it is done.
    pub(crate) fn leave_when_quiet(&mut self, replica: &Replica<D>) {
        let Some(leaving) = &mut self.leaving else { return };
        if leaving.told {
            if !replica.leads() {
                self.stay();
            }
            return;
        }
        if self.proposer.on_their_way() > 0 {
            return;
        }
        leaving.told = true;
        let (heir, replica, wake) = (leaving.heir, replica.clone(), self.wake());
        self.shards.spawn(async move {
            if replica.raft().trigger().transfer_leader(heir).await.is_ok() {
                let steps = LEAVING.as_millis() / LEAVING_STEP.as_millis();
                for _ in 0..steps {
                    if !replica.leads() {
                        break;
                    }
                    Runtime::sleep(LEAVING_STEP).await;
                }
            }
            wake();
        });
    }

    fn stay(&mut self) {
        self.leaving = None;
        self.proposer.hold(false);
        self.come_back();
    }

    /// Appends what is to be known of the replica, beside the state.
    pub(crate) fn encode_stats(&self, out: &mut BytesMut) {
        let Some(replica) = self.replica() else { return };
        let status = replica.status();
        let counters = [
            ("replica", status.id),
            ("term", status.term),
            ("leads", u64::from(status.leads)),
            ("votes", u64::from(replica.votes())),
            ("voters", replica.voters() as u64),
            ("log_index", replica.last_index()),
            ("snapshot_index", status.snapshot.unwrap_or(0)),
            ("journal_bytes", self.shards.journal().held_bytes(u32::from(self.shard))),
            ("quiesced", u64::from(self.quiescer.is_still(self.shard))),
            ("snapshotting", u64::from(replica.machine().is_building())),
            ("damaged_snapshots", replica.machine().damaged_snapshots()),
            ("ended", replica.ended().map_or(0, |ended| ended.code())),
        ];
        stats::encode_of_shard(self.shard, &counters, out);
    }

    /// When something that waits is to be given up, at the latest.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let behind = self.behind.iter().map(|behind| behind.until).min();
        [self.proposer.next_deadline(), behind].into_iter().flatten().min()
    }
}
