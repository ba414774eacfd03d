//! What stops the clocks of idle replicas and starts them again, and what has a follower campaign when its leader's node dies: the
//! agreement of [`crate::peers::quiesce`] put into practice for the groups of one core.
//!
//! # What holds
//! - A follower whose clock starts again does not campaign for the longest election time-out: it counts as if it had just heard from
//!   its leader, whom it has told to go on.
//! - Where a leader's node is known to be dead, one follower campaigns as soon as the others may vote for it, and the others wait for
//!   their time-outs. It asks for votes beforehand, so that one who is wrong disturbs nobody.
//!
//! - A node that may not lead does not campaign.
//! - Where a replica has ended on a node that lives, the others are told to start their clocks: nobody else would have them elect.
//!
//! Not here: who is alive, and what is agreed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_proto::peer::{Quiesce, QuiesceVerb};
use openraft_rt::AsyncRuntime as _;

use crate::env::disk::Disk;
use crate::group::Replica;
use crate::peers::quiesce::{Action, Follower, Local, Quiescence, first_in_line};
use crate::peers::{Liveness, PeerId, Peers};
use crate::raft::network::Transport as _;
use crate::raft::runtime::Runtime;
use crate::raft::shards::Shards;
use crate::raft::transport::PeerTransport;

/// The kind of the messages by which replicas agree to keep still.
pub(crate) const KIND: u8 = 64;

/// How long nothing may have been asked of a shard before its leader proposes to keep still.
const IDLE: Duration = Duration::from_secs(1);

/// How long an answer to that may take.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often a follower of a dead leader asks for votes: the others refuse as long as they may believe the leader to be alive.
const CAMPAIGN_STEP: Duration = Duration::from_millis(40);

/// How often, at the pace of [`Quiescer::tend`], the others are told that a replica has ended: messages may be lost.
const LAST_WORDS: u8 = 10;

struct Still {
    quiescence: Quiescence,
    /// How often it has been told that the replica has ended.
    last_words: u8,
    last_asked: Instant,
    /// Counts the starts of the clock, so that what belongs to one knows whether it is over.
    starts: Rc<Cell<u64>>,
}

/// The clocks of one core's replicas.
pub(crate) struct Quiescer<D: Disk> {
    node: u64,
    shards: Shards<D, PeerTransport>,
    transport: PeerTransport,
    peers: Peers,
    /// The longest election time-out.
    election_max: Duration,
    /// Whether this node may campaign.
    may_lead: Rc<Cell<bool>>,
    /// What the replicas were last told of that.
    told: Cell<bool>,
    /// By shard; `None` for those of other cores.
    stills: RefCell<Vec<Option<Still>>>,
}

impl<D: Disk> Quiescer<D> {
    pub(crate) fn new(
        node: u64,
        shards: Shards<D, PeerTransport>,
        transport: PeerTransport,
        peers: Peers,
        election_max: Duration,
        may_lead: Rc<Cell<bool>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            node,
            shards,
            transport,
            peers,
            election_max,
            may_lead,
            told: Cell::new(true),
            stills: RefCell::default(),
        })
    }

    /// Something is asked of a shard.
    pub(crate) fn asked(&self, shard: u16, now: Instant) {
        self.with(shard, now, |still| still.last_asked = now);
        self.active(shard, now);
    }

    /// A shard is active: replicas talk about it.
    pub(crate) fn active(&self, shard: u16, now: Instant) {
        let mut actions = Vec::new();
        self.with(shard, now, |still| {
            still.quiescence.on_activity(&mut |action| actions.push(action));
        });
        self.act(shard, actions);
    }

    /// A message of another replica's about keeping still.
    pub(crate) fn message(&self, from: PeerId, shard: u16, payload: &[u8], now: Instant) {
        let Some(message) = Quiesce::decode(payload) else {
            return;
        };
        let Some(local) = self.local(shard, now) else { return };
        let mut actions = Vec::new();
        self.with(shard, now, |still| {
            let act = &mut |action| actions.push(action);
            still.quiescence.on_message(now, from.node, message, &local, act);
        });
        self.act(shard, actions);
    }

    /// What is known of a node has changed.
    pub(crate) fn liveness(&self, node: u64, change: Liveness, now: Instant) {
        for (shard, replica) in self.shards.replicas() {
            let members = replica.members();
            let order: Vec<u64> = members
                .voters
                .iter()
                .filter_map(|id| Some(members.all.get(id)?.node))
                .filter(|&node| node == self.node || self.transport.is_alive(node))
                .collect();
            let mut actions = Vec::new();
            self.with(shard, now, |still| {
                let was_still = still.quiescence.is_still();
                let act = &mut |action| actions.push(action);
                still.quiescence.on_liveness(node, change, &order, act);
                let led = replica.leader().is_some_and(|leader| leader.place.node == node);
                if !was_still && led && change != Liveness::Up && first_in_line(shard, node, &order) == Some(self.node)
                {
                    act(Action::Campaign);
                }
            });
            self.act(shard, actions);
        }
    }

    /// Proposes to keep still where nothing has been asked for a while. To be called now and then.
    pub(crate) fn tend(&self, now: Instant) {
        let may_lead = self.may_lead.get();
        let changed = self.told.replace(may_lead) != may_lead;
        for (shard, replica) in self.shards.replicas() {
            if changed || !may_lead {
                replica.raft().runtime_config().elect(may_lead);
            }
            if replica.has_ended() {
                self.speak_for(shard, &replica, now);
                continue;
            }
            if !replica.leads() {
                continue;
            }
            let mut is_idle = false;
            self.with(shard, now, |still| {
                is_idle = !still.quiescence.is_still() && now.saturating_duration_since(still.last_asked) >= IDLE;
            });
            if !is_idle {
                continue;
            }
            let Some(local) = self.local(shard, now) else { continue };
            let followers = self.followers(&replica);
            let mut actions = Vec::new();
            self.with(shard, now, |still| {
                let act = &mut |action| actions.push(action);
                still.quiescence.on_idle(now, &local, &followers, act);
            });
            self.act(shard, actions);
        }
    }

    /// Has the others start their clocks, in place of a replica that has ended.
    fn speak_for(&self, shard: u16, replica: &Replica<D>, now: Instant) {
        let mut told = 0;
        self.with(shard, now, |still| {
            told = still.last_words;
            still.last_words = told.saturating_add(1);
        });
        if told >= LAST_WORDS {
            return;
        }
        let (verb, term) = (QuiesceVerb::Wake, replica.term());
        let wake = Quiesce { verb, term, index: 0 };
        let nodes = replica.members().all.into_values().map(|place| place.node);
        let others = nodes.filter(|node| *node != self.node);
        self.act(shard, others.map(|node| Action::Send(node, wake)).collect());
    }

    /// Whether the clock of a shard's replica stands.
    pub(crate) fn is_still(&self, shard: u16) -> bool {
        let stills = self.stills.borrow();
        let still = stills.get(usize::from(shard)).and_then(Option::as_ref);
        still.is_some_and(|still| still.quiescence.is_still())
    }

    fn with(&self, shard: u16, now: Instant, work: impl FnOnce(&mut Still)) {
        let mut stills = self.stills.borrow_mut();
        let place = usize::from(shard);
        if stills.len() <= place {
            stills.resize_with(place + 1, || None);
        }
        work(stills[place].get_or_insert_with(|| Still {
            quiescence: Quiescence::new(shard, self.node, PATIENCE),
            last_words: 0,
            last_asked: now,
            starts: Rc::default(),
        }));
    }

    fn local(&self, shard: u16, now: Instant) -> Option<Local> {
        let replica = self.shards.replica(shard)?;
        let last_index = replica.last_index();
        let applied = replica.machine().applied().map_or(0, |applied| applied.index);
        let mut asked = now;
        self.with(shard, now, |still| asked = still.last_asked);
        Some(Local {
            term: replica.term(),
            leader: replica.leader().map(|leader| leader.place.node),
            last_index,
            idle: applied == last_index
                && now.saturating_duration_since(asked) >= IDLE
                && !replica.machine().is_building()
                && replica.votes()
                && !replica.members().changing,
        })
    }

    fn followers(&self, replica: &Replica<D>) -> Vec<Follower> {
        let members = replica.members();
        let matched = replica.matched();
        let others = members.all.iter().filter(|(_, place)| place.node != self.node);
        others
            .map(|(id, place)| Follower {
                node: place.node,
                votes: members.voters.contains(id),
                alive: self.transport.is_alive(place.node),
                matched: matched.get(id).copied().unwrap_or(0),
            })
            .collect()
    }

    fn act(&self, shard: u16, actions: Vec<Action>) {
        let Some(replica) = self.shards.replica(shard) else {
            return;
        };
        for action in actions {
            match action {
                Action::Send(node, message) => {
                    if let Some(to) = self.transport.at(node, shard) {
                        // A lost one is a clock that goes on, or one that a heartbeat starts.
                        let _ = self
                            .peers
                            .send(to, shard, KIND, Bytes::copy_from_slice(&message.to_bytes()));
                    }
                }
                Action::StopClock => replica.raft().runtime_config().tick(false),
                Action::StartClock => self.start_clock(shard, &replica),
                Action::Campaign => self.campaign(&replica),
            }
        }
    }

    fn start_clock(&self, shard: u16, replica: &Replica<D>) {
        let mut stills = self.stills.borrow_mut();
        let Some(still) = stills.get_mut(usize::from(shard)).and_then(Option::as_mut) else {
            return;
        };
        let starts = Rc::clone(&still.starts);
        starts.set(starts.get() + 1);
        let this = starts.get();
        let config = replica.raft().runtime_config();
        if !replica.leads() {
            config.elect(false);
            let (replica, wait) = (replica.clone(), self.election_max);
            let may_lead = Rc::clone(&self.may_lead);
            self.shards.spawn(async move {
                Runtime::sleep(wait).await;
                if starts.get() == this && may_lead.get() {
                    replica.raft().runtime_config().elect(true);
                }
            });
        }
        config.tick(true);
    }

    fn campaign(&self, replica: &Replica<D>) {
        if !self.may_lead.get() {
            return;
        }
        let (replica, transport) = (replica.clone(), self.transport.clone());
        let steps = (self.election_max * 2).as_millis() / CAMPAIGN_STEP.as_millis();
        self.shards.spawn(async move {
            for _ in 0..steps {
                let leader = replica.leader();
                if replica.leads() || leader.is_some_and(|leader| transport.is_alive(leader.place.node)) {
                    return;
                }
                if replica.raft().trigger().elect(true).await.is_err() {
                    // It has stopped.
                    return;
                }
                Runtime::sleep(CAMPAIGN_STEP).await;
            }
        });
    }
}
