//! A scan of the pure crates' text for what neither the dependency graph nor a lint per crate can rule out: the standard
//! library's own clocks, threads, sockets and files.
//!
//! It sees code only: comments and string literals are blanked first, so that documentation may name what the code must not
//! use.

use std::path::{Path, PathBuf};

/// Standard library paths of effects on the world. A match must not go on with a letter or digit.
const EFFECTS: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "UNIX_EPOCH.elapsed",
    "std::thread",
    "thread::spawn",
    "thread::sleep",
    "TcpListener",
    "TcpStream",
    "UdpSocket",
    "UnixDatagram",
    "UnixListener",
    "UnixStream",
    "ToSocketAddrs",
    "std::fs",
    "std::env",
    "std::process",
    "std::os",
    "io::stdin",
    "io::stdout",
    "io::stderr",
    "println!",
    "eprintln!",
];

/// What a file must not say and where it says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// What stands there.
    pub effect: &'static str,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.effect)
    }
}

/// Every effect in the Rust files below `directory`, and how many files were read.
///
/// # Panics
/// When a file or directory cannot be read.
pub fn effects_below(directory: &Path) -> (Vec<Finding>, usize) {
    let mut findings = Vec::new();
    let mut files = 0;
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("the source directory can be listed") {
            let path = entry.expect("the source directory can be listed").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file is UTF-8");
                files += 1;
                findings.extend(effects(&text).map(|(line, effect)| Finding {
                    file: path.clone(),
                    line,
                    effect,
                }));
            }
        }
    }
    (findings, files)
}

/// The effects in the code of `text`, with their lines. Modules under `#[cfg(test)]` at the top level may have them: a test of a
/// timer needs some instant to start from.
pub fn effects(text: &str) -> impl Iterator<Item = (usize, &'static str)> + use<> {
    let mut found = Vec::new();
    let mut previous = String::new();
    let mut in_tests = false;
    for (number, line) in code_of(text).lines().enumerate() {
        in_tests |= previous == "#[cfg(test)]" && line.starts_with("mod ") && line.ends_with('{');
        line.clone_into(&mut previous);
        if in_tests {
            in_tests = line != "}";
            continue;
        }
        for &effect in EFFECTS {
            let whole_word = |at: usize| {
                let letter = |c: char| c.is_alphanumeric() || c == '_';
                !line[at + effect.len()..].starts_with(letter) && !line[..at].ends_with(letter)
            };
            if line.match_indices(effect).any(|(at, _)| whole_word(at)) {
                found.push((number + 1, effect));
            }
        }
    }
    found.into_iter()
}

/// `text` with comments and the contents of literals blanked, its lines kept. It knows as much of Rust's grammar as that
/// takes: nested comments, raw strings, escapes, and that `'a` may be a lifetime.
fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => line_end(&chars, at),
            ('/', Some('*')) => comment_end(&chars, at),
            ('"', _) => string_end(&chars, at + 1),
            ('r', Some('"' | '#')) if !code.ends_with(|c: char| c.is_alphanumeric() && c != 'b') => {
                raw_string_end(&chars, at).unwrap_or(at + 1)
            }
            ('\'', Some('\\')) => char_end(&chars, at + 3),
            ('\'', Some(_)) if chars.get(at + 2) == Some(&'\'') => at + 3,
            _ => at + 1,
        }
        .min(chars.len());
        if end == at + 1 {
            code.push(chars[at]);
        } else {
            code.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
        }
        at = end;
    }
    code
}

fn line_end(chars: &[char], at: usize) -> usize {
    at + chars[at..].iter().take_while(|&&c| c != '\n').count()
}

fn comment_end(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn raw_string_end(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let body = at + 1 + hashes + 1;
    (chars.get(body - 1) == Some(&'"')).then_some(())?;
    let close = (body..chars.len()).find(|&quote| {
        chars[quote] == '"' && chars[quote + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    });
    Some(close.map_or(chars.len(), |quote| quote + 1 + hashes))
}

fn char_end(chars: &[char], at: usize) -> usize {
    at.min(chars.len()) + chars[at.min(chars.len())..].iter().take_while(|&&c| c != '\'').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, &'static str)> {
        effects(text).collect()
    }

    #[test]
    fn a_planted_effect_is_found_at_its_line() {
        assert_eq!(
            found("fn f() {\n    let now = Instant::now();\n}"),
            [(2, "Instant::now")]
        );
        assert_eq!(found("use std::fs;"), [(1, "std::fs")]);
        assert_eq!(found("use std::net::{IpAddr, UdpSocket};"), [(1, "UdpSocket")]);
        assert_eq!(
            found("std::thread::spawn(f)"),
            [(1, "std::thread"), (1, "thread::spawn")]
        );
    }

    #[test]
    fn what_only_looks_like_an_effect_is_not() {
        assert_eq!(found("use std::net::{IpAddr, SocketAddr};"), []);
        assert_eq!(found("MyTcpStreamLike; std::fsync; instant::Instant"), []);
    }

    #[test]
    fn test_modules_are_left_out_and_what_follows_them_is_not() {
        let tests = "#[cfg(test)]\nmod tests {\n    fn f() {\n        Instant::now();\n    }\n}\n";
        assert_eq!(found(tests), []);
        assert_eq!(found(&format!("{tests}use std::fs;")), [(7, "std::fs")]);
        assert_eq!(found("#[cfg(test)]\nmod tests;\nuse std::fs;"), [(3, "std::fs")]);
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        assert_eq!(found("// Instant::now\n/* std::fs /* std::env */ std::os */ x"), []);
        assert_eq!(
            found("let a = \"std::fs \\\" std::env\"; let b = r#\"std::os \" std::fs\"#;"),
            []
        );
        assert_eq!(
            found("fn f<'a>(c: &'a str) { let q = '\"'; let e = '\\''; }\nuse std::fs; // \""),
            [(2, "std::fs")]
        );
        assert_eq!(
            found("let s = b\"a\\\\\"; std::fs::read(s); let t = br\"x\\\"; std::env::args()"),
            [(1, "std::fs"), (1, "std::env")]
        );
    }
}
