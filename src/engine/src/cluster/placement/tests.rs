use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use super::layout::without;
use super::*;
use crate::cluster::records::REPLICATION_FACTORS;
use crate::cluster::shares::Share;

pub(in crate::cluster) fn node(id: u64, zone: &str, cores: u16) -> Node {
    let port = 7000 + u16::try_from(id).unwrap();
    Node::new(id, ([127, 0, 0, 1], port).into(), zone, cores, u128::from(id))
}

/// Nodes in up to five zones, of equal or different cores.
fn nodes() -> impl Strategy<Value = Vec<Node>> {
    let cores = prop_oneof![2 => Just(1_u16..2), 1 => Just(1_u16..9)];
    (1..=5_usize, cores).prop_flat_map(|(zones, cores)| {
        vec((0..zones, cores), 1..13).prop_map(|nodes| {
            let names = ["", "a", "b", "c", "d"];
            let numbered = (1..).zip(nodes);
            numbered
                .map(|(id, (zone, cores))| node(id, names[zone], cores))
                .collect()
        })
    })
}

fn replication() -> impl Strategy<Value = u8> {
    prop::sample::select(&REPLICATION_FACTORS[..])
}

fn counts(placed: &[Vec<u64>], nodes: &[Node]) -> BTreeMap<u64, u64> {
    let mut counts: BTreeMap<u64, u64> = nodes.iter().map(|node| (node.id, 0)).collect();
    for id in placed.iter().flatten() {
        *counts.get_mut(id).expect("a node of the cluster") += 1;
    }
    counts
}

/// Most replicas of a shard that the rule allows in a zone, worked out by trying.
fn zone_limit(nodes: &[Node], replication: usize) -> usize {
    let wanted = replication.min(nodes.len());
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for node in nodes {
        *sizes.entry(&node.zone).or_default() += 1;
    }
    let least = (1..=wanted.max(1)).find(|limit| sizes.values().map(|size| size.min(limit)).sum::<usize>() >= wanted);
    least.unwrap().max(replication / 2)
}

fn most_in_a_zone(targets: &[u64], nodes: &[Node]) -> usize {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for node in nodes.iter().filter(|node| targets.contains(&node.id)) {
        *counts.entry(&node.zone).or_default() += 1;
    }
    counts.values().copied().max().unwrap_or(0)
}

/// The fairest sum of squares for one zone and equal cores.
fn even(replicas: u64, nodes: u64) -> (u64, u64) {
    (replicas / nodes, replicas.div_ceil(nodes))
}

proptest! {
    #[test]
    fn every_shard_is_held_as_often_as_it_should_within_the_rule_of_zones(
        nodes in nodes(),
        shards in 0_u16..70,
        replication in replication(),
    ) {
        let placed = place(&nodes, shards, replication);
        prop_assert_eq!(placed.len(), usize::from(shards));
        let limit = zone_limit(&nodes, usize::from(replication));
        for targets in &placed {
            prop_assert_eq!(targets.len(), usize::from(replication).min(nodes.len()));
            prop_assert!(targets.is_sorted_by(|a, b| a < b));
            prop_assert!(most_in_a_zone(targets, &nodes) <= limit, "{targets:?} passes {limit}");
        }
        prop_assert_eq!(place(nodes.iter().rev(), shards, replication), placed, "the order of nodes does not matter");
    }

    #[test]
    fn shares_are_even_where_zones_do_not_matter(
        count in 1_u64..13,
        zoned in any::<bool>(),
        shards in 0_u16..70,
        replication in replication(),
    ) {
        // All in one zone, or each in its own.
        let zone = |id: u64| if zoned { id.to_string() } else { String::new() };
        let nodes: Vec<Node> = (1..=count).map(|id| node(id, &zone(id), 2)).collect();
        let placed = place(&nodes, shards, replication);
        let replicas = placed.iter().map(|targets| targets.len() as u64).sum();
        let (least, most) = even(replicas, count);
        for (id, held) in counts(&placed, &nodes) {
            prop_assert!((least..=most).contains(&held), "node {id} holds {held}");
        }
    }

    #[test]
    fn shares_are_even_over_zones_of_one_size(size in 1_u64..4, zones in 3_u64..6, shards in 0_u16..70, replication in replication()) {
        let nodes: Vec<Node> = (1..=size * zones).map(|id| node(id, &(id % zones).to_string(), 1)).collect();
        let placed = place(&nodes, shards, replication);
        let replicas = placed.iter().map(|targets| targets.len() as u64).sum();
        let (least, most) = even(replicas, nodes.len() as u64);
        for (id, held) in counts(&placed, &nodes) {
            prop_assert!((least..=most).contains(&held), "node {id} holds {held}");
        }
    }

    /// No single replica could go from one node to another and make it fairer.
    #[test]
    fn shares_are_fair_by_cores(nodes in nodes(), shards in 0_u16..70, replication in replication()) {
        let placed = place(&nodes, shards, replication);
        let counts = counts(&placed, &nodes);
        let limit = zone_limit(&nodes, usize::from(replication));
        for from in &nodes {
            for to in &nodes {
                let share = |node: &Node| Share { count: counts[&node.id], weight: u64::from(node.cores) };
                if !share(from).should_give_to(share(to)) {
                    continue;
                }
                for targets in placed.iter().filter(|held| held.contains(&from.id) && !held.contains(&to.id)) {
                    let mut after = without(targets, from.id);
                    after.push(to.id);
                    prop_assert!(most_in_a_zone(&after, &nodes) > limit, "{targets:?}: {} should go to {}", from.id, to.id);
                }
            }
        }
    }

    #[test]
    fn a_node_that_joins_takes_its_share_and_nothing_else_moves(
        count in 3_u64..12,
        shards in 1_u16..70,
        replication in replication(),
    ) {
        let nodes: Vec<Node> = (1..=count + 1).map(|id| node(id, "", 1)).collect();
        let placed = place(&nodes[..count as usize], shards, replication);
        let mut layout = Layout::new(&nodes, usize::from(replication));
        if layout.wanted() > placed[0].len() {
            return Ok(());
        }
        for (shard, targets) in (0..).zip(&placed) {
            layout.set(shard, targets);
        }
        let mut moves = 0;
        while let Some(path) = layout.fairer(|_| true, |_| true) {
            for step in path {
                prop_assert_eq!(step.to, count + 1);
                layout.relocate(step);
                moves += 1;
            }
        }
        let replicas = u64::from(shards) * u64::from(replication);
        prop_assert_eq!(moves, layout.shares()[&(count + 1)].count);
        prop_assert_eq!(moves, replicas / (count + 1), "its share, rounded down");
    }

    #[test]
    fn founding_records_are_whole(nodes in nodes(), shards in 1_u16..40, replication in replication()) {
        let config = Config::new("test", 1, shards, replication);
        let mut cluster = crate::cluster::Cluster::new();
        for (version, record) in (1..).zip(found(&config, &nodes, 4).unwrap()) {
            let key = crate::cluster::records::key_of(record.key());
            cluster.apply(&key, &record.encode().unwrap(), version).unwrap();
        }
        prop_assert_eq!(cluster.nodes().cloned().collect::<Vec<_>>(), nodes.clone());
        prop_assert_eq!(cluster.shards().count(), usize::from(shards));
        let homes: Vec<Option<u64>> = cluster.shards().map(|shard| shard.home).collect();
        prop_assert_eq!(homes, crate::cluster::leaders::homes(&cluster));
        let controller = &cluster.controller().unwrap().targets;
        prop_assert_eq!(controller.len(), controller_size(nodes.len()));
        prop_assert!(most_in_a_zone(controller, &nodes) <= zone_limit(&nodes, controller.len()));
    }
}

#[test]
fn with_few_nodes_all_hold_everything() {
    for count in 1..=5 {
        let nodes: Vec<Node> = (1..=count).map(|id| node(id, "", 1)).collect();
        let all: Vec<u64> = (1..=count).collect();
        assert_eq!(place(&nodes, 4, 5), vec![all; 4]);
    }
}

#[test]
fn different_shards_have_different_company() {
    let nodes: Vec<Node> = (1..=9).map(|id| node(id, "", 1)).collect();
    let companies: BTreeSet<Vec<u64>> = place(&nodes, 64, 3).into_iter().collect();
    assert!(companies.len() > 32, "{} of 84 sets of nodes", companies.len());
}

#[test]
fn twice_the_cores_hold_twice_as_much() {
    let nodes = [1, 1, 2, 2, 4].map(|cores: u16| cores);
    let nodes: Vec<Node> = (1..).zip(nodes).map(|(id, cores)| node(id, "", cores)).collect();
    let placed = place(&nodes, 100, 1);
    assert_eq!(
        counts(&placed, &nodes).into_values().collect::<Vec<_>>(),
        [10, 10, 20, 20, 40]
    );
}
