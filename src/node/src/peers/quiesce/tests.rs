//! The agreement by itself, and three replicas whose messages are lost, late and out of order.

use std::collections::VecDeque;

use super::*;
use clock::origin;

const PATIENCE: Duration = Duration::from_millis(100);

fn local(leader: u64) -> Local {
    Local {
        term: 3,
        leader: Some(leader),
        last_index: 40,
        idle: true,
    }
}

fn follower(node: u64) -> Follower {
    Follower {
        node,
        votes: true,
        alive: true,
        matched: 40,
    }
}

fn message(verb: QuiesceVerb) -> Quiesce {
    Quiesce {
        verb,
        term: 3,
        index: 40,
    }
}

fn wake() -> Quiesce {
    Quiesce {
        index: 0,
        ..message(QuiesceVerb::Wake)
    }
}

/// The actions of one call.
fn acts(call: impl FnOnce(&mut dyn FnMut(Action))) -> Vec<Action> {
    let mut acts = Vec::new();
    call(&mut |action| acts.push(action));
    acts
}

fn idle(leader: &mut Quiescence, now: Instant, followers: &[Follower]) -> Vec<Action> {
    acts(|mut act| leader.on_idle(now, &local(1), followers, &mut act))
}

fn tell(to: &mut Quiescence, now: Instant, from: u64, message: Quiesce, local: &Local) -> Vec<Action> {
    acts(|mut act| to.on_message(now, from, message, local, &mut act))
}

/// A leader on node 1 whose two followers have accepted.
fn still_leader(now: Instant) -> Quiescence {
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    idle(&mut leader, now, &[follower(2), follower(3)]);
    for node in [2, 3] {
        tell(&mut leader, now, node, message(QuiesceVerb::Accept), &local(1));
    }
    assert!(leader.is_still());
    leader
}

fn still_follower(node: u64, now: Instant) -> Quiescence {
    let mut replica = Quiescence::new(5, node, PATIENCE);
    let acts = tell(&mut replica, now, 1, message(QuiesceVerb::Propose), &local(1));
    assert_eq!(acts, [Action::StopClock, Action::Send(1, message(QuiesceVerb::Accept))]);
    replica
}

#[test]
fn the_leader_stops_when_all_have_accepted_and_not_before() {
    let now = origin();
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    let propose = message(QuiesceVerb::Propose);
    assert_eq!(
        idle(&mut leader, now, &[follower(2), follower(3)]),
        [Action::Send(2, propose), Action::Send(3, propose)]
    );
    assert_eq!(idle(&mut leader, now, &[follower(2), follower(3)]), [], "asked already");
    let accept = message(QuiesceVerb::Accept);
    assert_eq!(tell(&mut leader, now, 2, accept, &local(1)), []);
    assert_eq!(tell(&mut leader, now, 2, accept, &local(1)), [], "twice is once");
    assert_eq!(tell(&mut leader, now, 3, accept, &local(1)), [Action::StopClock]);
    assert!(leader.is_still());
    assert_eq!(idle(&mut leader, now, &[follower(2), follower(3)]), []);
}

#[test]
fn nothing_is_proposed_that_could_not_hold() {
    let now = origin();
    let lagging = Follower {
        matched: 39,
        ..follower(3)
    };
    let dead = |node| Follower {
        alive: false,
        matched: 7,
        ..follower(node)
    };
    for followers in [[follower(2), lagging], [dead(2), dead(3)]] {
        let mut leader = Quiescence::new(5, 1, PATIENCE);
        assert_eq!(idle(&mut leader, now, &followers), []);
    }
    for local in [
        Local {
            idle: false,
            ..local(1)
        },
        Local {
            leader: None,
            ..local(1)
        },
        local(2),
    ] {
        let mut leader = Quiescence::new(5, 1, PATIENCE);
        let followers = [follower(2), follower(3)];
        assert_eq!(acts(|mut act| leader.on_idle(now, &local, &followers, &mut act)), []);
    }
    // A dead minority is not waited for.
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    let propose = message(QuiesceVerb::Propose);
    assert_eq!(
        idle(&mut leader, now, &[follower(2), dead(3)]),
        [Action::Send(2, propose)]
    );
    let accept = message(QuiesceVerb::Accept);
    assert_eq!(tell(&mut leader, now, 2, accept, &local(1)), [Action::StopClock]);
    // A replica alone has nobody to ask.
    assert_eq!(
        idle(&mut Quiescence::new(5, 1, PATIENCE), now, &[]),
        [Action::StopClock]
    );
}

#[test]
fn a_follower_that_knows_otherwise_declines() {
    let now = origin();
    for other in [
        Local { term: 4, ..local(1) },
        Local { term: 2, ..local(1) },
        local(2),
        Local {
            last_index: 41,
            ..local(1)
        },
        Local {
            idle: false,
            ..local(1)
        },
    ] {
        let mut replica = Quiescence::new(5, 2, PATIENCE);
        let decline = Action::Send(1, message(QuiesceVerb::Decline));
        assert_eq!(
            tell(&mut replica, now, 1, message(QuiesceVerb::Propose), &other),
            [decline]
        );
        // One that stood still runs again.
        let mut replica = still_follower(2, now);
        assert_eq!(
            tell(&mut replica, now, 1, message(QuiesceVerb::Propose), &other),
            [Action::StartClock, decline]
        );
    }
}

#[test]
fn a_proposal_that_failed_is_not_repeated_at_once() {
    let now = origin();
    let followers = [follower(2), follower(3)];
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    idle(&mut leader, now, &followers);
    assert_eq!(tell(&mut leader, now, 2, message(QuiesceVerb::Decline), &local(1)), []);
    assert_eq!(idle(&mut leader, now + PATIENCE, &followers), []);
    assert_eq!(leader.next_deadline(), Some(now + PATIENCE * 4));
    let again = now + PATIENCE * 4;
    assert_eq!(idle(&mut leader, again, &followers).len(), 2);
    // Nor is one that was not answered.
    assert_eq!(leader.next_deadline(), Some(again + PATIENCE));
    assert_eq!(idle(&mut leader, again + PATIENCE, &followers), []);
    assert_eq!(idle(&mut leader, again + PATIENCE * 5, &followers).len(), 2);
    // Who accepts what is asked for no more is woken.
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    assert_eq!(
        tell(&mut leader, now, 2, message(QuiesceVerb::Accept), &local(1)),
        [Action::Send(2, wake())]
    );
}

#[test]
fn activity_starts_the_clock_and_a_follower_tells_the_leader() {
    let now = origin();
    let mut leader = still_leader(now);
    assert_eq!(acts(|mut act| leader.on_activity(&mut act)), [Action::StartClock]);
    assert_eq!(acts(|mut act| leader.on_activity(&mut act)), []);
    let mut replica = still_follower(2, now);
    assert_eq!(
        acts(|mut act| replica.on_activity(&mut act)),
        [Action::StartClock, Action::Send(1, wake())]
    );
    let mut leader = still_leader(now);
    assert_eq!(tell(&mut leader, now, 2, wake(), &local(1)), [Action::StartClock]);
    assert_eq!(tell(&mut leader, now, 2, wake(), &local(1)), []);
    // Activity takes a proposal back: what comes of it is too late.
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    idle(&mut leader, now, &[follower(2)]);
    assert_eq!(acts(|mut act| leader.on_activity(&mut act)), []);
    assert_eq!(
        tell(&mut leader, now, 2, message(QuiesceVerb::Accept), &local(1)),
        [Action::Send(2, wake())]
    );
}

#[test]
fn an_acceptance_of_what_has_changed_meanwhile_stops_nobody() {
    let now = origin();
    let mut leader = Quiescence::new(5, 1, PATIENCE);
    idle(&mut leader, now, &[follower(2)]);
    let more = Local {
        last_index: 41,
        ..local(1)
    };
    assert_eq!(
        tell(&mut leader, now, 2, message(QuiesceVerb::Accept), &more),
        [Action::Send(2, wake())]
    );
    assert!(!leader.is_still());
}

#[test]
fn one_follower_campaigns_when_the_leaders_node_goes() {
    let now = origin();
    for change in [Liveness::Down, Liveness::Restarted] {
        let mut campaigns = 0;
        for node in [2, 3] {
            let mut replica = still_follower(node, now);
            let acts = acts(|mut act| replica.on_liveness(1, change, &[2, 3], &mut act));
            assert_eq!(acts[0], Action::StartClock);
            campaigns += acts[1..].iter().filter(|&&action| action == Action::Campaign).count();
        }
        assert_eq!(campaigns, 1);
    }
    // Another follower's node is no reason to campaign, but one to run; so is a node that comes back.
    for (node, change) in [
        (3, Liveness::Down),
        (3, Liveness::Restarted),
        (3, Liveness::Up),
        (1, Liveness::Up),
    ] {
        let mut replica = still_follower(2, now);
        let acts = acts(|mut act| replica.on_liveness(node, change, &[1, 2], &mut act));
        assert_eq!(acts, [Action::StartClock]);
    }
    let mut leader = still_leader(now);
    assert_eq!(
        acts(|mut act| leader.on_liveness(3, Liveness::Down, &[1, 2], &mut act)),
        [Action::StartClock]
    );
}

#[test]
fn a_dead_nodes_shards_are_taken_over_by_all_others() {
    let mut counts = [0; 3];
    for shard in 0..300 {
        let first = [2, 3, 4].into_iter().min_by_key(|&node| rank(shard, node));
        counts[first.unwrap() as usize - 2] += 1;
    }
    assert!(counts.iter().all(|&count| count > 60), "{counts:?}");
}

/// A replica with a clock.
struct Replica {
    quiescence: Quiescence,
    local: Local,
    clock: bool,
}

/// Three replicas, led from node 1, in a world that loses, delays and doubles messages.
struct World {
    replicas: Vec<Replica>,
    network: VecDeque<(u64, u64, Quiesce)>,
    now: Instant,
    /// How often the leader came to rest.
    stills: u64,
    state: u64,
}

impl World {
    fn new(now: Instant, seed: u64) -> Self {
        let replica = |node| Replica {
            quiescence: Quiescence::new(5, node, PATIENCE),
            local: local(1),
            clock: true,
        };
        Self {
            replicas: (1..=3).map(replica).collect(),
            network: VecDeque::new(),
            now,
            stills: 0,
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    /// A random number below `bound` (xorshift64).
    fn dice(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }

    /// Has a replica do something, and does what comes of it.
    fn with(&mut self, node: u64, call: impl FnOnce(&mut Quiescence, &Local, &mut dyn FnMut(Action))) {
        let replica = &mut self.replicas[node as usize - 1];
        let mut actions = Vec::new();
        call(&mut replica.quiescence, &replica.local, &mut |action| {
            actions.push(action);
        });
        for action in actions {
            match action {
                Action::Send(to, message) => self.network.push_back((node, to, message)),
                Action::StopClock => {
                    assert!(std::mem::replace(&mut replica.clock, false), "stopped twice");
                    self.stills += u64::from(node == 1);
                }
                Action::StartClock => assert!(!std::mem::replace(&mut replica.clock, true), "started twice"),
                Action::Campaign => panic!("nobody's node has gone"),
            }
        }
        assert_eq!(replica.clock, !replica.quiescence.is_still());
    }

    fn activity(&mut self, node: u64) {
        self.with(node, |replica, _, mut act| replica.on_activity(&mut act));
    }

    fn deliver(&mut self, (from, to, message): (u64, u64, Quiesce)) {
        let now = self.now;
        self.with(to, |replica, local, mut act| {
            replica.on_message(now, from, message, local, &mut act);
        });
    }

    fn step(&mut self) {
        let passed = self.dice(40);
        self.now += Duration::from_millis(passed);
        match self.dice(8) {
            0 | 1 => {
                let followers = [2, 3].map(|node| Follower {
                    matched: self.replicas[node as usize - 1].local.last_index,
                    ..follower(node)
                });
                let now = self.now;
                self.with(1, |replica, local, mut act| {
                    replica.on_idle(now, local, &followers, &mut act);
                });
            }
            2 if self.dice(4) == 0 => {
                let node = 1 + self.dice(3);
                self.activity(node);
            }
            3 if self.dice(4) == 0 => {
                // The leader appends, and everybody has it.
                for node in 1..=3 {
                    self.replicas[node as usize - 1].local.last_index += 1;
                    self.activity(node);
                }
            }
            _ if self.network.is_empty() => {}
            _ => {
                let chosen = self.dice(self.network.len() as u64) as usize;
                let message = self.network.remove(chosen).unwrap();
                match self.dice(10) {
                    0 => {}
                    1 => self.network.extend([message, message]),
                    _ => self.deliver(message),
                }
            }
        }
    }
}

/// Whatever is lost, late or doubled: shards come to rest, and as soon as a replica at rest is active, its message brings the
/// leader back.
#[test]
fn replicas_agree_and_wake_in_any_weather() {
    let start = origin();
    let mut stills = 0;
    for seed in 0..2_000 {
        let mut world = World::new(start, seed);
        for _ in 0..200 {
            world.step();
        }
        stills += world.stills;
        let node = 1 + world.dice(3);
        let rested = world.replicas[node as usize - 1].quiescence.is_still();
        world.network.clear();
        world.activity(node);
        while let Some(message) = world.network.pop_front() {
            world.deliver(message);
        }
        assert!(world.replicas[node as usize - 1].clock, "seed {seed}");
        if rested {
            assert!(world.replicas[0].clock, "seed {seed}");
        }
    }
    assert!(stills > 500, "shards do come to rest: {stills} times");
}

#[cfg(test)]
mod clock {
    use super::Instant;

    /// Where the tests' time begins.
    #[allow(clippy::disallowed_methods, reason = "an Instant can be had in no other way")]
    pub(super) fn origin() -> Instant {
        Instant::now()
    }
}
