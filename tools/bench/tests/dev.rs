//! How the harness starts `generation dev`: what it asks for, and what the report says it got. The program is a script that
//! writes down its arguments.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use generation_bench::peers::{DevSettings, Durability, PeerError, Server};
use generation_bench::system::Environment;

/// A program with or without `--durability`, which serves nobody and reports the durability `level`.
fn program(directory: &Path, help: &str, level: &str) -> PathBuf {
    let program = directory.join("generation");
    let script = format!(
        r#"#!/bin/sh
case "$*" in
"dev --help") echo "Usage: generation dev [OPTIONS] {help}" ;;
dev*) echo "$*" > "{directory}/arguments"
      echo '{{"client_config":"client.toml","nodes":[{{"addr":"127.0.0.1:1","pid":'$$'}}]}}'
      exec sleep 60 ;;
status*) echo '{{"durability":"{level}"}}' ;;
--version) echo "generation 9" ;;
esac
"#,
        directory = directory.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn settings(program: PathBuf, durability: Option<Durability>, nodes: usize) -> DevSettings {
    DevSettings {
        name: "generation".to_owned(),
        program,
        nodes,
        memory_mib: 64,
        cpus: Vec::new(),
        durability,
        files: None,
        arguments: vec!["--shards=4".to_owned()],
    }
}

#[test]
fn a_program_that_knows_durability_is_told_and_the_report_says_what_it_serves_with() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path(), "--durability", "sync");
    let server = Server::start_generation(&settings(program, Some(Durability::Sync), 3)).unwrap();
    assert_eq!(server.name(), "generation-3");
    let arguments = fs::read_to_string(directory.path().join("arguments")).unwrap();
    assert!(
        arguments.contains("--nodes 3") && arguments.contains("--shards=4"),
        "{arguments}"
    );
    assert!(arguments.contains("--durability sync"), "{arguments}");
    let mut environment = Environment::capture();
    server.describe(&mut environment);
    assert_eq!(environment.versions["generation-3"], "generation 9");
    let durability = &environment.durability["generation-3"];
    assert!(durability.starts_with("sync: its files"), "{durability}");
}

#[test]
fn a_program_that_does_not_serves_from_memory_and_cannot_be_asked_to_sync() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path(), "--memory", "memory");
    let server = Server::start_generation(&settings(program.clone(), Some(Durability::Memory), 1)).unwrap();
    let arguments = fs::read_to_string(directory.path().join("arguments")).unwrap();
    assert!(!arguments.contains("--durability"), "{arguments}");
    let mut environment = Environment::capture();
    server.describe(&mut environment);
    assert_eq!(environment.durability["generation"], "memory");
    let refused = Server::start_generation(&settings(program, Some(Durability::Sync), 1));
    let error = refused.err().unwrap();
    assert!(matches!(error, PeerError::Unable { .. }), "{error}");
    assert!(error.to_string().contains("--durability memory"), "{error}");
}
