//! The program as a process, on a cluster of its own.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Two nodes die in turn and come back, then every node is restarted; a majority is there throughout.
const SCRIPT: &str = r#"
duration = "40s"

[cluster]
nodes = 5
shards = 4

[load]
rate = 100
connections = 1
keys = 500

[probe]
interval = "50ms"
timeout = "3s"

[[event]]
at = "2s"
kill = [2]

[[event]]
at = "7s"
start = "stopped"

[[event]]
at = "10s"
kill = [4]

[[event]]
at = "14s"
start = "stopped"

[[event]]
at = "17s"
reconnect = 10

[[event]]
at = "18s"
rolling_restart = "200ms"
"#;

fn run(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_generation-cluster-load"))
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn nothing_acknowledged_is_lost_while_nodes_die_and_restart() {
    // Not in /tmp, which may be a file system that does not know O_DIRECT.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(directory.path().join("script.toml"), SCRIPT).unwrap();
    let arguments = [
        "--script",
        "script.toml",
        "--data",
        "nodes",
        "--json",
        "report.json",
        "--html",
        "report.html",
    ];
    let output = run(directory.path(), &arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}\n{errors}");
    let report: Value = serde_json::from_slice(&fs::read(directory.path().join("report.json")).unwrap()).unwrap();
    assert_eq!(report["lost"], 0);
    let probes = report["probes"].as_array().unwrap();
    assert_eq!(probes.len(), 4);
    for shard in probes {
        assert!(shard["acknowledged"].as_u64().unwrap() > 50, "{shard}");
    }
    let events: Vec<&str> = report["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["text"].as_str().unwrap())
        .collect();
    assert_eq!(
        events[..4],
        [
            "killed [2]",
            "started [2], which serve",
            "killed [4]",
            "started [4], which serve"
        ]
    );
    assert!(events[4].starts_with("10 of 10 clients"), "{}", events[4]);
    assert!(
        events[5].starts_with("restarted [1, 2, 3, 4, 5] in turn"),
        "{}",
        events[5]
    );
    for wanted in ["full map after", "acknowledged writes lost", "Service by shard"] {
        assert!(text.contains(wanted), "{text}");
    }
    let page = fs::read_to_string(directory.path().join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("Times without service") && !page.contains("<script"));
}

#[test]
fn a_script_is_checked_before_anything_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let printed = run(directory.path(), &["--print-script"]);
    fs::write(directory.path().join("printed.toml"), &printed.stdout).unwrap();
    let good = run(directory.path(), &["--script", "printed.toml", "--check"]);
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    fs::write(
        directory.path().join("bad.toml"),
        "[[event]]\nat = \"1s\"\nkill = [9]\n",
    )
    .unwrap();
    for (script, wanted) in [("bad.toml", "there is no node 9"), ("none.toml", "none.toml")] {
        let refused = run(directory.path(), &["--script", script]);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert!(errors.contains(wanted), "{errors}");
    }
}
