use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::cluster::placement::place;
use crate::cluster::placement::tests::node;
use crate::cluster::records::{Config, Node, Record, Shard, key_of};

/// A cluster of these nodes, its shards on these targets.
fn cluster(nodes: &[Node], replication: u8, placed: &[Vec<u64>]) -> Cluster {
    let mut cluster = Cluster::new();
    let mut records = vec![Record::Config(Config::new("test", 1, placed.len() as u16, replication))];
    records.extend(nodes.iter().cloned().map(Record::Node));
    let shards = (0..)
        .zip(placed)
        .map(|(number, targets)| Shard::new(number, 1, targets.iter().copied()));
    records.extend(shards.map(Record::Shard));
    for record in records {
        put(&mut cluster, &record);
    }
    cluster
}

fn put(cluster: &mut Cluster, record: &Record) {
    let version = cluster.version() + 1;
    cluster
        .apply(&key_of(record.key()), &record.encode().unwrap(), version)
        .unwrap();
}

fn equals(count: u64) -> Vec<Node> {
    (1..=count).map(|id| node(id, "", 1)).collect()
}

fn led(leaders: &[Option<u64>], nodes: impl IntoIterator<Item = u64>) -> BTreeMap<u64, u64> {
    let mut led: BTreeMap<u64, u64> = nodes.into_iter().map(|id| (id, 0)).collect();
    for leader in leaders.iter().flatten() {
        *led.get_mut(leader).expect("a fit node") += 1;
    }
    led
}

fn spread(led: &BTreeMap<u64, u64>) -> u64 {
    led.values().max().unwrap_or(&0) - led.values().min().unwrap_or(&0)
}

/// Sum of squares of how many each leads, the less the fairer, and the least there is, by trying all.
fn fairest(options: &[Vec<u64>], taken: &mut BTreeMap<u64, u64>) -> u64 {
    let Some((first, rest)) = options.split_first() else {
        return taken.values().map(|count| count * count).sum();
    };
    if first.is_empty() {
        return fairest(rest, taken);
    }
    let tries = first.iter().map(|option| {
        *taken.entry(*option).or_default() += 1;
        let sum = fairest(rest, taken);
        *taken.get_mut(option).unwrap() -= 1;
        sum
    });
    tries.min().unwrap()
}

/// The rule of clusters in which all nodes hold everything: founders take turns, and the shards of those that are not fit are dealt out.
fn turns(shards: u16, nodes: &[u64], fit: &BTreeSet<u64>) -> Vec<Option<u64>> {
    let founders: Vec<u64> = (0..shards)
        .map(|shard| nodes[usize::from(shard) % nodes.len()])
        .collect();
    let mut led: BTreeMap<u64, usize> = fit.iter().map(|id| (*id, 0)).collect();
    for founder in &founders {
        led.entry(*founder).and_modify(|count| *count += 1);
    }
    let leaders = founders.into_iter().map(|founder| {
        if fit.contains(&founder) {
            return Some(founder);
        }
        let (node, count) = led.iter_mut().min_by_key(|(node, count)| (**count, **node))?;
        *count += 1;
        Some(*node)
    });
    leaders.collect()
}

#[test]
fn where_all_hold_everything_founders_take_turns() {
    for (count, replication) in [(1, 1), (1, 3), (2, 3), (3, 3), (3, 5), (4, 5), (5, 5)] {
        let ids: Vec<u64> = (1..=count).collect();
        for shards in [1_u16, 2, 4, 16, 64] {
            let cluster = cluster(&equals(count), replication, &vec![ids.clone(); usize::from(shards)]);
            for set in 0..1_u32 << count {
                let fit: BTreeSet<u64> = ids.iter().copied().filter(|id| set >> (id - 1) & 1 == 1).collect();
                let leaders = leaders(&cluster, &fit);
                assert_eq!(
                    leaders,
                    turns(shards, &ids, &fit),
                    "{shards} shards, {fit:?} of {ids:?} fit"
                );
                assert!(spread(&led(&leaders, fit)) <= 1);
            }
        }
    }
}

proptest! {
    #[test]
    fn only_fit_targets_lead_and_no_distribution_is_fairer(
        options in vec(btree_set(1_u64..5, 0..4), 1..7),
        fit in btree_set(1_u64..5, 0..5),
    ) {
        let placed: Vec<Vec<u64>> = options.into_iter().map(|targets| targets.into_iter().collect()).collect();
        let cluster = cluster(&equals(4), 3, &placed);
        let leaders = leaders(&cluster, &fit);
        let mut options = placed;
        for (leader, targets) in leaders.iter().zip(&mut options) {
            targets.retain(|target| fit.contains(target));
            prop_assert_eq!(leader.is_some(), !targets.is_empty());
            prop_assert!(leader.is_none_or(|leader| targets.contains(&leader)));
        }
        let sum: u64 = led(&leaders, fit).values().map(|count| count * count).sum();
        prop_assert_eq!(sum, fairest(&options, &mut BTreeMap::new()));
    }

    #[test]
    fn a_node_that_falls_out_moves_its_own_shards_alone_unless_that_is_less_fair(
        options in vec(btree_set(1_u64..5, 1..4), 1..7),
        fit in btree_set(1_u64..5, 1..5),
    ) {
        let placed: Vec<Vec<u64>> = options.into_iter().map(|targets| targets.into_iter().collect()).collect();
        let cluster = cluster(&equals(4), 3, &placed);
        let homes = leaders(&cluster, &(1..5).collect());
        let after = leaders(&cluster, &fit);
        let is_home_fit = |home: &Option<u64>| home.is_some_and(|home| fit.contains(&home));
        let displaced = homes.iter().zip(&after).any(|(home, now)| is_home_fit(home) && home != now);
        // What is fairest where fit homes stay, against what is fairest at all.
        let kept = placed.iter().zip(&homes).map(|(targets, home)| {
            let fit = targets.iter().copied().filter(|target| fit.contains(target));
            if is_home_fit(home) { home.iter().copied().collect() } else { fit.collect() }
        });
        let at_all: Vec<Vec<u64>> = placed
            .iter()
            .map(|targets| targets.iter().copied().filter(|target| fit.contains(target)).collect())
            .collect();
        let kept = fairest(&kept.collect::<Vec<_>>(), &mut BTreeMap::new());
        let best = fairest(&at_all, &mut BTreeMap::new());
        prop_assert_eq!(displaced, kept > best);
    }

    #[test]
    fn leaders_of_placed_shards_are_even(count in 1_u64..12, shards in 1_u16..130, replication in prop::sample::select(vec![3_u8, 5])) {
        let nodes = equals(count);
        let cluster = cluster(&nodes, replication, &place(&nodes, shards, replication));
        let fit: BTreeSet<u64> = (1..=count).collect();
        let leaders = leaders(&cluster, &fit);
        prop_assert!(spread(&led(&leaders, fit)) <= 1, "{leaders:?}");
    }

    #[test]
    fn nodes_that_drain_or_leave_lead_nothing(shards in 1_u16..40, state in prop::sample::select(&NodeState::ALL[1..])) {
        let nodes = equals(4);
        let mut cluster = cluster(&nodes, 3, &place(&nodes, shards, 3));
        let mut out = nodes[1].clone();
        out.state = state;
        put(&mut cluster, &Record::Node(out));
        let leaders = leaders(&cluster, &(1..5).collect());
        prop_assert!(leaders.iter().all(|leader| leader.is_some_and(|leader| leader != 2)));
    }

    #[test]
    fn exchanges_for_load_change_no_counts_and_end(
        loads in vec(0_u8..6, 1..40),
        count in 3_u64..7,
        fit in btree_set(1_u64..7, 1..7),
    ) {
        let nodes = equals(count);
        let placed = place(&nodes, loads.len() as u16, 3);
        let plain = cluster(&nodes, 3, &placed);
        let mut loaded = plain.clone();
        for (number, load) in (0..).zip(&loads) {
            let mut shard = loaded.shard(number).unwrap().clone();
            shard.load = *load;
            put(&mut loaded, &Record::Shard(shard));
        }
        let fit: BTreeSet<u64> = fit.into_iter().filter(|id| *id <= count).collect();
        let (before, after) = (leaders(&plain, &fit), leaders(&loaded, &fit));
        let sum = |leaders: &[Option<u64>]| led(leaders, fit.iter().copied()).values().map(|count| count * count).sum::<u64>();
        prop_assert_eq!(sum(&before), sum(&after));
        for (number, leader) in (0..).zip(&after) {
            let targets = &loaded.shard(number).unwrap().targets;
            prop_assert_eq!(leader.is_some(), targets.iter().any(|target| fit.contains(target)));
            prop_assert!(leader.is_none_or(|leader| targets.contains(&leader) && fit.contains(&leader)));
        }
    }

    /// No ping-pong: whatever a rate does within a factor of two, its step is changed once at most, so leaders move once at most.
    #[test]
    fn rates_that_wander_within_a_factor_of_two_move_nothing(
        bases in vec(1_u64..10_000_000, 4..20),
        wander in vec(vec(1000_u64..1990, 20), 12),
    ) {
        let nodes = equals(4);
        let mut cluster = cluster(&nodes, 3, &place(&nodes, bases.len() as u16, 3));
        let fit = (1..5).collect();
        let mut changes = vec![0; bases.len()];
        let mut outcomes = Vec::new();
        for factors in &wander {
            for (number, base) in bases.iter().enumerate() {
                let mut shard = cluster.shard(number as u16).unwrap().clone();
                let step = load_step(shard.load, base * factors[number] / 1000);
                if step != shard.load {
                    shard.load = step;
                    changes[number] += 1;
                    put(&mut cluster, &Record::Shard(shard));
                }
            }
            outcomes.push(leaders(&cluster, &fit));
        }
        prop_assert!(changes.iter().all(|changes| *changes <= 1), "{changes:?}");
        outcomes.dedup();
        prop_assert!(outcomes.len() <= 1 + changes.iter().sum::<usize>());
    }

    #[test]
    fn a_step_stands_for_its_rates(current in 0_u8..20, rate in any::<u64>()) {
        let step = load_step(current, rate);
        prop_assert_eq!(load_step(step, rate), step, "it stays");
        prop_assert!(step <= MAX_LOAD);
    }
}

#[test]
fn busy_shards_are_spread() {
    let nodes = equals(4);
    let mut cluster = cluster(&nodes, 5, &vec![vec![1, 2, 3, 4]; 16]);
    let fit = (1..5).collect();
    // All busy shards are at home on node 1.
    for number in [0, 4, 8, 12] {
        let mut shard = cluster.shard(number).unwrap().clone();
        shard.load = 4;
        put(&mut cluster, &Record::Shard(shard));
    }
    let leaders = leaders(&cluster, &fit);
    let busy: BTreeSet<u64> = [0, 4, 8, 12]
        .into_iter()
        .filter_map(|number: usize| leaders[number])
        .collect();
    assert_eq!(busy.len(), 4, "{leaders:?}");
    assert_eq!(spread(&led(&leaders, fit)), 0);
}

/// Has the records say where homes are.
fn settle(cluster: &mut Cluster) {
    for (number, home) in (0..).zip(homes(cluster)) {
        let mut shard = cluster.shard(number).unwrap().clone();
        shard.home = home;
        put(cluster, &Record::Shard(shard));
    }
}

#[test]
fn a_node_that_joins_a_larger_cluster_moves_few_leaders() {
    let nodes = equals(11);
    let placed = place(&nodes[..10], 128, 3);
    let mut cluster = cluster(&nodes[..10], 3, &placed);
    settle(&mut cluster);
    let mut before = homes(&cluster);
    put(&mut cluster, &Record::Node(nodes[10].clone()));
    assert_eq!(homes(&cluster), before, "it holds nothing yet");
    // It takes its share, a shard at a time, from whoever comes first.
    let mut moved = 0;
    for number in 0..35 {
        let mut shard = cluster.shard(number).unwrap().clone();
        shard.targets.remove(usize::from(number) % 3);
        shard.targets.push(11);
        put(&mut cluster, &Record::Shard(shard));
        let after = homes(&cluster);
        moved += before
            .iter()
            .zip(&after)
            .filter(|(before, after)| before != after)
            .count();
        before = after;
        settle(&mut cluster);
        assert_eq!(homes(&cluster), before, "what is written down is what is");
    }
    let led = led(&before, 1..12);
    assert!(spread(&led) <= 1, "{led:?}");
    // Those it leads in the end, those whose leader was taken their replica, and now and then one more to make it even.
    assert!(
        moved <= 3 * 12,
        "{moved} leaders moved where the new node leads {}",
        led[&11]
    );
}

#[test]
fn more_cores_lead_more() {
    let nodes: Vec<Node> = [(1, 1), (2, 1), (3, 2)].map(|(id, cores)| node(id, "", cores)).to_vec();
    let cluster = cluster(&nodes, 3, &vec![vec![1, 2, 3]; 16]);
    let leaders = leaders(&cluster, &(1..4).collect());
    assert_eq!(led(&leaders, 1..4).into_values().collect::<Vec<_>>(), [4, 4, 8]);
}

#[test]
fn nothing_is_led_before_there_are_records() {
    assert_eq!(leaders(&Cluster::new(), &BTreeSet::new()), Vec::new());
    let mut empty = Cluster::new();
    put(&mut empty, &Record::Config(Config::new("test", 1, 2, 3)));
    assert_eq!(leaders(&empty, &BTreeSet::from([1])), [None, None]);
}
