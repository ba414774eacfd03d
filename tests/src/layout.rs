//! The tree as it is committed, and the commands that the README tells people to type.

use std::path::Path;
use std::process::Command;

/// What may stand at the root of the repository, beside dotfiles.
const TOP_LEVEL: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "benches",
    "proto",
    "src",
    "tests",
    "tools",
];

/// The files under version control in the repository at `root`.
///
/// # Panics
/// When git cannot list them.
pub fn committed_files(root: &Path) -> Vec<String> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .expect("git can be started");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git ls-files failed: {complaint}");
    let list = String::from_utf8(output.stdout).expect("paths are UTF-8");
    list.split_terminator('\0').map(str::to_owned).collect()
}

/// The first components of `files` that must not stand at the root.
pub fn strangers<'a>(files: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut strangers: Vec<&str> = files
        .into_iter()
        .map(|file| file.split('/').next().unwrap_or(file))
        .filter(|top| !top.starts_with('.') && !TOP_LEVEL.contains(top))
        .collect();
    strangers.dedup();
    strangers
}

/// The lines to be typed in the fenced `sh` blocks of a Markdown `text`: continued lines joined, comments and an optional
/// leading `$ ` taken off.
pub fn commands(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut inside = false;
    let mut pending = String::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(language) = line.strip_prefix("```") {
            inside = !inside && matches!(language.trim(), "sh" | "shell" | "bash" | "console");
            continue;
        }
        if !inside || line.is_empty() || line.starts_with('#') {
            continue;
        }
        pending.push_str(line.strip_prefix("$ ").unwrap_or(line));
        match pending.strip_suffix('\\').map(str::len) {
            Some(len) => pending.truncate(len),
            None => commands.push(std::mem::take(&mut pending)),
        }
    }
    commands
}

/// Why `command` cannot be typed at the root of the repository: it runs a file that is not there or not executable, or a
/// cargo package or binary that does not exist. `None` when it can.
pub fn complaint(root: &Path, command: &str) -> Option<String> {
    let words: Vec<&str> = command
        .split(|c: char| c.is_whitespace() || matches!(c, ';' | '&' | '|' | '(' | ')'))
        .collect();
    for word in &words {
        let path = word.trim_start_matches("./");
        let in_tree = TOP_LEVEL
            .iter()
            .any(|top| path.split_once('/').is_some_and(|(first, _)| first == *top));
        if in_tree && !root.join(path).exists() {
            return Some(format!("{path} does not exist"));
        }
    }
    let first = words.iter().find(|word| !word.contains('='))?.trim_start_matches("./");
    if first.contains('/') && root.join(first).is_file() && !is_executable(&root.join(first)) {
        return Some(format!("{first} is not executable"));
    }
    let package = words
        .windows(2)
        .find_map(|pair| matches!(pair[0], "-p" | "--package").then_some(pair[1]));
    if let (Some(package), true) = (package, words.contains(&"cargo")) {
        let known = committed_files(root)
            .iter()
            .filter(|file| file.ends_with("Cargo.toml"))
            .filter_map(|file| std::fs::read_to_string(root.join(file)).ok())
            .any(|manifest| manifest.contains(&format!("name = \"{package}\"")));
        if !known {
            return Some(format!("there is no package {package}"));
        }
    }
    None
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace_root;

    #[test]
    fn a_planted_stranger_is_found() {
        assert_eq!(strangers(["src/a.rs", ".ci/run", "Cargo.lock", "tests/run"]), [""; 0]);
        assert_eq!(
            strangers(["docs/a.md", "docs/b.md", "notes.txt"]),
            ["docs", "notes.txt"]
        );
    }

    #[test]
    fn commands_are_those_of_shell_blocks() {
        let text = "a\n```sh\n# why\n$ one \\\n  --two\nthree # four\n```\n```rust\nlet x;\n```\n```\nplain\n```\n";
        assert_eq!(commands(text), ["one --two", "three # four"]);
    }

    #[test]
    fn a_planted_command_that_does_not_exist_is_found() {
        let root = workspace_root();
        assert_eq!(complaint(&root, "tests/run"), None);
        assert_eq!(
            complaint(&root, "cargo run --release -p generation-server -- dev"),
            None
        );
        assert!(complaint(&root, "tests/no-such-script").is_some());
        assert!(complaint(&root, "CI=true ./tests/Cargo.toml").is_some());
        assert!(complaint(&root, "cargo run -p no-such-package").is_some());
        assert!(complaint(&root, "echo a && cat tests/none").is_some());
    }
}
