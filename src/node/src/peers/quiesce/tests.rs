//! The agreement by itself, and three replicas whose messages are lost, late and out of order.

use std::collections::VecDeque;

use super::*;

const PATIENCE: Duration = Duration::from_millis(100);

#[allow(clippy::disallowed_methods, reason = "an Instant can be had in no other way")]
fn origin() -> Instant {
    Instant::now()
}

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

/// A replica with a clock, in a world that loses and delays messages.
struct Replica {
    quiescence: Quiescence,
    local: Local,
    clock: bool,
}

/// Whatever is lost, delayed or doubled: a leader that stands still has followers that stood still when they said so, and as soon
/// as anybody is active, a few messages later the leader runs.
#[test]
fn replicas_agree_and_wake_in_any_weather() {
    let start = origin();
    let mut stills = 0;
    for seed in 0..2_000_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut dice = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut now = start;
        let mut replicas: Vec<Replica> = (1..=3)
            .map(|node| Replica {
                quiescence: Quiescence::new(5, node, PATIENCE),
                local: local(1),
                clock: true,
            })
            .collect();
        let mut network: VecDeque<(u64, u64, Quiesce)> = VecDeque::new();
        for _ in 0..200 {
            now += Duration::from_millis(dice(40));
            let at = dice(3) as usize;
            let mut actions = Vec::new();
            match dice(8) {
                0 | 1 => {
                    let followers: Vec<Follower> = replicas[1..]
                        .iter()
                        .zip(2..)
                        .map(|(replica, node)| Follower {
                            matched: replica.local.last_index,
                            ..follower(node)
                        })
                        .collect();
                    let leader = &mut replicas[0];
                    let local = leader.local;
                    leader
                        .quiescence
                        .on_idle(now, &local, &followers, &mut |action| actions.push((1, action)));
                }
                2 if dice(4) == 0 => {
                    replicas[at]
                        .quiescence
                        .on_activity(&mut |action| actions.push((at as u64 + 1, action)));
                }
                3 if dice(4) == 0 => {
                    // The leader appends, and everybody has it.
                    replicas[0]
                        .quiescence
                        .on_activity(&mut |action| actions.push((1, action)));
                    for (replica, node) in replicas.iter_mut().zip(1..) {
                        replica.local.last_index += 1;
                        replica
                            .quiescence
                            .on_activity(&mut |action| actions.push((node, action)));
                    }
                }
                _ if network.is_empty() => {}
                _ => {
                    let chosen = dice(network.len() as u64) as usize;
                    let (from, to, message) = network.remove(chosen).unwrap();
                    match dice(10) {
                        0 => {}
                        1 => network.extend([(from, to, message), (from, to, message)]),
                        _ => {
                            let replica = &mut replicas[to as usize - 1];
                            let local = replica.local;
                            replica
                                .quiescence
                                .on_message(now, from, message, &local, &mut |action| actions.push((to, action)));
                        }
                    }
                }
            }
            for (node, action) in actions {
                let replica = &mut replicas[node as usize - 1];
                match action {
                    Action::Send(to, message) => network.push_back((node, to, message)),
                    Action::StopClock => {
                        assert!(replica.clock, "stopped twice");
                        replica.clock = false;
                        stills += u64::from(node == 1);
                    }
                    Action::StartClock => {
                        assert!(!replica.clock, "started twice");
                        replica.clock = true;
                    }
                    Action::Campaign => panic!("nobody's node has gone"),
                }
            }
            for replica in &replicas {
                assert_eq!(replica.clock, !replica.quiescence.is_still());
            }
        }
        // In the end somebody is active and messages arrive: the leader runs.
        let mut actions = Vec::new();
        let at = dice(3) as usize;
        let was_still = replicas[at].quiescence.is_still();
        replicas[at].quiescence.on_activity(&mut |action| actions.push(action));
        for action in actions {
            if let Action::Send(to, message) = action {
                let replica = &mut replicas[to as usize - 1];
                let local = replica.local;
                replica
                    .quiescence
                    .on_message(now, at as u64 + 1, message, &local, &mut |_| {});
            }
        }
        if was_still || at == 0 {
            assert!(!replicas[0].quiescence.is_still(), "seed {seed}");
        }
        assert!(!replicas[at].quiescence.is_still(), "seed {seed}");
    }
    assert!(stills > 500, "shards do come to rest: {stills} times");
}
