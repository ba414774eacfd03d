//! How the replicas of an idle shard agree to stop their clocks, and start them again.
//!
//! A replica that ticks costs CPU for nothing while nobody uses its shard: the leader beats, the followers count the time since.
//! Both can stop when all of them know that nothing is missing: then silence no longer means that the leader is gone, and
//! whether its *node* is there is the failure detector's to say ([`super::Peers::is_alive`]), once for all shards of the node.
//!
//! ```text
//! leader                                      followers
//! idle, every live follower has the whole log
//!   Propose(term, last index) ──────────────▶ same term, same last index, applied, idle: stop the clock
//!                             ◀────────────── Accept
//! all live followers accepted, and they are a majority with the leader: stop the clock
//! ```
//!
//! Any activity starts the clock of the replica that sees it: a proposal, a read that needs a confirmation, a message of Raft. A
//! follower tells the leader ([`QuiesceVerb::Wake`]), for a follower alone would only wait for a heartbeat and then disturb
//! everybody with an election; the leader's heartbeats wake the rest. A change of any replica's node starts the clock of every
//! replica too: a follower whose leader's node is gone must elect another, and the leader must reach a follower that came back
//! with a running clock. Of the followers left behind by a leader one is told to campaign at once, so that they do not
//! compete: the first that lives in an order that differs from shard to shard.
//!
//! Raft's safety does not rest on any of this: clocks only decide when elections and heartbeats happen. What rests on it is that
//! a shard without a leader gets one, hence the rule: whatever is not certain starts the clock.
//!
//! Pure: one [`Quiescence`] is one shard's replica on one node. Whoever owns it calls `on_*` and does what [`Action`]s say.

use std::time::{Duration, Instant};

use generation_proto::peer::{Quiesce, QuiesceVerb};

use super::Liveness;

/// What the owner is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send this to the replica on a node, as a message without an answer.
    Send(u64, Quiesce),
    /// Stop the replica's clock.
    StopClock,
    /// Start the replica's clock: as if it had just heard from its leader.
    StartClock,
    /// Start an election now. The clock runs.
    Campaign,
}

/// What the owner sees of its replica. `Wake` and `Propose` messages and activity are judged by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// The current term.
    pub term: u64,
    /// The node of the leader of that term, if it is known.
    pub leader: Option<u64>,
    /// The last index of the log.
    pub last_index: u64,
    /// Whether everything up to there is committed and applied, and nothing is asked of the replica.
    pub idle: bool,
}

/// Another replica of the shard, as the leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Follower {
    /// Its node.
    pub node: u64,
    /// Whether it has a vote.
    pub votes: bool,
    /// Whether its node is alive.
    pub alive: bool,
    /// The last index known to be in its log.
    pub matched: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// The clock runs.
    Active,
    /// The leader has asked, its clock runs, and these nodes have not answered.
    Proposed {
        term: u64,
        index: u64,
        missing: Vec<u64>,
        until: Instant,
    },
    /// The clock stands. The leader of the term is on `leader`, which may be this node.
    Still { term: u64, leader: u64 },
}

/// The agreement of one shard's replica on one node. See the module's documentation.
#[derive(Debug)]
pub struct Quiescence {
    shard: u16,
    node: u64,
    patience: Duration,
    state: State,
    /// No proposal before: one that was declined is not repeated at once.
    rest_until: Option<Instant>,
}

impl Quiescence {
    /// The clock of the replica of `shard` on `node` runs. Answers to a proposal are waited for for `patience`, and a proposal that
    /// failed is repeated after four times as long at the earliest.
    pub fn new(shard: u16, node: u64, patience: Duration) -> Self {
        Self {
            shard,
            node,
            patience,
            state: State::Active,
            rest_until: None,
        }
    }

    /// Whether the clock stands.
    pub fn is_still(&self) -> bool {
        matches!(self.state, State::Still { .. })
    }

    /// The leader has had nothing to do for a while. To be called now and then as long as that is so, by the leader only.
    pub fn on_idle(&mut self, now: Instant, local: &Local, followers: &[Follower], act: &mut impl FnMut(Action)) {
        match &self.state {
            State::Still { .. } => return,
            State::Proposed { term, index, until, .. } => {
                if *until > now && (*term, *index) == (local.term, local.last_index) {
                    return;
                }
                self.give_up(now);
            }
            State::Active => {}
        }
        if self.rest_until.is_some_and(|until| until > now) {
            return;
        }
        let voters = 1 + followers.iter().filter(|follower| follower.votes).count();
        let alive = 1 + followers
            .iter()
            .filter(|follower| follower.votes && follower.alive)
            .count();
        let complete = |follower: &Follower| !follower.alive || follower.matched == local.last_index;
        if local.leader != Some(self.node) || !local.idle || alive * 2 <= voters || !followers.iter().all(complete) {
            return;
        }
        let (term, index) = (local.term, local.last_index);
        let missing: Vec<u64> = followers
            .iter()
            .filter(|follower| follower.alive)
            .map(|follower| follower.node)
            .collect();
        for &node in &missing {
            let verb = QuiesceVerb::Propose;
            act(Action::Send(node, Quiesce { verb, term, index }));
        }
        let until = now + self.patience;
        self.state = State::Proposed {
            term,
            index,
            missing,
            until,
        };
        self.agreed(act);
    }

    /// Something is asked of the replica, or a message of Raft has arrived for it or is about to be sent by it.
    pub fn on_activity(&mut self, act: &mut impl FnMut(Action)) {
        match self.state {
            State::Active => {}
            State::Proposed { .. } => self.state = State::Active,
            State::Still { term, leader } => {
                self.state = State::Active;
                act(Action::StartClock);
                if leader != self.node {
                    wake(leader, term, act);
                }
            }
        }
    }

    /// A message of the replica on another node.
    pub fn on_message(
        &mut self,
        now: Instant,
        from: u64,
        message: Quiesce,
        local: &Local,
        act: &mut impl FnMut(Action),
    ) {
        let Quiesce { verb, term, index } = message;
        match verb {
            QuiesceVerb::Propose => {
                let agrees = local.idle && (local.term, local.leader, local.last_index) == (term, Some(from), index);
                let verb = if agrees {
                    QuiesceVerb::Accept
                } else {
                    QuiesceVerb::Decline
                };
                if agrees {
                    if !self.is_still() {
                        act(Action::StopClock);
                    }
                    self.state = State::Still { term, leader: from };
                } else {
                    self.start(act);
                }
                act(Action::Send(from, Quiesce { verb, term, index }));
            }
            QuiesceVerb::Accept => match &mut self.state {
                State::Proposed {
                    term: asked,
                    index: at,
                    missing,
                    ..
                } if (*asked, *at) == (term, index) => {
                    missing.retain(|&node| node != from);
                    if (local.term, local.last_index, local.idle) == (term, index, true) {
                        self.agreed(act);
                    } else {
                        self.give_up(now);
                        // Its heartbeats would start that clock, but there may be none to come for a while.
                        wake(from, term, act);
                    }
                }
                // It has accepted what is asked for no more, and has stopped.
                State::Proposed { .. } | State::Active => wake(from, term, act),
                State::Still { .. } => {}
            },
            QuiesceVerb::Decline => {
                if matches!(&self.state, State::Proposed { term: asked, index: at, .. } if (*asked, *at) == (term, index))
                {
                    self.give_up(now);
                }
                self.start(act);
            }
            QuiesceVerb::Wake => {
                // Of an older term it comes late, of a newer one it knows more: either way a clock that runs does no harm.
                if matches!(self.state, State::Proposed { .. }) {
                    self.give_up(now);
                }
                self.start(act);
            }
        }
    }

    /// What is known of the node of another replica has changed. `order` are the nodes of all replicas with a vote that are alive,
    /// this one's included if it has a vote.
    pub fn on_liveness(&mut self, node: u64, change: Liveness, order: &[u64], act: &mut impl FnMut(Action)) {
        match self.state {
            State::Active => {}
            State::Proposed { .. } => self.state = State::Active,
            State::Still { leader, .. } => {
                self.state = State::Active;
                act(Action::StartClock);
                let orphaned = leader == node && change != Liveness::Up;
                if orphaned && first_in_line(self.shard, leader, order) == Some(self.node) {
                    act(Action::Campaign);
                }
            }
        }
    }

    /// When the owner is to call [`on_idle`](Self::on_idle) again, at the latest, if the shard stays idle.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.state {
            State::Proposed { until, .. } => Some(until),
            State::Active => self.rest_until,
            State::Still { .. } => None,
        }
    }

    /// Stops the leader's clock when nobody is missing.
    fn agreed(&mut self, act: &mut impl FnMut(Action)) {
        if let State::Proposed { term, missing, .. } = &self.state
            && missing.is_empty()
        {
            let (term, leader) = (*term, self.node);
            self.state = State::Still { term, leader };
            self.rest_until = None;
            act(Action::StopClock);
        }
    }

    /// A proposal has failed. Who has accepted it is woken by the heartbeats that go on.
    fn give_up(&mut self, now: Instant) {
        self.state = State::Active;
        self.rest_until = Some(now + self.patience * 4);
    }

    /// The clock must run. Nobody else is told: whoever says so runs already.
    fn start(&mut self, act: &mut impl FnMut(Action)) {
        if self.is_still() {
            self.state = State::Active;
            act(Action::StartClock);
        }
    }
}

fn wake(node: u64, term: u64, act: &mut impl FnMut(Action)) {
    let verb = QuiesceVerb::Wake;
    act(Action::Send(node, Quiesce { verb, term, index: 0 }));
}

/// Who of the nodes in `order` takes over a shard when its leader's node is gone.
pub fn first_in_line(shard: u16, leader: u64, order: &[u64]) -> Option<u64> {
    let others = order.iter().copied().filter(|&other| other != leader);
    others.min_by_key(|&other| rank(shard, other))
}

/// The order in which the replicas of a shard take over, different from shard to shard so that a dead node's leaderships spread.
/// The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA '14).
fn rank(shard: u16, node: u64) -> (u64, u64) {
    let mut z = node ^ u64::from(shard).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31), node)
}

#[cfg(test)]
mod tests;
