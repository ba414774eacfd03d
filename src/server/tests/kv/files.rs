//! Import and export.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use crate::node::{Node, finish, numbered, wait_until};

const AIRPORTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/airports.ndjson");

/// The lines of a file, in order.
fn sorted_lines(path: &Path) -> Vec<String> {
    let mut lines: Vec<_> = fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn real_data_goes_in_and_comes_out_the_same() {
    let node = Node::start(&[]);
    let summary = node.json(&["import", AIRPORTS]);
    assert_eq!((&summary["imported"], &summary["bad_lines"]), (&7884.into(), &0.into()));
    let again = node.json(&["import", AIRPORTS, "--exactly-once"]);
    assert_eq!((&again["imported"], &again["in_doubt"]), (&7884.into(), &0.into()));
    let heathrow: serde_json::Value = serde_json::from_slice(&node.kv(&["get", "airport:LHR"]).stdout).unwrap();
    assert_eq!(
        heathrow["country"], "GB",
        "JSON that is no string is stored as it is written"
    );

    let (first, second) = (
        node.directory().join("all.ndjson"),
        node.directory().join("again.ndjson"),
    );
    let summary = node.json(&["export", first.to_str().unwrap()]);
    assert_eq!(summary["exported"], 7884);
    assert!(!first.with_extension("ndjson.partial").exists());
    let exported: BTreeMap<String, String> = sorted_lines(&first)
        .iter()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            (
                line["key"].as_str().unwrap().to_owned(),
                line["value"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    for line in fs::read_to_string(AIRPORTS).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let value: serde_json::Value = serde_json::from_str(&exported[line["key"].as_str().unwrap()]).unwrap();
        assert_eq!(value, line["value"]);
    }

    // Into another node by CSV, and out again.
    let other = Node::start(&["--cores", "2"]);
    let csv = node.directory().join("all.csv");
    assert_eq!(node.kv(&["export", csv.to_str().unwrap()]).code, 0);
    assert!(
        fs::read_to_string(&csv)
            .unwrap()
            .starts_with("key,key_b64,value,value_b64,ttl_ms\n")
    );
    assert_eq!(other.json(&["import", csv.to_str().unwrap()])["imported"], 7884);
    assert_eq!(other.kv(&["export", second.to_str().unwrap()]).code, 0);
    assert!(sorted_lines(&first) == sorted_lines(&second), "the same set");
}

#[test]
fn bytes_and_times_to_live_survive_a_file() {
    let node = Node::start(&[]);
    let bytes: Vec<u8> = (0..=255).collect();
    node.kv_with_input(&["put", "bytes", "-"], &bytes);
    node.kv(&["put", "--key-b64", "/wA=", ""]);
    node.kv(&["put", "short", "x", "--ttl", "1h"]);
    node.kv(&["put", "lines", "a,\"b\"\r\n'c'\t"]);
    for file in ["odd.ndjson", "odd.csv"] {
        assert_eq!(node.kv(&["export", file]).code, 0);
        let other = Node::start(&[]);
        let path = node.directory().join(file);
        let run = other.kv(&["import", path.to_str().unwrap()]);
        assert_eq!(run.code, 0, "{run:?}");
        assert!(other.kv(&["get", "bytes"]).stdout == bytes);
        assert_eq!(other.json(&["get", "--key-b64", "/wA="])["found"], true);
        assert_eq!(other.kv(&["get", "lines"]).text(), "a,\"b\"\r\n'c'\t");
        let left = other.json(&["get", "short"])["ttl_ms"].as_u64().unwrap();
        assert!((3_000_000..=3_600_000).contains(&left), "{left}");
    }
}

#[test]
fn bad_lines_are_numbered_and_do_not_stop_an_import() {
    let node = Node::shared();
    let mut text = String::new();
    for n in 1..=5000 {
        match n {
            17 => text.push_str("nonsense\n"),
            900 => text.push_str("{\"key\":\"\",\"value\":\"\"}\n"),
            4321 => text.push_str("{\"key\":\"bad:x\",\"value\":\"\",\"tll_ms\":5}\n"),
            _ => writeln!(text, "{{\"key\":\"bad:{n}\",\"value\":\"{n}\"}}").unwrap(),
        }
    }
    let run = node.kv_with_input(&["import", "-"], text.as_bytes());
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.text().starts_with("imported 4,997 entries"), "{run:?}");
    for part in [
        "line 17:",
        "line 900:",
        "line 4321: unknown field `tll_ms`",
        "3 bad lines",
    ] {
        assert!(run.stderr.contains(part), "{run:?}");
    }
    let run = node.kv_with_input(&["import", "-", "--json"], text.as_bytes());
    assert_eq!((run.code, &run.json()["bad_lines"]), (1, &3.into()));
    assert_eq!(run.error()["code"], "bad_lines");
    assert_eq!(node.kv(&["get", "bad:5000"]).text(), "5000");

    // Many bad lines are counted, not all printed, unless asked for.
    let noise = "?\n".repeat(1000);
    let run = node.kv_with_input(&["import", "-"], noise.as_bytes());
    assert!(
        run.code == 1 && run.stderr.lines().count() < 110,
        "{} lines",
        run.stderr.lines().count()
    );
    let run = node.kv_with_input(&["import", "-", "--all-bad-lines"], noise.as_bytes());
    assert!(run.stderr.contains("line 1000:"));
    let run = node.kv_with_input(&["import", "-", "--format", "csv"], b"a,b\n1,2\n");
    assert!(run.code == 2 && run.stderr.contains("key_b64"), "{run:?}");
}

#[test]
fn the_last_line_of_a_key_wins() {
    let node = Node::shared();
    let mut text = String::new();
    for n in 0..30_000 {
        // Few keys, at distances from one line to several batches.
        let key = if n % 3 == 0 { 0 } else { n % 7001 };
        writeln!(text, "{{\"key\":\"last:{key}\",\"value\":\"{n}\"}}").unwrap();
    }
    let mut expected = BTreeMap::new();
    for n in 0..30_000_u32 {
        let key = if n % 3 == 0 { 0 } else { n % 7001 };
        expected.insert(format!("last:{key}"), n.to_string());
    }
    let run = node.kv_with_input(&["import", "-"], text.as_bytes());
    assert_eq!(run.code, 0, "{run:?}");
    let listed: BTreeMap<_, _> = node
        .kv(&["entries", "--prefix", "last:"])
        .text()
        .lines()
        .map(|line| {
            line.split_once('\t')
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .unwrap()
        })
        .collect();
    assert!(listed == expected, "as if the lines were written one after the other");
}

#[test]
fn keys_that_exist_can_be_left_alone() {
    let node = Node::shared();
    node.kv(&["put", "keep:1", "mine"]);
    let text = "{\"key\":\"keep:1\",\"value\":\"theirs\"}\n{\"key\":\"keep:2\",\"value\":\"theirs\"}\n";
    let run = node.kv_with_input(
        &["import", "-", "--if-absent", "--ttl", "1h", "--json"],
        text.as_bytes(),
    );
    let summary = run.json();
    assert_eq!(
        (run.code, &summary["imported"], &summary["kept"]),
        (0, &1.into(), &1.into())
    );
    assert_eq!(node.kv(&["get", "keep:1"]).text(), "mine");
    assert!(node.json(&["get", "keep:2"])["ttl_ms"].is_u64());
}

#[test]
fn an_import_that_fails_says_where_to_go_on() {
    let node = Node::start(&[]);
    let lines = |numbers| numbered("go:", numbers, "x");
    let mut child = node.spawn(&["import", "-", "--timeout", "5s", "--json"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(lines(1..=10_000).as_bytes()).unwrap();
    // Whole batches of the first half are there before the node freezes.
    wait_until("batches are stored", || {
        node.kv(&["keys", "--prefix", "go:"]).text().lines().count() >= 4 * 2048
    });
    node.signal(rustix::process::Signal::STOP);
    stdin.write_all(lines(10_001..=20_000).as_bytes()).unwrap();
    let run = finish(child, stdin);
    node.signal(rustix::process::Signal::CONT);

    assert_eq!(run.code, 6, "batches were on their way: {run:?}");
    let error = run.error();
    assert_eq!(error["state"], "in_doubt");
    let summary = run.json();
    assert!(summary["in_doubt"].as_u64().unwrap() > 0, "{summary}");
    assert!(run.stderr.contains("line_in_doubt"), "they are named: {run:?}");
    let resume_from = summary["resume_from"].as_u64().unwrap();
    assert!((2000..=20_000).contains(&resume_from), "{summary}");
    let option = format!("--resume-from {resume_from}");
    assert!(error["message"].as_str().unwrap().contains(&option), "{error}");
    // Every line before it is there.
    wait_until("the node goes on", || node.kv(&["get", "go:1"]).code == 0);
    let listed = node.kv(&["keys", "--prefix", "go:"]);
    let have: std::collections::HashSet<&str> = listed.text().lines().collect();
    for n in 1..resume_from {
        assert!(have.contains(format!("go:{n}").as_str()), "line {n} was acknowledged");
    }
    let path = node.directory().join("all.ndjson");
    fs::write(&path, lines(1..=20_000)).unwrap();
    let resume_from = resume_from.to_string();
    let summary = node.json(&["import", path.to_str().unwrap(), "--resume-from", &resume_from]);
    assert_eq!(summary["imported"], 20_001 - resume_from.parse::<u64>().unwrap());
    assert_eq!(node.kv(&["keys", "--prefix", "go:"]).text().lines().count(), 20_000);
}

#[test]
fn an_interrupted_import_says_where_to_go_on() {
    let node = Node::shared();
    let mut child = node.spawn(&["import", "-", "--json"]);
    let mut stdin = child.stdin.take().unwrap();
    let lines = numbered("stop:", 1..=5000, "");
    stdin.write_all(lines.as_bytes()).unwrap();
    wait_until("a batch is stored", || node.kv(&["get", "stop:2000"]).code == 0);
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let run = crate::node::Run::new(output);
    assert_eq!(
        (run.code, run.error()["code"].as_str()),
        (1, Some("interrupted")),
        "{run:?}"
    );
    assert!(run.json()["resume_from"].as_u64().unwrap() > 2000, "{run:?}");
}

#[test]
fn an_export_replaces_a_file_only_when_it_is_complete() {
    let node = Node::start(&[]);
    let lines = numbered("x:", 0..=9999, "x");
    assert_eq!(node.kv_with_input(&["import", "-"], lines.as_bytes()).code, 0);
    let path = node.directory().join("export.ndjson");
    fs::write(&path, "old").unwrap();
    node.signal(rustix::process::Signal::STOP);
    let run = node.kv(&["export", "export.ndjson", "--timeout", "300ms"]);
    node.signal(rustix::process::Signal::CONT);
    assert_eq!(run.code, 5, "{run:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    wait_until("the node goes on", || node.kv(&["get", "x:0"]).code == 0);
    assert_eq!(node.kv(&["export", "export.ndjson", "--prefix", "x:9"]).code, 0);
    assert_eq!(sorted_lines(&path).len(), 1111);
    // To standard output, from the shard after the first.
    let all = node.kv(&["export", "-"]).text().lines().count();
    let rest = node.kv(&["export", "-", "--resume-from", "1.0"]).text().lines().count();
    assert!(all == 10_000 && rest < all, "{rest} of {all}");
    let run = node.kv(&["export", "/dev/null"]);
    assert_eq!(run.code, 0, "a device is written to, not replaced: {run:?}");
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}
