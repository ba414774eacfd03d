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
            "durability",
            "cluster",
            "gossip",
            "tls",
            "memory",
            "journal",
            "sessions",
            "limits",
            "network",
            "log",
        ],
    ),
    ("cluster", &["id", "zone", "epoch", "nodes"]),
    (MEMBER, &["id", "addr", "cores"]),
    ("gossip", &["key_file", "listen", "advertise", "interval", "seeds"]),
    ("tls", &["ca", "certificate", "key"]),
    ("memory", &["budget", "max_records", "policy"]),
    ("journal", &["size", "segment", "snapshot_after"]),
    ("sessions", &["idle_timeout", "window"]),
    (
        "limits",
        &[
            "max_value",
            "connections_per_core",
            "connections_per_address",
            "idle_timeout",
            "drain",
        ],
    ),
    ("network", &["socket_buffer"]),
    ("log", &["filter", "format"]),
];

/// The section of each entry of `cluster.nodes`, as TOML writes it out.
const MEMBER: &str = "[cluster.nodes]";

/// Least similarity (Jaro-Winkler) of a key that is worth suggesting.
const SIMILAR: f64 = 0.75;

fn keys_of(section: &str) -> Option<&'static [&'static str]> {
    SECTIONS
        .iter()
        .find(|(name, _)| *name == section)
        .map(|(_, keys)| *keys)
}

/// All keys that are not sections, without those of entries of a list.
#[cfg(test)]
pub(super) fn all_keys() -> Vec<&'static str> {
    SECTIONS
        .iter()
        .filter(|(section, _)| *section != MEMBER)
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
            unknown.extend(strangers(table, known, name));
            let nodes = table
                .iter()
                .filter(|(key, _)| (name, key.get_ref().as_ref()) == ("cluster", "nodes"));
            for (_, nodes) in nodes {
                let entries = nodes.get_ref().as_array().into_iter().flatten();
                for entry in entries.filter_map(|entry| entry.get_ref().as_table()) {
                    unknown.extend(strangers(entry, keys_of(MEMBER).unwrap_or_default(), MEMBER));
                }
            }
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

/// The keys of a table that are not known, with their offsets and the section's name.
fn strangers<'a>(
    table: &'a DeTable<'_>,
    known: &'a [&'static str],
    section: &'a str,
) -> impl Iterator<Item = (usize, &'a str, &'a str)> {
    let keys = table
        .keys()
        .map(move |key| (key.span().start, key.get_ref().as_ref(), section));
    keys.filter(move |(_, key, _)| !known.contains(key))
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
