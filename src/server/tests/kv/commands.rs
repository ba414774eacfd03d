//! Commands on keys.

use std::time::Duration;

use serde_json::Value;

use crate::node::{Node, Run, generation, numbered, read_some, wait_until};

const EVERY_BYTE: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut at = 0;
    while at < 256 {
        bytes[at] = at as u8;
        at += 1;
    }
    bytes
};

#[test]
fn bytes_come_out_as_they_went_in() {
    let node = Node::shared();
    for value in [&b"plain"[..], b"", b"line\n", b"-", &EVERY_BYTE] {
        assert_eq!(node.kv_with_input(&["put", "raw", "-"], value).code, 0);
        let run = node.kv(&["get", "raw"]);
        assert_eq!(
            (run.code, run.stdout.as_slice()),
            (0, value),
            "no byte is added in a pipe"
        );
    }
    let large = EVERY_BYTE.repeat(8 << 10);
    assert_eq!(node.kv_with_input(&["put", "large", "-"], &large).code, 0);
    assert!(
        node.kv(&["get", "large"]).stdout == large,
        "two megabytes come back whole"
    );
    let run = node.kv(&["put", "dashes", "--not-an-option"]);
    assert_eq!(run.code, 0, "a value may begin with dashes: {run:?}");
    assert_eq!(node.kv(&["get", "dashes"]).text(), "--not-an-option");
}

#[test]
fn a_missing_key_is_exit_code_3() {
    let node = Node::shared();
    for command in [
        &["get", "missing"][..],
        &["delete", "missing"],
        &["touch", "missing", "--persist"],
    ] {
        let run = node.kv(command);
        assert_eq!((run.code, run.text()), (3, ""), "{run:?}");
        assert!(run.stderr.contains("not found: missing"), "{run:?}");
        let run = node.kv(&[command, &["--json"]].concat());
        assert_eq!((run.code, run.stderr.as_str()), (3, ""), "{run:?}");
        assert_eq!(run.json()["found"], false);
        assert_eq!(run.json()["version"], "0");
    }
}

#[test]
fn json_is_the_documented_object() {
    let node = Node::shared();
    let put = node.json(&["put", "json", "wört\n"]);
    let get = node.json(&["get", "json"]);
    assert_eq!(get["key"], "json");
    assert_eq!(get["found"], true);
    assert_eq!(get["value"], "wört\n");
    assert_eq!(get["version"], put["version"]);
    assert_eq!(get["ttl_ms"], Value::Null);
    assert_eq!(get["consistency"], "linearizable");
    assert!(get["shard"].is_u64(), "{get}");
    for number in ["version", "index"] {
        let text = get[number]
            .as_str()
            .unwrap_or_else(|| panic!("{number} is a string: {get}"));
        assert!(text.parse::<u64>().unwrap() > 0);
    }
    node.kv_with_input(&["put", "json_bytes", "-"], &EVERY_BYTE);
    let get = node.json(&["get", "json_bytes"]);
    assert_eq!(get["value"], Value::Null);
    assert!(get["value_b64"].as_str().unwrap().starts_with("AAECAwQF"), "{get}");
    // A key that no shell can pass, there and back.
    assert_eq!(node.kv(&["put", "--key-b64", "AP8K", "odd"]).code, 0);
    let get = node.json(&["get", "--key-b64", "AP8K"]);
    assert_eq!(
        (&get["key"], &get["key_b64"], &get["value"]),
        (&Value::Null, &"AP8K".into(), &"odd".into())
    );
}

#[test]
fn conditions_that_fail_are_exit_code_4() {
    let node = Node::shared();
    let first = node.json(&["put", "cas", "1", "--if-absent"]);
    let version = first["version"].as_str().unwrap();
    let refused = |run: Run| {
        assert_eq!((run.code, run.text()), (4, ""), "{run:?}");
        let error = run.error();
        assert_eq!(
            (&error["code"], &error["state"]),
            (&"condition_failed".into(), &"rejected".into())
        );
        assert!(
            error["message"].as_str().unwrap().contains("version"),
            "it says what the version is: {error}"
        );
    };
    refused(node.kv(&["put", "cas", "2", "--if-absent", "--json"]));
    let second = node.json(&["put", "cas", "2", "--if-version", version]);
    refused(node.kv(&["put", "cas", "3", "--if-version", version, "--json"]));
    refused(node.kv(&["delete", "cas", "--if-version", version, "--json"]));
    assert_eq!(node.kv(&["get", "cas"]).text(), "2");
    let run = node.kv(&["delete", "cas", "--if-version", second["version"].as_str().unwrap()]);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(
        node.kv(&["put", "cas", "4", "--if-version", "0"]).code,
        0,
        "0: only if absent"
    );
    assert_eq!(node.kv(&["put", "cas", "5", "--if-version", "0"]).code, 4);
}

#[test]
fn entries_expire_and_are_touched() {
    let node = Node::shared();
    let ttl_ms = |key: &str| node.json(&["get", key])["ttl_ms"].as_u64();
    node.json(&["put", "ttl", "x", "--ttl", "1h"]);
    let left = ttl_ms("ttl").unwrap();
    assert!((3_500_000..=3_600_000).contains(&left), "{left}");
    node.json(&["touch", "ttl", "--ttl", "2h"]);
    assert!(ttl_ms("ttl").unwrap() > 3_600_000);
    node.json(&["touch", "ttl", "--persist"]);
    assert_eq!(ttl_ms("ttl"), None);
    node.json(&["touch", "ttl", "--ttl", "300ms"]);
    wait_until("the entry expires", || node.kv(&["get", "ttl"]).code == 3);
    node.json(&["put", "ttl", "x", "--ttl", "1h"]);
    node.json(&["put", "ttl", "y"]);
    assert_eq!(ttl_ms("ttl"), None, "a put without a time to live clears it");
}

#[test]
fn numbers_are_counted() {
    let node = Node::shared();
    assert_eq!(node.kv(&["incr", "n"]).text(), "1\n");
    assert_eq!(node.kv(&["incr", "n", "41"]).text(), "42\n");
    assert_eq!(node.kv(&["incr", "n", "-50"]).text(), "-8\n");
    // In a session the answers are the same.
    assert_eq!(node.kv(&["incr", "n", "8", "--exactly-once"]).text(), "0\n");
    assert_eq!(node.kv(&["incr", "n", "-8", "--exactly-once"]).text(), "-8\n");
    for write in [
        &["put", "once", "v"][..],
        &["touch", "once", "--ttl", "1h"],
        &["delete", "once"],
    ] {
        let run = node.kv(&[write, &["--exactly-once"]].concat());
        assert_eq!(run.code, 0, "{run:?}");
    }
    let run = node.kv(&["delete", "once", "--exactly-once"]);
    assert_eq!(run.code, 3, "{run:?}");
    let json = node.json(&["incr", "n"]);
    assert_eq!((&json["value"], &json["found"]), (&"-7".into(), &true.into()));
    node.kv(&["put", "word", "x"]);
    node.kv(&["put", "most", &i64::MAX.to_string()]);
    for (key, code) in [("word", "not_a_number"), ("most", "overflow")] {
        let run = node.kv(&["incr", key, "--json"]);
        assert_eq!(run.code, 1, "{run:?}");
        assert_eq!(
            (&run.error()["code"], &run.error()["state"]),
            (&code.into(), &"rejected".into())
        );
    }
    assert_eq!(node.kv(&["get", "word"]).text(), "x");
}

#[test]
fn several_keys_are_read_at_once() {
    let node = Node::shared();
    node.kv(&["put", "m1", "tab\there\u{1b}[2J"]);
    node.kv(&["put", "m3", "3"]);
    let run = node.kv(&["mget", "m1", "m2", "m3"]);
    assert_eq!(run.code, 0, "some are missing, and that is no failure: {run:?}");
    assert_eq!(run.text(), "m1\ttab\\there\\x1b[2J\nm3\t3\n");
    assert!(run.stderr.contains("not found: m2"), "{run:?}");
    let lines = node.kv(&["mget", "m3", "m2", "m1", "--json"]).json_lines();
    let found: Vec<_> = lines
        .iter()
        .map(|line| (line["key"].as_str().unwrap(), line["found"].as_bool().unwrap()))
        .collect();
    assert_eq!(found, [("m3", true), ("m2", false), ("m1", true)], "in the order asked");
}

#[test]
fn keys_and_entries_are_listed_by_prefix() {
    let node = Node::shared();
    for n in 0..50 {
        node.kv(&["put", &format!("list:{n}"), &format!("v{n}")]);
    }
    node.kv(&["put", "list", "not in it"]);
    let sorted = |text: &str, separator: char| {
        let mut items: Vec<_> = text.split_terminator(separator).map(str::to_owned).collect();
        items.sort();
        items
    };
    let mut expected: Vec<_> = (0..50).map(|n| format!("list:{n}")).collect();
    expected.sort();
    assert_eq!(sorted(node.kv(&["keys", "--prefix", "list:"]).text(), '\n'), expected);
    assert_eq!(
        sorted(node.kv(&["keys", "--prefix", "list:", "-0"]).text(), '\0'),
        expected
    );
    assert_eq!(
        sorted(node.kv(&["keys", "--prefix", "list:", "--limit", "7"]).text(), '\n').len(),
        7
    );
    assert_eq!(node.kv(&["keys", "--prefix", "list:", "--limit", "0"]).text(), "");
    assert_eq!(node.kv(&["keys", "--prefix", "no such"]).text(), "");
    let mut expected: Vec<_> = (0..50).map(|n| format!("list:{n}\tv{n}")).collect();
    expected.sort();
    assert_eq!(
        sorted(node.kv(&["entries", "--prefix", "list:"]).text(), '\n'),
        expected
    );
    let lines = node.kv(&["entries", "--prefix", "list:", "--json"]).json_lines();
    assert_eq!(lines.len(), 50);
    for line in &lines {
        assert_eq!(
            line["key"].as_str().unwrap().replace("list:", "v"),
            line["value"].as_str().unwrap()
        );
        assert_eq!(line["found"], true);
    }
    let keys = node.kv(&["keys", "--prefix", "list:", "--json"]).json_lines();
    assert!(
        keys.len() == 50 && keys.iter().all(|line| line["value"].is_null()),
        "keys alone"
    );
}

#[test]
fn a_session_token_carries_over_to_another_process() {
    let node = Node::shared();
    let written = node.json(&["put", "session", "seen"]);
    let token = written["session_token"].as_str().unwrap();
    let read = node.json(&["get", "session", "--consistency", "session", "--session-token", token]);
    // A node that leads every shard answers with more than was asked for, and says so.
    let stronger = |read: &Value, asked: &str| read["consistency"] == asked || read["consistency"] == "linearizable";
    assert!(read["value"] == "seen" && stronger(&read, "session"), "{read}");
    assert_eq!(
        node.json(&["get", "session", "--session-token", token])["value"],
        "seen"
    );
    let read = node.json(&["get", "session", "--consistency", "stale:500ms"]);
    assert!(read["value"] == "seen" && stronger(&read, "stale"), "{read}");
    for wrong in [
        &["--consistency", "session"][..],
        &["--consistency", "eventual"],
        &["--consistency", "stale"],
        &["--session-token", "1.2"],
        &["--consistency", "stale:1s", "--session-token", token],
    ] {
        let run = node.kv(&[&["get", "session"], wrong].concat());
        assert_eq!((run.code, run.text()), (2, ""), "{wrong:?}: {run:?}");
    }
}

#[test]
fn what_cannot_be_stored_is_rejected() {
    // A shard must have room for the largest value.
    let node = Node::start(&["--memory", "64MiB", "--shards", "1"]);
    let long_key = "k".repeat(65_536);
    for (key, code) in [("", "empty_key"), (long_key.as_str(), "key_too_large")] {
        let run = node.kv(&["put", key, "v", "--json"]);
        assert_eq!(run.code, 1, "{}", run.stderr);
        assert_eq!(
            (&run.error()["code"], &run.error()["state"]),
            (&code.into(), &"rejected".into())
        );
    }
    let key = &long_key[1..];
    assert_eq!(node.kv(&["put", key, "longest"]).code, 0);
    assert_eq!(node.kv(&["get", key]).text(), "longest");
    let run = node.kv_with_input(&["put", "huge", "-", "--json"], &vec![b'x'; (8 << 20) + 1]);
    assert_eq!((run.code, run.error()["code"].as_str()), (1, Some("value_too_large")));
    assert_eq!(node.kv_with_input(&["put", "huge", "-"], &vec![b'x'; 8 << 20]).code, 0);
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_right() {
    let node = Node::shared();
    for (arguments, part) in [
        (&["put", "k"][..], "<VALUE>"),
        (&["put", "k", "v", "--ttl", "30"], "30s"),
        (&["put", "k", "v", "--ttl", "0s"], "at least 1ms"),
        (
            &["put", "k", "v", "--if-absent", "--if-version", "1"],
            "cannot be used with",
        ),
        (&["put", "k", "v", "--if-version", "newest"], "--if-version"),
        (&["delete", "k", "--if-version", "0"], "--if-version"),
        (&["touch", "k"], "--ttl"),
        (&["incr", "k", "1.5"], "1.5"),
        (&["incr", "k", "9223372036854775808"], "9223372036854775808"),
        (&["mget"], "KEY"),
        (&["get", "k", "--key-b64"], "base64"),
        (&["gte", "k"], "get"),
        (&["import", "no such file"], "no such file"),
        (&["import", "."], "directory"),
        (&["export", "/no/such/directory/file"], "/no/such/directory"),
    ] {
        let run = node.kv(arguments);
        assert_eq!((run.code, run.text()), (2, ""), "{arguments:?}: {run:?}");
        assert!(run.stderr.contains(part), "{arguments:?}: {run:?}");
        let run = node.kv(&[arguments, &["--json"]].concat());
        let error = run.error();
        assert_eq!(
            (run.code, &error["state"]),
            (2, &"not_sent".into()),
            "{arguments:?}: {run:?}"
        );
    }
}

#[test]
fn a_reader_that_leaves_ends_a_listing_quietly() {
    let node = Node::start(&[]);
    let lines = numbered("pipe:", 1..=20_000, &"x".repeat(100));
    assert_eq!(node.kv_with_input(&["import", "-"], lines.as_bytes()).code, 0);
    let mut child = node.spawn(&["entries"]);
    read_some(&mut child, 100);
    drop(child.stdout.take());
    let run = Run::new(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
}

#[test]
fn a_node_that_does_not_answer_is_unavailable_and_nothing_was_sent() {
    let node = Node::start(&[]);
    assert_eq!(node.kv(&["put", "k", "v"]).code, 0);
    node.signal(rustix::process::Signal::STOP);
    let start = std::time::Instant::now();
    let run = node.kv(&["put", "k", "w", "--timeout", "500ms", "--json"]);
    assert!(start.elapsed() < Duration::from_secs(10), "the time allowed is kept");
    assert_eq!((run.code, run.text()), (5, ""), "{run:?}");
    assert_eq!(run.error()["state"], "not_sent");
    node.signal(rustix::process::Signal::CONT);
    assert_eq!(node.kv(&["get", "k"]).text(), "v");
}

#[test]
fn stats_count_what_was_asked() {
    let node = Node::start(&[]);
    let stats = |arguments: &[&str]| {
        let output = generation(node.directory())
            .arg("stats")
            .args(arguments)
            .arg("--config")
            .arg(node.config())
            .output();
        Run::new(output.unwrap())
    };
    let writes = || {
        let run = stats(&["--json"]);
        assert_eq!(run.code, 0, "{run:?}");
        let line = run.json();
        assert_eq!(line["node"], 1, "{line}");
        line["stats"]["node.writes"].as_str().unwrap().parse::<u64>().unwrap()
    };
    let before = writes();
    assert_eq!(node.kv(&["put", "counted", "once"]).code, 0);
    assert_eq!(writes(), before + 1);
    let run = stats(&["--node", "1"]);
    let line = format!("node.1.node.writes {}", before + 1);
    assert!(run.text().lines().any(|have| have == line), "{run:?}");
    let run = stats(&["--node", "9"]);
    assert_eq!(run.code, 1, "there is no such node: {run:?}");
}
