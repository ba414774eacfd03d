//! Nodes that come and go while keys are written: added, drained, decommissioned, dead and replaced.

use serde_json::Value;

use crate::load::{Load, assert_all_there};
use crate::processes::{Cluster, wait_until};

/// What a command that must succeed prints.
fn run(cluster: &Cluster, arguments: &[&str]) -> Value {
    let mut command = cluster.command();
    let (option, value) = match arguments[0] {
        "dev" => ("--data", cluster.data()),
        _ => ("--config", cluster.config()),
    };
    let output = command
        .args(arguments)
        .arg("--json")
        .arg(option)
        .arg(value)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {output:?}: {}",
        cluster.errors()
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The exit code and what a command says on standard error.
fn refused(cluster: &Cluster, arguments: &[&str]) -> String {
    let mut command = cluster.command();
    let output = command
        .args(arguments)
        .arg("--config")
        .arg(cluster.config())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Replicas and leaderships of a node.
fn share(status: &Value, node: usize) -> (u64, u64) {
    let nodes = status["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|other| other["id"] == node);
    node.map_or((0, 0), |node| {
        (node["replicas"].as_u64().unwrap(), node["leads"].as_u64().unwrap())
    })
}

#[test]
fn nodes_come_and_go_and_no_acknowledged_write_is_lost() {
    let cluster = Cluster::start(&["--nodes", "3", "--shards", "4"]);
    let load = Load::start(cluster.config(), "moving");
    load.wait_for_more(100);
    assert_eq!(run(&cluster, &["dev", "add-node"])["id"], 4);
    wait_until("replicas on the fourth node", || {
        let status = run(&cluster, &["cluster", "status"]);
        let shares: Vec<(u64, u64)> = (1..=4).map(|node| share(&status, node)).collect();
        shares.iter().all(|(held, led)| *held == 3 && *led == 1)
    });
    run(&cluster, &["cluster", "drain", "1", "--wait", "60s"]);
    assert_eq!(share(&run(&cluster, &["cluster", "status"]), 1), (3, 0));
    run(&cluster, &["cluster", "resume", "1"]);
    load.wait_for_more(100);
    run(&cluster, &["cluster", "decommission", "2", "--wait", "2m"]);
    let status = run(&cluster, &["cluster", "status"]);
    assert_eq!(share(&status, 2), (0, 0), "{status}");
    let message = refused(&cluster, &["cluster", "decommission", "3"]);
    assert!(message.contains("replication"), "{message}");
    load.wait_for_more(100);
    let keys = load.finish();
    assert_all_there(&cluster.config(), &keys);
}

#[test]
fn a_clusters_settings_are_looked_at_and_changed() {
    let cluster = Cluster::start(&["--nodes", "1", "--shards", "1"]);
    assert_eq!(run(&cluster, &["cluster", "config", "get"])["replication"], "3");
    run(&cluster, &["cluster", "config", "set", "replace-after", "90s"]);
    assert_eq!(
        run(&cluster, &["cluster", "config", "get", "replace_after"])["replace_after"],
        "90000ms"
    );
    for (name, value, part) in [
        ("replication", "4", "1, 3 or 5"),
        ("replicas", "3", "replication"),
        ("shards", "8", "shards"),
    ] {
        let message = refused(&cluster, &["cluster", "config", "set", name, value]);
        assert!(message.contains(part), "{message}");
    }
    let message = refused(&cluster, &["cluster", "drain", "1"]);
    assert!(message.contains("last"), "{message}");
    let message = refused(&cluster, &["cluster", "init"]);
    assert!(message.contains("join"), "{message}");
    let message = refused(&cluster, &["cluster", "drain", "9"]);
    assert!(message.contains("no node 9"), "{message}");
}
