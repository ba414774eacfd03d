//! The fences of the real workspace: dependencies, effects in the text of the pure crates, the tree, the README.

use generation_tests::fences::Graph;
use generation_tests::{layout, source, workspace_root};

fn list(violations: &[impl std::fmt::Display]) -> String {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

#[test]
fn crates_know_only_what_they_may() {
    let violations = Graph::of_workspace(&workspace_root()).violations();
    assert!(violations.is_empty(), "{}", list(&violations));
}

#[test]
fn pure_crates_touch_no_clock_thread_socket_or_file() {
    for directory in ["proto/src", "src/engine/src", "src/quic/src", "src/node/src"] {
        let (findings, files) = source::effects_below(&workspace_root().join(directory));
        assert!(files > 0, "no source found in {directory}");
        assert!(findings.is_empty(), "{}", list(&findings));
    }
}

#[test]
fn pure_crates_have_lints_that_ban_effects() {
    for directory in ["proto", "src/engine", "src/quic", "src/node"] {
        let path = workspace_root().join(directory).join(".clippy.toml");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for ban in [
            "std::time::Instant::now",
            "std::time::SystemTime::now",
            "std::thread::spawn",
        ] {
            assert!(
                text.contains(&format!("path = \"{ban}\"")),
                "{} does not ban {ban}",
                path.display()
            );
        }
        for ban in ["std::collections::HashMap", "std::collections::HashSet"] {
            assert!(
                text.contains(&format!("path = \"{ban}\"")),
                "{} does not ban {ban}",
                path.display()
            );
        }
    }
}

#[test]
fn nothing_foreign_stands_at_the_root() {
    let files = layout::committed_files(&workspace_root());
    assert!(
        files.iter().any(|file| file == "Cargo.toml"),
        "git lists the repository"
    );
    let strangers = layout::strangers(files.iter().map(String::as_str));
    assert!(strangers.is_empty(), "not allowed at the root: {}", list(&strangers));
}

#[test]
fn the_commands_of_the_readme_exist() {
    let root = workspace_root();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let commands = layout::commands(&readme);
    assert!(
        commands.iter().any(|command| command == "tests/run"),
        "the README names the test command"
    );
    let complaints: Vec<String> = commands
        .iter()
        .filter_map(|command| layout::complaint(&root, command).map(|why| format!("{command}: {why}")))
        .collect();
    assert!(complaints.is_empty(), "{}", list(&complaints));
}
