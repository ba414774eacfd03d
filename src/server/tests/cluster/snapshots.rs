//! Snapshots that an administrator asks for.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use crate::load::Load;
use crate::processes::{Cluster, wait_until};

/// Runs `generation snapshot now --json`: exit code, what each line says, standard error.
fn now(cluster: &Cluster, config: &str, options: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let mut command = cluster.command();
    let output = command
        .args(["snapshot", "now", "--json", "--config"])
        .arg(cluster.data().join(config))
        .args(options)
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
    (
        output.status.code(),
        lines.collect(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn number(value: &Value) -> u64 {
    value.as_str().unwrap().parse().unwrap()
}

#[test]
fn every_node_writes_a_snapshot_of_every_shard_when_an_administrator_asks() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "2", "--cores", "2"]);
    cluster.wait_until_alike(3);
    let load = Load::start(cluster.config(), "now");
    load.wait_for_more(300);
    let (code, taken, errors) = now(&cluster, "client.toml", &[]);
    load.finish();
    assert_eq!(code, Some(0), "{errors}");
    let of: BTreeSet<(u64, u64)> = taken
        .iter()
        .map(|line| (line["node"].as_u64().unwrap(), line["shard"].as_u64().unwrap()))
        .collect();
    let all = (1..=3).flat_map(|node| [(node, 0), (node, 1)]).collect();
    assert_eq!(of, all);
    for line in &taken {
        let (node, shard) = (line["node"].as_u64().unwrap(), line["shard"].as_u64().unwrap());
        assert!(number(&line["index"]) > 0, "{line}");
        wait_until("the snapshot in status", || {
            let replica = cluster.replica(shard as usize, node as usize).unwrap();
            number(&replica["snapshot"]) >= number(&line["index"])
        });
    }
    let mut verify = cluster.command();
    let verified = verify
        .args(["snapshot", "verify", "--json"])
        .arg(cluster.data())
        .output()
        .unwrap();
    assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    // An older one may be on its way out.
    assert!(String::from_utf8(verified.stdout).unwrap().lines().count() >= 6);

    let (code, taken, errors) = now(&cluster, "client.toml", &["--shard", "1"]);
    assert_eq!((code, taken.len()), (Some(0), 3), "{errors}");
    let (code, _, errors) = now(&cluster, "client.toml", &["--shard", "2"]);
    assert_eq!(code, Some(2), "{errors}");

    // Whoever may only read and write data may not.
    let certs = cluster.data().join("certs");
    let mut sign = cluster.command();
    let signed = sign
        .args(["certs", "client", "web", "--out"])
        .arg(&certs)
        .output()
        .unwrap();
    assert!(signed.status.success(), "{signed:?}");
    let config = fs::read_to_string(cluster.config()).unwrap();
    let config = config.replace("certs/client.", "certs/client-web.");
    fs::write(cluster.data().join("web.toml"), config).unwrap();
    let (code, taken, errors) = now(&cluster, "web.toml", &[]);
    assert_eq!((code, taken.len()), (Some(1), 0), "{errors}");
    assert!(
        errors.contains("permission_denied") && errors.contains("administrator"),
        "{errors}"
    );
    cluster.stop();
}
