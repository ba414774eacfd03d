//! Nodes that die, freeze, come back and have wrong clocks; links that are cut: each fault by itself.

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use common::*;
use generation_node::env::Env;
use generation_proto::{Operation, RequestOptions};
use generation_sim::{Ambush, Host, Kill, NodeSetup, Sim, Strike, Weather};

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_killed_node_answers_nothing_and_a_started_one_is_empty() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    put(&mut sim, lane, b"k", b"v");
    sim.kill(0, Kill::Process);
    assert!(!sim.is_up(0));
    let lost = send(&mut sim, lane, Operation::Get { key: b"k" }, RequestOptions::default());
    sim.run_for(500 * MS);
    assert!(sim.clients[lane.client].response(lane.key, lost).is_none());
    sim.start(0);
    assert_eq!(sim.starts(0), 2);
    let again = common::lane(&mut sim, lane.client, 0);
    assert_eq!(get(&mut sim, again, b"k"), None);
    assert_eq!(sim.counters().kills, 1);
}

#[test]
fn a_frozen_node_goes_on_where_it_was() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    put(&mut sim, lane, b"k", b"v");
    sim.freeze(0, false);
    let id = send(&mut sim, lane, Operation::Get { key: b"k" }, RequestOptions::default());
    sim.run_for(500 * MS);
    assert!(sim.clients[lane.client].response(lane.key, id).is_none());
    sim.thaw(0);
    assert_eq!(&wait(&mut sim, lane, id).body[..], b"v");
}

#[test]
fn a_frozen_machines_clock_stands_still_only_where_asked() {
    for stops in [false, true] {
        let mut sim = Sim::new(1, Weather::default());
        let node = sim.bare_node(1);
        let env = sim.env(node, 0);
        let begin = env.now();
        sim.freeze(node, stops);
        sim.run_for(500 * MS);
        sim.thaw(node);
        assert_eq!(env.now() - begin, if stops { Duration::ZERO } else { 500 * MS });
        // A deadline is on the node's clock.
        let woken = Rc::new(RefCell::new(None));
        let (slot, of_task) = (Rc::clone(&woken), env.clone());
        sim.spawn(node, async move {
            of_task.sleep_until(begin + 600 * MS).await;
            *slot.borrow_mut() = Some(of_task.now());
        });
        sim.until(|_| woken.borrow_mut().take());
        let expected = if stops { 1_100 * MS } else { 600 * MS };
        assert!(
            sim.elapsed() >= expected && sim.elapsed() < expected + MS,
            "{:?}",
            sim.elapsed()
        );
    }
}

#[test]
fn drift_and_jumps_are_one_nodes_own() {
    let mut sim = Sim::new(1, Weather::default());
    let (one, other) = (sim.bare_node(1), sim.bare_node(1));
    let (one_env, other_env) = (sim.env(one, 0), sim.env(other, 0));
    let (begin, wall) = (one_env.now(), one_env.unix_ms());
    sim.set_drift(one, 50_000);
    sim.step_clock(other, -5_000);
    sim.run_for(1_000 * MS);
    assert_eq!(one_env.now() - begin, 1_050 * MS);
    assert_eq!(one_env.unix_ms() - wall, 1_050);
    assert_eq!(other_env.now() - begin, 1_000 * MS);
    assert_eq!(other_env.unix_ms() + 4_000, wall);
}

#[test]
fn a_cut_link_carries_nothing_in_its_direction_until_it_is_mended() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    let (node, client) = ([Host::Node(0)], [Host::Client(lane.client)]);
    for requests_are_cut in [true, false] {
        // Acknowledgements of what was before are not on their way any more.
        sim.run_for(500 * MS);
        if requests_are_cut {
            sim.cut(&client, &node);
        } else {
            sim.cut(&node, &client);
        }
        let requests = sim.datagrams_received(0);
        let id = send(
            &mut sim,
            lane,
            Operation::Ping { payload: b"x" },
            RequestOptions::default(),
        );
        sim.run_for(300 * MS);
        assert!(sim.clients[lane.client].response(lane.key, id).is_none());
        assert_eq!(sim.datagrams_received(0) > requests, !requests_are_cut);
        sim.heal();
        assert_eq!(&wait(&mut sim, lane, id).body[..], b"x");
    }
    // A slow link is slow one way.
    sim.slow_link(&node, &client, 70 * MS);
    let before = sim.elapsed();
    call(&mut sim, lane, Operation::Ping { payload: b"y" });
    let took = sim.elapsed().saturating_sub(before);
    assert!(took >= 70 * MS && took < 75 * MS, "{took:?}");
}

/// Passes `before`, then `after`, and notes each.
fn spawn_passer(sim: &mut Sim, node: usize) -> Rc<RefCell<Vec<&'static str>>> {
    let passed = Rc::new(RefCell::new(Vec::new()));
    let (env, log) = (sim.env(node, 0), Rc::clone(&passed));
    sim.spawn(node, async move {
        for point in ["before", "after"] {
            env.point(point);
            log.borrow_mut().push(point);
            env.yield_now().await;
        }
    });
    passed
}

#[test]
fn an_ambush_kills_at_its_point_and_nothing_after_it_runs() {
    let mut sim = Sim::new(1, Weather::default());
    let node = sim.bare_node(1);
    sim.ambush(Ambush {
        node: Some(node),
        point: Some("after".to_owned()),
        skip: 0,
        strike: Strike::Kill(Kill::Power),
    });
    let passed = spawn_passer(&mut sim, node);
    sim.run_for(MS);
    assert_eq!(*passed.borrow(), ["before"]);
    assert!(!sim.is_up(node));
    assert_eq!((sim.counters().ambushes, sim.points_passed()["after"]), (1, 1));
    // It strikes once; a node that is started passes.
    sim.start(node);
    let passed = spawn_passer(&mut sim, node);
    sim.run_for(MS);
    assert_eq!(*passed.borrow(), ["before", "after"]);
}

#[test]
fn an_ambush_freezes_at_the_end_of_the_step() {
    let mut sim = Sim::new(1, Weather::default());
    let node = sim.bare_node(1);
    sim.ambush(Ambush {
        node: None,
        point: None,
        skip: 0,
        strike: Strike::Freeze,
    });
    let passed = spawn_passer(&mut sim, node);
    sim.run_for(MS);
    assert_eq!(*passed.borrow(), ["before"]);
    assert!(sim.is_frozen(node));
    sim.thaw(node);
    sim.run_for(MS);
    assert_eq!(*passed.borrow(), ["before", "after"]);
}
