//! Directories that must not be served from, and files that are damaged.

use std::fs;
use std::path::{Path, PathBuf};

use crate::load::{Load, assert_all_there};
use crate::processes::{Cluster, Serving, flip, wait_until};

/// Where a journal's identity has its version and its checksum, in bytes.
const VERSION_AT: usize = 8;
const CHECKSUM_AT: usize = 12;

/// `generation serve` by a node's own configuration, which must end by itself: its exit code and what it said.
fn serve(cluster: &Cluster, config: &str) -> (i32, String) {
    let mut command = cluster.command();
    let output = command
        .args(["serve", "--config"])
        .arg(cluster.data().join(config))
        .output()
        .unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Replaces a text in the configuration of node 1, which must be there.
fn reconfigure(cluster: &Cluster, from: &str, to: &str) {
    let path = cluster.data().join("node-1.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// Has node 1 begin anew in another directory, with a journal so small that a snapshot is due soon.
pub(crate) fn with_small_journal(cluster: &Cluster, directory: &str, journal: &str) {
    reconfigure(cluster, "data_dir = \"node-1\"", &format!("data_dir = \"{directory}\""));
    // With another directory it would have to be taken into the cluster again. It is alone instead.
    let text = fs::read_to_string(cluster.data().join("node-1.toml")).unwrap();
    let listen = text.lines().find_map(|line| line.strip_prefix("listen = ")).unwrap();
    reconfigure(
        cluster,
        "zone = \"\"",
        &format!("nodes = [{{ id = 1, addr = {listen}, cores = 1 }}]"),
    );
    reconfigure(
        cluster,
        "size = 268435456\nsegment = 33554432",
        &format!("size = \"{journal}\"\nsegment = \"2MiB\"\nsnapshot_after = \"2MiB\""),
    );
    reconfigure(cluster, "[log]", "[limits]\nmax_value = \"64KiB\"\n\n[log]");
}

#[test]
fn a_directory_is_served_by_one_process() {
    let cluster = Cluster::start(&["--shards", "2"]);
    let (code, errors) = serve(&cluster, "node-1.toml");
    assert_eq!(code, 2, "{errors}");
    let pid = cluster.pid(1).as_raw_nonzero().to_string();
    assert!(
        errors.contains("in use by the process") && errors.contains(&pid),
        "{errors}"
    );
}

#[test]
fn a_directory_of_another_cluster_durability_or_release_is_refused() {
    let mut cluster = Cluster::start(&["--shards", "2"]);
    cluster.stop();
    let path = cluster.data().join("node-1.toml");
    let good = fs::read_to_string(&path).unwrap();
    let id = good
        .lines()
        .find_map(|line| line.strip_prefix("id = "))
        .unwrap()
        .to_owned();
    for (from, to, wanted) in [
        (id.as_str(), "\"000102030405060708090a0b0c0d0e0f\"", "belongs to"),
        ("shards = 2", "shards = 4", "belongs to"),
        (
            "durability = \"sync\"",
            "durability = \"memory\"",
            "was made with durability = \"sync\"",
        ),
    ] {
        reconfigure(&cluster, from, to);
        let (code, errors) = serve(&cluster, "node-1.toml");
        assert_eq!(code, 2, "{errors}");
        assert!(errors.contains(wanted) && errors.contains("node-1"), "{errors}");
        fs::write(&path, &good).unwrap();
    }

    let identity = cluster.node(1).join("core-0/journal/identity");
    let kept = fs::read(&identity).unwrap();
    let mut newer = kept.clone();
    newer[VERSION_AT] += 1;
    newer[CHECKSUM_AT..][..4].fill(0);
    let checksum = crc32c(&newer);
    newer[CHECKSUM_AT..][..4].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&identity, newer).unwrap();
    let (code, errors) = serve(&cluster, "node-1.toml");
    assert_eq!(code, 2, "{errors}");
    assert!(
        errors.contains("format version 2") && errors.contains("newer release"),
        "{errors}"
    );

    fs::write(&identity, &kept).unwrap();
    flip(&identity, 40);
    let (code, errors) = serve(&cluster, "node-1.toml");
    assert_eq!(code, 7, "{errors}");
    assert!(errors.contains("core-0/journal/identity"), "{errors}");

    fs::write(&identity, &kept).unwrap();
    cluster.start_again();
    cluster.stop();
}

/// CRC-32C (Castagnoli, reflected), bit by bit: independent of what is tested.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc))
    })
}

/// A block in the middle of what a journal has written: the file, and the offset of a byte there that is not zero.
fn middle(journal: &Path) -> (PathBuf, u64) {
    const BLOCK: usize = 4096;
    let path = journal.join("segment-00000000");
    let bytes = fs::read(&path).unwrap();
    let blocks = bytes
        .chunks(BLOCK)
        .enumerate()
        .filter(|(_, block)| block.iter().any(|byte| *byte != 0));
    let written: Vec<usize> = blocks.map(|(number, _)| number).collect();
    assert!(written.len() > 8, "there is a middle");
    let block = written[written.len() / 2] * BLOCK;
    let within = bytes[block..].iter().position(|byte| *byte != 0).unwrap();
    (path, (block + within) as u64)
}

#[test]
fn a_flipped_bit_in_the_middle_of_a_journal_is_refused_and_its_node_joins_again() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "2"]);
    let load = Load::start(cluster.config(), "bit");
    load.wait_for_more(1000);
    wait_until("a replica on node 2", || cluster.replica(0, 2).is_some());
    cluster.kill(&[2]);
    let (segment, offset) = middle(&cluster.node(2).join("core-0/journal"));
    flip(&segment, offset);
    let (code, errors) = serve(&cluster, "node-2.toml");
    assert_eq!(code, 7, "{errors}");
    let file = "node-2/core-0/journal/segment-00000000";
    assert!(
        errors.contains(file) && errors.contains("at offset ") && errors.contains("generation repair"),
        "{errors}"
    );
    let refused = cluster.restart(2);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(cluster.errors().contains(file), "{}", cluster.errors());

    // What the message says to do.
    let mut repair = cluster.command();
    repair
        .args(["repair", "--data-dir"])
        .arg(cluster.node(2))
        .arg("--discard")
        .arg(&segment);
    let repaired = repair.output().unwrap();
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    cluster.restart_well(2);
    load.wait_for_more(300);
    let keys = load.finish();
    cluster.wait_until_alike(3);
    assert_all_there(&cluster.config(), &keys);
    cluster.stop();
}

#[test]
fn dev_ends_with_the_exit_code_of_a_node_that_is_damaged() {
    let mut cluster = Cluster::start(&["--shards", "2"]);
    let load = Load::start(cluster.config(), "damaged");
    load.wait_for_more(300);
    load.finish();
    cluster.stop();
    let (segment, offset) = middle(&cluster.node(1).join("core-0/journal"));
    flip(&segment, offset);
    let output = cluster.dev_command().output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "{errors}");
    assert!(
        errors.contains("segment-00000000") && errors.contains("at offset "),
        "{errors}"
    );
}

#[test]
fn a_flipped_bit_in_a_snapshot_is_found_offline_and_refused_by_a_node_that_is_alone() {
    let mut cluster = Cluster::start(&["--shards", "1"]);
    cluster.stop();
    with_small_journal(&cluster, "small", "8MiB");
    let serving = Serving::start(&cluster);
    let snapshots = |action: &str| {
        let mut command = cluster.command();
        let output = command
            .args(["snapshot", action, "--json"])
            .arg(cluster.data().join("small"))
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let load = Load::start(cluster.config(), "image");
    wait_until("a snapshot", || {
        let (code, listed, _) = snapshots("list");
        code == Some(0) && !listed.is_empty()
    });
    let keys = load.finish();
    assert_all_there(&cluster.config(), &keys);
    serving.stop();

    let (code, verified, errors) = snapshots("verify");
    assert_eq!(code, Some(0), "{errors}");
    let snapshot: serde_json::Value = serde_json::from_str(verified.lines().next().unwrap()).unwrap();
    assert!(
        snapshot["index"].as_str().unwrap().parse::<u64>().unwrap() > 0,
        "{snapshot}"
    );
    let file = snapshot["file"].as_str().unwrap();
    flip(Path::new(file), fs::metadata(file).unwrap().len() / 2);
    let (code, _, errors) = snapshots("verify");
    assert_eq!(code, Some(7), "{errors}");
    assert!(errors.contains(file) && errors.contains("at offset "), "{errors}");
    let (code, errors) = serve(&cluster, "node-1.toml");
    assert_eq!(code, 7, "{errors}");
    assert!(
        errors.contains("core-0/snapshots") && errors.contains("generation snapshot verify"),
        "{errors}"
    );
}
