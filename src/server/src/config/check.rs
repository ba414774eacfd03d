//! Errors of a configuration file: their lines, and the key that was probably meant.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// The keys of the file, by section; the first section is the file itself, whose keys include the sections.
const SECTIONS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "listen",
            "advertise",
            "data_dir",
            "cores",
            "pin",
            "cpus",
            "shards",
            "tls",
            "memory",
            "limits",
            "network",
            "log",
        ],
    ),
    ("tls", &["ca", "certificate", "key"]),
    ("memory", &["budget", "max_records", "policy"]),
    (
        "limits",
        &["max_value", "connections_per_core", "idle_timeout", "drain"],
    ),
    ("network", &["socket_buffer"]),
    ("log", &["filter", "format"]),
];

/// Least similarity (Jaro-Winkler) of a key that is worth suggesting.
const SIMILAR: f64 = 0.75;

fn keys_of(section: &str) -> Option<&'static [&'static str]> {
    SECTIONS
        .iter()
        .find(|(name, _)| *name == section)
        .map(|(_, keys)| *keys)
}

/// All keys that are not sections.
#[cfg(test)]
pub(super) fn all_keys() -> Vec<&'static str> {
    SECTIONS
        .iter()
        .flat_map(|(_, keys)| *keys)
        .copied()
        .filter(|key| keys_of(key).is_none())
        .collect()
}

/// Refuses keys that do not exist, the first of the file first.
pub(super) fn keys(path: &Path, text: &str) -> Result<(), ConfigError> {
    let document = DeTable::parse(text).map_err(|error| line_error(path, text, &error))?;
    let mut unknown = Vec::new();
    for (key, value) in document.get_ref() {
        let name = key.get_ref().as_ref();
        if !SECTIONS[0].1.contains(&name) {
            unknown.push((key.span().start, name, ""));
        }
        if let (Some(known), DeValue::Table(table)) = (keys_of(name), value.get_ref()) {
            let strangers = table.keys().filter(|key| !known.contains(&key.get_ref().as_ref()));
            unknown.extend(strangers.map(|key| (key.span().start, key.get_ref().as_ref(), name)));
        }
    }
    unknown.sort_unstable();
    match unknown.first() {
        None => Ok(()),
        Some((offset, key, section)) => Err(ConfigError::Line {
            path: path.to_owned(),
            line: line_of(text, *offset),
            message: unknown_key(key, section),
        }),
    }
}

fn unknown_key(key: &str, section: &str) -> String {
    let place = if section.is_empty() {
        String::new()
    } else {
        format!(" in [{section}]")
    };
    let known = keys_of(section).unwrap_or_default();
    let advice = if let Some((home, _)) = SECTIONS.iter().find(|(_, keys)| keys.contains(&key)) {
        if home.is_empty() {
            "it belongs above all sections".to_owned()
        } else {
            format!("it belongs into [{home}]")
        }
    } else if let Some(meant) = similar(key, known) {
        format!("did you mean `{meant}`?")
    } else {
        format!("known are `{}`", known.join("`, `"))
    };
    format!("unknown key `{key}`{place}; {advice}")
}

fn similar<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let score = |candidate: &str| strsim::jaro_winkler(key, candidate);
    known
        .iter()
        .copied()
        .max_by(|a, b| score(a).total_cmp(&score(b)))
        .filter(|best| score(best) >= SIMILAR)
}

/// What the TOML library says, on one line, with the file and the line it says it of.
pub(super) fn line_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start);
    let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
    ConfigError::Line {
        path: path.to_owned(),
        line: line_of(text, offset),
        message,
    }
}

/// The line, from 1, of a byte of the text.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.get(..offset).unwrap_or(text);
    before.matches('\n').count() + 1
}
