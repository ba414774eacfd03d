//! Where the configuration comes from, and what else needs no node.

use std::fs;

use crate::node::{Node, Run, free_port, generation};

#[test]
fn the_configuration_is_found_where_it_is_documented() {
    let node = Node::shared();
    let place = tempfile::tempdir().unwrap();
    let run = |name: &str, options: &[&str]| {
        let mut command = generation(place.path());
        command.args(["kv", "get", "config", "--json"]).args(options);
        if !name.is_empty() {
            command.env("GENERATION_CONFIG", name);
        }
        Run::new(command.output().unwrap())
    };
    node.kv(&["put", "config", "found"]);
    let nothing = run("", &[]);
    assert_eq!(nothing.code, 2, "{nothing:?}");
    let message = nothing.error()["message"].as_str().unwrap().to_owned();
    for part in [
        "--config",
        "$GENERATION_CONFIG",
        ".generation/client.toml",
        ".config/generation/client.toml",
        "generation dev",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }

    // The configuration names its files relative to itself, so it is reached through a link to its directory.
    let data = node.config().parent().unwrap();
    fs::create_dir(place.path().join(".config")).unwrap();
    std::os::unix::fs::symlink(data, place.path().join(".config/generation")).unwrap();
    assert_eq!(run("", &[]).json()["value"], "found");
    fs::create_dir(place.path().join(".generation")).unwrap();
    fs::write(place.path().join(".generation/client.toml"), "not = \"it\"").unwrap();
    let nearer = run("", &[]);
    assert_eq!(nearer.code, 2, "the one in the current directory comes first");
    assert!(nearer.stderr.contains(".generation/client.toml"), "{nearer:?}");
    let config = node.config().to_str().unwrap();
    assert_eq!(run(config, &[]).json()["value"], "found");
    assert_eq!(run("nowhere", &["--config", config]).json()["value"], "found");
    assert_eq!(
        run("nowhere", &[]).code,
        2,
        "a file that was named is never replaced by another"
    );
}

#[test]
fn a_cluster_that_is_not_there_is_unavailable() {
    let node = Node::shared();
    let text = fs::read_to_string(node.config()).unwrap();
    let (before, rest) = text.split_once("127.0.0.1:").unwrap();
    let (_, after) = rest.split_once('"').unwrap();
    let config = node.config().with_file_name("nobody.toml");
    fs::write(&config, format!("{before}127.0.0.1:{}\"{after}", free_port())).unwrap();
    let output = generation(node.directory())
        .args(["kv", "get", "k", "--json", "--timeout", "300ms", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let run = Run::new(output);
    assert_eq!((run.code, run.text()), (5, ""), "{run:?}");
    assert_eq!(run.error()["state"], "not_sent");
}

#[test]
fn a_node_of_another_authority_is_not_talked_to() {
    let (node, other) = (Node::shared(), Node::start(&[]));
    let stranger = other.config().with_file_name("stranger.toml");
    let ours = fs::read_to_string(node.config()).unwrap();
    let seeds = ours.lines().find(|line| line.starts_with("seeds")).unwrap();
    let theirs = fs::read_to_string(other.config()).unwrap();
    let mixed: String = theirs
        .lines()
        .map(|line| if line.starts_with("seeds") { seeds } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write(&stranger, mixed).unwrap();
    let output = generation(node.directory())
        .args(["kv", "get", "k", "--json", "--timeout", "2s", "--config"])
        .arg(&stranger)
        .output()
        .unwrap();
    let run = Run::new(output);
    assert_eq!(run.code, 5, "{run:?}");
    assert!(
        run.error()["message"].as_str().unwrap().contains("certificate"),
        "{run:?}"
    );
}

#[test]
fn every_command_teaches_with_examples() {
    let place = tempfile::tempdir().unwrap();
    let help = |arguments: &[&str]| {
        let run = Run::new(generation(place.path()).args(arguments).arg("--help").output().unwrap());
        assert_eq!(run.code, 0, "{run:?}");
        run.text().to_owned()
    };
    let commands = [
        "get", "put", "delete", "incr", "touch", "mget", "keys", "entries", "import", "export",
    ];
    let text = help(&["kv"]);
    assert!(commands.iter().all(|command| text.contains(command)), "{text}");
    for command in commands {
        let text = help(&["kv", command]);
        let example = format!("generation kv {command}");
        assert!(text.contains("Examples:") && text.contains(&example), "{text}");
    }
    assert!(help(&["completions"]).contains("Examples:"));
}

#[test]
fn completions_are_written_for_every_shell() {
    let place = tempfile::tempdir().unwrap();
    for (shell, part) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef generation"),
        ("fish", "complete -c generation"),
        ("powershell", "Register-ArgumentCompleter"),
        ("elvish", "edit:completion"),
    ] {
        let run = Run::new(generation(place.path()).args(["completions", shell]).output().unwrap());
        assert_eq!((run.code, run.stderr.as_str()), (0, ""));
        assert!(run.text().contains(part) && run.text().contains("mget"), "{shell}");
    }
    let script = place.path().join("script");
    let run = Run::new(generation(place.path()).args(["completions", "bash"]).output().unwrap());
    fs::write(&script, &run.stdout).unwrap();
    let checked = std::process::Command::new("bash")
        .arg("-n")
        .arg(&script)
        .output()
        .unwrap();
    assert!(checked.status.success(), "bash can read it: {checked:?}");
}
