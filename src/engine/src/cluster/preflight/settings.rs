//! The settings of a cluster, by name.

use super::{Refusal, config};
use crate::cluster::records::{Config, REPLICATION_FACTORS, Record};
use crate::cluster::step::Step;
use crate::cluster::view::Cluster;

/// A setting of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// [`Config::name`].
    Name,
    /// [`Config::id`].
    Id,
    /// [`Config::shards`].
    Shards,
    /// [`Config::replication`].
    Replication,
    /// [`Config::replace_after_ms`].
    ReplaceAfter,
    /// [`Config::moves_per_node`].
    MovesPerNode,
    /// [`Config::moves_total`].
    MovesTotal,
}

/// All settings, those that can be changed first.
pub const SETTINGS: [Setting; 7] = [
    Setting::Replication,
    Setting::ReplaceAfter,
    Setting::MovesPerNode,
    Setting::MovesTotal,
    Setting::Name,
    Setting::Id,
    Setting::Shards,
];

impl Setting {
    /// The name, as [`set_config`] takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Id => "id",
            Self::Shards => "shards",
            Self::Replication => "replication",
            Self::ReplaceAfter => "replace_after",
            Self::MovesPerNode => "moves_per_node",
            Self::MovesTotal => "moves_total",
        }
    }

    /// The value in this configuration, as [`set_config`] takes it.
    pub fn value(self, config: &Config) -> String {
        match self {
            Self::Name => config.name.clone(),
            Self::Id => format!("{:032x}", config.id),
            Self::Shards => config.shards.to_string(),
            Self::Replication => config.replication.to_string(),
            Self::ReplaceAfter => format!("{}ms", config.replace_after_ms),
            Self::MovesPerNode => config.moves_per_node.to_string(),
            Self::MovesTotal => config.moves_total.to_string(),
        }
    }

    fn find(key: &str) -> Result<Self, Refusal> {
        let key = key.to_lowercase().replace('-', "_");
        let found = SETTINGS.into_iter().find(|setting| setting.name() == key);
        found.ok_or_else(|| {
            let names = SETTINGS
                .into_iter()
                .map(|setting| (distance(&key, setting.name()), setting.name()));
            // Further away than that it is another word.
            let near = names.filter(|(distance, name)| 2 * distance <= name.len()).min();
            Refusal::UnknownSetting {
                key,
                nearest: near.map(|(_, name)| name),
            }
        })
    }
}

/// Changes a setting. Names may be written with `-` for `_`; times are whole numbers of `ms`, `s`, `m` or `h`.
pub fn set_config(cluster: &Cluster, key: &str, value: &str) -> Result<Vec<Step>, Refusal> {
    let now = config(cluster)?;
    let setting = Setting::find(key)?;
    let refuse = |expected| Refusal::Value {
        key: setting.name(),
        value: value.to_owned(),
        expected,
    };
    let number = || {
        let number = value.parse().ok().filter(|number: &u16| *number > 0);
        number.ok_or_else(|| refuse("a whole number from 1 to 65,535"))
    };
    let mut next = now.clone();
    match setting {
        Setting::Name | Setting::Id | Setting::Shards => return Err(Refusal::Fixed { key: setting.name() }),
        Setting::Replication => {
            let factor = value.parse().ok().filter(|factor| REPLICATION_FACTORS.contains(factor));
            next.replication = factor.ok_or_else(|| {
                refuse("1, 3 or 5: with an even number no more nodes may fail than with one replica less")
            })?;
            check_replication(cluster, &next, now.replication)?;
        }
        Setting::ReplaceAfter => {
            let time = milliseconds(value);
            next.replace_after_ms = time.ok_or_else(|| refuse("a time like 500ms, 90s, 2m or 1h"))?;
        }
        Setting::MovesPerNode => next.moves_per_node = number()?,
        Setting::MovesTotal => next.moves_total = number()?,
    }
    if next == *now {
        return Ok(Vec::new());
    }
    let text = format!(
        "{} is {}, after {}",
        setting.name(),
        setting.value(&next),
        setting.value(now)
    );
    Ok(vec![Step::new(cluster, &Record::Config(next), text)?])
}

/// While nodes leave, the factor may not be raised above what remains: they could never go.
fn check_replication(cluster: &Cluster, next: &Config, now: u8) -> Result<(), Refusal> {
    let nodes = cluster.nodes().filter(|node| node.state.keeps_replicas()).count();
    let leave = cluster
        .nodes()
        .any(|node| node.state == crate::cluster::records::NodeState::Leaving);
    if leave && next.replication > now && usize::from(next.replication) > nodes {
        return Err(Refusal::BelowReplication {
            nodes,
            replication: next.replication,
        });
    }
    Ok(())
}

fn milliseconds(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit_ms)
}

/// Insertions, deletions and replacements of bytes from one text to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(milliseconds("500ms"), Some(500));
        assert_eq!(milliseconds("90s"), Some(90_000));
        assert_eq!(milliseconds("2m"), Some(120_000));
        assert_eq!(milliseconds("1h"), Some(3_600_000));
        for wrong in ["", "5", "s", "-1s", "1.5s", "1 s", "1d", "18446744073709551615h", "ä"] {
            assert_eq!(milliseconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn distances_are_of_levenshtein() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
