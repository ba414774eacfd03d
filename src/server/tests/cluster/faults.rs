//! Nodes that are killed under load.

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use crate::load::{Load, assert_all_there};
use crate::processes::{Cluster, wait_until};

/// Writes between one fault and the next.
const SOME: usize = 300;

#[test]
fn what_was_acknowledged_survives_the_death_of_a_leader_and_of_a_follower() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "4"]);
    let load = Load::start(cluster.config(), "life");
    load.wait_for_more(SOME);
    let leader = cluster.leader(0);
    cluster.kill(&[leader]);
    load.wait_for_more(SOME);
    let heir = cluster.leader(0);
    cluster.restart_well(leader);
    load.wait_for_more(SOME);
    let follower = (1..=3)
        .find(|node| *node != cluster.leader(0) && *node != heir)
        .unwrap_or(leader);
    // A majority has to have what the first one missed.
    wait_until("the first one to catch up", || {
        let replica = cluster.replica(0, leader);
        replica.is_some_and(|replica| {
            replica["lag"]
                .as_str()
                .is_some_and(|lag| lag.parse::<u64>().unwrap() < 64)
        })
    });
    cluster.kill(&[follower]);
    load.wait_for_more(SOME);
    cluster.restart_well(follower);
    load.wait_for_more(SOME);
    // Both are back, and lead again what they led, while writes go on.
    cluster.wait_until_founders_lead(3);
    load.wait_for_more(SOME);
    let keys = load.finish();
    assert_all_there(&cluster.config(), &keys);
    cluster.wait_until_alike(3);
    cluster.stop();
}

#[test]
fn what_was_acknowledged_survives_the_death_of_all_nodes_at_once() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "4"]);
    let load = Load::start(cluster.config(), "all");
    load.wait_for_more(SOME);
    cluster.kill(&[1, 2, 3]);
    cluster.wait_for_end();
    let keys = load.finish();
    cluster.start_again();
    assert_all_there(&cluster.config(), &keys);
    cluster.wait_until_alike(3);
    cluster.stop();
}

#[test]
fn wiped_nodes_come_back_under_new_replica_ids_until_no_disk_is_from_the_beginning() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "2"]);
    let load = Load::start(cluster.config(), "wiped");
    load.wait_for_more(SOME);
    // The one that founded shards first, and last one that has been sent everything by nodes that were wiped themselves.
    for id in [1, 2, 3] {
        wait_until("replicas on the node", || {
            (0..2).all(|shard| cluster.replica(shard, id).is_some())
        });
        let before: Vec<_> = (0..2)
            .map(|shard| cluster.replica(shard, id).unwrap()["id"].clone())
            .collect();
        cluster.kill(&[id]);
        load.wait_for_more(SOME);
        fs::remove_dir_all(cluster.node(id)).unwrap();
        cluster.restart_well(id);
        wait_until("other replicas on the node", || {
            (0..2).all(|shard| {
                let replica = cluster.replica(shard, id);
                replica.is_some_and(|replica| replica["id"] != before[shard] && replica["applied"].is_string())
            })
        });
        load.wait_for_more(SOME);
    }
    let keys = load.finish();
    cluster.wait_until_alike(3);
    // With node 1 gone, node 2 is needed for every majority.
    cluster.kill(&[1]);
    assert_all_there(&cluster.config(), &keys);
    cluster.restart_well(1);
    cluster.wait_until_alike(3);
    cluster.stop();
}

#[test]
fn an_import_that_writes_exactly_once_goes_on_when_a_leader_dies() {
    const LINES: usize = 60_000;
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "2"]);
    cluster.wait_until_alike(3);
    let mut import = cluster.command();
    import
        .args([
            "kv",
            "import",
            "-",
            "--exactly-once",
            "--timeout",
            "30s",
            "--json",
            "--config",
        ])
        .arg(cluster.config())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut import = import.spawn().unwrap();
    let mut stdin = import.stdin.take().unwrap();
    let line = |number: usize| format!("{{\"key\":\"line-{number}\",\"value\":\"value of line-{number}\"}}\n");
    let leader = cluster.leader(0);
    for number in 0..LINES {
        // A pipe takes no more than is read at the other end, so most is still to come.
        if number == LINES / 2 {
            cluster.kill(&[leader]);
        }
        stdin.write_all(line(number).as_bytes()).unwrap();
    }
    drop(stdin);
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&summary["imported"], &summary["in_doubt"]),
        (&LINES.into(), &0.into()),
        "{summary}"
    );
    let keys: Vec<String> = (0..LINES).step_by(7).map(|number| format!("line-{number}")).collect();
    assert_all_there(&cluster.config(), &keys);
    cluster.restart_well(leader);
    cluster.wait_until_alike(3);
    cluster.stop();
}

#[test]
fn in_memory_a_minority_may_die_and_comes_back_with_what_the_others_have() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "2", "--durability", "memory"]);
    let load = Load::start(cluster.config(), "memory");
    load.wait_for_more(SOME);
    wait_until("a replica on node 3", || cluster.replica(0, 3).is_some());
    let before = cluster.replica(0, 3).unwrap()["id"].clone();
    cluster.kill(&[3]);
    load.wait_for_more(SOME);
    cluster.restart_well(3);
    wait_until("another replica on node 3", || {
        let replica = cluster.replica(0, 3);
        replica.is_some_and(|replica| replica["id"] != before && replica["applied"].is_string())
    });
    let keys = load.finish();
    cluster.wait_until_alike(3);
    cluster.kill(&[1]);
    assert_all_there(&cluster.config(), &keys);
    cluster.stop();
}
