//! How fresh a read must be.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use generation_proto::Consistency as WireConsistency;

use super::session::SessionToken;

/// How fresh a read must be, and so who may answer it.
///
/// As text, for command lines and configuration: `linearizable`, `session`, `stale:500ms`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Consistency {
    /// The read sees every write acknowledged before it began, whoever made it.
    #[default]
    Linearizable,
    /// The read sees at least what this client has seen of the shard: its own writes, and nothing going backwards.
    ReadYourWrites,
    /// The read sees at least what the token has seen.
    Session(SessionToken),
    /// The read sees a state at most this old, from any replica.
    Stale(Duration),
}

impl Consistency {
    /// For a request to `shard`. `own` is what this client has seen of it, as (epoch, index).
    pub fn on_wire(&self, shard: u16, own: (u32, u64)) -> WireConsistency {
        let session = |(epoch, index)| WireConsistency::Session { shard, epoch, index };
        match self {
            Self::Linearizable => WireConsistency::Linearizable,
            Self::ReadYourWrites => session(own),
            Self::Session(token) => session(token.seen(shard)),
            Self::Stale(age) => WireConsistency::Stale {
                max_age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
            },
        }
    }

    /// Whether any replica may answer, and not the leader alone or at its word.
    pub const fn is_any_replicas(&self) -> bool {
        !matches!(self, Self::Linearizable)
    }

    /// Whether the option differs from shard to shard, so that one request cannot ask several shards.
    pub const fn is_per_shard(&self) -> bool {
        matches!(self, Self::ReadYourWrites | Self::Session(_))
    }
}

/// A text is not a consistency.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a consistency: expected linearizable, session, or stale:AGE such as stale:500ms or stale:2s")]
pub struct ParseConsistencyError(String);

impl FromStr for Consistency {
    type Err = ParseConsistencyError;

    fn from_str(text: &str) -> Result<Self, ParseConsistencyError> {
        let error = || ParseConsistencyError(text.to_owned());
        match text {
            "linearizable" => Ok(Self::Linearizable),
            "session" => Ok(Self::ReadYourWrites),
            _ => {
                let age = text.strip_prefix("stale:").ok_or_else(error)?;
                let (number, unit) = age.split_at(age.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?);
                let number: u32 = number.parse().map_err(|_| error())?;
                match unit {
                    "ms" => Ok(Self::Stale(Duration::from_millis(u64::from(number)))),
                    "s" => Ok(Self::Stale(Duration::from_secs(u64::from(number)))),
                    _ => Err(error()),
                }
            }
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linearizable => f.write_str("linearizable"),
            Self::ReadYourWrites | Self::Session(_) => f.write_str("session"),
            Self::Stale(age) => write!(f, "stale:{}ms", age.as_millis()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_lines_spelling_is_understood() {
        for text in ["linearizable", "session", "stale:500ms", "stale:0ms"] {
            assert_eq!(text.parse::<Consistency>().unwrap().to_string(), text);
        }
        assert_eq!("stale:2s".parse(), Ok(Consistency::Stale(Duration::from_secs(2))));
        for wrong in [
            "",
            "Linearizable",
            "stale",
            "stale:",
            "stale:5",
            "stale:ms",
            "stale:-5ms",
            "stale:5m",
            "stale:99999999999s",
        ] {
            assert!(wrong.parse::<Consistency>().is_err(), "{wrong}");
        }
    }
}
