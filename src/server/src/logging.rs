//! Logging: `tracing` events to standard error. Standard output is for results.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// What openraft may say unless the rules name it: it tells of every vote and every call to a node that is away at the levels that are
/// for people, once for each shard. What matters of that, the node says itself.
const OPENRAFT: &str = "openraft=error";

/// The filter of some rules. The error is what is wrong with them.
fn filter(rules: &str) -> Result<EnvFilter, String> {
    let rules = if rules.contains("openraft") {
        rules.to_owned()
    } else {
        // In front: of two rules for one target the later one wins.
        format!("{OPENRAFT},{rules}")
    };
    EnvFilter::try_new(rules).map_err(|error| error.to_string())
}

/// Starts logging as the configuration says. The error is a filter that cannot be read, in words.
pub fn start(log: &Log) -> Result<(), String> {
    let rules = &log.filter;
    let filter = filter(rules).map_err(|error| {
        format!("the log filter `{rules}` is wrong: {error}; an example is \"info,generation_node=debug\"")
    })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openraft_is_quiet_unless_it_is_asked() {
        assert_eq!(filter("info").unwrap().to_string(), "openraft=error,info");
        assert_eq!(
            filter("info,openraft=debug").unwrap().to_string(),
            "openraft=debug,info"
        );
        assert!(filter("==").is_err());
    }
}
