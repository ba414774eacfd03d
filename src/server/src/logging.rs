//! Logging: `tracing` events to standard error. Standard output is for results.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Starts logging as the configuration says. The error is a filter that cannot be read, in words.
pub fn start(log: &Log) -> Result<(), String> {
    let rules = &log.filter;
    let filter = EnvFilter::try_new(rules).map_err(|error| {
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
